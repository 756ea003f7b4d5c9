"""Layers × heads, coloured by how far a score is above chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def draw_head_maps(records: Sequence[Record]) -> Pixels:
    """Draw the maps of several scores on one page.

    Args:
        records: Panels of axes (layer, head).

    Returns:
        The picture.
    """
    maps = [_draw(record) for record in records]
    rows = [beside(maps[i : i + PER_ROW]) for i in range(0, len(maps), PER_ROW)]
    return below(rows)


def chance(panel: Panel) -> float:
    """Return the value under uniform attention, where the panel gives one number for it.

    Args:
        panel: Scores of heads.

    Returns:
        The number, 0 where there is none.
    """
    null = panel.convention.get("null")
    usable = isinstance(null, int | float) and math.isfinite(null)
    return float(null) if usable and null is not None else 0.0


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


def _draw(record: Record) -> Pixels:
    panel = record.panel
    layers, heads = panel.values.shape
    cell = max(6, min(38, 420 // heads))
    left, top = 34, 54
    canvas = Canvas(max(left + cell * heads + 4, 236), top + cell * layers + 4)
    canvas.text((left, 2), title(record), HUES.get(record.what, INK), 14)
    canvas.text((left, 20), _scale_words(panel), SOFT, 10)
    _name_axes(canvas, panel, (left, top, cell))
    for layer, row in enumerate(panel.values.double().tolist()):
        for head, value in enumerate(row):
            _draw_cell(canvas, record, value, (left + head * cell, top + layer * cell, cell))
    return canvas.pixels()


def _draw_cell(canvas: Canvas, record: Record, value: float, place: tuple[int, int, int]) -> None:
    x, y, cell = place
    if not math.isfinite(value):
        canvas.hatch(x, y, (cell, cell))
        return
    colour = _colour(record, value)
    canvas.box(x, y, (cell, cell), colour, HAIR)
    if cell >= 30 and record.panel.values.numel() <= NUMBERED:
        words = f"{value:.2f}".replace("0.", ".", 1)
        canvas.centred((x, y, cell, cell), words, ink_on(colour), 11)


def _colour(record: Record, value: float) -> RGB:
    low, high = _limits(record.panel)
    if low < 0:
        return signed(value / high)
    return blend(HUES.get(record.what, SOFT), (value - low) / (high - low))


def _limits(panel: Panel) -> tuple[float, float]:
    """Return chance and 1 for shares of attention; ±m, at least ±1, for signed values."""
    finite = panel.values.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    high = max(1.0, float(finite.abs().max()))
    if float(finite.min()) < -1e-6 and "null" not in panel.convention:
        return -high, high
    low = chance(panel)
    return (low, high) if 0 <= low < high else (0.0, high)


def _scale_words(panel: Panel) -> str:
    low, high = _limits(panel)
    if low < 0:
        return f"orange {low:.2g}, white 0, blue {high:.2g}"
    return (
        f"white {'chance, ' if 'null' in panel.convention else ''}{low:.2g}; full colour {high:.2g}"
    )


def _name_axes(canvas: Canvas, panel: Panel, place: tuple[int, int, int]) -> None:
    left, top, cell = place
    every = max(1, math.ceil(16 / cell))
    for layer, name in enumerate(labels(panel, "layer")):
        if layer % every == 0:
            canvas.centred((0, top + layer * cell, left, cell), f"L{name}", SOFT, 10)
    for head, name in enumerate(labels(panel, "head")):
        if head % every == 0:
            canvas.centred((left + head * cell, top - 16, cell, 14), f"H{name}", SOFT, 10)
