"""Hypotheses stated in advance: exact verdicts on models whose circuits are known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hand_built import Built, bits, gate, induction, repeats
from torch import nn

from lightning_mi import MLP, Behavior, Head, measure
from lightning_mi.behavior import as_behavior
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.characteristic import Characteristic, Expectation
from lightning_mi.circuits import (
    Attends,
    Carries,
    CircuitHypothesis,
    Composes,
    Copies,
    HypothesisTest,
    InductionCircuit,
    IOICircuit,
    Looks,
    Overlaps,
    Removes,
    Step,
    Writes,
)
from lightning_mi.circuits.hypotheses.evidence import HEADINGS, Evidence, Line
from lightning_mi.errors import ArgumentError


def broken() -> Built:
    """The previous-token head attends evenly: its keys and values are still in place."""
    model = induction()
    with torch.no_grad():
        model.blocks[0].W_Q[0].zero_()  # type: ignore[union-attr,index,operator]
    return model


@pytest.fixture(scope="module")
def supported() -> Evidence:
    return InductionCircuit().test(induction(), repeats())


# ------------------------------------------------------------ verdicts


def test_an_induction_circuit_supports_the_hypothesis_of_one(supported: Evidence) -> None:
    assert supported.verdict == "supported"
    assert supported.failing == ()
    assert supported.components == {"previous token": (Head(0, 0),), "induction": (Head(1, 0),)}
    assert {line.heading for line in supported.lines} == set(HEADINGS[:3])
    found = {(line.step, line.key): line for line in supported.lines}
    assert found["previous token", "looks_previous_token"].value == pytest.approx(1.0, abs=1e-4)
    cut = found["induction", "removes_mean"]
    assert (cut.value, cut.null) == (pytest.approx(1.0, abs=1e-3), pytest.approx(0.0, abs=1e-3))
    # Flat writers and readers of rank 12: 1/√12, as in the definition of composition.
    (pair,) = found["induction", "composes_k_previous_token"].components
    assert pair == f"L0H0->L1H0, {1 / math.sqrt(12):.3f}"


def test_a_broken_previous_token_head_is_named() -> None:
    evidence = InductionCircuit().test(broken(), repeats())
    assert evidence.verdict == "not"
    first = evidence.failing[0]
    assert (first.heading, first.step) == ("existence (prior)", "previous token")
    assert first.components == ("nearest: L0H0",)
    assert first.value == pytest.approx(first.null, abs=1e-6)
    last = str(evidence).splitlines()[-1]
    assert last.startswith("verdict: not; failing: previous token: previous token pattern")


def test_what_exists_and_does_less_than_stated_is_supported_in_part() -> None:
    evidence = InductionCircuit(share=0.95).test(induction(), repeats())
    assert evidence.verdict == "partly"
    assert [(line.heading, line.step) for line in evidence.failing] == [
        ("existence (posterior)", "previous token")
    ]
    assert evidence.failing[0].value == pytest.approx(0.893, abs=2e-3)


def test_a_head_that_reads_nothing_of_the_first_is_named() -> None:
    composed = InductionCircuit().steps[1]
    wrong = dataclasses.replace(composed, connection=(Composes("previous token", "V"),))
    stated = CircuitHypothesis("by value", (InductionCircuit().steps[0], wrong))
    evidence = stated.test(induction(), repeats())
    assert evidence.verdict == "partly"
    assert [line.key for line in evidence.failing] == ["composes_v_previous_token"]


def test_an_untrained_model_has_no_induction_circuit() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=40, bos_token_id=0
    )
    behavior = RepeatedTokens(40, length=8, sequences=4).behavior("block")
    evidence = InductionCircuit().test(GPT2LMHeadModel(config), behavior)
    assert evidence.verdict == "not"
    assert evidence.failing[0].step == "previous token"


def test_the_corrupted_run_shows_only_what_the_corruption_changes() -> None:
    evidence = InductionCircuit(cut="corrupted").test(induction(), repeats())
    assert evidence.verdict == "supported"  # Another trigger: what the first step writes changes.
    answer = RepeatedTokens(12, length=4, sequences=4).behavior("answer")
    other = InductionCircuit(cut="corrupted").test(induction(), answer)
    assert [(line.key, line.step) for line in other.failing] == [
        ("removes_corrupted", "previous token")
    ]
    assert other.verdict == "partly"


# ------------------------------------------------------------ expectations


def test_heads_are_found_by_where_they_look_in_the_prompts() -> None:
    step = Step("match", prior=(Attends("last", "answer", "wrong_place"),))
    behavior = dataclasses.replace(repeats(), positions={"wrong_place": 0})
    evidence = CircuitHypothesis("match", (step,)).test(induction(), behavior)
    assert evidence.components == {"match": (Head(1, 0),)}
    assert evidence.lines[0].value == pytest.approx(1.0, abs=1e-4)
    before = Step("back", prior=(Attends("last", "before"),))
    behavior = dataclasses.replace(repeats(), positions={"before": -2})
    evidence = CircuitHypothesis("back", (before,)).test(induction(), behavior)
    assert evidence.components["back"][0] == Head(0, 0)


def test_heads_and_mlps_are_found_by_what_they_write() -> None:
    last = Step("write", prior=(Writes(0.5),), posterior=(Removes(0.9, "zero"),))
    evidence = CircuitHypothesis("write", (last,)).test(induction(), repeats())
    assert evidence.components["write"] == (Head(1, 0),)
    unit = Step("combine", "mlp", prior=(Writes(0.9),), posterior=(Removes(0.9, "zero"),))
    behavior = dataclasses.replace(
        bits(), answers=torch.ones(3).long(), wrong=torch.zeros(3).long()
    )
    evidence = CircuitHypothesis("and", (unit,)).test(gate("and"), behavior)
    assert evidence.components["combine"] == (MLP(0),)
    assert evidence.verdict == "supported"
    assert evidence.fits["combine"].tolist() == [pytest.approx(0.1)]


def test_overlap_and_edges_tell_the_right_input() -> None:
    first, second = InductionCircuit().steps
    for reads, verdict in (("K", "supported"), ("V", "partly")):
        links = (Overlaps("previous token", reads), Carries("previous token", reads, 0.5))  # type: ignore[arg-type]
        stated = CircuitHypothesis("c", (first, dataclasses.replace(second, connection=links)))
        evidence = stated.test(induction(), repeats())
        assert evidence.verdict == verdict
        assert len(evidence.failing) == (0 if reads == "K" else 2)


def test_without_expectations_all_parts_of_a_kind_are_cut() -> None:
    every = Step("attention", posterior=(Removes(0.9),))
    evidence = CircuitHypothesis("attention", (every,)).test(induction(), repeats())
    assert len(evidence.components["attention"]) == 4
    assert evidence.lines[0].value == pytest.approx(1.0)
    assert math.isnan(evidence.lines[0].null)  # Nothing else is left to be cut.


def test_random_other_parts_are_the_null_of_a_cut() -> None:
    # The distractor alone does nothing, and random others do more than that.
    idle = Step("idle", prior=(Attends("last", "first", margin=0.001),), posterior=(Removes(0.01),))
    behavior = dataclasses.replace(repeats(), positions={"first": 0})
    step = dataclasses.replace(idle, prior=(Looks("current_token", 0.001),), at_most=1)
    evidence = CircuitHypothesis("idle", (step,)).test(induction(), behavior)
    assert evidence.verdict == "not"


def test_indirect_objects_are_not_understood_by_chance() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
    ids = torch.stack([torch.randperm(30)[:8] for _ in range(4)])
    clean, corrupted = ids.clone(), ids.clone()
    clean[:, 5], corrupted[:, 5] = ids[:, 2], ids[:, 1]
    behavior = Behavior(
        clean,
        corrupted,
        answers=ids[:, 1],
        wrong=ids[:, 2],
        positions={"subject": 5, "last": -1},
    )
    evidence = IOICircuit().test(GPT2LMHeadModel(config), behavior)
    assert evidence.verdict == "not"
    assert [line.step for line in evidence.under("existence (prior)")] == [
        "duplicate token",
        "S-inhibition",
        "name mover",
        "name mover",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_queries_are_connected_by_their_key_value_heads(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=64,
    )
    links = tuple(
        connection
        for reads in ("Q", "K", "V")
        for connection in (Composes("a", reads), Overlaps("a", reads), Carries("a", reads, 0.5))  # type: ignore[arg-type]
    )
    stated = CircuitHypothesis(
        "all", (Step("a"), Step("b", connection=links)), characteristics=False
    )
    behavior = RepeatedTokens(40, length=8, sequences=4).behavior("block")
    evidence = stated.test(LlamaForCausalLM(config).to(dtype), behavior)
    assert len(evidence.lines) == 9
    assert all(math.isfinite(line.value) for line in evidence.lines)
    carried = [line for line in evidence.lines if line.key.startswith("carries")]
    assert all(len(line.components) == 16 for line in carried)  # Four heads to four.


# ------------------------------------------------------------ nothing to say


def test_a_metric_that_coincides_says_nothing() -> None:
    same = dataclasses.replace(repeats(), corrupted=repeats().clean)
    evidence = InductionCircuit().test(induction(), same)
    assert evidence.verdict == "not"
    assert "no difference that a part could carry" in str(evidence.reason)
    panels = evidence.reading()
    assert math.isnan(panels["verdict"].item())
    assert "no difference" in panels["verdict"].convention["reason"]
    cut = panels["previous_token_removes_mean"]
    assert math.isnan(cut.item())
    assert "no difference" in cut.convention["reason"]
    # What the weights and patterns show is there all the same.
    assert panels["previous_token_looks_previous_token"].item() == pytest.approx(1.0, abs=1e-4)


def test_a_model_without_tokens_has_no_head_scores() -> None:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    clean, corrupted = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    behavior = Behavior(clean, corrupted, target=lambda outputs, batch: outputs[:, -1, 0])
    step = Step("look", prior=(Looks("previous_token"),), posterior=(Removes(),))
    evidence = CircuitHypothesis("look", (step,)).test(layer, behavior)
    assert evidence.verdict == "not"
    assert "repeated tokens" in str(evidence.lines[0].reason)
    assert "cannot be measured" in evidence.reading()["fit_look"].convention["reason"]


# ------------------------------------------------------------ characterisation


def test_characteristics_are_asked_of_the_model_and_of_its_heads_alone() -> None:
    near = repeats()
    claim = Characteristic(
        "sure", "It is right.", {"own": near}, (Expectation("own", "above", 0.9),)
    )
    behavior = dataclasses.replace(near, characteristics=(claim,))
    evidence = InductionCircuit().test(induction(), behavior)
    model, alone = evidence.under("characterisation")
    assert (model.step, model.holds, model.value) == ("model", True, 1.0)
    assert (alone.step, alone.holds, alone.value) == ("its heads alone", None, 1.0)
    never = dataclasses.replace(claim, expected=(Expectation("own", "below", 0.5),))
    behavior = dataclasses.replace(near, characteristics=(never,))
    evidence = InductionCircuit().test(induction(), behavior)
    assert (evidence.verdict, evidence.failing[0].step) == ("partly", "model")


# ------------------------------------------------------------ panels and schedule


def test_it_runs_as_a_measurement_over_training() -> None:
    test = HypothesisTest(repeats())
    verdicts = []
    for beta in (0.0, 1.0, 30.0):  # At first the metric is the same on both prompts.
        found = {r.what: r.panel for r in measure(induction(beta), test)}
        verdicts.append(found["verdict"].item())
    assert math.isnan(verdicts[0])
    assert verdicts[1:] == [0.0, 1.0]
    assert found["fit_induction"].axes == ("layer", "head")
    assert found["fit_induction"].values.argmax() == 2
    assert found["share_holding"].item() == 1.0
    assert found["claims"].values.tolist() == [1.0] * 7
    assert "verdict: supported" in found["verdict"].convention["table"]
    assert found["previous_token_removes_mean"].convention["low"] > 0.8


def test_a_description_of_prompts_will_do() -> None:
    tokens = RepeatedTokens(12, length=4, sequences=4)
    by_class = InductionCircuit().test(induction(), _Described(tokens))
    assert by_class.verdict == "supported"


@dataclasses.dataclass(frozen=True)
class _Described:
    tokens: RepeatedTokens

    def behavior(self) -> Behavior:
        return as_behavior(self.tokens.behavior("block"))


def test_the_model_is_left_as_it_was() -> None:
    model = induction().train()
    before = {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    InductionCircuit().test(model, repeats())
    assert model.training
    assert bool((torch.get_rng_state() == state).all())
    for name, p in model.named_parameters():
        value, flag, grad = before[name]
        assert torch.equal(p, value)
        assert (p.requires_grad, p.grad) == (flag, grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda: CircuitHypothesis("empty"),
        lambda: CircuitHypothesis("twice", (Step("a"), Step("a"))),
        lambda: CircuitHypothesis("later", (Step("a", connection=(Composes("b"),)), Step("b"))),
        lambda: Step("a", "neuron"),  # type: ignore[arg-type]
        lambda: Step("a", "mlp", connection=(Composes("b"),)),
        lambda: Step("a", at_most=0),
        lambda: Looks("name_mover"),
        lambda: Looks("induction", 0.0),
        lambda: Copies(2.0),
        lambda: Removes(0.0),
        lambda: Removes(0.5, "gone"),  # type: ignore[arg-type]
        lambda: Composes("a", "k"),  # type: ignore[arg-type]
        lambda: Composes("a", z=0.0),
        lambda: Carries("a", share=1.5),
    ],
)
def test_what_cannot_be_stated_is_refused(make: object) -> None:
    with pytest.raises(ArgumentError):
        make()  # type: ignore[operator]


def test_positions_and_patterns_that_there_are_not_are_refused() -> None:
    step = Step("look", prior=(Attends("last", "nowhere"),))
    with pytest.raises(ArgumentError, match="nowhere"):
        CircuitHypothesis("look", (step,)).test(induction(), repeats())
    unit = Step("unit", "mlp", prior=(Looks("induction"),))
    with pytest.raises(ArgumentError, match="Writes"):
        CircuitHypothesis("unit", (unit,)).test(gate("and"), bits())


def test_lines_print_what_was_stated_and_found() -> None:
    line = Line("connection", "b", "key", "claim", 0.5, 0.3, 0.4, 0.6, 0.1, True, ("L0H0",))
    assert str(line) == "yes  b: claim (L0H0): 0.500 [0.400, 0.600], null 0.100"
    many = dataclasses.replace(line, components=tuple(f"L0H{i}" for i in range(10)))
    assert "L0H6, L0H7 and 2 more)" in str(many)
    assert len(many.panel().convention["components"]) == 10
    nothing = Line("connection", "b", "key", "claim", math.nan, reason="why", holds=False)
    assert str(nothing) == " no  b: claim: undefined: why"


# ------------------------------------------------------------ trained models


@pytest.mark.slow
@pytest.mark.parametrize("corruption", ["block", "trigger"])
def test_evidence_for_induction_forms_with_training(corruption: Any) -> None:
    from trained import VOCABULARY, trained

    after, before = trained()
    behavior = RepeatedTokens(VOCABULARY, length=12, sequences=16).behavior(corruption)
    test = HypothesisTest(behavior)
    shares = [
        {r.what: r.panel for r in measure(m, test)}["share_holding"].item() for m in (before, after)
    ]
    assert shares[0] < 0.3
    assert shares[1] == 1.0
    evidence = InductionCircuit().test(after, behavior)
    assert evidence.verdict == "supported"
    assert {h.layer for h in evidence.components["previous token"]} == {0}
    assert {h.layer for h in evidence.components["induction"]} == {1}
    found = {(line.step, line.key): line for line in evidence.lines}
    assert found["induction", "carries_k_previous_token"].value > 0.8
    assert found["induction", "composes_k_previous_token"].value > 10
