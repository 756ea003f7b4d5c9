"""Attributions of images: a heat map, over the image in grey where it is known.

Colours are mixed in OKLab, so that twice the value looks twice as strong. The scale is symmetric
about zero, and zero is the image itself: colour is evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..record import Record
from .canvas import (
    BLUE,
    HAIR,
    INK,
    MAGENTA,
    ORANGE,
    PAPER,
    RGB,
    SOFT,
    Canvas,
    Pixels,
    below,
    beside,
)
from .oklab import from_oklab, to_oklab
from .strip import is_signed
from .texts import places, title

__all__ = [
    "asked",
    "draw_overlays",
    "heat",
    "largest_pixel",
    "of_pixels",
    "picture",
    "ramp",
    "titled",
]

EXAMPLES, PIXELS, CLIP = 4, 168, 0.99

Floats = NDArray[np.float64]

DIM = (0.55, 0.97)
"""Lightness of black and of white where an image lies under colours: these must stay readable."""

UNDEFINED = (214, 216, 220)


def draw_overlays(records: Sequence[Record], scale: float, inputs: Record | None = None) -> Pixels:
    """Draw the first examples of one or more panels, a column each.

    Args:
        records: Panels whose last axes are y and x. Channels are added up.
        scale: Value of full colour.
        inputs: The images themselves, of the same height and width: drawn in the first row, and
            under the colours.

    Returns:
        The picture.
    """
    maps = [of_pixels(record)[:EXAMPLES] for record in records]
    grey = None if inputs is None else of_pixels(inputs)
    names = places(records[0].panel, ("channel", "y", "x"))
    rows = [] if grey is None or not _fits(grey, maps[0]) else [_first_row(grey, maps[0], names)]
    over = bool(rows)
    for record, values in zip(records, maps, strict=True):
        signed = is_signed(record.panel)
        under = grey if grey is not None and _fits(grey, values) else [None] * len(values)
        drawn = [heat(v, scale, signed, g) for v, g in zip(values, under, strict=False)]
        row = drawn if over else [titled(p, w) for p, w in zip(drawn, names, strict=False)]
        rows.append(titled(beside(row, 10), asked(record)))
    last = records[-1].panel
    return below([*rows, ramp(scale, is_signed(last), last.unit, over=over)], 10)


def asked(record: Record) -> str:
    """Name a method and what it explains.

    Args:
        record: Attributions.

    Returns:
        For example ``"integrated gradients of 3, 5, 8"``.
    """
    said = record.panel.convention.get("target_text")
    texts = [str(text) for text in said[:EXAMPLES]] if isinstance(said, list) else []
    return title(record) + (f" of {', '.join(texts)}" if texts else "")


def largest_pixel(record: Record) -> float:
    """Return the 99th percentile of absolute values over all pixels: single ones may be extreme.

    Args:
        record: A panel whose last axes are y and x.

    Returns:
        A positive number: the largest value where the percentile is zero, as in maps of few
        pixels, and a tiny number where all are zero or undefined.
    """
    flat = np.abs(of_pixels(record)).ravel()
    flat = flat[np.isfinite(flat)]
    if not flat.size:
        return 1e-12
    return max(float(np.quantile(flat, CLIP)) or float(flat.max()), 1e-12)


def of_pixels(record: Record) -> Floats:
    """Return one map for each example: channels added up, all other axes in a row.

    Args:
        record: A panel whose last axes are y and x.

    Returns:
        ``[n, y, x]``.
    """
    values, axes = record.panel.values.double(), list(record.panel.axes)
    if "channel" in axes:
        values = values.sum(axes.index("channel"))
    values = values if values.ndim > 1 else values[None]
    flat: Floats = values.reshape(-1, *values.shape[-2:]).numpy()
    return flat


def heat(values: Floats, scale: float, signed: bool, grey: Floats | None = None) -> Pixels:
    """Draw one map.

    Args:
        values: ``[y, x]``.
        scale: Value of full colour.
        signed: Blue for positive and orange for negative values; otherwise one hue.
        grey: The image beneath, ``[y, x]``; None is white paper.

    Returns:
        Its pixels, enlarged.
    """
    strength = np.nan_to_num(values / scale, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1, 1)
    colours = _colours(strength, signed, grey)
    colours[np.isnan(values)] = UNDEFINED
    return _enlarged(colours)


def picture(grey: Floats) -> Pixels:
    """Draw an image alone, in grey.

    Args:
        grey: ``[y, x]``.

    Returns:
        Its pixels, enlarged.
    """
    return _enlarged(np.rint(255 * _stretched(grey))[..., None].repeat(3, -1).astype(np.uint8))


def ramp(scale: float, signed: bool, unit: str, *, over: bool = True) -> Pixels:
    """Draw what the colours mean.

    Args:
        scale: Value of full colour.
        signed: Whether there are negative values.
        unit: Their unit.
        over: Whether they lie over images.

    Returns:
        A bar with its ends named.
    """
    low = f"−{scale:.2g} opposes" if signed else "0"
    high = f"+{scale:.2g} supports" if signed else f"{scale:.2g}"
    words = f"{high}{'' if unit == '1' else f' ({unit})'}"
    ruler = Canvas(1, 1)
    left = ruler.width_of(low, 11) + 6
    canvas = Canvas(left + 150 + ruler.width_of(words, 11), 16)
    canvas.text((0, 1), low, SOFT, 11)
    canvas.text((left + 146, 1), words, SOFT, 11)
    pixels = canvas.pixels()
    line = np.linspace(-1.0 if signed else 0.0, 1.0, 140)[None].repeat(12, 0)
    pixels[2:14, left : left + 140] = _colours(line, signed, np.ones_like(line) if over else None)
    return pixels


def titled(drawn: Pixels, words: str) -> Pixels:
    """Put a line of text over a picture.

    Args:
        drawn: The picture.
        words: One line.

    Returns:
        Both.
    """
    ruler = Canvas(1, 1)
    head = Canvas(max(drawn.shape[1], ruler.width_of(words, 11) + 2), 16)
    head.text((0, 1), words, INK, 11)
    return below([head.pixels(), drawn], 2)


def _first_row(grey: Floats, maps: Floats, names: Sequence[str]) -> Pixels:
    shown = [titled(picture(image), name) for image, name in zip(grey, names, strict=False)]
    return beside(shown[: len(maps)], 10)


def _fits(grey: Floats, values: Floats) -> bool:
    return grey.shape[1:] == values.shape[1:] and len(grey) >= len(values)


def _colours(strength: Floats, signed: bool, grey: Floats | None) -> Pixels:
    """Mix from paper, or from the image, towards the hue; in OKLab, so that steps look equal."""
    plus = BLUE if signed else INK if grey is None else MAGENTA
    hue = np.where((strength >= 0)[..., None], to_oklab(_of(plus)), to_oklab(_of(ORANGE)))
    beneath = to_oklab(np.broadcast_to(_of(PAPER), hue.shape)) if grey is None else _faint(grey)
    return from_oklab(beneath + (hue - beneath) * np.abs(strength)[..., None])


def _faint(grey: Floats) -> Floats:
    """An image as lightness alone, within the range in which colours stay readable over it."""
    lightness = DIM[0] + (DIM[1] - DIM[0]) * _stretched(grey)
    return np.stack([lightness, np.zeros_like(lightness), np.zeros_like(lightness)], -1)


def _stretched(grey: Floats) -> Floats:
    """An image from 0 to 1; a constant one is white."""
    grey = np.nan_to_num(grey)
    low, high = grey.min(), grey.max()
    stretched: Floats = (grey - low) / (high - low) if high > low else np.ones_like(grey)
    return stretched


def _enlarged(small: Pixels) -> Pixels:
    times = max(1, PIXELS // max(small.shape[:2]))
    large = small.repeat(times, 0).repeat(times, 1)
    large[[0, -1]] = large[:, [0, -1]] = HAIR
    return large


def _of(colour: RGB) -> NDArray[np.int64]:
    return np.array(colour)
