"""From a `Shown` to pixels and a caption; `Scales` keeps one colour scale for a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..beneath import inputs_of
from ..record import Record
from .bars import draw_bars, mean_over_examples
from .canvas import Pixels, below
from .grid import chosen, draw_grid, kind_of
from .head_map import draw_head_maps, top_head
from .keys import Shown
from .overlay import draw_overlays, largest_pixel
from .strip import draw_strips, floor_of_strip, row_shares
from .texts import raw_rows

__all__ = ["Scales", "caption", "draw"]


class Scales:
    """The value of full colour of each picture: it has a floor, and grows but never shrinks.

    A scale that followed every picture would make the noise of the first step look like the finding
    of the last.
    """

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def of(self, shown: Shown) -> float:
        """Return the scale of a picture, having seen it.

        Args:
            shown: What is to be drawn.

        Returns:
            A positive number.
        """
        kinds = (kind_of(r) if shown.kind == "grid" else shown.kind for r in shown.records)
        seen = max(_largest(r, kind) for r, kind in zip(shown.records, kinds, strict=True))
        self._largest[shown.key] = max(seen, self._largest.get(shown.key, 0.0))
        return self._largest[shown.key]


def draw(shown: Shown, scales: Scales) -> Pixels:
    """Draw a picture.

    Args:
        shown: What to draw; any kind but ``"examples"``, which is text.
        scales: The scales of this run.

    Returns:
        RGB array of shape (height, width, 3).
    """
    if shown.kind == "map":
        return draw_head_maps(shown.records, shown.beside)
    scale = scales.of(shown)
    if shown.kind == "grid":
        return draw_grid(shown.records, scale, _found(inputs_of(shown.records[0]), shown))
    if shown.kind == "image":
        # Of several images that a model takes, each lies under its own attributions.
        groups: dict[str, list[Record]] = {}
        for record in shown.records:
            groups.setdefault(inputs_of(record), []).append(record)
        return below(
            [draw_overlays(own, scale, _found(name, shown)) for name, own in groups.items()], 16
        )
    painters: dict[str, Callable[[Sequence[Record], float], Pixels]] = {
        "strip": draw_strips,
        "bars": draw_bars,
    }
    return painters[shown.kind](shown.records, scale)


def caption(shown: Shown, scales: Scales) -> str:
    """Return the step, the top head of each map, and the scale of other pictures.

    Args:
        shown: What was drawn.
        scales: The scales it was drawn with.

    Returns:
        One line.
    """
    steps = chosen(shown.records) if shown.kind == "grid" else shown.records[:1]
    step = f"step {', '.join(str(record.step) for record in steps)}"
    if shown.kind == "map":
        tops = [(record.what, top_head(record)) for record in shown.records]
        return " · ".join([step, *(f"{what} {top}" for what, top in tops if top is not None)])
    unit = shown.records[0].panel.unit
    return f"{step} · full colour {scales.of(shown):.3g}{'' if unit == '1' else f' {unit}'}"


def _largest(record: Record, kind: str) -> float:
    if kind == "image":
        return largest_pixel(record)
    if kind == "bars":
        return _largest_of([mean_over_examples(record.panel)], 1e-12)
    if kind == "examples":
        return _largest_of(raw_rows(record.panel), 1e-12)
    return _largest_of(row_shares(record.panel), floor_of_strip(record.panel))


def _largest_of(rows: Sequence[Sequence[float]], floor: float) -> float:
    sizes = (abs(value) for row in rows for value in row)
    return max(floor, max((size for size in sizes if size < math.inf), default=0.0))


def _found(name: str, shown: Shown) -> Record | None:
    return next((record for record in shown.beside if record.name == name), None)
