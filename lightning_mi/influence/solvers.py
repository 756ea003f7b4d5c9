"""Solving (H̄ + λI) s = g: `CG`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "CG",
    "Inverse",
    "Product",
    "Solution",
    "Solver",
    "prepared",
    "relative",
    "residual_of",
]

Product: TypeAlias = Callable[[Tensor], Tensor]
"""``[vector, P] -> [vector, P]``, symmetric."""

CONVERGED = "converged"
NEGATIVE = "non-positive curvature"
LIMIT = "iteration limit"
APPROXIMATE = "approximation"
DIVERGED = "diverged"
NOT_COMPUTED = "not computed: the solver replaces the curvature by another matrix"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Args:
        vectors: s, shape ``[query, P]``.
        residual: ‖g − (H̄ + λI) s‖ / ‖g‖ of each query, computed anew; 0 where g = 0.
        stopped: Why the solver stopped, for each query.
        details: What else there is to know, plain JSON.
        covered: Part of the parameters that the solver looks at; the others count as fixed.
        residual_from: How the residual was found.
    """

    vectors: Tensor
    residual: Tensor
    stopped: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    covered: float = 1.0
    residual_from: str = "one more product with the curvature"

    @classmethod
    def approximate(
        cls, vectors: Tensor, reason: str, details: Mapping[str, Any], covered: float = 1.0
    ) -> Solution:
        """Return a solution whose residual nobody computed.

        Args:
            vectors: s.
            reason: Why there is none.
            details: Plain JSON.
            covered: Part of the parameters.

        Returns:
            The solution, with NaN for residuals.
        """
        unknown = torch.full_like(vectors[:, 0], float("nan"))
        return cls(vectors, unknown, (reason,) * len(vectors), details, covered, NOT_COMPUTED)


Inverse: TypeAlias = Callable[[Tensor], Solution]
"""Right-hand sides ``[query, P]`` to their solution."""


@runtime_checkable
class Solver(Protocol):
    """Anything that solves a symmetric system given by products."""

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return s with product(s) ≈ right.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """


def prepared(solver: Solver, product: Product) -> Inverse:
    """Do the part of the work that all right-hand sides share.

    Args:
        solver: A solver; one with a method ``prepare`` is prepared.
        product: v ↦ (H̄ + λI) v.

    Returns:
        A function of right-hand sides.
    """
    prepare = getattr(solver, "prepare", None)
    found: Inverse = partial(solver.solve, product) if prepare is None else prepare(product)
    return found


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel 1952), all queries in step, sharing forward passes.

    A query is done when ‖r‖ ≤ rtol · ‖g‖. Where pᵀAp ≤ 0 the matrix is not positive definite and
    the query stops with what it has (NaN if that is nothing): raise the damping, or use the
    Gauss-Newton matrix.

    Args:
        rtol: Relative residual at which to stop.
        max_iterations: Products at most.
        preconditioner: An approximate inverse, positive definite, for example ``EKFAC()``. The
            better it is the fewer products are needed; a poor one needs more than none.
    """

    rtol: float = 1e-6
    max_iterations: int = 200
    preconditioner: Solver | None = None

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return s with product(s) ≈ right.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        close = _identity if self.preconditioner is None else self._close(product)
        found, rest = torch.zeros_like(right), right.clone()
        near = close(rest)
        way, slope = near.clone(), (rest * near).sum(1)
        squared = rest.square().sum(1)
        goal = self.rtol**2 * squared
        stopped = [CONVERGED if s == 0 else LIMIT for s in squared.tolist()]
        active = squared > 0
        for _ in range(self.max_iterations):
            if not bool(active.any()):
                break
            now = active.nonzero()[:, 0]
            pushed = product(way[now])
            bent = (way[now] * pushed).sum(1)
            good = bent > 0  # False for NaN too.
            for q in now[~good].tolist():
                stopped[q], active[q] = NEGATIVE, False
            now, pushed, bent = now[good], pushed[good], bent[good]
            length = (slope[now] / bent)[:, None]
            found[now] += length * way[now]
            rest[now] -= length * pushed
            near = close(rest[now])
            new = (rest[now] * near).sum(1)
            way[now] = near + (new / slope[now])[:, None] * way[now]
            slope[now] = new
            for q in now[rest[now].square().sum(1) <= goal[now]].tolist():
                stopped[q], active[q] = CONVERGED, False
        for q, reason in enumerate(stopped):
            if reason == NEGATIVE and not bool(found[q].any()):
                found[q] = float("nan")
        return Solution(found, residual_of(product, found, right), tuple(stopped))

    def _close(self, product: Product) -> Callable[[Tensor], Tensor]:
        if self.preconditioner is None:
            return _identity
        inverse = prepared(self.preconditioner, product)
        return lambda rest: inverse(rest).vectors.to(rest)


def _identity(rest: Tensor) -> Tensor:
    return rest


def residual_of(product: Product, found: Tensor, right: Tensor) -> Tensor:
    """Return ‖g − A s‖ / ‖g‖ of each right-hand side, computed anew.

    Args:
        product: A.
        found: s.
        right: g.

    Returns:
        Shape ``[query]``.
    """
    if not bool(right.any()):
        return torch.zeros_like(right[:, 0])
    return relative((right - product(found)).norm(dim=1), right)


def relative(rest: Tensor, right: Tensor) -> Tensor:
    """Return lengths relative to those of right-hand sides, 0 where these are 0.

    Args:
        rest: Lengths ``[query]``.
        right: Right-hand sides ``[query, P]``.

    Returns:
        Shape ``[query]``.
    """
    whole = right.norm(dim=1)
    return torch.where(whole > 0, rest / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
