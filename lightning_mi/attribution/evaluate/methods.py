"""Any attribution method, called in one way, and the question that it answers held fixed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...batch import batch_size, cut
from ...errors import ArgumentError
from ...inferring import task_or_plain
from ...measurement import Context, Measurement
from ...target import TargetLike
from ...task import Task
from ..measured import explaining, task_in
from ..question import Question
from ..result import Attribution

__all__ = ["Explanation", "Fixed", "Method", "explained", "measured", "method_name"]

Method: TypeAlias = Measurement | Callable[..., Attribution | Tensor]
"""An attribution measurement such as ``Saliency()``, or a function such as ``saliency``.

A function is called with ``(model, batch, target)``, and with ``task`` if it takes that."""

Explanation: TypeAlias = Attribution | Tensor | Method
"""Scores, or what makes them."""


class Fixed:
    """A question about logits as a target that means the same at other inputs.

    Args:
        question: Whose token and position were settled.
    """

    # No dataclass: the outputs that a question holds are no part of a recipe.
    def __init__(self, question: Question) -> None:
        self.question = question

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it means that the model does better."""
        return bool(self.question.target.higher_is_better)

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the target's value.

        Args:
            outputs: The model's outputs.
            batch: Not used.

        Returns:
            Shape ``[example]``.
        """
        return self.question(outputs, torch.arange(len(outputs), device=outputs.device))


def explained(
    method: Explanation,
    model: nn.Module,
    batch: Any,
    target: TargetLike = None,
    task: Task | None = None,
) -> Attribution | Tensor:
    """Return the scores that a method gives to a batch.

    Args:
        method: Scores (returned as they are), a measurement or a function.
        model: The user's model.
        batch: The batch.
        target: Replaces the target of a measurement; None leaves it its own.
        task: How the batch becomes outputs; None is inferred.

    Returns:
        What the method returns.

    Raises:
        ArgumentError: If it is none of these, or returns no scores.
    """
    if isinstance(method, Attribution | Tensor):
        return method
    if isinstance(method, type) or not callable(method):
        raise ArgumentError.of(
            "method",
            expected="an attribution measurement such as Saliency(), or a function (model, batch, "
            "target)",
            got=f"the class {method.__name__}" if isinstance(method, type) else repr(method)[:60],
            do="Pass for example method=Saliency(), with brackets.",
        )
    if isinstance(method, Measurement):
        known = task if task is not None else task_or_plain(model, batch)
        return measured(method, model, Context(model, batch, known), target)
    takes_task = "task" in inspect.signature(method).parameters
    found = method(model, batch, target, **({"task": task} if takes_task else {}))
    if not isinstance(found, Attribution | Tensor):
        raise _no_scores(method, found)
    return found


def measured(
    method: Measurement, model: nn.Module, context: Context, target: TargetLike = None
) -> Attribution | Tensor:
    """Return the scores of an attribution measurement, shared within a firing where it shares.

    Args:
        method: The measurement.
        model: The user's model.
        context: Batch and task.
        target: Replaces the measurement's target; None leaves it its own.

    Returns:
        Its `Attribution`, or the values of its panel ``values``.

    Raises:
        ArgumentError: If it measures no attribution.
    """
    if target is not None and dataclasses.is_dataclass(method) and hasattr(method, "target"):
        method = dataclasses.replace(method, target=target)
    own = getattr(method, "attribution", None)
    if callable(own):
        found: Attribution = own(model, context)
        return found
    reading = method(model, context)
    if "values" not in reading or reading["values"].axes[:1] != ("example",):
        raise _no_scores(method, reading)
    return reading["values"].values.to(context.device)


def task_for(
    method: Measurement, context: Context, model: nn.Module, target: TargetLike = None
) -> Task:
    """Return the task of a firing, whose input is the one that a measurement explains.

    Args:
        method: The measurement; it may name the input with ``of``.
        context: Batch and task.
        model: The user's model.
        target: What is asked; None takes the method's target.

    Returns:
        The task.
    """
    asked = target if target is not None else getattr(method, "target", None)
    task, of = task_in(context, model, asked), getattr(method, "of", None)
    return explaining(of, task) if isinstance(of, str | int | list) else task


def method_name(method: Explanation) -> str:
    """Return how a method is called in records.

    Args:
        method: Scores, a measurement or a function.

    Returns:
        Its name.
    """
    if isinstance(method, Attribution):
        return method.method
    name = getattr(method, "name", None) or getattr(method, "__name__", None)
    return str(name) if isinstance(name, str) else "given scores"


def matching(batch: Any, scores: Attribution | Tensor) -> Any:
    """Return the examples of a batch that have scores: methods may take only the first few.

    Args:
        batch: The batch.
        scores: Scores of its first examples.

    Returns:
        The batch, shortened where there are fewer scores.
    """
    values = scores.values if isinstance(scores, Attribution) else scores
    size = len(values) if values.ndim else 1
    return cut(batch, size) if size < batch_size(batch) else batch


def _no_scores(method: Any, found: Any) -> ArgumentError:
    return ArgumentError.of(
        "method",
        expected="an attribution method: an Attribution, a tensor or a panel named values",
        got=f"a {type(found).__name__} from {method_name(method)}",
        do="Pass for example method=IntegratedGradients().",
    )
