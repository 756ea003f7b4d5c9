"""The four demands on a good circuit, answered with numbers: `Scorecard`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ...record import Panel
from .completeness import Marginal
from .controls import Controls
from .curves import Curve
from .estimates import Estimate
from .readable import Link
from .search import FAITHFUL

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["Estimate", "Scorecard"]


@dataclass(frozen=True, eq=False)
class Scorecard:
    """How good a circuit is. All shares are of m(M) − m(∅), the model's against full ablation.

    The demands (after Wang et al. 2022 and Mueller et al. 2025): *sufficient and necessary* are
    ``faithfulness``, ``distance``, ``rest``, ``completeness``, ``marginals`` and ``curve``;
    *lawful* is every circuit, as edges that are not are refused when it is made; *readable* are
    ``roles``, ``links`` and ``sentences``; *simple* are ``edges``, ``nodes`` and ``bits``. What it
    must beat are the ``controls``.

    Args:
        faithfulness: (m(C) − m(∅)) / (m(M) − m(∅)); never clipped, may be below 0 or above 1.
        rest: The same when the circuit is removed: 0 if nothing of the behaviour is left.
        distance: Mean |m(M) − m(C)| over prompts, in the metric's unit.
        completeness: By subset K of the circuit's nodes |F(C∖K) − F(M∖K)|, as a share: 0 is best.
            Subsets are random, by class (layer and type, role) and greedy.
        marginals: By node what is lost without it, alone and beside another one.
        curve: Faithfulness over sizes, where the scores that ranked the edges are at hand.
        circuit: What was judged.
        edges: Number of edges; where they carry positions, that of positions, or pairs of them, at
            which they are live.
        nodes: Number of nodes, the logits among them.
        bits: Description length: bits that name this set of edges among all,
            log₂(N + 1) + log₂ C(N, n).
        all_edges: N, counted likewise, which is also the bits of an arbitrary set.
        all_nodes: Number of nodes of the full graph.
        roles: By head what it is, where head scores say so.
        links: By edge its composition and overlap, where both ends are heads.
        sentences: By node one sentence.
        controls: Random circuits, the same search on shuffled answers, the untrained model.
        clean: m(M), mean over prompts.
        ablated: m(∅), mean over prompts.
        metric: m(C) ``[example]``.
        convention: Corruption, ablation, ranking, numbers of prompts and draws, how many prompts
            the circuit was found on, too.
        notes: What was not measured, and why.
        drawing: The circuit as SVG.
        reason: Why nothing is defined, or None.
    """

    faithfulness: Estimate
    rest: Estimate
    distance: Estimate = field(default_factory=lambda: Estimate(math.nan))
    completeness: Mapping[str, Estimate] = field(default_factory=dict)
    marginals: Mapping[str, Marginal] = field(default_factory=dict)
    curve: Curve | None = None
    circuit: Circuit | None = None
    edges: int = 0
    nodes: int = 0
    bits: float = 0.0
    all_edges: int = 0
    all_nodes: int = 0
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    sentences: Mapping[str, str] = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)
    clean: float = math.nan
    ablated: float = math.nan
    metric: Tensor | None = None
    convention: Mapping[str, object] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    drawing: str = ""
    reason: str | None = None

    @property
    def incompleteness(self) -> Estimate:
        """The largest of ``completeness``."""
        return max(self.completeness.values(), key=lambda e: e.value, default=Estimate(math.nan))

    @property
    def redundant(self) -> tuple[str, ...]:
        """Nodes that are not missed alone, but are once another one is gone."""
        return tuple(n for n, lost in self.marginals.items() if lost.redundant)

    @property
    def idle(self) -> tuple[str, ...]:
        """Nodes that are never missed."""
        return tuple(n for n, lost in self.marginals.items() if lost.idle)

    @property
    def faithful(self) -> bool:
        """Whether faithfulness is between 0.8 and 1.2."""
        return FAITHFUL[0] <= self.faithfulness.value <= FAITHFUL[1]

    @property
    def beats_controls(self) -> bool:
        """Whether it does better than each control that was run, with its whole interval."""
        return self.controls.beaten

    def __str__(self) -> str:
        """Return it in words, a line for each demand."""
        from .wording import lines

        return "\n".join(lines(self))

    def html(self) -> str:
        """Return it as a page's part: the drawing, a table of the demands, a sentence a node.

        Returns:
            HTML without scripts; names are escaped.
        """
        from .wording import html

        return html(self)

    def reading(self) -> dict[str, Panel]:
        """Return all numbers as panels.

        Returns:
            Scalars with intervals in their convention; ``nodes`` over (writer), ``circuit`` over
            (edge).
        """
        from .card_panels import panels

        return panels(self)
