"""Influence functions as a measurement: `InfluenceFunction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checks import counted
from ..measurement import Context
from ..record import Reading
from ..target import TargetOption
from .data import Candidates, as_indexed
from .objective import Objective
from .products import CurvatureKind
from .queries import QueryLike, queries_of
from .scores import Job
from .shown import shown_panels
from .solvers import Solver

__all__ = ["InfluenceFunction"]


@dataclass(frozen=True)
class InfluenceFunction:
    """`influence_scores` of the context's training data for the first examples of its batch.

    For a trained model: the formula assumes a minimum of the objective, and ``gradient_norm`` says
    how far the model is from one. Reading: as `TracIn`, plus ``residual`` of the solver for each
    query and ``gradient_norm``. Positive = proponent; units of the query's loss.

    Args:
        name: First part of the records' names.
        solver: ``"cg"``, ``"direct"`` or a `Solver`.
        curvature: ``"gauss-newton"`` or ``"hessian"``.
        damping: λ, added to the mean curvature.
        candidates: None for all, a number drawn by ``seed``, or dataset indices.
        queries: How many examples of the batch are asked about, from its first on.
        query: The scalar asked about, or a `Question` such as ``Score(…)``, which is asked about
            the whole batch; None is the task's loss.
        regularizer: R(model), a function; None where training had none.
        sample: Training examples that the curvature is averaged over; None takes all.
        top: Proponents and opponents that are shown.
        seed: Of both draws.
        batch_size: Examples run at once; None follows from their shape.

    Raises:
        ArgumentError: If a number is out of range.
    """

    name: str = "influence_function"
    solver: str | Solver = "cg"
    curvature: CurvatureKind = "gauss-newton"
    damping: float = 0.01
    candidates: Candidates = None
    queries: int = 1
    query: TargetOption | QueryLike = None
    regularizer: Any = None
    sample: int | None = None
    top: int = 5
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        counted("queries", self.queries, 1)
        counted("top", self.top)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The trained model.
            context: Batch of queries, training data by index.

        Returns:
            The panels named above.
        """
        data = as_indexed(context.dataset, "dataset")
        job = Job(
            Objective(context.task, regularizer=self.regularizer),
            data,
            queries_of(context, self.query, self.queries),
            query=self.query,
            solver=self.solver,
            curvature=self.curvature,
            damping=self.damping,
            candidates=self.candidates,
            sample=self.sample,
            seed=self.seed,
            shown=self.top,
            batch_size=self.batch_size,
        )
        result = job.run(model)
        return {**result.reading(), **shown_panels(result, context, data, self.top)}
