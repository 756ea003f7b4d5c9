"""What a circuit must beat: random connected circuits, shuffled answers, the untrained model."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor

from ...behavior import Behavior
from .extraction import greedy
from .graph import Graph

__all__ = ["random_circuits", "shuffled"]

TRIES = 20


def random_circuits(graph: Graph, mask: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return random connected circuits of the size, the layers and the node types of another one.

    As many heads of each layer, the same MLPs (a layer has but one) and the same embeddings, drawn
    anew; then as many edges among them, grown from the logits by random keys, every one on a way
    from an embedding to the logits. Disconnected ones would do nothing, and prove nothing.

    Args:
        graph: The edges that there are.
        mask: The circuit that is matched ``[writer, reader]``.
        count: How many.
        seed: Seed of the draws.

    Returns:
        Boolean ``[circuit, writer, reader]``; sizes may fall short by a few edges where the drawn
        nodes do not have as many.
    """
    generator = torch.Generator().manual_seed(seed)
    size = int(mask.sum())
    found = []
    for _ in range(count):
        best = torch.zeros_like(mask)
        for _ in range(TRIES):
            drawn = _drawn(graph, mask, size, generator)
            if abs(int(drawn.sum()) - size) < abs(int(best.sum()) - size) or not best.any():
                best = drawn
            if int(best.sum()) == size:
                break
        found.append(best)
    return torch.stack(found) if found else mask.new_zeros(0, *mask.shape)


def _drawn(graph: Graph, mask: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return one draw: nodes, then edges among them."""
    allowed = graph.lawful & _nodes(graph, mask, generator)[:, None]
    readers = torch.zeros(len(graph.readers), dtype=torch.bool)
    readers[-1] = True
    for writer in allowed.any(1).nonzero()[:, 0].tolist():
        readers[list(graph.inputs[writer])] = True
    allowed &= readers
    keys = torch.rand(mask.shape, generator=generator).masked_fill(~allowed, -1.0)
    most = int(allowed.sum())
    made = torch.zeros_like(mask)
    for taken in range(size, most + 1):  # What leads nowhere is pruned, so take more until it fits.
        made = graph.connected(greedy(graph, keys, taken) & allowed)
        if int(made.sum()) >= size:
            break
    return made


def _nodes(graph: Graph, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many nodes of each layer and type as the circuit has."""
    kinds: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, (name, layer) in enumerate(zip(graph.writers, graph.writer_layers, strict=True)):
        kinds[layer, kind_of(name)].append(i)
    used = mask.any(1)
    chosen = torch.zeros(len(graph.writers), dtype=torch.bool)
    for (layer, _), members in kinds.items():
        own = torch.tensor(members)
        if layer < 0:
            chosen[own] = used[own]
            continue
        order = torch.randperm(len(members), generator=generator)
        chosen[own[order[: int(used[own].sum())]]] = True
    return chosen


def kind_of(name: str) -> str:
    """Return the type of a node by its name.

    Args:
        name: Its printed name.

    Returns:
        ``"head"`` or the letters the name begins with.
    """
    return "head" if name.startswith("L") and "H" in name else name.rstrip("0123456789")


def shuffled(behavior: Behavior, seed: int = 0) -> Behavior | None:
    """Return the prompts with the answers of other prompts.

    Args:
        behavior: The prompts.
        seed: Seed of the shuffle.

    Returns:
        The behavior, its answers and wrong answers moved on together so that none keeps its own
        row; None where the target holds answers of its own, or there is one prompt only.
    """
    if behavior.answers is None or behavior.target is not None or len(behavior) < 2:
        return None
    order = torch.randperm(len(behavior), generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    other = other.to(behavior.answers.device)
    wrong = None if behavior.wrong is None else behavior.wrong[other]
    return dataclasses.replace(behavior, answers=behavior.answers[other], wrong=wrong)
