"""The smallest circuit that does what the model does: `smallest_circuit`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...errors import ArgumentError
from ...task import Task
from .bench import Ablation, on_bench
from .extraction import How, extract
from .scores import EdgeScores
from .trial import Trial

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["smallest_circuit"]

GRID = 24
"""Sizes that are tried, evenly on a logarithmic scale."""


def smallest_circuit(
    model: nn.Module,
    behavior: BehaviorLike,
    scores: EdgeScores,
    *,
    least: float = 0.8,
    most: float = 1.2,
    how: How = "greedy",
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Circuit:
    """Return the smallest circuit of a ranking whose faithfulness is in a range.

    Sizes are tried from one edge to all, evenly on a logarithmic scale, and below the first that
    passes as many again, evenly: one by one where there are few. Faithfulness does not rise evenly
    with size, so nothing is halved, and a smaller circuit between two tried sizes is missed.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts to search on: those that the scores come from, not those that the
            circuit will be judged on.
        scores: What edges are ranked by.
        least: Least faithfulness.
        most: Largest one; a circuit that does more than the model is not faithful, either.
        how: ``"greedy"`` from the logits, or ``"top"`` wherever edges are.
        ablation: What edges outside carry.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The circuit, the full graph if no smaller one passes.

    Raises:
        ArgumentError: If scores are undefined, or ablation does not change the metric.
    """
    graph, keys = scores.graph, scores.effects.abs().nan_to_num()
    with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
        trial = Trial.on(bench)
        why = scores.reason or trial.reason
        if why is not None:
            raise ArgumentError.of(
                "scores", expected="defined scores and effects", got=why, do="Train further."
            )

        def first(sizes: list[int]) -> int | None:
            for size in sizes:
                mask = extract(graph, keys, how, size)
                f = trial.share(trial.metric(mask[None])[0]).value
                if mask.any() and least <= f <= most:
                    return size
            return None

        grid = _grid(graph.n_edges)
        found = first(grid)
        if found is None:
            found = graph.n_edges
        elif found > 1:
            before = grid[grid.index(found) - 1] if found != grid[0] else 0
            between = torch.linspace(before + 1, found, min(GRID, found - before)).long().tolist()
            found = first(sorted(set(between))) or found
    return scores.circuit(n_edges=found, how=how)


def _grid(edges: int) -> list[int]:
    """Return sizes, evenly on a logarithmic scale."""
    top = math.log(edges)
    return sorted({max(1, round(math.exp(top * i / (GRID - 1)))) for i in range(GRID)})
