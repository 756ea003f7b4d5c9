"""How a step should hang together with an earlier one: `Composes`, `Overlaps`, `Carries`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ...errors import ArgumentError, LightningMIError
from ...nodes import Head
from ..causal.edges import coinciding
from ..characterisation.intervals import share_of
from ..weights import composition, composition_z, subspaces
from .cuts import check_cut, check_share
from .evidence import Line
from .subject import Cut, Subject

__all__ = ["Carries", "Composes", "Connection", "Overlaps"]

Reads: TypeAlias = Literal["Q", "K", "V"]
READS = ("Q", "K", "V")
NO_PAIR = "no head that fits the earlier step lies before one that fits this one"


@runtime_checkable
class Connection(Protocol):
    """How a step hangs together with an earlier one."""

    @property
    def step(self) -> str:
        """Name of the earlier step."""

    def line(
        self, subject: Subject, step: str, earlier: Sequence[Head], later: Sequence[Head]
    ) -> Line:
        """Return what was found.

        Args:
            subject: Model and prompts.
            step: Name of the later step.
            earlier: Heads that fit the earlier step.
            later: Heads that fit the later one.
        """


@dataclass(frozen=True)
class Composes:
    """A head reads what one of an earlier step writes, by its weights.

    The composition of the strongest pair, in standard deviations above that of randomly rotated
    heads (`lightning_mi.circuits.composition_z`). Whoever looks at n pairs finds larger values by
    luck: ``z`` is raised to the deviation that the largest of n normal draws exceeds as rarely.

    Args:
        step: Name of the earlier step.
        reads: By its ``"Q"``, ``"K"`` or ``"V"`` input.
        z: Smallest deviation for a single pair.

    Raises:
        ArgumentError: If the input has another name, or z is not positive.
    """

    step: str
    reads: Reads = "K"
    z: float = 3.0

    def __post_init__(self) -> None:
        """Check input and z."""
        _check_reads(self.reads)
        if not self.z > 0:
            raise ArgumentError.of("z", expected="a positive number", got=self.z, do="Take 3.")

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return f"reads by {self.reads} what {self.step!r} writes ({self.z:g} sd above chance)"

    def line(
        self, subject: Subject, step: str, earlier: Sequence[Head], later: Sequence[Head]
    ) -> Line:
        """Return what was found.

        Args:
            subject: Model and prompts.
            step: Name of the later step.
            earlier: Heads that fit the earlier step.
            later: Heads that fit the later one.

        Returns:
            A line of evidence.
        """
        key = f"composes_{self.reads.lower()}_{self.step.replace(' ', '_')}"
        pairs = _pairs(earlier, later)

        def measure() -> tuple[float, float, tuple[str, ...]]:
            with torch.no_grad():
                found = composition_z(subject.anatomy, self.reads)
                raw = composition(subject.anatomy, self.reads, corrected=False)
            best, at = _strongest(found, pairs)
            null = _corrected(self.z, len(pairs))
            names = _named(pairs[at], f"{float(raw[_index(pairs[at])]):.3f}")
            return best, null, names

        return _line(step, key, self.claim(), pairs, measure, self.z, "sd", above_null=True)


@dataclass(frozen=True)
class Overlaps:
    """A head reads the subspace that one of an earlier step writes.

    The share of the writer's energy inside the reader's space, less k/d_model, of the strongest
    pair (`lightning_mi.circuits.subspace_overlap`, weighted).

    Args:
        step: Name of the earlier step.
        reads: By its ``"Q"``, ``"K"`` or ``"V"`` input.
        margin: Smallest excess above k/d_model.

    Raises:
        ArgumentError: If the input has another name, or the margin is not in (0, 1].
    """

    step: str
    reads: Reads = "K"
    margin: float = 0.1

    def __post_init__(self) -> None:
        """Check input and margin."""
        _check_reads(self.reads)
        check_share(self.margin, "margin", "0.1")

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return (
            f"its {self.reads} space holds what {self.step!r} writes, {self.margin:g} above chance"
        )

    def line(
        self, subject: Subject, step: str, earlier: Sequence[Head], later: Sequence[Head]
    ) -> Line:
        """Return what was found.

        Args:
            subject: Model and prompts.
            step: Name of the later step.
            earlier: Heads that fit the earlier step.
            later: Heads that fit the later one.

        Returns:
            A line of evidence.
        """
        key = f"overlaps_{self.reads.lower()}_{self.step.replace(' ', '_')}"
        pairs = _pairs(earlier, later)

        def measure() -> tuple[float, float, tuple[str, ...]]:
            with torch.no_grad():
                spaces = subspaces(subject.anatomy, self.reads)
                found = spaces.overlap(weighted=True)
            best, at = _strongest(found, pairs)
            return best, spaces.k / subject.anatomy.d_model, _named(pairs[at], f"k = {spaces.k}")

        return _line(step, key, self.claim(), pairs, measure, self.margin, "share")


@dataclass(frozen=True)
class Carries:
    """Cutting only the edges from an earlier step to this one removes a share of the effect.

    All heads of the earlier step to the given input of all heads of this one; every other edge
    carries what it carries. (m(clean) − m(without them)) / (m(clean) − m(without any edge)). Under
    grouped queries a key or value input serves all heads of its group, and is cut for all of them.

    Args:
        step: Name of the earlier step.
        reads: Into its ``"Q"``, ``"K"`` or ``"V"`` input.
        share: Smallest share.
        cut: What the edges carry instead; see `lightning_mi.circuits.Circuit.run`. The corrupted
            run's value says only what the corruption changes there.

    Raises:
        ArgumentError: If the input or the cut has another name, or the share is not in (0, 1].
    """

    step: str
    reads: Reads = "K"
    share: float = 0.3
    cut: Cut = "zero"

    def __post_init__(self) -> None:
        """Check input, share and cut."""
        _check_reads(self.reads)
        check_share(self.share)
        check_cut(self.cut)

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return (
            f"cutting its {self.reads} edges from {self.step!r} ({self.cut}) removes "
            f"{self.share:g} or more"
        )

    def line(
        self, subject: Subject, step: str, earlier: Sequence[Head], later: Sequence[Head]
    ) -> Line:
        """Return what was found.

        Args:
            subject: Model and prompts.
            step: Name of the later step.
            earlier: Heads that fit the earlier step.
            later: Heads that fit the later one.

        Returns:
            A line of evidence.
        """
        key = f"carries_{self.reads.lower()}_{self.step.replace(' ', '_')}"
        pairs = _pairs(earlier, later)
        names = tuple(f"{w}->{r}.{self.reads.lower()}" for w, r in pairs)
        reason = subject.reason if pairs else NO_PAIR
        clean = removed = nothing = torch.zeros(0)
        if reason is None:
            try:
                clean, removed, nothing = subject.unlinked(pairs, self.reads.lower(), self.cut)
                reason = coinciding(float(clean.mean()), float(nothing.mean()))
            except LightningMIError as error:
                reason = str(error)
        value, ends = math.nan, (math.nan, math.nan)
        if reason is None:
            found = share_of(clean - removed, clean - nothing)
            value, ends = found.value, (found.low, found.high)
        return Line(
            "connection",
            step,
            key,
            self.claim(),
            value,
            self.share,
            *ends,
            0.0,
            value >= self.share,
            names,
            "share",
            reason,
        )


def _pairs(earlier: Sequence[Head], later: Sequence[Head]) -> tuple[tuple[Head, Head], ...]:
    return tuple((w, r) for w in earlier for r in later if w.layer < r.layer)


def _index(pair: tuple[Head, Head]) -> tuple[int, int, int, int]:
    writer, reader = pair
    return writer.layer, writer.head, reader.layer, reader.head


def _strongest(values: Tensor, pairs: Sequence[tuple[Head, Head]]) -> tuple[float, int]:
    own = torch.stack([values[_index(pair)] for pair in pairs]).double().cpu()
    at = int(own.nan_to_num(-math.inf).argmax())
    return float(own[at]), at


def _named(pair: tuple[Head, Head], about: str) -> tuple[str, ...]:
    return (f"{pair[0]}->{pair[1]}, {about}",)


def _corrected(z: float, pairs: int) -> float:
    """Return the z that the largest of some normal draws exceeds as rarely as one exceeds ``z``."""
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-z) / max(1, pairs))


def _line(
    step: str,
    key: str,
    claim: str,
    pairs: Sequence[tuple[Head, Head]],
    measure: Callable[[], tuple[float, float, tuple[str, ...]]],
    margin: float,
    unit: str,
    *,
    above_null: bool = False,
) -> Line:
    value, null, names = math.nan, math.nan, tuple[str, ...]()
    reason = None if pairs else NO_PAIR
    if pairs:
        value, null, names = measure()
        reason = "the heads have no weights to be read" if math.isnan(value) else None
    # A null of deviations is itself where the claim begins; one of shares is taken off.
    holds = value >= null if above_null else value - null >= margin
    at_least = null if above_null else null + margin
    return Line(
        "connection",
        step,
        key,
        claim,
        value,
        at_least if pairs else margin,
        null=0.0 if above_null and pairs else null,
        holds=bool(holds),
        components=names,
        unit=unit,
        reason=reason,
    )


def _check_reads(reads: str) -> None:
    if reads not in READS:
        raise ArgumentError.of(
            "reads", expected=f"one of {READS}", got=repr(reads), do="Choose one."
        )
