"""What all pictures are drawn with: colours, a `Canvas` of Pillow, and ways to join pictures.

Pillow and not matplotlib: these are boxes with text, drawn while the user's model waits, and a
figure costs many times the time of an image. There is nothing to close, and no global state.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["Canvas", "RGB", "beside", "below", "blend", "ink_on", "signed"]

RGB: TypeAlias = tuple[int, int, int]
Pixels: TypeAlias = NDArray[np.uint8]
"""A picture: (height, width, 3)."""

PAPER: RGB = (255, 255, 255)
INK: RGB = (25, 29, 38)
SOFT: RGB = (85, 94, 108)
HAIR: RGB = (201, 205, 212)
BLUE: RGB = (27, 102, 201)
ORANGE: RGB = (176, 79, 0)
VIOLET: RGB = (106, 63, 208)
TEAL: RGB = (0, 121, 128)
MAGENTA: RGB = (190, 0, 110)


def blend(hue: RGB, strength: float) -> RGB:
    """Return a colour between paper and a hue.

    Args:
        hue: The full colour.
        strength: 0 (paper) to 1; values outside are clipped.

    Returns:
        The colour.

    Example:
        >>> blend((0, 100, 255), 0.5)
        (128, 178, 255)
    """
    t = min(max(float(strength), 0.0), 1.0)
    red, green, blue = (round(p + (h - p) * t) for p, h in zip(PAPER, hue, strict=True))
    return red, green, blue


def signed(value: float) -> RGB:
    """Return blue for what supports and orange for what opposes.

    Args:
        value: -1 to 1.

    Returns:
        The colour.
    """
    return blend(BLUE if value >= 0 else ORANGE, abs(value))


def ink_on(colour: RGB) -> RGB:
    """Return black or white, whichever has the higher contrast on a colour.

    Args:
        colour: The background.

    Returns:
        The colour of text on it.

    Example:
        >>> ink_on((255, 255, 255)), ink_on((0, 0, 0))
        ((0, 0, 0), (255, 255, 255))
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _unit(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Equal contrast to black and to white: (L + .05)² = .05 · 1.05.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


class Canvas:
    """White paper of a size, and boxes and text on it.

    Args:
        width: In pixels.
        height: In pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (max(width, 1), max(height, 1)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(
        self, x: int, y: int, size: tuple[int, int], fill: RGB, edge: RGB | None = None
    ) -> None:
        """Fill a box.

        Args:
            x: Left.
            y: Top.
            size: Width and height.
            fill: Its colour.
            edge: Colour of its outline.
        """
        corners = (x, y, x + size[0] - 1, y + size[1] - 1)
        self._draw.rectangle(corners, fill=fill, outline=edge)

    def hatch(self, x: int, y: int, size: tuple[int, int]) -> None:
        """Mark a box as undefined.

        Args:
            x: Left.
            y: Top.
            size: Width and height.
        """
        self.box(x, y, size, PAPER, HAIR)
        self._draw.line((x, y + size[1] - 1, x + size[0] - 1, y), fill=SOFT)

    def line(
        self, start: tuple[int, int], end: tuple[int, int], colour: RGB, width: int = 1
    ) -> None:
        """Draw a straight line.

        Args:
            start: x and y.
            end: x and y.
            colour: Its colour.
            width: In pixels.
        """
        self._draw.line((*start, *end), fill=colour, width=width)

    def text(self, at: tuple[int, int], words: str, colour: RGB = INK, size: int = 12) -> None:
        """Write words whose top left corner is at a point.

        Args:
            at: x and y.
            words: One line.
            colour: Its colour.
            size: Height of the font.
        """
        left, top, mask = _shape(words, size)
        if mask is not None:
            self._draw.bitmap((at[0] + left, at[1] + top), mask, fill=colour)

    def centred(self, box: tuple[int, int, int, int], words: str, colour: RGB, size: int) -> None:
        """Write words in the middle of a box.

        Args:
            box: x, y, width, height.
            words: One line.
            colour: Its colour.
            size: Height of the font.
        """
        x, y, width, height = box
        middle = (x + width / 2, y + height / 2)
        self._draw.text(middle, words, fill=colour, font=_font(size), anchor="mm")

    def width_of(self, words: str, size: int = 12) -> int:
        """Return how wide words are.

        Args:
            words: One line.
            size: Height of the font.

        Returns:
            Pixels.
        """
        return _width(words, size)

    def pixels(self) -> Pixels:
        """Return what was drawn.

        Returns:
            Array of shape (height, width, 3).
        """
        return np.array(self.image, dtype=np.uint8)


def beside(pictures: Sequence[Pixels], gap: int = 16) -> Pixels:
    """Join pictures from left to right.

    Args:
        pictures: At least one.
        gap: White pixels between them.

    Returns:
        One picture.
    """
    return below([picture.transpose(1, 0, 2) for picture in pictures], gap).transpose(1, 0, 2)


def below(pictures: Sequence[Pixels], gap: int = 16) -> Pixels:
    """Join pictures from top to bottom.

    Args:
        pictures: At least one.
        gap: White pixels between them.

    Returns:
        One picture.
    """
    width = max(picture.shape[1] for picture in pictures)
    height = sum(picture.shape[0] + gap for picture in pictures) - gap
    paper = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for picture in pictures:
        paper[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + gap
    return paper


def _unit(colour: RGB) -> list[float]:
    return [channel / 255 for channel in colour]


# The same tokens come at every firing, and for every attribution of it.
@functools.lru_cache(maxsize=2048)
def _shape(words: str, size: int) -> tuple[int, int, Image.Image | None]:
    """Return how far words lie right of and below their place, and how dark each pixel is."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (round(edge) for edge in _font(size).getbbox(words))
    if right <= left or bottom <= top:
        return left, top, None
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), words, fill=255, font=_font(size))
    return left, top, mask


@functools.lru_cache(maxsize=2048)
def _width(words: str, size: int) -> int:
    return round(_font(size).getlength(words))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Take the font that matplotlib brings, for its many characters; matplotlib stays unloaded."""
    from PIL import ImageFont

    package = importlib.util.find_spec("matplotlib")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(size)
