"""Which keys a firing is logged under: pure functions from records to a `Plan`.

Two kinds of sections: ``mi/<headline>`` holds at most eight scalars that answer "how is it going",
``mi_<measurement>/<what>`` at most eight keys of one measurement. ``mi/step`` is the x axis of all.

A panel says what to show in ``convention["display"]``, a dict with any of these keys:

``"headline": "induction"``
    Logged as ``mi/induction``: a scalar's value, else the panel's maximum.
``"scalar": "gap"``
    Logged as ``mi_<measurement>/gap``: a scalar's value, else the largest absolute value.
``"ranks": n``
    Logged as ``mi_<measurement>/<what>_1`` to ``_n``: the largest values in order. By rank, because
    an index in the key would make new charts for each seed; captions and table name the index.
``"picture": kind``
    Drawn under ``mi_<measurement>/<kind>`` (examples under ``mi_<measurement>/top``).

An empty dict: recorded, not shown. A bare ``convention["picture"]`` is a display of that picture
alone. Without either the panel's axes and name decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError
from ..record import Panel, Record

__all__ = ["HEADLINES", "PICTURES", "Plan", "Shown", "display", "plan"]

PICTURES = {
    "map": "map",
    "strip": "strip",
    "image": "image",
    "bars": "bars",
    "examples": "top",
    "grid": "grid",
}
"""Kinds of pictures, and the last part of their keys; a grid shows one picture over steps."""

HEADLINES = {
    "head_scores/induction": "induction",
    "head_scores/previous_token": "prev_token",
    "head_scores/copy_gain": "copy_gain",
    "head_scores/icl_score": "icl_score",
    "agreement/integrated_gradients": "agree_ig",
    "agreement/saliency": "agree_sal",
    "monitor/overhead": "overhead",
}
"""Records that are a headline unless their panel says otherwise."""

ROOM = 8
"""Keys in one section, so that a page of a dashboard holds them."""

COMPANIONS = ("_null", "_stderr")
"""Endings of panels that accompany another one and are read beside it."""

STEP, NONFINITE = "mi/step", "mi/nonfinite"


@dataclass(frozen=True)
class Shown:
    """A picture to draw.

    Args:
        key: Where it is logged.
        kind: One of `PICTURES`.
        records: What it shows, in order.
        beside: All records of the firing, for captions and backgrounds.
    """

    key: str
    kind: str
    records: tuple[Record, ...]
    beside: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a logger shows of one firing.

    Args:
        scalars: Finite numbers by key, with ``mi/step`` and ``mi/nonfinite``.
        pictures: What to draw.
    """

    scalars: Mapping[str, float]
    pictures: tuple[Shown, ...] = ()


def plan(records: Sequence[Record]) -> Plan:
    """Choose the keys of one firing.

    Args:
        records: Everything measured at one step; at least one.

    Returns:
        Scalars and pictures. Values that are not finite are left out and counted.

    Raises:
        ArgumentError: If a panel asks for a picture of an unknown kind.

    Example:
        >>> from lightning_mi.record import scalar
        >>> dict(plan([Record("head_scores/copy_gain", scalar(0.5), step=7)]).scalars)
        {'mi/copy_gain': 0.5, 'mi/nonfinite': 0.0, 'mi/step': 7.0}
    """
    names = {record.name for record in records}
    displays = [(record, display(record, names)) for record in records]
    pictures = _pictures(displays, tuple(records))
    wanted = [pair for record, shown in displays for pair in _scalars(record, shown)]
    scalars = _with_room(wanted, pictures)
    scalars[NONFINITE] = float(sum(record.panel.nonfinite for record in records))
    scalars[STEP] = float(records[0].step)
    return Plan(scalars, tuple(pictures))


def display(record: Record, names: set[str] | frozenset[str] = frozenset()) -> Mapping[str, Any]:
    """Return what is shown of a record: what its panel asks for, else what its axes suggest.

    Args:
        record: The record.
        names: Full names of all records of the firing.

    Returns:
        A dict as described at the top of this file.

    Raises:
        ArgumentError: If the panel asks for a picture of an unknown kind.

    Example:
        >>> display(Record("saliency/values", Panel([[1.0]], ("example", "position"))))
        {'picture': 'strip'}
    """
    convention = record.panel.convention
    own = convention.get("display")
    if own is None and "picture" in convention:
        own = {"picture": convention["picture"]}
    shown = _by_axes(record, names) if own is None else own
    kind = shown.get("picture")
    if kind is not None and kind not in PICTURES:
        raise ArgumentError.of(
            f"display of {record.name}",
            expected=f"a picture out of {sorted(PICTURES)}",
            got=repr(kind),
            do="Leave it out to draw nothing.",
        )
    return shown


def _by_axes(record: Record, names: set[str] | frozenset[str]) -> dict[str, Any]:
    for ending in COMPANIONS:
        if record.name.endswith(ending) and record.name.removesuffix(ending) in names:
            return {}
    headline = HEADLINES.get(record.name)
    shown: dict[str, Any] = {} if headline is None else {"headline": headline}
    axes = record.panel.axes
    if not axes:
        return shown or {"scalar": record.what}
    if axes == ("layer", "head"):
        return {**shown, "ranks": 1, "picture": "map"}
    if axes == ("example", "position"):
        return {**shown, "picture": "strip"}
    if axes == ("train_example", "position"):
        return {**shown, "picture": "examples"}
    if axes[-2:] == ("y", "x"):
        return {**shown, "picture": "image"}
    return {**shown, "picture": "bars"} if axes[-1] == "feature" else shown


def _scalars(record: Record, shown: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return all scalars wanted of a record; those without a finite value are NaN."""
    section = f"mi_{record.measurement}"
    found = []
    if "headline" in shown:
        found.append((f"mi/{shown['headline']}", _largest(record.panel, 1)[0]))
    if "scalar" in shown:
        found.append((f"{section}/{shown['scalar']}", _widest(record.panel)))
    ranked = _largest(record.panel, int(shown.get("ranks", 0)))
    found += [(f"{section}/{record.what}_{i}", value) for i, value in enumerate(ranked, 1)]
    return found


def _largest(panel: Panel, count: int) -> list[float]:
    """Return the largest values in order, NaN where there are fewer finite ones."""
    values = panel.values.double().flatten()
    ordered = values[torch.isfinite(values)].sort(descending=True).values[:count].tolist()
    return ordered + [math.nan] * (count - len(ordered))


def _widest(panel: Panel) -> float:
    """Return a scalar's value, else the largest absolute value."""
    if not panel.axes:
        return panel.item()
    values = panel.values.double().abs().flatten()
    finite = values[torch.isfinite(values)]
    return float(finite.max()) if finite.numel() else math.nan


def _pictures(
    displays: Sequence[tuple[Record, Mapping[str, Any]]], beside: tuple[Record, ...]
) -> list[Shown]:
    """Collect the panels that share a picture."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record, shown in displays:
        if "picture" in shown and record.panel.values.numel():
            groups.setdefault((record.measurement, shown["picture"]), []).append(record)
    return [
        Shown(f"mi_{measurement}/{PICTURES[kind]}", kind, tuple(records), beside)
        for (measurement, kind), records in groups.items()
    ]


def _with_room(wanted: Sequence[tuple[str, float]], pictures: Sequence[Shown]) -> dict[str, float]:
    """Keep the first keys of each section; which ones must not depend on what is finite."""
    taken: dict[str, set[str]] = {"mi": {NONFINITE}}
    for picture in pictures:
        taken.setdefault(picture.key.split("/")[0], set()).add(picture.key)
    kept: dict[str, float] = {}
    for key, value in wanted:
        section = taken.setdefault(key.split("/")[0], set())
        if len(section) < ROOM and key not in section:
            section.add(key)
            if math.isfinite(value):
                kept[key] = value
    return kept
