"""What the report shows of attributions of images: examples over steps, over the images."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..beneath import inputs_of
from ..record import Record
from .methods import cap, methods, record_of, signed, targets, title, unit
from .pack import pack, thin
from .shelf import Numbers, Shelf, stack

__all__ = ["pictures"]

AXES = (("example", "channel", "y", "x"), ("example", "y", "x"))

EXAMPLES = 4

PIXELS = 1_000_000
"""Above so many pixels over all steps only some of the steps are kept."""


def pictures(shelf: Shelf) -> dict[str, dict[str, Any]]:
    """Return the attributions of the first images by method, channels summed.

    The sum over channels keeps the total, so completeness can still be read off the picture.
    """
    found = {method: _picture(shelf, method) for method in methods(shelf)}
    return {method: block for method, block in found.items() if block is not None}


def _picture(shelf: Shelf, method: str) -> dict[str, Any] | None:
    records = next((r for axes in AXES if (r := shelf.get(record_of(method), axes))), [])
    if not records or 0 in records[-1].panel.values.shape:
        return None
    panel = records[-1].panel
    count = min(panel.values.shape[0], EXAMPLES)
    height, width = panel.values.shape[-2:]
    records = records[thin(len(records), count * height * width, PIXELS)]
    values = np.stack([_summed(r, count) for r in records])
    with_sign = signed(panel)
    return {
        "title": title(method),
        "at": [r.step for r in records],
        "values": pack(values, bits=8),
        "examples": count,
        "height": height,
        "width": width,
        "signed": with_sign,
        "unit": unit(panel),
        "cap": cap(values),
        "targets": targets(panel)[:count],
        "inputs": _beneath(shelf, records[-1], (count, height, width)),
    }


def _summed(record: Record, count: int) -> Numbers:
    """The first examples with their channels summed."""
    values = stack([record])[0, :count]
    images: Numbers = values.sum(1) if values.ndim == 4 else values
    return images


def _beneath(shelf: Shelf, record: Record, shape: tuple[int, ...]) -> Any:
    """The images in grey, 0 to 255, or None where they were not recorded."""
    last = shelf.last(inputs_of(record), ("example", "y", "x"))
    if last is None:
        return None
    grey = np.asarray(last.panel.values, float)[: shape[0]]
    return pack(grey, bits=8) if grey.shape == shape else None
