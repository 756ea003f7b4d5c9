"""When a score rose during training, and whether that may be claimed: `onset`, `head_onsets`.

The rule is deliberately strict. A rise is claimed only where the curve ends above its null *and*
above where it began by a stated margin, and has stopped rising; the moment is the first crossing of
a tenth of the rise that lasts. A curve that still rises is *forming*, never *none*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError
from .record import Record
from .runs import Run

__all__ = ["HeadOnset", "Onset", "State", "head_onsets", "onset", "one_source"]

State = Literal["too early", "none", "forming", "formed"]

ENOUGH = 8
"""Fewer measurements than this are too early to tell."""

FRACTION = 0.1
"""The onset is the crossing of this fraction of the rise."""

STILL_RISING = 0.2
"""No plateau where more than this fraction of the rise came in the last fifth of the curve."""

NULLS = ("{}_null", "{}_matched", "{}_matched_null", "{}_null_matched")
"""Names under which the chance levels of a score are recorded."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Onset:
    """What can be said about the rise of one curve.

    Args:
        state: ``"too early"`` (fewer than 8 measurements), ``"none"``, ``"forming"`` (it rises, but
            has no plateau) or ``"formed"``.
        step: First measured step of the sustained crossing; None unless formed.
        interval: The measured step before it and the step itself; None unless formed.
        tokens: Training tokens seen at ``step``, where known.
        start: Score at the first measured step; NaN where nothing was measured.
        final: Median of the last points.
        null: Highest chance level at the end, or None if none was given.
        threshold: The level whose crossing counts, a tenth of the rise above ``start``.
        measurements: Number of defined values.
    """

    state: State
    step: int | None = None
    interval: tuple[int, int] | None = None
    tokens: int | None = None
    start: float = float("nan")
    final: float = float("nan")
    null: float | None = None
    threshold: float = float("nan")
    measurements: int = 0

    @property
    def times_chance(self) -> float | None:
        """The final score in multiples of its null, or None where there is no positive null."""
        return self.final / self.null if self.null else None

    def describe(self) -> str:
        """Return the finding in words, without the name of what rose.

        Returns:
            One line.

        Example:
            >>> onset([0, 1], [0.1, 0.2]).describe()
            'too early to tell: 2 measurements, 8 are needed'
        """
        chance = "" if self.null is None else f" (chance {self.null:.2g})"
        span = f"from {self.start:.2f} to {self.final:.2f}{chance}"
        if self.state == "too early":
            return f"too early to tell: {self.measurements} measurements, {ENOUGH} are needed"
        if self.state == "none":
            return f"none: {span}"
        if self.state == "forming" or self.interval is None or self.step is None:
            times = self.times_chance
            much = f"{times:.0f} times chance, " if times is not None and times >= 2 else ""
            return f"forming: {much}{span}; no plateau, so no onset is claimed"
        return f"formed at step {self.step:,} (after {self.interval[0]:,}): {span}"


def onset(
    steps: Sequence[float] | Numbers,
    scores: Sequence[float] | Numbers,
    *,
    null: float | Sequence[float] | Numbers | None = None,
    tokens: Sequence[int | None] | None = None,
    margin: float = 0.1,
    sustained: int = 3,
) -> Onset:
    """Find when a curve rose, if it may be claimed that it did.

    With ``s0`` the first score, ``f`` the median of the last tenth (at least three points) and
    ``c`` the null at the end: *formed* needs ``f - s0 >= margin``, ``f - c >= margin`` and a
    plateau, that is, at most a fifth of ``f - s0`` gained over the last fifth of the points. The
    onset is then the first step from which ``sustained`` measured scores in a row lie above
    ``s0 + (f - s0) / 10``. *Forming* is a rise that misses the plateau, or one that still misses
    the margin but is clear of the curve's own noise.

    Args:
        steps: Measured steps, increasing.
        scores: One score for each; NaN where it is undefined, which counts as not measured.
        null: Chance level, one number or one for each step.
        tokens: Training tokens seen at each step.
        margin: How far the final score must clear the null and the first score, in its own unit.
        sustained: How many measured scores in a row must lie above the threshold.

    Returns:
        The finding.

    Raises:
        ArgumentError: If the lengths differ.

    Example:
        >>> found = onset(range(10), [0, 0, 0, 0.5, 0.9, 1, 1, 1, 1, 1])
        >>> found.state, found.step, found.interval
        ('formed', 3, (2, 3))
    """
    at, values = np.asarray(steps, float), np.asarray(scores, float)
    if at.shape != values.shape or at.ndim != 1:
        raise ArgumentError.of(
            "scores",
            expected=f"one number for each of {len(at)} steps",
            got=f"shape {values.shape}",
            do="Pass one curve; head_onsets takes all heads.",
        )
    defined = np.isfinite(values)
    chance = _last_null(null, defined)
    known = None if tokens is None else [t for t, ok in zip(tokens, defined, strict=True) if ok]
    at, values = at[defined], values[defined]
    if not len(values):
        return Onset("too early", null=chance)
    start, final = float(values[0]), _median_of_last(values)
    threshold = start + FRACTION * (final - start)
    found = Onset("too early", None, None, None, start, final, chance, threshold, len(values))
    if len(values) < ENOUGH:
        return found
    state = _state(values, final, chance, margin)
    crossing = _crossing(values, threshold, sustained) if state == "formed" else None
    if state != "formed" or crossing is None:
        return replace(found, state="forming" if state == "formed" else state)
    return replace(
        found,
        state="formed",
        step=int(at[crossing]),
        interval=(int(at[max(crossing - 1, 0)]), int(at[crossing])),
        tokens=known[crossing] if known else None,
    )


def _last_null(
    null: float | Sequence[float] | Numbers | None, defined: NDArray[np.bool_]
) -> float | None:
    """Return the chance level at the end, or None where none is defined."""
    if null is None:
        return None
    level = np.broadcast_to(np.asarray(null, float), defined.shape)[defined]
    level = level[np.isfinite(level)]
    return _median_of_last(level) if len(level) else None


def _median_of_last(values: Numbers) -> float:
    return float(np.median(values[-max(3, len(values) // 10) :]))


def _state(values: Numbers, final: float, chance: float | None, margin: float) -> State:
    start = float(values[0])
    base = start if chance is None else max(start, chance)
    plateau = _late_gain(values) <= STILL_RISING * abs(final - start)
    if final - base >= margin:
        return "formed" if plateau else "forming"
    clear = max(0.2 * margin, 4 * _noise(values))
    return "forming" if final - base >= clear and not plateau else "none"


def _late_gain(values: Numbers) -> float:
    """Rise over the last fifth: the end against the points just before that fifth."""
    tail, width = max(3, len(values) // 5), max(3, len(values) // 10)
    before = values[: len(values) - tail][-width:]
    return _median_of_last(values) - float(np.median(before))


def _noise(values: Numbers) -> float:
    """Scatter of single points about a smooth curve, robustly, from first differences."""
    jumps = np.diff(values)
    return float(1.4826 * np.median(np.abs(jumps - np.median(jumps))) / np.sqrt(2))


def _crossing(values: Numbers, threshold: float, sustained: int) -> int | None:
    """Index of the first point that, with those after it, lies above the threshold."""
    for first in range(len(values)):
        if np.all(values[first : first + sustained] > threshold):
            return first
    return None


@dataclass(frozen=True)
class HeadOnset:
    """The onset of one score of one head.

    Args:
        layer: Layer, from 0.
        head: Head in the layer, from 0.
        score: Name of the score, for example ``"induction"``.
        onset: The finding.
    """

    layer: int
    head: int
    score: str
    onset: Onset

    @property
    def label(self) -> str:
        """The head's usual short name.

        Example:
            >>> HeadOnset(1, 3, "induction", Onset("none")).label
            'L1H3'
        """
        return f"L{self.layer}H{self.head}"


def head_onsets(
    run: Run | Iterable[Record],
    score: str = "induction",
    *,
    measurement: str = "head_scores",
    margin: float = 0.1,
    sustained: int = 3,
) -> list[HeadOnset]:
    """Find when each head rose.

    The null of a head is the highest of those recorded for it (uniform and matched). Records of
    training count where there are any, else those of a sweep.

    Args:
        run: A run, or records of one.
        score: Name of the score.
        measurement: Name of the measurement that recorded it.
        margin: See `onset`.
        sustained: See `onset`.

    Returns:
        One finding for each layer and head: formed ones first, by step, then forming ones, then the
        rest, highest final score first. Empty where the score was not recorded.
    """
    records = list(run.records(measurement)) if isinstance(run, Run) else list(run)
    curve = _curve(records, f"{measurement}/{score}")
    if not curve:
        return []
    steps = [r.step for r in curve]
    values = np.stack([np.asarray(r.panel.values, float) for r in curve])
    null = _nulls(records, f"{measurement}/{score}", steps, values)
    found = [
        HeadOnset(
            layer,
            head,
            score,
            onset(
                steps,
                values[:, layer, head],
                null=None if null is None else null[:, layer, head],
                tokens=[r.tokens for r in curve],
                margin=margin,
                sustained=sustained,
            ),
        )
        for layer, head in np.ndindex(values.shape[1:])
    ]
    return sorted(found, key=_order)


def one_source(records: Iterable[Record]) -> list[Record]:
    """Keep the records of training where there are any, else those of a sweep, by step.

    Args:
        records: Records of one name.

    Returns:
        At most one for each step, in order of step.
    """
    chosen = list(records)
    live = [r for r in chosen if r.source == "live"]
    by_step = {r.step: r for r in (live or chosen)}
    return [by_step[step] for step in sorted(by_step)]


def _curve(records: Iterable[Record], name: str) -> list[Record]:
    """Records of one name with the shape that the last of them has."""
    found = one_source(r for r in records if r.name == name and r.panel.axes == ("layer", "head"))
    return [r for r in found if r.panel.values.shape == found[-1].panel.values.shape]


def _nulls(
    records: Sequence[Record], name: str, steps: Sequence[int], like: Numbers
) -> Numbers | None:
    """Highest recorded chance level at each step, shaped like the scores; None without any."""
    levels = [
        _level(one_source(r for r in records if r.name == n.format(name)), steps) for n in NULLS
    ]
    fitting = [np.broadcast_to(v, like.shape) for v in levels if v is not None and _fits(v, like)]
    # fmax passes over NaN: an undefined null must not hide a defined one.
    return np.fmax.reduce(fitting) if fitting else None


def _level(records: Sequence[Record], steps: Sequence[int]) -> Numbers | None:
    """Chance at each step, from the latest record up to it (a constant is recorded only once)."""
    if not records:
        return None
    at = np.array([r.step for r in records])
    values = [np.asarray(r.panel.values, float) for r in records]
    latest = np.maximum(np.searchsorted(at, steps, side="right") - 1, 0)
    if len({v.shape for v in values}) > 1:
        return None
    stacked = np.stack([values[i] for i in latest])
    return stacked.reshape(len(steps), 1, 1) if stacked.ndim == 1 else stacked


def _fits(values: Numbers, like: Numbers) -> bool:
    return values.ndim == like.ndim and all(
        a in (1, b) for a, b in zip(values.shape, like.shape, strict=True)
    )


def _order(found: HeadOnset) -> tuple[int, float, float, int, int]:
    rank = {"formed": 0, "forming": 1, "none": 2, "too early": 3}[found.onset.state]
    final = -found.onset.final if np.isfinite(found.onset.final) else 0.0
    first = float(found.onset.step) if found.onset.step is not None else 0.0
    return (rank, first, final, found.layer, found.head)
