"""Bases of what heads write and what they read, all of one size: `Subspaces`.

The writer's subspace is spanned by the top k right singular vectors of W_OV (row convention: the
directions it writes), the reader's by the top k input-side singular vectors of W_Q, W_K or W_V with
the gain of its norm folded in. Single vectors of near-equal singular values are arbitrary, so
subspaces are compared, never vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...anatomy.shared import check_anatomy
from ...errors import ArgumentError
from ...nodes import Head, Reader
from .factors import centres, padded, reads, role_of, triangle, unit, writes

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["Subspaces", "check_energy", "subspaces"]

NOTHING = 1e-6
"""Directions below this share of the largest singular value are rounding: outside the rank."""


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Bases of what heads write and what they read, of one size k.

    Args:
        anatomy: The model's anatomy.
        k: Number of directions of each subspace.
        energy: Share of squared singular values that k directions hold in the median head.
        blind: Of each layer as reader, whether LayerNorm hides the all-ones direction from it.
        writer: (layer, centred) → orthonormal rows ``[head, rank, d_model]`` and squared singular
            values ``[head, rank]``, largest first.
        reader: The same of what a layer reads.
    """

    anatomy: Anatomy
    k: int
    energy: float
    blind: tuple[bool, ...]
    writer: Callable[[int, bool], tuple[Tensor, Tensor]]
    reader: Callable[[int], tuple[Tensor, Tensor]]

    def overlap(self, *, weighted: bool = False) -> Tensor:
        """Return the overlap of all pairs; see `subspace_overlap`.

        Args:
            weighted: Weigh the directions of the writer by their energy.

        Returns:
            ``[layer, head, layer, head]``.
        """
        table = padded(self.anatomy, self.writer(0, False)[0])
        for r in range(1, self.anatomy.n_layers):
            right = self._within(*self.reader(r))
            for w in range(r):
                rows, energies = self.writer(w, self.blind[r])
                if weighted:
                    left = rows * (energies / energies.sum(-1, keepdim=True)).sqrt()[..., None]
                else:
                    left = self._within(rows, energies) / math.sqrt(self.k)
                cosines = left.flatten(0, 1) @ right.flatten(0, 1).mT
                blocks = cosines.reshape(*left.shape[:2], *right.shape[:2])
                table[w, : len(left), r, : len(right)] = blocks.square().sum((1, 3))
        return table

    def angles(self, writer: Head, reader: Reader) -> Tensor:
        """Return the principal angles of one pair; see `principal_angles`.

        Args:
            writer: The head that writes.
            reader: The input that reads.

        Returns:
            ``[k]``, radians.
        """
        node = reader.node
        left = self._within(*self.writer(writer.layer, self.blind[node.layer]))[writer.head]
        right = self._within(*self.reader(node.layer))[node.head]
        cosines: Tensor = torch.linalg.svdvals(left @ right.mT)
        return cosines.clamp(max=1).acos()

    def _within(self, rows: Tensor, energies: Tensor) -> Tensor:
        """Return the first k rows, zero beyond a head's rank and NaN where it has none."""
        rows, energies = rows[:, : self.k], energies[:, : self.k]
        real = energies > NOTHING**2 * energies[:, :1]
        none = energies[:, :1, None] == 0
        return rows.where(real[..., None], 0.0).where(~none, math.nan)


def subspaces(
    anatomy: Anatomy, reads_for: str = "Q", *, energy: float = 0.9, k: int | None = None
) -> Subspaces:
    """Return bases of what heads write and of what later ones read.

    Args:
        anatomy: The model's anatomy.
        reads_for: Which input of the reader: ``"Q"``, ``"K"`` or ``"V"``.
        energy: k is the number of directions that hold this share of Σσ² in the median head, over
            writers and readers: one k for all pairs, so that they share one null.
        k: A number of directions instead.

    Returns:
        The bases.

    Raises:
        ArgumentError: If the input is none of those, energy is not in (0, 1], or k not in
            1 … d_head.
    """
    check_anatomy(anatomy)
    role = role_of(reads_for, "reads")
    _check(anatomy, energy, k)

    def writer(layer: int, centred: bool) -> tuple[Tensor, Tensor]:
        values = triangle(unit(reads(anatomy, layer, "V"))) @ unit(writes(anatomy, layer))
        return _basis(values - values.mean(-1, keepdim=True) if centred else values)

    def reader(layer: int) -> tuple[Tensor, Tensor]:
        return _basis(unit(reads(anatomy, layer, role)).mT)

    write, read = cache(writer), cache(reader)
    blind = tuple(centres(anatomy, layer) for layer in range(anatomy.n_layers))
    spectra = [write(n, blind[-1])[1] for n in range(max(1, anatomy.n_layers - 1))]
    spectra += [read(n)[1] for n in range(1, anatomy.n_layers)]
    chosen = _median_rank(spectra, energy) if k is None else k
    return Subspaces(anatomy, chosen, _held(spectra, chosen), blind, write, read)


def _basis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return right singular vectors as rows, and squared singular values."""
    found = torch.linalg.svd(factor, full_matrices=False)
    return found.Vh, found.S.square()


def _median_rank(spectra: list[Tensor], energy: float) -> int:
    """Return how many directions hold the energy in the median head that has any."""
    counts = []
    for values in spectra:
        held = values.cumsum(-1) / values.sum(-1, keepdim=True)
        # A share of 1 is rarely reached exactly.
        counts.append(((held < energy - 1e-6).sum(-1) + 1)[values[:, 0] > 0])
    found = torch.cat(counts)
    return int(found.median()) if len(found) else 1


def _held(spectra: list[Tensor], k: int) -> float:
    shares = torch.cat([values[:, :k].sum(-1) / values.sum(-1) for values in spectra])
    return float(shares.nanmedian())


def _check(anatomy: Anatomy, energy: float, k: int | None) -> None:
    check_energy(energy)
    most = min(anatomy.d_model, *anatomy.d_head)
    if k is not None and not 1 <= k <= most:
        raise ArgumentError.of(
            "k", expected=f"1 to {most} directions", got=k, do="Leave it out to choose by energy."
        )


def check_energy(energy: float) -> None:
    """Refuse what is no share.

    Args:
        energy: What was given.

    Raises:
        ArgumentError: If it is not in (0, 1].
    """
    if not 0 < energy <= 1:
        raise ArgumentError.of(
            "energy", expected="a share in (0, 1]", got=energy, do="Pass for example 0.9."
        )
