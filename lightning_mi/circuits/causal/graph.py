"""The residual graph: which part can read what which other part writes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import Anatomy, Writer
from ...errors import ArgumentError, ModelError
from ...nodes import Head, Reader

__all__ = ["Edge", "Graph", "moves"]


@dataclass(frozen=True, order=True)
class Edge:
    """What one part writes, as read by another one.

    Args:
        writer: Its printed name: ``embed``, ``pos``, ``L0H1``, ``MLP0``.
        reader: The input that reads it: ``L1H0.q``, ``MLP1``, ``logits``. Keys and values count
            heads as they are stored, hence per key-value head under grouped queries.
        source: Position at which it is written; None for all.
        target: Position that what is read there works for: for keys and values that of the query,
            else ``source`` itself.
    """

    writer: str
    reader: str
    source: int | None = None
    target: int | None = None

    def __str__(self) -> str:
        """Return for example ``L0H1->L1H0.k``."""
        where = "" if self.source is None else f"@{self.source}"
        there = "" if self.target is None else f"@{self.target}"
        return f"{self.writer}{where}->{self.reader}{there}"


@dataclass(frozen=True)
class Graph:
    """All edges that a transformer can have, as plain data.

    Args:
        writers: Names, in the order of writing.
        writer_layers: The layer of each; −1 for what is written before the first.
        readers: Names of inputs, in the order of reading; the last one is ``logits``.
        reader_layers: The layer of each; the number of layers for the logits.
        after: How many of the writers have written when each input reads.
        inputs: For each writer the indices of the inputs that its output is computed from.
        causal: Whether a position can only look back.
    """

    writers: tuple[str, ...]
    writer_layers: tuple[int, ...]
    readers: tuple[str, ...]
    reader_layers: tuple[int, ...]
    after: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    causal: bool = True

    @classmethod
    def of(cls, anatomy: Anatomy, *, causal: bool = True) -> Graph:
        """Return the graph of a model.

        Args:
            anatomy: What the model is made of.
            causal: Whether a position can only look back.

        Returns:
            The graph. Where attention and MLP read the same stream, neither reads the other.

        Raises:
            ModelError: If the stream is no sum of what was written, or it is unknown who reads.
        """
        _require_sum(anatomy)
        readers, layers, after, first = _inputs_of(anatomy)
        writers: list[str] = []
        where: list[int] = []
        inputs: list[tuple[int, ...]] = []
        starts = [0]
        for w in anatomy.writers:
            names = _names_of(w, anatomy)
            writers += names
            where += [w.layer] * len(names)
            inputs += [_reads(w, head, anatomy, first) for head in range(len(names))]
            starts.append(len(writers))
        return cls(
            tuple(writers),
            tuple(where),
            tuple(readers),
            tuple(layers),
            tuple(starts[n] for n in after),
            tuple(inputs),
            causal,
        )

    @functools.cached_property
    def lawful(self) -> Tensor:
        """Which edges there can be, boolean ``[writer, reader]``."""
        return torch.arange(len(self.writers))[:, None] < torch.tensor(self.after)

    @property
    def n_edges(self) -> int:
        """Number of edges that there can be."""
        return sum(self.after)

    @property
    def sources(self) -> list[int]:
        """Indices of the writers that read nothing: the embeddings."""
        return [i for i, own in enumerate(self.inputs) if not own]

    def owners(self, reader: int) -> list[int]:
        """Return the writers whose output is computed from an input.

        Args:
            reader: Index of the input.

        Returns:
            Indices of writers; none for the logits.
        """
        return self._owners[reader]

    @functools.cached_property
    def _owners(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.readers]
        for writer, own in enumerate(self.inputs):
            for reader in own:
                found[reader].append(writer)
        return found

    def index(self, edge: Edge) -> tuple[int, int]:
        """Return writer and reader index of an edge, or refuse one that cannot be.

        Args:
            edge: The edge.

        Returns:
            Both indices.

        Raises:
            ArgumentError: If a name is unknown, or the edge would run backwards in layers or, in a
                causal model, in positions.
        """
        writer = _find(edge.writer, self.writers, "writer")
        reader = _find(edge.reader, self.readers, "reader")
        if writer >= self.after[reader]:
            raise ArgumentError.of(
                "edges",
                expected="edges that run forward in layers",
                got=str(edge),
                do=f"{edge.writer} writes only after {edge.reader} has read.",
            )
        self._check_positions(edge)
        return writer, reader

    def mask(self, edges: Iterable[Edge]) -> Tensor:
        """Return a set of edges as a boolean matrix.

        Args:
            edges: The edges.

        Returns:
            Boolean ``[writer, reader]``.
        """
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for edge in edges:
            mask[self.index(edge)] = True
        return mask

    def edges(self, mask: Tensor) -> tuple[Edge, ...]:
        """Return the edges of a boolean matrix, in the order of the graph.

        Args:
            mask: Boolean ``[writer, reader]``.

        Returns:
            The edges.
        """
        found = mask.nonzero().tolist()
        return tuple(Edge(self.writers[w], self.readers[r]) for w, r in found)

    def connected(self, mask: Tensor) -> Tensor:
        """Return the edges that lie on a way from an embedding to the logits.

        Args:
            mask: Boolean ``[writer, reader]``.

        Returns:
            Boolean ``[writer, reader]``, a part of ``mask``.
        """
        fed = self._fed(mask)
        kept = mask & fed[:, None]
        useful = torch.zeros(len(self.readers), dtype=torch.bool)
        useful[-1] = True
        for writer in reversed(range(len(self.writers))):
            if bool((kept[writer] & useful).any()):
                useful[list(self.inputs[writer])] = True
        return kept & useful

    def _fed(self, mask: Tensor) -> Tensor:
        """Return which writers have a way from an embedding."""
        fed = torch.zeros(len(self.writers), dtype=torch.bool)
        for writer, own in enumerate(self.inputs):
            fed[writer] = not own or bool((mask[:writer, list(own)] & fed[:writer, None]).any())
        return fed

    def _check_positions(self, edge: Edge) -> None:
        if min(edge.source or 0, edge.target or 0) < 0:
            raise ArgumentError.of(
                "edges",
                expected="positions from 0",
                got=str(edge),
                do="Count from the first token; prompts of other lengths are other circuits.",
            )
        if edge.source is None or edge.target is None:
            return
        if not moves(edge.reader) and edge.source != edge.target:
            raise ArgumentError.of(
                "edges",
                expected=f"one position, as {edge.reader} reads where it works",
                got=str(edge),
                do="Only keys and values carry from one position to another.",
            )
        if self.causal and edge.source > edge.target:
            raise ArgumentError.of(
                "edges",
                expected="edges that run forward in positions, as the model is causal",
                got=str(edge),
                do="Exchange source and target.",
            )


def moves(reader: str) -> bool:
    """Return whether what an input reads is carried on to other positions.

    Args:
        reader: Its printed name.

    Returns:
        True for keys and values.
    """
    return reader.endswith((".k", ".v"))


def _find(name: str, names: tuple[str, ...], what: str) -> int:
    if name not in names:
        raise ArgumentError.of(
            "edges",
            expected=f"a {what} of the graph: {', '.join(names[:8])}, …",
            got=repr(name),
            do="Names print as L1H3, L1H3.q, MLP2, embed, logits.",
        )
    return names.index(name)


def _require_sum(anatomy: Anatomy) -> None:
    post = [w.label for w in anatomy.writers if w.through]
    lost = [w.label for w in anatomy.writers if w.layer >= 0 and w.reads < 0]
    if post or lost or not anatomy.writers:
        why = (
            f"norms that the whole stream passes after {post[0]}"
            if post
            else f"{lost[0]!r}, of which it is unknown what it reads"
            if lost
            else "no writers"
        )
        raise ModelError(
            "model: expected a residual stream that is the sum of what its parts write, got "
            f"{why}. Edges are defined for such a sum only. "
            f"{' '.join(str(n) for n in anatomy.notes)}".rstrip()
        )
    if not anatomy.readers or anatomy.readers[-1].kind != "logits":
        raise ModelError(
            "model: expected the anatomy to say which module reads the logits from the stream, got "
            f"readers {[r.label for r in anatomy.readers]}. "
            f"{' '.join(str(n) for n in anatomy.notes)}".rstrip()
        )


def _inputs_of(anatomy: Anatomy) -> tuple[list[str], list[int], list[int], dict[int, int]]:
    """Return names, layers, how many wrote before, and the first input of each reader."""
    names: list[str] = []
    layers: list[int] = []
    after: list[int] = []
    first: dict[int, int] = {}
    for index, reader in enumerate(anatomy.readers):
        first[index] = len(names)
        own = [reader.label]
        if reader.kind == "attention":
            own = _head_inputs(anatomy, reader.layer)
        names += own
        layers += [reader.layer] * len(own)
        after += [reader.after] * len(own)
    return names, layers, after, first


def _head_inputs(anatomy: Anatomy, layer: int) -> list[str]:
    heads, kv = anatomy.n_heads[layer], anatomy.n_kv_heads[layer]
    return [
        *(str(Reader(Head(layer, h), "q")) for h in range(heads)),
        *(str(Reader(Head(layer, h), "k")) for h in range(kv)),
        *(str(Reader(Head(layer, h), "v")) for h in range(kv)),
    ]


def _names_of(writer: Writer, anatomy: Anatomy) -> list[str]:
    if writer.kind != "heads":
        return [writer.label]
    return [str(Head(writer.layer, h)) for h in range(anatomy.n_heads[writer.layer])]


def _reads(writer: Writer, head: int, anatomy: Anatomy, first: dict[int, int]) -> tuple[int, ...]:
    if writer.reads < 0:
        return ()
    start = first[writer.reads]
    if writer.kind != "heads":
        return (start,)
    heads, kv = anatomy.n_heads[writer.layer], anatomy.n_kv_heads[writer.layer]
    group = head // (heads // kv)
    return (start + head, start + heads + group, start + heads + kv + group)
