"""Where edges are live: circuits whose edges carry positions, in numbers that a run can use.

A set of edges is a matrix of codes ``[writer, reader]``. 0 is nowhere and 1 everywhere, so that a
boolean matrix is one, too; every other code is a row of a table ``[code, source, target]`` that
says at which positions the edge is live. Codes come in pairs, 2j and 2j + 1, that are each other's
complement, as are 0 and 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ...errors import ArgumentError
from .graph import Edge, Graph, moves

__all__ = ["cells", "coded", "complement", "reach"]


def coded(graph: Graph, edges: Iterable[Edge], length: int) -> tuple[Tensor, Tensor | None]:
    """Return a set of edges as codes, and what they mean.

    Args:
        graph: The edges that there can be.
        edges: The edges; one without positions is live everywhere, one with a source alone is for
            all targets, and likewise. Several between the same two parts add up.
        length: Number of positions.

    Returns:
        Codes ``[writer, reader]`` and the table ``[code, source, target]``; a boolean matrix and
        None where no edge carries positions.

    Raises:
        ArgumentError: If a position lies outside.
    """
    own = list(edges)
    if all(e.source is None and e.target is None for e in own):
        return graph.mask(own), None
    live: dict[tuple[int, int], Tensor] = defaultdict(
        lambda: torch.zeros(length, length, dtype=torch.bool)
    )
    for edge in own:
        live[graph.index(edge)] |= _pattern(edge, length)
    table = [torch.zeros(length, length, dtype=torch.bool), torch.ones(length, length).bool()]
    known = {_key(pattern): code for code, pattern in enumerate(table)}
    codes = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.long)
    for at, pattern in live.items():
        if _key(pattern) not in known:
            known[_key(pattern)], known[_key(~pattern)] = len(table), len(table) + 1
            table += [pattern, ~pattern]
        codes[at] = known[_key(pattern)]
    return codes, torch.stack(table)


def complement(codes: Tensor, lawful: Tensor) -> Tensor:
    """Return what a set of edges leaves out of the whole graph.

    Args:
        codes: Boolean, or codes ``[writer, reader]``.
        lawful: The whole graph.

    Returns:
        The same kind of matrix.
    """
    if codes.dtype == torch.bool:
        return lawful & ~codes
    return torch.where(lawful, codes ^ 1, 0)


def reach(graph: Graph, length: int) -> Tensor:
    """Return at how many pairs of positions each edge can be live.

    Args:
        graph: The edges that there can be.
        length: Number of positions.

    Returns:
        Integers ``[writer, reader]``: one for each position, or for each source with each target
        that can look back at it; 0 where there is no edge.
    """
    pairs = length * (length + 1) // 2 if graph.causal else length * length
    counts = torch.tensor([pairs if moves(r) else length for r in graph.readers])
    return graph.lawful * counts


def cells(graph: Graph, codes: Tensor, table: Tensor) -> int:
    """Return at how many pairs of positions a set of edges is live.

    Args:
        graph: The edges that there can be.
        codes: The edges ``[writer, reader]``.
        table: What codes mean ``[code, source, target]``.

    Returns:
        Their number; `reach` adds up to the largest one.
    """
    both = table.triu() if graph.causal else table
    counts = torch.stack([table.diagonal(dim1=1, dim2=2).sum(1), both.sum((1, 2))])
    kind = torch.tensor([int(moves(r)) for r in graph.readers])
    return int((counts[kind[None, :], codes.long()] * graph.lawful).sum())


def _pattern(edge: Edge, length: int) -> Tensor:
    """Return where an edge is live ``[source, target]``."""
    source, target = edge.source, edge.target
    if max(source or 0, target or 0) >= length:
        raise ArgumentError.of(
            "edges",
            expected=f"positions inside the {length} of the prompts",
            got=str(edge),
            do="Positions count from 0; run the circuit on prompts of the length it was made for.",
        )
    if not moves(edge.reader):
        # What is read there works for the same position.
        source = target = target if source is None else source
    found = torch.zeros(length, length, dtype=torch.bool)
    every = slice(None)
    found[every if source is None else source, every if target is None else target] = True
    return found


def _key(pattern: Tensor) -> bytes:
    return bytes(pattern.flatten().tolist())
