"""All pairs of heads at once, from small factors: `Pairs`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...anatomy.shared import check_anatomy
from .factors import Role, centres, padded, reads, triangle, unit, writes

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["Pairs", "haar_corners", "z_scores"]

FLAT = 1e-5
"""A spread over rotations below this share of the mean is rounding, not a spread."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Writers A and readers B reduced to small factors of Frobenius norm 1, never d_model².

    Args:
        anatomy: The model's anatomy.
        blind: Of each layer as reader, whether LayerNorm hides the all-ones direction from it.
        writer: (layer, centred) → X ``[head, rank, d_model]``; ‖X·M‖ = ‖A·M‖/‖A‖ for every M.
        reader: layer → Y ``[head, d_model, rank]``; ‖M·Y‖ = ‖M·B‖/‖B‖ for every M.
    """

    anatomy: Anatomy
    blind: tuple[bool, ...]
    writer: Callable[[int, bool], Tensor]
    reader: Callable[[int], Tensor]

    @classmethod
    def of(
        cls, anatomy: Anatomy, role: Role, *, fold: bool = True, like: Pairs | None = None
    ) -> Pairs:
        """Return the pairs of a model for one kind of composition.

        Args:
            anatomy: The model's anatomy.
            role: What the reader reads for.
            fold: Fold gains of norms and drop what LayerNorm does not see.
            like: Pairs of another role of the same anatomy, whose writers are taken over.

        Returns:
            The pairs; factors are computed when they are asked for.
        """
        check_anatomy(anatomy)

        def writer(layer: int, centred: bool) -> Tensor:
            first = triangle(unit(reads(anatomy, layer, "V", fold=fold)))
            values = first @ unit(writes(anatomy, layer, fold=fold))
            return unit(values - values.mean(-1, keepdim=True) if centred else values)

        def reader(layer: int) -> Tensor:
            values = unit(reads(anatomy, layer, role, fold=fold))
            return unit(values @ triangle(unit(_other_end(anatomy, layer, role, fold))).mT)

        blind = tuple(fold and centres(anatomy, layer) for layer in range(anatomy.n_layers))
        return cls(anatomy, blind, cache(writer) if like is None else like.writer, reader)

    def norms(self) -> Tensor:
        """Return ‖A·B‖/(‖A‖·‖B‖), 0 where a norm is 0.

        Returns:
            ``[layer, head, layer, head]``; 0 unless the writer's layer is earlier, NaN for heads
            there are not. So are the other tables.
        """

        def entry(x: Tensor, y: Tensor) -> Tensor:
            product = x.flatten(0, 1) @ y.transpose(0, 1).flatten(1)
            blocks = product.reshape(*x.shape[:2], len(y), -1)
            return blocks.square().sum((1, 3)).sqrt()

        return self._table(entry, lambda x: x, lambda y: y)

    def defined(self) -> Tensor:
        """Return 1 where the writer comes first and both heads have weights, 0 elsewhere."""
        size = _present
        return self._table(lambda a, b: a[:, None] * b, size, size)

    def ceiling(self) -> Tensor:
        """Return √(Σ σ_i(A)²·σ_i(B)²)/(‖A‖·‖B‖), which `norms` reaches if the heads are aligned."""

        def entry(a: Tensor, b: Tensor) -> Tensor:
            rank = min(a.shape[1], b.shape[1])
            return (a[:, :rank] @ b[:, :rank].T).sqrt()

        return self._table(entry, _energies, _energies)

    def rotated(self, rotations: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of `norms` over random rotations in between.

        Args:
            rotations: Number of rotations.
            seed: Seed of their generator.

        Returns:
            Two tables; NaN where a head has no weights.
        """
        like = self.writer(0, False)
        widths = (self.anatomy.d_model, min(self.anatomy.d_model, max(self.anatomy.d_head)))
        squares = haar_corners(*widths, rotations, seed).to(like).square()

        def samples(a: Tensor, b: Tensor) -> Tensor:
            corner = squares[:, : a.shape[1], : b.shape[1]]
            return (a @ corner @ b.T).clamp(min=0).sqrt()

        def entry(a: Tensor, b: Tensor) -> Tensor:
            found = samples(a, b)
            return torch.stack([found.mean(0), found.std(0)])

        mean, deviation = self._tables(entry, _energies, _energies, 2)
        return mean, deviation

    def _table(
        self,
        entry: Callable[[Tensor, Tensor], Tensor],
        of_writer: Callable[[Tensor], Tensor],
        of_reader: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return self._tables(entry, of_writer, of_reader, 1)[0]

    def _tables(
        self,
        entry: Callable[[Tensor, Tensor], Tensor],
        of_writer: Callable[[Tensor], Tensor],
        of_reader: Callable[[Tensor], Tensor],
        count: int,
    ) -> Tensor:
        empty = padded(self.anatomy, self.writer(0, False))
        tables = empty.expand(count, *empty.shape).clone()
        seen = cache(lambda layer, centred: of_writer(self.writer(layer, centred)))
        for r in range(1, self.anatomy.n_layers):
            right = of_reader(self.reader(r))
            for w in range(r):
                left = seen(w, self.blind[r])
                tables[:, w, : len(left), r, : len(right)] = entry(left, right)
        return tables


def haar_corners(size: int, rank: int, count: int, seed: int) -> Tensor:
    """Return corners of random orthogonal matrices.

    The first columns of a Haar-random rotation are the Q of a Gaussian matrix that has only them.

    Args:
        size: Size of the rotations.
        rank: Size of the corner.
        count: How many.
        seed: Seed of their generator.

    Returns:
        ``[count, rank, rank]``, float32, on the CPU. E of an entry's square is 1/size.

    Example:
        >>> corners = haar_corners(16, 4, 500, seed=0)
        >>> bool((corners.square().mean() * 16 - 1).abs() < 0.05)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, rank, generator=generator) for _ in range(count)]
    return torch.stack([torch.linalg.qr(columns).Q[:rank] for columns in drawn])


def z_scores(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return (value − mean)/deviation, NaN where the deviation is rounding.

    Args:
        values: What was seen.
        mean: Mean under the null.
        deviation: Standard deviation under the null.

    Returns:
        The same shape.
    """
    return (values - mean) / deviation.where(deviation > FLAT * mean.abs(), math.nan)


def _energies(factor: Tensor) -> Tensor:
    """Return squared singular values, largest first."""
    values: Tensor = torch.linalg.svdvals(factor)
    return values.square()


def _present(factor: Tensor) -> Tensor:
    return (factor.abs().amax((1, 2)) > 0).to(factor.dtype)


def _other_end(anatomy: Anatomy, layer: int, role: Role, fold: bool) -> Tensor:
    """Return what stands behind a reader's input, ``[head, d_model, d_head]``."""
    if role == "V":
        return writes(anatomy, layer, fold=fold).mT
    return reads(anatomy, layer, "K" if role == "Q" else "Q", fold=fold)
