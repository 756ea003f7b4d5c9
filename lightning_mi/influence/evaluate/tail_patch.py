"""One more step of training on the top proponents of a query: `tail_patch`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...isolation import untouched
from ...measurement import IndexedData
from ...progress import track
from ...record import Panel, Reading, scalar
from ...target import Loss, TargetLike
from ..data import as_indexed, chunks
from ..objective import Objective, as_objective
from ..per_example import mean_gradient
from ..point import Point
from ..result import InfluenceScores
from .fresh import losses_at
from .ranking import Estimate, bootstrap, highest_first, mean_known

__all__ = ["TailPatch", "tail_patch"]

LOSS = Loss()


def tail_patch(
    model: nn.Module,
    objective: Objective,
    train: Any,
    queries: Any,
    scores: InfluenceScores,
    *,
    k: int = 10,
    learning_rate: float,
    query: TargetLike = LOSS,
    seed: int = 0,
    batch_size: int | None = None,
) -> TailPatch:
    """Take one step of SGD on a query's top proponents and see how far its loss falls.

    θ − η ∇(mean loss of the k examples), for each query from the same θ (Chang et al. 2024). Beside
    it the same step on k random examples. No retraining; the model itself is not changed.

    Args:
        model: The trained model.
        objective: Its losses; a Task is enough. The regulariser plays no part.
        train: The training data.
        queries: The queries that the scores belong to.
        scores: Positive = proponent.
        k: Examples in the step.
        learning_rate: η, for example the last one of training.
        query: What was asked about.
        seed: Of the random examples.
        batch_size: Examples run at once.

    Returns:
        Falls of loss; positive speaks for the scores.

    Raises:
        ArgumentError: If a number is out of range, or the queries are not those of the scores.
    """
    data, asked = as_indexed(train, "train"), as_indexed(queries, "queries")
    _check(scores, asked, k, learning_rate)
    goal = as_objective(objective)
    target = goal.query(query)
    generator = torch.Generator().manual_seed(seed)
    falls = torch.zeros(2, len(asked), dtype=torch.float64)
    with untouched(model) as plain:
        point = Point(plain)
        ask = partial(goal.query_losses, query=target)
        for q in track(range(len(asked)), "tail patches"):
            batches = list(chunks(asked, [q], 1, point))
            before = losses_at(point, ask, batches)
            order = highest_first(scores.values[q])[:k]
            mixed = torch.randperm(len(scores.indices), generator=generator)[:k]
            for row, places in enumerate((order, mixed)):
                chosen = [scores.indices[i] for i in places.tolist()]
                together = chunks(data, chosen, batch_size, point)
                step = mean_gradient(point, goal.example_losses, together, 1 / k)
                after = losses_at(point.moved(-learning_rate * step), ask, batches)
                falls[row, q] = float(before - after)
    return TailPatch(falls[0], falls[1], k, learning_rate)


@dataclass(frozen=True, eq=False)
class TailPatch:
    """How far one step on k examples lowers a query's loss.

    Args:
        falls: L_q before − after a step on its top proponents, ``[query]``.
        random: The same for random examples.
        k: Examples in the step.
        learning_rate: Of the step.
        draws: Resamples of intervals.
    """

    falls: Tensor
    random: Tensor
    k: int
    learning_rate: float
    draws: int = 1000

    @property
    def mean(self) -> Estimate:
        """Mean fall over queries."""
        return self._estimate(self.falls)

    @property
    def margin(self) -> Estimate:
        """How much further the loss falls than after a step on random examples."""
        return self._estimate(self.falls - self.random)

    def _estimate(self, values: Tensor) -> Estimate:
        return bootstrap(lambda p: mean_known(values[p[0]]), [len(values)], self.draws)

    def reading(self) -> Reading:
        """Return the falls as panels.

        Returns:
            ``fall`` and ``random`` of each query, and ``margin``.
        """
        said: dict[str, Any] = {
            "sign": "positive = the step lowers the query's loss",
            "k": self.k,
            "learning_rate": self.learning_rate,
        }
        found = self.margin
        return {
            "fall": Panel(self.falls, ("query",), {}, "nats", said),
            "random": Panel(self.random, ("query",), {}, "nats", said),
            "margin": scalar(found.mean, "nats", interval=[found.low, found.high], **said),
        }


def _check(scores: InfluenceScores, asked: IndexedData, k: int, learning_rate: float) -> None:
    if not 0 < k < len(scores.indices):
        raise ArgumentError.of(
            "k", expected=f"1 to {len(scores.indices) - 1}", got=k, do="For example 10."
        )
    if not learning_rate > 0:
        raise ArgumentError.of(
            "learning_rate", expected="a positive number", got=learning_rate, do="For example 0.1."
        )
    if len(asked) != len(scores.values):
        raise ArgumentError.of(
            "queries",
            expected=f"{len(scores.values)} queries, as many as have scores",
            got=len(asked),
            do="Pass the queries that were scored.",
        )
