"""Edge attribution: what each edge of the residual graph carries, from few passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, scalar
from ...target import Rank
from ...task import Task
from .extraction import How, extract
from .gradients import input_gradients
from .graph import Edge, Graph
from .streams import Seen, Wiring, repeated

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = [
    "COINCIDE",
    "Direction",
    "EdgeAttribution",
    "EdgeScores",
    "Variant",
    "blank",
    "coinciding",
    "edge_attribution",
    "wired",
]

Variant: TypeAlias = Literal["inputs", "activations"]
Direction: TypeAlias = Literal["noise", "denoise"]

COINCIDE = 1e-5
"""Clean and corrupted metric coincide below this difference, relative to the larger of them."""

ROWS = 96
"""Most examples in one pass of the *activations* variant: what its memory follows from."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """What each edge does to a metric.

    Args:
        graph: The edges that there are.
        values: Estimated or exact change of the metric ``[writer, reader]``, in its own unit, when
            what the edge carries is exchanged: from clean to corrupted for ``"noise"`` (negative:
            the edge carries the behaviour), the other way for ``"denoise"`` (positive: likewise).
            NaN where there can be no edge, and everywhere if the metric coincides.
        clean: Metric of the clean prompts, mean over examples.
        corrupted: Metric of the corrupted prompts.
        direction: Which value is exchanged for which.
        method: How it was found: ``"EAP"``, ``"EAP-IG inputs"``, ``"EAP-IG activations"`` or
            ``"exact"``.
        steps: Points of the path; 0 for one gradient.
        examples: Number of pairs of prompts.
        reason: Why everything is NaN, or None.
    """

    graph: Graph
    values: Tensor
    clean: float
    corrupted: float
    direction: Direction = "noise"
    method: str = "EAP"
    steps: int = 0
    examples: int = 0
    reason: str | None = None

    @property
    def effects(self) -> Tensor:
        """Share of the difference between clean and corrupted metric that an edge carries.

        1 means that exchanging this edge alone does all that exchanging the prompt does; negative,
        that it works against the behaviour; ``[writer, reader]``.
        """
        whole = (
            self.corrupted - self.clean
            if self.direction == "noise"
            else (self.clean - self.corrupted)
        )
        return self.values / whole if whole else torch.full_like(self.values, math.nan)

    @property
    def nodes(self) -> Tensor:
        """Attribution of each writer: the sum over the edges that leave it ``[writer]``."""
        return torch.where(self.graph.lawful, self.values, 0.0).sum(1)

    def of(self, edge: Edge) -> float:
        """Return the value of one edge.

        Args:
            edge: The edge.

        Returns:
            Its change of the metric.
        """
        return float(self.values[self.graph.index(edge)])

    def top(self, count: int, *, absolute: bool = True) -> list[tuple[Edge, float]]:
        """Return the strongest edges and their values.

        Args:
            count: How many.
            absolute: Rank by size; False ranks what carries the behaviour first.

        Returns:
            Edges, the strongest first.
        """
        order = self.ranking(absolute=absolute)[:count]
        return [(edge, float(self.values[w, r])) for edge, (w, r) in order]

    def ranking(self, *, absolute: bool = True) -> list[tuple[Edge, tuple[int, int]]]:
        """Return all edges, the most important first; ties in the order of the graph.

        Args:
            absolute: Rank by size; False ranks by `effects`, what carries the behaviour first.

        Returns:
            Edges with writer and reader index.
        """
        where = self.graph.lawful.nonzero()
        keys = self.effects[where[:, 0], where[:, 1]].nan_to_num()
        order = (keys.abs() if absolute else keys).argsort(descending=True, stable=True)
        names = self.graph
        return [
            (Edge(names.writers[w], names.readers[r]), (w, r)) for w, r in where[order].tolist()
        ]

    def circuit(
        self,
        n_edges: int | None = None,
        *,
        threshold: float | None = None,
        how: How = "greedy",
        absolute: bool = True,
    ) -> Circuit:
        """Return the circuit of the most important edges.

        Args:
            n_edges: How many edges to take. What lies on no way from an embedding to the logits
                is pruned then, so there may be fewer.
            threshold: In place of a number: the least share of the whole effect (`effects`).
            how: ``"greedy"`` from the logits, or ``"top"`` wherever they are.
            absolute: Rank by size; False ranks what carries the behaviour first.

        Returns:
            The circuit, with these scores as weights.

        Raises:
            ArgumentError: If neither or both of number and threshold are given, or scores are
                undefined.
        """
        from .circuit import Circuit

        if (n_edges is None) == (threshold is None):
            raise ArgumentError.of(
                "n_edges",
                expected="either a number of edges or a threshold",
                got=f"n_edges={n_edges}, threshold={threshold}",
                do="For example circuit(n_edges=50).",
            )
        if self.reason is not None:
            raise ArgumentError.of(
                "scores", expected="defined scores", got=f"NaN: {self.reason}", do="Train further."
            )
        keys = self.effects.nan_to_num()
        size = float(threshold) if threshold is not None else float(n_edges or 0)
        chosen: How = how if threshold is None else "threshold"
        mask = extract(self.graph, keys.abs() if absolute else keys, chosen, size)
        edges = self.graph.edges(mask)
        found_by = {
            "method": self.method,
            "steps": self.steps,
            "direction": self.direction,
            "how": chosen,
            "size": size,
            "ranking": "absolute" if absolute else "signed",
            "examples": self.examples,
        }
        return Circuit(self.graph, edges, {e: self.of(e) for e in edges}, found_by, self)

    @property
    def convention(self) -> dict[str, Any]:
        """What is needed to read the values."""
        about: dict[str, Any] = {
            "what": f"change of the metric by an edge, {self.method}",
            "sign": "negative: the edge carries the behaviour"
            if self.direction == "noise"
            else "positive: the edge carries the behaviour",
            "null": 0.0,
            "direction": self.direction,
            "ablation": "corrupted run" if self.direction == "noise" else "clean run",
            "clean": self.clean,
            "corrupted": self.corrupted,
            "steps": self.steps,
            "examples": self.examples,
            "approximate": [] if self.method == "exact" else ["a gradient stands for the change"],
        }
        if self.reason is not None:
            about["reason"] = self.reason
        return about

    def reading(self) -> dict[str, Panel]:
        """Return panels: ``edges`` over (writer, reader) and ``nodes`` over (writer)."""
        labels = {"writer": list(self.graph.writers), "reader": list(self.graph.readers)}
        about = self.convention
        nodes = {**about, "what": f"change of the metric by a node, {self.method}"}
        own = (
            self.nodes
            if self.reason is None
            else self.values.new_full((len(self.graph.writers),), math.nan)
        )
        return {
            "edges": Panel(self.values, ("writer", "reader"), labels, "metric", about),
            "nodes": Panel(own, ("writer",), {"writer": labels["writer"]}, "metric", nodes),
        }


def wired(
    model: nn.Module, behavior: Behavior, task: Task | None, anatomy: Anatomy | None
) -> Wiring:
    """Return a model as a graph, ready to be run.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        behavior: What it is run on.
        task: How it is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The wiring.
    """
    own = task or Task()
    with torch.no_grad():
        found = anatomy or Anatomy.of(model, behavior.clean, task=own)
    return Wiring(model, found, Graph.of(found), own)


def edge_attribution(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    steps: int = 0,
    variant: Variant = "inputs",
    direction: Direction = "noise",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> EdgeScores:
    r"""Estimate what each edge of the residual graph does to a behaviour.

    For the edge from writer u to the input v, summed over positions and the stream's entries and
    averaged over examples,

    .. math:: (a_u^{corrupted} - a_u^{clean}) \cdot \partial m / \partial (\text{input of } v)

    with the gradient of the clean run (EAP, Syed et al. 2023), or its mean over ``steps`` points
    on the line between both (EAP-IG, Hanna et al. 2024; midpoint rule): *inputs* moves the
    embeddings and lets everything follow, *activations* moves the writer's own output and nothing
    else, one set of passes for each writer. Inputs lie before norms; queries, keys and values of a
    head are inputs of their own. The edges that leave a node add up to the node's own attribution;
    those that leave the embeddings add up, with many steps of *inputs*, to the whole change.

    Args:
        model: The user's model; it is left as it was.
        behavior: What is explained.
        steps: Points of the path; 0 takes the gradient of one run.
        variant: What is moved along the path.
        direction: ``"noise"`` as above; ``"denoise"`` exchanges the two runs.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The scores. NaN with a reason if the metric is the same on clean and corrupted prompts.

    Raises:
        ArgumentError: If an argument is out of range, or the target has no gradient.
        ModelError: If the model has no stream that is a sum of what its parts write.
    """
    own = as_behavior(behavior)
    _check(own, steps, variant, direction)
    with untouched(model) as plain, frozen(plain):
        wiring = wired(plain, own, task, anatomy)
        here, there = (
            (own.clean, own.corrupted)
            if direction == "noise"
            else (
                own.corrupted,
                own.clean,
            )
        )
        single = steps == 0
        with torch.set_grad_enabled(single):
            base = wiring.see(here, branch=single, reading=(own, 1))
        with torch.no_grad():
            other = wiring.see(there, reading=(own, 1))
            wiring.learn(base)
            delta = wiring.difference(other, base)
            first, second = (float(own.metric(s.outputs).mean()) for s in (base, other))
        clean, corrupted = (first, second) if direction == "noise" else (second, first)
        method = "EAP" if single else f"EAP-IG {variant}"
        found = blank(wiring.graph, clean, corrupted, direction, method, steps, len(own))
        if found.reason is not None:
            return found
        if single:
            _add(found.values, wiring, base, own, delta, 1)
        elif variant == "inputs":
            seen = _along(wiring, own, here, base, other, steps)
            _add(found.values, wiring, seen, own, delta, steps)
        else:
            _add_own(found.values, wiring, own, here, base, other, delta, steps)
    found.values.masked_fill_(~found.graph.lawful.to(found.values.device), math.nan)
    return EdgeScores(**{**vars(found), "values": found.values.cpu()})


def blank(
    graph: Graph,
    clean: float,
    corrupted: float,
    direction: Direction,
    method: str,
    steps: int,
    examples: int,
) -> EdgeScores:
    """Return scores that are yet to be filled in: zeros, or NaN if the metric coincides.

    Args:
        graph: The edges.
        clean: Metric of the clean prompts.
        corrupted: Metric of the corrupted prompts.
        direction: Which value is exchanged for which.
        method: How they are found.
        steps: Points of the path.
        examples: Number of pairs of prompts.

    Returns:
        The scores.
    """
    reason = coinciding(clean, corrupted)
    fill = 0.0 if reason is None else math.nan
    values = torch.full((len(graph.writers), len(graph.readers)), fill)
    return EdgeScores(graph, values, clean, corrupted, direction, method, steps, examples, reason)


def coinciding(clean: float, corrupted: float) -> str | None:
    """Return why nothing can be said where a metric is the same on both prompts, else None.

    Args:
        clean: Metric of the clean prompts.
        corrupted: Metric of the corrupted prompts.

    Returns:
        A sentence, or None.
    """
    if abs(clean - corrupted) > COINCIDE * max(abs(clean), abs(corrupted)):
        return None
    return (
        f"the metric is {clean:.4g} on clean and {corrupted:.4g} on corrupted prompts: there is no "
        "difference that an edge could carry"
    )


def _check(behavior: Behavior, steps: int, variant: str, direction: str) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ArgumentError.of(
            "steps", expected="an int of at least 0", got=repr(steps), do="0 is plain EAP."
        )
    for name, value, allowed in (
        ("variant", variant, ("inputs", "activations")),
        ("direction", direction, ("noise", "denoise")),
    ):
        if value not in allowed:
            raise ArgumentError.of(
                name, expected=f"one of {allowed}", got=repr(value), do="Choose one."
            )
    if isinstance(behavior.question, Rank):
        raise ArgumentError.of(
            "behavior",
            expected="a target with a gradient",
            got="Rank, which moves in steps",
            do="Choose LogitDifference.",
        )


def _add(
    values: Tensor, wiring: Wiring, seen: Seen, behavior: Behavior, delta: Tensor, copies: int
) -> None:
    """Add delta · mean gradient to the edges into each input, one product for each reader."""
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


def _along(
    wiring: Wiring, behavior: Behavior, batch: Any, base: Seen, other: Seen, steps: int
) -> Seen:
    """Run all points between two embeddings as one batch."""
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


def _add_own(
    values: Tensor,
    wiring: Wiring,
    behavior: Behavior,
    batch: Any,
    base: Seen,
    other: Seen,
    delta: Tensor,
    steps: int,
) -> None:
    """Add the edges that leave each writer, along a path of this writer's own output."""
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


@dataclass(frozen=True)
class EdgeAttribution:
    """What each edge does to a behaviour; see `edge_attribution`.

    Panels: ``edges`` over (writer, reader) and ``nodes`` over (writer), in the metric's unit;
    scalars ``clean`` and ``corrupted``, the metric itself.

    Args:
        behavior: What is explained.
        name: First part of the records' names.
        steps: Points of the path; 0 is plain EAP.
        variant: ``"inputs"`` or ``"activations"``.
        direction: ``"noise"`` or ``"denoise"``.

    Example:
        >>> from lightning_mi import Behavior
        >>> pair = Behavior(torch.tensor([[1, 2]]), torch.tensor([[3, 2]]))
        >>> EdgeAttribution(pair, steps=5).name
        'edge_attribution'
    """

    behavior: BehaviorLike
    name: str = "edge_attribution"
    steps: int = 0
    variant: Variant = "inputs"
    direction: Direction = "noise"

    def __call__(self, model: nn.Module, context: Context) -> dict[str, Panel]:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            Names to panels.
        """
        found = edge_attribution(
            model,
            as_behavior(self.behavior).to(context.device),
            steps=self.steps,
            variant=self.variant,
            direction=self.direction,
            task=context.known_task,
        )
        return {
            **found.reading(),
            "clean": scalar(found.clean, "metric", what="the metric on clean prompts"),
            "corrupted": scalar(found.corrupted, "metric", what="the metric on corrupted prompts"),
        }
