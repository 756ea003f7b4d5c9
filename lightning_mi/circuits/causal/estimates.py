"""Numbers over prompts, with what they might have been on other prompts: `Estimate`, `Draws`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DRAWS", "Draws", "Estimate"]

DRAWS = 1000
"""Bootstrap draws of prompts."""


@dataclass(frozen=True)
class Estimate:
    """A number with an interval over prompts.

    Args:
        value: The number.
        low: Lower end of the 95 % interval (percentile bootstrap over prompts); NaN for a single
            prompt, which says nothing about others.
        high: Its upper end.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        """Return for example ``0.92 [0.88, 0.97]``."""
        value, low, high = (f"{round(v, 2) + 0.0:.2f}" for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


class Draws:
    """Prompts drawn anew, the same ones for every number: so differences can be taken of them.

    Args:
        examples: Number of prompts.
        seed: Seed of the draws.

    Example:
        >>> Draws(2).estimate(torch.tensor([1.0, 1.0]))
        Estimate(value=1.0, low=1.0, high=1.0)
    """

    def __init__(self, examples: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(examples, (DRAWS, examples), generator=self.generator)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean of each draw.

        Args:
            values: Shape ``[…, example]``.

        Returns:
            Shape ``[…, draw]``; NaN for a single prompt, whose draws would all be alike.
        """
        found = values[..., self.rows].mean(-1)
        return found if self.rows.shape[1] > 1 else torch.full_like(found, math.nan)

    def estimate(self, values: Tensor) -> Estimate:
        """Return a mean over prompts.

        Args:
            values: Shape ``[example]``.

        Returns:
            The mean and its interval.
        """
        return interval(float(values.mean()), self.means(values))

    def share(self, part: Tensor, whole: Tensor) -> Estimate:
        """Return mean(part) / mean(whole).

        Args:
            part: Shape ``[example]``.
            whole: Shape ``[example]``.

        Returns:
            The share and its interval; both means are drawn together.
        """
        drawn = self.means(part) / self.means(whole)
        return interval(float(part.mean() / whole.mean()), drawn)


def interval(value: float, drawn: Tensor) -> Estimate:
    """Return a number with the middle 95 % of its draws.

    Args:
        value: The number.
        drawn: Shape ``[draw]``; what is not defined is left out.

    Returns:
        The estimate.
    """
    known = drawn[drawn.isfinite()].double()
    if not len(known):
        return Estimate(value)
    low, high = torch.quantile(known, torch.tensor([0.025, 0.975], dtype=known.dtype)).tolist()
    return Estimate(value, low, high)
