"""The objective of a LightningModule, where it can be verified: `objective_of`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import batch_size, cut
from ..errors import ArgumentError, ModelError
from ..inferring import infer_task
from ..isolation import untouched, unwrapped
from ..measurement import at_home
from ..task import NextToken, Task

__all__ = ["decay_of", "verified_task"]

Regularizer = Callable[[nn.Module], Tensor]

CLOSE = 1e-4
"""How far the training loss may be from the mean of our losses, relative."""


def verified_task(
    module: nn.Module, batch: Any, task: Task | None, regularizer: Regularizer | None
) -> Task:
    """Return a task whose mean loss (plus the regulariser) is a module's training loss.

    Both are computed in evaluation mode on the whole batch and on its first example; a copy of the
    module runs its ``training_step``, so that nothing is logged and no metric moves.

    Args:
        module: A LightningModule.
        batch: A training batch, as the loader delivers it.
        task: The task; None is inferred.
        regularizer: R(module), None where the training loss has none.

    Returns:
        The task.

    Raises:
        ArgumentError: If the losses differ.
        ModelError: If there is no training loss to compare with.
    """
    plain = unwrapped(module)
    step = getattr(plain, "training_step", None)
    if not callable(step) or not getattr(plain, "automatic_optimization", True):
        kind = type(plain).__name__
        raise ModelError(
            "module: expected a LightningModule whose training_step returns the loss, got "
            f"{kind} {'without one' if not callable(step) else 'with manual optimization'}. "
            "Say what was minimised: Objective(Classification(), regularizer=…)."
        )
    own = at_home(plain, batch)
    found = infer_task(plain, own) if task is None else task
    parts = [own] if batch_size(own) == 1 else [own, cut(own, 1)]
    for part in parts:
        ours, each = _ours(plain, found, part, regularizer)
        theirs = _theirs(plain, part)
        if abs(ours - theirs) > CLOSE * max(abs(theirs), 1e-6):
            raise _differs(found, ours, theirs, each)
    return found


def _ours(
    module: nn.Module, task: Task, batch: Any, regularizer: Regularizer | None
) -> tuple[float, Tensor]:
    with untouched(module) as plain, torch.no_grad():
        each = task.loss(task.outputs(plain, batch), batch)
        extra = 0.0 if regularizer is None else float(regularizer(plain))
    return float(each.double().mean()) + extra, each


def _theirs(module: nn.Module, batch: Any) -> float:
    with untouched(module) as plain:
        try:
            moved = copy.deepcopy(plain)  # It knows no Trainer.
        except Exception as error:
            raise _not_run("module: expected one that copy.deepcopy copies", error) from error
    with untouched(moved) as plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # self.log() says that nobody listens.
        step: Any = plain.training_step
        takes = len(inspect.signature(step).parameters)
        try:
            value = step(*(batch, 0, 0)[:takes])
        except Exception as error:
            raise _not_run("training_step: expected to run without a Trainer", error) from error
    loss = value.get("loss") if isinstance(value, Mapping) else value
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = type(value).__name__ if loss is value else "a mapping without a loss"
        raise ModelError(
            f"training_step: expected a loss, or a mapping with the key loss, got {got}. "
            "Say what was minimised: Objective(Classification())."
        )
    return float(loss.detach())


def _not_run(expected: str, error: Exception) -> ModelError:
    got = f"{type(error).__name__}: {str(error)[:200]}".rstrip(".")
    do = "Say what was minimised: Objective(Classification())."
    return ModelError(f"{expected}, got {got}. {do}")


def _differs(task: Task, ours: float, theirs: float, each: Tensor) -> ArgumentError:
    n = len(each)
    name = type(task).__name__
    do = (
        "Pass a Task with the module's own loss, or regularizer=… where training_step adds one "
        "(weight decay of an optimizer is not in its loss)."
    )
    if abs(float(each.double().sum()) - theirs) <= CLOSE * abs(theirs):
        do = "The module sums over examples: divide its loss by the batch's size."
    elif isinstance(task, NextToken):
        do += " A mean over all tokens is a mean over texts only where they are of one length."
    return ArgumentError.of(
        "module",
        expected=f"a training loss that is the mean of the {name} losses of {n} examples",
        got=f"{theirs:.6g} from training_step and {ours:.6g} as that mean",
        do=do,
    )


def decay_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> Regularizer | None:
    """Return the regulariser that an optimizer's weight decay amounts to.

    Args:
        optimizer: SGD, Adam or any other that adds ``weight_decay · θ`` to the gradient.
        module: The model whose parameters it holds.

    Returns:
        R(θ) = Σ weight_decay/2 ‖θ‖², or None where there is none.

    Raises:
        ArgumentError: If the decay is decoupled from the gradient (AdamW), so that it is the
            gradient of nothing.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    groups = [(g, float(g.get("weight_decay") or 0.0)) for g in optimizer.param_groups]
    decays = {names[id(p)]: w for g, w in groups for p in g["params"] if w and id(p) in names}
    if not decays:
        return None
    decoupled = [g.get("decoupled_weight_decay") for g, _ in groups]
    if any(decoupled) or type(optimizer).__name__ in ("AdamW", "Lion", "Adafactor"):
        raise ArgumentError.of(
            "optimizer",
            expected="weight decay that is part of the gradient, as in SGD and Adam",
            got=f"{type(optimizer).__name__}, which decays weights beside the gradient",
            do="Its fixed point is no minimum of a loss. Leave optimizer out, and read the scores "
            "with their gradient norm.",
        )

    def regularizer(model: nn.Module) -> Tensor:
        terms = [
            decays[n] / 2 * p.square().sum() for n, p in model.named_parameters() if n in decays
        ]
        return torch.stack(terms).sum()

    return regularizer
