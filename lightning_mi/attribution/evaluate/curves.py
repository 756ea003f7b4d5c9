"""Deletion and insertion: the model's answer while the most important units go, or come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement import describe
from ...target import TargetLike
from ...task import Task
from ..baselines import Baseline, Keep
from ..result import Attribution
from .judged import Removing
from .methods import Explanation, method_name
from .ranking import beside_chance, check_counts, counts, ranks, undefined
from .result import Evaluation
from .stage import Follow, Stage, staged

__all__ = ["Deletion", "Insertion", "deletion", "insertion"]


def deletion(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "probability",
    steps: int = 16,
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Remove the highest scored units first and follow the model's answer (Petsiuk et al. 2018).

    A unit is a feature, a pixel with all its channels, or a token; the scores of a pixel's
    channels are added up. At share k/q of the units, k = 0 … q, F(share) is the answer with the
    first ⌊share · n + ½⌋ of n units replaced by the baseline. The area is ∫₀¹ F by the trapezoid
    rule over the shares that were really removed; lower is better.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        explanation: An `Attribution`, a tensor of scores, or a method such as ``Saliency()``.
        target: What is asked; None asks what the explanation was about.
        baseline: What removed units become; None is zero (for ids the zero vector; or pass the id
            of the mask or padding token).
        keep: Tokens that are never removed: ids, or a boolean mask. Padding never is.
        follow: ``"probability"`` follows the probability of the token or class asked about,
            ``"target"`` the target itself, as do targets that are not about one token alone.
        steps: Number q of steps.
        draws: Number of random attributions (the same scores in random order) beside it.
        seed: Of ties and random orders.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Areas in units of the answer with curves ``[example, step]``, those of random orders, and
        for tokens those of the order by position, latest first.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> found = deletion(model, torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), steps=2)
        >>> found.curve.tolist(), found.values.item()
        ([[4.0, 1.0, 0.0]], 1.5)
    """
    check_counts(steps=steps, draws=draws, seed=seed)
    with staged(
        model, inputs, explanation, target, baseline=baseline, keep=keep, follow=follow, task=task
    ) as (stage, scores):
        return _curves(stage, scores, "deletion", baseline, (steps, draws, seed))


def insertion(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "probability",
    steps: int = 16,
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Start at the baseline, reveal the highest scored units first (Petsiuk et al. 2018).

    As `deletion`, with F(share) the answer when only the first units have their own value; higher
    is better.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        explanation: An `Attribution`, a tensor of scores, or a method such as ``Saliency()``.
        target: What is asked; None asks what the explanation was about.
        baseline: What units are before they are revealed; as in `deletion`.
        keep: Tokens that are never hidden: ids, or a boolean mask. Padding never is.
        follow: As in `deletion`.
        steps: Number of steps.
        draws: Number of random attributions beside it.
        seed: Of ties and random orders.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        As `deletion`.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> found = insertion(model, torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), steps=2)
        >>> found.curve.tolist(), found.values.item()
        ([[0.0, 3.0, 4.0]], 2.5)
    """
    check_counts(steps=steps, draws=draws, seed=seed)
    with staged(
        model, inputs, explanation, target, baseline=baseline, keep=keep, follow=follow, task=task
    ) as (stage, scores):
        return _curves(stage, scores, "insertion", baseline, (steps, draws, seed))


@dataclass(frozen=True, eq=False, kw_only=True)
class Deletion(Removing):
    """`deletion` of a method on the measured batch.

    Records the areas as ``values`` ``[example]``, the scalars of `Judged`, and ``curve``,
    ``random_curve`` and, for tokens, ``recency_curve`` ``[example, step]``.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        baseline: What removed units become.
        keep: Ids of tokens that are never removed.
        follow: What is followed.
        steps: Number of steps.
        draws: Number of random attributions.
        seed: Of ties and random orders.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "deletion"
    steps: int = 16

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_counts(steps=self.steps)

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `deletion`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            Areas and curves.
        """
        options = {**self.removal, "steps": self.steps}
        return deletion(model, batch, scores, target, task=task, **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class Insertion(Deletion):
    """`insertion` of a method on the measured batch; records and arguments as for `Deletion`."""

    name: str = "insertion"

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `insertion`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            Areas and curves.
        """
        options = {**self.removal, "steps": self.steps}
        return insertion(model, batch, scores, target, task=task, **options)


def _curves(
    stage: Stage,
    scores: Attribution | Tensor,
    way: str,
    baseline: Baseline,
    numbers: tuple[int, int, int],
) -> Evaluation:
    steps, draws, seed = numbers
    units = stage.units(scores.values if isinstance(scores, Attribution) else scores)
    first = counts(stage.free, steps)
    number = stage.free.sum(1)
    lost = undefined(units, stage.free)

    def curve(by: Tensor) -> Tensor:
        place = ranks(by.nan_to_num(0.0), stage.free, seed)
        among = place < first[..., None]  # [step, example, unit]
        kept = ~among if way == "deletion" else among | ~stage.free
        return stage.answers(kept).t().masked_fill(lost[:, None], float("nan"))

    found = beside_chance(stage, units, draws, seed, curve)
    shares = (first / number.clamp(min=1)).t()
    areas = {k: _area(v, shares) for k, v in found.items() if k != "random"}
    chance = [_area(each, shares) for each in found["random"]]
    return Evaluation(
        name=way,
        values=areas["scores"],
        higher_is_better=way == "insertion",
        unit=stage.unit,
        random=torch.stack(chance) if chance else None,
        recency=areas.get("recency"),
        convention={
            "follows": stage.unit,
            "method": method_name(scores),
            "area": "trapezoid over the share of units in [0, 1]",
            "baseline": "zero" if baseline is None else describe(baseline),
            "steps": steps,
            "seed": seed,
        },
        fractions=torch.linspace(0, 1, steps + 1, dtype=torch.float64),
        curve=found["scores"],
        random_curve=torch.stack(found["random"]).mean(0) if chance else None,
        recency_curve=found.get("recency"),
    )


def _area(curve: Tensor, shares: Tensor) -> Tensor:
    return torch.trapezoid(curve, shares.to(curve), dim=1)
