"""A model whose inputs can be removed, unit by unit: features, pixels with all channels, tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...target import Logit, LogProbability, TargetLike, as_target
from ...task import Task
from ..asking import asking, everything
from ..baselines import Baseline, Keep, baseline_point
from ..copies import Copies, moving
from ..entry import Entry
from ..question import Question, widened
from ..result import Attribution, channel_axis
from .methods import Explanation, explained, matching

__all__ = ["Follow", "Stage", "staged"]

Follow: TypeAlias = Literal["probability", "target"]
"""What of the model's answer is followed."""

MOST = 2**16
"""Settings in one pass, if ever so small."""


@dataclass(eq=False)
class Stage:
    """A model, its inputs, and what stands in place of a unit that is removed.

    Args:
        entry: The model and its inputs.
        question: What is read of the outputs.
        read: Makes the number that is followed of an answer.
        unit: Unit of that number.
        start: What removed units become, ``[example, …]``.
        free: Which units may be removed, ``[example, unit]``: no padding, nothing that is kept.
        copies: Runs the model at many settings in one pass, where that is right.
    """

    entry: Entry
    question: Question
    read: Callable[[Tensor], Tensor]
    unit: str
    start: Tensor
    free: Tensor
    copies: Copies

    @property
    def rows(self) -> Tensor:
        """Numbers of the examples."""
        return everything(self.entry)

    @property
    def point(self) -> Tensor:
        """The inputs themselves, in float32 at least; vectors where they are ids."""
        return widened(self.entry.point)

    @property
    def axis(self) -> int | None:
        """The axis whose entries belong to one unit."""
        return _axis(self.entry)

    def units(self, scores: Tensor) -> Tensor:
        """Return one score for each unit: those of all channels of a pixel are added up.

        Args:
            scores: Shaped like the inputs, or like them without the channel axis.

        Returns:
            Float64 ``[example, unit]``.
        """
        return self.parts(scores).sum(-1)

    def parts(self, scores: Tensor) -> Tensor:
        """Return the scores unit by unit.

        Args:
            scores: Shaped like the inputs, or like them without the channel axis.

        Returns:
            Float64 ``[example, unit, part]``: one part where there is one score for each unit,
            else as many as a unit has channels.

        Raises:
            ArgumentError: If the shape fits neither.
        """
        scores = scores.detach().to(self.start.device).double()
        axis, shape = self.axis, self.start.shape
        without = shape if axis is None else shape[:axis] + shape[axis + 1 :]
        if scores.shape == without:
            return scores.reshape(*self.free.shape, 1)
        if axis is not None and scores.ndim == len(shape):
            found = scores.movedim(axis, -1)
            if found.shape[:-1] == without and found.shape[-1] in (1, shape[axis]):
                return found.reshape(*self.free.shape, found.shape[-1])
        raise ArgumentError.of(
            "scores",
            expected=f"the shape of the inputs, {tuple(self.entry.inputs.shape)}"
            + ("" if axis is None or self.entry.is_tokens else ", or that without channels"),
            got=tuple(scores.shape),
            do="Pass what an attribution method returned for the same inputs.",
        )

    def spread(self, units: Tensor) -> Tensor:
        """Return values of units in a shape that broadcasts over the inputs.

        Args:
            units: ``[…, unit]``.

        Returns:
            ``[…, *one example]`` with size 1 along the channels.
        """
        shape, axis = list(self.start.shape[1:]), self.axis
        if axis is not None:
            shape[axis - 1] = 1
        return units.reshape(*units.shape[:-1], *shape)

    def answers(self, kept: Tensor) -> Tensor:
        """Return the model's answers with some units removed.

        Args:
            kept: Boolean ``[setting, example, unit]``, False where a unit is removed.

        Returns:
            ``[setting, example]``.
        """
        return self.at(
            lambda part: torch.where(self.spread(kept[part]), self.point, self.start), len(kept)
        )

    @torch.no_grad()
    def at(self, points: Callable[[slice], Tensor], count: int) -> Tensor:
        """Return the model's answers at many points, as many at a time as fit the cache.

        Args:
            points: Makes the points ``[setting, example, …]`` of some settings.
            count: Number of settings.

        Returns:
            ``[setting, example]``.
        """
        found = []
        for first in range(0, count, self.copies.many):
            part = points(slice(first, min(first + self.copies.many, count)))
            values = self.copies.values(part.flatten(0, 1))
            found.append(self.read(values).view(len(part), -1))
        return torch.cat(found) if found else self.point.new_empty(0, len(self.rows))

    def now(self) -> Tensor:
        """Return the model's answers at the inputs themselves.

        Returns:
            ``[example]``.
        """
        return self.read(self.question(self.entry.outputs.detach(), self.rows))


@contextmanager
def staged(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike,
    *,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "probability",
    task: Task | None = None,
) -> Iterator[tuple[Stage, Attribution | Tensor]]:
    """Explain the inputs where scores are not given, and set the stage to test the scores.

    Args:
        model: The user's model; left exactly as it was.
        inputs: Floats, ids, or a whole batch.
        explanation: Scores, or a method.
        target: What is asked; None asks what the explanation was about.
        baseline: What removed units become; see `integrated_gradients`.
        keep: Tokens that are never removed.
        follow: ``"probability"`` follows the probability of the token or class that the target asks
            about, where it asks about one alone; ``"target"`` the target itself.
        task: How the batch becomes outputs.

    Yields:
        The stage, and the scores.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    check_follow(follow)
    if target is None and not isinstance(explanation, Attribution | Tensor):
        target = getattr(explanation, "target", None)
    scores = explained(explanation, model, inputs, target, task)
    batch = matching(inputs, scores)
    with asking(model, batch, _asked(target, scores), task, graph=False) as (entry, question):
        if target is None and isinstance(scores, Attribution):
            question = _as_explained(question, scores)
        start = baseline_point(entry, baseline, keep)
        read, unit, question = _reading(question, follow)
        copies = Copies(entry, question, MOST)
        yield Stage(entry, question, read, unit, start, _free(entry, keep), copies), scores


def check_follow(follow: str) -> None:
    """Refuse to follow what does not exist.

    Args:
        follow: What the user named.

    Raises:
        ArgumentError: If it is neither of the two.
    """
    if follow not in get_args(Follow):
        raise ArgumentError.of(
            "follow",
            expected=f"one of {list(get_args(Follow))}",
            got=repr(follow),
            do="Choose one.",
        )


def _asked(target: TargetLike, scores: Attribution | Tensor) -> TargetLike:
    if target is not None or not isinstance(scores, Attribution):
        return target
    if scores.token is None:
        raise ArgumentError.of(
            "target",
            expected="the target that the attribution was about",
            got=f"None for an attribution of {scores.convention.get('target')}",
            do="Pass the same target as to the method.",
        )
    return scores.token


def _as_explained(question: Question, scores: Attribution) -> Question:
    """Ask about the very token and position that were explained."""
    fixed = dataclasses.replace(as_target(scores.token), task=None)  # type: ignore[type-var]
    return dataclasses.replace(question, target=fixed, token=scores.token, position=scores.position)


def _reading(
    question: Question, follow: Follow
) -> tuple[Callable[[Tensor], Tensor], str, Question]:
    one = type(question.target) in (Logit, LogProbability) and question.token is not None
    classes = question.outputs.shape[-1] if question.outputs.ndim > 1 else 1
    if follow == "target" or not one or classes < 2:
        return _as_it_is, question.unit, question
    asked = LogProbability(token=question.token)
    return torch.exp, "probability", dataclasses.replace(question, target=asked)


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _axis(entry: Entry) -> int | None:
    return entry.inputs.ndim if entry.is_tokens else channel_axis(entry.inputs.ndim)


def _free(entry: Entry, keep: Keep) -> Tensor:
    """Return which units a baseline may move: no padding, none that are kept."""
    free, axis = moving(entry, keep), _axis(entry)
    return (free if axis is None or entry.is_tokens else free.any(axis)).flatten(1)
