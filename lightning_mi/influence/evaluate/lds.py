"""The linear datamodeling score: do sums of scores predict what other halves of the data give?"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, RunError
from ...record import Panel, Reading, scalar
from ...runs import write_whole
from ..result import InfluenceScores
from .ranking import FEWEST, Estimate, bootstrap, mean_known, picked, spearman
from .retraining import RetrainLike, as_retraining, check_queries

__all__ = ["LDS", "Subsets", "lds", "retrain_subsets"]


@dataclass(frozen=True, eq=False)
class Subsets:
    """Random parts of the training data and the losses of models trained on them.

    Args:
        members: Boolean ``[subset, n]``: which examples each contains.
        losses: Shape ``[subset, seed, query]``.
    """

    members: Tensor
    losses: Tensor

    def save(self, path: str | Path) -> None:
        """Keep it in a file, for `LinearDatamodelingScore` and later sessions.

        Args:
            path: The file; it is written whole or not at all.
        """
        content = {"members": self.members.cpu(), "losses": self.losses.cpu()}
        write_whole(Path(path), lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path: str | Path) -> Subsets:
        """Return what `save` kept.

        Args:
            path: The file.

        Returns:
            Parts and losses.

        Raises:
            RunError: If there is no such file, or it holds something else.
        """
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            return cls(found["members"], found["losses"])
        except (OSError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as problem:
            raise RunError(
                f"retrained: expected a file that Subsets.save wrote at {path}, got "
                f"{type(problem).__name__}: {str(problem)[:100]}. Call retrain_subsets(…).save(…)."
            ) from problem


def retrain_subsets(
    retrain: RetrainLike,
    n: int,
    *,
    candidates: Sequence[int] | None = None,
    subsets: int = 40,
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1),
    seed: int = 0,
) -> Subsets:
    """Train on random parts of the data; the result serves any number of `lds`.

    Args:
        retrain: A `Retrain` function or a `Retraining`, which keeps results and runs in parallel.
        n: Number of training examples.
        candidates: Dataset indices that may be left out; all others are in every part.
        subsets: m, number of parts.
        fraction: α, share of the candidates in each.
        seeds: Each part is trained on once for each; every training has a seed of its own made of
            it and of the part's number, so that luck does not repeat itself.
        seed: Of the parts.

    Returns:
        Parts and losses.

    Raises:
        ArgumentError: If a number is out of range.
    """
    members = _members(n, candidates, subsets, fraction, seed)
    if not len(seeds):
        raise ArgumentError.of("seeds", expected="at least one", got=seeds, do="For example (0,).")
    rows = [tuple(row.nonzero()[:, 0].tolist()) for row in members]
    jobs = [(row, 1_000_003 * s + k) for k, row in enumerate(rows) for s in seeds]
    losses = as_retraining(retrain)(jobs, "retraining on subsets")
    return Subsets(members, losses.reshape(subsets, len(seeds), -1))


def lds(
    scores: InfluenceScores,
    retrain: RetrainLike | Subsets,
    *,
    subsets: int = 40,
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1),
    seed: int = 0,
) -> LDS:
    """Return the linear datamodeling score (Park et al. 2023).

    For each query: Spearman's correlation, over random parts S_k of the data, of Σ_{i∈S_k}
    score[q, i] with −L_q of models trained on S_k, averaged over seeds. Then the mean over queries.
    Examples that have no score are in every part. 1 is best, 0 what chance gives; what can be
    reached where training is noisy is in `LDS.ceiling`.

    Args:
        scores: Positive = proponent. Scores of which more is the other way round are turned by
            their ``orientation``.
        retrain: A `Retrain` function, a `Retraining`, or what `retrain_subsets` returned.
        subsets: As for `retrain_subsets`, as are all below.
        fraction: See there.
        seeds: See there.
        seed: See there.

    Returns:
        The score with its interval.

    Raises:
        ArgumentError: If the losses are of other queries or other data.

    Example:
        >>> values = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.1, 0.0]])
        >>> scores = InfluenceScores(values, tuple(range(6)), 6, "influence function")
        >>> def retrain(indices, seed):
        ...     return [-float(values[0, indices].sum())]
        >>> lds(scores, retrain, subsets=8).mean
        1.0
    """
    _check_sign(scores)
    known = retrain
    if not isinstance(known, Subsets):
        known = retrain_subsets(
            known,
            scores.n,
            candidates=scores.indices,
            subsets=subsets,
            fraction=fraction,
            seeds=seeds,
            seed=seed,
        )
    _check_fit(scores, known)
    # Only differences between parts count, so what is in every part may be without a score.
    members = known.members[:, list(scores.indices)].double()
    predicted = scores.values.double().cpu() @ members.T
    return LDS(predicted, known.losses, int(known.members.shape[1]))


@dataclass(frozen=True, eq=False)
class LDS:
    """A linear datamodeling score.

    Args:
        predicted: Sums of scores ``[query, subset]``.
        losses: Of the retrained models, ``[subset, seed, query]``.
        n: Number of training examples.
        draws: Resamples of intervals.
        details: More to say, plain JSON.
    """

    predicted: Tensor
    losses: Tensor
    n: int
    draws: int = 1000
    details: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def finite(self) -> Tensor:
        """Subsets on which every training came out with finite losses."""
        return torch.isfinite(self.losses).flatten(1).all(1).nonzero()[:, 0]

    @cached_property
    def values(self) -> Tensor:
        """The score of each query; NaN where it is undefined."""
        predicted, actual = self._pairs
        return spearman(predicted, actual)

    @cached_property
    def estimate(self) -> Estimate:
        """Mean over queries, with the 95 % interval of resampling both subsets and queries."""
        predicted, actual = self._pairs

        def value(places: list[Tensor]) -> Tensor:
            return mean_known(spearman(picked(predicted, places), picked(actual, places)))

        return bootstrap(value, list(predicted.shape), self.draws)

    @property
    def mean(self) -> float:
        """Mean over queries."""
        return float(mean_known(self.values))

    @cached_property
    def agreement(self) -> float:
        """How far two seeds agree: Spearman of their losses over subsets, mean over queries."""
        losses = self.losses[self.finite]
        count = losses.shape[1]
        pairs = [(i, j) for i in range(count) for j in range(i)]
        each = [float(mean_known(spearman(losses[:, i].T, losses[:, j].T))) for i, j in pairs]
        return sum(each) / len(each) if each else math.nan

    @property
    def ceiling(self) -> float:
        """What perfect scores would reach: √(k r / (1 + (k − 1) r)) with k seeds that agree by r.

        Reliability of a mean after Spearman and Brown. NaN for one seed, whose noise is unknown.
        """
        r, k = self.agreement, self.losses.shape[1]
        return math.sqrt(max(0.0, k * r / (1 + (k - 1) * r))) if r > -1 / max(1, k) else math.nan

    def minus(self, other: LDS) -> Estimate:
        """Return how much better this is than another, on the same retrained models.

        Args:
            other: Of other scores for the same queries.

        Returns:
            The difference of means with its paired interval: both are resampled together.

        Raises:
            ArgumentError: If the other was found with other models or queries.
        """
        same = self.losses.shape == other.losses.shape
        if not same or not torch.equal(self.losses.nan_to_num(), other.losses.nan_to_num()):
            raise ArgumentError.of(
                "other",
                expected="an LDS on the same retrained models",
                got="other losses",
                do="Call retrain_subsets once and pass its result to both.",
            )
        mine, theirs, actual = self._pairs[0], other._pairs[0], self._pairs[1]

        def value(places: list[Tensor]) -> Tensor:
            a, b, c = (picked(t, places) for t in (mine, theirs, actual))
            return mean_known(spearman(a, c) - spearman(b, c))

        return bootstrap(value, list(actual.shape), self.draws)

    @property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Predictions and minus losses, ``[query, subset]``, where trainings came out."""
        kept = self.finite
        return self.predicted[:, kept], -self.losses[kept].mean(1).T

    def reading(self) -> Reading:
        """Return the score as panels.

        Returns:
            ``lds`` of all queries together and ``values`` of each.
        """
        found = self.estimate
        said: dict[str, Any] = {
            "sign": "1 is best, 0 is chance",
            "interval": [found.low, found.high],
            "ceiling": self.ceiling,
            "subsets": len(self.losses),
            "failed_subsets": len(self.losses) - len(self.finite),
            "seeds": int(self.losses.shape[1]),
            "n": self.n,
            **self.details,
        }
        if math.isnan(found.mean):
            said["reason"] = f"constant scores or losses, or fewer than {FEWEST} subsets"
        return {
            "lds": scalar(found.mean, **said),
            "values": Panel(self.values, ("query",), {}, "1", said),
        }


def _members(
    n: int, candidates: Sequence[int] | None, subsets: int, fraction: float, seed: int
) -> Tensor:
    free = torch.arange(n) if candidates is None else torch.as_tensor(list(candidates))
    size = round(fraction * len(free))
    if not 0 < size < len(free):
        raise ArgumentError.of(
            "fraction",
            expected=f"a share of {len(free)} examples that leaves some in and some out",
            got=fraction,
            do="For example 0.5.",
        )
    if subsets < FEWEST:
        raise ArgumentError.of(
            "subsets", expected=f"{FEWEST} or more", got=subsets, do="For example 40."
        )
    generator = torch.Generator().manual_seed(seed)
    members = torch.ones(subsets, n, dtype=torch.bool)
    for row in members:
        row[free[torch.randperm(len(free), generator=generator)[size:]]] = False
    return members


def _check_fit(scores: InfluenceScores, known: Subsets) -> None:
    check_queries(scores, known.losses.shape[2])
    if known.members.shape[1] != scores.n:
        raise ArgumentError.of(
            "retrain",
            expected=f"subsets of {scores.n} training examples",
            got=known.members.shape[1],
            do="Pass the n of the scores to retrain_subsets.",
        )
    unscored = torch.ones(scores.n, dtype=torch.bool)
    unscored[list(scores.indices)] = False
    left_out = (~known.members[:, unscored]).any(0)
    if bool(left_out.any()):
        first = int(unscored.nonzero()[:, 0][left_out][0])
        raise ArgumentError.of(
            "retrain",
            expected="subsets that leave out nothing but examples with scores",
            got=f"some without example {first}, which has no score",
            do="Pass candidates=scores.indices to retrain_subsets, or score all.",
        )


def _check_sign(scores: InfluenceScores) -> None:
    if not scores.orientation.startswith("positive = proponent"):
        raise ArgumentError.of(
            "scores",
            expected="scores of which positive = proponent for a loss-like query",
            got=repr(scores.orientation),
            do="Use influence_scores(…) or tracin(…).",
        )
