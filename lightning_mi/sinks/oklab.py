"""Colours as the eye spaces them: OKLab (Ottosson 2020), in which equal steps look equal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_oklab", "to_oklab"]

Floats = NDArray[np.float64]

CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
"""Linear sRGB to the answers of the eye's three kinds of cones."""

OPPONENTS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""Cube roots of those to lightness, green to red, blue to yellow."""


def to_oklab(colours: NDArray[np.generic]) -> Floats:
    """Return colours in OKLab.

    Args:
        colours: sRGB, 0 to 255, ``[…, 3]``.

    Returns:
        Lightness (0 to 1) and the two opponent axes, ``[…, 3]``.

    Example:
        >>> to_oklab(np.array([255, 255, 255])).round(3) + 0
        array([1., 0., 0.])
    """
    unit = np.asarray(colours, float) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    found: Floats = np.cbrt(linear @ CONES.T) @ OPPONENTS.T
    return found


def from_oklab(colours: Floats) -> NDArray[np.uint8]:
    """Return colours in sRGB; what a screen cannot show is clipped.

    Args:
        colours: OKLab, ``[…, 3]``.

    Returns:
        Bytes, ``[…, 3]``.

    Example:
        >>> from_oklab(to_oklab(np.array([27, 102, 201]))).tolist()
        [27, 102, 201]
    """
    cones = (colours @ np.linalg.inv(OPPONENTS).T) ** 3
    linear = (cones @ np.linalg.inv(CONES).T).clip(0, 1)
    unit = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    shown: NDArray[np.uint8] = np.rint(255 * unit.clip(0, 1)).astype(np.uint8)
    return shown
