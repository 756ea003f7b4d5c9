"""Finding the task where the user gives none: `infer_task`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .batch import LABEL_KEYS, batch_size, labels_of, main_input
from .calling import networks, takes_all
from .errors import ArgumentError, ModelError
from .isolation import untouched, unwrapped
from .task import Classification, NextToken, Regression, Task

__all__ = ["Unlabelled", "infer_task", "plain_task", "task_or_plain"]


def infer_task(model: nn.Module, batch: Any) -> Task:
    """Find the task from a batch and one forward pass.

    Integer ids and outputs ``[example, position, token]`` mean next token; integer labels, one
    for each example, mean classification; floating-point labels mean regression.

    Args:
        model: The user's model.
        batch: The user's batch, on the model's device.

    Returns:
        The task.

    Raises:
        ArgumentError: If what was seen fits none of them; the message names it.
        ModelError: If the model cannot be called.
    """
    module = _callable_module(unwrapped(model))
    inputs, labels = main_input(batch), labels_of(batch)
    if _has_no_label(model, batch, module):
        labels = None
    with untouched(model) as plain, torch.no_grad(), _CheckedLookups():
        outputs, dropped = _first_outputs(plain, batch, module)
    if dropped or _fit_next_token(inputs, outputs):
        return NextToken(module, drop_last_input=dropped)
    if labels is not None and _fit_classes(outputs, labels, batch_size(batch)):
        return Classification(module)
    if labels is not None and labels.is_floating_point() and labels.numel() == outputs.numel():
        return Regression(module)
    seen = f"inputs {_shape(inputs)}, outputs {_shape(outputs)}, labels {_shape(labels)}"
    raise ArgumentError.of(
        "task",
        expected="ids and outputs [example, position, token], or labels that fit the outputs",
        got=seen,
        do="Pass task=Classification(), NextToken(), Regression() or your own Task. Labels are the "
        f"last of a tuple, or stand under {', '.join(LABEL_KEYS)}.",
    )


class Unlabelled(Task):
    """A task of batches in which nothing is a label: the question is about the model's answer."""

    def labels(self, batch: Any) -> Tensor | None:
        """Return None.

        Args:
            batch: The user's batch.

        Returns:
            None.
        """
        return None


def task_or_plain(model: nn.Module, batch: Any) -> Task:
    """Find the task, or take a plain one where there are inputs without labels.

    Args:
        model: The user's model.
        batch: A batch, on the model's device.

    Returns:
        The task; a plain one asks about the model's own answer.
    """
    try:
        return infer_task(model, batch)
    except ArgumentError:
        return plain_task(model, batch)


def plain_task(model: nn.Module, batch: Any) -> Task:
    """Return a task that asks about the model's own answer, without looking for labels that fit.

    Args:
        model: The user's model.
        batch: A batch.

    Returns:
        The task.
    """
    module = _callable_module(unwrapped(model))
    return Unlabelled(module) if _has_no_label(model, batch, module) else Task(module)


def _has_no_label(model: nn.Module, batch: Any, module: str | None) -> bool:
    return takes_all(Task(module).network(unwrapped(model)), batch)


def _fit_next_token(inputs: Tensor, outputs: Tensor) -> bool:
    is_ids = not inputs.is_floating_point() and inputs.ndim == 2
    return is_ids and outputs.ndim == 3 and outputs.shape[:2] == inputs.shape


def _fit_classes(outputs: Tensor, labels: Tensor, size: int) -> bool:
    if labels.is_floating_point() or labels.numel() != size or outputs.ndim > 2:
        return False
    classes = max(2, outputs.shape[1] if outputs.ndim == 2 else 1)
    return outputs.shape[0] == size and bool((labels < classes).all())


def _first_outputs(model: nn.Module, batch: Any, module: str | None) -> tuple[Tensor, bool]:
    # Any error of the user's code, an assert included, may say that a window is too long.
    try:
        return Task(module).outputs(model, batch), False
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shorter = _outputs_without_last(model, batch, module)
        if shorter is None:
            raise ModelError(_cannot_call(model, batch, error)) from error
        return shorter, True


def _outputs_without_last(model: nn.Module, batch: Any, module: str | None) -> Tensor | None:
    """Windows of one token more than the model reads are usual in language modelling."""
    ids = main_input(batch)
    if ids.is_floating_point() or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    try:
        outputs = NextToken(module, drop_last_input=True).outputs(model, batch)
    except Exception:
        return None
    return outputs if _fit_next_token(ids[:, :-1], outputs) else None


class _CheckedLookups(TorchFunctionMode):
    """Refuse ids beyond an embedding's end before the kernel does: on a GPU that ends the process.

    So a position too many can be tried, and answered, on any device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            ids, rows = named["input"], len(named["weight"])
            if ids.numel() and (int(ids.max()) >= rows or int(ids.min()) < 0):
                raise IndexError(f"index {int(ids.max())} in an embedding of {rows} rows")
        return func(*args, **kwargs)


def _cannot_call(model: nn.Module, batch: Any, error: Exception) -> str:
    return (
        f"task: expected {type(model).__name__} to run on a batch whose input is "
        f"{_shape(main_input(batch))}, got {type(error).__name__}: {error}. "
        "Pass a Task whose outputs(model, batch) calls the model."
    )


def _callable_module(model: nn.Module) -> str | None:
    """Return None where the model has a forward, else the name of its only network."""
    if _has_forward(model):
        return None
    found = networks(model)
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"task: expected a model with a forward method, got {type(model).__name__} without one and "
        f"the submodules {found}. Pass for example task=Classification(module='net') with the name "
        "of the submodule that maps inputs to outputs."
    )


def _has_forward(model: nn.Module) -> bool:
    # nn.Module sets a function that raises; LightningModule's forward only calls that one.
    if "forward" in vars(model):
        return True
    forward = type(model).forward
    lightning = ("pytorch_lightning.core.module", "lightning.pytorch.core.module")
    return forward is not nn.Module.forward and forward.__module__ not in lightning


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
