"""A question asked at many points: several copies of the batch in one pass, where that is right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import counted
from .asking import everything, slope
from .baselines import Keep, baseline_point, for_each
from .entry import Entry
from .joint import Joint
from .line import PORTION
from .question import Question, widened

__all__ = ["Copies", "check_count", "moving"]


class Copies:
    """A model and a target, evaluated at stacked copies of the inputs.

    Args:
        entry: The model and its inputs.
        question: The target F.
        most: Most copies that will be asked for.

    Attributes:
        rows: Numbers of the examples.
        many: Copies in one pass. It depends on shapes and precision alone; 1 where the model mixes
            the examples of its batch or counts on its size.
    """

    def __init__(self, entry: Entry, question: Question, most: int) -> None:
        self.entry, self.question = entry, question
        self.rows = everything(entry)
        self.many = self._many(most)

    def values(self, points: Tensor) -> Tensor:
        """Return the target at stacked points.

        Args:
            points: Copies of the inputs, ``[copy · example, …]``.

        Returns:
            Shape ``[copy · example]``.
        """
        return self.question(self.entry.run(points, self.rows), self.rows)

    def slopes(self, points: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the target at stacked points.

        Args:
            points: Copies of the inputs, ``[copy · example, …]``.

        Returns:
            For each copy a gradient ``[example, …]``, without a graph.
        """
        leaf = points.detach().requires_grad_()
        (found,) = slope(self.entry, self.question, self.values(leaf), (leaf,))
        return found.chunk(len(points) // len(self.rows))

    @torch.no_grad()
    def _many(self, most: int) -> int:
        point, output = self.entry.point, self.entry.outputs
        held = point.numel() * max(4, point.element_size())
        held += output.numel() * output.element_size()
        portion = PORTION.get(point.device.type, PORTION["cpu"])
        wanted = min(most, portion // max(held, 1))
        return wanted if wanted > 1 and self._separable(point) else 1

    def _separable(self, point: Tensor) -> bool:
        here = self.question(self.entry.outputs, self.rows)
        try:
            # Other values beside them, so that a mean over the batch would move.
            both = self.values(torch.cat([point, 0.5 * point + 0.25]))
        except (RuntimeError, ValueError, IndexError):
            return False  # The forward pass counts on the size of its batch.
        slack = 1e-2 if point.element_size() < 4 else 1e-3
        off = (both[: len(here)] - here).abs().max()
        return bool(off <= slack * here.abs().max())


def moving(entry: Entry, keep: Keep = None) -> Tensor:
    """Return which inputs may leave their own value: not padding, and none that are kept.

    Args:
        entry: The model and its inputs.
        keep: Tokens that keep their own embedding, as for a baseline.

    Returns:
        Boolean, shaped like the inputs; of several inputs at once ``[example, component]``.
    """
    if isinstance(entry, Joint):
        kept = for_each(entry, "keep", keep)
        return entry.side_by_side(lambda key, part: _spread(part, moving(part, kept[key])))
    point = widened(entry.point)
    elsewhere = point.detach().max() + 1
    if entry.is_tokens:
        start = baseline_point(entry, elsewhere.expand(point.shape[-1]), keep)
        return (start != point).any(-1)
    return baseline_point(entry, elsewhere, keep) != point


def _spread(part: Entry, moves: Tensor) -> Tensor:
    return moves[..., None].expand_as(part.point) if part.is_tokens else moves


def check_count(argument: str, count: int, least: int = 1) -> None:
    """Refuse impossible numbers.

    Args:
        argument: What the user called it.
        count: What came.
        least: The least that can be used.

    Raises:
        ArgumentError: If it is no whole number of at least ``least``.
    """
    counted(argument, count, least, "Pass more.")
