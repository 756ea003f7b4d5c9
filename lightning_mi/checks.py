"""Refusals of numbers that are none, before anything is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

from .errors import ArgumentError

__all__ = ["counted", "counts", "share_of", "within"]


def counted(argument: str, count: object, least: int = 0, do: str = "Change it.") -> int:
    """Return a whole number, or refuse what is none.

    Args:
        argument: How the argument is called.
        count: What was given.
        least: The smallest that makes sense.
        do: What to do instead.

    Returns:
        The number.

    Raises:
        ArgumentError: If it is no whole number, or too small.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ArgumentError.of(
            argument, expected=f"an int of at least {least}", got=repr(count), do=do
        )
    return count


def counts(given: Mapping[str, object], least: int = 0) -> None:
    """Refuse numbers of things, or seeds, that are none.

    Args:
        given: Arguments by name.
        least: The smallest that makes sense.
    """
    for argument, count in given.items():
        counted(argument, count, least, f"Pass {argument}={max(least, 8)}, for example.")


def within(
    argument: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    inside: bool = False,
    do: str,
) -> float:
    """Return a finite number between two others, or refuse what is none.

    Args:
        argument: How the argument is called.
        value: What was given.
        low: The smallest that makes sense.
        high: The largest.
        inside: Neither of these two.
        do: What to do instead.

    Returns:
        The number.

    Raises:
        ArgumentError: If it is no finite number, or outside.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    number = float(value) if real and isinstance(value, Real) else math.nan
    fits = low < number < high if inside else low <= number <= high
    if fits and math.isfinite(number):
        return number
    where = "" if low == -math.inf else f" of at least {low:g}"
    if high < math.inf:
        where = f" between {low:g} and {high:g}"
    elif inside:
        where = f" above {low:g}"
    raise ArgumentError.of(argument, expected=f"a finite number{where}", got=repr(value), do=do)


def share_of(argument: str, value: object) -> float:
    """Return a share of something of which something is left, or refuse what is none.

    Args:
        argument: How the argument is called.
        value: What was given.

    Returns:
        The share, above 0 and below 1.
    """
    return within(argument, value, 0.0, 1.0, inside=True, do=f"Pass {argument}=0.5.")
