"""What heads look at, what parts write into the answer, what layers believe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from oracle import Oracle
from stated import STATED, stated, stated_oracle
from test_attention import EAGER_ONLY, build, inputs
from test_heads import gpt2, llama
from test_padding import packed, sides
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import (
    ArgumentError,
    Head,
    LogitDifference,
    LogProbability,
    ModelError,
    NextToken,
)
from lightning_mi.anatomy import Anatomy, Norm, ReaderInput, Writer
from lightning_mi.attention import tap
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import (
    LogitAttribution,
    LogitLens,
    Patterns,
    attention_entropy,
    attention_patterns,
    attention_summary,
    head_scores,
    logit_attribution,
    logit_lens,
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


# What each part writes into the answer.


def built(name: str) -> nn.Module:
    """Return a small model of an architecture."""
    return build(name, "eager" if name in EAGER_ONLY else "sdpa")


def loud(model: nn.Module) -> nn.Module:
    """Biases and gains that count, so that a forgotten one shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.normal_(0.6, 0.5)
    return model


def by_hand(model: Any) -> Anatomy:
    """Return the anatomy of a GPT-2 as its own modules state it."""
    body = model.transformer
    width, count = body.wte.weight.shape[1], len(body.h)
    heads = body.h[0].attn.num_heads
    size = width // heads

    def norm(name: str) -> Norm:
        module: Any = model.get_submodule(name)
        return Norm(name, "layer", module.weight.detach(), module.bias.detach(), module.eps)

    parts: dict[str, list[Tensor]] = {n + k: [] for n in "Wb" for k in "_Q _K _V _O".split()}
    writers = [Writer("embed", "transformer.wte", -1, "embed", node=mi.Embedding())]
    writers.append(Writer("pos", "transformer.wpe", -1, "position"))
    readers = []
    for layer, block in enumerate(body.h):
        weights = block.attn.c_attn.weight.detach().chunk(3, 1)
        biases = block.attn.c_attn.bias.detach().chunk(3)
        for kind, weight, bias in zip("QKV", weights, biases, strict=True):
            parts[f"W_{kind}"].append(weight.reshape(width, heads, size).transpose(0, 1))
            parts[f"b_{kind}"].append(bias.reshape(heads, size))
        parts["W_O"].append(block.attn.c_proj.weight.detach().reshape(heads, size, width))
        parts["b_O"].append(block.attn.c_proj.bias.detach())
        name = f"transformer.h.{layer}"
        writers.append(Writer(f"attn{layer}", f"{name}.attn", layer, "heads"))
        writers.append(Writer(f"MLP{layer}", f"{name}.mlp", layer, "mlp", node=mi.MLP(layer)))
        readers.append(ReaderInput(f"attn{layer}", f"{name}.ln_1", layer, "attention"))
        readers.append(ReaderInput(f"MLP{layer}", f"{name}.ln_2", layer, "mlp"))
    readers.append(ReaderInput("logits", "transformer.ln_f", count, "logits"))
    return Anatomy(
        n_layers=count,
        n_heads=(heads,) * count,
        n_kv_heads=(heads,) * count,
        d_head=(size,) * count,
        d_model=width,
        modules=tuple(f"transformer.h.{i}.attn" for i in range(count)),
        scale=(size**-0.5,) * count,
        W_E=body.wte.weight.detach(),
        W_U=model.lm_head.weight.detach().T,
        final_norm=norm("transformer.ln_f"),
        writers=tuple(writers),
        readers=tuple(readers),
        **{k: tuple(v) for k, v in parts.items()},  # type: ignore[arg-type]
    )


def test_parts_add_up_and_each_is_what_its_formula_says() -> None:
    model, ids = loud(gpt2()), text(2, 9)
    anatomy = by_hand(model)
    with torch.no_grad():
        found = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
        with tap(model) as seen:
            outputs = model(ids, output_hidden_states=True)
    logits = outputs.logits[..., 5] - outputs.logits[..., 7]
    assert found.gap < 1e-5
    assert torch.allclose(found.logit, logits, atol=1e-5)
    assert torch.allclose(found.values.sum(-1), logits, atol=1e-5 * float(logits.abs().max()))
    # The last hidden state that transformers hands out is normalised already.
    stream = {}
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda m, a: stream.update(x=a[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    x, norm = stream["x"], model.transformer.ln_f
    sigma = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    direction = model.lm_head.weight[5] - model.lm_head.weight[7]

    def pushed(part: Tensor) -> Tensor:
        return ((part - part.mean(-1, keepdim=True)) / sigma * norm.weight) @ direction

    for layer in range(2):
        for head in range(4):
            z = seen.sites[layer].z[:, head]
            weight = model.transformer.h[layer].attn.c_proj.weight[head * 8 : head * 8 + 8]
            own = found.values[..., found.labels.index(f"L{layer}H{head}")]
            assert torch.allclose(own, pushed(z @ weight), atol=1e-5), (layer, head)
            assert torch.equal(found.heads[..., layer, head], own)
    embedded = pushed(model.transformer.wte(ids))
    assert torch.allclose(found.values[..., 0], embedded, atol=1e-5)
    bias = found.values[..., found.labels.index("final_norm.bias")]
    assert torch.allclose(bias, (norm.bias @ direction).expand_as(bias), atol=1e-5)
    # Without the centring the parts do not add up: the check can fail.
    wrong = Norm("transformer.ln_f", "rms", norm.weight.detach(), norm.bias.detach(), norm.eps)
    with torch.no_grad():
        broken = dataclasses.replace(anatomy, final_norm=wrong)
        assert logit_attribution(model, ids, 5, wrong=7, anatomy=broken).gap > 1e-2


TABLE = ["gpt2", "llama", "mistral", "gemma2", "neox", "phi", "opt", "qwen3", "gptj", "falcon"]
MARKED = {"gemma2": "sandwich"}
CASES = [(n, "found") for n in TABLE] + [(n, "stated") for n in TABLE if n in STATED]


def anatomy_of(model: nn.Module, name: str, how: str, ids: Tensor) -> Anatomy:
    """Return an anatomy as it is found, or as the authors of the model wrote it."""
    if how == "stated":
        return stated_oracle(model) if name == "oracle" else stated(model, name)
    with torch.no_grad():
        return Anatomy.of(model, ids)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_parts_add_up_whatever_the_architecture(name: str, how: str) -> None:
    model, ids = loud(built(name)), inputs(name)["input_ids"]
    anatomy = anatomy_of(model, name, how, ids)
    with torch.no_grad():
        single = logit_attribution(model, ids, 5, anatomy=anatomy)
        pair = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
        logits = model(ids).logits
    cap = getattr(model.config, "final_logit_softcapping", None)
    before = logits if cap is None else cap * (logits / cap).atanh()
    for found, expected in ((single, before[..., 5]), (pair, before[..., 5] - before[..., 7])):
        size = float(expected.abs().max())
        assert (found.values.sum(-1) - expected).abs().max() <= 1e-5 * max(size, 1.0), name
        assert found.values.isfinite().all()
    assert {f"L{i}H{j}" for i in range(2) for j in range(4)} <= set(single.labels)
    assert {"embed", "MLP0", "MLP1"} <= set(single.labels)
    assert "unseen" not in single.labels
    words = " ".join(single.approximate)
    assert (MARKED.get(name, "nothing") in words) == (name in MARKED), words


@pytest.mark.parametrize("name", [n for n in TABLE if n in STATED])
def test_found_parts_are_those_that_the_authors_wrote(name: str) -> None:
    model, ids = loud(built(name)), inputs(name)["input_ids"]
    found = [
        logit_attribution(model, ids, 5, 7, anatomy=anatomy_of(model, name, how, ids))
        for how in ("found", "stated")
    ]
    size = float(found[0].values.detach().abs().max())
    for label in {*found[0].labels, *found[1].labels}:
        a, b = (
            f.values[..., f.labels.index(label)] if label in f.labels else torch.zeros(())
            for f in found
        )
        assert (a - b).abs().max() <= 2e-5 * size, label


class Answering(nn.Module):
    """A body with an unembedding on top."""

    def __init__(self, body: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.body, self.unembed = body, nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.unembed(self.body(input_ids, attention_mask=attention_mask)[0])


class Encoder(nn.Module):
    """Torch's own encoder, post-norm unless told otherwise."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(
            16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(16) if norm_first else None
        self.body = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.unembed = nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembed(self.body(self.table(ids)))


@pytest.mark.parametrize("how", ["found", "stated"])
@pytest.mark.parametrize("kind", ["bert", "encoder", "encoder, pre-norm"])
def test_post_norm_parts_add_up_and_are_marked(kind: str, how: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "bert":
        from transformers import BertConfig, BertModel

        settings: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
        settings |= {"num_attention_heads": 4, "intermediate_size": 24}
        model = Answering(BertModel(BertConfig(**settings), add_pooling_layer=False), 16, 40)
    else:
        model = Encoder(kind != "encoder")
    model, ids = loud(model.eval()), text()
    with torch.no_grad():
        anatomy = anatomy_of(model, kind, how, ids)
        found, logits = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy), model(ids)
    expected = logits[..., 5] - logits[..., 7]
    assert (found.values.sum(-1) - expected).abs().max() <= 1e-5 * float(expected.abs().max())
    assert any("post-norm" in why for why in found.approximate) == (kind != "encoder, pre-norm")
    assert {f"L{i}H{j}" for i in range(2) for j in range(4)} <= set(found.labels)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "opt"])
def test_neurons_add_up_to_their_mlp(name: str) -> None:
    model, ids = loud(built(name)), inputs(name)["input_ids"]
    anatomy = stated(model, name)
    with torch.no_grad():
        found = logit_attribution(model, ids, 5, wrong=7, neurons=1, anatomy=anatomy)
        for module in model.modules():  # what is left without biases
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        bare = logit_attribution(model, ids, 5, wrong=7, neurons=1, anatomy=stated(model, name))
    assert found.neurons is not None
    assert found.neurons.shape[:2] == ids.shape
    assert bare.neurons is not None
    mlp = bare.values[..., bare.labels.index("MLP1")]
    assert torch.allclose(bare.neurons.sum(-1), mlp, atol=1e-4 * float(mlp.abs().max()))
    with pytest.raises(ArgumentError, match="neurons: expected a layer with an MLP"):
        logit_attribution(model, ids, 5, neurons=7, anatomy=anatomy)


class WholeOracle(Oracle):
    """The hand-built model with its embedding and unembedding in modules."""

    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        width = 2 * self.V + self.P
        self.table = nn.Embedding(self.V, width)
        self.places = nn.Embedding(self.P, width)
        self.unembed = nn.Linear(width, self.V, bias=False)
        eye = torch.eye(width)
        with torch.no_grad():
            self.table.weight.copy_(eye[: self.V])
            self.places.weight.copy_(eye[self.V : self.V + self.P])
            self.unembed.weight.copy_(eye[: self.V])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = x + layer(x)
        return self.unembed(x)


@pytest.mark.parametrize("how", ["found", "stated"])
def test_attribution_of_the_hand_built_model(how: str) -> None:
    model, ids = WholeOracle(30.0), PROTOCOL.tokens()
    anatomy = anatomy_of(model, "oracle", how, ids)
    with torch.no_grad():
        assert torch.equal(model(ids), Oracle(30.0)(ids))
        found = logit_attribution(model, ids, anatomy=anatomy)
    assert found.labels == ("embed", "pos", "L0H0", "L1H0")
    second = found.values[:, 17:32]
    # Head 1.0 writes the next token, all else writes the token itself or where no logit is.
    assert torch.allclose(second[..., 3], torch.ones(4, 15), atol=1e-3)
    assert torch.equal(second[..., :3], torch.zeros(4, 15, 3))
    assert found.values[:, -1].isnan().all()
    with torch.no_grad():
        itself = logit_attribution(model, ids, ids, anatomy=anatomy)
    assert torch.equal(itself.values[..., 0], torch.ones(4, 33))
    assert found.top(1, position=20) == {"L1H0": pytest.approx(1.0, abs=1e-3)}


@pytest.mark.parametrize("how", ["found", "stated"])
def test_lens_of_the_hand_built_model(how: str) -> None:
    model, ids = WholeOracle(30.0), PROTOCOL.tokens()
    anatomy = anatomy_of(model, "oracle", how, ids)
    with torch.no_grad():
        found = logit_lens(model, ids, anatomy=anatomy)
    assert found.labels == ("embed", "L0", "L1")
    second = slice(17, 32)
    # The first two streams say the token itself; the last says it and the next one alike.
    assert (found.top[:2, :, second, 0] == ids[:, second]).all()
    log = math.log(40 - 1 + math.e)
    assert torch.allclose(found.log_probability[0, :, second], torch.tensor(-log), atol=1e-5)
    last = 1 - math.log(38 + 2 * math.e)
    assert torch.allclose(found.log_probability[2, :, second], torch.tensor(last), atol=1e-2)
    assert (found.rank[2, :, second] <= 1).all()
    chance = math.e / (math.e + 39)
    expected = -chance * math.log(chance) + 39 / (math.e + 39) * math.log(math.e + 39)
    assert torch.allclose(found.entropy[0], torch.tensor(expected), atol=1e-5)
    # With another layer's statistics it could be above that of the uniform distribution's.
    assert float(found.entropy.max()) < math.log(40)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "opt"])
def test_lens_ends_in_the_model_and_uses_the_statistics_of_each_layer(name: str) -> None:
    model, ids = loud(built(name)), inputs(name)["input_ids"]
    with torch.no_grad():
        found = logit_lens(model, ids, anatomy=stated(model, name))
        logits = model(ids, output_hidden_states=True)
    scale = float(logits.logits.abs().max())
    assert (found.logits(-1) - logits.logits).abs().max() <= 1e-5 * max(scale, 1.0)
    logs = logits.logits.log_softmax(-1)
    right = logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(found.log_probability[-1, :, :-1], right, atol=1e-4)
    assert found.log_probability[:, :, -1].isnan().all()
    rank = (logs[:, :-1] > right[..., None]).sum(-1)
    assert torch.equal(found.rank[-1, :, :-1].long(), rank)
    assert torch.allclose(found.entropy[-1], -(logs.exp() * logs).sum(-1), atol=1e-4)
    # The stream before layer 1, through the model's own norm and head.
    norm = {"neox": "gpt_neox.final_layer_norm"}.get(name)
    norm = norm or {"opt": "model.decoder.final_layer_norm"}.get(name, "model.norm")
    with torch.no_grad():
        hidden = logits.hidden_states[1]
        own = model.get_output_embeddings()(model.get_submodule(norm)(hidden))
        cap = getattr(model.config, "final_logit_softcapping", None)
        own = own if cap is None else cap * (own / cap).tanh()
    assert (found.logits(1) - own).abs().max() <= 1e-5 * float(own.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_padding_changes_neither_attribution_nor_lens(make: Any, side: str) -> None:
    model, ids = loud(make()), text(2, 12)
    with torch.no_grad():
        anatomy = by_hand(model) if make is gpt2 else stated(model, "llama", 14)
        plain = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
        lens = logit_lens(model, ids, anatomy=anatomy)
        for pads in (1, 3, 8):
            padded, mask = sides(ids, pads, side)
            batch = {"input_ids": padded, "attention_mask": mask}
            found = logit_attribution(model, batch, 5, wrong=7, anatomy=anatomy)
            size = float(plain.values.abs().max())
            for position in (0, 5, -1):
                near = found.at(position) - plain.at(position)
                assert near.abs().max() <= 1e-5 * size, (pads, position)
            seen, real = logit_lens(model, batch, anatomy=anatomy), mask.bool()
            for name in ("entropy", "rank", "log_probability"):
                a, b = getattr(seen, name)[:, real], getattr(lens, name).flatten(1)
                assert torch.allclose(a, b, atol=1e-4, equal_nan=True), (name, pads)


def test_gradients_pass_through_what_parts_write() -> None:
    model, ids = loud(gpt2()).double(), text(1, 7)
    anatomy = by_hand(model)
    weight = model.transformer.h[0].attn.c_attn.weight
    found = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
    place = found.labels.index("L1H2")
    (gradient,) = torch.autograd.grad(found.values[0, 6, place], weight)
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            weight[3, 70] += step
            again = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
            values.append(float(again.values[0, 6, place]))
            assert not again.values.requires_grad
    assert float(gradient[3, 70]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)
    lens = logit_lens(model, ids, anatomy=anatomy)
    assert torch.autograd.grad(lens.entropy[1].sum(), weight)[0].isfinite().all()


def test_half_precision_is_close_and_single_sequences_are_taken() -> None:
    model, ids = gpt2(), text(2, 9)
    with torch.no_grad():
        anatomy = by_hand(model)
        plain = logit_attribution(model, ids, 5, wrong=7, anatomy=anatomy)
        one = logit_attribution(model, ids[0], 5, wrong=7, anatomy=anatomy)
        half = logit_attribution(model.bfloat16(), ids, 5, wrong=7, anatomy=anatomy)
    assert torch.allclose(one.values[0], plain.values[0], atol=1e-5)
    assert half.values.dtype == torch.float32
    assert half.values.isfinite().all()
    assert (half.values - plain.values).abs().max() < 0.05 * plain.values.abs().max()


def test_wrong_questions_are_refused() -> None:
    model, ids = gpt2(), text(2, 9)
    anatomy = by_hand(model)
    with pytest.raises(ArgumentError, match="answer: expected tokens from 0 to 60"):
        logit_attribution(model, ids, 61, anatomy=anatomy)
    with pytest.raises(ArgumentError, match="wrong: expected one token"):
        logit_attribution(model, ids, 5, wrong=torch.zeros(3, dtype=torch.long), anatomy=anatomy)
    with pytest.raises(ArgumentError, match="position: expected a position inside the 9"):
        logit_attribution(model, ids, 5, anatomy=anatomy).at(9)
    with pytest.raises(ModelError, match="without W_U"):
        logit_lens(model, ids, anatomy=dataclasses.replace(anatomy, W_U=None))
    with pytest.raises(ArgumentError, match="no such sum"):
        LogitAttribution(target=LogProbability())
    for message, wrong in (
        ("answer: expected token ids, got ' Mary'", lambda: logit_attribution(model, ids, " Mary")),  # type: ignore[arg-type]
        ("anatomy: expected an Anatomy", lambda: logit_attribution(model, ids, 3, anatomy=3)),  # type: ignore[arg-type]
        ("top: expected a positive int", lambda: logit_lens(model, ids, top=0)),
        ("layer: expected 0 to 2", lambda: logit_lens(model, ids).logits(17)),
        ("count: expected a positive int", lambda: top_attended(torch.rand(2, 3), 0)),
        ("count: expected a positive int", lambda: logit_attribution(model, ids, 3).top(0)),
    ):
        with pytest.raises(ArgumentError, match=message):
            wrong()
    assert Patterns(heads="L1H0").heads == ("L1H0",)  # type: ignore[arg-type]
    assert list(attention_patterns(model, ids, "L1H0")) == [Head(1, 0)]


# As measurements.


def test_readout_as_measurements() -> None:
    model, ids = loud(gpt2()), text()
    records = mi.measure(model, [LogitAttribution(), LogitLens()], batch=ids)
    panels = {r.name: r.panel for r in records}
    with torch.no_grad():
        logits = model(ids).logits[:, -2]
        rivals = logits.scatter(-1, ids[:, -1:], -math.inf).argmax(-1)
        found = logit_attribution(model, ids, ids[:, -1], wrong=rivals)
        lens = logit_lens(model, ids)
    each = panels["logit_attribution/by_example"]
    assert each.axes == ("example", "writer")
    assert torch.allclose(each.values, found.values[:, -2], atol=1e-5)
    assert each.coords["writer"] == list(found.labels)
    assert torch.allclose(
        panels["logit_attribution/heads"].values, found.heads[:, -2].mean(0), atol=1e-5
    )
    expected = (
        logits.gather(1, ids[:, -1:])[:, 0] - logits.gather(1, rivals[:, None])[:, 0]
    ).mean()
    assert panels["logit_attribution/logit"].item() == pytest.approx(float(expected), abs=1e-5)
    assert panels["logit_attribution/gap"].item() < 1e-5
    assert each.convention["answer"] == [str(int(i)) for i in ids[:, -1]]
    assert panels["logit_lens/entropy"].coords == {"layer": ["embed", "L0", "L1"]}
    assert torch.allclose(panels["logit_lens/entropy"].values, lens.entropy.mean((1, 2)), atol=1e-6)
    rank = lens.rank[:, :, :-1].mean((1, 2))
    assert torch.allclose(panels["logit_lens/rank"].values, rank, atol=1e-5)
    settled = []
    for b in range(2):
        for t in range(20):
            column = lens.top[:, b, t, 0].tolist()
            settled.append(next(i for i in range(3) if len(set(column[i:])) == 1))
    assert panels["logit_lens/settled"].item() == pytest.approx(sum(settled) / 40)
    strip = panels["logit_lens/by_position"]
    assert strip.axes == ("layer", "position")
    assert strip.coords["layer,position"][2][4] == str(int(lens.top[2, 0, 4, 0]))
    assert "reason" in strip.convention


def test_a_named_target_is_what_is_asked() -> None:
    model, ids = loud(gpt2()), text()
    asked = LogitAttribution(target=LogitDifference(3, other=5, position=4))
    panels = {r.what: r.panel for r in mi.measure(model, asked, batch=ids)}
    with torch.no_grad():
        found = logit_attribution(model, ids, 3, wrong=5)
    assert torch.allclose(panels["by_example"].values, found.values[:, 4], atol=1e-5)
    assert panels["heads"].convention["position"] == [4, 4]


def test_neurons_as_a_measurement() -> None:
    model, ids = loud(gpt2()), text()
    asked = LogitAttribution(target=LogitDifference(3, other=5, position=4), neurons=1)
    panels = {r.what: r.panel for r in mi.measure(model, asked, batch=ids)}
    with torch.no_grad():
        found = logit_attribution(model, ids, 3, wrong=5, neurons=1)
    assert found.neurons is not None
    assert panels["neurons"].axes == ("neuron",)
    assert torch.allclose(panels["neurons"].values, found.neurons[:, 4].mean(0), atol=1e-5)
    assert panels["neurons"].convention["layer"] == 1
    with pytest.raises(ArgumentError, match="neurons: expected a layer, counted from 0"):
        LogitAttribution(neurons=-1)
    with pytest.raises(ArgumentError, match="neurons: expected a layer with an MLP"):
        mi.measure(model, LogitAttribution(neurons=7), batch=ids)


class PositionsFirst(nn.Module):
    """Torch's own layers as they are by default: positions before examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(40, 16), nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.unembed = nn.LayerNorm(16), nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.table(ids) + self.places(torch.arange(length))
        x = self.body(x.transpose(0, 1), mask=mask)
        out: Tensor = self.unembed(self.norm(x)).transpose(0, 1)
        return out


@pytest.mark.parametrize(("count", "length"), [(3, 8), (8, 8), (1, 8)])
def test_positions_before_examples(count: int, length: int) -> None:
    torch.manual_seed(0)
    model, ids = loud(PositionsFirst()), text(count, length)
    with torch.no_grad():
        found = logit_attribution(model, ids, 5, wrong=7, neurons=1)
        lens, logits = logit_lens(model, ids), model(ids)
    assert torch.allclose(found.logit, logits[..., 5] - logits[..., 7], atol=1e-5)
    assert found.gap < 1e-5
    assert torch.allclose(lens.logits(-1), logits, atol=1e-4)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(lens.entropy[-1], entropy, atol=1e-4)
    # Neurons differ from their MLP by its bias alone, the same for all up to the norm's scale.
    assert found.neurons is not None
    bias = model.body.layers[1].linear2.bias
    direction = model.norm.weight * (model.unembed.weight[5] - model.unembed.weight[7])
    with torch.no_grad():
        scale = found.anatomy.final_norm.scale(lens.streams[-1])[..., 0]  # type: ignore[union-attr]
        constant = (bias - bias.mean()) @ direction / scale
    mlp = found.values[..., found.labels.index("MLP1")]
    assert torch.allclose(found.neurons.sum(-1) + constant, mlp, atol=1e-4)


def test_packed_documents_are_attributed_as_they_are_alone() -> None:
    model = loud(llama())
    places, _, block = packed((7, 9))
    ids = text(1, 16)
    whole = {"input_ids": ids, "attention_mask": block, "position_ids": places}
    with torch.no_grad():
        found = logit_attribution(model, whole, 5, wrong=7)
        alone = [logit_attribution(model, part, 5, wrong=7) for part in (ids[:, :7], ids[:, 7:])]
    assert found.gap < 1e-5
    joined = torch.cat([part.values for part in alone], 1)
    assert torch.allclose(found.values, joined, atol=1e-5)


@pytest.mark.slow
def test_live_equals_sweep(tmp_path: Any) -> None:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from lightning_mi.callbacks import MeasurementMonitor, ScheduledCheckpoint
    from lightning_mi.circuits import (
        Composition,
        Copying,
        HeadDirections,
        HeadRoles,
        SubspaceOverlap,
    )

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt2().train()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids).logits

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            logits = self(ids)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        def validation_step(self, ids: Tensor, index: int) -> None:
            self(ids)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    chosen = [
        LogitAttribution(neurons=1),
        LogitLens(),
        Patterns(heads=("L1H0",)),
        HeadRoles(),
        Composition(rotations=4),
        Copying(kinds=("eigenvalue", "logit", "top_k", "argmax")),
        SubspaceOverlap(),
        HeadDirections(heads=("L0H1", "L1H0")),
    ]
    monitor = MeasurementMonitor(measurements=chosen, every_n_train_steps=2)
    saver = ScheduledCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2)
    data = torch.randint(0, 61, (12, 16), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_steps": 4}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[monitor, saver], default_root_dir=tmp_path, **options)
    loader: Any = DataLoader(data, 4)
    trainer.fit(Model(), loader, loader)
    run = mi.Run.open(tmp_path)
    mi.sweep(tmp_path / "checkpoints", Model(), monitor.measurements, run=run)
    live = {(r.name, r.step): r for r in run.records(source="live") if r.measurement != "monitor"}
    swept = {(r.name, r.step): r for r in run.records(source="sweep")}
    assert {step for _, step in live} == {0, 2, 4}
    assert {r.measurement for r in live.values()} == {m.name for m in chosen}
    assert live.keys() == swept.keys()
    assert [k for k, r in live.items() if not r.panel.equal(swept[k].panel)] == []
