"""The inverse of small covariances of gradients: `DataInf`, `LoGra`, `TRAK`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..target import Margin
from .blocks import Block, dense, grouped, in_parts
from .factors import structured
from .gathered import Gathered
from .outputs import Labels, slope
from .pieces import Matrix, Piece
from .point import wide
from .products import Curvature
from .solvers import APPROXIMATE, Inverse, Product, Solution

__all__ = ["TRAK", "DataInf", "LoGra"]


@dataclass(frozen=True)
class DataInf:
    """The mean of inverses in place of the inverse of a mean (Kwon et al. 2024).

    For each block: s = (1/nλ) Σᵢ [g − (gᵢᵀ g) / (λ + ‖gᵢ‖²) gᵢ] with gᵢ = ∇ℓᵢ. Good for blocks with
    few parameters, as adapters of low rank have. The mean curvature of a regulariser in the block
    is added to λ.

    Args:
        relative_damping: None takes the one λ of the call, which has to be positive; a number c
            takes c · mean ‖gᵢ‖² / d of each block with d parameters (0.1 in the paper).
    """

    relative_damping: float | None = None

    def prepare(self, product: Product) -> Inverse:
        """Gather the gradients.

        Args:
            product: The curvature.

        Returns:
            What solves for right-hand sides.

        Raises:
            ArgumentError: If there is no damping.
        """
        curvature = structured(product, "DataInf")
        ridges = _ridges(curvature, curvature.gathered("true").blocks)
        absolute = self.relative_damping is None
        if absolute and not all(curvature.damping + own > 0 for own in ridges.values()):
            raise ArgumentError.of(
                "damping",
                expected="more than 0 for DataInf, which divides by it",
                got=0,
                do="For example damping=0.01, or DataInf(relative_damping=0.1).",
            )
        return _DataInf(self, curvature, curvature.gathered("true"), ridges)

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the approximate inverse applied to each right-hand side.

        Args:
            product: The curvature.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        return self.prepare(product)(right)


class _DataInf:
    def __init__(
        self, solver: DataInf, curvature: Curvature, gathered: Gathered, ridges: dict[str, float]
    ) -> None:
        self.solver, self.curvature, self.gathered = solver, curvature, gathered
        self.ridges = ridges

    def __call__(self, right: Tensor) -> Solution:
        blocks = {b.name: b for b in self.gathered.blocks}
        dampings = self._dampings
        found = torch.zeros_like(right)
        taken = {n: b.take(right).to(self.gathered.kind).flatten(1) for n, b in blocks.items()}
        sums = {n: torch.zeros_like(t) for n, t in taken.items()}
        examples = 0
        for chunk in self.gathered:
            examples += chunk.examples
            for name, rows in _wholes(blocks, chunk.losses):
                lengths = dampings[name] + rows.square().sum(1)
                sums[name] += ((taken[name] @ rows.T) / lengths) @ rows
        for name, block in blocks.items():
            block.put(found, (taken[name] - sums[name] / examples) / dampings[name])
        return Solution.approximate(found, APPROXIMATE, {"labels": "true"})

    @cached_property
    def _dampings(self) -> dict[str, float]:
        """Of each block; a relative one takes a pass over the data, once for all right sides."""
        blocks, scale = {b.name: b for b in self.gathered.blocks}, self.solver.relative_damping
        if scale is None:
            return {n: self.curvature.damping + own for n, own in self.ridges.items()}
        squares, examples = dict.fromkeys(blocks, 0.0), 0
        for chunk in self.gathered:
            examples += chunk.examples
            for name, rows in _wholes(blocks, chunk.losses):
                squares[name] += float(rows.square().sum())
        means = {n: scale * s / examples / blocks[n].size for n, s in squares.items()}
        return {n: max(mean + self.ridges[n], 1e-30) for n, mean in means.items()}


@dataclass(frozen=True)
class LoGra:
    """The curvature of gradients projected inside each layer (Choe et al. 2024).

    φᵢ = Pₒ (Σ s aᵀ) Pₐᵀ for each weight matrix, with random P of variance 1/rank, and s = Pᵀ (Φ̄ +
    λI)⁻¹ P g with Φ̄ the mean of φᵢ φᵢᵀ. The mean curvature of a regulariser in the layer is added
    to λ. Parameters that are no matrix, and embeddings, count as fixed; the part that is covered is
    in the details.

    Args:
        rank: Of each side.
        labels: Which output gradients make Φ̄; the paper takes those of the losses.
        seed: Of the projections.
    """

    rank: int = 8
    labels: Labels = "true"
    seed: int = 0

    def prepare(self, product: Product) -> Inverse:
        """Gather the projected gradients and factorise their covariances.

        Args:
            product: The curvature.

        Returns:
            What solves for right-hand sides.
        """
        curvature = structured(product, "LoGra")
        gathered = curvature.gathered(self.labels)
        chosen = {b.name: b for b in gathered.blocks if len(b.shape) == 2}
        sides = {n: self._sides(b, i, gathered) for i, (n, b) in enumerate(chosen.items())}
        sums: dict[str, Tensor] = {}
        examples = 0
        for chunk in gathered:
            examples += chunk.examples
            for name, pieces in grouped(chunk.curvature).items():
                if name in chosen:
                    total = _small_covariance(chosen[name], pieces, sides[name])
                    sums[name] = total + sums[name] if name in sums else total
        dampings = {
            n: curvature.damping + own for n, own in _ridges(curvature, chosen.values()).items()
        }
        inverses = {n: _damped_inverse(s / examples, dampings[n]) for n, s in sums.items()}
        covered = sum(b.size for b in chosen.values()) / curvature.point.size

        def inverse(right: Tensor) -> Solution:
            found = torch.zeros_like(right)
            for name, small in inverses.items():
                block, (left, side) = chosen[name], sides[name]
                part = left @ block.take(right).to(left.dtype) @ side.T
                solved = (part.flatten(1).to(small.dtype) @ small).to(left.dtype)
                block.put(found, left.T @ solved.reshape(part.shape) @ side)
            return Solution.approximate(
                found, APPROXIMATE, {"labels": gathered.used, "rank": self.rank}, covered
            )

        return inverse

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the approximate inverse applied to each right-hand side.

        Args:
            product: The curvature.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        return self.prepare(product)(right)

    def _sides(self, block: Block, place: int, gathered: Gathered) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        sides = [_projection(min(self.rank, n), n, generator) for n in block.shape]
        left, right = (s.to(gathered.point.device, gathered.kind) for s in sides)
        return left, right


@dataclass(frozen=True)
class TRAK:
    """The curvature of randomly projected margin gradients (Park et al. 2023), of one model.

    φᵢ = Pᵀ ∇margin_i with P random of variance 1/dimension and margin = log(p / (1 − p)) of the
    true class, s = P (Φ̄ + λI)⁻¹ Pᵀ g with Φ̄ the mean of φᵢ φᵢᵀ. The mean curvature of a regulariser
    is added to λ. The paper's weight 1 − p of each training example is part of its loss gradient:
    ∇ℓ = −(1 − p) ∇margin. Ask with ``query=Margin()`` as the paper does. Average over models
    trained apart; one alone is noisy.

    Args:
        dimension: Of the projection.
        seed: Of the projection.
    """

    dimension: int = 512
    seed: int = 0

    def prepare(self, product: Product) -> Inverse:
        """Gather the projected gradients and factorise their covariance.

        Args:
            product: The curvature.

        Returns:
            What solves for right-hand sides.
        """
        curvature = structured(product, "TRAK")
        point, objective = curvature.point, curvature.objective
        gathered = curvature.gathered("true")
        margin = objective.query(Margin())
        kind = wide(point.device)
        total = torch.zeros(self.dimension, self.dimension, dtype=kind, device=point.device)
        for batch in curvature.batches():
            pieces = gathered.of(batch, partial(slope, scalar=partial(margin, batch=batch)))
            features = self._features(gathered, pieces)
            total += (features.T @ features).to(total)
        ridge = curvature.ridge()
        own = 0.0 if ridge is None else float(ridge.mean())
        small = _damped_inverse(total / curvature.examples, curvature.damping + own)

        def inverse(right: Tensor) -> Solution:
            projected = right.new_zeros(len(right), self.dimension)
            for place, block in enumerate(gathered.blocks):
                for where, matrix in self._parts(place, block, gathered):
                    projected += block.take(right).flatten(1)[:, where] @ matrix.to(right)
            solved = projected @ small.to(right)
            found = torch.zeros_like(right)
            for place, block in enumerate(gathered.blocks):
                parts = [solved @ m.to(right).T for _, m in self._parts(place, block, gathered)]
                block.put(found, torch.cat(parts, 1))
            details = {"labels": "margins", "dimension": self.dimension}
            return Solution.approximate(found, APPROXIMATE, details)

        return inverse

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the approximate inverse applied to each right-hand side.

        Args:
            product: The curvature.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution.
        """
        return self.prepare(product)(right)

    def _features(self, gathered: Gathered, pieces: Sequence[Piece]) -> Tensor:
        by_name, total = grouped(pieces), None
        for place, block in enumerate(gathered.blocks):
            of_block = by_name.get(block.name, [])
            rows = [dense(block, part)[0].flatten(1) for part in in_parts(block, of_block)]
            if not rows:
                continue
            whole = torch.cat(rows)
            for where, matrix in self._parts(place, block, gathered):
                part = whole[:, where] @ matrix
                total = part if total is None else total + part
        return torch.zeros(0, self.dimension) if total is None else total

    def _parts(
        self, place: int, block: Block, gathered: Gathered
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the projection of a block a few rows at a time, the same whenever it is asked."""
        step = max(1, 2**22 // self.dimension)
        for start in range(0, block.size, step):
            rows = min(step, block.size - start)
            seed = (self.seed * 1_000_003 + place) * 100_003 + start // step
            generator = torch.Generator().manual_seed(seed)
            matrix = _projection(rows, self.dimension, generator) * math.sqrt(rows / self.dimension)
            yield (
                slice(start, start + rows),
                matrix.to(gathered.point.device, gathered.kind),
            )


def _ridges(curvature: Curvature, blocks: Iterable[Block]) -> dict[str, float]:
    """Return the mean curvature of the regulariser in each block; 0 where it is not diagonal."""
    ridge = curvature.ridge()
    return {b.name: 0.0 if ridge is None else float(ridge[b.index].mean()) for b in blocks}


def _projection(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return Gaussian numbers ``[rows, columns]`` of variance 1/rows."""
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return drawn / math.sqrt(rows)


def _damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """Return (M + λI)⁻¹ through eigenvalues, leaving out those that are zero to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=0) + damping
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse: Tensor = (vectors * torch.where(kept, 1 / values, 0)) @ vectors.T
    return inverse


def _small_covariance(
    block: Block, pieces: Sequence[Piece], sides: tuple[Tensor, Tensor]
) -> Tensor:
    """Return Σ φ φᵀ over cotangents and examples."""
    left, right = sides
    size = len(left) * len(right)
    total = torch.zeros(size, size, dtype=wide(left.device), device=left.device)
    for part in in_parts(block, pieces):
        rows = torch.zeros(())
        for piece in part:
            if isinstance(piece, Matrix):
                a, b = _projected(piece, left, right)
                rows = rows.to(a) + a.transpose(-1, -2) @ b
        flat = rows.flatten(0, 1).flatten(1)
        total += (flat.T @ flat).to(total)
    return total


def _projected(piece: Matrix, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    sides = ((piece.left, left), (piece.right, right))
    a, b = (p.T[f.rows] if f.is_ids else f.rows @ p.T for f, p in sides)
    return a, b


def _wholes(blocks: dict[str, Block], pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``[example, number]`` gradients of each block, a few examples at a time."""
    for name, of_block in grouped(pieces).items():
        for part in in_parts(blocks[name], of_block):
            yield name, dense(blocks[name], part)[0].flatten(1)
