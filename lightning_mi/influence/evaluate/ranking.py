"""Correlations along rows, the area under a curve, and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...comparison import FEWEST, pearson, ranks

__all__ = [
    "FEWEST",
    "Estimate",
    "areas",
    "auc",
    "bootstrap",
    "highest_first",
    "mean_known",
    "pearson",
    "picked",
    "ranks",
    "slopes",
    "spearman",
]

LEVEL = 0.95
"""How sure an interval has to be."""

AT_ONCE = 2**18
"""Entries of resampled tables that exist at once."""


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
    """Return the rank correlation of rows; arguments and result as for `pearson`.

    A row with NaN has no ranks, and NaN as its correlation.
    """
    missing = a.isnan().any(-1) | b.isnan().any(-1)
    return torch.where(missing, math.nan, pearson(ranks(a), ranks(b)))


def highest_first(scores: Tensor) -> Tensor:
    """Return the places of scores ``[n]`` in descending order, those of NaN last."""
    return torch.where(scores.isnan(), -math.inf, scores).argsort(descending=True, stable=True)


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
    return float(areas(scores, positive))


def areas(scores: Tensor, positive: Tensor) -> Tensor:
    """Return `auc` of rows.

    Args:
        scores: Shape ``[…, n]``.
        positive: Boolean, the same shape.

    Returns:
        Shape ``[…]``, double.
    """
    count = positive.sum(-1)
    rest = positive.shape[-1] - count
    placed = ranks(torch.nan_to_num(scores.double(), nan=-torch.inf))
    above = torch.where(positive, placed, 0.0).sum(-1) - count * (count - 1) / 2
    return torch.where(count * rest > 0, above / (count * rest).clamp(min=1), math.nan)


def bootstrap(
    value: Callable[[list[Tensor]], Tensor], sizes: list[int], draws: int = 1000, seed: int = 0
) -> Estimate:
    """Return a number with the percentile interval of resampling with replacement.

    Args:
        value: Gives the numbers ``[draw]`` for places ``[draw, size]`` drawn out of each size; at
            first one draw of all, in order.
        sizes: Of what is resampled, each independently (subsets and queries, for example).
        draws: Resamples.
        seed: Of the draws.

    Returns:
        The estimate; its interval is NaN where half of the resamples have no value.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = float(value([torch.arange(size)[None] for size in sizes]))
    if not draws or not all(sizes):
        return Estimate(whole, math.nan, math.nan)
    drawn = [[torch.randint(n, (n,), generator=generator) for n in sizes] for _ in range(draws)]
    places = [torch.stack(column) for column in zip(*drawn, strict=True)]
    step = max(1, AT_ONCE // math.prod(sizes))
    parts = zip(*(torch.split(p, step) for p in places), strict=True)
    found = torch.cat([value(list(part)) for part in parts])
    known = found[~found.isnan()].double()
    if 2 * len(known) <= draws or math.isnan(whole):
        return Estimate(whole, math.nan, math.nan)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = known.quantile(ends).tolist()
    return Estimate(whole, low, high)


def picked(table: Tensor, places: list[Tensor]) -> Tensor:
    """Return the rows and columns of a table that were drawn.

    Args:
        table: Shape ``[row, column]``.
        places: Rows ``[draw, row]`` and columns ``[draw, column]``.

    Returns:
        Shape ``[draw, row, column]``.
    """
    rows, columns = places
    return table[rows[:, :, None], columns[:, None]]


def mean_known(values: Tensor) -> Tensor:
    """Return the mean along the last dimension of what is not NaN, or NaN."""
    return values.nanmean(-1)
