"""Automatic circuit discovery by cutting one edge after the other: `acdc`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike
from ...checks import within
from ...errors import ArgumentError
from ...task import Task
from .bench import Ablation, on_bench
from .circuit import Circuit
from .edges import coinciding

__all__ = ["acdc"]

MOST = 5000
"""Edges beyond which one run for each takes too long."""


def acdc(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    threshold: float = 0.02,
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Circuit:
    """Cut every edge without which the model does as before (ACDC, Conmy et al. 2023).

    From the logits down, each edge is cut in the model that is left. It stays cut if the metric
    moves away from the whole model's by less than ``threshold`` times the difference between
    clean and ablated metric. One run for each edge: for small graphs.

    Args:
        model: The user's model; it is left as it was.
        behavior: The prompts.
        threshold: Share of the difference that an edge must carry.
        ablation: What an edge that is cut carries.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The circuit. It depends on the order, and misses edges that only matter together with
        others (all but the last of several redundant ones are cut).

    Raises:
        ArgumentError: If the graph is too large, the threshold is negative or not finite, or the
            metric is the same on clean and corrupted prompts: then there is no circuit that could
            be returned.
    """
    threshold = within("threshold", threshold, 0.0, do="Take 0.02.")
    with on_bench(model, behavior, ablation=ablation, task=task, anatomy=anatomy) as bench:
        graph = bench.graph
        if graph.n_edges > MOST:
            raise ArgumentError.of(
                "model",
                expected=f"at most {MOST:,} edges",
                got=f"{graph.n_edges:,}",
                do="Use edge_attribution(…).circuit(n_edges=…).",
            )
        mask, clean = graph.lawful.clone(), float(bench.clean.mean())
        whole = abs(clean - float(bench.metric(torch.zeros_like(mask)[None]).mean()))
        if coinciding(clean, clean - whole) is not None:
            raise ArgumentError.of(
                "behavior",
                expected="a metric that ablation changes",
                got=f"{clean:.4g} for both",
                do="Nothing can be found where there is nothing to carry.",
            )
        far = 0.0
        for reader in reversed(range(len(graph.readers))):
            for writer in reversed(range(graph.after[reader])):
                mask, far = _cut(
                    bench.metric, mask, (writer, reader), clean, far, threshold * whole
                )
    found_by = {"method": "ACDC", "threshold": threshold, "ablation": ablation}
    return Circuit(graph, graph.edges(graph.connected(mask)), found_by=found_by)


def _cut(
    metric: Callable[[Tensor], Tensor],
    mask: Tensor,
    edge: tuple[int, int],
    clean: float,
    far: float,
    most: float,
) -> tuple[Tensor, float]:
    """Return the edges without one that is not missed, and how far the metric then is."""
    tried = mask.clone()
    tried[edge] = False
    distance = abs(float(metric(tried[None]).mean()) - clean)
    return (tried, distance) if distance - far < most else (mask, far)
