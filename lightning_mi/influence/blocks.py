"""The parameters in blocks that curvature takes as independent, and sums over examples for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .pieces import Factor, Matrix, Piece, Vector
from .point import Point, wide

__all__ = [
    "Block",
    "add_dots",
    "blocks_of",
    "dense",
    "dense_all",
    "dot",
    "dot_of_one",
    "grouped",
    "in_parts",
    "summed",
]

ENTRIES = 2**19
"""Entries of the gradients of one block that exist at once; so many stay in a processor's cache."""

MANY = 64
"""Gradients that meet many vectors at once, which have to be read once for each part."""

MOST = 2**22
"""Entries of these."""


@dataclass(frozen=True)
class Block:
    """A weight with its bias, or any other parameter.

    Args:
        name: Name of the weight or parameter.
        shape: ``(left, right)`` with the bias as a last row or column, or ``(number,)``.
        start: Where its entries begin in the vector of all parameters.
        device: Where the model is.
        bias: Name of the bias, or None.
        bias_start: Where those of the bias begin.
        turned: Whether the bias is a last row, as where weights are ``[in, out]``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    device: torch.device
    bias: str | None = None
    bias_start: int = 0
    turned: bool = False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @cached_property
    def index(self) -> Tensor:
        """Place of every entry in the vector of all parameters, in this shape."""
        weight, last, dim = self.stretches
        own = torch.arange(weight.start, weight.stop, device=self.device)
        if last is None:
            return own.reshape(self.shape)
        bias = torch.arange(last.start, last.stop, device=self.device)
        shape = [-1, len(bias)] if self.turned else [len(bias), -1]
        return torch.cat([own.reshape(shape), bias.unsqueeze(dim - 1)], dim - 1)

    @cached_property
    def stretches(self) -> tuple[slice, slice | None, int]:
        """Where weight and bias lie in the vector, and the dimension of `take` it extends."""
        if self.bias is None:
            return slice(self.start, self.start + self.size), None, 0
        count = self.shape[1] if self.turned else self.shape[0]
        weight = slice(self.start, self.start + self.size - count)
        return weight, slice(self.bias_start, self.bias_start + count), 1 if self.turned else 2

    def take(self, vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return this block's part of vectors ``[vector, P]``, as ``[vector, *shape]``."""
        kind = vectors.dtype if dtype is None else dtype
        weight, last, dim = self.stretches
        if last is None:
            return vectors[:, weight].to(kind).reshape(-1, *self.shape)
        found = torch.empty(len(vectors), *self.shape, dtype=kind, device=vectors.device)
        ahead = found.narrow(dim, 0, found.shape[dim] - 1)
        ahead.copy_(vectors[:, weight].reshape(ahead.shape))
        end = found.select(dim, -1)
        end.copy_(vectors[:, last].reshape(end.shape))
        return found

    def put(self, vectors: Tensor, part: Tensor) -> None:
        """Write this block's part into vectors ``[vector, P]``."""
        part = part.reshape(len(part), *self.shape)
        weight, last, dim = self.stretches
        if last is None:
            vectors[:, weight] = part.flatten(1).to(vectors.dtype)
            return
        count = part.shape[dim] - 1
        shape = (len(vectors), *part.narrow(dim, 0, count).shape[1:])
        vectors[:, weight].view(shape).copy_(part.narrow(dim, 0, count))
        vectors[:, last] = part.select(dim, count).to(vectors.dtype)


def blocks_of(pieces: Iterable[Piece], point: Point) -> list[Block]:
    """Return blocks for all parameters: as the pieces are made, the rest in full.

    Args:
        pieces: Of one pass.
        point: The parameters.

    Returns:
        Blocks in the order of the parameters; each parameter is in one of them.
    """
    matrices = {p.name: p for p in pieces if isinstance(p, Matrix)}
    joined = {p.bias for p in matrices.values() if p.bias is not None}
    starts = starts_of({n: p.shape for n, p in point.parameters.items()})
    device = point.device
    found = []
    for name, start in starts.items():
        piece = matrices.get(name)
        if name in joined:
            continue
        if piece is None:
            found.append(Block(name, (point.parameters[name].numel(),), start, device))
            continue
        shape, turned = (piece.left.size, piece.right.size), not piece.left.pulled
        last = 0 if piece.bias is None else starts[piece.bias]
        found.append(Block(name, shape, start, device, piece.bias, last, turned))
    return found


def starts_of(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Return where the entries of each parameter begin in the vector of all of them.

    Args:
        shapes: By name, in the order of the vector.

    Returns:
        By name.
    """
    starts, start = {}, 0
    for name, shape in shapes.items():
        starts[name] = start
        start += shape.numel()
    return starts


def grouped(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Return pieces by the name of their block."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found


def dense(block: Block, pieces: Sequence[Piece]) -> Tensor:
    """Return gradients in full.

    Args:
        block: The block.
        pieces: Its pieces, at least one; they add up.

    Returns:
        Shape ``[cotangent, example, *block.shape]``.
    """
    parts = [p.values if isinstance(p, Vector) else _outer(p) for p in pieces]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.reshape(*total.shape[:2], *block.shape)


def _outer(piece: Matrix) -> Tensor:
    left, right = piece.left, piece.right
    if left.is_ids:
        return _scattered(left, right.rows)
    if right.is_ids:
        return _scattered(right, left.rows).transpose(-1, -2)
    if left.rows.shape[2] == 1:
        return left.rows[:, :, 0, :, None] * right.rows[:, :, 0, None]
    return left.rows.transpose(-1, -2) @ right.rows


def _scattered(ids: Factor, rows: Tensor) -> Tensor:
    """Return rows added up by their ids, ``[cotangent, example, id, size]``."""
    cotangents, examples, count, size = rows.shape
    found = rows.new_zeros(cotangents, examples, ids.size, size)
    places = ids.rows[..., None].expand(cotangents, examples, count, size)
    return found.scatter_add_(2, places, rows)


def summed(block: Block, piece: Piece) -> Tensor:
    """Return the gradient summed over examples.

    Args:
        block: The block.
        piece: One of its pieces.

    Returns:
        Shape ``[cotangent, *block.shape]``.
    """
    if isinstance(piece, Vector):
        return piece.values.sum(1).reshape(-1, *block.shape)
    if piece.inputs.is_ids:
        flat = [replace(f, rows=f.rows.flatten(1, 2)[:, None]) for f in (piece.left, piece.right)]
        return _outer(replace(piece, left=flat[0], right=flat[1]))[:, 0]
    left, right = (f.rows.flatten(1, 2) for f in (piece.left, piece.right))
    return left.transpose(-1, -2) @ right


def in_parts(
    block: Block, pieces: Sequence[Piece], entries: int = ENTRIES
) -> Iterator[list[Piece]]:
    """Yield pieces of a few examples at a time, so that their gradients in full stay small.

    Args:
        block: The block.
        pieces: Its pieces.
        entries: Numbers that may exist at once.

    Yields:
        The pieces for some examples, one after the other.
    """
    if not pieces:
        return
    shapes = [p.values.shape if isinstance(p, Vector) else p.pulled.rows.shape for p in pieces]
    cotangents, examples = shapes[0][:2]
    step = max(1, entries // (block.size * cotangents))
    for start in range(0, examples, step):
        yield [p.examples(slice(start, start + step)) for p in pieces]


def dense_all(blocks: Sequence[Block], pieces: Iterable[Piece], examples: int, size: int) -> Tensor:
    """Return whole gradients of the first cotangent.

    Args:
        blocks: All blocks.
        pieces: Of one pass.
        examples: Number of examples.
        size: P.

    Returns:
        Shape ``[example, P]``, in double precision (single on devices without it).
    """
    by_name, device = grouped(pieces), blocks[0].device
    found = torch.zeros(examples, size, dtype=wide(device), device=device)
    for block in blocks:
        of_block, start = [p.part(slice(0, 1)) for p in by_name.get(block.name, [])], 0
        for some in in_parts(block, of_block):
            rows = dense(block, some)[0]
            block.put(found[start : start + len(rows)], rows)
            start += len(rows)
    return found


def add_dots(
    total: Tensor,
    block: Block,
    pieces: Sequence[Piece],
    weights: Tensor,
    sums: Tensor | None = None,
) -> None:
    """Add the products of gradients of the first cotangent with vectors.

    Args:
        total: Shape ``[example, vector]``, to which they are added.
        block: The block.
        pieces: Its pieces.
        weights: Shape ``[vector, *block.shape]``, in the type of the total.
        sums: Shape ``[1, *block.shape]``, to which the sum of the gradients is added, or None.
    """
    for each in pieces:
        piece = each.part(slice(0, 1))
        if isinstance(piece, Matrix) and piece.inputs.is_ids:
            total += _dots_by_id(piece, weights)
        elif isinstance(piece, Matrix) and len(weights) == 1:
            total += dot_of_one(piece.left.rows[0], piece.right.rows[0], weights[0])
        elif isinstance(piece, Matrix) and _single(piece):
            _add_outer(total, piece, weights)
        elif sums is None or isinstance(piece, Vector):
            _add_in_parts(total, block, piece, weights)
        else:  # The gradients in full are there: their sum is one pass over them.
            _add_in_parts(total, block, piece, weights, sums)
            continue
        if sums is not None:
            sums += summed(block, piece)


def _add_in_parts(
    total: Tensor, block: Block, piece: Piece, weights: Tensor, sums: Tensor | None = None
) -> None:
    flat, start = weights.flatten(1).T, 0
    for part in in_parts(block, [piece], _entries(block.size)):
        rows = dense(block, part)[0].flatten(1)
        total[start : start + len(rows)].addmm_(rows, flat)
        start += len(rows)
        if sums is not None:
            sums += rows.sum(0).reshape(sums.shape)


def _add_outer(total: Tensor, piece: Matrix, weights: Tensor) -> None:
    """Add the products where a gradient is left ⊗ right, in parts that a cache holds.

    All parts use the same memory: to touch fresh memory takes longer than to fill it.
    """
    left, right = piece.left.rows[0, :, 0], piece.right.rows[0, :, 0]
    flat, size = weights.flatten(1).T, weights[0].numel()
    step = min(max(1, _entries(size) // size), len(left))
    memory = left.new_empty(step, *weights.shape[1:])
    for start in range(0, len(left), step):
        some = slice(start, min(start + step, len(left)))
        whole = memory[: some.stop - start]
        torch.mul(left[some, :, None], right[some, None], out=whole)
        total[some].addmm_(whole.flatten(1), flat)


def _entries(size: int) -> int:
    """Return how many entries of gradients of this size exist at once."""
    return max(ENTRIES // 2, min(MANY * size, MOST))


def _single(piece: Matrix) -> bool:
    return piece.pulled.rows.shape[2] == 1


def dot_of_one(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Return Σᵣ leftᵣ · W rightᵣ of each example, through the narrower side.

    Args:
        left: Rows ``[example, row, left]``.
        right: Rows ``[example, row, right]``.
        weight: W, shape ``[left, right]``.

    Returns:
        Shape ``[example, 1]``.
    """
    if left.shape[-1] > right.shape[-1]:
        return dot(left @ weight, right)
    return dot(right @ weight.T, left)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a · b of each example, without a tensor of the products.

    Args:
        a: Shape ``[example, …]``.
        b: The same.

    Returns:
        Shape ``[example, 1]``, in single precision at least.
    """
    if a.element_size() < 4 or b.element_size() < 4:  # Long sums in half precision lose too much.
        a, b = a.float(), b.float()
    return (a.flatten(1)[:, None] @ b.flatten(1)[:, :, None])[:, 0]


def _dots_by_id(piece: Matrix, weights: Tensor) -> Tensor:
    ids, rows = piece.inputs.rows[0], piece.pulled.rows[0]
    each = weights if piece.left.is_ids else weights.transpose(1, 2)
    return torch.stack([(w[ids] * rows).flatten(1).sum(1) for w in each], 1)
