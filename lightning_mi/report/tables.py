"""What the report shows of attributions of tables: each feature over steps, mean of examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from .methods import cap, methods, record_of, signed, target, title, unit
from .pack import pack, thin
from .shelf import Shelf, stack

__all__ = ["tables"]

AXES = ("example", "feature")


def tables(shelf: Shelf) -> dict[str, dict[str, Any]]:
    """Return the mean attribution of every feature by method, with names and one scale."""
    found = {method: _table(shelf, method) for method in methods(shelf)}
    return {method: block for method, block in found.items() if block is not None}


def _table(shelf: Shelf, method: str) -> dict[str, Any] | None:
    records = shelf.get(record_of(method), AXES)
    if not records or not records[-1].panel.values.numel():
        return None
    panel = records[-1].panel
    examples, width = panel.values.shape
    records = records[thin(len(records), examples * width)]
    each = stack(records)
    defined = np.isfinite(each)
    count = defined.sum(1)
    values = np.where(defined, each, 0).sum(1)
    values = np.divide(values, count, out=np.full(values.shape, np.nan), where=count > 0)
    return {
        "title": title(method),
        "signed": signed(panel),
        "at": [r.step for r in records],
        "values": pack(values),
        "width": width,
        "names": [str(name) for name in panel.coords.get("feature", range(width))],
        "n": examples,
        "unit": unit(panel),
        "cap": cap(values),
        "target": target(panel) if examples == 1 else None,
    }
