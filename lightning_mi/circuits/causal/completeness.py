"""What a circuit misses, and what in it is not needed (Wang et al. 2022)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .controls import kind_of
from .estimates import Estimate
from .graph import Graph
from .trial import Trial, without

__all__ = ["NEEDED", "Marginal", "classes_of", "completeness", "marginals"]

NEEDED = 0.01
"""Share of the whole effect below which a part is not missed."""

SUBSETS, GREEDY = 8, 4
BLOCKS = 8
"""Most groups of layers."""

PARTNERS = 16
"""Most nodes beside which one that is not missed is removed; most that greedy search looks at."""


@dataclass(frozen=True)
class Marginal:
    """What is lost without a node, as a share of the whole effect.

    Args:
        alone: |F(C∖v) − F(C)|.
        most: The largest |F(C∖{v, w}) − F(C∖w)| over other nodes w, or ``alone`` if that is larger.
        beside: That w, or None.
    """

    alone: Estimate
    most: Estimate
    beside: str | None = None

    @property
    def redundant(self) -> bool:
        """Whether it is not missed alone, but is once another node is gone."""
        return self.alone.value < NEEDED <= self.most.value

    @property
    def idle(self) -> bool:
        """Whether it is never missed."""
        return self.most.value < NEEDED


def completeness(
    trial: Trial,
    mask: Tensor,
    nodes: Sequence[int],
    classes: Mapping[str, Sequence[int]],
    seed: int = 0,
    looked_at: int = PARTNERS,
) -> dict[str, Estimate]:
    """Return |F(C∖K) − F(M∖K)| for subsets K of a circuit's nodes: 0 if nothing is missed.

    Random subsets, every class, and one that is grown greedily to make it large.

    Args:
        trial: The model and the prompts.
        mask: The circuit ``[writer, reader]``.
        nodes: Its nodes, the strongest first; greedy search looks at the first few.
        classes: Named subsets.
        seed: Seed of the random subsets.
        looked_at: Most nodes that greedy search looks at.

    Returns:
        By subset, as a share of the whole effect.
    """
    if not nodes:
        return {}
    generator = torch.Generator().manual_seed(seed)
    subsets: dict[str, Sequence[int]] = {}
    for i in range(SUBSETS):
        drawn = torch.rand(len(nodes), generator=generator) < 0.5
        subsets[f"random {i}"] = [n for n, there in zip(nodes, drawn, strict=True) if there]
    subsets.update(classes)
    found = _missed(trial, mask, list(subsets.values()))
    named = dict(zip(subsets, found, strict=True))
    return {**named, "greedy": _greedy(trial, mask, nodes[: min(PARTNERS, looked_at)])}


def _missed(trial: Trial, mask: Tensor, subsets: Sequence[Sequence[int]]) -> list[Estimate]:
    full = trial.bench.graph.lawful
    inside = trial.metric([without(mask, k) for k in subsets])
    outside = trial.metric([without(full, k) for k in subsets])
    return [trial.distance(a, b) for a, b in zip(inside, outside, strict=True)]


def _greedy(trial: Trial, mask: Tensor, nodes: Sequence[int]) -> Estimate:
    chosen: list[int] = []
    best = Estimate(0.0, 0.0, 0.0)
    for _ in range(min(GREEDY, len(nodes))):
        open_ = [n for n in nodes if n not in chosen]
        found = _missed(trial, mask, [[*chosen, n] for n in open_])
        top = max(range(len(open_)), key=lambda i: found[i].value)
        chosen.append(open_[top])
        best = max(best, found[top], key=lambda e: e.value)
    return best


def marginals(trial: Trial, mask: Tensor, nodes: Sequence[int]) -> dict[str, Marginal]:
    """Return what is lost without each node, alone or beside another one.

    Args:
        trial: The model and the prompts.
        mask: The circuit ``[writer, reader]``.
        nodes: The nodes that are asked about, the strongest first.

    Returns:
        By node.
    """
    if not nodes:
        return {}
    left = trial.metric([mask, *(without(mask, [n]) for n in nodes)])
    alone = [trial.distance(left[0], row) for row in left[1:]]
    spare = [i for i, e in enumerate(alone) if e.value < NEEDED]
    rest = [i for i in range(len(nodes)) if i not in spare]
    pairs = [
        (i, j) for i in spare for j in [k for k in [*spare, *rest] if k != i][:PARTNERS]
    ]  # Who stands in for whom is unneeded alone, too, so those are tried first.
    both = trial.metric([without(mask, [nodes[i], nodes[j]]) for i, j in pairs])
    names = trial.bench.graph.writers
    most: list[tuple[Estimate, str | None]] = [(e, None) for e in alone]
    for (i, j), row in zip(pairs, both, strict=True):
        found = trial.distance(left[1 + j], row)
        if found.value > most[i][0].value:
            most[i] = found, names[nodes[j]]
    return {names[n]: Marginal(alone[i], *most[i]) for i, n in enumerate(nodes)}


def classes_of(
    graph: Graph, nodes: Sequence[int], roles: Mapping[str, Sequence[str]]
) -> dict[str, list[int]]:
    """Return a circuit's nodes by layer and type, and its heads by role.

    Args:
        graph: The edges that there are.
        nodes: Indices of writers.
        roles: By head, what it is.

    Returns:
        Named subsets.
    """
    found: dict[str, list[int]] = defaultdict(list)
    depth = max(graph.reader_layers)
    block = -(-depth // BLOCKS)  # Deep models: neighbouring layers together.
    for node in nodes:
        name, layer = graph.writers[node], graph.writer_layers[node]
        first, last = layer // block * block, min(layer // block * block + block, depth) - 1
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        found[f"{kind_of(name)}s of {where}"].append(node)
        for role in roles.get(name, ()):
            found[f"{role} heads"].append(node)
    return dict(found)
