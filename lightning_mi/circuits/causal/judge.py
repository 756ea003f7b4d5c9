"""Judging a circuit: what the numbers of a `Scorecard` are made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...checks import counts
from ...task import Task
from .bench import Ablation, on_bench
from .circuit import Circuit
from .completeness import classes_of, completeness, marginals
from .controls import Controls, controls_of, same_search
from .curves import curve_of
from .estimates import DRAWS, Estimate
from .readable import links_of, roles_of, sentences_of
from .scorecard import Scorecard
from .scores import EdgeScores, prompt_marks
from .trial import Trial
from .where import cells, complement, reach

__all__ = ["Judge", "description_length"]


@dataclass(frozen=True)
class Judge:
    """Judges a circuit on prompts that it was not found on.

    Args:
        circuit: What is judged.
        scores: The scores it was found by, for curve and controls; None takes the circuit's own.
        ablation: What edges outside carry.
        task: How the model is called.
        controls: Number of random connected circuits.
        seed: Seed of all that is drawn.
        nodes: Most nodes that are removed one by one, the strongest: what the work follows from.
        anatomy: What the model is made of, where that is known already.
        shuffles: Number of searches on shuffled answers.

    Raises:
        ArgumentError: If a number of controls or nodes, or the seed, is no int of at least 0.
    """

    circuit: Circuit
    scores: EdgeScores | None = None
    ablation: Ablation = "corrupted"
    task: Task | None = None
    controls: int = 8
    seed: int = 0
    nodes: int = 32
    anatomy: Anatomy | None = None
    shuffles: int = 8

    def __post_init__(self) -> None:
        """Check numbers."""
        counts({n: getattr(self, n) for n in ("controls", "seed", "nodes", "shuffles")})

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
        scores = self.scores or self.circuit.scores
        with on_bench(
            model, own, ablation=self.ablation, task=self.task, anatomy=self.anatomy
        ) as bench:
            mask, where = self.circuit.laid(bench)
            anatomy = bench.wiring.anatomy
            trial = Trial.on(bench, self.seed, where)
            reason = self.circuit.undefined or trial.reason
            if reason is not None:
                blank, convention = self._blank(trial, mask), self._convention(own)
                return dataclasses.replace(blank, convention=convention, reason=reason)
            others, why = same_search(
                model, self.circuit, scores, own, self.task, self.seed, anatomy, self.shuffles
            )
            roles, unknown = roles_of(self.circuit, model, own, self.task, anatomy)
            links = links_of(self.circuit, anatomy)
            card = self._judged(trial, mask, scores, roles)
            against = controls_of(trial, mask, others, self.controls, self.seed)
        if untrained is not None:
            against = self._with_untrained(against, trial, card, untrained, own)
        notes = {"shuffled answers": why, "roles": unknown}
        return dataclasses.replace(
            card,
            controls=against,
            roles=roles,
            links=links,
            sentences=sentences_of(self.circuit, roles, links, card.marginals),
            notes={k: v for k, v in notes.items() if v is not None},
            convention=self._convention(own),
            drawing=self.circuit.svg(),
        )

    def _judged(
        self,
        trial: Trial,
        mask: Tensor,
        scores: EdgeScores | None,
        roles: Mapping[str, tuple[str, ...]],
    ) -> Scorecard:
        """Return the card without its controls and words."""
        graph = trial.bench.graph
        alone, removed = trial.metric([mask, complement(mask, graph.lawful)])
        nodes = self._removable(mask)
        return dataclasses.replace(
            self._blank(trial, mask),
            faithfulness=trial.share(alone),
            rest=trial.share(removed),
            distance=trial.draws.estimate((trial.clean - alone).abs()),
            completeness=completeness(
                trial, mask, nodes, classes_of(graph, nodes, roles), self.seed, self.nodes
            ),
            marginals=marginals(trial, mask, nodes[: self.nodes]),
            curve=None if scores is None else curve_of(trial, scores),
            clean=float(trial.clean.mean()),
            ablated=float(trial.nothing.mean()),
            metric=alone,
        )

    def _removable(self, mask: Tensor) -> list[int]:
        """Return the nodes that can be removed, the strongest first: all but embeddings."""
        graph, weights = self.circuit.graph, self.circuit.weights
        used = [i for i in mask.any(1).nonzero()[:, 0].tolist() if graph.inputs[i]]
        size = {
            i: sum(abs(weights.get(e, 0.0)) for e in self.circuit.edges if e.writer == name)
            for i, name in enumerate(graph.writers)
            if i in used
        }
        return sorted(used, key=lambda i: -size[i])

    def _with_untrained(
        self,
        controls: Controls,
        trial: Trial,
        card: Scorecard,
        untrained: nn.Module,
        behavior: Behavior,
    ) -> Controls:
        """Add what the circuit does in the untrained model, over the trained one's effect."""
        with on_bench(untrained, behavior, ablation=self.ablation, task=self.task) as bench:
            mask, where = self.circuit.laid(bench)
            sets = torch.stack([mask, torch.zeros_like(mask)])
            made, nothing = bench.metric(sets, where).double().cpu()
        less = made - nothing
        if card.metric is None:
            return controls
        gain = card.metric - trial.nothing - less
        return dataclasses.replace(
            controls,
            untrained=trial.draws.share(less, trial.whole),
            beyond_untrained=trial.draws.share(gain, trial.whole),
        )

    def _blank(self, trial: Trial, mask: Tensor) -> Scorecard:
        """Return a card that holds nothing but the circuit and its size."""
        nothing, graph = Estimate(math.nan), trial.bench.graph
        size, most = len(self.circuit), graph.n_edges
        if trial.where is not None:  # Then an edge is one between two positions.
            size = cells(graph, mask, trial.where)
            most = int(reach(graph, trial.bench.length).sum())
        return Scorecard(
            nothing,
            nothing,
            circuit=self.circuit,
            edges=size,
            nodes=len(self.circuit.nodes),
            bits=description_length(size, most),
            all_edges=most,
            all_nodes=len(graph.writers) + 1,
        )

    def _convention(self, behavior: Behavior) -> dict[str, object]:
        return {
            "what": "a circuit judged; shares of clean less ablated metric",
            "direction": "noise",
            "ablation": self.ablation,
            "found_by": self.circuit.search,
            "behavior": behavior.name,
            "examples": len(behavior),
            "shared_prompts": self._shared(behavior),
            "interval": f"95 %, {DRAWS} bootstrap draws of prompts",
            "seed": self.seed,
        }

    def _shared(self, behavior: Behavior) -> int | None:
        """Return how many of the prompts the circuit was found on, too; None if that is unknown."""
        known = self.circuit.found_by.get("prompts")
        if not known:
            return None
        return sum(mark in set(known) for mark in prompt_marks(behavior))


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
