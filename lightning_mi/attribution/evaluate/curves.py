"""Deletion and insertion: the model's answer while the most important units go, or come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement import Context, Measurement, describe
from ...record import Reading
from ...target import TargetLike, TargetOption
from ...task import Task
from ..baselines import Baseline, Keep
from ..gradients import Saliency
from ..result import Attribution
from .methods import Explanation, measured, method_name
from .ranking import beside_chance, check_counts, counts, ranks, undefined
from .result import Evaluation
from .stage import Of, Stage, staged

__all__ = ["Deletion", "Insertion", "deletion", "insertion"]


def deletion(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    keep: Keep = None,
    of: Of = "probability",
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
        of: ``"probability"`` follows the probability of the token or class asked about,
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
        model, inputs, explanation, target, baseline=baseline, keep=keep, of=of, task=task
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
    of: Of = "probability",
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
        of: As in `deletion`.
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
        model, inputs, explanation, target, baseline=baseline, keep=keep, of=of, task=task
    ) as (stage, scores):
        return _curves(stage, scores, "insertion", baseline, (steps, draws, seed))


@dataclass(frozen=True, eq=False)
class Deletion:
    """`deletion` of a method on the measured batch.

    Records of the areas ``values`` ``[example]``, the scalars ``mean``, ``margin`` (how much
    better than random; its interval is in the convention), ``random``, for tokens ``recency`` and
    ``recency_margin``, and ``curve``, ``random_curve``, ``recency_curve`` ``[example, step]``.

    Args:
        method: Any attribution measurement.
        name: First part of the records' names.
        target: As in `deletion`, as are all below; None takes the method's.
        baseline: What removed units become.
        keep: Ids of tokens that are never removed.
        of: What is followed.
        steps: Number of steps.
        draws: Number of random attributions.
        seed: Of ties and random orders.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    method: Measurement = Saliency()  # noqa: RUF009 (frozen, so it can be shared)
    name: str = "deletion"
    target: TargetOption | TargetLike = None
    baseline: Baseline = None
    keep: list[int] | None = None
    of: Of = "probability"
    steps: int = 16
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_counts(steps=self.steps, draws=self.draws, seed=self.seed)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            Areas, curves and what chance gives.
        """
        return _measured(self, model, context, deletion)


@dataclass(frozen=True, eq=False)
class Insertion:
    """`insertion` of a method on the measured batch; records and arguments as for `Deletion`.

    Args:
        method: Any attribution measurement.
        name: First part of the records' names.
        target: As in `insertion`, as are all below; None takes the method's.
        baseline: What units are before they are revealed.
        keep: Ids of tokens that are never hidden.
        of: What is followed.
        steps: Number of steps.
        draws: Number of random attributions.
        seed: Of ties and random orders.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    method: Measurement = Saliency()  # noqa: RUF009 (frozen, so it can be shared)
    name: str = "insertion"
    target: TargetOption | TargetLike = None
    baseline: Baseline = None
    keep: list[int] | None = None
    of: Of = "probability"
    steps: int = 16
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_counts(steps=self.steps, draws=self.draws, seed=self.seed)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            Areas, curves and what chance gives.
        """
        return _measured(self, model, context, insertion)


def _measured(
    options: Deletion | Insertion, model: nn.Module, context: Context, way: Any
) -> Reading:
    scores = measured(options.method, model, context, options.target)
    target = options.target if options.target is not None else asked_of(options.method, scores)
    found: Evaluation = way(
        model,
        context.batch,
        scores,
        target,
        baseline=options.baseline,
        keep=options.keep,
        of=options.of,
        steps=options.steps,
        draws=options.draws,
        seed=options.seed,
        task=context.task,
    )
    return found.reading()


def asked_of(method: Measurement, scores: Attribution | Tensor) -> TargetLike:
    """Return the method's target where its scores do not say which token they are about.

    Args:
        method: The measurement.
        scores: What it gave.

    Returns:
        The target; None where the scores know it.
    """
    known = isinstance(scores, Attribution) and scores.token is not None
    target: TargetLike = None if known else getattr(method, "target", None)
    return target


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
            "of": stage.unit,
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
