"""What the measurements of this package share: the method, its scores, its target."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...measurement import Context, Measurement
from ...record import Reading
from ...target import TargetLike, TargetOption
from ...task import Task
from ..baselines import Baseline
from ..gradients import Saliency
from ..result import Attribution
from .methods import matching, measured, task_for
from .ranking import check_counts
from .result import Evaluation
from .stage import Follow, check_follow

__all__ = ["Judged", "Removing"]

METHOD = Saliency()
"""What is judged where no method is named."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """Base of measurements that judge the scores of a method on the measured batch.

    Records ``values`` ``[example]`` and the scalars ``mean``, ``margin`` (how much better than
    random; its 95 % interval is in the convention), ``random``, for tokens ``recency`` and
    ``recency_margin``, each with ``…_stderr``.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``. Where it explains the first
            examples alone, they are
            what is judged.
        name: First part of the records' names.
        target: What is asked; None takes the method's target.
        draws: Number of random attributions beside it.
        seed: Of everything that is drawn.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    # Not a default of its own: parsers of YAML refuse one where the type is a protocol.
    method: Measurement | None = None
    name: str = "evaluation"
    target: TargetOption | TargetLike = None
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_counts(draws=self.draws, seed=self.seed)

    @property
    def judged(self) -> Measurement:
        """The method."""
        return self.method or METHOD

    @abstractmethod
    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call the function of the measure.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: What the method gave.
            target: What was asked.
            task: Runs the model.

        Returns:
            The evaluation.
        """

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            The measure, and what chance gives.
        """
        method = self.judged
        scores = measured(method, model, context, self.target)
        target = self.target if self.target is not None else asked_of(method, scores)
        batch = matching(context.batch, scores)
        task = task_for(method, context, model, self.target)
        return self.judge(model, batch, scores, target, task).reading()


@dataclass(frozen=True, eq=False, kw_only=True)
class Removing(Judged):
    """Base of measurements that put a baseline in place of units.

    Args:
        baseline: What removed units become: None is zero, or for ids an id or vectors.
        keep: Ids of tokens that are never removed.
        follow: ``"probability"`` or ``"target"``: what is followed.
    """

    baseline: Baseline = None
    keep: list[int] | None = None
    follow: Follow = "probability"

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_follow(self.follow)

    @property
    def removal(self) -> dict[str, Any]:
        """Arguments that the functions of these measures share."""
        return {
            "baseline": self.baseline,
            "keep": self.keep,
            "follow": self.follow,
            "draws": self.draws,
            "seed": self.seed,
        }


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
