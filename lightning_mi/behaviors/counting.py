"""Counting the objects of a picture, which may be done in several ways that give one answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .metrics import AnyOf, Metric, metric_of
from .scenes import COLOURS, FACTORS, GRID, SHAPES, Scenes

__all__ = ["Counting"]

Factor = Literal["shape", "colour", "column"]
Change = Literal["number", "kind"]
CELLS = GRID * GRID


@dataclass(frozen=True)
class Counting:
    """How many objects are there, 0 to 16? One class for each number.

    A model may count triangles and discs and add them up, or blue and green ones, or column by
    column, or cell by cell. Clean and corrupted pictures differ in one factor:

    - ``change="number"``: there are more or fewer objects of one level of it (one of the two
      shapes or colours, or one of the four columns), and as many as before of every other level;
      so the answer changes. ``groups`` is the level.
    - ``change="kind"``: some objects pass to another level of the factor, and nothing else; the
      answer stays the same. ``wrong`` is then a number that is one off, and the metric all but
      coincides on clean and corrupted pictures: a control for whatever finds an effect.

    Both pictures have the same noise and shift. The batches are tuples (pictures
    ``[example, 3, 32, 32]``, numbers).

    Args:
        factor: ``"shape"``, ``"colour"`` or ``"column"``.
        change: What changes.
        by: Objects that change.
        pairs: Number of pairs.
        shapes: Shapes that occur.
        colours: Colours that occur.
        noise: Standard deviation of each pixel's noise.
        shift: Most pixels by which a picture is shifted, wrapping around.
        metric: One of `metrics.METRICS`.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If a choice has another name, or a number is out of range.

    Example:
        >>> made = Counting("colour", pairs=3).behavior()
        >>> made.clean[0].shape, (made.answers - made.wrong).abs().tolist()
        (torch.Size([3, 3, 32, 32]), [1, 1, 1])
    """

    factor: Factor = "shape"
    change: Change = "number"
    by: int = 1
    pairs: int = 64
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = COLOURS
    noise: float = 0.05
    shift: int = 2
    metric: Metric = "logit_difference"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check choices and numbers."""
        choices = {"factor": FACTORS, "change": get_args(Change)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError.of(
                    name, expected=f"one of {allowed}", got=repr(getattr(self, name)), do="Choose."
                )
        for name, known in (("shapes", SHAPES), ("colours", COLOURS)):
            given = getattr(self, name)
            if not given or not set(given) <= set(known):
                raise ArgumentError.of(name, expected=f"some of {known}", got=given, do="Choose.")
        if not 1 <= self.by <= GRID or self.pairs < 1:
            raise ArgumentError.of(
                "by",
                expected=f"1 to {GRID} objects that change, in at least one pair",
                got=f"by={self.by}, pairs={self.pairs}",
                do="Change it.",
            )
        levels = {"shape": self.shapes, "colour": self.colours, "column": range(GRID)}
        if self.change == "kind" and len(levels[self.factor]) < 2:
            raise ArgumentError.of(
                self.factor + "s", expected="two of them to change", got=1, do="Allow both."
            )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: pictures of one kind of object are counted as well.

        Returns:
            ``shape_insensitivity`` and ``colour_insensitivity``: accuracies within .1. They say
            that the answer does not depend on the kind, not that nothing inside does.
        """
        plain = dataclasses.replace(self, change="number")
        shapes = {name: dataclasses.replace(plain, shapes=(name,)) for name in SHAPES}
        colours = {name: dataclasses.replace(plain, colours=(name,)) for name in COLOURS}
        return (_alike("shape", shapes), _alike("colour", colours))

    def scenes(self) -> tuple[Scenes, Scenes]:
        """Return what is on the clean and on the corrupted pictures.

        Returns:
            Both, row by row; their `Scenes.counts` are what rival ways of counting disagree about.
        """
        clean, corrupted, _ = self._scenes(torch.Generator().manual_seed(self.seed))
        return clean, corrupted

    def behavior(self) -> Behavior:
        """Return the pictures.

        Returns:
            Clean and corrupted ones, with their numbers.
        """
        clean, corrupted, levels = self._scenes(torch.Generator().manual_seed(self.seed))
        answers, others = clean.totals, corrupted.totals
        off = torch.where(answers < CELLS, answers + 1, answers - 1)
        wrong = others if self.change == "number" else off
        rivals = torch.arange(CELLS + 1).expand(self.pairs, -1)
        rivals = rivals[rivals != answers[:, None]].reshape(self.pairs, CELLS)
        return Behavior(
            (self._images(clean), answers),
            (self._images(corrupted), others),
            metric_of(self.metric, answers, wrong),
            name="counting",
            answers=answers,
            wrong=wrong,
            groups=levels,
            texts=[(_told(a), _told(b)) for a, b in zip(*_kinds(clean, corrupted), strict=True)],
            margin=AnyOf(answers[:, None], rivals, "margin"),
            characteristics=self.characteristics(),
        )

    def _images(self, scenes: Scenes) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return scenes.images(generator, noise=self.noise, shift=self.shift)

    def _scenes(self, generator: torch.Generator) -> tuple[Scenes, Scenes, Tensor]:
        """Draw scenes, and change each of them where it can be changed."""
        known = {"shape": SHAPES, "colour": COLOURS, "column": tuple(range(GRID))}[self.factor]
        named = {"shape": self.shapes, "colour": self.colours}.get(self.factor, known)
        allowed = torch.tensor([list(known).index(name) for name in named])
        clean: list[Scenes] = []
        changed: list[Scenes] = []
        levels: list[int] = []
        while len(clean) < self.pairs:
            scene = Scenes.drawn(1, generator, shapes=self.shapes, colours=self.colours)
            level = int(allowed[torch.randint(len(allowed), (1,), generator=generator)])
            other = self._changed(scene, level, generator)
            if other is not None:
                clean.append(scene)
                changed.append(other)
                levels.append(level)
        return _joined(clean), _joined(changed), torch.tensor(levels)

    def _changed(self, scene: Scenes, level: int, generator: torch.Generator) -> Scenes | None:
        """Return the scene with ``by`` changes, or None where there is no room for them."""
        if self.change == "kind":
            return self._passed_on(scene, level, generator)
        own = scene.filled & (scene.level(self.factor) == level)
        room = ~scene.filled
        if self.factor == "column":
            room &= scene.level("column") == level
        add = bool(torch.randint(2, (1,), generator=generator))
        cells = _some(room if add else own, self.by, generator)
        if cells is None:
            return None
        new = Scenes.drawn(1, generator, least=CELLS, shapes=self.shapes, colours=self.colours)
        parts = {"shape": new.shape, "colour": new.colour}
        if self.factor in parts:
            parts[self.factor] = torch.full_like(new.shape, level)
        return Scenes(
            torch.where(cells, parts["shape"] if add else -1, scene.shape),
            torch.where(cells, parts["colour"] if add else -1, scene.colour),
        )

    def _passed_on(self, scene: Scenes, level: int, generator: torch.Generator) -> Scenes | None:
        cells = _some(scene.filled & (scene.level(self.factor) == level), self.by, generator)
        if cells is None:
            return None
        if self.factor != "column":
            return dataclasses.replace(
                scene,
                **{self.factor: torch.where(cells, 1 - level, scene.level(self.factor))},
            )
        free = ~scene.filled & (scene.level("column") != level)
        places = _some(free, self.by, generator)
        if places is None:
            return None
        shape, colour = scene.shape.clone(), scene.colour.clone()
        for part in (shape, colour):
            part[places] = part[cells]
            part[cells] = -1
        return Scenes(shape, colour)


def _alike(factor: str, variants: dict[str, Counting]) -> Characteristic:
    first, second = variants
    return Characteristic(
        f"{factor}_insensitivity",
        f"Objects are counted whatever their {factor}.",
        variants,
        (Expectation(first, "near", second, 0.1),),
    )


def _some(cells: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Return some of the cells, or None where there are too few."""
    index = cells.flatten().nonzero()[:, 0]
    if len(index) < count:
        return None
    chosen = torch.zeros(cells.numel(), dtype=torch.bool)
    chosen[index[torch.randperm(len(index), generator=generator)[:count]]] = True
    return chosen.reshape(cells.shape)


def _joined(scenes: list[Scenes]) -> Scenes:
    return Scenes(torch.cat([s.shape for s in scenes]), torch.cat([s.colour for s in scenes]))


def _kinds(*scenes: Scenes) -> list[list[list[int]]]:
    """Return for each picture the number of blue triangles, blue discs, and so on."""
    return [(2 * s.colour + s.shape).flatten(1).tolist() for s in scenes]


def _told(kinds: list[int]) -> str:
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    counts = [(kinds.count(i), name) for i, name in enumerate(names)]
    return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in counts if n) or "nothing"
