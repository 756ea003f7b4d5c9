"""What each edge does to a metric: `EdgeScores`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ...batch import fingerprint, main_input
from ...behavior import Behavior
from ...checks import counted, within
from ...errors import ArgumentError
from ...record import Panel
from .extraction import How, extract
from .graph import Edge, Graph

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["COINCIDE", "Direction", "EdgeScores", "blank", "coinciding", "prompt_marks"]

Direction: TypeAlias = Literal["noise", "denoise"]

COINCIDE = 1e-5
"""Clean and corrupted metric coincide below this difference, relative to the larger of them."""


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
        found_on: The prompts themselves: a circuit must be judged on others, and its controls
            search on these.
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
    found_on: Behavior | None = field(default=None, repr=False)

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

        Raises:
            ArgumentError: If the number is no int of at least 0.
        """
        order = self.ranking(absolute=absolute)[: counted("count", count, do="It counts edges.")]
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
            ArgumentError: If neither or both of number and threshold are given, the number is no
                int of at least 0, the threshold is not finite, or scores are undefined: then there
                is no circuit that could be returned, and ``reason`` says why.
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
        size = (
            float(counted("n_edges", n_edges, do="It counts edges."))
            if threshold is None
            else within("threshold", threshold, do="It is a share of the whole effect, say 0.01.")
        )
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
            "behavior": None if self.found_on is None else self.found_on.name,
            "prompts": [] if self.found_on is None else prompt_marks(self.found_on),
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


def coinciding(clean: float, corrupted: float, carrier: str = "an edge") -> str | None:
    """Return why nothing can be said where a metric is the same on both prompts, else None.

    Args:
        clean: Metric of the clean prompts.
        corrupted: Metric of the corrupted prompts.
        carrier: What was to carry the difference.

    Returns:
        A sentence, or None.
    """
    if abs(clean - corrupted) > COINCIDE * max(abs(clean), abs(corrupted)):
        return None
    return (
        f"the metric is {clean:.4g} on clean and {corrupted:.4g} on corrupted prompts: there is no "
        f"difference that {carrier} could carry"
    )


def prompt_marks(behavior: Behavior) -> list[str]:
    """Return a short fingerprint of each clean prompt, by which it is known again.

    Args:
        behavior: The prompts.

    Returns:
        As many texts.
    """
    return [fingerprint(row) for row in main_input(behavior.clean)]
