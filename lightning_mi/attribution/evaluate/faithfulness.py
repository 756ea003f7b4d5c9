"""Infidelity: do the scores predict what a change of the inputs does (Yeh et al. 2019)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

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
from .ranking import check_counts, recency, shuffles, undefined
from .result import Evaluation
from .stage import Follow, Stage, staged

__all__ = ["Change", "Infidelity", "infidelity"]

Change: TypeAlias = Literal["removal", "gaussian"]
"""How the inputs are changed."""


def infidelity(
    model: nn.Module,
    inputs: Any,
    explanation: Explanation,
    target: TargetLike = None,
    *,
    change: Change = "removal",
    scale: float = 0.1,
    samples: int = 64,
    optimal: bool = False,
    baseline: Baseline = None,
    keep: Keep = None,
    follow: Follow = "target",
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Return E_I[(Iᵀφ − (F(x) − F(x − I)))²], the mean over random changes I of the inputs.

    ``"removal"`` puts the baseline x′ in place of each unit with probability ½, so I is x − x′
    there; a unit is a feature, a pixel with all its channels or a token. ``"gaussian"`` draws I
    from N(0, σ²), σ = ``scale`` · (max x − min x) of the example.

    Scores φ of two kinds exist. A gradient says what a change of one unit does, and Iᵀφ is meant
    as written. Integrated gradients and others add up to F(x) − F(x′): for them I is first divided
    by x − x′ (captum's ``multiply_by_inputs``), so that removal simply adds up the scores of what
    was removed. An `Attribution` knows its kind by its unit; a tensor is taken to be of the second
    kind. Where there is one score for a token, or one for all channels of a pixel, removal adds
    them up in any case, and ``"gaussian"`` is refused.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        explanation: An `Attribution`, a tensor of scores, or a method such as ``Saliency()``.
        target: What is asked; None asks what the explanation was about.
        change: ``"removal"`` or ``"gaussian"``.
        scale: Of the Gaussian changes, relative to the range of the example.
        samples: Number of changes.
        optimal: Scale φ by β = Σ_I (Iᵀφ)(F(x) − F(x − I)) / Σ_I (Iᵀφ)² first, for each example:
            scores that are right up to a factor then have no infidelity.
        baseline: x′; None is zero.
        keep: Tokens that are never removed: ids, or a boolean mask. Padding never is.
        follow: ``"target"``: F is the target itself; ``"probability"`` as in `deletion`.
        draws: Number of random attributions (the same scores in random places) beside it.
        seed: Of changes and random attributions.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One number for each example, in squared units of F; lower is better. For tokens beside
        that of the attribution that knows the position alone, optimally scaled.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> gradient = lambda model, x, target: model.weight * x
        >>> bool(infidelity(model, torch.ones(1, 3), gradient).values < 1e-10)
        True
    """
    _check(change, scale, samples)
    check_counts(draws=draws, seed=seed)
    with staged(
        model, inputs, explanation, target, baseline=baseline, keep=keep, follow=follow, task=task
    ) as (stage, scores):
        options = (change, scale, samples, optimal, draws, seed)
        return _judged(stage, scores, options, baseline)


@dataclass(frozen=True, eq=False, kw_only=True)
class Infidelity(Removing):
    """`infidelity` of a method on the measured batch; records as for `Judged`.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        change: ``"removal"`` or ``"gaussian"``.
        scale: Of the Gaussian changes.
        samples: Number of changes.
        optimal: Whether the scores are scaled first.
        baseline: What removed units become.
        keep: Ids of tokens that are never removed.
        follow: What F is.
        draws: Number of random attributions.
        seed: Of changes and random attributions.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "infidelity"
    follow: Follow = "target"
    change: Change = "removal"
    scale: float = 0.1
    samples: int = 64
    optimal: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check(self.change, self.scale, self.samples)

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `infidelity`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            The evaluation.
        """
        return infidelity(
            model,
            batch,
            scores,
            target,
            change=self.change,
            scale=self.scale,
            samples=self.samples,
            optimal=self.optimal,
            task=task,
            **self.removal,
        )


def _judged(
    stage: Stage,
    given: Attribution | Tensor,
    options: tuple[Change, float, int, bool, int, int],
    baseline: Baseline,
) -> Evaluation:
    change, scale, samples, optimal, draws, seed = options
    scores = stage.parts(given.values if isinstance(given, Attribution) else given)
    local = isinstance(given, Attribution) and given.unit.endswith("per unit")
    lost = undefined(scores.sum(-1), stage.free)
    variants = torch.stack([scores, *_moved(stage, scores, draws, seed)])
    if change == "removal":
        predicted, effects = _removed(stage, variants, local, samples, seed)
    else:
        predicted, effects = _shaken(stage, variants, local, (scale, samples, seed))
    found = _squared(predicted, effects, optimal).masked_fill(lost, float("nan"))
    late = None
    if stage.entry.is_tokens:  # Places have no unit, so they are always scaled.
        places = recency(stage)[None, :, :, None]
        late = _squared(*_removed(stage, places, False, samples, seed), True)[0]
    return Evaluation(
        name="infidelity",
        values=found[0],
        higher_is_better=False,
        unit=f"({stage.unit})²",
        random=found[1:] if draws else None,
        recency=late,
        convention={
            "follows": stage.unit,
            "method": method_name(given),
            "scores": "change for a unit change" if local else "add up to the change",
            "change": change if change == "removal" else f"gaussian, {scale} of the range",
            "optimal_scale": optimal,
            "baseline": "zero" if baseline is None else describe(baseline),
            "samples": samples,
            "seed": seed,
        },
    )


def _moved(stage: Stage, scores: Tensor, draws: int, seed: int) -> list[Tensor]:
    """Return the same scores in random places, the channels of a unit together."""
    orders = shuffles(stage.free, draws, seed)
    return [scores.gather(1, order[..., None].expand_as(scores)) for order in orders]


def _removed(
    stage: Stage, variants: Tensor, local: bool, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((samples, *stage.free.shape), generator=generator) < 0.5
    gone = drawn.to(stage.free.device) & stage.free
    way = stage.parts(stage.point - stage.start)
    whole = local and way.shape == variants.shape[1:]
    each = (variants * way if whole else variants).sum(-1)
    predicted = torch.einsum("seu,veu->vse", gone.double(), each)
    return predicted, (stage.now() - stage.answers(~gone)).double()


def _shaken(
    stage: Stage, variants: Tensor, local: bool, numbers: tuple[float, int, int]
) -> tuple[Tensor, Tensor]:
    scale, samples, seed = numbers
    point, generator = stage.point, torch.Generator().manual_seed(seed)
    way = stage.parts(point - stage.start)
    if stage.entry.is_tokens or variants.shape[1:] != way.shape:
        raise ArgumentError.of(
            "change",
            expected='"removal" for scores of whole tokens or pixels',
            got='"gaussian"',
            do='Pass change="removal", or scores shaped like the inputs.',
        )
    phi = variants if local else torch.where(way == 0, 0.0, variants / way)
    rows = point.flatten(1)
    spread = scale * (rows.amax(1) - rows.amin(1)).view(-1, *[1] * (point.ndim - 1))
    spread = spread * stage.spread(stage.free)
    predicted = []

    def shake(part: slice) -> Tensor:
        # One at a time, so that the numbers do not depend on how many fit into one pass.
        drawn = [
            torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point) * spread
            for _ in range(part.stop - part.start)
        ]
        for noise in drawn:
            predicted.append((phi * stage.parts(noise)).sum((-1, -2)))
        return point - torch.stack(drawn)

    effects = (stage.now() - stage.at(shake, samples)).double()
    return torch.stack(predicted, 1), effects


def _squared(predicted: Tensor, effects: Tensor, optimal: bool) -> Tensor:
    """Return the mean over samples of (β·predicted − effect)², ``[variant, example]``."""
    if optimal:
        size = predicted.square().sum(1, keepdim=True)
        beta = (predicted * effects).sum(1, keepdim=True) / size.where(size > 0, 1.0)
        predicted = beta * predicted
    return (predicted - effects).square().mean(1)


def _check(change: str, scale: float, samples: int) -> None:
    check_counts(samples=samples)
    if change not in get_args(Change):
        raise ArgumentError.of(
            "change", expected=f"one of {list(get_args(Change))}", got=repr(change), do="Choose."
        )
    if not isinstance(scale, int | float) or not scale > 0:
        raise ArgumentError.of(
            "scale", expected="a positive number", got=repr(scale), do="Pass 0.1: a tenth."
        )
