"""Intervals over examples: what the number might have been on other prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..causal import Estimate

__all__ = ["DRAWS", "interval", "mean_of", "share_of"]

DRAWS = 1000
"""Bootstrap draws of examples."""


def interval(draws: Tensor) -> tuple[float, float]:
    """Return the middle 95 % of bootstrap draws.

    Args:
        draws: Shape ``[draw]``; NaN is left out.

    Returns:
        Lower and upper end; NaN where nothing is defined.
    """
    known = draws[~draws.isnan()]
    if not len(known):
        return math.nan, math.nan
    ends = torch.quantile(known.double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def mean_of(values: Tensor, *, seed: int = 0) -> Estimate:
    """Return a mean over examples, with its interval when examples are drawn anew.

    Args:
        values: Shape ``[example]``.
        seed: Seed of the draws; equal seeds and lengths draw equal examples, so that differences
            of two means can be taken draw by draw.

    Returns:
        The mean and its 95 % interval.

    Example:
        >>> mean_of(torch.ones(4))
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    wide = values.detach().double().cpu()
    if not len(wide):
        return Estimate(math.nan)
    return Estimate(float(wide.mean()), *interval(wide[_rows(len(wide), seed)].mean(1)))


def share_of(part: Tensor, whole: Tensor, *, seed: int = 0) -> Estimate:
    """Return Σ part / Σ whole over examples, with its interval.

    Args:
        part: Shape ``[example]``.
        whole: Shape ``[example]``, of the same examples.
        seed: Seed of the draws.

    Returns:
        The share and its 95 % interval.
    """
    a, b = part.detach().double().cpu(), whole.detach().double().cpu()
    if not len(a):
        return Estimate(math.nan)
    rows = _rows(len(a), seed)
    drawn = a[rows].mean(1) / b[rows].mean(1)
    return Estimate(float(a.mean() / b.mean()), *interval(drawn))


def _rows(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size, (DRAWS, size), generator=generator)
