"""What should happen when a step is cut: `Removes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...nodes import Head
from ..causal.edges import coinciding
from ..characterisation.intervals import share_of
from .evidence import Line
from .subject import CUTS, Cut, Part, Subject

__all__ = ["Removes", "check_cut", "check_share"]

CONTROLS = 8
"""Random sets of other parts that are cut for comparison."""


@dataclass(frozen=True)
class Removes:
    """Cutting a step removes a share of the effect.

    (m(clean) − m(cut)) / (m(clean) − m(∅)), means over prompts, never clipped; ∅ is the corrupted
    run for ``cut="corrupted"``, else the run in which all heads (for a step of MLPs: all MLPs) are
    cut likewise. All parts that fit the step are cut at once, everywhere. The null is the largest
    share that as many parts remove which belong to no step, drawn eight times, from the same layers
    where these have enough; the value must lie above it, too. There is none where too few are left.

    Args:
        share: Smallest share.
        cut: What is put in the place of what a part writes: ``"mean"``, its mean over corrupted
            prompts and positions; ``"zero"``; or ``"corrupted"``, its value in the corrupted run.
        seed: Seed of the draws of other parts.

    Raises:
        ArgumentError: If the share is not in (0, 1], or the cut has another name.
    """

    share: float = 0.5
    cut: Cut = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check share and cut."""
        check_share(self.share)
        check_cut(self.cut)

    @property
    def key(self) -> str:
        """Short name."""
        return f"removes_{self.cut}"

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return f"cutting it ({self.cut}) removes {self.share:g} or more of the effect"

    def line(
        self, subject: Subject, step: str, parts: Sequence[Part], named: Sequence[Part] = ()
    ) -> Line:
        """Return what was found.

        Args:
            subject: Model and prompts.
            step: Name of the step.
            parts: The parts that fit it.
            named: Parts of other steps, which are no null.

        Returns:
            A line of evidence.
        """
        reason = subject.reason if parts else "no part of the model fits the step"
        if reason is not None:
            return self._line(step, parts, reason=reason)
        kinds = ["head" if isinstance(parts[0], Head) else "mlp"]
        clean, nothing = subject.ends[0], subject.nothing(self.cut, kinds)
        reason = coinciding(float(clean.mean()), float(nothing.mean()))
        if reason is not None:
            text = "the metric does not change when all such parts are cut"
            return self._line(step, parts, reason=text)
        found = share_of(clean - subject.without(parts, self.cut), clean - nothing, seed=self.seed)
        others = [
            share_of(clean - subject.without(other, self.cut), clean - nothing).value
            for other in _others(subject, parts, named, self.seed)
        ]
        null = max(others, default=math.nan)
        return self._line(step, parts, found.value, (found.low, found.high), null)

    def _line(
        self,
        step: str,
        parts: Sequence[Part],
        value: float = math.nan,
        ends: tuple[float, float] = (math.nan, math.nan),
        null: float = math.nan,
        reason: str | None = None,
    ) -> Line:
        return Line(
            "existence (posterior)",
            step,
            self.key,
            self.claim(),
            value,
            self.share,
            *ends,
            null,
            value >= self.share and not value <= null,
            tuple(map(str, parts)),
            "share",
            reason,
        )


def _others(
    subject: Subject, parts: Sequence[Part], named: Sequence[Part], seed: int
) -> list[list[Part]]:
    """Return sets of as many parts of no step, from the same layers where there are enough."""
    every: tuple[Part, ...] = subject.heads if isinstance(parts[0], Head) else subject.mlps
    rest = [p for p in every if p not in parts and p not in named]
    layers = {p.layer for p in parts}
    near = [p for p in rest if p.layer in layers]
    pool = near if len(near) >= len(parts) else rest
    if len(pool) < len(parts):
        return []
    generator = torch.Generator().manual_seed(seed)
    sets = {tuple(_drawn(len(pool), len(parts), generator).tolist()) for _ in range(CONTROLS)}
    return [[pool[i] for i in chosen] for chosen in sorted(sets)]


def _drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:count].sort().values


def check_share(share: float, argument: str = "share", example: str = "0.5") -> None:
    """Refuse a share that is none.

    Args:
        share: The smallest share that is stated.
        argument: How the argument is called.
        example: A share that makes sense.

    Raises:
        ArgumentError: If it is not in (0, 1].
    """
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ArgumentError.of(
            argument, expected="above 0, at most 1", got=share, do=f"Take for example {example}."
        )


def check_cut(cut: str) -> None:
    """Refuse a cut that there is not.

    Args:
        cut: Its name.

    Raises:
        ArgumentError: If it is unknown.
    """
    if cut not in CUTS:
        raise ArgumentError.of("cut", expected=f"one of {CUTS}", got=repr(cut), do="Choose one.")
