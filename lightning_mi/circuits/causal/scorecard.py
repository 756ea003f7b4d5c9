"""The four demands on a good circuit, answered with numbers: `Scorecard`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...record import Panel, scalar
from .curves import Curve

__all__ = ["Estimate", "Scorecard"]

NEEDED = 0.01
"""Share of the whole effect below which a part is not missed."""


@dataclass(frozen=True)
class Estimate:
    """A number with an interval over prompts.

    Args:
        value: The number.
        low: Lower end of the 95 % interval (percentile bootstrap over prompts).
        high: Its upper end.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        """Return for example ``0.92 [0.88, 0.97]``."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, eq=False)
class Scorecard:
    """How good a circuit is. All shares are of m(M) − m(∅), the model's against full ablation.

    Args:
        faithfulness: (m(C) − m(∅)) / (m(M) − m(∅)); never clipped.
        rest: The same when the circuit is removed: 0 if nothing of the behaviour is left.
        completeness: By subset K of the circuit's nodes |F(C∖K) − F(M∖K)|, as a share: 0 is best.
            Subsets are random, by class (layer and type) and greedy.
        marginals: By node what is lost without it: alone, and at most together with another node
            already removed, both as shares.
        curve: Faithfulness over sizes, where the scores that ranked the edges are at hand.
        edges: Number of edges.
        nodes: Number of nodes.
        bits: Description length: bits that name this set of edges among all,
            log₂(N + 1) + log₂ C(N, n).
        all_edges: N, which is also the bits of an arbitrary set.
        roles: By node what it is, where head scores say so.
        links: By edge its composition and overlap, where both ends are heads.
        random: Faithfulness of random connected circuits of the same size and types.
        shuffled: Faithfulness of the circuit that the same search finds for shuffled answers.
        untrained: (m₀(C) − m₀(∅)) / (m(M) − m(∅)) of the untrained model.
        clean: m(M).
        ablated: m(∅).
        convention: Corruption, ablation, ranking, numbers of prompts and draws.
        reason: Why nothing is defined, or None.
    """

    faithfulness: Estimate
    rest: Estimate
    completeness: Mapping[str, float] = field(default_factory=dict)
    marginals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curve: Curve | None = None
    edges: int = 0
    nodes: int = 0
    bits: float = 0.0
    all_edges: int = 0
    roles: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    random: tuple[float, ...] = ()
    shuffled: Estimate | None = None
    untrained: Estimate | None = None
    clean: float = math.nan
    ablated: float = math.nan
    convention: Mapping[str, object] = field(default_factory=dict)
    reason: str | None = None

    @property
    def incompleteness(self) -> float:
        """The largest of ``completeness``."""
        return max(self.completeness.values(), default=math.nan)

    @property
    def redundant(self) -> tuple[str, ...]:
        """Nodes that are not missed alone, but are once another one is gone."""
        return tuple(
            n for n, (alone, most) in self.marginals.items() if alone < NEEDED and most >= NEEDED
        )

    @property
    def idle(self) -> tuple[str, ...]:
        """Nodes that are never missed."""
        return tuple(n for n, (_, most) in self.marginals.items() if most < NEEDED)

    @property
    def beats_random(self) -> bool:
        """Whether the whole interval lies above every random circuit."""
        return bool(self.random) and self.faithfulness.low > max(self.random)

    def __str__(self) -> str:
        """Return it in words, a line for each demand."""
        if self.reason is not None:
            return f"undefined: {self.reason}"
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        f, others = self.faithfulness, sorted(self.random)
        lines = [
            f"sufficient: faithfulness {f}",
            f"necessary: {self.rest} left without it",
            f"complete: misses at most {self.incompleteness:.2f} of the effect",
            f"minimal: redundant {', '.join(self.redundant) or 'none'}; "
            f"idle {', '.join(self.idle) or 'none'}",
            f"lawful: all {self.edges} edges run forward",
            f"simple: {self.edges} of {self.all_edges} edges, {self.nodes} nodes, "
            f"{self.bits:.0f} bits",
        ]
        if self.curve is not None:
            lines.append(f"over sizes: CPR {self.curve.cpr:.3f}, CMD {self.curve.cmd:.3f}")
        if others:
            lines.append(f"random connected circuits: {others[0]:.2f} to {others[-1]:.2f}")
        if self.shuffled is not None:
            lines.append(f"found for shuffled answers: {self.shuffled}")
        if self.untrained is not None:
            lines.append(f"in the untrained model: {self.untrained}")
        lines += [f"{node}: {role}" for node, role in self.roles.items()]
        return lines + [f"{edge}: {link}" for edge, link in self.links.items()]

    def reading(self) -> dict[str, Panel]:
        """Return all numbers as panels.

        Returns:
            Scalars, ``random`` over (edge set) and the curve.
        """
        about = {**self.convention, "null": 0.0}
        if self.reason is not None:
            about["reason"] = self.reason
        numbers = {
            "faithfulness": self.faithfulness,
            "rest": self.rest,
            "shuffled": self.shuffled,
            "untrained": self.untrained,
        }
        made = {
            name: scalar(e.value, "share", **{**about, "low": e.low, "high": e.high})
            for name, e in numbers.items()
            if e is not None
        }
        made["incompleteness"] = scalar(self.incompleteness, "share", **about)
        made["edges"] = scalar(float(self.edges), "edges", **about, of=self.all_edges)
        made["bits"] = scalar(self.bits, "bits", **about, of=self.all_edges)
        if self.random:
            made["random"] = scalar(max(self.random), "share", **about, all=list(self.random))
        if self.curve is not None:
            made["cpr"] = scalar(self.curve.cpr, "1", **{**about, "perfect": 0.999})
            made["cmd"] = scalar(self.curve.cmd, "1", **{**about, "perfect": 0.0})
        if self.marginals:
            rows = torch.tensor([list(pair) for pair in self.marginals.values()])
            made["marginals"] = Panel(
                rows[:, 0], ("writer",), {"writer": list(self.marginals)}, "share", about
            )
        return made
