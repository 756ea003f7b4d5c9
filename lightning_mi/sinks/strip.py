"""A prompt, each token on a colour that says how much it matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..record import Panel, Record
from .canvas import HAIR, INK, RGB, SOFT, Canvas, Pixels, below, blend, ink_on, signed
from .texts import ALL, places, raw_rows, rows_of_texts, title, visible

__all__ = ["draw_strip", "draw_strips", "fitting", "floor_of_strip", "is_signed", "row_shares"]

EXAMPLES, TOKENS = 4, 256
"""Up to so many examples, and tokens in all of them, are drawn; the run folder has all."""

WIDTH, LINE, TOP = 880, 24, 20


def draw_strips(records: Sequence[Record], scale: float, *, examples: int = EXAMPLES) -> Pixels:
    """Draw the first examples of one or more panels.

    Args:
        records: Panels of axes (example, position).
        scale: Value of full colour.
        examples: How many of the first examples.

    Returns:
        The picture.
    """
    strips = []
    for record in records:
        names = places(record.panel, record.panel.axes[-1:])
        for i in range(fitting(record.panel, examples)):
            strips.append(draw_strip(record, scale, i, f"{title(record)} · {names[i]}"))
    return below(strips, 10)


def fitting(panel: Panel, examples: int = EXAMPLES) -> int:
    """Return how many of the first examples are drawn.

    Args:
        panel: A panel of axes (example, position).
        examples: How many at most.

    Returns:
        As many as have room, at least one where there is one.
    """
    room = max(1, min(examples, TOKENS // max(panel.values.shape[-1], 1)))
    return min(room, panel.values.shape[:-1].numel())


def draw_strip(record: Record, scale: float, example: int, heading: str) -> Pixels:
    """Draw one example.

    Args:
        record: A panel of axes (example, position).
        scale: Value of full colour.
        example: Number of the example.
        heading: What stands above it.

    Returns:
        The picture.
    """
    panel, own = record.panel, slice(example, example + 1)
    texts, (values,) = rows_of_texts(panel, own), row_shares(panel, own)
    pieces = texts[0] if texts is not None else [""] * len(values)
    shown, sign = _seen(pieces, values), is_signed(panel)
    colours = [_colour(values[k] / scale, sign) for k in shown]
    target = _target(panel, example, len(values))
    place = shown.index(target) if target in shown else None
    return _draw(heading, [pieces[k] for k in shown], colours, place)


def is_signed(panel: Panel) -> bool:
    """Say whether values support and oppose.

    Args:
        panel: The panel.

    Returns:
        False where its convention has a sign that begins with ``none``, True where it has another;
        else whether a value is negative.
    """
    sign = panel.convention.get("sign")
    return bool((panel.values < 0).any()) if sign is None else not str(sign).startswith("none")


def row_shares(panel: Panel, wanted: slice = ALL) -> list[list[float]]:
    """Return signed values as they are, others as shares of their example's sum.

    Args:
        panel: Any panel with at least one axis; all but the last are flattened.
        wanted: Which rows.

    Returns:
        One list for each row.
    """
    rows = raw_rows(panel, wanted)
    if is_signed(panel):
        return rows
    totals = [sum(value for value in row if math.isfinite(value)) or 1.0 for row in rows]
    return [[value / total for value in row] for row, total in zip(rows, totals, strict=True)]


def floor_of_strip(panel: Panel) -> float:
    """Return the least value of full colour, so that noise doesn't look like a finding.

    Args:
        panel: The panel.

    Returns:
        Three times an even share; 0.5 for signed values in logits or nats.
    """
    if not is_signed(panel):
        return 3 / max(panel.values.shape[-1], 1)
    return 0.5 if panel.unit in ("logits", "nats") else 1e-12


def _seen(pieces: Sequence[str], values: Sequence[float]) -> list[int]:
    """Leave out padding, which has neither text nor score, where there are texts at all."""
    if not any(pieces):
        return list(range(len(values)))
    return [k for k, piece in enumerate(pieces) if piece or values[k] != 0]


def _colour(value: float, with_sign: bool) -> RGB | None:
    if not math.isfinite(value):
        return None
    return signed(value) if with_sign else blend(INK, value)


def _target(panel: Panel, example: int, length: int) -> int | None:
    said: Any = panel.convention.get("target_position")
    if isinstance(said, list):
        said = said[example] if example < len(said) else None
    return int(said) % length if isinstance(said, int | float) and length else None


def _draw(
    title: str, pieces: Sequence[str], colours: Sequence[RGB | None], target: int | None
) -> Pixels:
    drawn = [visible(piece) for piece in pieces[:TOKENS]]
    places, bottom = _place(drawn)
    canvas = Canvas(WIDTH, bottom + 4)
    hidden = len(pieces) - len(drawn)
    canvas.text(
        (0, 2), title + (f" (first {TOKENS} of {len(pieces)} tokens)" if hidden else ""), SOFT, 11
    )
    for i, (x, y, width) in enumerate(places):
        colour = colours[i]
        if colour is None:
            canvas.hatch(x, y, (width, LINE - 3))
        else:
            canvas.box(x, y, (width, LINE - 3), colour, HAIR)
        canvas.text((x + 3, y + 3), drawn[i], ink_on(colour) if colour else INK, 12)
        if i == target:
            canvas.line((x, y + LINE - 3), (x + width - 1, y + LINE - 3), INK, 3)
    return canvas.pixels()


def _place(pieces: Sequence[str]) -> tuple[list[tuple[int, int, int]], int]:
    """Set boxes line by line, as text runs."""
    ruler = Canvas(1, 1)
    places: list[tuple[int, int, int]] = []
    x, y = 0, TOP
    for piece in pieces:
        width = min(max(ruler.width_of(piece) + 6, 10), WIDTH)
        if x + width > WIDTH:
            x, y = 0, y + LINE
        places.append((x, y, width))
        x += width + 1
    return places, y + LINE
