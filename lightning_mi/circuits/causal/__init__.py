"""Posterior evidence: change a part, and see what the behaviour does."""

from __future__ import annotations

from .acdc import acdc
from .bench import edge_patching
from .circuit import Circuit, Outcome, rank_biased_overlap
from .curves import Curve, faithfulness_curve
from .edges import EdgeAttribution, EdgeScores, edge_attribution
from .graph import Edge, Graph
from .scorecard import Estimate, Scorecard

__all__ = [
    "Circuit",
    "Curve",
    "Edge",
    "EdgeAttribution",
    "EdgeScores",
    "Estimate",
    "Graph",
    "Outcome",
    "Scorecard",
    "acdc",
    "edge_attribution",
    "edge_patching",
    "faithfulness_curve",
    "rank_biased_overlap",
]
