"""Labels of a panel as people read them: tokens and examples."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

from ..pieces import whole_characters
from ..record import Panel, Record
from .names import spelled

__all__ = ["ALL", "labels", "places", "raw_rows", "readable", "rows_of_texts", "title", "visible"]

ALL = slice(None)
"""Every row."""

FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that no piece covers."""

MARKS = ("Ġ", "Ċ")
"""How byte-level vocabularies write a space and a line's end; hardly ever seen in real text."""


def readable(pieces: Sequence[str]) -> list[str]:
    r"""Turn pieces of a vocabulary into text; leave what is text already as it is.

    Args:
        pieces: Tokens of one example in order: as text, or as a byte-level or SentencePiece
            vocabulary writes them.

    Returns:
        As many texts.

    Example:
        >>> readable(["In", "Ġthe", "Ċ"]), readable(["é", " b"])
        (['In', ' the', '\n'], ['é', ' b'])
        >>> readable(["Ġa", "âĺ", "ĥ"]), readable(["▁a", "<0xC3>", "<0xA9>"])
        ([' a', '☃', '⋯'], [' a', 'é', '⋯'])
    """
    table = _bytes_of_characters() if any(m in p for p in pieces for m in MARKS) else {}
    parts = [_bytes(piece, table) for piece in pieces]
    texts = [part.decode("utf-8", errors="replace") for part in parts]
    return whole_characters(
        texts, lambda start, stop: b"".join(parts[start:stop]).decode("utf-8", errors="replace")
    )


def visible(text: str) -> str:
    r"""Show what is invisible in a token.

    Args:
        text: A token.

    Returns:
        The token with signs for line ends and tabs.

    Example:
        >>> visible("a\n")
        'a⏎'
    """
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")


def rows_of_texts(panel: Panel, wanted: slice = ALL) -> list[list[str]] | None:
    """Return the texts along the last axis, for each entry along the others.

    Args:
        panel: A panel whose last axis is of tokens.
        wanted: Which rows; the others are not made readable.

    Returns:
        One list for each row of ``values.flatten(0, -2)``, or None if the panel has no such labels.
    """
    axis = panel.axes[-1]
    rows = 1
    for length in panel.values.shape[:-1]:
        rows *= length
    own = [key for key in panel.coords if key.split(",")[-1] == axis]
    if not own:
        return None
    # Words of each example rather than the numbers of the positions.
    key = max(own, key=lambda name: name.count(","))
    nested = _flat_rows(panel.coords[key], len(key.split(",")))
    repeats = max(rows // max(len(nested), 1), 1)
    return [readable(row) for row in (nested * repeats)[:rows][wanted]]


def places(panel: Panel, drawn: Collection[str]) -> list[str]:
    """Name each entry along the axes that a picture doesn't draw.

    Args:
        panel: The panel.
        drawn: The axes inside the picture.

    Returns:
        One name for each combination, such as ``"example 0"``.

    Example:
        >>> places(Panel([[1.0, 2.0]], ("example", "position")), ("position",))
        ['example 0']
    """
    each = [
        [f"{axis.replace('_', ' ')} {label}" for label in labels(panel, axis)]
        for axis in panel.axes
        if axis not in drawn
    ]
    return [" ".join(place) for place in itertools.product(*each)]


def title(record: Record) -> str:
    """Name a record in a picture.

    Args:
        record: The record.

    Returns:
        The panel's name, or the measurement's where the panel is just its values, with the input
        that they are of where there are several.
    """
    of = record.panel.convention.get("input")
    if of is not None and record.what in ("values", f"values_{of}"):
        return f"{spelled(record.measurement)}, {of}"
    return spelled(record.measurement if record.what == "values" else record.what)


def raw_rows(panel: Panel, wanted: slice = ALL) -> list[list[float]]:
    """Return the values along the last axis, for each entry along the others.

    Args:
        panel: A panel with at least one axis.
        wanted: Which rows.

    Returns:
        One list for each row.
    """
    last = panel.values.shape[-1]
    rows: list[list[float]] = (
        panel.values.reshape(-1, last)[wanted].double().tolist() if last else []
    )
    return rows


def labels(panel: Panel, axis: str) -> list[str]:
    """Return the labels along an axis, or the numbers from 0.

    Args:
        panel: The panel.
        axis: One of its axes.

    Returns:
        One text for each entry.
    """
    own = panel.coords.get(axis)
    return [str(label) for label in (range(panel.size[axis]) if own is None else own)]


def _flat_rows(nested: Any, depth: int) -> list[list[str]]:
    if depth == 1:
        return [["" if piece is None else str(piece) for piece in nested]]
    return [row for part in nested for row in _flat_rows(part, depth - 1)]


def _bytes(piece: str, table: dict[str, int]) -> bytes:
    """The bytes that a piece stands for: by the table, by a byte fallback, or as it is written."""
    if (fallback := FALLBACK.fullmatch(piece)) is not None:
        return bytes([int(fallback[1], 16)])
    if table and all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.replace("▁", " ").encode("utf-8", errors="replace")


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Invert the byte-level alphabet: printable bytes are themselves, the rest follow U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    table = {chr(byte): byte for byte in kept}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table
