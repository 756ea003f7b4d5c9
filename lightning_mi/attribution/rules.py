"""Nodes and weights of quadrature rules on [0, 1], and how many nodes to try."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["Rule", "ladder", "nodes"]

Rule: TypeAlias = Literal["gauss-legendre", "midpoint", "right", "left", "trapezoid"]
"""Names of the rules."""

FIRST = 8
"""Nodes of the first attempt of the adaptive form."""


def nodes(rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """Return the nodes α_k and weights w_k of a rule, Σ w_k = 1.

    Gauss–Legendre of degree n is exact for polynomials up to degree 2n − 1; midpoint has
    α_k = (k − ½)/n, right k/n, left (k − 1)/n, k = 1 … n, all with w = 1/n; the trapezoid has
    α_k = k/(n − 1), k = 0 … n − 1, with w = 1/(n − 1), halved at both ends.

    Args:
        rule: Name of the rule.
        steps: Number of nodes n.

    Returns:
        Two float64 tensors ``[n]``.

    Raises:
        ArgumentError: If there is no such rule, or it has too few nodes.

    Example:
        >>> nodes("trapezoid", 3)[1].tolist()
        [0.25, 0.5, 0.25]
    """
    check_rule(rule, steps)
    k = np.arange(1, steps + 1)
    weights = np.full(steps, 1 / steps)
    if rule == "gauss-legendre":
        alphas, weights = np.polynomial.legendre.leggauss(steps)
        alphas, weights = (alphas + 1) / 2, weights / 2
    elif rule == "trapezoid":
        alphas, weights = (k - 1) / (steps - 1), np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
    else:
        alphas = (k - {"midpoint": 0.5, "right": 0.0, "left": 1.0}[rule]) / steps
    return torch.from_numpy(alphas), torch.from_numpy(weights / weights.sum())


def ladder(max_steps: int) -> list[int]:
    """Return the numbers of nodes to try one after the other: 8, 16, 32 … ``max_steps``.

    Doubling keeps the sum of all attempts below twice the last one. An attempt with more than half
    of the last number saves too little where it succeeds to pay for where it fails.

    Args:
        max_steps: The last number.

    Returns:
        Ascending numbers.

    Example:
        >>> ladder(64), ladder(20), ladder(12)
        ([8, 16, 32, 64], [8, 20], [12])
    """
    rungs = []
    rung = FIRST
    while 2 * rung <= max_steps:
        rungs.append(rung)
        rung *= 2
    return [*rungs, max_steps]


def check_rule(rule: str, steps: int) -> None:
    """Refuse unknown rules and impossible numbers of nodes.

    Args:
        rule: Name of the rule.
        steps: Number of nodes.

    Raises:
        ArgumentError: If one of them cannot be used.
    """
    if rule not in get_args(Rule):
        raise ArgumentError.of(
            "rule", expected=f"one of {list(get_args(Rule))}", got=repr(rule), do="Choose a rule."
        )
    least = 2 if rule == "trapezoid" else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ArgumentError.of(
            "steps",
            expected=f"an int of at least {least} for the rule {rule!r}",
            got=repr(steps),
            do="More steps make the gap smaller; None finds the number by itself.",
        )
