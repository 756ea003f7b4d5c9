"""Intervals of shares of right answers, which do not collapse where all are right."""

from __future__ import annotations

import math

from torch import Tensor

from .estimates import Estimate

__all__ = ["accuracy", "accuracy_difference", "difference"]

Z = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


def accuracy(right: Tensor) -> Estimate:
    """Return a share of right answers, with its 95 % interval (Wilson 1927).

    Args:
        right: Booleans, or 0 and 1, ``[example]``.

    Returns:
        The share; NaN without examples.

    Example:
        >>> import torch
        >>> print(accuracy(torch.ones(10)))
        1.00 [0.72, 1.00]
    """
    n = len(right)
    if not n:
        return Estimate(math.nan)
    p = float(right.double().mean())
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half))


def accuracy_difference(left: Tensor, right: Tensor, *, paired: bool = False) -> Estimate:
    """Return the difference of two shares, with its 95 % interval (Newcombe 1998).

    The square-and-add interval from the two Wilson intervals; where example i is the same one on
    both sides their correlation φ is taken off, as in his method for paired data.

    Args:
        left: 0 and 1, ``[example]``.
        right: Likewise.
        paired: Whether both are about the same examples in the same order.

    Returns:
        left − right.
    """
    a, b = accuracy(left), accuracy(right)
    phi = _correlation(left, right) if paired and len(left) == len(right) else 0.0
    return difference(a, b, phi)


def difference(left: Estimate, right: Estimate, correlation: float = 0.0) -> Estimate:
    """Return the difference of two numbers, its 95 % interval squared and added from theirs.

    Args:
        left: A number.
        right: Another one.
        correlation: Of the two over examples.

    Returns:
        left − right.
    """

    def apart(below: float, above: float) -> float:
        squared = below**2 - 2 * correlation * below * above + above**2
        return math.sqrt(max(squared, 0.0))

    d = left.value - right.value
    low = d - apart(left.value - left.low, right.high - right.value)
    return Estimate(d, low, d + apart(left.high - left.value, right.value - right.low))


def _correlation(left: Tensor, right: Tensor) -> float:
    a, b = left.double() - left.double().mean(), right.double() - right.double().mean()
    size = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / size if size else 0.0
