"""A scorecard as panels: what a schedule, a sweep and the report keep of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...record import Panel, scalar
from .estimates import Estimate
from .wording import rows

if TYPE_CHECKING:
    from .circuit import Circuit
    from .scorecard import Scorecard

__all__ = ["panels"]

REPORTED = {"ranks": 0}
"""Display of what the report draws and loggers leave out."""

SIGNS = {
    "noise": "negative: the edge carries the behavior",
    "denoise": "positive: the edge carries the behavior",
}

TOLD = 12
"""Most nodes that the report has a sentence about."""


def panels(card: Scorecard) -> dict[str, Panel]:
    """Return a scorecard as panels.

    Args:
        card: The scorecard.

    Returns:
        Short names to panels. Loggers show seven scalars; the report also the rest.
    """
    about = {**card.convention, "null": 0.0}
    if card.reason is not None:
        about["reason"] = card.reason
    controls = card.controls
    made = {
        "faithfulness": _number(card.faithfulness, about, "faithfulness", best=1.0),
        "rest": _number(card.rest, about, "rest", best=0.0),
        "incompleteness": _number(card.incompleteness, about, "incompleteness", best=0.0),
        "distance": _number(card.distance, about, unit="metric", best=0.0),
    }
    there = card.circuit is None or card.circuit.undefined is None
    size = (card.edges, card.nodes, card.bits) if there else (math.nan,) * 3
    made["edges"] = _count(size[0], card.all_edges, "edges", about, "edges")
    made["nodes"] = _count(size[1], card.all_nodes, "nodes", about)
    made["bits"] = _count(size[2], card.all_edges, "bits", about)
    others = {
        "shuffled": controls.shuffled,
        "untrained": controls.untrained,
        "beyond_random": controls.beyond_random,
        "beyond_best_random": controls.beyond_best,
        "beyond_shuffled": controls.beyond_shuffled,
        "beyond_untrained": controls.beyond_untrained,
    }
    for name, e in others.items():
        if e is not None:
            more: dict[str, Any] = {"all": list(controls.searches)} if name == "shuffled" else {}
            made[name] = _number(e, about, name if name == "beyond_random" else None, **more)
    if controls.random:
        every = list(controls.random)
        made["random"] = scalar(max(every), "share", **about, all=every, display=REPORTED)
    return {**made, **_curve(card, about), **_parts(card, about)}


def _number(
    e: Estimate, about: dict[str, Any], shown: str | None = None, unit: str = "share", **more: Any
) -> Panel:
    display = {"scalar": shown} if shown else REPORTED
    return scalar(e.value, unit, **about, low=e.low, high=e.high, display=display, **more)


def _count(
    value: float, of: int, unit: str, about: dict[str, Any], shown: str | None = None
) -> Panel:
    display = {"scalar": shown} if shown else {}
    return scalar(float(value), unit, **about, of=of, display=display)


def _curve(card: Scorecard, about: dict[str, Any]) -> dict[str, Panel]:
    if card.curve is None:
        return {}
    curve = card.curve
    said = {
        **about,
        "fractions": list(curve.fractions),
        "sizes": list(curve.sizes),
        "signed": list(curve.signed),
        "absolute": list(curve.absolute),
    }
    made = {}
    for name, value, spread, best in (
        ("cpr", curve.cpr, curve.cpr_interval, 0.999),
        ("cmd", curve.cmd, curve.cmd_interval, 0.0),
    ):
        more = {"low": spread[0], "high": spread[1], "best": best, "display": {"scalar": name}}
        made[name] = scalar(value, "1", **said, **more)
    return made


def _parts(card: Scorecard, about: dict[str, Any]) -> dict[str, Panel]:
    """Return the parts: the edges, which the report shows first, and what each node is worth."""
    made = {}
    if card.circuit is not None and card.edges:
        own = card.circuit.panel()
        told = {**about, **own.convention, **_words(card), "display": {}}
        made["circuit"] = replace(own, convention=told)
        made["wiring"] = _wiring(card, card.circuit, about)
    if card.marginals:
        lost = list(card.marginals.values())
        made["marginals"] = Panel(
            torch.tensor([m.alone.value for m in lost]),
            ("writer",),
            {"writer": list(card.marginals)},
            "share",
            {
                **about,
                "what": "lost without a node",
                "display": REPORTED,
                "low": [m.alone.low for m in lost],
                "high": [m.alone.high for m in lost],
                "most": [m.most.value for m in lost],
                "beside": [m.beside for m in lost],
            },
        )
    return made


def _words(card: Scorecard) -> dict[str, Any]:
    return {
        "rows": [list(row) for row in rows(card)],
        "sentences": dict(card.sentences),
        "roles": {n: list(r) for n, r in card.roles.items()},
        "links": {name: str(link) for name, link in card.links.items()},
    }


def _wiring(card: Scorecard, circuit: Circuit, about: dict[str, Any]) -> Panel:
    """Return the circuit as a matrix, which has the same shape at each step whatever its edges."""
    graph = circuit.graph
    values = torch.full((len(graph.writers), len(graph.readers)), math.nan)
    for edge in circuit.edges:
        at = graph.index(edge)  # The same for edges that differ in positions only.
        values[at] = values[at].nan_to_num() + circuit.weights.get(edge, 1.0)
    said = list(card.sentences.values())
    more = [f"And {len(said) - TOLD} more nodes."] if len(said) > TOLD else []
    what = " ".join(
        [f"{len(circuit)} edges of a circuit, other places empty.", *said[:TOLD], *more]
    )
    labels = {"writer": list(graph.writers), "reader": list(graph.readers)}
    convention = {**about, "what": what, "display": REPORTED}
    sign = SIGNS.get(str(circuit.found_by.get("direction")))
    convention |= {"sign": sign} if sign else {}
    return Panel(values, ("writer", "reader"), labels, "metric", convention)
