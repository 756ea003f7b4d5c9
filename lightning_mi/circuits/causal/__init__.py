"""Posterior evidence: change a part, and see what the behaviour does."""

from __future__ import annotations

from .edges import EdgeAttribution, EdgeScores, edge_attribution
from .graph import Edge, Graph

__all__ = ["Edge", "EdgeAttribution", "EdgeScores", "Graph", "edge_attribution"]
