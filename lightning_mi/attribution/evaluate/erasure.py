"""Comprehensiveness and sufficiency: what is lost without, and with only, the highest scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...measurement import describe
from ...target import TargetLike
from ...task import Task
from ..baselines import Baseline, Keep
from ..result import Attribution
from .judged import Removing
from .methods import Explanation, method_name
from .ranking import beside_chance, check_counts, ranks, undefined
from .result import Evaluation
from .stage import Follow, Stage, staged

__all__ = ["Comprehensiveness", "Sufficiency", "comprehensiveness", "sufficiency"]

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""The usual shares of units (DeYoung et al. 2020)."""


def comprehensiveness(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "probability",
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Return F(x) − F(x without the ⌈q·n⌉ highest scored units), averaged over the shares q.

    The area over the perturbation curve of ERASER (DeYoung et al. 2020). Higher is better: the
    answer needs what is scored highest. A unit is a feature, a pixel with all its channels or a
    token.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        explanation: An `Attribution`, a tensor of scores, or a method such as ``Saliency()``.
        target: What is asked; None asks what the explanation was about.
        shares: Shares q of the units, each in (0, 1].
        baseline: What removed units become; None is zero (for ids the zero vector; or pass the id
            of the mask or padding token).
        keep: Tokens that are never removed: ids, or a boolean mask. Padding never is.
        follow: ``"probability"`` follows the probability of the token or class asked about,
            ``"target"`` the target itself, as do targets that are not about one token alone.
        draws: Number of random attributions beside it.
        seed: Of ties and random orders.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One number for each example, in units of the answer; ``curve`` holds F(x) − F(…) for each
        share.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> scores = torch.tensor([[3.0, 1.0]])
        >>> comprehensiveness(model, torch.ones(1, 2), scores, shares=[0.5]).values.item()
        3.0
    """
    with staged(
        model, inputs, explanation, target, baseline=baseline, keep=keep, follow=follow, task=task
    ) as (stage, scores):
        return _erased(stage, scores, "comprehensiveness", baseline, shares, (draws, seed))


def sufficiency(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "probability",
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Return F(x) − F(x with only the ⌈q·n⌉ highest scored units), averaged over the shares q.

    Lower is better: what is scored highest is enough for the answer (DeYoung et al. 2020).

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        explanation: An `Attribution`, a tensor of scores, or a method such as ``Saliency()``.
        target: What is asked; None asks what the explanation was about.
        shares: Shares q of the units, each in (0, 1].
        baseline: What the other units become; as in `comprehensiveness`.
        keep: Tokens that are never removed: ids, or a boolean mask. Padding never is.
        follow: As in `comprehensiveness`.
        draws: Number of random attributions beside it.
        seed: Of ties and random orders.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        As `comprehensiveness`.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> scores = torch.tensor([[3.0, 1.0]])
        >>> sufficiency(model, torch.ones(1, 2), scores, shares=[0.5]).values.item()
        1.0
    """
    with staged(
        model, inputs, explanation, target, baseline=baseline, keep=keep, follow=follow, task=task
    ) as (stage, scores):
        return _erased(stage, scores, "sufficiency", baseline, shares, (draws, seed))


@dataclass(frozen=True, eq=False, kw_only=True)
class Comprehensiveness(Removing):
    """`comprehensiveness` of a method on the measured batch; records as for `Judged`.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        shares: Shares of the units.
        baseline: What removed units become.
        keep: Ids of tokens that are never removed.
        follow: What is followed.
        draws: Number of random attributions.
        seed: Of ties and random orders.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "comprehensiveness"
    shares: Sequence[float] = SHARES

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check_shares(self.shares)

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `comprehensiveness`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            The evaluation.
        """
        options = {**self.removal, "shares": self.shares}
        return comprehensiveness(model, batch, scores, target, task=task, **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sufficiency(Comprehensiveness):
    """`sufficiency` of a method; records and arguments as for `Comprehensiveness`."""

    name: str = "sufficiency"

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `sufficiency`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            The evaluation.
        """
        options = {**self.removal, "shares": self.shares}
        return sufficiency(model, batch, scores, target, task=task, **options)


Measure = Literal["comprehensiveness", "sufficiency"]


def _erased(
    stage: Stage,
    scores: Attribution | Tensor,
    measure: Measure,
    baseline: Baseline,
    shares: Sequence[float],
    numbers: tuple[int, int],
) -> Evaluation:
    draws, seed = numbers
    check_counts(draws=draws, seed=seed)
    _check_shares(shares)
    units = stage.units(scores.values if isinstance(scores, Attribution) else scores)
    wanted = torch.tensor(list(shares), dtype=torch.float64, device=units.device)
    # 0.2 · 5 is a little more than 1 in floating point: it must not become 2.
    first = (wanted[:, None] * stage.free.sum(1) - 1e-9).ceil().long().clamp(min=1)
    lost = undefined(units, stage.free)
    whole = stage.now()

    def drops(by: Tensor) -> Tensor:
        place = ranks(by.nan_to_num(0.0), stage.free, seed)
        among = place < first[..., None]
        kept = ~among if measure == "comprehensiveness" else among | ~stage.free
        return (whole - stage.answers(kept)).t().masked_fill(lost[:, None], float("nan"))

    found = beside_chance(stage, units, draws, seed, drops)
    chance = torch.stack(found["random"]) if draws else None
    late = found.get("recency")
    return Evaluation(
        name=measure,
        values=found["scores"].mean(1),
        higher_is_better=measure == "comprehensiveness",
        unit=stage.unit,
        random=None if chance is None else chance.mean(2),
        recency=None if late is None else late.mean(1),
        convention={
            "follows": stage.unit,
            "method": method_name(scores),
            "baseline": "zero" if baseline is None else describe(baseline),
            "shares": list(shares),
            "seed": seed,
        },
        fractions=wanted.cpu(),
        curve=found["scores"],
        random_curve=None if chance is None else chance.mean(0),
        recency_curve=late,
    )


def _check_shares(shares: Sequence[float]) -> None:
    if not len(shares) or any(not 0 < share <= 1 for share in shares):
        raise ArgumentError.of(
            "shares", expected="numbers above 0 and up to 1", got=list(shares), do="Pass [0.2]."
        )
