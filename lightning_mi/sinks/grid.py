"""How attributions moved: one picture with a column, or a row, for each of a few steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..beneath import inputs_of, part_of
from ..record import Record
from .bars import draw_bars
from .canvas import Pixels, below, beside
from .keys import PICTURES, Shown, display
from .overlay import EXAMPLES, asked, heat, of_pixels, picture, ramp, titled
from .strip import draw_strip, fitting, is_signed
from .texts import title

__all__ = ["draw_grid", "over_steps"]

STEPS = {"image": 7, "strip": 6, "bars": 3}
"""Kinds of pictures that are shown over steps, and how many steps fit."""

TEXTS = 3
"""How many of the first texts are shown over steps."""


def over_steps(records: Sequence[Record]) -> tuple[Shown, ...]:
    """Choose what is drawn over steps when a run has ended.

    Args:
        records: All records of a run.

    Returns:
        One picture for each attribution measured at two or more steps, under
        ``mi_<measurement>/grid``, of several inputs ``grid_<key>``.
    """
    names = {record.name for record in records}
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.what.startswith("values") and display(record, names).get("picture") in STEPS:
            # Of the same step measured twice, in training and from a checkpoint, take the first.
            found.setdefault(record.name, {}).setdefault(record.step, record)
    series = [_alike([steps[at] for at in sorted(steps)]) for steps in found.values()]
    return tuple(
        Shown(_key(own[0]), "grid", own, _beside(own, records)) for own in series if len(own) > 1
    )


def kind_of(record: Record) -> str:
    """Return the kind of picture of a single step.

    Args:
        record: Attributions.

    Returns:
        ``"image"``, ``"strip"`` or ``"bars"``.
    """
    return str(display(record).get("picture"))


def chosen(records: Sequence[Record]) -> list[Record]:
    """Return the few records that are shown: evenly over the run, the first and the last included.

    Args:
        records: One for each step, in order.

    Returns:
        Some of them.
    """
    last, count = len(records) - 1, min(STEPS[kind_of(records[0])], len(records))
    places = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [records[place] for place in sorted(places)]


def draw_grid(records: Sequence[Record], scale: float, inputs: Record | None = None) -> Pixels:
    """Draw attributions over steps: a row an example and a column a step for images.

    Of texts the first few are drawn, a row a step; of tables the mean, a column a step.

    Args:
        records: One for each step, in order; of one shape.
        scale: Value of full colour, the same for all steps.
        inputs: The images, which are drawn in the first column and under the colours.

    Returns:
        The picture.
    """
    few = chosen(records)
    if kind_of(few[0]) == "image":
        return _draw_images(few, scale, inputs)
    names = [f"step {record.step:,}" for record in few]
    if kind_of(few[0]) == "bars":
        bars = [draw_bars([record], scale, like=few[-1]) for record in few]
        return beside([titled(p, name) for p, name in zip(bars, names, strict=True)])
    texts = range(fitting(few[-1].panel, TEXTS))
    return below([_draw_text(few, names, scale, example) for example in texts], 16)


def _key(record: Record) -> str:
    key = part_of(record.what)
    return f"mi_{record.measurement}/{PICTURES['grid']}" + (f"_{key}" if key else "")


def _draw_text(records: Sequence[Record], names: list[str], scale: float, example: int) -> Pixels:
    last = records[-1]
    asked_for = last.panel.convention.get("target_text")
    target = asked_for[example] if isinstance(asked_for, list) else None
    name = f"{title(last)} · example {example}" + (f": {target}" if target is not None else "")
    rows = zip(records, names, strict=True)
    return titled(below([draw_strip(r, scale, example, name) for r, name in rows], 0), name)


def _draw_images(records: Sequence[Record], scale: float, inputs: Record | None) -> Pixels:
    maps = [of_pixels(record)[:EXAMPLES] for record in records]
    grey = None if inputs is None else of_pixels(inputs)[: len(maps[0])]
    if grey is not None and grey.shape != maps[0].shape:
        grey = None
    under = [None] * len(maps[0]) if grey is None else list(grey)
    signed = is_signed(records[-1].panel)
    columns = [] if grey is None else [titled(below([picture(g) for g in grey], 6), "input")]
    for record, values in zip(records, maps, strict=True):
        drawn = [heat(v, scale, signed, g) for v, g in zip(values, under, strict=True)]
        columns.append(titled(below(drawn, 6), f"step {record.step:,}"))
    key = ramp(scale, signed, records[-1].panel.unit, over=grey is not None)
    return below([titled(beside(columns, 6), asked(records[-1])), key], 10)


def _alike(records: Sequence[Record]) -> tuple[Record, ...]:
    """Leave out steps that were measured on another batch."""
    shape = records[-1].panel.values.shape
    return tuple(record for record in records if record.panel.values.shape == shape)


def _beside(own: Sequence[Record], records: Sequence[Record]) -> tuple[Record, ...]:
    name = inputs_of(own[-1])
    return tuple(r for r in records if r.name == name and r.step == own[-1].step)[:1]
