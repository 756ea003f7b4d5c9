"""The whole Gauss-Newton matrix, from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, dense, grouped
from .gathered import Chunk, Gathered
from .pieces import Piece, Vector

__all__ = ["gauss_newton"]

ENTRIES = 2**24
"""Entries of the products of one chunk that exist at once."""


def gauss_newton(gathered: Gathered) -> tuple[Tensor, Tensor]:
    """Return Ḡ = (1/n) Σᵢ Σₖ (Jᵢᵀ rₖ)(Jᵢᵀ rₖ)ᵀ, with rₖ the columns of the outputs' curvature.

    Where every layer has one row for each example, a gradient is a ⊗ s, and the classes are summed
    before anything as large as Ḡ is touched: the block of two layers is Σᵢ (aᵢ aᵢ'ᵀ) ⊗ (Σₖ sᵢₖ
    sᵢₖ'ᵀ), one matrix product. Otherwise gradients are formed in full, a few examples at a time.

    Args:
        gathered: The gradients.

    Returns:
        The matrix, its entries ordered block by block, and the place of each of them in the vector
        of all parameters.
    """
    sums = _Sums(gathered.blocks, gathered.kind, gathered.point.device)
    examples = 0
    for chunk in gathered:
        examples += chunk.examples
        sums.add(chunk)
    return sums.whole().div_(max(1, examples)), sums.order


@dataclass(frozen=True, eq=False)
class _Single:
    """A gradient with one row: ``pulled[k, e] ⊗ inputs[e]``, turned where inputs come first."""

    pulled: Tensor
    inputs: Tensor
    turned: bool = False


class _Sums:
    """Sums over examples, for every pair of blocks."""

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.starts = [0]
        for block in blocks:
            self.starts.append(self.starts[-1] + block.size)
        size = self.starts[-1]
        self.matrix = torch.zeros(size, size, dtype=self.dtype, device=device)
        self.order = torch.cat([b.index.flatten() for b in blocks])

    def add(self, chunk: Chunk) -> None:
        """Add the examples of a chunk."""
        by_name = grouped(chunk.curvature)
        singles = [_single(by_name.get(b.name, [])) for b in self.blocks]
        known = [s for s in singles if s is not None]
        if len(known) == len(self.blocks):
            self._add_singles(known, chunk.examples)
        else:
            self._add_rows(by_name, chunk.examples)

    def whole(self) -> Tensor:
        """Return the symmetric matrix, of which the upper blocks alone were summed."""
        for i in range(len(self.blocks)):
            for j in range(i + 1, len(self.blocks)):
                upper = self.matrix[self._range(i), self._range(j)]
                self.matrix[self._range(j), self._range(i)] = upper.T
        return self.matrix

    def _add_singles(self, singles: list[_Single], examples: int) -> None:
        for i, one in enumerate(singles):
            for j in range(i, len(singles)):
                other = singles[j]
                part = self.matrix[self._range(i), self._range(j)]
                if i == j:
                    _add_own(part, one, examples)
                else:
                    found = _pair(one, other, examples)
                    part += _as(found, self.blocks[i], one, self.blocks[j], other)

    def _add_rows(self, by_name: dict[str, list[Piece]], examples: int) -> None:
        cotangents = max(t.shape[0] for ps in by_name.values() for p in ps for t in _pulled(p))
        step = max(1, ENTRIES // (self.starts[-1] * cotangents))
        for start in range(0, examples, step):
            where = slice(start, start + step)
            rows: Tensor | None = None
            for i, block in enumerate(self.blocks):
                pieces = [p.examples(where) for p in by_name.get(block.name, [])]
                if pieces:
                    whole = dense(block, pieces).flatten(2).flatten(0, 1)
                    if rows is None:
                        rows = whole.new_zeros(len(whole), self.starts[-1])
                    rows[:, self._range(i)] = whole
            if rows is not None:
                self.matrix += (rows.T @ rows).to(self.dtype)

    def _range(self, index: int) -> slice:
        return slice(self.starts[index], self.starts[index + 1])


def _pulled(piece: Piece) -> list[Tensor]:
    return [piece.values if isinstance(piece, Vector) else piece.pulled.rows]


def _single(pieces: list[Piece]) -> _Single | None:
    if len(pieces) != 1:
        return None
    piece = pieces[0]
    if isinstance(piece, Vector):
        return _Single(piece.values, piece.values.new_ones(piece.values.shape[1], 1))
    if piece.inputs.is_ids or piece.pulled.rows.shape[2] != 1:
        return None
    return _Single(piece.pulled.rows[:, :, 0], piece.inputs.rows[0, :, 0], piece.right.pulled)


def _step(numbers: int) -> int:
    return max(1, ENTRIES // max(1, numbers))


def _pair(one: _Single, other: _Single, examples: int) -> Tensor:
    """Return Σ (a a'ᵀ) ⊗ (s s'ᵀ) as ``[input, input', pulled, pulled']``."""
    a, b = one.inputs, other.inputs
    p, q = one.pulled.shape[-1], other.pulled.shape[-1]
    step = _step(max(a.shape[1] * b.shape[1], p * q))
    total: Tensor | None = None
    for start in range(0, examples, step):
        w = slice(start, start + step)
        pulled = torch.einsum("keo,kep->eop", one.pulled[:, w], other.pulled[:, w]).flatten(1)
        inputs = (a[w, :, None] * b[w, None]).flatten(1)
        part = inputs.T @ pulled  # In this order: half the time of its transpose.
        total = part if total is None else total + part
    if total is None:
        total = a.new_zeros(a.shape[1] * b.shape[1], p * q)
    return total.reshape(a.shape[1], b.shape[1], p, q)


def _add_own(matrix: Tensor, one: _Single, examples: int) -> None:
    """Add the same for a block with itself, of whose two symmetric sides half is enough."""
    p, i = one.pulled.shape[-1], one.inputs.shape[1]
    sides = [torch.triu_indices(n, n, device=one.inputs.device) for n in (p, i)]
    (r, c), (u, v) = sides
    step = _step(max(sides[0].shape[1], sides[1].shape[1], p * p))
    total: Tensor | None = None
    for start in range(0, examples, step):
        w = slice(start, start + step)
        g, x = one.pulled[:, w].transpose(0, 1), one.inputs[w]
        pulled = (g.transpose(1, 2) @ g).flatten(1).index_select(1, r * p + c)
        inputs = (x[:, :, None] * x[:, None]).flatten(1).index_select(1, u * i + v)
        part = inputs.T @ pulled  # In this order: half the time of its transpose.
        total = part if total is None else total + part
    if total is None:
        return
    squares = total.index_select(0, _places(i, sides[1]).flatten()).T.reshape(-1, i, i)
    for square, a, b in zip(squares, r.tolist(), c.tolist(), strict=True):
        for left, right in {(a, b), (b, a)}:
            if one.turned:
                matrix[left::p, right::p] += square
            else:
                matrix[left * i : (left + 1) * i, right * i : (right + 1) * i] += square


def _places(size: int, side: Tensor) -> Tensor:
    """Return where each entry of a symmetric matrix stands among those of its upper half."""
    found = torch.zeros(size, size, dtype=torch.long, device=side.device)
    count = torch.arange(side.shape[1], device=side.device)
    found[side[0], side[1]] = count
    found[side[1], side[0]] = count
    return found


def _as(found: Tensor, rows: Block, one: _Single, columns: Block, other: _Single) -> Tensor:
    """Return ``[input, input', pulled, pulled']`` in the order of the two blocks' entries."""
    order = [*((0, 2) if one.turned else (2, 0)), *((1, 3) if other.turned else (3, 1))]
    return found.permute(order).reshape(rows.size, columns.size)
