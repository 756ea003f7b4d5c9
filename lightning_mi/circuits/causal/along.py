"""Passes along a path between two runs, and the edges that their gradients give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...behavior import Behavior
from ...errors import ArgumentError
from .gradients import input_gradients
from .streams import Inside, Seen, Wiring, repeated

__all__ = ["add_edges", "add_own_edges", "along", "path_of", "require_gradient", "total_of"]

ROWS = 96
"""Most examples in one pass of the *activations* variant: what its memory follows from."""


def add_edges(
    values: Tensor,
    wiring: Wiring,
    seen: Seen,
    behavior: Behavior,
    delta: Tensor,
    copies: int,
    start: int = 0,
) -> None:
    """Add delta · mean gradient to the edges into each input, one product for each reader.

    Args:
        values: What is added to ``[writer, reader]``.
        wiring: The model.
        seen: A pass with ``branch`` over rows ``[step, example]``.
        behavior: What is explained.
        delta: What each node writes in one run less what it writes in the other one.
        copies: Number of steps.
        start: First position at which ``delta`` is not zero.
    """
    total = total_of(seen.outputs, behavior, copies)
    size, graph = len(behavior), wiring.graph
    scale = 1.0 / (size * copies)
    late = delta[:, :, start:]
    for inputs, g in input_gradients(wiring, seen, total, steps=copies, size=size, start=start):
        stop = graph.after[inputs[0]]
        if not stop:
            continue
        made = late[:stop].flatten(1) @ g.flatten(1).T
        values[:stop, inputs] += scale * made.to(values)


def total_of(outputs: Tensor, behavior: Behavior, copies: int) -> Tensor:
    """Return the sum of the metric over all rows ``[copy, example]``.

    Args:
        outputs: The model's outputs.
        behavior: What is explained.
        copies: Number of copies.

    Returns:
        A number with a gradient.

    Raises:
        ArgumentError: If the target has no gradient.
    """
    total = outputs.new_zeros(())
    for block in torch.split(outputs, len(behavior)) if copies > 1 else (outputs,):
        total = total + behavior.metric(block).sum()
    require_gradient(total, behavior)
    return total


def require_gradient(number: Tensor, behavior: Behavior) -> None:
    """Refuse a target that no gradient leads from.

    Args:
        number: What was made of the metric.
        behavior: What is explained.

    Raises:
        ArgumentError: If the target has no gradient.
    """
    if not number.requires_grad:
        raise ArgumentError.of(
            "behavior",
            expected="a target with a gradient that leads to the model",
            got=type(behavior.question).__name__,
            do="Choose LogitDifference.",
        )


def path_of(
    wiring: Wiring,
    behavior: Behavior,
    base: Sequence[Tensor | None],
    other: Sequence[Tensor | None],
    steps: int,
) -> dict[int, Tensor]:
    """Return the points between two embeddings, at the middles of as many equal parts.

    Args:
        wiring: The model.
        behavior: What is explained.
        base: What writers returned in one run.
        other: What they returned in the other one.
        steps: Number of points.

    Returns:
        For each writer that embeds its outputs over rows ``[step, example]``.

    Raises:
        ArgumentError: If no module returns the embeddings.
    """
    alphas = (torch.arange(steps) + 0.5) / steps
    found: dict[int, Tensor] = {}
    for i, writer in enumerate(wiring.anatomy.writers):
        a, b = base[i], other[i]
        if writer.layer >= 0 or a is None or b is None:
            continue
        if a.ndim == 3 and len(a) == len(behavior):
            share = alphas.to(a).reshape(-1, *([1] * a.ndim))
            found[i] = (a + share * (b - a)).flatten(0, 1)
    if not found:
        raise ArgumentError.of(
            "steps",
            expected="a module that returns the embeddings, so that they can be moved",
            got="embeddings that no module returns",
            do="Use steps=0, or make the embedding a module of its own.",
        )
    return found


def along(
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    path: Mapping[int, Tensor],
    steps: int,
    inside: Inside = nullcontext,
) -> Seen:
    """Run all points of a path as one batch.

    Args:
        wiring: The model.
        behavior: What is explained.
        batch: The prompts of the run that the path starts at.
        path: What embeddings write, over rows ``[step, example]``.
        steps: Number of points.
        inside: Makes a context that the pass is run in.

    Returns:
        The pass, over rows ``[step, example]``.
    """

    def rewrite(writer: int, layer: int, value: Tensor) -> Tensor:
        return value if layer >= 0 else path.get(writer, value)

    rows = repeated(batch, len(behavior), steps)
    reading = (behavior, steps)
    return wiring.see(rows, branch=True, rewrite=rewrite, reading=reading, inside=inside)


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
        total = total_of(seen.outputs, behavior, copies)
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
