"""What the measurements of attribution share: computed once in a firing, on the first examples."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import nn

from ..batch import cut
from ..errors import ArgumentError
from ..inferring import plain_task
from ..measurement import Context
from ..record import Reading
from ..target import Loss, TargetLike, TargetOption, as_target
from ..task import Task
from .result import Attribution
from .several import InputOf, InputsOf, Wrapped

__all__ = ["Attributed", "Of", "check_examples", "explaining", "shareable", "shortened", "task_in"]

Of: TypeAlias = str | int | list[str | int] | None
"""Which entries of a batch are explained: one, several at once, or the main input."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Attributed:
    """Base of measurements that attribute a target to inputs.

    Args:
        name: First part of the records' names.
        target: As in the function of the method.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where a model has several inputs: a key, or the
            index in a tuple. None takes the main input; a list takes several at once, for the
            methods that `together` names.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "attribution"
    target: TargetOption | TargetLike = None
    examples: int | None = None
    of: Of = None
    joint: ClassVar[bool] = False
    """Whether the method explains several inputs at once."""

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_examples(self.examples)
        if isinstance(self.of, list) and not self.joint:
            raise ArgumentError.of(
                "of",
                expected="one input, as this method explains one at a time",
                got=repr(self.of),
                do="Take a measurement for each input, or for example IntegratedGradients.",
            )

    @abstractmethod
    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call the function of the method.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """

    def attribution(self, model: nn.Module, context: Context) -> Attribution:
        """Return the scores, computed once in a firing.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            The scores.
        """

        def compute() -> Attribution:
            batch = shortened(context.batch, self.examples)
            task = task_in(context, model, self.target)
            if self.of is None:
                return self.compute(model, batch, task)
            asked = dataclasses.replace(self, target=as_target(self.target, task))
            found = asked.compute(model, batch, explaining(self.of, task))
            if isinstance(self.of, list):
                return found
            return dataclasses.replace(found, convention={**found.convention, "input": self.of})

        asked = (f.name for f in dataclasses.fields(self) if f.name != "name")
        key = tuple((name, shareable(getattr(self, name))) for name in asked)
        return context.shared((f"attribution.{type(self).__qualname__}", key), compute)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            ``values`` and ``target``, and what else the method says about itself.
        """
        return self.attribution(model, context).reading(context.texts)


def task_in(context: Context, model: nn.Module, target: Any) -> Task:
    """Return the task of a firing; a plain one where a target that is named needs no labels.

    Args:
        context: Batch and task.
        model: The user's model.
        target: What is asked; None means the label.

    Returns:
        The task.

    Raises:
        ArgumentError: If there is no target, and the task cannot be inferred.
    """
    if target is None or isinstance(target, Loss):
        return context.task

    def find() -> Task:
        try:
            return context.task
        except ArgumentError:
            return plain_task(model, context.batch)

    # Shared, because it takes a forward pass to see that nothing can be inferred.
    return context.shared("attribution.task", find)


def explaining(of: Of, task: Task) -> Task:
    """Return the task whose inputs are the ones that a measurement explains.

    Args:
        of: What the measurement says.
        task: Of the batch.

    Returns:
        The task itself where the main input is meant.
    """
    if of is None:
        return task
    inside = task.inside if isinstance(task, Wrapped) else task
    return InputsOf(of, inside) if isinstance(of, list) else InputOf(of, inside)


def check_examples(examples: int | None) -> None:
    """Refuse impossible numbers of examples.

    Args:
        examples: A number or None.

    Raises:
        ArgumentError: If it is less than 1.
    """
    if examples is not None and (not isinstance(examples, int) or examples < 1):
        raise ArgumentError.of(
            "examples", expected="a positive int or None", got=repr(examples), do="Pass None: all."
        )


def shortened(batch: Any, examples: int | None) -> Any:
    """Return the first examples of a batch.

    Args:
        batch: Any batch.
        examples: How many; None takes all.

    Returns:
        The batch.
    """
    return batch if examples is None else cut(batch, examples)


def shareable(argument: Any) -> Any:
    """Return what stands for an argument in the key of a shared result.

    Args:
        argument: A target, a baseline or a plain value.

    Returns:
        The value itself if it is a plain one, else its identity.
    """
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    return ("id", id(argument))
