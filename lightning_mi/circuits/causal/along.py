"""Passes along a path between two runs, and the edges that their gradients give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...behavior import Behavior
from ...errors import ArgumentError
from .blocks import Part, differentiated, separately
from .gradients import at_inputs, inputs_of_heads_known, wanted_for_inputs
from .streams import Inside, Rewrite, Seen, Wiring, repeated

__all__ = ["add_edges", "add_own_edges", "path_of", "require_gradient", "total_of"]

ROWS = 96
"""Most examples in one pass of the *activations* variant: what its memory follows from."""


def add_edges(
    values: Tensor,
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    late: Tensor,
    copies: int,
    path: Mapping[int, Tensor],
    inside: Inside = nullcontext,
    start: int = 0,
) -> None:
    """Add delta · mean gradient to the edges into each input, one product for each reader.

    Args:
        values: What is added to ``[writer, reader]``.
        wiring: The model.
        behavior: What is explained.
        batch: The prompts of the run that the path starts at.
        late: What each node writes in one run less what it writes in the other one, from the
            first position on at which that is not zero, flat ``[writer, entry]``.
        copies: Number of points of the path, all run as one batch ``[step, example]``.
        path: What embeddings write there; empty where gradients are those of the run itself.
        inside: Makes a context that the pass is run in.
        start: That position.
    """
    size, graph = len(behavior), wiring.graph
    scale = 1.0 / (size * copies)

    def rewrite(writer: int, layer: int, value: Tensor) -> Tensor:
        return value if layer >= 0 else path.get(writer, value)

    def add(made: Tensor, inputs: list[int], g: Tensor) -> None:
        stop = graph.after[inputs[0]]
        if stop:
            product = late[:stop] @ g.flatten(1).T
            made[:stop, inputs] += scale * product.to(made)

    _each_input(values, wiring, behavior, batch, copies, copies, rewrite, add, inside, start)


def _each_input(
    values: Tensor,
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    copies: int,
    steps: int,
    rewrite: Rewrite,
    add: Callable[[Tensor, list[int], Tensor], None],
    inside: Inside = nullcontext,
    start: int = 0,
) -> None:
    """Add to values what follows from the gradient at each input in a pass over copies."""
    size = len(behavior)
    rows = repeated(batch, size, copies)
    keep = not inputs_of_heads_known(wiring)

    def once(blocks: dict[int, str]) -> Tensor:
        made = torch.zeros_like(values)

        def take(part: Part, found: list[Tensor | None]) -> None:
            pulled = at_inputs(wiring, part, found, steps=steps, size=size, start=start)
            for inputs, g in pulled:
                add(made, inputs, g)

        differentiated(
            wiring, rows, (behavior, copies), partial(total_of, behavior=behavior, copies=copies),
            partial(wanted_for_inputs, wiring), take,
            blocks=blocks, rewrite=rewrite, inside=inside, keep=keep,
        )  # fmt: skip
        return made

    values += separately(wiring, once)


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
        move = _mover(wiring, nodes, base, other, alphas)

        def add(made: Tensor, inputs: list[int], g: Tensor, nodes: list[int] = nodes) -> None:
            stop = graph.after[inputs[0]]
            mean = torch.unflatten(g, 1, (len(nodes), size)) / steps
            for place, node in enumerate(nodes):
                if node < stop:
                    product = mean[:, place].flatten(1) @ delta[node].flatten() / size
                    made[node, inputs] += product.to(made)

        _each_input(values, wiring, behavior, batch, copies, steps, move, add)


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
