"""What the report shows of attributions of images: the first example at each step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..record import Record
from .inputs import METHODS, target
from .pack import pack, thin
from .shelf import Numbers, Shelf, stack

__all__ = ["pictures"]

AXES = (("example", "channel", "y", "x"), ("example", "y", "x"))

PIXELS = 500_000
"""Above so many pixels over all steps only some of the steps are kept."""


def pictures(shelf: Shelf) -> dict[str, dict[str, Any]]:
    """Return the attributions of the first image by method, channels summed.

    The sum over channels keeps the total, so completeness can still be read off the picture.
    """
    found = {method: _picture(shelf, method) for method in METHODS}
    return {method: block for method, block in found.items() if block is not None}


def _picture(shelf: Shelf, method: str) -> dict[str, Any] | None:
    records = next((r for axes in AXES if (r := shelf.get(f"{method}/values", axes))), [])
    if not records or 0 in records[-1].panel.values.shape:
        return None
    height, width = records[-1].panel.values.shape[-2:]
    records = records[thin(len(records), height * width, PIXELS)]
    values = np.stack([_first(r) for r in records])
    panel = records[-1].panel
    return {
        "title": METHODS[method],
        "at": [r.step for r in records],
        "values": pack(values, bits=8),
        "height": height,
        "width": width,
        "signed": bool((values[np.isfinite(values)] < 0).any()),
        "unit": "" if panel.unit == "1" else panel.unit,
        "cap": _cap(values),
        "target": target(panel.convention),
    }


def _first(record: Record) -> Numbers:
    """The first example with its channels summed."""
    values = stack([record])[0, 0]
    image: Numbers = values.sum(0) if values.ndim == 3 else values
    return image


def _cap(values: Numbers) -> float:
    """Full colour: nearly the largest size of the run, so that one pixel does not pale the rest."""
    sizes = np.abs(values[np.isfinite(values)])
    largest = float(np.quantile(sizes, 0.995) or sizes.max()) if sizes.size else 0.0
    return float(f"{largest or 1.0:.3g}")
