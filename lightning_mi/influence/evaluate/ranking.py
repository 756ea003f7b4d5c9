"""Correlations along rows, the area under a curve, and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...comparison import FEWEST, pearson, ranks

__all__ = ["FEWEST", "Estimate", "auc", "bootstrap", "pearson", "ranks", "slopes", "spearman"]

LEVEL = 0.95
"""How sure an interval has to be."""


class Estimate(NamedTuple):
    """A number, and the 95 % percentile interval that resampling gives it.

    Attributes:
        mean: The number; NaN where it is undefined.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the three numbers."""
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return the rank correlation of rows; arguments and result as for `pearson`."""
    return pearson(ranks(a), ranks(b))


def slopes(x: Tensor, y: Tensor) -> Tensor:
    """Return the slope of the line of least squares y ≈ intercept + slope · x of each row.

    Args:
        x: Shape ``[…, n]``.
        y: The same shape.

    Returns:
        Shape ``[…]``, double; NaN where x is constant.
    """
    x, y = (t.double() - t.double().mean(-1, keepdim=True) for t in (x, y))
    scale = x.square().sum(-1)
    return torch.where(scale > 0, (x * y).sum(-1) / torch.where(scale > 0, scale, 1.0), math.nan)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: how often a positive stands above a negative.

    Args:
        scores: Shape ``[n]``; NaN counts as lowest.
        positive: Boolean ``[n]``.

    Returns:
        From 0 to 1, 0.5 for chance, ties half; NaN without a positive or a negative.

    Example:
        >>> auc(torch.tensor([0.1, 0.9, 0.3]), torch.tensor([False, True, False]))
        1.0
    """
    count = int(positive.sum())
    rest = len(positive) - count
    if not count or not rest:
        return math.nan
    placed = ranks(torch.nan_to_num(scores.double(), nan=-torch.inf))
    return float((placed[positive].sum() - count * (count - 1) / 2) / (count * rest))


def bootstrap(
    value: Callable[[list[Tensor]], float], sizes: list[int], draws: int = 1000, seed: int = 0
) -> Estimate:
    """Return a number with the percentile interval of resampling with replacement.

    Args:
        value: Gives the number for places drawn out of each size; at first all, in order.
        sizes: Of what is resampled, each independently (subsets and queries, for example).
        draws: Resamples.
        seed: Of the draws.

    Returns:
        The estimate; its interval is NaN where half of the resamples have no value.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = value([torch.arange(size) for size in sizes])
    drawn: list[float] = []
    for _ in range(draws if all(sizes) else 0):
        places = [torch.randint(size, (size,), generator=generator) for size in sizes]
        drawn.append(value(places))
    known = torch.tensor([v for v in drawn if not math.isnan(v)], dtype=torch.float64)
    if 2 * len(known) <= draws or math.isnan(whole):
        return Estimate(whole, math.nan, math.nan)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = known.quantile(ends).tolist()
    return Estimate(whole, low, high)


def mean_known(values: Tensor) -> float:
    """Return the mean of what is not NaN, or NaN."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else math.nan
