"""How much each named feature matters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..record import Panel, Record
from .canvas import HAIR, INK, SOFT, Canvas, Pixels, below, signed
from .texts import labels, title, visible

__all__ = ["draw_bars", "mean_over_examples"]

BARS, WIDTH, LINE, NAME = 20, 560, 20, 180


def draw_bars(records: Sequence[Record], scale: float, *, like: Record | None = None) -> Pixels:
    """Draw the mean over examples, largest first.

    Args:
        records: Panels whose last axis is drawn; all others are averaged.
        scale: Value of a full bar.
        like: Whose order the bars take; None is each record's own.

    Returns:
        The picture.
    """
    return below([_draw(record, scale, like or record) for record in records])


def mean_over_examples(panel: Panel) -> list[float]:
    """Return the mean over all axes but the last, leaving undefined values out.

    Args:
        panel: A panel with at least one axis.

    Returns:
        One value for each entry of the last axis, NaN where none is defined.
    """
    values = panel.values.double().reshape(-1, panel.values.shape[-1])
    finite = values.masked_fill(~values.isfinite(), math.nan)
    mean: list[float] = finite.nanmean(0).tolist()
    return mean


def _draw(record: Record, scale: float, like: Record) -> Pixels:
    panel = record.panel
    values = mean_over_examples(panel)
    names = labels(panel, panel.axes[-1])
    leading = mean_over_examples(like.panel)
    order = sorted(
        range(len(values)), key=lambda i: -abs(leading[i]) if leading[i] == leading[i] else 1.0
    )
    canvas = Canvas(WIDTH, 22 + LINE * min(len(order), BARS) + 4)
    n = panel.values.numel() // max(len(values), 1)
    rest = f"; {len(order) - BARS} smaller ones not shown" if len(order) > BARS else ""
    canvas.text((0, 2), f"{title(record)}, mean of {n}{rest}", SOFT, 11)
    for row, i in enumerate(order[:BARS]):
        _bar(canvas, 22 + row * LINE, (names[i], values[i]), scale)
    return canvas.pixels()


def _bar(canvas: Canvas, y: int, item: tuple[str, float], scale: float) -> None:
    name, value = item
    canvas.text((0, y + 3), visible(name)[:24], INK, 11)
    half = (WIDTH - NAME - 60) // 2
    zero = NAME + half
    canvas.line((zero, y), (zero, y + LINE), HAIR)
    if not math.isfinite(value):
        canvas.text((zero + 6, y + 3), "—", SOFT, 11)
        return
    length = round(half * min(abs(value) / scale, 1.0))
    left = zero if value >= 0 else zero - length
    canvas.box(left, y + 2, (max(length, 1), LINE - 4), signed(math.copysign(1.0, value)))
    canvas.text((WIDTH - 56, y + 3), f"{value:+.3g}", SOFT, 11)
