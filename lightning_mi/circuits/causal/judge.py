"""Judging a circuit: what the numbers of a `Scorecard` are made from."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...batch import main_input
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import LightningMIError
from ...nodes import Head, Reader, parse
from ...task import Task
from ..readout import head_roles
from ..weights import composition, subspace_overlap
from .bench import Ablation, Bench, on_bench
from .circuit import Circuit
from .controls import kind_of, random_circuits, shuffled
from .curves import curve_of
from .edges import coinciding, edge_attribution
from .graph import Graph
from .scorecard import Estimate, Scorecard

__all__ = ["Judge", "description_length"]

DRAWS = 1000
SUBSETS, GREEDY = 8, 4
PAIRS = 16
"""Most nodes of which all pairs are removed for minimality."""


@dataclass(frozen=True)
class Judge:
    """Judges a circuit on prompts that it was not found on.

    Args:
        circuit: What is judged.
        ablation: What edges outside carry.
        task: How the model is called.
        controls: Number of random connected circuits.
        seed: Seed of all that is drawn.
    """

    circuit: Circuit
    ablation: Ablation = "corrupted"
    task: Task | None = None
    controls: int = 8
    seed: int = 0

    def __call__(
        self, model: nn.Module, behavior: BehaviorLike, untrained: nn.Module | None = None
    ) -> Scorecard:
        """Return the scorecard.

        Args:
            model: The user's model.
            behavior: The prompts.
            untrained: The model before training, or None.

        Returns:
            The scorecard.
        """
        own = as_behavior(behavior)
        mask, graph = self.circuit.mask, self.circuit.graph
        other = self._shuffled_mask(model, own)
        with on_bench(model, own, ablation=self.ablation, task=self.task) as bench:
            self.circuit.require_graph(bench.graph)
            none = torch.zeros_like(mask)
            sets = torch.stack([mask, graph.lawful & ~mask, none, none if other is None else other])
            made = bench.metric(sets)
            clean, nothing = bench.clean, made[2]
            whole = float(clean.mean() - nothing.mean())
            reason = coinciding(float(clean.mean()), float(nothing.mean()))
            if reason is not None:
                return self._undefined(reason)
            shares = _Shares(bench, whole)
            drawn = random_circuits(graph, mask, self.controls, self.seed)
            lucky = (bench.metric(drawn).mean(1) - nothing.mean()) / whole
            scores = self.circuit.scores
            card = Scorecard(
                faithfulness=self._estimate(made[0], clean, nothing),
                rest=self._estimate(made[1], clean, nothing),
                completeness=self._completeness(shares, mask),
                marginals=self._marginals(shares, mask),
                curve=None if scores is None else curve_of(bench, scores),
                edges=int(mask.sum()),
                nodes=len(self.circuit.nodes),
                bits=description_length(int(mask.sum()), graph.n_edges),
                all_edges=graph.n_edges,
                random=tuple(lucky.tolist()),
                shuffled=None if other is None else self._estimate(made[3], clean, nothing),
                clean=float(clean.mean()),
                ablated=float(nothing.mean()),
                convention=self._convention(own),
            )
        return self._with_readings(card, model, own, untrained, (clean, nothing))

    def _undefined(self, reason: str) -> Scorecard:
        nothing = Estimate(math.nan)
        return Scorecard(nothing, nothing, reason=reason, edges=len(self.circuit))

    def _convention(self, behavior: Behavior) -> dict[str, object]:
        return {
            "what": "a circuit judged; shares of clean less ablated metric",
            "direction": "noise",
            "ablation": self.ablation,
            "found_by": dict(self.circuit.found_by),
            "behavior": behavior.name,
            "examples": len(behavior),
            "interval": f"95 %, {DRAWS} bootstrap draws of prompts",
            "seed": self.seed,
        }

    def _estimate(
        self, some: Tensor, clean: Tensor, nothing: Tensor, over: Tensor | None = None
    ) -> Estimate:
        """Return a share and its interval when prompts are drawn anew."""
        a = (some - nothing).double().cpu()
        b = (clean - nothing if over is None else over).double().cpu()
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(len(a), (DRAWS, len(a)), generator=generator)
        drawn = a[rows].mean(1) / b[rows].mean(1)
        low, high = (float(v) for v in drawn.nanquantile(torch.tensor([0.025, 0.975]).double()))
        return Estimate(float(a.mean() / b.mean()), low, high)

    def _removed(self, mask: Tensor) -> list[int]:
        """Return the nodes of the circuit that can be removed: all but embeddings."""
        used = mask.any(1).nonzero()[:, 0].tolist()
        return [i for i in used if self.circuit.graph.inputs[i]]

    def _completeness(self, shares: _Shares, mask: Tensor) -> dict[str, float]:
        graph, nodes = self.circuit.graph, self._removed(mask)
        if not nodes:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        subsets: dict[str, list[int]] = {}
        for i in range(SUBSETS):
            drawn = torch.rand(len(nodes), generator=generator) < 0.5
            subsets[f"random {i}"] = [n for n, there in zip(nodes, drawn, strict=True) if there]
        for label, members in _classes(graph, nodes).items():
            subsets[label] = members
        found = shares.incomplete(mask, graph.lawful, list(subsets.values()))
        named = dict(zip(subsets, found, strict=True))
        return {**named, "greedy": self._greedy(shares, mask, nodes)}

    def _greedy(self, shares: _Shares, mask: Tensor, nodes: list[int]) -> float:
        """Return the incompleteness of a subset grown to make it large."""
        chosen: list[int] = []
        best = 0.0
        for _ in range(min(GREEDY, len(nodes))):
            open_ = [n for n in nodes if n not in chosen]
            found = shares.incomplete(
                mask, self.circuit.graph.lawful, [[*chosen, n] for n in open_]
            )
            top = max(range(len(open_)), key=found.__getitem__)
            chosen.append(open_[top])
            best = max(best, found[top])
        return best

    def _marginals(self, shares: _Shares, mask: Tensor) -> dict[str, tuple[float, float]]:
        graph, nodes = self.circuit.graph, self._removed(mask)
        alone = shares.of([_without(mask, [n]) for n in nodes])
        whole = shares.of([mask])[0]
        most = [abs(whole - left) for left in alone]
        if len(nodes) <= PAIRS:
            pairs = [(i, j) for i in range(len(nodes)) for j in range(len(nodes)) if i != j]
            both = shares.of([_without(mask, [nodes[i], nodes[j]]) for i, j in pairs])
            for (i, j), left in zip(pairs, both, strict=True):
                most[i] = max(most[i], abs(alone[j] - left))
        rows = zip(nodes, alone, most, strict=True)
        return {graph.writers[n]: (abs(whole - left), m) for n, left, m in rows}

    def _shuffled_mask(self, model: nn.Module, behavior: Behavior) -> Tensor | None:
        """Return what the same search finds when every prompt has another one's answer."""
        scores, other = self.circuit.scores, shuffled(behavior, self.seed)
        if scores is None or other is None or not scores.method.startswith("EAP"):
            return None
        found = edge_attribution(
            model,
            other,
            steps=scores.steps,
            variant="activations" if "activations" in scores.method else "inputs",
            direction=scores.direction,
            task=self.task,
        )
        if found.reason is not None:
            return None
        return found.circuit(n_edges=len(self.circuit)).mask

    def _with_readings(
        self,
        card: Scorecard,
        model: nn.Module,
        behavior: Behavior,
        untrained: nn.Module | None,
        ends: tuple[Tensor, Tensor],
    ) -> Scorecard:
        """Return the card with what the untrained model does, and what nodes and edges are."""
        control = None
        if untrained is not None:
            with on_bench(untrained, behavior, ablation=self.ablation, task=self.task) as bench:
                self.circuit.require_graph(bench.graph)
                mask = self.circuit.mask
                made, nothing = bench.metric(torch.stack([mask, torch.zeros_like(mask)]))
                control = self._estimate(made, made, nothing, over=ends[0] - ends[1])
        return dataclasses.replace(
            card,
            untrained=control,
            roles=self._roles(model, behavior),
            links=self._links(model, behavior),
        )

    def _roles(self, model: nn.Module, behavior: Behavior) -> dict[str, str]:
        """Return what each head of the circuit is, where the model reads token ids."""
        heads = [n for n in map(_node, self.circuit.nodes) if isinstance(n, Head)]
        if not heads or main_input(behavior.clean).is_floating_point():
            return {}
        try:
            roles = head_roles(model, task=self.task)
        except LightningMIError as error:
            # Head scores ask more of a model than circuits do, for example room for repetitions.
            return {str(h): f"unknown: {error}" for h in heads}
        return {str(h): ", ".join(roles.of(h)) or "no known role" for h in heads}

    def _links(self, model: nn.Module, behavior: Behavior) -> dict[str, str]:
        """Return composition and overlap of each edge between two heads."""
        pairs = []
        for edge in self.circuit.edges:
            writer, reader = _node(edge.writer), _node(edge.reader)
            if isinstance(writer, Head) and isinstance(reader, Reader):
                pairs.append((edge, writer, reader))
        if not pairs:
            return {}
        anatomy = Anatomy.of(model, behavior.clean, task=self.task)
        found = {}
        for kind in {reader.role.upper() for _, _, reader in pairs}:
            strength = composition(anatomy, kind)
            overlap = subspace_overlap(anatomy, kind)
            for edge, w, reader in pairs:
                if reader.role.upper() == kind:
                    at = (w.layer, w.head, reader.node.layer, _query_head(anatomy, reader))
                    found[str(edge)] = (
                        f"{kind}-composition {float(strength[at]):+.3f} above chance, "
                        f"overlap {float(overlap[at]):+.3f}"
                    )
        return found


@dataclass(frozen=True)
class _Shares:
    """Metrics of sets of edges, as shares of the whole effect."""

    bench: Bench
    whole: float

    def of(self, masks: list[Tensor]) -> list[float]:
        if not masks:
            return []
        made: list[float] = (self.bench.metric(torch.stack(masks)).mean(1) / self.whole).tolist()
        return made

    def incomplete(self, mask: Tensor, full: Tensor, subsets: list[list[int]]) -> list[float]:
        """Return |F(C∖K) − F(M∖K)| for each subset K of nodes."""
        inside = self.of([_without(mask, k) for k in subsets])
        outside = self.of([_without(full, k) for k in subsets])
        return [abs(a - b) for a, b in zip(inside, outside, strict=True)]


def _without(mask: Tensor, nodes: list[int]) -> Tensor:
    """Return edges without those that leave some nodes: then nobody reads what they write."""
    left = mask.clone()
    left[nodes] = False
    return left


def _classes(graph: Graph, nodes: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for node in nodes:
        kind = kind_of(graph.writers[node])
        found[f"{kind}s of layer {graph.writer_layers[node]}"].append(node)
    return dict(found)


def _node(name: str) -> object:
    try:
        return parse(name)
    except LightningMIError:  # A position embedding, or a module that has no name of its own.
        return name


def _query_head(anatomy: Anatomy, reader: Reader) -> int:
    """Return a query head that a stored head of keys or values serves."""
    layer, head = reader.node.layer, reader.node.head
    if reader.role == "q":
        return head
    return head * (anatomy.n_heads[layer] // anatomy.n_kv_heads[layer])


def description_length(edges: int, of: int) -> float:
    """Return the bits that name a set of edges: log₂(N + 1) for its size and log₂ C(N, n).

    Args:
        edges: n, the size of the set.
        of: N, the number of edges that there are.

    Returns:
        Bits.

    Example:
        >>> round(description_length(1, 3), 6)
        3.584963
    """
    ways = math.lgamma(of + 1) - math.lgamma(edges + 1) - math.lgamma(of - edges + 1)
    return math.log2(of + 1) + ways / math.log(2.0)
