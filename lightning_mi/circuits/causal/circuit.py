"""`Circuit`: a set of edges that can be run, ablated, kept, drawn and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...checks import counted, within
from ...errors import ArgumentError
from ...record import Panel, plain
from ...task import Task
from .bench import Ablation, Bench, on_bench
from .drawing import drawn
from .edges import EdgeScores, coinciding
from .extraction import greedy
from .graph import Edge, Graph
from .where import coded, complement

if TYPE_CHECKING:
    from .scorecard import Scorecard

__all__ = ["Circuit", "Outcome", "rank_biased_overlap"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a model does when only part of it is live.

    Args:
        metric: Metric of the circuit ``[example]``.
        clean: Metric of the whole model ``[example]``.
        ablated: Metric when everything is ablated ``[example]``.
        reason: Why the faithfulness is undefined, or None.
    """

    metric: Tensor
    clean: Tensor
    ablated: Tensor
    reason: str | None = None

    @property
    def faithfulness(self) -> float:
        """(m(C) − m(∅)) / (m(M) − m(∅)), means over examples; may leave 0 to 1."""
        if self.reason is not None:
            return float("nan")
        whole = self.clean.mean() - self.ablated.mean()
        return float((self.metric.mean() - self.ablated.mean()) / whole)


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a model.

    Args:
        graph: All edges that there can be.
        edges: Those of the circuit; anything that does not run forward in layers, and where edges
            carry positions and the model is causal in positions, is refused.
        weights: What the edges count, for drawing; empty counts all alike.
        found_by: How it was found, as plain JSON.
        scores: The scores of all edges it was found by, if they are at hand; not saved.

    Raises:
        ArgumentError: If an edge cannot be.
    """

    graph: Graph
    edges: tuple[Edge, ...]
    weights: Mapping[Edge, float] = field(default_factory=dict)
    found_by: Mapping[str, Any] = field(default_factory=dict)
    scores: EdgeScores | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check every edge, and put them in order."""
        at = {edge: self.graph.index(edge) for edge in set(self.edges)}
        key = {e: (*at[e], e.source or 0, e.target or 0) for e in at}
        object.__setattr__(self, "edges", tuple(sorted(at, key=lambda e: key[e])))
        object.__setattr__(self, "found_by", plain(dict(self.found_by), "found_by"))

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.edges)

    def __eq__(self, other: object) -> bool:
        """Circuits of one graph with the same edges are equal."""
        if not isinstance(other, Circuit):
            return False
        return self.graph == other.graph and self.edges == other.edges

    def __hash__(self) -> int:
        """Hash the edges."""
        return hash(self.edges)

    @property
    def mask(self) -> Tensor:
        """Its edges as a boolean matrix ``[writer, reader]``."""
        return self.graph.mask(self.edges)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the parts that it runs through, in the order of writing, then ``logits``."""
        own = self.mask
        used = own.any(1)
        for reader in own.any(0).nonzero()[:, 0].tolist():
            # A head is in it for each of its inputs; a key-value head stands for its own group.
            for writer in self.graph.owners(reader):
                used[writer] |= len(self.graph.owners(reader)) == 1
        names = [n for n, there in zip(self.graph.writers, used.tolist(), strict=True) if there]
        return (*names, "logits") if bool(own[:, -1].any()) else tuple(names)

    @property
    def search(self) -> dict[str, Any]:
        """How it was found, without the marks of the prompts that it was found on."""
        return {k: v for k, v in self.found_by.items() if k != "prompts"}

    @property
    def undefined(self) -> str | None:
        """Why its search found no circuit, as where the metric coincides; None if it did."""
        why = self.found_by.get("undefined")
        return None if why is None else str(why)

    def with_mask(self, mask: Tensor) -> Circuit:
        """Return a circuit of the same graph with other edges.

        Args:
            mask: Boolean ``[writer, reader]``.

        Returns:
            The circuit; weights are kept where there are any.
        """
        return dataclasses.replace(self, edges=self.graph.edges(mask))

    def without(self, edges: Iterable[Edge]) -> Circuit:
        """Return it without some edges.

        Args:
            edges: Which ones.

        Returns:
            The smaller circuit.
        """
        gone = set(edges)
        return dataclasses.replace(self, edges=tuple(e for e in self.edges if e not in gone))

    def grow(self, count: int = 1) -> Circuit:
        """Return it with its next best edges into what is there already.

        Args:
            count: How many.

        Returns:
            The larger circuit.

        Raises:
            ArgumentError: If the count is below 0, or there are no scores.
        """
        own = self.mask
        keys = self._keys().masked_fill(own, float("inf"))
        size = int(own.sum()) + counted("count", count, do="It counts edges.")
        more = greedy(self.graph, keys, size) & ~own
        return dataclasses.replace(self, edges=(*self.edges, *self.graph.edges(more)))

    def shrink(self, count: int = 1) -> Circuit:
        """Return it without its weakest edges, and without what then leads nowhere.

        Args:
            count: How many.

        Returns:
            The smaller circuit.

        Raises:
            ArgumentError: If the count is below 0, or there are no scores.
        """
        keys = self._keys()
        order = sorted(self.edges, key=lambda e: float(keys[self.graph.index(e)]))
        left = self.without(order[: counted("count", count, do="It counts edges.")])
        kept = self.graph.connected(left.mask)
        loose = [e for e in left.edges if not kept[self.graph.index(e)]]
        return left.without(loose)

    def _keys(self) -> Tensor:
        if self.scores is None:
            raise ArgumentError.of(
                "scores",
                expected="the scores of all edges",
                got="none",
                do="Take a circuit from EdgeScores.circuit, or pass scores=….",
            )
        return self.scores.effects.abs().nan_to_num()

    def run(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        *,
        ablation: Ablation = "corrupted",
        task: Task | None = None,
        anatomy: Anatomy | None = None,
    ) -> Outcome:
        """Run the model with this circuit alone: all other edges are ablated.

        Args:
            model: The user's model; it is left as it was.
            behavior: The prompts.
            ablation: What other edges carry: ``"corrupted"``, the corrupted run's value;
                ``"mean"``, its mean over examples; or ``"zero"``.
            task: How the model is called; None calls it with the batch.
            anatomy: What it is made of, where that is known already.

        Returns:
            The metric of each example, beside those of the whole model and of nothing.

        Raises:
            ArgumentError: If edges carry positions that the prompts do not have, or the circuit
                belongs to another model.
        """
        return self._outcome(False, model, behavior, ablation, task, anatomy)

    def ablate(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        *,
        ablation: Ablation = "corrupted",
        task: Task | None = None,
        anatomy: Anatomy | None = None,
    ) -> Outcome:
        """Run the model with this circuit removed; arguments as for `run`.

        Args:
            model: The user's model; it is left as it was.
            behavior: The prompts.
            ablation: What the edges of the circuit carry, where they carry positions at these.
            task: How the model is called; None calls it with the batch.
            anatomy: What it is made of, where that is known already.

        Returns:
            The metric of each example; its faithfulness is what is left.
        """
        return self._outcome(True, model, behavior, ablation, task, anatomy)

    def laid(self, bench: Bench) -> tuple[Tensor, Tensor | None]:
        """Return its edges as a bench runs them.

        Args:
            bench: The model and the prompts.

        Returns:
            Codes ``[writer, reader]`` and what they mean; see `where.coded`.

        Raises:
            ArgumentError: If it belongs to another model, or a position lies outside.
        """
        self.require_graph(bench.graph)
        return coded(bench.graph, self.edges, bench.length)

    def _outcome(
        self,
        removed: bool,
        model: nn.Module,
        behavior: BehaviorLike,
        ablation: Ablation,
        task: Task | None,
        anatomy: Anatomy | None,
    ) -> Outcome:
        with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
            live, where = self.laid(bench)
            live = complement(live, bench.graph.lawful) if removed else live
            sets = torch.stack([live, torch.zeros_like(live)])
            made, nothing = bench.metric(sets, where).cpu()
            clean = bench.clean.cpu()
        reason = coinciding(float(clean.mean()), float(nothing.mean()))
        return Outcome(made, clean, nothing, reason)

    def require_graph(self, graph: Graph) -> None:
        """Refuse a model that the circuit does not belong to.

        Args:
            graph: The model's graph.

        Raises:
            ArgumentError: If it has other parts.
        """
        own, given = ((g.writers, g.readers, g.after) for g in (self.graph, graph))
        if own != given:
            lacks = [n for n in (*own[0], *own[1]) if n not in {*given[0], *given[1]}]
            raise ArgumentError.of(
                "model",
                expected=f"one of the circuit's {len(own[0])} writers and {len(own[1])} inputs",
                got=f"one of {len(given[0])} and {len(given[1])}"
                + (f", without {lacks[0]}" if lacks else ""),
                do="Run a circuit on the model it was found in, or on one of the same form.",
            )

    def jaccard(self, other: Circuit) -> float:
        """Return how many edges two circuits share: |A ∩ B| / |A ∪ B|, 1 for two empty ones.

        Args:
            other: Another circuit.

        Returns:
            From 0 to 1.
        """
        a, b = set(self.edges), set(other.edges)
        return len(a & b) / len(a | b) if a | b else 1.0

    def scorecard(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        *,
        untrained: nn.Module | None = None,
        scores: EdgeScores | None = None,
        ablation: Ablation = "corrupted",
        task: Task | None = None,
        controls: int = 8,
        shuffles: int = 8,
        seed: int = 0,
    ) -> Scorecard:
        """Answer the four demands on a good circuit with numbers; see `Scorecard`.

        Args:
            model: The user's model; it is left as it was.
            behavior: Prompts other than those it was found on (`Behavior.split`); how many of them
                it was found on, too, is counted and said.
            untrained: The model before training, as a control.
            scores: The scores it was found by, for the curve and for the search on shuffled
                answers; None takes the circuit's own, which a file does not hold.
            ablation: What edges outside the circuit carry.
            task: How the model is called.
            controls: Number of random connected circuits.
            shuffles: Number of searches on shuffled answers.
            seed: Seed of all that is drawn.

        Returns:
            The scorecard. NaN with a reason if ablation does not change the metric.

        Raises:
            ArgumentError: If a number of controls or the seed is no int of at least 0, or the
                circuit belongs to another model.
        """
        from .judge import Judge

        judge = Judge(self, scores, ablation, task, controls, seed, shuffles=shuffles)
        return judge(model, behavior, untrained)

    def svg(self) -> str:
        """Return a drawing: nodes by layer, edges by weight.

        Returns:
            A self-contained SVG.
        """
        return drawn(self.graph, self.edges, self.weights)

    def panel(self) -> Panel:
        """Return its edges and weights over ``edge``.

        Returns:
            The panel; writers and readers are named in its coordinates.
        """
        values = torch.tensor([float(self.weights.get(e, 1.0)) for e in self.edges])
        return Panel(
            values,
            ("edge",),
            {"edge": [str(e) for e in self.edges]},
            "metric",
            {
                "what": "edges of a circuit",
                "found_by": self.search,
                "writers": [e.writer for e in self.edges],
                "readers": [e.reader for e in self.edges],
                "layers": self._layers(),
                "null": 0.0,
            },
        )

    def _layers(self) -> dict[str, int]:
        """Return the layer of each node, for drawing."""
        writers = dict(zip(self.graph.writers, self.graph.writer_layers, strict=True))
        nodes = set(self.nodes)
        own = {name: layer for name, layer in writers.items() if name in nodes}
        return {**own, "logits": self.graph.reader_layers[-1]}

    def to_json(self) -> str:
        """Return it as JSON, with the graph it belongs to.

        Returns:
            The text; `from_json` reads it back.
        """
        graph = {f.name: getattr(self.graph, f.name) for f in dataclasses.fields(self.graph)}
        edges = [[e.writer, e.reader, e.source, e.target, self.weights.get(e)] for e in self.edges]
        whole = {"graph": graph, "edges": edges, "found_by": self.found_by}
        return json.dumps(plain(whole, "circuit"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """Return a circuit from JSON; edges that cannot be are refused here, too.

        Args:
            text: What `to_json` returned.

        Returns:
            The circuit.

        Raises:
            ArgumentError: If it is no such text.
        """
        try:
            whole = json.loads(text)
            graph = Graph(**{key: _tuples(value) for key, value in whole["graph"].items()})
            rows = [(Edge(*row[:4]), row[4]) for row in whole["edges"]]
            found_by = whole["found_by"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError.of(
                "text",
                expected="JSON that Circuit.to_json made",
                got=repr(text[:40]),
                do="Save circuits with Circuit.save.",
            ) from error
        weights = {edge: float(weight) for edge, weight in rows if weight is not None}
        return cls(graph, tuple(edge for edge, _ in rows), weights, found_by)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a file as JSON.

        Args:
            path: Where.
        """
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Circuit:
        """Read it from a file.

        Args:
            path: Where it was saved.

        Returns:
            The circuit.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def rank_biased_overlap(one: Sequence[Any], other: Sequence[Any], p: float = 0.9) -> float:
    """Return how alike two rankings are, the top counting most (Webber et al. 2010).

    The extrapolated form: (1 − p)/p · Σ_d p^d·A_d + p^k·A_k, with A_d the share of entries that the
    first d of both have in common and k the length of the shorter ranking; 1 for equal ones.

    Args:
        one: A ranking, best first, without repetitions.
        other: Another one.
        p: How likely a reader is to go on to the next entry.

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: If p is not between 0 and 1.

    Example:
        >>> rank_biased_overlap("abc", "abc"), rank_biased_overlap("abc", "xyz")
        (1.0, 0.0)
    """
    p = within("p", p, 0.0, 1.0, inside=True, do="Take 0.9.")
    depth = min(len(one), len(other))
    if not depth:
        return 1.0 if len(one) == len(other) else 0.0
    left: set[Any] = set()
    right: set[Any] = set()
    total = agreement = 0.0
    for d in range(1, depth + 1):
        left.add(one[d - 1])
        right.add(other[d - 1])
        agreement = len(left & right) / d
        total += p**d * agreement
    return round(total * (1.0 - p) / p + p**depth * agreement, 12)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
