"""Small pieces of the sentences that the report says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..emergence import HeadOnset

__all__ = [
    "Heads",
    "few",
    "highest_first",
    "in_state",
    "joined",
    "plural",
    "tokens_in_words",
    "upper",
]

Heads = Sequence[HeadOnset]


def tokens_in_words(count: int | None) -> str:
    """Return a number of tokens as a person says it.

    Example:
        >>> tokens_in_words(2_826_240), tokens_in_words(512)
        ('2.8 M', '512')
    """
    if count is None:
        return "?"
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def in_state(heads: Heads, *states: str) -> list[HeadOnset]:
    """Return the heads whose onset is in one of the states."""
    return [h for h in heads if h.onset.state in states]


def highest_first(heads: Heads) -> list[HeadOnset]:
    """Return the heads by where their curves end; undefined ends come last."""
    return sorted(heads, key=lambda h: -np.nan_to_num(h.onset.final, nan=-1.0))


def few(words: Sequence[str], most: int = 3) -> list[str]:
    """Return a list that is not too long to be said: the first, and how many more.

    Example:
        >>> few(["a", "b", "c", "d", "e"])
        ['a', 'b', '3 more']
    """
    if len(words) <= most:
        return list(words)
    return [*words[: most - 1], f"{len(words) - most + 1} more"]


def joined(words: Sequence[str]) -> str:
    """Return a list as a person says it.

    Example:
        >>> joined(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def upper(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def plural(word: str, count: int) -> str:
    """Return the word for so many."""
    return word if count == 1 else f"{word}s"
