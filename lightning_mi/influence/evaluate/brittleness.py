"""Removing the top proponents of a query and training again: `brittleness`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...record import Panel, Reading
from ..result import InfluenceScores
from .ranking import Estimate, bootstrap, highest_first, mean_known
from .retraining import RetrainLike, as_retraining, check_queries

__all__ = ["Brittleness", "brittleness"]


def brittleness(
    scores: InfluenceScores,
    retrain: RetrainLike,
    *,
    counts: Sequence[int] = (10, 30),
    queries: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1),
    seed: int = 0,
) -> Brittleness:
    """Remove the k strongest proponents of a query, train again, and see its loss.

    Beside it the same number of examples drawn at random. Trainings: 1 + 2 · queries · counts, for
    each seed.

    Args:
        scores: Positive = proponent.
        retrain: A `Retrain` function or a `Retraining`.
        counts: Each k.
        queries: Rows of the scores; None takes all.
        seeds: Changes are averaged over them.
        seed: Of the random examples.

    Returns:
        Rises of loss.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> values = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> scores = InfluenceScores(values, (0, 1, 2, 3), 4, "influence function")
        >>> def retrain(indices, seed):
        ...     return [-float(values[0, indices].sum())]
        >>> brittleness(scores, retrain, counts=(1, 2)).changes.tolist()
        [[3.0, 5.0]]
    """
    rows = list(range(len(scores.values))) if queries is None else [int(q) for q in queries]
    _check(scores, counts, rows, seeds)
    generator = torch.Generator().manual_seed(seed)
    removed = []
    for row in rows:
        order = highest_first(scores.values[row])
        mixed = torch.randperm(len(order), generator=generator)
        removed += [order[:k] for k in counts] + [mixed[:k] for k in counts]
    gone = [{scores.indices[i] for i in places.tolist()} for places in removed]
    parts = [tuple(i for i in range(scores.n) if i not in g) for g in [set(), *gone]]
    jobs = [(part, s) for part in parts for s in seeds]
    losses = as_retraining(retrain)(jobs, "removing proponents")
    losses = losses.reshape(len(parts), len(seeds), -1).mean(1)
    check_queries(scores, losses.shape[1])
    shaped = (losses[1:] - losses[0]).reshape(len(rows), 2, len(counts), -1)
    own = torch.stack([shaped[i, :, :, row] for i, row in enumerate(rows)])
    return Brittleness(own[:, 0], own[:, 1], tuple(counts), tuple(rows))


@dataclass(frozen=True, eq=False)
class Brittleness:
    """How much a query's loss rises without its proponents.

    Args:
        changes: L_q(without its top k) − L_q(with all), ``[query, count]``.
        random: The same for as many random examples.
        counts: Each k.
        queries: Row of the scores of each query.
        draws: Resamples of intervals.
    """

    changes: Tensor
    random: Tensor
    counts: tuple[int, ...]
    queries: tuple[int, ...]
    draws: int = 1000

    @property
    def margins(self) -> list[Estimate]:
        """For each count how much more the loss rises than without random examples.

        Means over queries with intervals; positive speaks for the scores.
        """
        rest = self.changes - self.random

        return [
            bootstrap(lambda p, c=column: mean_known(c[p[0]]), [len(rest)], self.draws)  # type: ignore[misc]
            for column in rest.T
        ]

    def reading(self) -> Reading:
        """Return the rises as panels.

        Returns:
            ``change`` and ``random``, ``[query, step]`` with the counts as steps, and ``margin``
            of each count.
        """
        found = self.margins
        coords = {"query": self.queries, "step": self.counts}
        said: dict[str, Any] = {
            "sign": "positive = the loss rises",
            "step": "number of examples removed",
        }
        margin: dict[str, Any] = {
            **said,
            "sign": "positive = rises more than without random examples",
            "interval": [[e.low, e.high] for e in found],
        }
        axes = ("query", "step")
        return {
            "change": Panel(self.changes, axes, coords, "nats", said),
            "random": Panel(self.random, axes, coords, "nats", said),
            "margin": Panel(
                torch.tensor([e.mean for e in found]),
                ("step",),
                {"step": self.counts},
                "nats",
                margin,
            ),
        }


def _check(
    scores: InfluenceScores, counts: Sequence[int], rows: Sequence[int], seeds: Sequence[int]
) -> None:
    most = len(scores.indices) - 1
    if not counts or not all(0 < k <= most for k in counts):
        raise ArgumentError.of(
            "counts",
            expected=f"numbers from 1 to {most}",
            got=list(counts),
            do="For example (10,).",
        )
    if not rows or not all(0 <= r < len(scores.values) for r in rows):
        raise ArgumentError.of(
            "queries",
            expected=f"rows of the scores, 0 to {len(scores.values) - 1}",
            got=list(rows)[:4],
            do="None takes all.",
        )
    if not seeds:
        raise ArgumentError.of("seeds", expected="at least one", got=seeds, do="For example (0,).")
