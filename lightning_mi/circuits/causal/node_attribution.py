"""What each node does to a behaviour, from few passes: `node_attribution`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...attention import Site
from ...attention.site import widened
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...isolation import frozen, untouched
from ...record import Panel
from ...task import Task
from .along import path_of, total_of
from .edges import check_edge_arguments, wired
from .scores import Direction, blank
from .streams import Inside, Seen, Wiring, repeated
from .trimming import Trim, alike, trim_of, trimmed

__all__ = ["node_attribution"]


def node_attribution(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    steps: int = 5,
    direction: Direction = "noise",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Panel:
    r"""Estimate what each node does to a behaviour: `edge_attribution` without its edges.

    For each writer u, summed over positions and entries and averaged over examples,

    .. math:: (a_u^{corrupted} - a_u^{clean}) \cdot \partial m / \partial a_u

    with the gradient's mean over ``steps`` points on the line between both embeddings (EAP-IG
    inputs, Hanna et al. 2024; midpoint rule). A node's score is the sum of the edges that leave it,
    at little more than the cost of the passes.

    Args:
        model: The user's model; it is left as it was.
        behavior: What is explained.
        steps: Points of the path, at least 1.
        direction: ``"noise"`` as above; ``"denoise"`` exchanges the two runs.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        Panel over (writer) in the metric's unit: embeddings, heads, MLPs. NaN with a reason if the
        metric is the same on clean and corrupted prompts.

    Raises:
        ArgumentError: If an argument is out of range, or the target has no gradient.
        ModelError: If the model has no stream that is a sum of what its parts write.
    """
    own = as_behavior(behavior)
    check_edge_arguments(own, steps, "inputs", direction, least=1)
    with untouched(model) as plain, frozen(plain):
        wiring = wired(plain, own, task, anatomy)
        ends = (own.clean, own.corrupted) if direction == "noise" else (own.corrupted, own.clean)
        with torch.no_grad():
            base = wiring.see(ends[0], reading=(own, 1))
            other, trim = _other(wiring, own, base, ends)
            metrics = [float(own.metric(outputs).mean()) for outputs in (base.outputs, other[0])]
        clean, corrupted = metrics if direction == "noise" else metrics[::-1]
        found = blank(wiring.graph, clean, corrupted, direction, "EAP-IG inputs", steps, len(own))
        scores = torch.full((len(wiring.graph.writers),), math.nan)
        if found.reason is None:
            path = path_of(wiring, own, base.returned, other[1], steps)
            scores = _scores(wiring, own, ends[0], base, other[1], path, trim, steps)
    about = {**found.convention, "what": "change of the metric by a node, EAP-IG inputs"}
    return Panel(scores, ("writer",), {"writer": list(wiring.graph.writers)}, "metric", about)


def _other(
    wiring: Wiring, behavior: Behavior, base: Seen, ends: tuple[Any, Any]
) -> tuple[tuple[Tensor, list[Tensor | None]], Trim]:
    """Return outputs and what was written in the other run, and what a path can leave out."""
    for start in dict.fromkeys((alike(*ends), 0)):
        trim = trim_of(wiring, base, start, behavior)
        made = _written(wiring, behavior, ends[1], 1, {}, partial(trimmed, wiring, trim, 1))
        if not start or _same_before(base.returned, made[1], start):
            break
    return made, trim


def _same_before(base: list[Tensor | None], other: list[Tensor | None], start: int) -> bool:
    """Return whether nothing before a position differs in two runs."""
    pairs = [(a, b) for a, b in zip(base, other, strict=True) if a is not None and b is not None]
    moved = [(a - b)[..., :start, :].abs().max() for a, b in pairs]
    size = max(float(a.abs().max()) for a, _ in pairs)
    return bool(torch.stack(moved).max() <= 1e-5 * size)


def _written(
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    copies: int,
    path: Mapping[int, Tensor],
    inside: Inside,
) -> tuple[Tensor, list[Tensor | None]]:
    """Run copies of a batch and return outputs and what every writer returned, in its graph."""
    made: dict[int, Tensor] = {}

    def leave(writer: int, value: Tensor) -> Tensor:
        made[writer] = path.get(writer, value)
        return made[writer]

    def edit(layer: int, site: Site) -> Tensor:
        made[wiring.writer_of[layer]] = site.z
        return site.z

    rows = repeated(batch, len(behavior), copies)
    reading = (behavior, copies)
    outputs = wiring.play(rows, lambda readers, x: x, leave, edit, reading, inside, alone=True)
    return outputs, [made.get(i) for i in range(len(wiring.anatomy.writers))]


def _scores(
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    base: Seen,
    other: list[Tensor | None],
    path: dict[int, Tensor],
    trim: Trim,
    steps: int,
) -> Tensor:
    """Return change · mean gradient of each node."""
    leaves = {i: value.requires_grad_() for i, value in path.items()}
    inside = partial(trimmed, wiring, trim, steps)
    outputs, made = _written(wiring, behavior, batch, steps, leaves, inside)
    total = total_of(outputs, behavior, steps)
    usable = [i for i, v in enumerate(made) if v is not None and v.requires_grad]
    wanted = [v for v in made if v is not None and v.requires_grad]
    grads = dict(zip(usable, torch.autograd.grad(total, wanted, allow_unused=True), strict=True))
    scores = torch.zeros(len(wiring.graph.writers))
    for i, g in grads.items():
        a, b = base.returned[i], other[i]
        if g is None or a is None or b is None:
            continue
        mean = torch.unflatten(widened(g), 0, (steps, len(behavior))).mean(0)
        each = (widened(b) - widened(a)) * mean / len(behavior)
        nodes = each.sum((0, 2, 3)) if wiring.anatomy.writers[i].kind == "heads" else each.sum()
        scores[wiring.starts[i] : wiring.starts[i + 1]] = nodes.cpu().to(scores)
    return scores
