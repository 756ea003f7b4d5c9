"""Faithfulness over sizes, and its areas as the MIB benchmark computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...task import Task
from .bench import Ablation, Bench, on_bench
from .edges import EdgeScores, coinciding
from .extraction import strongest

__all__ = ["FRACTIONS", "Curve", "areas", "faithfulness_curve"]

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness of circuits of growing size.

    Args:
        fractions: Share of all edges that each was given.
        sizes: Edges that were left after pruning.
        signed: Faithfulness when edges are ranked by effect, what carries the behaviour first.
        absolute: Faithfulness when they are ranked by size.
        cpr: Area under ``signed``: 0.999 for a method that is perfect at every size.
        cmd: Area of |1 − ``absolute``|: 0 is best.
    """

    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    signed: tuple[float, ...]
    absolute: tuple[float, ...]

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under the signed curve; 0.999 is perfect."""
        return areas(self.fractions, self.signed)[0]

    @property
    def cmd(self) -> float:
        """Circuit-model distance: area of |1 − f| under the absolute ranking; 0 is perfect."""
        return areas(self.fractions, self.absolute)[1]


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

    At each fraction the top edges are taken and pruned to those on a way from an embedding to the
    logits.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts other than those that the scores come from.
        scores: What edges are ranked by.
        fractions: Shares of all edges, rising.
        ablation: What edges outside carry.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The curve; NaN throughout where the metric is the same on clean and ablated runs.
    """
    with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
        return curve_of(bench, scores, fractions)


def curve_of(bench: Bench, scores: EdgeScores, fractions: Sequence[float] = FRACTIONS) -> Curve:
    """Return the curve on a bench.

    Args:
        bench: The model and the prompts.
        scores: What edges are ranked by.
        fractions: Shares of all edges, rising.

    Returns:
        The curve.
    """
    graph, keys = bench.graph, scores.effects.nan_to_num()
    counts = [_count(f, graph.n_edges) for f in fractions]
    masks = [
        torch.stack([graph.connected(strongest(graph, k, n)) for n in counts])
        for k in (keys, keys.abs())
    ]
    nothing = bench.metric(torch.zeros_like(graph.lawful)[None])[0].mean()
    clean = bench.clean.mean()
    made = [_shares(bench.metric(m).mean(1), clean, nothing) for m in masks]
    sizes = tuple(int(n) for n in masks[1].sum((1, 2)))
    return Curve(tuple(fractions), sizes, made[0], made[1])


def _count(fraction: float, edges: int) -> int:
    """Return how many edges a share is; in small graphs at least one, where MIB takes none."""
    return max(int(fraction * edges), math.ceil(fraction * edges) if edges < 1000 else 0)


def _shares(values: Tensor, clean: Tensor, nothing: Tensor) -> tuple[float, ...]:
    if coinciding(float(clean), float(nothing)) is not None:
        return (math.nan,) * len(values)
    return tuple(float(v) for v in (values - nothing) / (clean - nothing))
