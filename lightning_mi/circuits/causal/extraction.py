"""From scores of edges to sets of edges."""

from __future__ import annotations

import heapq
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...errors import ArgumentError
from .graph import Graph

__all__ = ["How", "extract", "greedy", "strongest"]

How: TypeAlias = Literal["greedy", "top", "threshold"]


def extract(graph: Graph, keys: Tensor, how: How, size: float) -> Tensor:
    """Return the edges of a circuit, all of them on a way from an embedding to the logits.

    Args:
        graph: The edges that there are.
        keys: What edges are ranked by ``[writer, reader]``.
        how: ``"greedy"`` grows from the logits, always by the best edge into what is there already;
            ``"top"`` takes the best edges wherever they are; ``"threshold"`` all from a value on.
        size: Number of edges, or the threshold.

    Returns:
        Boolean ``[writer, reader]``. What leads nowhere is pruned, so there may be fewer edges.

    Raises:
        ArgumentError: If the way is unknown.
    """
    if how == "greedy":
        return graph.connected(greedy(graph, keys, int(size)))
    if how == "top":
        return graph.connected(strongest(graph, keys, int(size)))
    if how == "threshold":
        return graph.connected((keys >= size) & graph.lawful)
    raise ArgumentError.of(
        "how", expected="'greedy', 'top' or 'threshold'", got=repr(how), do="Choose one."
    )


def strongest(graph: Graph, keys: Tensor, count: int) -> Tensor:
    """Return the edges with the largest keys.

    Args:
        graph: The edges that there are.
        keys: What they are ranked by ``[writer, reader]``.
        count: How many.

    Returns:
        Boolean ``[writer, reader]``.
    """
    mask = torch.zeros_like(graph.lawful)
    where = graph.lawful.nonzero()
    order = keys[where[:, 0], where[:, 1]].argsort(descending=True, stable=True)[:count]
    mask[where[order, 0], where[order, 1]] = True
    return mask


def greedy(graph: Graph, keys: Tensor, count: int) -> Tensor:
    """Return edges grown from the logits: always the best one into what is there already.

    Args:
        graph: The edges that there are.
        keys: What they are ranked by ``[writer, reader]``.
        count: How many.

    Returns:
        Boolean ``[writer, reader]``.
    """
    mask = torch.zeros_like(graph.lawful)
    table = keys.tolist()
    open_: list[tuple[float, int, int]] = []
    seen: set[int] = set()

    def reach(reader: int) -> None:
        if reader not in seen:
            seen.add(reader)
            for writer in range(graph.after[reader]):
                heapq.heappush(open_, (-table[writer][reader], writer, reader))

    reach(len(graph.readers) - 1)
    for _ in range(count):
        if not open_:
            break
        _, writer, reader = heapq.heappop(open_)
        mask[writer, reader] = True
        for own in graph.inputs[writer]:
            reach(own)
    return mask
