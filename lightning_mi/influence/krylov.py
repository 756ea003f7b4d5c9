"""Solvers by products alone: `Arnoldi` and `LiSSA`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import Curvature
from .solvers import (
    APPROXIMATE,
    CONVERGED,
    DIVERGED,
    LIMIT,
    Inverse,
    Product,
    Solution,
    residual_of,
)

__all__ = ["Arnoldi", "LiSSA"]


@dataclass(frozen=True)
class Arnoldi:
    """The inverse on the largest eigenvalues of a Krylov space (Schioppa et al. 2022).

    ``dimension`` products build an orthonormal basis V of {b, Ab, A²b, …} with A = H̄ + λI and T =
    Vᵀ A V, orthogonalised twice in double precision; s = Σ_k u_k (u_kᵀ g) / λ_k over the ``rank``
    eigenpairs of largest modulus. What g has outside of them is taken as zero, which the residual
    tells: it is no inverse unless the dimension reaches P.

    Args:
        dimension: Products with the curvature.
        rank: Eigenpairs that are kept; None keeps all.
        seed: Of the random start b.
        checked: Compute the residual, for one more product with each query.
    """

    dimension: int = 200
    rank: int | None = 100
    seed: int = 0
    checked: bool = True

    def prepare(self, product: Product) -> Inverse:
        """Build the eigenpairs, at the first right-hand sides.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.

        Returns:
            What solves for right-hand sides.
        """
        pairs: list[tuple[Tensor, Tensor]] = []

        def inverse(right: Tensor) -> Solution:
            if not pairs:
                pairs.append(self._pairs(product, right))
            values, vectors = pairs[0]
            found = ((right @ vectors.T) / values) @ vectors
            details = {"eigenpairs": len(values), "least_eigenvalue": float(values.abs().min())}
            if not self.checked:
                return Solution.approximate(found, APPROXIMATE, details)
            rest = residual_of(product, found, right)
            return Solution(found, rest, (APPROXIMATE,) * len(right), details)

        return inverse

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the solution on the kept eigenpairs.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        return self.prepare(product)(right)

    def _pairs(self, product: Product, like: Tensor) -> tuple[Tensor, Tensor]:
        size, steps = like.shape[1], min(self.dimension, like.shape[1])
        basis = like.new_zeros(steps, size)
        small = like.new_zeros(steps, steps)
        vector = _random(size, self.seed, like)
        count = 0
        for k in range(steps):
            basis[k] = vector / vector.norm()
            count = k + 1
            pushed = product(basis[k : k + 1])[0]
            for _ in range(2):
                along = basis[:count] @ pushed
                small[:count, k] += along
                pushed = pushed - along @ basis[:count]
            if float(pushed.norm()) <= 1e-10 * float(small[:count, k].norm()):
                break
            vector = pushed
        square = small[:count, :count].triu()
        values, turned = torch.linalg.eigh(square + square.triu(1).T)
        order = values.abs().argsort(descending=True)[: self.rank]
        order = order[values[order].abs() > 1e-10 * values.abs().max()]
        return values[order], turned[:, order].T @ basis[:count]


@dataclass(frozen=True)
class LiSSA:
    """A sum of products on batches drawn at random (Agarwal et al. 2017; Koh & Liang 2017).

    h ← g + h − A_b h / σ with A_b the damped curvature of ``examples`` drawn examples; s = h / σ,
    averaged over ``repeats``. σ starts at ``margin`` times the largest eigenvalue of the whole
    curvature, by power iteration. Where h grows beyond what any eigenvalue above λ can make it, σ
    is doubled and the sum begun anew; after four times it is called diverged. What is drawn depends
    on the seed alone, never on how batches are cut.

    Args:
        depth: Products of each repeat.
        repeats: Sums that are averaged.
        examples: Examples drawn for each product; None takes all, which needs no luck.
        margin: σ in multiples of the largest eigenvalue.
        seed: Of the draws.
    """

    depth: int = 500
    repeats: int = 1
    examples: int | None = None
    margin: float = 1.1
    seed: int = 0

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return s with product(s) ≈ right.

        Args:
            product: v ↦ (H̄ + λI) v for rows v.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution, with the residual of the whole curvature.
        """
        scale = self.margin * _largest(product, right, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        total, diverged = torch.zeros_like(right), False
        for _ in range(self.repeats):
            found, scale, failed = self._sum(product, right, scale, generator)
            total, diverged = total + found / self.repeats, diverged or failed
        rest = residual_of(product, total, right)
        reasons = [DIVERGED if diverged else CONVERGED if float(r) < 0.05 else LIMIT for r in rest]
        return Solution(total, rest, tuple(reasons), {"lissa_scale": scale})

    def _sum(
        self, product: Product, right: Tensor, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, float, bool]:
        """Return the sum, the σ that it took, and whether it diverged all the same."""
        found = right
        for _ in range(5):
            found, grew = self._once(product, right, scale, generator)
            if not grew:
                return found / scale, scale, False
            scale *= 2
        return torch.full_like(right, float("nan")), scale, True

    def _once(
        self, product: Product, right: Tensor, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, bool]:
        # ‖h‖ ≤ ‖g‖ Σ_k (1 − λ/σ)^k while no eigenvalue of A_b lies outside (0, 2σ).
        found, bound = right.clone(), right.norm(dim=1)
        for step in range(self.depth):
            found = right + found - self._drawn(product, generator)(found) / scale
            if bool((found.norm(dim=1) > 1.01 * (step + 2) * bound + 1e-30).any()):
                return found, True
            if not bool(torch.isfinite(found).all()):
                return found, True
        return found, False

    def _drawn(self, product: Product, generator: torch.Generator) -> Product:
        if self.examples is None or not isinstance(product, Curvature):
            return product
        places = torch.randint(product.examples, (self.examples,), generator=generator)
        return product.on(places.tolist())


def _largest(product: Callable[[Tensor], Tensor], like: Tensor, seed: int) -> float:
    """Return the largest eigenvalue by twenty steps of power iteration."""
    vector, value = _random(like.shape[1], seed, like)[None], 0.0
    for _ in range(20):
        vector = vector / vector.norm()
        vector = product(vector)
        value = float(vector.norm())
        if value == 0:
            return 1.0
    return value


def _random(size: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(like)
