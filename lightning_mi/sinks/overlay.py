"""Attributions of images: a signed heat map, over the image where it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..record import Record
from .canvas import BLUE, HAIR, INK, ORANGE, PAPER, Canvas, Pixels, below, beside
from .strip import is_signed
from .texts import places, title

__all__ = ["draw_overlays", "largest_pixel"]

EXAMPLES, PIXELS, CLIP = 4, 224, 0.99


def draw_overlays(records: Sequence[Record], scale: float, inputs: Record | None = None) -> Pixels:
    """Draw the first examples of one or more panels.

    Args:
        records: Panels whose last axes are y and x. Channels are added up.
        scale: Value of full colour.
        inputs: The images themselves, of the same shape, shown in grey beneath.

    Returns:
        The picture.
    """
    rows = []
    for record in records:
        heat = _pixels_of(record)
        grey = _under(heat, inputs)
        names = places(record.panel, ("channel", "y", "x"))
        drawn = [
            _titled(
                _heat(heat[i], scale, is_signed(record.panel), grey[i]),
                f"{title(record)} · {names[i]}",
            )
            for i in range(min(len(heat), len(names), EXAMPLES))
        ]
        rows.append(beside(drawn))
    return below(rows)


def largest_pixel(record: Record) -> float:
    """Return the 99th percentile of absolute values over all pixels: single ones may be extreme.

    Args:
        record: A panel whose last axes are y and x.

    Returns:
        At least a tiny positive number, also for all-zero and undefined values.
    """
    flat = _pixels_of(record).abs().flatten()
    flat = flat[torch.isfinite(flat)]
    if not flat.numel():
        return 1e-12
    # numpy, because torch.quantile refuses more than 16 million values.
    return max(float(np.quantile(flat.numpy(), CLIP)), 1e-12)


def _under(heat: Tensor, inputs: Record | None) -> Sequence[Tensor | None]:
    """Return what lies beneath each heat map: the images in grey, if they are known and fit."""
    grey = None if inputs is None else _pixels_of(inputs)
    return list(grey) if grey is not None and grey.shape == heat.shape else [None] * len(heat)


def _pixels_of(record: Record) -> Tensor:
    """Return [n, y, x]: channels added up, all other axes in a row."""
    values, axes = record.panel.values.double(), list(record.panel.axes)
    if "channel" in axes:
        values = values.sum(axes.index("channel"))
    values = values if values.ndim > 1 else values[None]
    return values.reshape(-1, *values.shape[-2:])


def _heat(values: Tensor, scale: float, with_sign: bool, grey: Tensor | None) -> Pixels:
    strength = (values / scale).nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1)
    positive = torch.tensor(BLUE if with_sign else INK, dtype=torch.double)
    negative = torch.tensor(ORANGE, dtype=torch.double)
    hue = torch.where((strength >= 0)[..., None], positive, negative)
    paper = _paper(values) if grey is None else _faint(grey)
    mixed = paper + (hue - paper) * strength.abs()[..., None]
    times = max(1, PIXELS // max(values.shape))
    big = mixed.repeat_interleave(times, 0).repeat_interleave(times, 1)
    pixels: Pixels = big.round().to(torch.uint8).numpy()
    pixels[[0, -1]] = pixels[:, [0, -1]] = HAIR
    return pixels


def _paper(values: Tensor) -> Tensor:
    return torch.tensor(PAPER, dtype=torch.double).expand(*values.shape, 3)


def _faint(grey: Tensor) -> Tensor:
    """Stretch an image to light grey, so that colours stay readable over it."""
    grey = grey.nan_to_num()
    low, high = grey.min(), grey.max()
    level = (grey - low) / (high - low) if high > low else torch.ones_like(grey)
    return (150 + 105 * level)[..., None].expand(*grey.shape, 3)


def _titled(picture: Pixels, words: str) -> Pixels:
    ruler = Canvas(1, 1)
    head = Canvas(max(picture.shape[1], ruler.width_of(words, 11) + 2), 16)
    head.text((0, 1), words, INK, 11)
    return below([head.pixels(), picture], 2)
