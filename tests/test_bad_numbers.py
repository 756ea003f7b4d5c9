"""Numbers that are none are refused before anything is run, in words that name the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hand_built as built
import pytest
import torch

from lightning_mi.circuits.causal import (
    Align,
    CircuitScorecard,
    EdgeAttribution,
    EdgeScores,
    Residual,
    SubspacePatching,
    acdc,
    align,
    edge_attribution,
    faithfulness_curve,
    rank_biased_overlap,
    smallest_circuit,
    subspace_patching,
)
from lightning_mi.circuits.causal.judge import Judge
from lightning_mi.errors import ArgumentError

MODEL, BEHAVIOR = built.induction(), built.repeats()
SCORES: EdgeScores = edge_attribution(MODEL, BEHAVIOR)
CIRCUIT = SCORES.circuit(n_edges=3)
STREAM, BASIS = Residual(1), torch.eye(4)[:, :1]

Call = Callable[[Any], object]
WHOLE: dict[str, Call] = {
    "EdgeScores.circuit n_edges": lambda v: SCORES.circuit(n_edges=v),
    "EdgeScores.top count": SCORES.top,
    "Circuit.grow count": CIRCUIT.grow,
    "Circuit.shrink count": CIRCUIT.shrink,
    "Circuit.scorecard controls": lambda v: CIRCUIT.scorecard(MODEL, BEHAVIOR, controls=v),
    "Circuit.scorecard shuffles": lambda v: CIRCUIT.scorecard(MODEL, BEHAVIOR, shuffles=v),
    "Circuit.scorecard seed": lambda v: CIRCUIT.scorecard(MODEL, BEHAVIOR, seed=v),
    "Judge nodes": lambda v: Judge(CIRCUIT, nodes=v),
    "CircuitScorecard n_edges": lambda v: CircuitScorecard(BEHAVIOR, n_edges=v),
    "CircuitScorecard steps": lambda v: CircuitScorecard(BEHAVIOR, steps=v),
    "CircuitScorecard controls": lambda v: CircuitScorecard(BEHAVIOR, controls=v),
    "CircuitScorecard shuffles": lambda v: CircuitScorecard(BEHAVIOR, shuffles=v),
    "CircuitScorecard nodes": lambda v: CircuitScorecard(BEHAVIOR, nodes=v),
    "CircuitScorecard seed": lambda v: CircuitScorecard(BEHAVIOR, seed=v),
    "EdgeAttribution steps": lambda v: EdgeAttribution(BEHAVIOR, steps=v),
    "edge_attribution steps": lambda v: edge_attribution(MODEL, BEHAVIOR, steps=v),
    "SubspacePatching rank": lambda v: SubspacePatching(BEHAVIOR, "L0H0", rank=v),
    "SubspacePatching draws": lambda v: SubspacePatching(BEHAVIOR, "L0H0", draws=v),
    "SubspacePatching seed": lambda v: SubspacePatching(BEHAVIOR, "L0H0", seed=v),
    "Align rank": lambda v: Align(BEHAVIOR, "resid1", rank=v),
    "Align steps": lambda v: Align(BEHAVIOR, "resid1", steps=v),
    "align rank": lambda v: align(MODEL, BEHAVIOR, STREAM, rank=v),
    "align steps": lambda v: align(MODEL, BEHAVIOR, STREAM, steps=v),
    "align draws": lambda v: align(MODEL, BEHAVIOR, STREAM, draws=v),
    "align seed": lambda v: align(MODEL, BEHAVIOR, STREAM, seed=v),
    "subspace_patching draws": lambda v: subspace_patching(MODEL, BEHAVIOR, STREAM, BASIS, draws=v),
    "subspace_patching seed": lambda v: subspace_patching(MODEL, BEHAVIOR, STREAM, BASIS, seed=v),
}
REAL: dict[str, Call] = {
    "EdgeScores.circuit threshold": lambda v: SCORES.circuit(threshold=v),
    "acdc threshold": lambda v: acdc(MODEL, BEHAVIOR, threshold=v),
    "smallest_circuit least": lambda v: smallest_circuit(MODEL, BEHAVIOR, SCORES, least=v),
    "smallest_circuit most": lambda v: smallest_circuit(MODEL, BEHAVIOR, SCORES, most=v),
    "faithfulness_curve fractions": lambda v: faithfulness_curve(
        MODEL, BEHAVIOR, SCORES, fractions=[v]
    ),
    "rank_biased_overlap p": lambda v: rank_biased_overlap("abc", "abc", p=v),
    "CircuitScorecard share": lambda v: CircuitScorecard(BEHAVIOR, share=v),
    "SubspacePatching share": lambda v: SubspacePatching(BEHAVIOR, "L0H0", share=v),
    "Align held_out": lambda v: Align(BEHAVIOR, "resid1", held_out=v),
    "Align learning_rate": lambda v: Align(BEHAVIOR, "resid1", learning_rate=v),
    "align held_out": lambda v: align(MODEL, BEHAVIOR, STREAM, held_out=v),
    "align learning_rate": lambda v: align(MODEL, BEHAVIOR, STREAM, learning_rate=v),
}
SOMETHING = ("rank", "steps")  # Of `align`: a search needs a dimension and a step.


def refused(name: str, call: Call, value: object) -> None:
    argument = name.split(" ")[1]
    with pytest.raises(ArgumentError, match=rf"^{argument}: expected .*got") as told:
        call(value)
    assert str(value) in str(told.value)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_count_is_refused(name: str) -> None:
    for value in (-1, 1.5, math.nan, math.inf, True, "3"):
        refused(name, WHOLE[name], value)
    if name.lower().startswith("align") and name.split(" ")[1] in SOMETHING:
        refused(name, WHOLE[name], 0)


@pytest.mark.parametrize("name", REAL)
def test_what_is_no_finite_number_is_refused(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, True, "0.5", None):
        if value is None and name.startswith("EdgeScores"):
            continue  # Then a number of edges is asked for.
        refused(name, REAL[name], value)


@pytest.mark.parametrize("name", [n for n in REAL if n.split(" ")[1] in ("share", "held_out", "p")])
def test_a_share_leaves_something(name: str) -> None:
    for value in (-0.5, 0, 0.0, 1, 1.0, 2.0):
        refused(name, REAL[name], value)


def test_ranges_that_are_none_are_refused() -> None:
    refused("acdc threshold", REAL["acdc threshold"], -0.1)
    refused("align learning_rate", REAL["align learning_rate"], 0.0)
    with pytest.raises(ArgumentError, match=r"most: expected a finite number of at least 0\.9"):
        smallest_circuit(MODEL, BEHAVIOR, SCORES, least=0.9, most=0.8)
    for fractions in ([], [0.5, 0.1], [-0.1], [1.5]):
        with pytest.raises(ArgumentError, match="fractions"):
            faithfulness_curve(MODEL, BEHAVIOR, SCORES, fractions=fractions)


def test_what_makes_sense_is_taken() -> None:
    assert len(SCORES.circuit(n_edges=0)) == 0
    assert len(SCORES.circuit(threshold=0)) == SCORES.graph.n_edges
    assert len(SCORES.circuit(threshold=-0.5, absolute=False)) > len(SCORES.circuit(threshold=0.5))
    assert CircuitScorecard(BEHAVIOR, steps=0, controls=0, shuffles=0, nodes=0).steps == 0
    assert rank_biased_overlap("abc", "abc", p=0.5) == 1.0
