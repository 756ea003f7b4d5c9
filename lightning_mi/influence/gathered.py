"""What every approximation of the curvature is made of, batch by batch: `Gathered`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import batch_size
from .blocks import Block, add_dots, blocks_of, grouped, summed
from .data import row
from .objective import Objective
from .outputs import Labels, curvature_columns, slope_of_loss
from .pieces import Piece, Vector, pieces_of
from .point import Point, at_least_single, repeatable_attention, wide
from .reader import Reader

__all__ = ["Chunk", "Gathered"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Gradients of a batch.

    Args:
        curvature: Pieces whose cotangents are the columns of a root of the outputs' curvature.
        losses: Pieces of the examples' own losses, one cotangent.
        examples: How many.
    """

    curvature: list[Piece]
    losses: list[Piece]
    examples: int


class Kept:
    """Chunks in memory up to a budget, and beyond it in a folder for temporary files.

    Args:
        budget: Bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self._chunks: list[Chunk | Path] = []
        self._folder: Path | None = None

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk.

        Args:
            chunk: The next one.
        """
        size = _bytes(chunk)
        if self.size + size <= self.budget:
            self.size += size
            self._chunks.append(chunk)
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lightning_mi_influence_"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._chunks)}.pt"
        torch.save(chunk, path)
        self._chunks.append(path)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks in order."""
        for chunk in self._chunks:
            if isinstance(chunk, Path):
                # A file of our own, of this process.
                loaded: Chunk = torch.load(chunk, weights_only=False)
                yield loaded
            else:
                yield chunk


class Gathered:
    """The gradients of all training examples, in factors, from one pass over the data.

    The curvature of an example is Jᵀ (∇²_out ℓ) J = Σₖ (Jᵀ rₖ)(Jᵀ rₖ)ᵀ. ``"exact"`` takes columns
    rₖ with Σₖ rₖ rₖᵀ = ∇²_out ℓ (for a classifier √p_c (p − e_c), which is the expectation over the
    model's own labels); ``"sampled"`` one random r with that expectation, drawn for each example by
    its place in the data, so that batches do not matter; ``"true"`` the gradient of the example's
    own loss, the *empirical* Fisher matrix, which is another one. ``"auto"`` is exact up to `FEW`
    outputs, and sampled beyond and for texts.

    Args:
        point: The model.
        objective: Outputs and losses.
        batches: Called for a fresh pass over the data.
        labels: Which.
        seed: Of the samples.
        budget: Bytes of gradients that are kept in memory between passes; others are kept on disk.
        places: Place in the data of each example that the batches hold; None is their order.
        own: Gather the gradients of the examples' own losses too.
        processes: Processes that share the data; these batches are one's part of it.
        drawn: These examples are in random order, so that the first few speak for all.
    """

    def __init__(
        self,
        point: Point,
        objective: Objective,
        batches: Callable[[], Iterable[Any]],
        labels: Labels = "auto",
        seed: int = 0,
        budget: int = 2**30,
        places: Sequence[int] | None = None,
        own: bool = True,
        processes: int = 1,
        drawn: bool = False,
    ) -> None:
        self.point, self.objective, self.batches = point, objective, batches
        self.labels, self.seed, self.budget = labels, seed, budget
        self.places, self.with_losses = places, own
        self.processes, self.drawn = processes, drawn
        self._reader = Reader(point, objective.outputs, point.plans)
        self._kept: Kept | None = None
        self.count = 0
        self._first: Chunk | None = None
        self._blocks: list[Block] | None = None
        self.used: str = labels

    @property
    def blocks(self) -> list[Block]:
        """The parameters in blocks.

        Raises:
            RuntimeError: If there is no batch to find them with.
        """
        if self._blocks is None and self._first is None:
            self._first = next((self._chunk(b, 0) for b in self.batches()), None)
        if self._blocks is None:
            raise RuntimeError("No batch was read.")
        return self._blocks

    def __iter__(self) -> Iterator[Chunk]:
        """Yield all batches; they are computed once and then kept."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = Kept(self.budget)
        start = 0
        for batch in self.batches():
            # The first batch may have been looked at already, to find the blocks.
            first, self._first = self._first, None
            chunk = self._chunk(batch, start) if first is None else first
            start += chunk.examples
            kept.add(chunk)
            yield chunk
        self._kept, self.count = kept, start

    @property
    def kind(self) -> torch.dtype:
        """Type of the gradients: the model's own, single where that is half."""
        return torch.float32 if self.point.dtype.itemsize < 4 else self.point.dtype

    @property
    def complete(self) -> bool:
        """Whether all of it was gathered."""
        return self._kept is not None

    @property
    def shared(self) -> bool:
        """Whether other processes have parts of it."""
        return self.processes > 1

    def mean(self) -> Tensor:
        """Return the mean of ∇ℓᵢ over all examples, ``[P]``."""
        device = self.point.device
        total = torch.zeros(1, self.point.size, dtype=wide(device), device=device)
        examples = 0
        for chunk in self:
            examples += chunk.examples
            by_name = grouped(chunk.losses)
            for block in self.blocks:
                for piece in by_name.get(block.name, []):
                    block.put(total, block.take(total) + summed(block, piece.part(slice(0, 1))))
        return total[0] / max(1, examples)

    def dots(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∇ℓᵢ · v for all examples and some vectors, and Σ ∇ℓᵢ.

        Args:
            vectors: Shape ``[vector, P]``.

        Returns:
            Shapes ``[example, vector]`` and ``[P]``, in double precision.
        """
        return self._contracted(vectors, ((c.losses, c.examples) for c in self))

    def stream(self, batches: Iterable[Any], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `dots` for other batches, of which nothing is kept.

        Args:
            batches: The examples.
            vectors: Shape ``[vector, P]``.

        Returns:
            Shapes ``[example, vector]`` and ``[P]``, in double precision.
        """
        return self._contracted(vectors, ((self.own(b), batch_size(b)) for b in batches))

    def _contracted(
        self, vectors: Tensor, chunks: Iterable[tuple[list[Piece], int]]
    ) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        total = vectors.new_zeros(1, self.point.size, dtype=wide(vectors.device))
        parts: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for pieces, examples in chunks:
            by_name = grouped(pieces)
            parts = parts or {b.name: b.take(vectors, self.kind) for b in self.blocks}
            sums = sums or {b.name: total.new_zeros(1, *b.shape) for b in self.blocks}
            row = vectors.new_zeros(examples, len(vectors), dtype=self.kind)
            for block in self.blocks:
                if block.name in by_name:
                    add_dots(row, block, by_name[block.name], parts[block.name], sums[block.name])
            rows.append(row)
        for block in self.blocks:
            block.put(total, sums[block.name])
        dots = torch.cat(rows) if len(rows) > 1 else rows[0]
        return dots.to(total.dtype), total[0]

    def own(self, batch: Any) -> list[Piece]:
        """Return the gradients of the losses of a batch alone."""
        return self.of(batch, partial(slope_of_loss, self.objective.task, batch=batch))

    def of(self, batch: Any, slopes: Callable[[Tensor], Tensor]) -> list[Piece]:
        """Return the gradients of a function of the outputs, given those in the outputs."""
        return self._read(batch, lambda outputs: [slopes(outputs)])

    def _chunk(self, batch: Any, start: int) -> Chunk:
        counts: list[int] = []
        own = partial(slope_of_loss, self.objective.task, batch=batch)

        def cotangents(outputs: Tensor) -> list[Tensor]:
            if self.labels == "true":
                counts.append(1)
                self.used = "true"
                return [own(outputs)]
            places: Sequence[int] = range(start, start + len(outputs))
            if self.places is not None:
                places = self.places[start : start + len(outputs)]
            self.used, columns = curvature_columns(
                self.objective, outputs, batch, self.labels, places, self.seed
            )
            counts.append(len(columns))
            return [*columns, own(outputs)] if self.with_losses else columns

        pieces = self._read(batch, cotangents)
        k = counts[0]
        losses = pieces if self.labels == "true" else [p.part(slice(k, k + 1)) for p in pieces]
        curvature = pieces if self.labels == "true" else [p.part(slice(0, k)) for p in pieces]
        return Chunk(curvature, losses, batch_size(batch))

    def _read(self, batch: Any, cotangents: Callable[[Tensor], list[Tensor]]) -> list[Piece]:
        read = self._reader.read(batch, cotangents)
        pieces, apart = pieces_of(read, self.point)
        if apart:
            pieces = pieces + self._apart(batch, cotangents, apart, read.values)
        if self._blocks is None:
            self._blocks = blocks_of(pieces, self.point)
        return pieces

    def _apart(
        self,
        batch: Any,
        cotangents: Callable[[Tensor], list[Tensor]],
        names: frozenset[str],
        values: Tensor | None,
    ) -> list[Piece]:
        """Return the gradients of some parameters, one example at a time."""
        if values is None:
            with torch.no_grad():
                values = self.point.call(partial(self.objective.outputs, batch=batch)).detach()
        vectors = cotangents(values)
        leaves = {n: self.point.parameters[n] for n in sorted(names)}
        rows: dict[str, list[Tensor]] = {n: [] for n in leaves}
        for i in range(batch_size(batch)):
            single = row(batch, i)
            with repeatable_attention(self.point.device), torch.enable_grad():
                out = self.point.call(partial(self.objective.outputs, batch=single))
                for name, each in _pulled(out, [v[i : i + 1] for v in vectors], leaves).items():
                    rows[name].append(each)
        return [Vector(n, torch.stack(r, 1)) for n, r in rows.items()]


def _pulled(out: Tensor, vectors: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return for each parameter the gradients along each vector, ``[cotangent, number]``."""
    found: dict[str, list[Tensor]] = {n: [] for n in leaves}
    for vector in vectors:
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            grads = torch.autograd.grad(
                out, list(leaves.values()), vector, retain_graph=True, allow_unused=True
            )
        for (name, p), g in zip(leaves.items(), grads, strict=True):
            whole = torch.zeros_like(p) if g is None else g
            found[name].append(at_least_single(whole.flatten()))
    return {n: torch.stack(each) for n, each in found.items()}


def _bytes(chunk: Chunk) -> int:
    """Return the memory of a chunk; inputs that both kinds of pieces share count once."""
    tensors = [t for p in [*chunk.curvature, *chunk.losses] for t in p.tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
