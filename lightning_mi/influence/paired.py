"""Products of gradients of examples with those of queries, both read in factors: `Queries`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..batch import batch_size
from ..measurement import IndexedData
from .blocks import Block, add_dots, blocks_of, dense, dense_all, grouped, in_parts
from .data import chunks, of_one_shape
from .objective import Objective
from .outputs import slope_of_loss, slope_of_query
from .pieces import Factor, Matrix, Piece, Vector, pieces_of
from .point import Point, wide
from .queries import as_question
from .reader import Reader

__all__ = ["Queries", "queries_in_factors"]

LARGEST = 2**24
"""Numbers of a batch's gradients in full, of one parameter that has no factors, beyond which such
a parameter is better differentiated in the direction of each query."""

PRODUCTS = 2**16
"""Products of rows that exist at once; so many stay in a processor's cache."""

Adding: TypeAlias = Callable[[Tensor, slice], None]
"""Adds products with the gradients of some examples, of those in the slice, to a total."""


@dataclass(frozen=True, eq=False)
class Queries:
    """∇L_q of several queries, in factors.

    A layer with one row for each example has gradients s ⊗ a. The product of two of them is
    (s·s')(a·a'), two matrix products and one of their entries for all pairs: neither side is
    formed in full. With more rows it is the sum over pairs of rows, as long as that is less work.

    Args:
        point: The model.
        objective: Outputs and losses.
        reader: Reads batches; it knows how the layers lay out examples.
        parts: Pieces of each batch of queries, and how many queries it has.
    """

    point: Point
    objective: Objective
    reader: Reader
    parts: Sequence[tuple[list[Piece], int]]

    @property
    def count(self) -> int:
        """Number of queries."""
        return sum(examples for _, examples in self.parts)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The gradients of all queries."""
        return _joined([pieces for pieces, _ in self.parts])

    @cached_property
    def whole(self) -> Tensor:
        """The gradients in full, ``[query, P]``, in double precision."""
        size = self.point.size
        return torch.cat([dense_all(self._blocks, p, n, size) for p, n in self.parts])

    def dots(self, batches: Iterable[Any], scale: Tensor) -> Tensor | None:
        """Return Σ_p scale_p ∇_p ℓᵢ ∇_p L_q for every example and query.

        Args:
            batches: The examples.
            scale: A factor for each parameter, ``[P]``, or for all of them, ``[1]``.

        Returns:
            Shape ``[example, query]``, in double precision; None where the examples' gradients
            cannot be read in factors.
        """
        joined = grouped(self.pieces)
        asked = {
            b.name: _Asked(b, joined[b.name], self._of_block(scale, b))
            for b in self._blocks
            if b.name in joined
        }
        rows = []
        for batch in batches:
            slopes = partial(slope_of_loss, self.objective.task, batch=batch)
            pieces = _pieces(self.reader, self.point, batch, slopes)
            if pieces is None:
                return None
            known = [(asked[n], own) for n, own in grouped(pieces).items() if n in asked]
            adding = [add for block, own in known for add in block.adding(own)]
            rows.append(self._total(adding, batch_size(batch)))
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _total(self, adding: Sequence[Adding], examples: int) -> Tensor:
        """Return ``[example, query]``, a few examples at a time so that a cache holds them."""
        device, count = self.point.device, self.count
        total = torch.empty(examples, count, dtype=wide(device), device=device)
        step = min(max(1, PRODUCTS // count), examples)
        memory = total.new_empty(step, count, dtype=self._kind)
        for start in range(0, examples, step):
            where = slice(start, min(start + step, examples))
            part = memory[: where.stop - start].zero_()
            for add in adding:
                add(part, where)
            total[where] = part
        return total

    def _of_block(self, scale: Tensor, block: Block) -> Tensor:
        narrow = scale.to(self._kind)
        if len(scale) == 1:
            return narrow.reshape([1] * len(block.shape))
        return block.take(narrow[None])[0]

    @cached_property
    def _blocks(self) -> list[Block]:
        return blocks_of(self.parts[0][0], self.point)

    @property
    def _kind(self) -> torch.dtype:
        return torch.float32 if self.point.dtype.itemsize < 4 else self.point.dtype


def queries_in_factors(
    point: Point, objective: Objective, query: Any, data: IndexedData | None, size: int | None
) -> Queries | None:
    """Return gradients of queries without forming them.

    Args:
        point: The model.
        objective: Outputs and losses.
        query: What is asked about.
        data: The queries.
        size: Examples run at once.

    Returns:
        The gradients; None where something else than a function of each example's outputs is asked
        about, queries would pad each other, or a parameter's gradients have no factors and are
        large.
    """
    if data is None or as_question(query) is not None:
        return None
    target = objective.query(query)
    if objective.asks_by_itself(target) or not of_one_shape(data):
        return None
    reader, parts = Reader(point, objective.outputs, point.plans), []
    for batch in chunks(data, range(len(data)), size, point):
        pieces = _pieces(reader, point, batch, partial(slope_of_query, target, batch=batch))
        if pieces is None:
            return None
        parts.append((pieces, batch_size(batch)))
    alike = len({tuple(_form(p) for p in pieces) for pieces, _ in parts}) == 1
    return Queries(point, objective, reader, parts) if alike else None


def _pieces(
    reader: Reader, point: Point, batch: Any, slopes: Callable[[Tensor], Tensor]
) -> list[Piece] | None:
    read = reader.read(batch, lambda outputs: [slopes(outputs)])
    pieces, apart = pieces_of(read, point)
    large = any(isinstance(p, Vector) and p.values.numel() > LARGEST for p in pieces)
    return None if apart or large else pieces


def _form(piece: Piece) -> tuple[Any, ...]:
    """Return what has to be the same for pieces of two batches to be put together."""
    if isinstance(piece, Vector):
        return (piece.name,)
    return (
        piece.name,
        *((f.pulled, f.is_ids, f.rows.shape[2:]) for f in (piece.left, piece.right)),
    )


def _joined(parts: Sequence[list[Piece]]) -> list[Piece]:
    """Put the pieces of several batches together."""
    if len(parts) == 1:
        return parts[0]
    return [_together(same) for same in zip(*parts, strict=True)]


def _together(pieces: Sequence[Piece]) -> Piece:
    first, vectors = pieces[0], [p for p in pieces if isinstance(p, Vector)]
    if isinstance(first, Vector):
        return replace(first, values=torch.cat([v.values for v in vectors], 1))
    matrices = [p for p in pieces if isinstance(p, Matrix)]
    left = torch.cat([m.left.rows for m in matrices], 1)
    right = torch.cat([m.right.rows for m in matrices], 1)
    sides = (replace(first.left, rows=left), replace(first.right, rows=right))
    return replace(first, left=sides[0], right=sides[1])


@dataclass(frozen=True, eq=False)
class _Asked:
    """The queries' gradients of one block, with the factor of each of its entries."""

    block: Block
    pieces: Sequence[Piece]
    scale: Tensor

    def adding(self, own: Sequence[Piece]) -> list[Adding]:
        """Return what adds the products with the gradients of examples to ``[example, query]``."""
        if self._inputs is None or not self._by_rows(own):
            return [self._adding_whole(own)]
        pairs = [(a, b) for a in own for b in self.pieces]
        return [
            _adding_rows(a, b, self._inputs)
            for a, b in pairs
            if isinstance(a, Matrix) and isinstance(b, Matrix)
        ]

    def _adding_whole(self, own: Sequence[Piece]) -> Adding:
        def add(total: Tensor, where: slice) -> None:
            add_dots(total, self.block, [p.examples(where) for p in own], self._weights)

        return add

    @cached_property
    def _weights(self) -> Tensor:
        """Gradients in full times their factors."""
        parts = [dense(self.block, part)[0] for part in in_parts(self.block, self.pieces)]
        return torch.cat(parts) * self.scale

    @cached_property
    def _inputs(self) -> Tensor | None:
        """The factor of each entry of the inputs, where it is the same for all outputs."""
        matrices = [p for p in self.pieces if isinstance(p, Matrix)]
        if len(matrices) < len(self.pieces) or any(m.inputs.is_ids for m in matrices):
            return None
        turned = {m.right.pulled for m in matrices}
        if len(turned) > 1:
            return None
        along = self.scale.T if turned.pop() else self.scale  # [pulled, input]
        return along[0] if len(along) == 1 or bool((along == along[:1]).all()) else None

    def _by_rows(self, own: Sequence[Piece]) -> bool:
        """Say whether products of rows are less work than gradients in full."""
        rows, work = 0, 0
        asked = [p for p in self.pieces if isinstance(p, Matrix)]
        for piece in own:
            if not isinstance(piece, Matrix) or piece.inputs.is_ids:
                return False
            rows += piece.pulled.rows.shape[2]
            for other in asked:
                pairs = piece.pulled.rows.shape[2] * other.pulled.rows.shape[2]
                work += pairs * sum(self.block.shape)
        count = asked[0].pulled.rows.shape[1]
        return work * count < self.block.size * (count + rows)


def _adding_rows(piece: Matrix, other: Matrix, scale: Tensor) -> Adding:
    """Return what adds Σ (left · left')(right · right') over pairs of rows."""
    pairs = [(piece.left, other.left), (piece.right, other.right)]
    sides = [(own.rows[0], _flat(b, None if b.pulled else scale).T) for own, b in pairs]
    rows, asked = piece.pulled.rows.shape[2], other.pulled.rows.shape[2]

    def add(total: Tensor, where: slice) -> None:
        each = [(own[where], b) for own, b in sides]
        if rows * asked == 1:
            one, two = (own[:, 0] @ b for own, b in each)
            total.addcmul_(one, two)
            return
        step = max(1, PRODUCTS // (rows * asked * total.shape[1]))
        for start in range(0, len(total), step):
            some = slice(start, start + step)
            one, two = (own[some].flatten(0, 1) @ b for own, b in each)
            product = one.mul_(two).reshape(-1, rows, total.shape[1], asked)
            total[some] += product.sum((1, 3))

    return add


def _flat(factor: Factor, scale: Tensor | None) -> Tensor:
    rows = factor.rows[0].flatten(0, 1)
    return rows if scale is None else rows * scale
