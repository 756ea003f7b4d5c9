"""Passes along a path between two runs, and the edges that their gradients give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...behavior import Behavior
from ...errors import ArgumentError
from .gradients import input_gradients
from .streams import Seen, Wiring, repeated

__all__ = ["add_edges", "add_own_edges", "along"]

ROWS = 96
"""Most examples in one pass of the *activations* variant: what its memory follows from."""


def add_edges(
    values: Tensor, wiring: Wiring, seen: Seen, behavior: Behavior, delta: Tensor, copies: int
) -> None:
    """Add delta · mean gradient to the edges into each input, one product for each reader.

    Args:
        values: What is added to ``[writer, reader]``.
        wiring: The model.
        seen: A pass with ``branch`` over rows ``[step, example]``.
        behavior: What is explained.
        delta: What each node writes in one run less what it writes in the other one.
        copies: Number of steps.
    """
    total = _total(seen.outputs, behavior, copies)
    size, graph = len(behavior), wiring.graph
    scale = 1.0 / (size * copies)
    for inputs, g in input_gradients(wiring, seen, total, steps=copies, size=size):
        stop = graph.after[inputs[0]]
        if not stop:
            continue
        made = delta[:stop].flatten(1) @ g.flatten(1).T
        values[:stop, inputs] += scale * made.to(values)


def _total(outputs: Tensor, behavior: Behavior, copies: int) -> Tensor:
    total = outputs.new_zeros(())
    for block in torch.split(outputs, len(behavior)) if copies > 1 else (outputs,):
        total = total + behavior.metric(block).sum()
    if not total.requires_grad:
        raise ArgumentError.of(
            "behavior",
            expected="a target with a gradient that leads to the model",
            got=type(behavior.question).__name__,
            do="Choose LogitDifference.",
        )
    return total


def along(
    wiring: Wiring, behavior: Behavior, batch: Any, base: Seen, other: Seen, steps: int
) -> Seen:
    """Run all points between two embeddings as one batch.

    Args:
        wiring: The model.
        behavior: What is explained.
        batch: The prompts of ``base``.
        base: One run.
        other: The other run.
        steps: Number of points, at the middles of as many equal parts.

    Returns:
        The pass, over rows ``[step, example]``.

    Raises:
        ArgumentError: If no module returns the embeddings.
    """
    alphas = (torch.arange(steps) + 0.5) / steps
    firsts = [i for i, w in enumerate(wiring.anatomy.writers) if w.layer < 0]
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    for i in firsts:
        a, b = base.returned[i], other.returned[i]
        if a is not None and b is not None and a.ndim == 3 and len(a) == len(behavior):
            ends[i] = a, b
    if not ends:
        raise ArgumentError.of(
            "steps",
            expected="a module that returns the embeddings, so that they can be moved",
            got="embeddings that no module returns",
            do="Use steps=0, or make the embedding a module of its own.",
        )

    def rewrite(writer: int, layer: int, value: Tensor) -> Tensor:
        if layer >= 0 or writer not in ends:
            return value
        a, b = ends[writer]
        share = alphas.to(a).reshape(-1, *([1] * a.ndim))
        return (a + share * (b - a)).flatten(0, 1)

    rows = repeated(batch, len(behavior), steps)
    return wiring.see(rows, branch=True, rewrite=rewrite, reading=(behavior, steps))


def add_own_edges(
    values: Tensor,
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    base: Seen,
    other: Seen,
    delta: Tensor,
    steps: int,
) -> None:
    """Add the edges that leave each writer, along a path of this writer's own output.

    Args:
        values: What is added to ``[writer, reader]``.
        wiring: The model.
        behavior: What is explained.
        batch: The prompts of ``base``.
        base: One run.
        other: The other run.
        delta: What each node writes in ``other`` less what it writes in ``base``.
        steps: Number of points.
    """
    size, graph = len(behavior), wiring.graph
    alphas = ((torch.arange(steps) + 0.5) / steps).to(delta.device)
    per_pass = max(1, ROWS // (size * steps))
    for first in range(0, len(graph.writers), per_pass):
        nodes = list(range(first, min(first + per_pass, len(graph.writers))))
        copies = len(nodes) * steps
        rewrite = _mover(wiring, nodes, base, other, alphas)
        rows = repeated(batch, size, copies)
        seen = wiring.see(rows, branch=True, rewrite=rewrite, reading=(behavior, copies))
        total = _total(seen.outputs, behavior, copies)
        for inputs, g in input_gradients(wiring, seen, total, steps=steps, size=size):
            stop = graph.after[inputs[0]]
            mean = torch.unflatten(g, 1, (len(nodes), size)) / steps
            for place, node in enumerate(nodes):
                if node < stop:
                    made = mean[:, place].flatten(1) @ delta[node].flatten() / size
                    values[node, inputs] += made.to(values)


def _mover(wiring: Wiring, nodes: list[int], base: Seen, other: Seen, alphas: Tensor) -> Any:
    """Return a function that moves each node's own output in the rows that belong to it."""
    starts = wiring.starts

    def rewrite(writer: int, layer: int, value: Tensor) -> Tensor:
        mine = [i for i, n in enumerate(nodes) if starts[writer] <= n < starts[writer + 1]]
        a, b = base.returned[writer], other.returned[writer]
        if not mine or a is None or b is None or value.ndim < 3 or len(value) == 1:
            return value  # Positions, alike in all rows, are the same in both runs.
        whole = torch.unflatten(value, 0, (len(nodes), len(alphas), len(a))).clone()
        share = alphas.to(a).reshape(-1, *([1] * a.ndim))
        for place in mine:
            if layer < 0:
                whole[place] = a + share * (b - a)
            else:
                head = nodes[place] - starts[writer]
                moved = a[:, head] + share[..., 0] * (b[:, head] - a[:, head])
                whole[place, :, :, head] = moved
        return whole.flatten(0, 2)

    return rewrite
