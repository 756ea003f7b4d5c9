"""Faithfulness over sizes, and its areas as the MIB benchmark computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...checks import within
from ...errors import ArgumentError
from ...task import Task
from .bench import Ablation, on_bench
from .estimates import interval
from .extraction import strongest
from .scores import EdgeScores
from .trial import Trial

__all__ = ["FRACTIONS", "Curve", "areas", "curve_of", "faithfulness_curve", "share_of_edges"]

Interval: TypeAlias = tuple[float, float]

UNKNOWN = (math.nan, math.nan)

SMALL = 1000
"""Edges below which a thousandth of them would be none."""

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness of circuits of growing size.

    Args:
        fractions: Share of all edges that each was given.
        sizes: Edges that were left after pruning.
        signed: Faithfulness when edges are ranked by effect, what carries the behaviour first.
        absolute: Faithfulness when they are ranked by size.
        signed_intervals: 95 % intervals over prompts, lower and upper ends.
        absolute_intervals: The same.
        cpr_interval: 95 % interval of `cpr`.
        cmd_interval: 95 % interval of `cmd`.
        reason: Why everything is NaN, or None.
    """

    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    signed: tuple[float, ...]
    absolute: tuple[float, ...]
    signed_intervals: tuple[Interval, ...] = ()
    absolute_intervals: tuple[Interval, ...] = ()
    cpr_interval: Interval = UNKNOWN
    cmd_interval: Interval = UNKNOWN
    reason: str | None = None

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under the signed curve; 0.999 is perfect."""
        return areas(self.fractions, self.signed)[0]

    @property
    def cmd(self) -> float:
        """Circuit-model distance: area of |1 − f| under the absolute ranking; 0 is perfect."""
        return areas(self.fractions, self.absolute)[1]

    def smallest(self, low: float = 0.8, high: float = 1.2) -> int | None:
        """Return the size of the smallest circuit that does what the model does.

        Args:
            low: Least faithfulness.
            high: Largest one: a circuit that does more than the model is not faithful, either.

        Returns:
            Its number of edges under the absolute ranking; None if no size passes.
        """
        passing = (n for n, f in zip(self.sizes, self.absolute, strict=True) if low <= f <= high)
        return min(passing, default=None)


def areas(fractions: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """Return the areas CPR and CMD of one curve, as the MIB benchmark does (Mueller et al. 2025).

    Trapezoids over the fractions as they are, not their logarithm, and no point at 0: a method
    that is perfect at every size gets 0.999.

    Args:
        fractions: Shares of edges, rising.
        faithfulness: (m(C) − m(∅)) / (m(M) − m(∅)) at each.

    Returns:
        The area under the curve, and that of its distance from 1.

    Example:
        >>> areas(FRACTIONS, [1.0] * 10)
        (0.999, 0.0)
    """
    x = torch.tensor(list(fractions), dtype=torch.float64)
    y = torch.tensor(list(faithfulness), dtype=torch.float64)
    return (
        round(float(torch.trapezoid(y, x)), 12),
        round(float(torch.trapezoid((1.0 - y).abs(), x)), 12),
    )


def faithfulness_curve(
    model: nn.Module,
    behavior: BehaviorLike,
    scores: EdgeScores,
    *,
    fractions: Sequence[float] = FRACTIONS,
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Curve:
    """Measure how faithful circuits of growing size are.

    At each fraction k of N edges the top int(k·N) are taken, as the MIB benchmark does, and pruned
    to those on a way from an embedding to the logits: rounded down, an edge too few at most. Graphs
    below 1,000 edges would get none at the smallest fractions, where the areas of MIB then begin
    with circuits that do nothing; there k·N is rounded up to ⌈k·N⌉, so that each circuit is given
    one edge at least. The areas are taken over the fractions asked for, not over the sizes left.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts other than those that the scores come from.
        scores: What edges are ranked by.
        fractions: Shares of all edges, rising.
        ablation: What edges outside carry.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The curve; NaN throughout, with the reason, where the metric is the same on clean and
        ablated runs, or the scores are undefined.

    Raises:
        ArgumentError: If fractions are no shares that rise.
    """
    shares = [within("fractions", f, 0.0, 1.0, do="Leave them out.") for f in fractions]
    if not shares or shares != sorted(shares):
        raise ArgumentError.of(
            "fractions", expected="shares that rise", got=shares, do="Areas are taken along them."
        )
    with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
        return curve_of(Trial.on(bench), scores, shares)


def curve_of(trial: Trial, scores: EdgeScores, fractions: Sequence[float] = FRACTIONS) -> Curve:
    """Return the curve on a bench.

    Args:
        trial: The model and the prompts.
        scores: What edges are ranked by.
        fractions: Shares of all edges, rising.

    Returns:
        The curve.
    """
    graph, keys = trial.bench.graph, scores.effects.nan_to_num()
    counts = [share_of_edges(f, graph.n_edges) for f in fractions]
    signed, absolute = (
        torch.stack([graph.connected(strongest(graph, k, n)) for n in counts])
        for k in (keys, keys.abs())
    )
    sizes = tuple(int(n) for n in absolute.sum((1, 2)))
    reason = trial.reason or scores.reason
    if reason is not None:
        unknown = (math.nan,) * len(counts)
        return Curve(tuple(fractions), sizes, unknown, unknown, reason=reason)
    parts = []
    for masks in (signed, absolute):
        gain = trial.metric(masks) - trial.nothing
        parts.append((gain, trial.draws.means(gain) / trial.draws.means(trial.whole)))
    x = torch.tensor(list(fractions), dtype=torch.float64)
    areas_drawn = (
        torch.trapezoid(parts[0][1], x, dim=0),
        torch.trapezoid((1.0 - parts[1][1]).abs(), x, dim=0),
    )
    values = [tuple(float(v) for v in gain.mean(1) / trial.whole.mean()) for gain, _ in parts]
    spreads = [tuple(ends_of(row) for row in drawn) for _, drawn in parts]
    ends = [ends_of(a) for a in areas_drawn]
    return Curve(
        tuple(fractions), sizes, values[0], values[1], spreads[0], spreads[1], ends[0], ends[1]
    )


def ends_of(drawn: Tensor) -> Interval:
    """Return the ends of the middle 95 % of draws.

    Args:
        drawn: Shape ``[draw]``.

    Returns:
        Lower and upper end.
    """
    found = interval(0.0, drawn)
    return found.low, found.high


def share_of_edges(fraction: float, edges: int) -> int:
    """Return how many edges a share is: rounded down, in small graphs rounded up.

    Args:
        fraction: The share.
        edges: Number of all edges.

    Returns:
        Their number.

    Example:
        >>> share_of_edges(0.001, 42), share_of_edges(0.001, 70_651)
        (1, 70)
    """
    if edges >= SMALL:
        return int(fraction * edges)
    # 0.07 of 100 is 7.000000000000001 in floating point, and not 8 edges.
    return math.ceil(round(fraction * edges, 9))
