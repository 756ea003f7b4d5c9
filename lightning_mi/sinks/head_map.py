"""Layers × heads, coloured by how far a score is above chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..record import Panel, Record
from .canvas import (
    HAIR,
    INK,
    RGB,
    SOFT,
    TEAL,
    VIOLET,
    Canvas,
    Pixels,
    below,
    beside,
    blend,
    ink_on,
    signed,
)
from .texts import labels, title

__all__ = ["chance", "draw_head_maps", "top_head"]

HUES: dict[str, RGB] = {"induction": VIOLET, "previous_token": TEAL}
"""One hue for each role, everywhere."""

PER_ROW = 3
NUMBERED = 64
"""Up to so many heads the number stands in the cell."""


def draw_head_maps(records: Sequence[Record], others: Sequence[Record] = ()) -> Pixels:
    """Draw the maps of several scores on one page.

    Args:
        records: Panels of axes (layer, head).
        others: All records of the firing, among which are the nulls.

    Returns:
        The picture.
    """
    maps = [_draw(record, _limits(record, others)) for record in records]
    rows = [beside(maps[i : i + PER_ROW]) for i in range(0, len(maps), PER_ROW)]
    return below(rows)


def chance(record: Record, others: Sequence[Record] = ()) -> float | None:
    """Return the value under uniform attention.

    Args:
        record: Scores of heads.
        others: Records among which ``<name>_null`` may be.

    Returns:
        The number in ``convention["null"]``, else the mean of the panel ``<name>_null``, else None.
    """
    null = record.panel.convention.get("null")
    if isinstance(null, int | float):
        return float(null) if math.isfinite(null) else None
    panel = next((other.panel for other in others if other.name == f"{record.name}_null"), None)
    if panel is None:
        return None
    values = panel.values.double()
    mean = float(values[values.isfinite()].mean())
    return mean if math.isfinite(mean) else None


def top_head(record: Record) -> str | None:
    """Name the head with the largest score.

    Args:
        record: A panel of axes (layer, head).

    Returns:
        For example ``"L1H3 0.87"``, or None if no score is defined.
    """
    panel = record.panel
    if panel.axes != ("layer", "head") or panel.values.numel() == panel.nonfinite:
        return None
    values = panel.values.double().nan_to_num(nan=-math.inf, posinf=-math.inf)
    layer, head = divmod(int(values.argmax()), panel.size["head"])
    name = f"L{labels(panel, 'layer')[layer]}H{labels(panel, 'head')[head]}"
    return f"{name} {float(values[layer, head]):.2f}"


@dataclass(frozen=True)
class _Limits:
    """Values of paper and of full colour; a negative low means blue above and orange below."""

    low: float
    high: float
    at_chance: bool = False

    def colour(self, value: float, hue: RGB) -> RGB:
        if self.low < 0:
            return signed(value / self.high)
        return blend(hue, (value - self.low) / (self.high - self.low))

    def words(self) -> str:
        if self.low < 0:
            return f"orange {self.low:.2g}, white 0, blue {self.high:.2g}"
        return f"white {'chance, ' if self.at_chance else ''}{self.low:.2g}; full {self.high:.2g}"


def _limits(record: Record, others: Sequence[Record]) -> _Limits:
    """Span chance to 1 for shares of attention; ±m, at least ±1, for signed values."""
    finite = record.panel.values.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    high = max(1.0, float(finite.abs().max()))
    low = chance(record, others)
    if low is None:
        return _Limits(-high if float(finite.min()) < -1e-6 else 0.0, high)
    return _Limits(low, high, at_chance=True) if 0 <= low < high else _Limits(0.0, high)


def _draw(record: Record, limits: _Limits) -> Pixels:
    panel, hue = record.panel, HUES.get(record.what, SOFT)
    layers, heads = panel.values.shape
    cell = max(6, min(38, 420 // heads))
    left, top = 34, 54
    canvas = Canvas(max(left + cell * heads + 4, 236), top + cell * layers + 4)
    canvas.text((left, 2), title(record), HUES.get(record.what, INK), 14)
    canvas.text((left, 20), limits.words(), SOFT, 10)
    _name_axes(canvas, panel, (left, top, cell))
    numbered = cell >= 30 and panel.values.numel() <= NUMBERED
    for layer, row in enumerate(panel.values.double().tolist()):
        for head, value in enumerate(row):
            place = (left + head * cell, top + layer * cell, cell, cell)
            colour = limits.colour(value, hue) if math.isfinite(value) else None
            _draw_cell(canvas, place, colour, f"{value:.2f}" if numbered else "")
    return canvas.pixels()


def _draw_cell(
    canvas: Canvas, place: tuple[int, int, int, int], colour: RGB | None, words: str
) -> None:
    x, y, width, height = place
    if colour is None:
        canvas.hatch(x, y, (width, height))
        return
    canvas.box(x, y, (width, height), colour, HAIR)
    canvas.centred(place, words.replace("0.", ".", 1), ink_on(colour), 11)


def _name_axes(canvas: Canvas, panel: Panel, place: tuple[int, int, int]) -> None:
    left, top, cell = place
    every = max(1, math.ceil(16 / cell))
    for layer, name in enumerate(labels(panel, "layer")):
        if layer % every == 0:
            canvas.centred((0, top + layer * cell, left, cell), f"L{name}", SOFT, 10)
    for head, name in enumerate(labels(panel, "head")):
        if head % every == 0:
            canvas.centred((left + head * cell, top - 16, cell, 14), f"H{name}", SOFT, 10)
