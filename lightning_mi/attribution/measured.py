"""What the measurements of attribution share: computed once in a firing, on the first examples."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..batch import cut
from ..errors import ArgumentError
from ..measurement import Context
from ..record import Reading
from ..target import TargetLike, TargetOption, as_target
from ..task import Task
from .result import Attribution
from .several import InputOf

__all__ = ["Attributed", "check_examples", "shareable", "shortened"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Attributed:
    """Base of measurements that attribute a target to inputs.

    Args:
        name: First part of the records' names.
        target: As in the function of the method.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where a model has several inputs: a key, or the
            index in a tuple. None takes the main input.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "attribution"
    target: TargetOption | TargetLike = None
    examples: int | None = None
    of: str | int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_examples(self.examples)

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
            if self.of is None:
                return self.compute(model, batch, context.task)
            asked = dataclasses.replace(self, target=as_target(self.target, context.task))
            return asked.compute(model, batch, InputOf(self.of, context.task))

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
