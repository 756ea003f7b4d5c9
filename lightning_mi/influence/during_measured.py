"""Influence while a model trains, with the curvature that training itself shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import counted
from ..errors import ArgumentError
from ..measurement import Context
from ..record import Reading
from ..target import TargetOption
from .data import Candidates, as_indexed, chosen, chunks
from .during_factors import TrainingFactors
from .objective import Objective
from .per_example import gradient_dots
from .point import Point
from .queries import QueryLike, orientation_of, queries_of, question_gradients
from .result import InfluenceScores
from .scores import shares_of_queries
from .shown import shown_panels
from .solvers import NOT_COMPUTED
from .trajectory import firing_cost

__all__ = ["FACTORS", "TrainingInfluence"]

FACTORS = ("influence", "training factors")
"""Where the monitor leaves the factors in the context, with the norm of the batch's gradient."""


@dataclass(frozen=True)
class TrainingInfluence:
    """Influence of training examples at each firing, by K-FAC or EK-FAC of the latest batches.

    ``score[q, i] = +(1/n) ∇ℓᵢᵀ (F̂ + λI)⁻¹ ∇L_q`` with F̂ from `TrainingFactors`: gathered from the
    backward passes of training, none of its own. λ is one number for all steps, so that scores
    compare over them. Long before a minimum the number is no estimate of retraining; what it ranks
    is first-order influence in the metric of the curvature. Reading as `TracIn`. Needs
    `lightning_mi.callbacks.InfluenceMonitor`, which gathers the factors.

    Args:
        name: First part of the records' names.
        method: ``"kfac"`` or ``"ekfac"``.
        damping: λ > 0.
        candidates: Training examples that are scored: None for all, a number drawn by ``seed``, or
            dataset indices.
        queries: How many examples of the batch are asked about, from its first on.
        query: The scalar asked about, or a `Question`; None is the task's loss.
        top: Proponents and opponents that are shown.
        seed: Of the draw.
        batch_size: Examples run at once; None follows from their shape.

    Raises:
        ArgumentError: If a number is out of range.
    """

    name: str = "influence_function"
    method: str = "kfac"
    damping: float = 0.01
    candidates: Candidates = None
    queries: int = 1
    query: TargetOption | QueryLike = None
    top: int = 5
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        counted("queries", self.queries, 1)
        counted("top", self.top)
        if self.method not in ("kfac", "ekfac"):
            raise ArgumentError.of(
                "method", expected='"kfac" or "ekfac"', got=repr(self.method), do="Choose one."
            )
        if not self.damping > 0:
            raise ArgumentError.of(
                "damping",
                expected="more than 0: factors of a few batches have no full rank",
                got=self.damping,
                do="For example damping=0.01.",
            )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The model.
            context: Batch of queries, training data by index, and the factors.

        Returns:
            The panels named above; scores are NaN, with a reason, before the first step.
        """
        data = as_indexed(context.dataset, "dataset")
        goal, point = Objective(context.task), Point(model)
        queried = queries_of(context, self.query, self.queries)
        asked = question_gradients(point, goal, self.query, queried, self.batch_size)
        indices = chosen(self.candidates, len(data), self.seed)
        factors, norm = context.shared(FACTORS, _missing)
        facts: dict[str, Any] = {
            "solver": self.method,
            "scale": "1/n",
            "absent": dict.fromkeys(("residual", "residual_from"), NOT_COMPUTED),
        }
        common = (tuple(indices), len(data), "influence function")
        if not factors.batches:
            values = torch.full((len(asked.gradients), len(indices)), torch.nan)
            reason = {"reason": "no training step has been seen yet, so no curvature is known"}
            known = {**facts, **asked.known, **reason}
            empty = InfluenceScores(values, *common, damping=self.damping, details=known)
            return empty.reading()
        solution = factors.inverse()(asked.gradients)
        vectors = solution.vectors / len(data)
        batches = chunks(data, indices, self.batch_size, point)
        values = gradient_dots(point, goal.example_losses, batches, vectors).T
        tokens = shares_of_queries(point, goal, data, indices, values[:1], vectors[:1], self.top)
        result = InfluenceScores(
            values.cpu(),
            *common,
            tokens,
            None,
            (),
            norm,
            float(asked.gradients.norm(dim=1).mean()),
            self.damping,
            details={
                **facts,
                **solution.details,
                **asked.known,
                "parameters_covered": solution.covered,
                "gradient_norm_of": "the latest batch",
            },
        )
        result = dataclasses.replace(result, orientation=orientation_of(self.query))
        return {**result.reading(), **shown_panels(result, context, data, self.top)}

    def cost(self, available: int = 0) -> int:
        """Return what a firing costs, in forward and backward passes of one example.

        Args:
            available: Length of the dataset, counted where ``candidates`` is None.

        Returns:
            Candidates, queries, the shown examples twice, and a few more.
        """
        return firing_cost(self.candidates, self.queries, self.top, available)


def _missing() -> tuple[TrainingFactors, float | None]:
    raise ArgumentError.of(
        "TrainingInfluence",
        expected="factors that InfluenceMonitor gathers while the model trains",
        got="none: this model is not being trained",
        do='Use InfluenceFunction(solver="ekfac") at checkpoints and in notebooks.',
    )
