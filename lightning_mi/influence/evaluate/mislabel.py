"""Finding wrong labels by what examples do to themselves: `mislabel_auc`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...isolation import untouched
from ...record import Panel, Reading, scalar
from ..asking import loss_gradients
from ..data import as_indexed, chunks
from ..objective import Objective, as_objective
from ..own import own_scores
from ..point import Point
from ..result import InfluenceScores
from ..scores import Job
from ..solvers import Solver
from .fresh import losses_at
from .ranking import Estimate, areas, bootstrap

__all__ = ["Mislabeled", "mislabel_auc"]

BASELINES = ("loss", "gradient_norm")


def mislabel_auc(
    model: nn.Module,
    objective: Objective,
    train: Any,
    wrong: Sequence[int],
    *,
    own: InfluenceScores | None = None,
    solver: str | Solver = "ekfac",
    damping: float = 0.01,
    batch_size: int | None = None,
) -> Mislabeled:
    """Return how well self-influence tells wrong labels from right ones, beside two baselines.

    The area under the ROC curve of examples ordered by self-influence, by their plain loss, and by
    ‖∇ℓᵢ‖²; a wrong label is a positive. Self-influence is of use only where it does better than
    the other two, which cost next to nothing.

    Args:
        model: The model that was trained with the wrong labels; it is left as it was.
        objective: What training minimised.
        train: The dataset, wrong labels and all.
        wrong: Dataset indices whose label is known to be wrong.
        own: `self_influence` of the same, or any other scores with one row of which more is
            odder; None computes it with the arguments below.
        solver: See `self_influence`.
        damping: See there.
        batch_size: See there.

    Returns:
        Three areas with intervals.

    Raises:
        ArgumentError: If an index does not exist, all or none are wrong, or ``own`` lacks a row.
    """
    data = as_indexed(train, "train")
    objective = as_objective(objective)
    if own is None:
        job = Job(objective, data, data, solver=solver, damping=damping, batch_size=batch_size)
        own = own_scores(model, job)
    positive = _positive(own, wrong, len(data))
    losses, norms = _baselines(model, objective, data, own.indices, batch_size)
    scores = {"self_influence": own.values[0].double().cpu(), "loss": losses}
    return Mislabeled({**scores, "gradient_norm": norms}, positive, own.indices)


@dataclass(frozen=True, eq=False)
class Mislabeled:
    """What tells wrong labels from right ones.

    Args:
        scores: By name, ``[example]``: ``self_influence``, ``loss``, ``gradient_norm``.
        wrong: Boolean ``[example]``.
        indices: Dataset index of each.
        draws: Resamples of intervals.
    """

    scores: dict[str, Tensor]
    wrong: Tensor
    indices: tuple[int, ...]
    draws: int = 1000

    @cached_property
    def areas(self) -> dict[str, Estimate]:
        """By name: 1 where every wrong label stands above every right one, 0.5 for chance.

        Intervals resample wrong and right examples apart.
        """
        return {name: self._estimate([name]) for name in self.scores}

    @property
    def auc(self) -> Estimate:
        """Of self-influence."""
        return self.areas["self_influence"]

    def margin(self, baseline: str) -> Estimate:
        """Return how much larger self-influence's area is than a baseline's, resampled together.

        Args:
            baseline: ``"loss"`` or ``"gradient_norm"``.

        Returns:
            The difference; positive speaks for self-influence.

        Raises:
            ArgumentError: If there is no such baseline.
        """
        if baseline not in BASELINES:
            raise ArgumentError.of(
                "baseline", expected=f"one of {BASELINES}", got=repr(baseline), do="Pass one."
            )
        return self._estimate(["self_influence", baseline])

    def _estimate(self, names: list[str]) -> Estimate:
        wrong, right = (w.nonzero()[:, 0] for w in (self.wrong, ~self.wrong))

        def value(places: list[Tensor]) -> Tensor:
            drawn = torch.cat([wrong[places[0]], right[places[1]]], 1)
            found = [areas(self.scores[n][drawn], self.wrong[drawn]) for n in names]
            return found[0] if len(found) == 1 else found[0] - found[1]

        return bootstrap(value, [len(wrong), len(right)], self.draws)

    def reading(self) -> Reading:
        """Return the areas as panels.

        Returns:
            A scalar for each, and the ``scores`` of self-influence.
        """
        said: dict[str, Any] = {"sign": "1 is best, 0.5 is chance", "wrong": int(self.wrong.sum())}
        panels = {
            name: scalar(found.mean, interval=[found.low, found.high], **said)
            for name, found in self.areas.items()
            if not math.isnan(found.mean)
        }
        coords = {"train_example": self.indices}
        scores = Panel(self.scores["self_influence"], ("train_example",), coords, "1", said)
        return {**panels, "scores": scores}


def _positive(own: InfluenceScores, wrong: Sequence[int], size: int) -> Tensor:
    if len(own.values) != 1:
        raise ArgumentError.of(
            "own", expected="one row", got=len(own.values), do="Pass self_influence(…)."
        )
    bad = {int(i) for i in wrong}
    found = torch.tensor([i in bad for i in own.indices])
    if not bad or min(bad) < 0 or max(bad) >= size or bool(found.all()) or not bool(found.any()):
        raise ArgumentError.of(
            "wrong",
            expected=f"dataset indices from 0 to {size - 1} of some, not all, scored examples",
            got=f"{sorted(bad)[:4]} …" if len(bad) > 4 else sorted(bad),
            do="Pass indices, not a mask.",
        )
    return found


def _baselines(
    model: nn.Module, objective: Objective, data: Any, indices: Sequence[int], size: int | None
) -> tuple[Tensor, Tensor]:
    with untouched(model) as plain:
        point = Point(plain)
        batches = chunks(data, indices, size, point)
        losses = losses_at(point, objective.example_losses, batches)
        rows = loss_gradients(point, objective, data, indices, size)
        norms = [part.square().sum(1).cpu() for part in rows]
    return losses, torch.cat(norms)
