"""What the report shows of attention heads: scores over steps, and the loss they explain."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..emergence import HeadOnset, head_onsets
from ..record import Record
from .pack import pack, thin
from .shelf import Shelf, stack

__all__ = ["SCORES", "behaviour", "head_label", "onsets", "scores"]

SCORES = {
    "induction": "prefix matching: mean attention from t to t − P + 1 in the second copy, P being "
    "the period of the repeated random tokens",
    "previous_token": "mean attention from t to t − 1",
    "duplicate_token": "mean attention from t to earlier copies of the same token",
    "current_token": "mean attention from t to itself",
    "first_position": "mean attention to position 0 (a sink, not a circuit)",
}
"""The scores that have a hue of their own, and how each is computed."""

AXES = ("layer", "head")

WHOLE = 64
"""Curves of so many heads are kept at every step where the maps are thinned."""

STDERR_UP_TO = 20_000
"""Standard errors of more values than this would double the file for a hover."""


def onsets(shelf: Shelf) -> dict[str, list[HeadOnset]]:
    """Return the onset of every head for every recorded score."""
    found = {name: head_onsets(shelf.all, name) for name in SCORES}
    return {name: heads for name, heads in found.items() if heads}


def head_label(index: int, heads: int) -> str:
    """Return the short name of a head counted over all layers.

    Example:
        >>> head_label(5, 4)
        'L1H1'
    """
    return f"L{index // heads}H{index % heads}"


def scores(shelf: Shelf, found: dict[str, list[HeadOnset]]) -> dict[str, Any] | None:
    """Return every head score over steps, or None where none was recorded."""
    kept = [_score(shelf, name, heads) for name, heads in found.items()]
    if not kept:
        return None
    layers, heads = (
        shelf.last(f"head_scores/{kept[0]['name']}", AXES) or _none()
    ).panel.values.shape
    return {"layers": layers, "heads": heads, "list": kept}


def _none() -> Any:
    raise LookupError("a score with onsets has records")


def _score(shelf: Shelf, name: str, heads: list[HeadOnset]) -> dict[str, Any]:
    every = shelf.get(f"head_scores/{name}", AXES)
    each = every[-1].panel.values.numel()
    kept = thin(len(every), each * len(SCORES))
    records = every[kept]
    width = records[-1].panel.values.shape[1]
    nulls = [h.onset.null for h in heads if h.onset.null is not None]
    convention = records[-1].panel.convention
    return {
        "name": name,
        "title": name.replace("_", " "),
        "how": SCORES[name],
        "n": convention.get("n", convention.get("sequences")),
        "chance": round(float(np.median(nulls)), 5) if nulls else None,
        "at": [r.step for r in records],
        "values": pack(stack(records)),
        "thinned": kept.step if kept.step > 1 else None,
        "whole": _whole(every, heads) if kept.step > 1 else None,
        "stderr": _stderr(shelf, name, [r.step for r in records]),
        "rising": [
            {
                "head": h.layer * width + h.head,
                "state": h.onset.state,
                "interval": h.onset.interval,
                "says": h.onset.describe(),
            }
            for h in heads
            if h.onset.state in ("formed", "forming")
        ],
    }


def _whole(records: list[Record], heads: list[HeadOnset]) -> dict[str, Any]:
    """Curves of the first heads, those that rise and then the highest, at every step."""
    top = heads[:WHOLE]
    values = np.stack([[float(r.panel.values[h.layer, h.head]) for h in top] for r in records])
    width = records[-1].panel.values.shape[1]
    return {
        "heads": [h.layer * width + h.head for h in top],
        "at": [r.step for r in records],
        "values": pack(values),
    }


def _stderr(shelf: Shelf, name: str, steps: list[int]) -> Any:
    records = [r for r in shelf.get(f"head_scores/{name}_stderr", AXES) if r.step in set(steps)]
    if [r.step for r in records] != steps:
        return None
    values = stack(records)
    return pack(values, bits=8) if values.size <= STDERR_UP_TO else None


def behaviour(shelf: Shelf) -> dict[str, Any] | None:
    """Return the losses of the two copies over steps, or None where they were not recorded."""
    names = {"loss_first_copy": "first copy", "loss_second_copy": "second copy"}
    series = [curve(shelf, f"head_scores/{n}", title) for n, title in names.items()]
    kept = [s for s in series if s is not None]
    others = {"copy_gain": "copy gain", "icl_score": "in-context score"}
    extra = [curve(shelf, f"head_scores/{n}", title) for n, title in others.items()]
    if not kept:
        return None
    unit = (shelf.last("head_scores/loss_second_copy") or shelf.all[0]).panel.unit
    return {"series": kept, "also": [e for e in extra if e is not None], "unit": unit}


def curve(shelf: Shelf, name: str, title: str) -> dict[str, Any] | None:
    """Return a scalar over steps, or None where it was not recorded."""
    records = shelf.get(name, ())
    if not records:
        return None
    values = pack(stack(records))
    return {"name": title, "at": [r.step for r in records], "values": values}
