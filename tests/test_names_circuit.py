"""A hand-built circuit for indirect objects: edges, scorecard and verdicts are known."""

from __future__ import annotations

import math

import pytest
import torch
from hand_built import Built, names, sentences

from lightning_mi import Behavior, Head
from lightning_mi.circuits import IOICircuit, edge_attribution, edge_patching

WIRES = {"embed->L0H0.q", "L0H0->L1H0.v", "L1H0->L2H0.q", "L2H0->logits"}


@pytest.fixture(scope="module")
def model() -> Built:
    return names()


@pytest.fixture(scope="module")
def behavior() -> Behavior:
    return sentences()


def silenced(*path: str) -> Built:
    """Return the model with a matrix of the first head of a layer set to zero."""
    model, (layer, weight) = names(), path
    with torch.no_grad():
        getattr(model.blocks[int(layer)], weight)[0].zero_()
    return model


def test_the_other_name_is_said(model: Built, behavior: Behavior) -> None:
    with torch.no_grad():
        assert bool((model(behavior.clean)[:, -1].argmax(-1) == behavior.answers).all())
        assert bool((model(behavior.corrupted)[:, -1].argmax(-1) == behavior.wrong).all())


def test_each_edge_carries_all_of_it(model: Built, behavior: Behavior) -> None:
    exact = edge_patching(model, behavior)
    assert {str(e) for e, _ in exact.top(4)} == WIRES
    lawful = exact.effects[exact.graph.lawful]
    assert int((lawful.abs() > 1e-3).sum()) == 4
    assert torch.allclose(lawful[lawful.abs() > 1e-3], torch.ones(4), atol=1e-4)
    # Every softmax on the way is saturated: one gradient sees the last edge alone.
    plain = edge_attribution(model, behavior)
    seen = {str(e) for e, value in plain.top(20) if abs(value) > 1e-4}
    assert seen == {"L2H0->logits"}
    found = edge_attribution(model, behavior, steps=50)
    assert {str(e) for e, _ in found.top(4)} == WIRES


def test_the_scorecard_is_exact(model: Built, behavior: Behavior) -> None:
    found_on, judged_on = behavior.split()
    circuit = edge_attribution(model, found_on, steps=50).circuit(n_edges=4)
    card = circuit.scorecard(model, judged_on, untrained=names(beta=0.0), controls=3)
    assert card.faithfulness.value == pytest.approx(1.0, abs=1e-3)
    assert card.rest.value == pytest.approx(0.0, abs=1e-3)
    assert card.incompleteness.value == pytest.approx(0.0, abs=1e-3)
    assert card.redundant == card.idle == ()
    assert {n: round(m.alone.value, 3) for n, m in card.marginals.items()} == dict.fromkeys(
        ("L0H0", "L1H0", "L2H0"), 1.0
    )
    assert "reads L1H0 by its queries (Q-composition" in card.sentences["L2H0"]


def test_the_hypothesis_of_it_is_supported(model: Built, behavior: Behavior) -> None:
    evidence = IOICircuit().test(model, behavior)
    assert evidence.verdict == "supported"
    assert evidence.components == {
        "duplicate token": (Head(0, 0),),
        "S-inhibition": (Head(1, 0),),
        "name mover": (Head(2, 0),),
    }
    lines = {(line.step, line.key): line for line in evidence.lines}
    for step in evidence.components:
        cut = lines[step, "removes_corrupted"]
        assert (cut.value, cut.null) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
    # Four places of equal size; the queries' matrix has two more entries of the same size.
    for step, key, strength in (
        ("S-inhibition", "composes_v_duplicate_token", 1 / 2),
        ("name mover", "composes_q_S-inhibition", 1 / math.sqrt(6)),
    ):
        (pair,) = lines[step, key].components
        assert pair.endswith(f", {strength:.3f}")


def test_a_head_that_looks_nowhere_is_named(behavior: Behavior) -> None:
    evidence = IOICircuit().test(silenced("0", "W_Q"), behavior)
    assert evidence.verdict == "not"
    assert (evidence.failing[0].heading, evidence.failing[0].step) == (
        "existence (prior)",
        "duplicate token",
    )


def test_a_head_that_carries_nothing_is_missed_by_the_one_that_reads_it(
    behavior: Behavior,
) -> None:
    evidence = IOICircuit().test(silenced("1", "W_V"), behavior)
    assert evidence.verdict == "not"
    # It looks as stated; what fails is where the name mover then looks.
    assert evidence.components["S-inhibition"] == (Head(1, 0),)
    first = evidence.failing[0]
    assert (first.heading, first.step) == ("existence (prior)", "name mover")
