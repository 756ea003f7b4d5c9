"""Charts for whatever else was measured, chosen by the names of axes alone: `panels`.

A measurement that no chart of its own knows gets a card: its panels without axes as curves, the
others as maps over steps, as matrices at the chosen step and, where axes name edges, as a graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..record import Panel
from .headline import ASIDE
from .heads import curve
from .methods import cap, signed, title, unit
from .pack import MOST, pack, thin
from .shelf import Shelf, stack

__all__ = ["panels"]

COARSE_FROM = 65_536
"""Blocks of more numbers than this are packed into one byte each: they are seen as colours."""

BESIDE = re.compile(r"_(stderr|null|matched|matched_null|null_matched)$")
"""Panels that belong to another one: its error and its chance level."""


def panels(shelf: Shelf) -> list[dict[str, Any]]:
    """Return one entry for each measurement that no other chart has drawn anything of.

    Args:
        shelf: The records; what is drawn here counts as drawn.

    Returns:
        ``measurement``, ``title``, ``curves`` and ``arrays``, in order of first appearance.
    """
    wanted = [name for name in shelf.undrawn if _is_shown(shelf, name)]
    count = len([name for name in wanted if shelf.peek(name)[-1].panel.axes])
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(name.split("/")[0], []).append(name)
    made = [_group(shelf, kind, names, MOST // max(1, count)) for kind, names in groups.items()]
    return [group for group in made if group["curves"] or group["arrays"]]


def _is_shown(shelf: Shelf, name: str) -> bool:
    """Whether the last record of a name asks to be seen: not a quiet one, nor one of no values."""
    kind, _, what = name.partition("/")
    last = shelf.peek(name)[-1].panel
    quiet = last.convention.get("display") == {}
    beside = BESIDE.search(what) is not None and f"{kind}/{BESIDE.sub('', what)}" in shelf.names
    return not (quiet or beside or kind in ASIDE) and 0 < last.values.numel() <= MOST


def _group(shelf: Shelf, kind: str, names: Sequence[str], most: int) -> dict[str, Any]:
    scalars = [name for name in names if not shelf.peek(name)[-1].panel.axes]
    return {
        "measurement": kind,
        "title": title(kind),
        "curves": [_curve(shelf, name) for name in scalars],
        "arrays": [_array(shelf, name, most) for name in names if name not in scalars],
    }


def _curve(shelf: Shelf, name: str) -> dict[str, Any]:
    last = shelf.get(name, ())[-1].panel
    made = curve(shelf, name, title(_what(name))) or {}
    error = shelf.get(f"{name}_stderr", ())
    same = [r.step for r in error] == made["at"]
    null = shelf.last(f"{name}_null", ())
    return {
        **made,
        "what": _what(name),
        "unit": unit(last),
        "says": _says(last),
        "stderr": pack(stack(error)) if error and same else None,
        "null": _null(last) if null is None else null.panel.item(),
    }


def _array(shelf: Shelf, name: str, most: int) -> dict[str, Any]:
    every = shelf.get(name)
    panel = every[-1].panel
    records = every[thin(len(every), panel.values.numel(), most)]
    values = stack(records).reshape(len(records), -1)
    null = _null(panel)
    with_sign = signed(panel) or (null is not None and bool((values < null).any()))
    return {
        "name": name,
        "what": _what(name),
        "title": title(_what(name)),
        "unit": unit(panel),
        "says": _says(panel),
        "axes": list(panel.axes),
        "shape": list(panel.values.shape),
        "labels": _labels(panel),
        "at": [r.step for r in records],
        "values": pack(values, bits=8 if values.size > COARSE_FROM else 16),
        "signed": with_sign,
        "null": null or 0.0,
        "cap": cap(values - (null or 0.0)),
        "measured": len(every),
        "reason": str(panel.convention["reason"]) if panel.convention.get("reason") else None,
    }


def _labels(panel: Panel) -> dict[str, list[str]]:
    """Names along each axis that has some of its own."""
    return {
        axis: [_label(axis, label) for label in panel.coords[axis]]
        for axis in panel.axes
        if axis in panel.coords
    }


def _label(axis: str, label: Any) -> str:
    """A label as text; bare numbers say of what."""
    plain = isinstance(label, int | float) and not isinstance(label, bool)
    return f"{axis.replace('_', ' ')} {label}" if plain else str(label)


def _null(panel: Panel) -> float | None:
    found = panel.convention.get("null")
    return float(found) if isinstance(found, int | float) and np.isfinite(found) else None


def _says(panel: Panel) -> str:
    """What the panel says of itself: its ``what`` and its ``sign``."""
    told = (panel.convention.get(key) for key in ("what", "sign"))
    return "; ".join(str(one) for one in told if one)


def _what(name: str) -> str:
    return name.partition("/")[2]
