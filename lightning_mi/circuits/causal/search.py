"""The smallest circuit that does what the model does: `smallest_circuit`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...checks import within
from ...errors import ArgumentError
from ...task import Task
from .bench import Ablation, on_bench
from .extraction import How, extract
from .scores import EdgeScores
from .trial import Trial

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["searched", "smallest_circuit"]

FAITHFUL = (0.8, 1.2)
"""A circuit below does too little of what the model does; one above, more than the model."""

GRID = 24
"""Sizes that are tried, evenly on a logarithmic scale."""


def smallest_circuit(
    model: nn.Module,
    behavior: BehaviorLike,
    scores: EdgeScores,
    *,
    least: float = FAITHFUL[0],
    most: float = FAITHFUL[1],
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
        ArgumentError: If the range is none, scores are undefined, or ablation does not change the
            metric: then there is no circuit that could be returned. `CircuitScorecard` measures
            NaN with the reason.
    """
    least = within("least", least, do="Take 0.8.")
    most = within("most", most, least, do="Take 1.2: at least as much as `least`.")
    found = searched(model, behavior, scores, (least, most), how, ablation, task, anatomy)
    if isinstance(found, str):
        raise ArgumentError.of(
            "scores", expected="defined scores and effects", got=found, do="Train further."
        )
    return found


def searched(
    model: nn.Module,
    behavior: BehaviorLike,
    scores: EdgeScores,
    between: tuple[float, float] = FAITHFUL,
    how: How = "greedy",
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Circuit | str:
    """Return the smallest circuit, or why there is none; see `smallest_circuit`.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts to search on.
        scores: What edges are ranked by.
        between: Least and largest faithfulness.
        how: See `EdgeScores.circuit`.
        ablation: What edges outside carry.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The circuit, or a sentence.
    """
    if scores.reason is not None:
        return scores.reason
    graph, keys = scores.graph, scores.effects.abs().nan_to_num()
    with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
        trial = Trial.on(bench)
        if trial.reason is not None:
            return trial.reason

        def first(sizes: list[int]) -> int | None:
            for size in sizes:
                mask = extract(graph, keys, how, size)
                f = trial.share(trial.metric(mask[None])[0]).value
                if mask.any() and between[0] <= f <= between[1]:
                    return size
            return None

        grid = _grid(graph.n_edges)
        found = first(grid)
        if found is None:
            found = graph.n_edges
        elif found > 1:
            before = grid[grid.index(found) - 1] if found != grid[0] else 0
            tried = torch.linspace(before + 1, found, min(GRID, found - before)).long().tolist()
            found = first(sorted(set(tried))) or found
    return scores.circuit(n_edges=found, how=how)


def _grid(edges: int) -> list[int]:
    """Return sizes, evenly on a logarithmic scale."""
    top = math.log(edges)
    return sorted({max(1, round(math.exp(top * i / (GRID - 1)))) for i in range(GRID)})
