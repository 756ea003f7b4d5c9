"""Posterior evidence: change a part, and see what the behaviour does."""

from __future__ import annotations

from .acdc import acdc
from .alignment import Alignment, align
from .attribution_patching import AttributionPatching, attribution_patching
from .bench import edge_patching
from .circuit import Circuit, Outcome, rank_biased_overlap
from .circuit_scorecard import CircuitScorecard
from .completeness import Marginal
from .controls import Controls
from .curves import Curve, faithfulness_curve
from .edges import EdgeAttribution, EdgeScores, edge_attribution
from .graph import Edge, Graph
from .interventions import intervene
from .node_attribution import node_attribution
from .patching import ActivationPatching, activation_patching
from .path_patching import PathPatching, path_patching
from .places import At, Residual
from .scorecard import Estimate, Scorecard
from .search import smallest_circuit
from .subspace_measurements import Align, SubspacePatching
from .subspaces import SubspaceEffect, subspace_patching
from .values import Value, from_run, mean, resample, value, zero

__all__ = [
    "from_run",
    "mean",
    "resample",
    "value",
    "zero",
    "Value",
    "At",
    "Residual",
    "ActivationPatching",
    "activation_patching",
    "AttributionPatching",
    "attribution_patching",
    "PathPatching",
    "path_patching",
    "intervene",
    "Align",
    "Alignment",
    "align",
    "SubspaceEffect",
    "SubspacePatching",
    "subspace_patching",
    "Circuit",
    "CircuitScorecard",
    "Controls",
    "Curve",
    "Edge",
    "EdgeAttribution",
    "EdgeScores",
    "Estimate",
    "Graph",
    "Marginal",
    "Outcome",
    "Scorecard",
    "acdc",
    "edge_attribution",
    "edge_patching",
    "faithfulness_curve",
    "node_attribution",
    "rank_biased_overlap",
    "smallest_circuit",
]
