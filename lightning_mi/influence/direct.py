"""Solving (H̄ + λI) s = g with the whole matrix: `Direct`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from .dense import gauss_newton
from .outputs import FEW
from .products import Curvature
from .solvers import CONVERGED, NEGATIVE, Inverse, Product, Solution, relative

__all__ = ["Direct"]


@dataclass(frozen=True)
class Direct:
    """The whole matrix and its Cholesky factor; the most exact solver, and for small models fast.

    The Gauss-Newton matrix of up to `FEW` outputs is made of layer inputs and output gradients;
    any other row by row. Where the matrix is not positive definite the reason to stop says so, and
    the system is solved through its eigenvectors, leaving out eigenvalues that are zero to
    rounding.

    Args:
        max_parameters: Refuse larger models: the matrix has P² entries.
    """

    max_parameters: int = 10_000

    def prepare(self, product: Product) -> Inverse:
        """Make the matrix and factorise it once.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.

        Returns:
            What solves for right-hand sides.
        """
        return _Inverse(self, product)

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
        return self.prepare(product)(right)


PROJECTIONS = 32
"""Rows up to which residuals are computed in full."""

ENOUGH = 1e-4
"""Relative residual of a solve in single precision that is not repeated in double."""


class _Inverse:
    """Solves for right-hand sides; the matrix is made at the first, whose size says how large.

    A matrix in single precision is factorised in it first, which halves the time; where it does
    not come out positive definite, or residuals are not small, it is done again in double.
    """

    def __init__(self, direct: Direct, product: Product) -> None:
        self.direct, self.product = direct, product
        self._made: tuple[Tensor, Tensor] | None = None
        self._factors: dict[torch.dtype, Tensor | None] = {}
        self._eigen: tuple[Tensor, Tensor] | None = None

    def __call__(self, right: Tensor) -> Solution:
        """Return the solution for each right-hand side ``[query, P]``."""
        if self._made is None:
            self._check(right.shape[1])
            self._made = _whole(self.product, right)
        matrix, order = self._made
        ordered = right[:, order]
        solved, rest, reason = self._solved(matrix, ordered)
        if matrix.dtype != right.dtype and (reason != CONVERGED or not bool((rest < ENOUGH).all())):
            solved, rest, reason = self._solved(matrix.to(right.dtype), ordered)
        found = torch.empty_like(right)
        found[:, order] = solved.to(right.dtype)
        reasons, rest = (reason,) * len(right), rest.to(right.dtype)
        return Solution(found, rest, reasons, residual_from=_rest_from(len(right)))

    def _solved(self, matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor, str]:
        """Return solution, relative residuals and why it stopped, in the matrix's precision."""
        right = right.to(matrix.dtype)
        if matrix.dtype not in self._factors:
            factor, failed = torch.linalg.cholesky_ex(matrix)
            self._factors[matrix.dtype] = None if bool(failed) else factor
        known = self._factors[matrix.dtype]
        if known is not None:
            solved, reason = _substituted(known, right), CONVERGED
        else:
            solved, reason = self._through_eigenvectors(matrix, right), NEGATIVE
        return solved, relative(_rest(matrix, solved, right), right), reason

    def _through_eigenvectors(self, matrix: Tensor, right: Tensor) -> Tensor:
        if self._eigen is None or self._eigen[0].dtype != matrix.dtype:
            values, vectors = torch.linalg.eigh(matrix)
            self._eigen = (values, vectors)
        values, vectors = self._eigen
        kept = values.abs() > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
        return right @ vectors * torch.where(kept, 1 / values, 0) @ vectors.T

    def _check(self, size: int) -> None:
        if size > self.direct.max_parameters:
            raise ArgumentError.of(
                "solver",
                expected=f"at most {self.direct.max_parameters:,} parameters for a direct solve",
                got=f"{size:,}",
                do='Use solver="cg" or solver="ekfac".',
            )


def _substituted(factor: Tensor, right: Tensor) -> Tensor:
    """Return the rows s with s L Lᵀ = right; from this side it takes half the time."""
    half = torch.linalg.solve_triangular(factor.T, right, upper=True, left=False)
    found: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return found


def _rest(matrix: Tensor, solved: Tensor, right: Tensor) -> Tensor:
    """Return ‖g − A s‖ of each row; of many rows as random projections estimate it.

    E (zᵀ r)² = ‖r‖² for random signs z, and zᵀ A s takes one product with A for all rows. With
    `PROJECTIONS` of them the standard error is an eighth.
    """
    found: Tensor
    if len(right) <= PROJECTIONS:
        found = (right - solved @ matrix).norm(dim=1)
        return found
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (PROJECTIONS, len(matrix)), generator=generator).to(right) * 2 - 1
    seen = signs @ right.T - (signs @ matrix) @ solved.T
    found = seen.square().mean(0).sqrt()
    return found


def _rest_from(count: int) -> str:
    if count <= PROJECTIONS:
        return "a product with the whole matrix"
    return f"{PROJECTIONS} random projections: an estimate with a standard error of an eighth"


def _whole(product: Product, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix, and the place of each of its rows in the vector of all parameters."""
    everything = torch.arange(right.shape[1], device=right.device)
    found = _gauss_newton(product) if isinstance(product, Curvature) else None
    if found is not None:
        return found
    matrix = product(torch.eye(len(everything), dtype=right.dtype, device=right.device))
    return (matrix + matrix.T) / 2, everything


def _gauss_newton(curvature: Curvature) -> tuple[Tensor, Tensor] | None:
    """Return the matrix made of layer inputs, or None where rows are the better way."""
    ridge = curvature.ridge()
    if curvature.kind != "gauss-newton" or ridge is None or curvature.outputs > FEW:
        return None
    matrix, order = gauss_newton(curvature.gathered("exact"))
    matrix.diagonal().add_((ridge[order] + curvature.damping).to(matrix.dtype))
    return matrix, order
