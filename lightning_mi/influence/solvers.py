"""Solving (H̄ + λI) s = g: `CG` and `Direct`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["CG", "Direct", "Solution", "Solver", "as_solver"]

Product: TypeAlias = Callable[[Tensor], Tensor]
"""``[vector, P] -> [vector, P]``, symmetric."""

CONVERGED = "converged"
NEGATIVE = "non-positive curvature"
LIMIT = "iteration limit"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Args:
        vectors: s, shape ``[query, P]``.
        residual: ‖g − (H̄ + λI) s‖ / ‖g‖ of each query, computed anew; 0 where g = 0.
        stopped: Why the solver stopped, for each query.
    """

    vectors: Tensor
    residual: Tensor
    stopped: tuple[str, ...]


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


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel 1952), all queries in step, sharing forward passes.

    A query is done when ‖r‖ ≤ rtol · ‖g‖. Where pᵀAp ≤ 0 the matrix is not positive definite and
    the query stops with what it has (NaN if that is nothing): raise the damping, or use the
    Gauss-Newton matrix.

    Args:
        rtol: Relative residual at which to stop.
        max_iterations: Products at most.
    """

    rtol: float = 1e-6
    max_iterations: int = 200

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return s with product(s) ≈ right.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        found, rest, way = torch.zeros_like(right), right.clone(), right.clone()
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
            length = (squared[now] / bent)[:, None]
            found[now] += length * way[now]
            rest[now] -= length * pushed
            new = rest[now].square().sum(1)
            way[now] = rest[now] + (new / squared[now])[:, None] * way[now]
            squared[now] = new
            for q in now[new <= goal[now]].tolist():
                stopped[q], active[q] = CONVERGED, False
        for q, reason in enumerate(stopped):
            if reason == NEGATIVE and not bool(found[q].any()):
                found[q] = float("nan")
        return Solution(found, _residual(product, found, right), tuple(stopped))


@dataclass(frozen=True)
class Direct:
    """The dense matrix, row by row, and its Cholesky factor; for small models and as a check.

    Where the matrix is not positive definite the reason to stop says so, and the system is solved
    through its eigenvectors, leaving out eigenvalues that are zero to rounding.

    Args:
        max_parameters: Refuse larger models: the matrix has P² entries.
    """

    max_parameters: int = 10_000

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return s with product(s) = right.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.

        Raises:
            ArgumentError: If the model is too large.
        """
        size = right.shape[1]
        if size > self.max_parameters:
            raise ArgumentError.of(
                "solver",
                expected=f"at most {self.max_parameters:,} parameters for a direct solve",
                got=f"{size:,}",
                do='Use solver="cg".',
            )
        matrix = product(torch.eye(size, dtype=right.dtype, device=right.device))
        matrix = (matrix + matrix.T) / 2
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            found = torch.cholesky_solve(right.T, factor).T
        else:
            values, vectors = torch.linalg.eigh(matrix)
            kept = values.abs() > values.abs().max() * size * torch.finfo(values.dtype).eps
            inverse = torch.where(kept, 1 / values, 0)
            found = right @ vectors * inverse @ vectors.T
        reason = NEGATIVE if bool(failed) else CONVERGED
        rest = (right - found @ matrix).norm(dim=1)
        return Solution(found, _relative(rest, right), (reason,) * len(right))


def as_solver(solver: object) -> Solver:
    """Return a solver by name, or the solver itself.

    Args:
        solver: ``"cg"``, ``"direct"``, ``"exact"`` (the same), or a `Solver`.

    Returns:
        The solver.

    Raises:
        ArgumentError: If it is none of these.
    """
    named: dict[object, Solver] = {"cg": CG(), "direct": Direct(), "exact": Direct()}
    if isinstance(solver, str) and solver in named:
        return named[solver]
    if isinstance(solver, Solver) and not isinstance(solver, type):
        return solver
    raise ArgumentError.of(
        "solver",
        expected=f"one of {sorted(map(str, named))}, a Solver such as CG(rtol=1e-8), or an object "
        "with influences(train_idxs, test_idxs)",
        got=repr(solver)[:60],
        do='For example solver="cg".',
    )


def _residual(product: Product, found: Tensor, right: Tensor) -> Tensor:
    if not bool(right.any()):
        return torch.zeros_like(right[:, 0])
    return _relative((right - product(found)).norm(dim=1), right)


def _relative(rest: Tensor, right: Tensor) -> Tensor:
    whole = right.norm(dim=1)
    return torch.where(whole > 0, rest / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
