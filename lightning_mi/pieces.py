"""Pieces of text that people can read, one for each token id.

A byte-level vocabulary may cut one character into several tokens: `e2 98` and `83` are a snowman
together and nothing by themselves. The whole character then stands at its first token, and
`CONTINUED` at the others, so that every token keeps a place and a colour of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CONTINUED", "piecewise", "whole_characters"]

CONTINUED = "⋯"
"""Stands for a token that holds only the rest of a character."""

BROKEN = "\ufffd"
"""What decoding gives for bytes that are no character."""

LONGEST = 4
"""Bytes of the longest character of UTF-8."""

Decode = Callable[[Sequence[int]], list[str]]


def piecewise(tokenizer: Any) -> Decode:
    """Return a function from token ids to one piece of text each.

    Args:
        tokenizer: Anything with ``decode(list of ids) -> str``, or a function like that.

    Returns:
        The function. Spaces that a SentencePiece vocabulary marks at the beginning of a token are
        kept, though decoding a token alone drops them.
    """
    decode = getattr(tokenizer, "decode", tokenizer)
    name = getattr(tokenizer, "convert_ids_to_tokens", getattr(tokenizer, "id_to_token", None))
    known: dict[int, str] = {}

    def alone(i: int) -> str:
        text = str(decode([i]))
        token = name(i) if callable(name) else None
        spaced = isinstance(token, str) and token.startswith("▁") and not text.startswith(" ")
        return f" {text}" if spaced else text

    def pieces(ids: Sequence[int]) -> list[str]:
        for i in ids:
            if i not in known:
                known[i] = alone(i)
        texts = [known[i] for i in ids]
        return whole_characters(texts, lambda start, stop: str(decode(list(ids[start:stop]))))

    return pieces


def whole_characters(texts: Sequence[str], join: Callable[[int, int], str]) -> list[str]:
    r"""Put characters that are cut over several pieces together.

    Args:
        texts: What each piece is by itself, with U+FFFD where it is no whole character.
        join: Text of the pieces from the first index up to, not including, the second.

    Returns:
        As many texts; those that cannot be completed stay as they are.

    Example:
        >>> cut = [b"a", b"\xe2\x98", b"\x83", b"!"]
        >>> texts = [piece.decode(errors="replace") for piece in cut]
        >>> whole_characters(texts, lambda i, j: b"".join(cut[i:j]).decode(errors="replace"))
        ['a', '☃', '⋯', '!']
    """
    whole, start = list(texts), 0
    while start < len(whole):
        stop = _end(texts, start, join) if BROKEN in texts[start] else None
        if stop is None:
            start += 1
            continue
        whole[start:stop] = [join(start, stop), *[CONTINUED] * (stop - start - 1)]
        start = stop
    return whole


def _end(texts: Sequence[str], start: int, join: Callable[[int, int], str]) -> int | None:
    """Where the character that begins at a piece is complete, or None."""
    for stop in range(start + 2, min(start + LONGEST, len(texts)) + 1):
        if BROKEN not in texts[stop - 1]:
            return None
        if BROKEN not in join(start, stop):
            return stop
    return None
