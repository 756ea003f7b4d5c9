"""Leaving one example out at a time and training again: `leave_one_out`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...record import Panel, Reading, scalar
from ..result import InfluenceScores, columns_of
from .ranking import FEWEST, Estimate, bootstrap, mean_known, pearson, picked, slopes, spearman
from .retraining import RetrainLike, as_retraining, check_queries

__all__ = ["Agreement", "agreement", "leave_one_out"]


def leave_one_out(
    scores: InfluenceScores,
    retrain: RetrainLike,
    *,
    removals: int | Sequence[int] = 40,
    seeds: Sequence[int] = (0,),
    seed: int = 0,
) -> Agreement:
    """Compare scores with what removing examples one at a time and training again does.

    The change L_q(without i) − L_q(with i) is what a score estimates. Each seed trains with all
    examples and without each: initialisation and order of the data have to be the same, or their
    luck is larger than what one example can do.

    Args:
        scores: `influence_scores`, or any of which positive = proponent.
        retrain: A `Retrain` function or a `Retraining`.
        removals: Dataset indices, or how many of the scored ones to draw.
        seeds: Changes are averaged over them.
        seed: Of the draw.

    Returns:
        The agreement.

    Raises:
        ArgumentError: If an index has no score, or the losses are of other queries.

    Example:
        >>> values = torch.tensor([[3.0, 2.0, 1.0]])
        >>> scores = InfluenceScores(values, (0, 1, 2), 3, "influence function")
        >>> def retrain(indices, seed):
        ...     return [-2 * float(values[0, indices].sum())]
        >>> round(leave_one_out(scores, retrain, removals=3).slope.mean, 6)
        2.0
    """
    removed = _removed(scores, removals, seed)
    whole = range(scores.n)
    parts = [tuple(whole), *(tuple(j for j in whole if j != i) for i in removed)]
    jobs = [(part, s) for part in parts for s in seeds]
    losses = as_retraining(retrain)(jobs, "leaving one out").reshape(len(parts), len(seeds), -1)
    changes = (losses[1:] - losses[:1]).mean(1).T
    check_queries(scores, len(changes))
    own = scores.values[:, columns_of(scores.indices, removed)].double().cpu()
    return Agreement(own, changes, tuple(removed), "leave-one-out")


def agreement(scores: InfluenceScores, truth: InfluenceScores) -> Agreement:
    """Compare scores with others that are taken as true, for example those of `pbrf`.

    Args:
        scores: Scores.
        truth: Others for the same queries; examples that both have are compared.

    Returns:
        The agreement.

    Raises:
        ArgumentError: If the queries differ in number or no example is in both.
    """
    known = set(scores.indices)
    common = [i for i in truth.indices if i in known]
    if len(scores.values) != len(truth.values) or not common:
        raise ArgumentError.of(
            "truth",
            expected=f"scores of the same {len(scores.values)} queries and some common examples",
            got=f"{len(truth.values)} queries, {len(common)} common examples",
            do="Score the same queries and candidates with both.",
        )
    first, second = (
        s.values[:, columns_of(s.indices, common)].double().cpu() for s in (scores, truth)
    )
    return Agreement(first, second, tuple(common), truth.method)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Scores beside the true changes that they estimate.

    Args:
        scores: Shape ``[query, removal]``.
        changes: True changes of the query's loss, the same shape.
        removed: Dataset index of each column.
        truth: Where the changes come from.
        draws: Resamples of intervals.
    """

    scores: Tensor
    changes: Tensor
    removed: tuple[int, ...]
    truth: str
    draws: int = 1000

    @cached_property
    def finite(self) -> Tensor:
        """Removals for which everything came out finite."""
        known = torch.isfinite(self.scores) & torch.isfinite(self.changes)
        return known.all(0).nonzero()[:, 0]

    @property
    def pearson(self) -> Estimate:
        """Pearson's correlation over removals, mean over queries, interval over both."""
        return self._estimate(pearson)

    @property
    def spearman(self) -> Estimate:
        """Spearman's correlation over removals, mean over queries, interval over both."""
        return self._estimate(spearman)

    @property
    def slope(self) -> Estimate:
        """Change for each unit of score, by least squares; median over queries.

        1 where scores have the right size. For linear models exact changes are the scores over
        1 − leverage, so that slopes somewhat above 1 are right.
        """
        return self._estimate(slopes, median=True)

    @property
    def values(self) -> Tensor:
        """Pearson's correlation of each query."""
        return pearson(self.scores[:, self.finite], self.changes[:, self.finite])

    def _estimate(self, function: Any, median: bool = False) -> Estimate:
        a, b = self.scores[:, self.finite], self.changes[:, self.finite]

        def value(places: list[Tensor]) -> Tensor:
            each: Tensor = function(picked(a, places), picked(b, places))
            return each.nanmedian(-1).values if median else mean_known(each)

        return bootstrap(value, list(a.shape), self.draws)

    def reading(self) -> Reading:
        """Return the comparison as panels.

        Returns:
            ``pearson``, ``spearman``, ``slope`` of all queries together and ``values`` of each.
        """
        said: dict[str, Any] = {"truth": self.truth, "removals": len(self.removed), "display": {}}
        panels = {}
        for what, found in (
            ("pearson", self.pearson),
            ("spearman", self.spearman),
            ("slope", self.slope),
        ):
            reason = {}
            if math.isnan(found.mean):
                reason = {"reason": f"constant scores, or fewer than {FEWEST} removals"}
            panels[what] = scalar(
                found.mean, interval=[found.low, found.high], sign="1 is best", **said, **reason
            )
        return {**panels, "values": Panel(self.values, ("query",), {}, "1", said)}


def _removed(scores: InfluenceScores, removals: int | Sequence[int], seed: int) -> list[int]:
    if isinstance(removals, int):
        order = torch.randperm(len(scores.indices), generator=torch.Generator().manual_seed(seed))
        found = sorted(scores.indices[i] for i in order[: max(0, removals)].tolist())
    else:
        found = [int(i) for i in removals]
    if not found or not set(found) <= set(scores.indices):
        raise ArgumentError.of(
            "removals",
            expected="a positive number, or dataset indices that have scores",
            got=removals if isinstance(removals, int) else f"{list(removals)[:4]} …",
            do="For example removals=40.",
        )
    return found
