"""By what does a model count? Rival decompositions, decided by interchange after aggregation."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...behavior import BehaviorLike, as_behavior
from ...behaviors import Counting
from ...behaviors.scenes import GRID, Scenes
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...task import Task
from ..causal import Estimate
from ..causal.edges import coinciding
from ..causal.proportions import accuracy
from ..characterisation.characterising import asked_of, characterise_as
from .evidence import Evidence, Line, Verdict
from .features import feature_line
from .interchange import Code, Spot, last_linear, untrained_copy
from .partitions import CELLS, PARTITIONS, Partition, only

__all__ = ["CountingDecompositions", "Rival"]

Rival = Literal["shape", "colour", "column", "cells"]
NAMES = {
    "shape": "by shape",
    "colour": "by colour",
    "column": "by column",
    "cells": "cell-wise additive",
}
NONE = "none of these"
FEWEST = 16
"""Fewest pairs from which anything is concluded."""


@dataclass(frozen=True)
class CountingDecompositions:
    """By shape, by colour, by column, cell by cell, or by none of these?

    All give the same number, so right answers decide nothing. Each rival says which partial counts
    stand apart at one site *after aggregation*: swap one of them (only its subspace, of a rank that
    is fixed in advance) from another picture, and the model must answer with the number that this
    swap makes. Swapping *tokens* of a column before aggregation proves nothing: it works as well
    for any other cells.

    *By shape, colour, column.* On training scenes one finds by least squares where each partial
    count stands (`Code`). On held-out pairs where the rivals disagree (the number stated is neither
    the base's nor the source's, nor an equal share of their difference, nor what another rival
    states) one level's part is taken from the source. The *interchange accuracy* is the share of
    pairs with exactly the number stated. Null: the same with random partitions of the same sizes
    (for shape and colour also blue triangles and green discs against the others), each with a code
    of its own; and the same with an untrained model.

    *Cell-wise additive.* Only the total stands there, and what any cells add does not depend on
    the others: the total's part is moved by h(those cells of the source alone) − h(those of the
    base alone), for random halves of the cells. Null: random subspaces, and the untrained model.

    A rival *holds* if its interchange accuracy is at least ``at_least`` and its whole interval lies
    above all nulls. The decision is the partition that holds (*finest first*: cell-wise additive
    wins only if no partition does, since what is counted apart adds up as well), or *none of
    these*, which is a valid verdict. A code that is not linear in the powers of a count is missed.

    Args:
        site: Module whose output is looked at; None takes what enters the last linear map.
        position: Which position of it, where it has several.
        rank: Dimensions for each partial count.
        claim: The rival that is claimed; None asks for whichever holds.
        at_least: Smallest interchange accuracy.
        scenes: Number of scenes from which codes are found.
        pairs: Number of held-out pairs for each rival.
        draws: Number of random partitions, and of random subspaces.
        seed: Seed of all that is drawn.
        name: How it is called.

    Raises:
        ArgumentError: If the claim has another name, or a number is out of range.
    """

    site: str | None = None
    position: int | None = None
    rank: int = 1
    claim: Rival | None = None
    at_least: float = 0.5
    scenes: int = 512
    pairs: int = 128
    draws: int = 8
    seed: int = 0
    name: str = "ways of counting"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.claim is not None and self.claim not in get_args(Rival):
            raise ArgumentError.of(
                "claim", expected=f"one of {get_args(Rival)}", got=repr(self.claim), do="Choose."
            )
        if not 0 < self.at_least <= 1:
            raise ArgumentError.of(
                "at_least", expected="above 0, at most 1", got=self.at_least, do="Take 0.5."
            )
        least = {"rank": 1, "scenes": 64, "pairs": FEWEST, "draws": 1}
        for field, lowest in least.items():
            if getattr(self, field) < lowest:
                raise ArgumentError.of(
                    field,
                    expected=f"at least {lowest}",
                    got=getattr(self, field),
                    do="Take more.",
                )

    def test(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        *,
        untrained: nn.Module | None = None,
        task: Task | None = None,
    ) -> Evidence:
        """Decide between the rivals.

        Args:
            model: A model of pictures; it is left as it was.
            behavior: `lightning_mi.behaviors.Counting`, whose shapes, colours, noise and shift the
                drawn scenes have.
            untrained: The model before training; None takes a copy with weights drawn anew.
            task: How the model is called; None calls it with the pictures.

        Returns:
            The evidence. ``decision`` says which rival holds; the verdict is ``"supported"`` if it
            is one (the claimed one, if one was), ``"partly"`` if it is one of several, else
            ``"not"``.
        """
        with untouched(model) as plain, frozen(plain):
            return self.gather(plain, behavior, Context(plain, task=task), untrained)

    def gather(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        context: Context,
        untrained: nn.Module | None = None,
    ) -> Evidence:
        """Gather evidence inside a measurement.

        Args:
            model: The module inside any wrapper, in evaluation mode.
            behavior: `lightning_mi.behaviors.Counting`.
            context: Task and shared results.
            untrained: The model before training.

        Returns:
            The evidence.

        Raises:
            ArgumentError: If the behavior is another one.
        """
        if not isinstance(behavior, Counting):
            raise ArgumentError.of(
                "behavior",
                expected="lightning_mi.behaviors.Counting, from which scenes can be drawn",
                got=type(behavior).__name__,
                do="Pass the description, not the prompts made of it.",
            )
        task = context.known_task or Task()
        blank = untrained_copy(model, self.seed) if untrained is None else untrained
        trial = _Trial(self, behavior, self._spot(model, task))
        with untouched(blank) as other:
            null = _Trial(self, behavior, self._spot(other, task))
            found = {name: _compared(name, trial, null) for name in NAMES}
        lines = [*trial.prior(), *found.values(), trial.whole(), trial.total()]
        features = characterise_as(as_behavior(behavior), "model", asked_of(model, task))
        lines += [feature_line(one, one.name, claimed=False) for one in features]
        reason = _silent(behavior, model, task)
        decision = _decision(lines)
        about = dataclasses.asdict(self) | {
            "site": f"{trial.spot.end} of {trial.spot.module}",
            "untrained": "given" if untrained is not None else "a copy with weights drawn anew",
            "interval": "95 %, Wilson",
        }
        about.pop("name")
        return Evidence(
            self.name,
            as_behavior(behavior).name,
            tuple(lines),
            reason=reason,
            decision=decision,
            settled=self._verdict(decision),
            convention=about,
        )

    def _spot(self, model: nn.Module, task: Task) -> Spot:
        network = task.network(model)
        if self.site is None:
            return Spot(model, task, _within(model, network, last_linear(network)), "input", None)
        known = dict(model.named_modules())
        if self.site not in known:
            raise ArgumentError.of(
                "site",
                expected=f"the name of a module, such as {[n for n in known if n][:8]}",
                got=repr(self.site),
                do="See model.named_modules().",
            )
        return Spot(model, task, self.site, "output", self.position)

    def _verdict(self, decision: str) -> Verdict:
        holding = decision.split(" and ")
        if decision == NONE:
            return "not"
        if self.claim is not None and NAMES[self.claim] not in holding:
            return "not"
        return "supported" if len(holding) == 1 else "partly"


@dataclass(eq=False)
class _Trial:
    """One model, its scenes, and interchange accuracies."""

    stated: CountingDecompositions
    behavior: Counting
    spot: Spot

    def __post_init__(self) -> None:
        seed = self.stated.seed
        self.training = self.drawn(self.stated.scenes, seed)
        self.vectors = self.spot.read(self.pictures(self.training, seed))
        # Enough for pairs where rivals disagree.
        count = 12 * self.stated.pairs
        self.base, self.source = (self.drawn(count, seed + i) for i in (1, 2))
        self.usable = bool(self.vectors.isfinite().all())

    def drawn(self, count: int, seed: int) -> Scenes:
        own = self.behavior
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + own.seed)
        return Scenes.drawn(count, generator, shapes=own.shapes, colours=own.colours)

    def pictures(self, scenes: Scenes, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        own = self.behavior
        return scenes.images(generator, noise=own.noise, shift=own.shift)

    # ------------------------------------------------------------ interchange

    def partition(self, partition: Partition) -> Estimate:
        """Return the interchange accuracy of one partition, with a code of its own."""
        rank, seed = self.stated.rank, self.stated.seed
        if not self.usable or partition.levels < 2:
            return Estimate(math.nan)
        code = Code.fitted(self.vectors, partition.counts(self.training), rank)
        chosen, level, stated = self._pairs(partition)
        if len(chosen) < FEWEST:
            return Estimate(math.nan)
        base, source = self.base.select(chosen), self.source.select(chosen)
        pictures = self.pictures(base, seed + 1)
        h, other = (self.spot.read(p) for p in (pictures, self.pictures(source, seed + 2)))
        return self._right(pictures, code.moved(h, other - h, level), stated)

    def cells(self, draw: int | None = None) -> Estimate:
        """Return the interchange accuracy of single cells' sums; with ``draw`` at random."""
        if not self.usable:
            return Estimate(math.nan)
        code = self.total_code
        if draw is not None:
            code = Code.drawn(code, torch.Generator().manual_seed(self.stated.seed + draw))
        pictures, h, added, stated = self.halves
        level = torch.zeros(len(stated), dtype=torch.long)
        return self._right(pictures, code.moved(h, added, level), stated)

    @functools.cached_property
    def total_code(self) -> Code:
        """Where the total stands."""
        return Code.fitted(self.vectors, self.training.totals[:, None], self.stated.rank)

    @functools.cached_property
    def halves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, what stands at the site, what others' halves would add, the number stated."""
        seed = self.stated.seed
        generator = torch.Generator().manual_seed(seed + 3)
        order = torch.rand(len(self.base), CELLS, generator=generator).argsort(1)
        half = (order < CELLS // 2).reshape(-1, GRID, GRID)
        stated = self.base.totals + (half & self.source.filled).sum((1, 2))
        stated = stated - (half & self.base.filled).sum((1, 2))
        chosen = self._apart(stated, 2).nonzero()[: self.stated.pairs, 0]
        base, source, half = self.base.select(chosen), self.source.select(chosen), half[chosen]
        pictures = self.pictures(base, seed + 1)
        parts = [self.pictures(only(s, half), seed + 1) for s in (source, base)]
        h, new, old = (self.spot.read(p) for p in (pictures, *parts))
        return pictures, h, new - old, stated[chosen]

    @functools.cached_property
    def unequal(self) -> tuple[Scenes, Scenes]:
        """Pairs of scenes that do not hold the same number of objects."""
        index = (self.base.totals != self.source.totals).nonzero()[: self.stated.pairs, 0]
        return self.base.select(index), self.source.select(index)

    def _pairs(self, partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs where rivals disagree, the level that is swapped, and the number stated."""
        generator = torch.Generator().manual_seed(self.stated.seed + 4)
        level = torch.randint(partition.levels, (len(self.base),), generator=generator)
        stated = self._swapped(partition, level)
        apart = self._apart(stated, partition.levels)
        for name in PARTITIONS:
            rival = Partition.of(name)
            if name not in partition.name:
                apart &= stated != self._swapped(rival, level % rival.levels)
        chosen = apart.nonzero()[: self.stated.pairs, 0]
        return chosen, level[chosen], stated[chosen]

    def _swapped(self, partition: Partition, level: Tensor) -> Tensor:
        rows = torch.arange(len(level))
        old, new = (partition.counts(s)[rows, level] for s in (self.base, self.source))
        return self.base.totals - old + new

    def _apart(self, stated: Tensor, levels: int) -> Tensor:
        """Return where a number is possible, and neither picture's nor an equal share's."""
        base, source = self.base.totals, self.source.totals
        share = base + (source - base) / levels
        apart = (stated != base) & (stated != source) & ((stated - share).abs() > 0.5)
        return apart & (stated >= 0) & (stated <= CELLS)

    def _right(self, pictures: Tensor, vectors: Tensor, stated: Tensor) -> Estimate:
        return accuracy((self.spot.run(pictures, vectors) == stated).float())

    # ------------------------------------------------------------ lines

    def prior(self) -> list[Line]:
        """Return whether the site comes after aggregation, and whether the model counts at all."""
        none = torch.full((CELLS + 1, GRID, GRID), -1)
        shape, colour = none.clone(), none.clone()
        cells = torch.arange(CELLS)
        for part in (shape, colour):
            part[cells + 1, cells // GRID, cells % GRID] = 0
        h = self.spot.read(Scenes(shape, colour).images())
        moved = (h[1:] - h[0]).norm(dim=1)
        seen = int((moved > 1e-6 * h.norm(dim=1).max().clamp(min=1e-30)).sum())
        site = f"{self.spot.end} of {self.spot.module}"
        size = self.stated.pairs
        base = self.base.select(torch.arange(size))
        numbers = self.spot.run(self.pictures(base, self.stated.seed + 1))
        right = accuracy((numbers == base.totals).float())
        return [
            Line(
                "existence (prior)",
                "site",
                "cells",
                f"every cell is seen at the {site}: it comes after aggregation",
                float(seen),
                float(CELLS),
                holds=seen == CELLS,
                unit="cells",
            ),
            Line(
                "existence (prior)",
                "model",
                "accuracy",
                f"the model counts: right on {self.stated.at_least:g} of the pictures or more",
                right.value,
                self.stated.at_least,
                right.low,
                right.high,
                1 / (CELLS + 1),
                holds=right.value >= self.stated.at_least,
                unit="share",
            ),
        ]

    def whole(self) -> Line:
        """Return whether the answer depends on the site alone: everything there is swapped."""
        base, source = self.unequal
        seed = self.stated.seed
        h = self.spot.read(self.pictures(source, seed + 2))
        found = self._right(self.pictures(base, seed + 1), h, source.totals)
        return Line(
            "connection",
            "site to answer",
            "swap",
            "swapping all that stands there gives the other picture's number",
            found.value,
            self.stated.at_least,
            found.low,
            found.high,
            1 / (CELLS + 1),
            holds=found.value >= self.stated.at_least,
            unit="share",
        )

    def total(self) -> Line:
        """Return whether the total stands in a subspace of the given rank: told without a claim."""
        found = Estimate(math.nan)
        base, source = self.unequal
        seed, none = self.stated.seed, torch.zeros(len(base), dtype=torch.long)
        if self.usable:
            pictures = self.pictures(base, seed + 1)
            h, other = (self.spot.read(p) for p in (pictures, self.pictures(source, seed + 2)))
            found = self._right(pictures, self.total_code.moved(h, other - h, none), source.totals)
        return Line(
            "characterisation",
            "site",
            "total",
            f"swapping the total's part alone (rank {self.stated.rank}) gives the other's number",
            found.value,
            low=found.low,
            high=found.high,
            null=1 / (CELLS + 1),
            unit="share",
            reason="vectors are not finite" if math.isnan(found.value) else None,
        )


def _compared(name: str, trial: _Trial, untrained: _Trial) -> Line:
    """Return the line of one rival: its interchange accuracy against its nulls."""
    stated = trial.stated
    if name == "cells":
        found, blank = trial.cells(), untrained.cells()
        nulls = [trial.cells(draw).value for draw in range(stated.draws)]
        claim = "what random halves of the cells add, moved within the total's subspace, is stated"
    else:
        own = Partition.of(name)
        found, blank = trial.partition(own), untrained.partition(own)
        generator = torch.Generator().manual_seed(stated.seed + 5)
        others = [own.shuffled(generator) for _ in range(stated.draws)]
        others += [] if name == "column" else [Partition.of("mixed")]
        nulls = [trial.partition(other).value for other in others]
        claim = f"swapping the count of one {name} gives the number stated"
    by_luck = max((v for v in nulls if not math.isnan(v)), default=math.nan)
    null = max(v for v in (by_luck, blank.value, 0.0) if not math.isnan(v))
    # NaN compares as False.
    holds = found.value >= stated.at_least and found.low > null
    about = (f"random {by_luck:.2f}", f"untrained {blank.value:.2f}")
    reason = None
    if math.isnan(found.value):
        reason = f"fewer than {FEWEST} pairs on which the rivals disagree, or vectors not finite"
    return Line(
        "existence (posterior)",
        NAMES[name],
        "interchange",
        claim,
        found.value,
        stated.at_least,
        found.low,
        found.high,
        null,
        holds,
        about,
        "share",
        reason,
    )


def _decision(lines: list[Line]) -> str:
    """Return what holds, the finest first."""
    if any(line.holds is False for line in lines if line.heading == "existence (prior)"):
        return NONE
    holding = [line.step for line in lines if line.key == "interchange" and line.holds]
    finer = [name for name in holding if name != NAMES["cells"]]
    return " and ".join(finer or holding) or NONE


def _silent(behavior: Counting, model: nn.Module, task: Task) -> str | None:
    """Return why the metric says nothing, where more objects should have changed it."""
    if behavior.change != "number":
        return None
    own = behavior.behavior().to(next((p.device for p in model.parameters()), torch.device("cpu")))
    with torch.no_grad():
        ends = [own.metric(task.outputs(model, b)) for b in (own.clean, own.corrupted)]
    if not bool(torch.stack(ends).isfinite().all()):
        return "the metric is not finite on all pictures"
    return coinciding(float(ends[0].mean()), float(ends[1].mean()), "a part")


def _within(model: nn.Module, network: nn.Module, name: str) -> str:
    """Return the name that a network's module has in the whole model."""
    wanted = network.get_submodule(name)
    names: dict[int, str] = {id(module): n for n, module in model.named_modules()}
    return names[id(wanted)]
