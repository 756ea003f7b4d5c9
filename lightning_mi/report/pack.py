"""Numbers for the browser, small: `pack`."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack", "thin", "unpack"]

SMALL = 256
"""Up to so many numbers stand as they are: the page stays readable."""

DIGITS = 5

MOST = 2_000_000
"""Above so many numbers a block keeps only some of its steps."""


def pack(values: NDArray[Any], *, bits: int = 16) -> list[Any] | dict[str, Any]:
    """Return numbers as a short JSON value.

    Args:
        values: Any shape; what is not finite becomes "undefined".
        bits: 16, or 8 for what is only ever shown as a colour.

    Returns:
        Up to 256 numbers as a flat list with None for undefined; more as unsigned integers,
        deflated, base64: ``value = offset + scale * code``, the highest code being undefined.

    Example:
        >>> pack(np.array([0.5, float("nan")]))
        [0.5, None]
    """
    flat = np.asarray(values, float).ravel()
    defined = np.isfinite(flat)
    if flat.size <= SMALL:
        return [
            float(f"{v:.{DIGITS}g}") if ok else None for v, ok in zip(flat, defined, strict=True)
        ]
    low, high = (flat[defined].min(), flat[defined].max()) if defined.any() else (0.0, 0.0)
    top = 2**bits - 1
    scale = float(high - low) / (top - 1) or 1.0
    codes = np.full(flat.shape, top, "<u2" if bits == 16 else "u1")
    codes[defined] = np.rint((flat[defined] - low) / scale)
    text = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode("ascii")
    return {"bits": bits, "offset": float(low), "scale": scale, "z": text}


def unpack(packed: list[Any] | dict[str, Any]) -> NDArray[np.float64]:
    """Undo `pack`; the browser does the same in ``core/data.js``.

    Args:
        packed: What `pack` returned.

    Returns:
        The numbers, flat, NaN where undefined.
    """
    if isinstance(packed, list):
        return np.array([np.nan if v is None else v for v in packed], float)
    raw = zlib.decompress(base64.b64decode(packed["z"]))
    codes = np.frombuffer(raw, "<u2" if packed["bits"] == 16 else "u1")
    values: NDArray[np.float64] = packed["offset"] + packed["scale"] * codes.astype(float)
    values[codes == 2 ** packed["bits"] - 1] = np.nan
    return values


def thin(count: int, each: int, most: int = MOST) -> slice:
    """Return which of ``count`` steps to keep so that no more than ``most`` numbers remain.

    Args:
        count: Number of steps.
        each: Numbers at each.
        most: Numbers that may remain.

    Returns:
        Every k-th step, counted from the last, which is always kept.
    """
    stride = max(1, -(-count * each // most))
    return slice((count - 1) % stride, None, stride)
