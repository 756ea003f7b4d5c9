"""Pictures of triangles and discs on a grid, whose parts one knows: `Scenes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["COLOURS", "FACTORS", "GRID", "SHAPES", "Scenes"]

SHAPES = ("triangle", "disc")
COLOURS = ("blue", "green")
FACTORS = ("shape", "colour", "column")
GRID = 4
"""Cells on a side."""

CELL = 8
"""Pixels on a side of a cell."""

INKS = ((0.1, 0.3, 1.0), (0.1, 0.8, 0.2))
"""Red, green and blue of each colour, from 0 to 1."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """Sixteen cells, each empty or with a triangle or a disc, blue or green.

    Args:
        shape: ``[scene, row, column]``: index into `SHAPES`, −1 where the cell is empty.
        colour: Likewise, index into `COLOURS`.
    """

    shape: Tensor
    colour: Tensor

    @classmethod
    def drawn(
        cls,
        count: int,
        generator: torch.Generator,
        *,
        least: int = 0,
        most: int = GRID * GRID,
        shapes: Sequence[str] = SHAPES,
        colours: Sequence[str] = COLOURS,
    ) -> Scenes:
        """Return scenes whose number of objects is uniform, in random cells.

        Args:
            count: Number of scenes.
            generator: Of the draw.
            least: Fewest objects in a scene.
            most: Most objects.
            shapes: Shapes that occur.
            colours: Colours that occur.

        Returns:
            The scenes.
        """
        totals = torch.randint(least, most + 1, (count,), generator=generator)
        order = torch.rand(count, GRID * GRID, generator=generator).argsort(1)
        filled = (order.argsort(1) < totals[:, None]).reshape(count, GRID, GRID)
        parts = []
        for names, known in ((shapes, SHAPES), (colours, COLOURS)):
            allowed = torch.tensor([_index(name, known) for name in names])
            chosen = torch.randint(0, len(allowed), filled.shape, generator=generator)
            parts.append(torch.where(filled, allowed[chosen], -1))
        return cls(*parts)

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.shape)

    @property
    def filled(self) -> Tensor:
        """Where there is an object, ``[scene, row, column]``."""
        return self.shape >= 0

    @property
    def totals(self) -> Tensor:
        """Number of objects ``[scene]``."""
        return self.filled.sum((1, 2))

    def level(self, factor: str) -> Tensor:
        """Return the level of a factor that the object of each cell has or would have.

        Args:
            factor: ``"shape"``, ``"colour"`` or ``"column"``.

        Returns:
            Shape ``[scene, row, column]``; −1 in empty cells, but for columns, which all have.

        Raises:
            ArgumentError: If there is no such factor.
        """
        if factor not in FACTORS:
            raise ArgumentError.of(
                "factor", expected=f"one of {FACTORS}", got=repr(factor), do="Choose."
            )
        if factor == "column":
            return torch.arange(GRID).expand(self.shape.shape)
        return self.shape if factor == "shape" else self.colour

    def counts(self, factor: str) -> Tensor:
        """Return how many objects have each level of a factor; they add up to `totals`.

        Args:
            factor: ``"shape"``, ``"colour"`` or ``"column"``.

        Returns:
            Shape ``[scene, level]``: two shapes, two colours or four columns.
        """
        levels = GRID if factor == "column" else len(SHAPES)
        own = self.level(factor)
        return torch.stack([(self.filled & (own == i)).sum((1, 2)) for i in range(levels)], 1)

    def select(self, index: Tensor) -> Scenes:
        """Return some of the scenes.

        Args:
            index: Which.

        Returns:
            Scenes of their number.
        """
        return dataclasses.replace(self, shape=self.shape[index], colour=self.colour[index])

    def images(
        self, generator: torch.Generator | None = None, *, noise: float = 0.05, shift: int = 2
    ) -> Tensor:
        """Draw the scenes on black ground.

        Args:
            generator: Of noise and shifts; None draws neither. Scenes of one number get the same
                noise and shifts from generators in one state.
            noise: Standard deviation of the Gaussian noise of every pixel.
            shift: Each picture is shifted by up to so many pixels in x and y, wrapping around.

        Returns:
            Pictures ``[scene, 3, 32, 32]``.
        """
        shapes = torch.cat([_masks(), torch.zeros(1, CELL, CELL)])[self.shape]
        inks = torch.tensor(INKS)[self.colour.clamp(min=0)]
        # scene, channel, row, pixel row, column, pixel column
        cells = torch.einsum("nrcyx,nrcs->nsrycx", shapes, inks)
        images = cells.reshape(len(self), 3, GRID * CELL, GRID * CELL)
        if generator is None:
            return images
        moves = torch.randint(-shift, shift + 1, (2, len(self), 1), generator=generator)
        places = torch.arange(GRID * CELL)
        y, x = ((places - move) % len(places) for move in moves)
        rows = torch.arange(len(self))[:, None, None]
        images = images[rows, :, y[:, :, None], x[:, None, :]].movedim(-1, 1)
        return images + noise * torch.randn(images.shape, generator=generator)


def _masks() -> Tensor:
    """Return a filled triangle and a filled disc ``[shape, y, x]``."""
    y, x = torch.meshgrid(torch.arange(CELL), torch.arange(CELL), indexing="ij")
    from_middle = (x - (CELL - 1) / 2).abs()
    triangle = (y >= 1) & (y < CELL - 1) & (from_middle <= y / 2)
    disc = from_middle**2 + (y - (CELL - 1) / 2) ** 2 <= (CELL / 2 - 1) ** 2 + 0.5
    return torch.stack([triangle, disc]).float()


def _index(name: str, known: Sequence[str]) -> int:
    if name not in known:
        raise ArgumentError.of(
            "shapes or colours", expected=f"names among {known}", got=repr(name), do="Choose."
        )
    return known.index(name)
