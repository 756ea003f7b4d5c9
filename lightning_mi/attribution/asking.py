"""What every gradient method does first: run the model once, settle the question, stay harmless."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import cloned
from ..errors import ArgumentError, ModelError
from ..inferring import task_or_plain
from ..isolation import frozen, untouched
from ..measurement import describe
from ..target import TargetLike, as_target
from ..task import Task
from .entry import Entry, enter
from .joint import enter_joint
from .left_padding import check_left_padding
from .question import Question, ask
from .several import InputsOf, Wrapped

__all__ = ["asking", "slope"]


@contextmanager
def asking(
    model: nn.Module,
    inputs: Any,
    target: TargetLike,
    task: Task | None,
    *,
    graph: bool,
    joint: bool = False,
) -> Iterator[tuple[Entry, Question]]:
    """Run the model once at the inputs, in a state in which gradients can be taken.

    Args:
        model: The user's model; left exactly as it was.
        inputs: Floats, ids, or a whole batch.
        target: Anything that `as_target` accepts.
        task: Runs the model. None: inferred where the target asks for the label or the loss, else
            a plain `Task`.
        graph: Whether the outputs of this first run can be differentiated.
        joint: Whether the method takes several inputs at once.

    Yields:
        Where gradients are taken, and what is asked.

    Raises:
        ArgumentError: If several inputs are to be explained at once and the method takes one.
    """
    with untouched(model) as plain, frozen(plain):
        batch = cloned(inputs)
        chosen = task if task is not None else _task(plain, batch, target)
        if isinstance(chosen, InputsOf):
            _check_joint(joint)
            for key in chosen.keys:
                check_left_padding(plain, batch, chosen.of(key))
            entry: Entry = enter_joint(plain, batch, chosen, graph=graph)
        else:
            check_left_padding(plain, batch, chosen)
            entry = enter(plain, batch, chosen, graph=graph)
        knows = chosen.inside if isinstance(chosen, Wrapped) else chosen
        yield entry, ask(as_target(target, knows), entry.outputs, batch)


def slope(
    entry: Entry, question: Question, value: Tensor, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return the gradient of a sum of target values.

    Args:
        entry: Where the model was run.
        question: What was asked.
        value: The target's values.
        leaves: What they are differentiated by.

    Returns:
        One gradient for each leaf; zeros where the model is constant.

    Raises:
        ModelError: If the model depends on its inputs but cuts their gradient.
    """
    if not value.requires_grad:
        _refuse_cut(entry, question)
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)


def everything(entry: Entry) -> Tensor:
    """Return the numbers of all examples.

    Args:
        entry: Where the model was run.

    Returns:
        Long tensor ``[example]``.
    """
    return torch.arange(len(entry.inputs), device=entry.inputs.device)


def recipe(target: TargetLike, question: Question) -> dict[str, Any]:
    """Return what is kept of the target, as plain JSON.

    Args:
        target: As the user gave it.
        question: What was made of it.

    Returns:
        Its description and unit.
    """
    said = describe(as_target(target) if target is None else target)
    return {"target": said, "target_unit": question.unit}


def _check_joint(joint: bool) -> None:
    if not joint:
        raise ArgumentError.of(
            "task",
            expected="one input, as this method explains one at a time",
            got="InputsOf several",
            do="Use each_input, or a method that together names: integrated_gradients.",
        )


def _refuse_cut(entry: Entry, question: Question) -> None:
    rows = everything(entry)
    with torch.no_grad():
        here = question(entry.outputs, rows)
        there = question(entry.run(torch.zeros_like(entry.point), rows), rows)
    if not torch.equal(here, there):
        raise ModelError(
            "model: expected outputs that can be differentiated, got outputs that depend on the "
            "inputs but carry no gradient (torch.no_grad or .detach() in the forward pass, or an "
            "argmax). Pass a Task whose outputs(model, batch) returns the logits themselves."
        )


def _task(model: nn.Module, batch: Any, target: TargetLike) -> Task:
    simple = isinstance(target, int | Tensor) and type(model).forward is not nn.Module.forward
    if simple:
        return Task()
    return task_or_plain(model, batch)
