"""Intervals over examples: what the number might have been on other prompts."""

from __future__ import annotations

import math

from torch import Tensor

from ..causal.estimates import Draws, Estimate

__all__ = ["mean_of", "share_of"]


def mean_of(values: Tensor, *, seed: int = 0) -> Estimate:
    """Return a mean over examples, with its interval when examples are drawn anew.

    Args:
        values: Shape ``[example]``.
        seed: Seed of the draws; equal seeds and lengths draw equal examples, so that differences
            of two means can be taken draw by draw.

    Returns:
        The mean and its 95 % interval.

    Example:
        >>> import torch
        >>> mean_of(torch.ones(4))
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    wide = values.detach().double().cpu()
    return Draws(len(wide), seed).estimate(wide) if len(wide) else Estimate(math.nan)


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
    return Draws(len(a), seed).share(a, b) if len(a) else Estimate(math.nan)
