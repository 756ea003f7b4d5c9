"""What heads look at, what parts write into the answer, what layers believe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import Oracle
from test_attention import build, inputs
from test_heads import gpt2, llama
from test_padding import packed, sides
from torch import Tensor

import lightning_mi as mi
from lightning_mi import ArgumentError, Head, NextToken
from lightning_mi.attention import tap
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import (
    Patterns,
    attention_entropy,
    attention_patterns,
    attention_summary,
    head_scores,
    top_attended,
)

PROTOCOL = RepeatedTokens(40, length=16, bos=0, sequences=4)
SUMMARY = ("entropy", "evenness", "sink_mass")


def text(sequences: int = 2, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 15, (sequences, length), generator=generator)


# Patterns.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_patterns_are_those_of_the_model(make: Any, implementation: str) -> None:
    eager, ids = make(attn_implementation="eager"), text()
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
    model = make(attn_implementation=implementation)
    found = attention_patterns(model, ids)
    assert len(found) == len(expected) * expected[0].shape[1]
    for head, pattern in found.items():
        assert torch.allclose(pattern, expected[head.layer][:, head.head], atol=2e-6), head
    chosen = attention_patterns(model, ids[0], ["L1H2", Head(0, 1)])
    assert list(chosen) == [Head(1, 2), Head(0, 1)]
    assert torch.allclose(chosen[Head(1, 2)][0], expected[1][0, 2], atol=2e-6)


def test_patterns_carry_gradients_where_they_are_wanted() -> None:
    model, ids = gpt2(), text()
    weight = model.transformer.h[0].attn.c_attn.weight
    pattern = attention_patterns(model, ids, ["L1H0"])[Head(1, 0)]
    assert torch.autograd.grad(pattern[0, 9, 4], weight)[0].abs().max() > 0
    with torch.no_grad():
        assert not attention_patterns(model, ids, ["L1H0"])[Head(1, 0)].requires_grad
    found = attention_summary(model, ids)
    for name in SUMMARY:
        (gradient,) = torch.autograd.grad(found[name][1, 0], weight, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert gradient.abs().max() > 0


def test_entropy_in_closed_form() -> None:
    pattern = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.25, 0.25, 0.0]])
    expected = [0.0, math.log(4), 1.5 * math.log(2)]
    assert torch.allclose(attention_entropy(pattern), torch.tensor(expected), atol=1e-6)
    values, keys = top_attended(pattern[2:], 2)
    assert values.tolist() == [[0.5, 0.25]]
    assert keys[0, 0] == 0
    logits = torch.tensor([[0.3, -1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    attention_entropy(logits.softmax(-1)).sum().backward()
    assert bool(logits.grad.isfinite().all())  # type: ignore[union-attr]


def test_summary_of_the_hand_built_model() -> None:
    with torch.no_grad():
        uniform = attention_summary(Oracle(0.0), PROTOCOL.tokens())
        sharp = attention_summary(Oracle(30.0), PROTOCOL.tokens())
    assert torch.allclose(uniform["evenness"], torch.ones(2, 1), atol=1e-6)
    expected = sum(math.log(t + 1) for t in range(2, 33)) / 31
    assert torch.allclose(uniform["entropy"], torch.full((2, 1), expected), atol=1e-5)
    sink = sum(1 / (t + 1) for t in range(2, 33)) / 31
    assert torch.allclose(uniform["sink_mass"], torch.full((2, 1), sink), atol=1e-6)
    assert float(sharp["entropy"][0]) < 1e-4
    assert float(sharp["sink_mass"][0]) < 1e-4


def slow_summary(pattern: Tensor, reach: Tensor, real: list[bool]) -> dict[str, float]:
    own: dict[str, list[float]] = {name: [] for name in SUMMARY}
    places = [t for t, r in enumerate(real) if r]
    for t in places[2:]:
        row = [float(p) for p in pattern[t] if p > 0]
        entropy = -sum(p * math.log(p) for p in row)
        own["entropy"].append(entropy)
        own["evenness"].append(entropy / max(math.log(int(reach[t].sum())), 1e-9))
        own["sink_mass"].append(float(pattern[t, places[0]]))
    return {name: sum(v) / len(v) for name, v in own.items()}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom", "neox"])
def test_summary_against_a_slow_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name, "eager"), inputs(name)
    with torch.no_grad(), tap(model, check="all") as seen:
        NextToken().outputs(model, batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        found = attention_summary(model, batch)
        monkeypatch.setattr("lightning_mi.circuits.readout.patterns.BLOCK", 4 * 12 * 5)
        cut = attention_summary(model, batch)
    for layer, site in enumerate(seen.sites):
        pattern, reach = site.pattern(), site.reachable()
        reach = torch.ones_like(pattern) if reach is None else reach.expand_as(pattern)
        for head in (0, 3):
            slow = [
                slow_summary(pattern[b, head], reach[b, head], real[b].tolist()) for b in (0, 1)
            ]
            for key in SUMMARY:
                mean = sum(s[key] for s in slow) / 2
                assert float(found[key][layer, head]) == pytest.approx(mean, abs=2e-6), key
                assert float(cut[key][layer, head]) == pytest.approx(mean, abs=2e-6), key


def test_sink_mass_is_the_score_of_the_first_position() -> None:
    model, ids = llama(), text()
    with torch.no_grad():
        found, score = attention_summary(model, ids)["sink_mass"], head_scores(model, ids)
    assert torch.allclose(found, score["first_position"], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_padding_changes_no_summary(make: Any, side: str) -> None:
    model, ids = make(), text()
    with torch.no_grad():
        plain = attention_summary(model, ids)
        for pads in (1, 3, 8):
            padded, mask = sides(ids, pads, side)
            found = attention_summary(model, {"input_ids": padded, "attention_mask": mask})
            for name in SUMMARY:
                assert torch.allclose(plain[name], found[name], atol=1e-5), (name, pads)


def test_summary_of_packed_documents() -> None:
    model, lengths = llama(), (9, 7)
    ids = text(1, 16)
    positions, _, block = packed(lengths)
    batch = {"input_ids": ids, "attention_mask": block, "position_ids": positions}
    with torch.no_grad():
        found = attention_summary(model, batch)
        alone = [attention_summary(model, part) for part in ids.split(lengths, 1)]
    for name in SUMMARY:
        mean = sum((n - 2) * a[name] for n, a in zip(lengths, alone, strict=True)) / 12
        assert torch.allclose(found[name], mean, atol=1e-5), name


def test_images_and_bad_names() -> None:
    model, batch = build("vit"), inputs("vit")
    with torch.no_grad():
        found = attention_summary(model, batch)
        patterns = attention_patterns(model, batch, ["L1H3"])
    assert found["entropy"].shape == (2, 4)
    assert torch.allclose(patterns[Head(1, 3)].sum(-1), torch.ones(()), atol=1e-5)
    with pytest.raises(ArgumentError, match=r"heads: expected heads of 2 layers.*L9H0"):
        attention_patterns(model, batch, ["L9H0"])
    with pytest.raises(ArgumentError, match='names such as "L1H3"'):
        Patterns(heads=("MLP0",))
    with pytest.raises(ArgumentError, match="top: expected a positive int"):
        Patterns(top=0)


def test_patterns_as_a_measurement() -> None:
    model, ids = gpt2(), text()
    context = mi.Context(model, ids, NextToken(), decode=lambda ids: [f"<{i}>" for i in ids])
    records = mi.measure(model, Patterns(heads=("L1H2", "L0H0"), top=2), context=context)
    panels = {r.what: r.panel for r in records}
    with torch.no_grad():
        found, kept = attention_summary(model, ids), attention_patterns(model, ids, ["L1H2"])
    for name in SUMMARY:
        assert torch.allclose(panels[name].values, found[name], atol=1e-6)
        assert panels[name].axes == ("layer", "head")
    whole = panels["attention"]
    assert whole.axes == ("head", "query_position", "key_position")
    assert whole.coords["head"] == ["L1H2", "L0H0"]
    assert whole.coords["key_position"][:2] == [f"<{int(i)}>" for i in ids[0, :2]]
    assert torch.allclose(whole.values[0], kept[Head(1, 2)][0], atol=1e-6)
    best = panels["top"]
    place = int(kept[Head(1, 2)][0, 7].argmax())
    assert best.convention["key_positions"][0][7][0] == place
    assert best.coords["head,query_position,token"][0][7][0] == f"<{int(ids[0, place])}>"


def test_a_sequence_of_two_tokens_has_a_reason() -> None:
    panels = {r.what: r.panel for r in mi.measure(gpt2(), Patterns(), batch=text(1, 2))}
    assert panels["entropy"].values.isnan().all()
    assert "three tokens" in panels["entropy"].convention["reason"]
