"""The proximal Bregman response function: what damped influence functions really estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...isolation import untouched
from ...progress import track
from ...target import Loss, TargetLike
from ..choosing import as_solver
from ..data import as_indexed, chosen, chunks, passes
from ..objective import Objective, as_objective
from ..per_example import mean_gradient
from ..point import Point, wide
from ..products import Curvature
from ..queries import orientation_of
from ..result import InfluenceScores
from ..scores import regularizer_gradient
from ..solvers import CONVERGED, LIMIT, Inverse, Solver, prepared
from .fresh import losses_at, query_batches

__all__ = ["pbrf"]

LOSS = Loss()
SHORTEST = 2.0**-20
"""Part of a step below which no smaller one is tried."""

ROUNDING = 1e-15
"""Rise of a value, in parts of it, that says nothing."""

MEMORY = 20
"""Steps that the Hessian is brought up to date with."""


def pbrf(
    model: nn.Module,
    objective: Objective,
    train: Any,
    queries: Any,
    *,
    damping: float = 0.01,
    candidates: int | Sequence[int] = 20,
    query: TargetLike = LOSS,
    solver: str | Solver = "exact",
    rtol: float = 1e-4,
    max_iterations: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> InfluenceScores:
    """Return the changes of queries' losses that damped Gauss-Newton scores linearise.

    For each example i the minimum θᵢ of

    ``(1/n) Σⱼ D(f_θ(xⱼ), f_θₛ(xⱼ)) + D_R(θ, θₛ) + λ/2 ‖θ − θₛ‖² − (1/n) (ℓᵢ(θ) + R(θ))``

    with D the Bregman divergence of the loss in the outputs and D_R that of the regulariser (Bae et
    al. 2022); the value is L_q(θᵢ) − L_q(θₛ). Its Hessian at θₛ is H̄ + λI, whether or not θₛ is a
    minimum of the training loss. That makes it the truth for networks that were not trained to
    convergence, where exact retraining measures luck. Positive = proponent, on the scale of
    `influence_scores`, to which it tends as n grows. Found by the BFGS method, starting from that
    Hessian.

    Args:
        model: The model at θₛ; it is left exactly as it was.
        objective: What training minimised.
        train: The n training examples.
        queries: Examples to ask about.
        damping: λ > 0.
        candidates: Dataset indices, or how many to draw.
        query: What is asked about.
        solver: Inverts the Hessian; ``"cg"`` for models too large for ``"exact"``.
        rtol: Gradient norm at which to stop, relative to that of the first step.
        max_iterations: Steps at most.
        seed: Of the draw.
        batch_size: Examples run at once.
        dtype: Compute in this type: the changes are small differences.

    Returns:
        Scores with method ``"pbrf"``; `agreement` compares others with them. How many of the
        minima were reached is in ``details["converged"]``.

    Raises:
        ArgumentError: If there is no damping, or an index does not exist.
    """
    if not damping > 0:
        raise ArgumentError.of(
            "damping",
            expected="more than 0: the response is not unique without",
            got=damping,
            do="Take the damping of the scores.",
        )
    data, asked = as_indexed(train, "train"), as_indexed(queries, "queries")
    goal = as_objective(objective)
    target = goal.query(query)
    indices = chosen(candidates, len(data), seed)
    values, reasons = [], []
    with untouched(model) as plain:
        point = Point(plain, dtype)
        response = _Response.of(point, goal, data, damping, solver, batch_size)
        batches = list(query_batches(point, goal, target, asked))
        ask = partial(goal.query_losses, query=target)
        before = losses_at(point, ask, batches)
        for index in track(indices, "proximal responses"):
            (example,) = chunks(data, [index], 1, point)
            moved, reached = response.minimum(example, rtol, max_iterations)
            values.append(losses_at(moved, ask, batches) - before)
            reasons.append(CONVERGED if reached else LIMIT)
    return InfluenceScores(
        torch.stack(values, 1),
        tuple(indices),
        len(data),
        "pbrf",
        damping=damping,
        details={
            "converged": sum(r == CONVERGED for r in reasons),
            "candidates": len(indices),
            "query": repr(target),
            "solver": f"BFGS from {solver if isinstance(solver, str) else repr(solver)}",
            "scale": "1/n",
        },
        orientation=orientation_of(query),
    )


@dataclass(frozen=True, eq=False)
class _Response:
    """The proximal objective of a model at θₛ.

    Args:
        point: θₛ.
        objective: Outputs, losses and regulariser.
        batches: The training data.
        outputs: f_θₛ and the slope of the loss there, for each batch.
        own: ∇R(θₛ).
        examples: n.
        damping: λ.
        inverse: Applies (H̄ + λI)⁻¹.
    """

    point: Point
    objective: Objective
    batches: Sequence[Any]
    outputs: Sequence[tuple[Tensor, Tensor]]
    own: Tensor
    examples: int
    damping: float
    inverse: Inverse

    @classmethod
    def of(
        cls,
        point: Point,
        objective: Objective,
        data: Any,
        damping: float,
        solver: str | Solver,
        size: int | None,
    ) -> _Response:
        fresh = passes(data, range(len(data)), size, point)
        batches = list(fresh())
        curvature = Curvature(point, objective, fresh, len(data), damping=damping)
        outputs = [_slope(point, objective, batch) for batch in batches]
        own = regularizer_gradient(point, objective)
        inverse = prepared(as_solver(solver), curvature)
        return cls(point, objective, batches, outputs, own, len(data), damping, inverse)

    def minimum(self, example: Any, rtol: float, most: int) -> tuple[Point, bool]:
        """Return the model at the minimum, and whether it was reached."""
        step = torch.zeros(self.point.size, dtype=wide(self.point.device), device=self.point.device)
        value, slope = self._at(step, example)
        first = float(slope.norm())
        pairs: list[tuple[Tensor, Tensor]] = []
        for _ in range(most):
            if float(slope.norm()) <= rtol * first:
                break
            way = -self._bent(slope, pairs)
            fall, length = float(slope @ way), 1.0
            room = ROUNDING * abs(value)
            tried, new = step, (math.inf, slope)
            while length >= SHORTEST and not new[0] <= value + 1e-4 * length * fall + room:
                tried = step + length * way
                new = self._at(tried, example)
                length /= 2
            if not new[0] <= value + room:
                break
            if float((tried - step) @ (new[1] - slope)) > 0:
                pairs = [*pairs[1 - MEMORY :], (tried - step, new[1] - slope)]
            step, (value, slope) = tried, new
        return self.point.moved(step), float(slope.norm()) <= rtol * first

    def _bent(self, slope: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the slope times an inverse Hessian: that at θₛ, brought up to date by BFGS."""
        rest, shares = slope.clone(), []
        for moved, change in reversed(pairs):
            share = (moved @ rest) / (moved @ change)
            rest -= share * change
            shares.append(share)
        found = self.inverse(rest[None]).vectors[0]
        for (moved, change), share in zip(pairs, reversed(shares), strict=True):
            found = found + (share - (change @ found) / (moved @ change)) * moved
        return found

    def _at(self, step: Tensor, example: Any) -> tuple[float, Tensor]:
        """Return the objective and its gradient at θₛ + step."""
        moved, parts = self.point.moved(step), list(zip(self.batches, self.outputs, strict=True))
        total, slope = 0.0, self.damping * step - self.own
        for batch, (known, tilt) in parts:
            value = moved.call(partial(self._divergence, batch=batch, known=known, tilt=tilt))
            total += float(value.detach()) / self.examples
            slope = slope + moved.flat(moved.gradient(value)) / self.examples

        def removed(model: nn.Module, batch: Any) -> Tensor:
            found = self.objective.example_losses(model, batch)
            rest = self.objective.regularization(model)
            return found if rest is None else found + rest

        loss = float(moved.call(partial(removed, batch=example)).detach().sum())
        pull = mean_gradient(moved, removed, [example]) / self.examples
        ridge = moved.call(self.objective.regularization)
        if ridge is not None:
            total += float(ridge.detach())
            slope = slope + moved.flat(moved.gradient(ridge))
        total += float(self.damping * step.square().sum() / 2 - self.own @ step)
        return total - loss / self.examples, slope - pull

    def _divergence(self, model: nn.Module, batch: Any, known: Tensor, tilt: Tensor) -> Tensor:
        """Return Σ D without the part that does not depend on θ."""
        outputs = self.objective.outputs(model, batch)
        losses = self.objective.losses(outputs, batch).sum()
        return losses - (tilt * (outputs - known)).sum()


def _slope(point: Point, objective: Objective, batch: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and the loss's slope in them."""
    with torch.no_grad():
        outputs = point.call(partial(objective.outputs, batch=batch))
    free = outputs.detach().requires_grad_()
    (tilt,) = torch.autograd.grad(objective.losses(free, batch).sum(), free)
    return outputs.detach(), tilt
