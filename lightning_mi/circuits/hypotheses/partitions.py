"""Ways to part the objects of a picture into kinds that may be counted apart: `Partition`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...behaviors.scenes import COLOURS, GRID, SHAPES, Scenes
from ...errors import ArgumentError

__all__ = ["PARTITIONS", "Partition", "only"]

PARTITIONS = ("shape", "colour", "column")
CELLS = GRID * GRID
FORM = (GRID, GRID, len(SHAPES), len(COLOURS))


@dataclass(frozen=True, eq=False)
class Partition:
    """Each possible object, by cell, shape and colour, belongs to one level.

    Args:
        name: How it is called.
        table: Level of each object ``[row, column, shape, colour]``.
    """

    name: str
    table: Tensor

    @classmethod
    def of(cls, name: str) -> Partition:
        """Return one of those that have a name.

        Args:
            name: ``"shape"``, ``"colour"``, ``"column"``; ``"total"``, which parts nothing; or
                ``"mixed"``, blue triangles and green discs against the other two.

        Returns:
            The partition.

        Raises:
            ArgumentError: If there is none of that name.
        """
        row, column, shape, colour = torch.meshgrid(*map(torch.arange, FORM), indexing="ij")
        known = {
            "shape": shape,
            "colour": colour,
            "column": column,
            "total": torch.zeros_like(row),
            "mixed": (shape + colour) % 2,
        }
        if name not in known:
            raise ArgumentError.of(
                "partition", expected=f"one of {sorted(known)}", got=repr(name), do="Choose one."
            )
        return cls(name, known[name].clone())

    @property
    def levels(self) -> int:
        """Number of kinds."""
        return int(self.table.max()) + 1

    def counts(self, scenes: Scenes) -> Tensor:
        """Return how many objects of each level there are.

        Args:
            scenes: The scenes.

        Returns:
            Shape ``[scene, level]``; they add up to the total.
        """
        cells = torch.arange(GRID)
        own = self.table[
            cells[:, None], cells, scenes.shape.clamp(min=0), scenes.colour.clamp(min=0)
        ]
        filled = scenes.filled
        return torch.stack(
            [(filled & (own == level)).sum((1, 2)) for level in range(self.levels)], 1
        )

    def shuffled(self, generator: torch.Generator) -> Partition:
        """Return a random partition with as many levels of the same size.

        Whole cells are dealt out where this one parts cells, single objects else.

        Args:
            generator: Of the draw.

        Returns:
            The partition.
        """
        if self.name == "column":
            order = torch.randperm(CELLS, generator=generator)
            cells = self.table[:, :, 0, 0].flatten()[order].reshape(GRID, GRID)
            table = cells[:, :, None, None].expand(FORM).clone()
        else:
            flat = self.table.flatten()
            table = flat[torch.randperm(len(flat), generator=generator)].reshape(FORM)
        return Partition(f"random {self.name}", table)


def only(scenes: Scenes, cells: Tensor) -> Scenes:
    """Return scenes of which some cells are kept and all others emptied.

    Args:
        scenes: The scenes.
        cells: Which are kept, boolean ``[scene, row, column]``.

    Returns:
        Scenes of the same number.
    """
    return Scenes(torch.where(cells, scenes.shape, -1), torch.where(cells, scenes.colour, -1))
