"""Head scores against hand-built circuits, a slow twin, TransformerLens and the known pitfalls."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FixedOffset, Oracle
from test_attention import EAGER_ONLY, build
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import ArgumentError, ModelError, NoAttentionError
from lightning_mi.attention import tap
from lightning_mi.behaviors import RepeatedTokens, matches
from lightning_mi.circuits import (
    HeadScores,
    PromptAttention,
    copy_losses,
    head_scores,
    icl_score,
    icl_slope,
)

REFERENCE = Path(__file__).parent / "reference"
SCORES = ("induction", "previous_token", "duplicate_token", "current_token", "first_position")
PROTOCOL = RepeatedTokens(40, length=16, bos=0, sequences=4)


def scores(model: nn.Module, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return head_scores(model, tokens, **options)


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 96}
    settings |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **changes})).eval()
    return peaked(model)


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 28, "intermediate_size": 32, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 61}
    torch.manual_seed(0)
    return peaked(LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval())


def peaked(model: nn.Module) -> nn.Module:
    """Weights large enough that heads do not all look everywhere."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.4)
    return model


# The hand-built model, at every gain for which its values are known.


@pytest.mark.parametrize(
    ("beta", "induction", "previous"),
    [
        (0.0, 0.0406, 0.0835),
        (2.0, 0.0985, 0.3577),
        (5.0, 0.8128, 0.8999),
        (10.0, 0.9989, 0.9992),
        (30.0, 1.0, 1.0),
    ],
)
def test_values_of_the_hand_built_model(beta: float, induction: float, previous: float) -> None:
    found = scores(Oracle(beta), PROTOCOL.tokens())
    assert float(found["induction"][1, 0]) == pytest.approx(induction, abs=6e-5)
    assert float(found["previous_token"][0, 0]) == pytest.approx(previous, abs=6e-5)


def test_without_its_first_head_the_second_finds_nothing() -> None:
    model, tokens = Oracle(30.0), PROTOCOL.tokens()
    with tap(model, edit=lambda i, z: torch.zeros_like(z) if i == 0 else z):
        ablated = scores(model, tokens)
    assert float(ablated["induction"][1, 0]) == pytest.approx(0.0406, abs=6e-5)
    assert float(ablated["previous_token"][0, 0]) == pytest.approx(1.0, abs=6e-5)


def test_a_second_copy_is_predicted_by_the_hand_built_model() -> None:
    records = mi.measure(Oracle(30.0), HeadScores(tokens=PROTOCOL))
    found = {r.what: r.panel for r in records}
    # The stream also holds the token itself, so the right token gets half of the probability.
    assert found["loss_second_copy"].item() == pytest.approx(
        math.log(2 + 38 * math.exp(-1)), abs=1e-3
    )
    assert found["copy_gain"].item() > 0.5


def test_heads_add_up_to_the_logits_of_the_hand_built_model() -> None:
    model, tokens = Oracle(5.0), PROTOCOL.tokens()
    with torch.no_grad(), tap(model, check="all") as seen:
        logits = model(tokens)
    parts = [model.embed(tokens)[..., : model.V]]
    for site, layer in zip(seen.sites, model.layers, strict=True):
        parts.append((site.z[:, 0] @ layer.W_O)[..., : model.V])
    assert torch.allclose(sum(parts), logits, atol=1e-6)


def test_composition_of_the_hand_built_model() -> None:
    first, second = Oracle(5.0).requires_grad_(False).layers
    write, read = first.W_V @ first.W_O, second.W_Q @ second.W_K.T
    own = second.W_V @ second.W_O

    def composition(reader: Tensor) -> float:
        return float((write @ reader).norm() / (write.norm() * reader.norm()))

    assert composition(read.T) == pytest.approx(1 / math.sqrt(40), abs=1e-6)
    assert composition(read) == composition(own) == 0.0
    eigenvalues = torch.linalg.eigvals(own[:40, :40])
    assert float(eigenvalues.real.sum() / eigenvalues.abs().sum()) == pytest.approx(1.0)


# Offsets, nulls and targets.


@pytest.mark.parametrize(
    ("length", "null"), [(8, 0.0763), (16, 0.0406), (25, 0.0266), (50, 0.01357), (100, 0.00686)]
)
def test_uniform_null_of_induction(length: int, null: float) -> None:
    model = Oracle(0.0, vocabulary=2 * length + 1, positions=2 * length + 1)
    protocol = RepeatedTokens(2 * length + 1, length=length, bos=0, sequences=2)
    found = scores(model, protocol.tokens())
    assert float(found["induction_null"][0, 0]) == pytest.approx(null, abs=6e-6 + null * 3e-3)
    # At β = 0 attention is uniform, so the score is its own null.
    assert torch.allclose(found["induction"], found["induction_null"], atol=1e-6)


def test_uniform_null_of_previous_token_starts_at_two() -> None:
    found = scores(Oracle(0.0, 101, 101), RepeatedTokens(101, length=50, bos=0).tokens())
    expected = sum(1 / (t + 1) for t in range(2, 101)) / 99
    assert float(found["previous_token_null"][0, 0]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("offset", "name"),
    [(15, "induction"), (16, "duplicate_token"), (1, "previous_token"), (0, "current_token")],
)
@pytest.mark.parametrize("bos", [None, 0])
def test_offsets(offset: int, name: str, bos: int | None) -> None:
    found = scores(FixedOffset(offset), RepeatedTokens(200, length=16, bos=bos).tokens())
    for other in SCORES:
        value = float(found[other][0, 0])
        assert (value > 0.999) == (other == name), (other, value)


def test_fixed_offset_head_does_not_pass_the_matched_null() -> None:
    protocol = RepeatedTokens(length=16, sequences=8)
    found = {r.what: r.panel for r in mi.measure(FixedOffset(15), HeadScores(tokens=protocol))}
    assert found["induction"].item() > 0.999
    assert found["induction_null"].item() < 0.1
    assert found["induction_matched_null"].item() > 0.999
    assert found["induction_random_period"].item() < 0.1


def test_induction_head_passes_both_nulls_and_the_random_period() -> None:
    protocol = RepeatedTokens(length=16, sequences=8, bos=0)
    model = Oracle(30.0, vocabulary=60)
    found = {r.what: r.panel.values for r in mi.measure(model, HeadScores(tokens=protocol))}
    head = found["induction"][1, 0]
    assert head > 0.99
    assert found["induction_matched_null"][1, 0] < 0.1
    assert found["induction_null"][1, 0] < 0.1
    assert found["induction_random_period"][1, 0] > 0.99


def twin(pattern: Tensor, reach: Tensor, tokens: list[int], real: list[bool]) -> dict[str, float]:
    """Return the five scores of one head in one sequence, by their definitions."""
    own: dict[str, list[float]] = {name: [] for name in SCORES}
    places = [t for t, r in enumerate(real) if r]

    def add(name: str, t: int, targets: list[int]) -> None:
        if any(bool(reach[t, s]) for s in targets):
            own[name].append(sum(float(pattern[t, s]) for s in targets))

    for t in places:
        earlier = [p for p in places if p < t and tokens[p] == tokens[t]]
        add("induction", t, [p + 1 for p in earlier])
        add("duplicate_token", t, earlier)
        if t >= places[0] + 2:
            add("previous_token", t, [t - 1])
            add("current_token", t, [t])
            add("first_position", t, [places[0]])
    return {n: sum(v) / len(v) if v else math.nan for n, v in own.items()}


def compare_with_twin(model: nn.Module, tokens: Tensor, mask: Tensor, heads: list[int]) -> None:
    with torch.no_grad(), tap(model, check="all") as seen:
        mi.NextToken().outputs(model, {"input_ids": tokens, "attention_mask": mask})
    found = scores(model, tokens, attention_mask=mask, reduce=None)
    for layer, site in enumerate(seen.sites):
        pattern, reach = site.pattern(), site.reachable()
        reach = torch.ones_like(pattern) if reach is None else reach.expand_as(pattern)
        for b, h in enumerate(heads):
            slow = twin(pattern[b, h], reach[b, h], tokens[b].tolist(), mask[b].bool().tolist())
            for name, value in slow.items():
                own = float(found[name][b, layer, h])
                assert own == pytest.approx(value, abs=2e-6, nan_ok=True), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["natural", "padded", "three copies"])
def test_slow_twin(implementation: str, kind: str) -> None:
    model = llama(attn_implementation=implementation)
    tokens = torch.randint(3, 15, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if kind == "three copies":
        tokens = RepeatedTokens(61, length=7, repeats=3, sequences=3).tokens()
        mask = torch.ones_like(tokens)
    elif kind == "padded":
        mask[0, :5] = 0
        mask[1, :1] = 0
        tokens[mask == 0] = 0
    compare_with_twin(model, tokens, mask, [0, 5, 13])


def test_mean_is_over_sequences() -> None:
    model, tokens = gpt2(), RepeatedTokens(61, length=8).tokens()
    each, mean = scores(model, tokens, reduce=None), scores(model, tokens)
    for name in each:
        assert each[name].shape == (4, 2, 4)
        assert torch.equal(each[name].mean(0), mean[name])


def test_queries_out_of_a_window_are_left_out_and_counted() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 61}
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=6)).eval()
    short, long = RepeatedTokens(61, length=5), RepeatedTokens(61, length=12)
    assert scores(model, short.tokens())["induction"].isfinite().all()
    found = scores(model, long.tokens())
    assert found["induction"].isnan().all()
    assert found["previous_token"].isfinite().all()
    # Away from the beginning a query reaches exactly six keys.
    expected = sum(1 / min(t + 1, 6) for t in range(2, 24)) / 22
    assert float(found["previous_token_null"][0, 0]) == pytest.approx(expected, abs=1e-6)
    records = {r.what: r for r in mi.measure(model, HeadScores(tokens=long))}
    assert records["induction"].panel.convention["excluded_queries"] == [4 * 12]
    assert records["previous_token"].panel.convention["excluded_queries"] == [0]


# Two ways to one number.


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fast_way_equals_the_differentiable_one(make: Any, implementation: str) -> None:
    model, tokens = make(attn_implementation=implementation), RepeatedTokens(61, length=20).tokens()
    slow, fast = head_scores(model, tokens), scores(model, tokens)
    assert slow["induction"].requires_grad
    for name in fast:
        assert torch.allclose(slow[name].detach(), fast[name], atol=1e-6), name


@pytest.mark.parametrize(
    "name",
    ["falcon", "falcon alibi", "bloom", "mpt", "gpt-oss", "gemma2", "gemma3", "gpt-neo", "opt"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_fast_way_equals_the_pattern_whatever_the_mask(name: str, padded: bool) -> None:
    implementation = "eager" if name in EAGER_ONLY else "sdpa"
    model, tokens = build(name, implementation), RepeatedTokens(61, length=6, seed=3).tokens()
    mask = torch.ones_like(tokens)
    mask[:2, : 3 * padded] = 0
    compare_with_twin(model, tokens, mask, [1, 3, 0, 2])


def test_scores_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mi.circuits.heads import entries

    model, tokens = llama(), RepeatedTokens(61, length=20).tokens()
    whole = scores(model, tokens)
    monkeypatch.setattr(entries, "BLOCK", 14 * 40 * 7)
    cut = scores(model, tokens)
    for name in whole:
        assert torch.allclose(whole[name], cut[name], atol=1e-6)


def test_gradient_of_a_score_agrees_with_finite_differences() -> None:
    model, tokens = gpt2().double(), RepeatedTokens(61, length=6, sequences=1).tokens()
    weight = model.transformer.h[0].attn.c_attn.weight
    (gradient,) = torch.autograd.grad(head_scores(model, tokens)["induction"][1, 2], weight)
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            weight[3, 5] += step
            values.append(float(head_scores(model, tokens)["induction"][1, 2]))
    assert float(gradient[3, 5]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# Other packages' numbers.


def tiny_gpt2(implementation: str) -> nn.Module:
    from safetensors.torch import load_file

    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = gpt2(
        n_layer=3,
        vocab_size=53,
        n_positions=64,
        attn_implementation=implementation,
        **drop,
    )
    missing = model.load_state_dict(load_file(REFERENCE / "tiny_gpt2.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model


class AttentionOnly(nn.Module):
    """Attention-only transformer in TransformerLens's parameter layout, as its users write it."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_buffer(name.replace(".", "_"), value)
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_W_E[tokens] + self.pos_embed_W_pos[: tokens.shape[1]]
        for i in range(2):
            g = {n: getattr(self, f"blocks_{i}_attn_{n}") for n in ("W_Q", "W_K", "W_V", "W_O")}
            b = {n: getattr(self, f"blocks_{i}_attn_{n}") for n in ("b_Q", "b_K", "b_V", "b_O")}
            q = torch.einsum("bpd,hde->bphe", x, g["W_Q"]) + b["b_Q"]
            k = torch.einsum("bpd,hde->bphe", x, g["W_K"]) + b["b_K"]
            v = torch.einsum("bpd,hde->bphe", x, g["W_V"]) + b["b_V"]
            s = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e5)
            z = torch.einsum("bkhe,bhqk->bqhe", v, s.softmax(-1))
            x = x + torch.einsum("bqhe,hed->bqd", z, g["W_O"]) + b["b_O"]
        return x @ self.unembed_W_U + self.unembed_b_U


def reference(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / name) as stored:
        return {k: torch.from_numpy(stored[k]) for k in stored if stored[k].dtype != np.complex64}


def attention_only(stored: dict[str, Tensor]) -> nn.Module:
    own = {k.removeprefix("param."): v for k, v in stored.items() if k.startswith("param.")}
    return AttentionOnly(own)


@pytest.mark.parametrize("which", ["sdpa", "eager", "attention only"])
def test_transformer_lens(which: str) -> None:
    if which == "attention only":
        stored = reference("tl2_attn_only.npz")
        model = attention_only(stored)
    else:
        stored = reference("tl4_gpt2.npz")
        model = tiny_gpt2(which)
    tokens = stored["tokens"]
    with torch.no_grad(), tap(model, check="all") as seen:
        outputs = model(tokens)
    logits = getattr(outputs, "logits", outputs)
    assert (logits - stored["logits"]).abs().max() < 1e-5 * stored["logits"].abs().max()
    patterns = torch.stack([site.pattern() for site in seen.sites])
    # The attention-only model's weights are large: its second layer is rounded to 4e-5.
    near = 6e-5 if which == "attention only" else 1e-6
    assert torch.allclose(patterns, stored["patterns"], atol=near)
    half = tokens.shape[1] // 2
    for name, offset in (("induction", half - 1), ("previous", 1), ("duplicate", half)):
        mean = patterns.diagonal(-offset, -2, -1).mean((1, -1))
        assert torch.allclose(mean, stored[f"diag_mean.{name}"], atol=near)
    _detect_head(model, tokens, stored)


def _detect_head(model: nn.Module, tokens: Tensor, stored: dict[str, Tensor]) -> None:
    """Its "mul" is our mean times the queries, over all rows, as every row adds up to one."""
    found, rows = scores(model, tokens, reduce=None), tokens.shape[1]
    for name in ("induction", "duplicate_token"):
        queries = torch.tensor([len(set(m[:, 1].tolist())) for m in map(matches, tokens[:, None])])
        theirs = stored[f"detect_head.{name}_head.mul.exclude=0"]
        # TransformerLens rounds to three digits.
        assert torch.allclose(found[name] * queries[:, None, None] / rows, theirs, atol=6e-4), name


# Pitfalls of others.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_left_padding_changes_nothing(make: Any, implementation: str) -> None:
    model = make(attn_implementation=implementation)
    tokens = RepeatedTokens(61, length=9, sequences=2).tokens()
    plain = scores(model, tokens)
    for pads in (1, 3, 8):
        mask = F.pad(torch.ones_like(tokens), (pads, 0))
        found = scores(model, F.pad(tokens, (pads, 0), value=7), attention_mask=mask)
        for name in plain:
            assert torch.allclose(plain[name], found[name], atol=1e-5), (name, pads)


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_grouped_queries(groups: int) -> None:
    found = {
        implementation: scores(
            llama(num_key_value_heads=groups, attn_implementation=implementation),
            RepeatedTokens(61, length=9).tokens(),
        )
        for implementation in ("sdpa", "eager")
    }
    for name, values in found["sdpa"].items():
        assert values.shape == (2, 14)
        assert torch.allclose(values, found["eager"][name], atol=1e-5)


def test_half_precision_is_close_to_single() -> None:
    tokens = RepeatedTokens(61, length=9).tokens()
    model = gpt2()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    single, half = scores(model, tokens), scores(model.bfloat16(), tokens)
    for name, values in half.items():
        assert values.isfinite().all()
        assert torch.allclose(values, single[name], atol=0.02), name


class Mixed(nn.Module):
    """Layers with different numbers of heads."""

    def __init__(self, heads: tuple[int, ...] = (2, 4)) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(16, h, 16, batch_first=True, dropout=0.0) for h in heads]
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.table.weight.T


def test_layers_with_fewer_heads_are_filled_up() -> None:
    found = scores(Mixed(), RepeatedTokens(50, length=6).tokens())
    missing = found["induction"].isnan()
    assert missing.tolist() == [[False, False, True, True], [False] * 4]
    # Without a causal mask every key can be reached.
    assert torch.allclose(found["induction_null"][0, :2], torch.tensor(1 / 12))


def test_model_in_training_mode_is_measured_without_dropout() -> None:
    model, tokens = gpt2(), RepeatedTokens(61, length=6).tokens()
    expected = scores(model, tokens)
    model.train()
    found = scores(model, tokens)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_bad_input_is_refused() -> None:
    model, tokens = gpt2(), RepeatedTokens(61, length=6).tokens()
    with pytest.raises(ArgumentError, match=r"tokens.*\(12,\).*tokens\[None\]"):
        head_scores(model, tokens[0])
    with pytest.raises(ArgumentError, match="tokens: expected token ids"):
        head_scores(model, tokens.float())
    with pytest.raises(ArgumentError, match="reduce: expected 'mean' or None, got 'sum'"):
        head_scores(model, tokens, reduce="sum")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="to run on token ids of shape"):
        head_scores(model, RepeatedTokens(61, length=60, repeats=2).tokens()[:, :97] * 0 + 100)
    with pytest.raises(ArgumentError, match="batch: expected token ids"):
        mi.measure(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
            HeadScores(),
            batch=(torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
        )


def test_model_without_attention_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    batch = (torch.randn(2, 8), torch.tensor([0, 1]))
    with pytest.raises(NoAttentionError, match="Sequential"):
        mi.measure(model, HeadScores(), batch=batch)
    words = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 30))
    with pytest.raises(NoAttentionError, match=r"scaled_dot_product_attention.*MultiheadAttention"):
        scores(words, RepeatedTokens(30, length=4).tokens())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_encoder_decoder_is_refused(implementation: str) -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=2,
    )
    model = BartModel._from_config(config, attn_implementation=implementation)
    with pytest.raises(ModelError, match="encoder-decoder"):
        scores(model, RepeatedTokens(30, length=6).tokens())


# The measurement.


def test_reading_of_a_language_model() -> None:
    model, batch = gpt2(), torch.randint(0, 61, (3, 30))
    records = {r.name: r.panel for r in mi.measure(model, HeadScores(), batch=batch)}
    for name in SCORES:
        for ending in ("", "_null", "_stderr"):
            panel = records[f"head_scores/{name}{ending}"]
            assert panel.axes == ("layer", "head")
            assert panel.values.shape == (2, 4)
            assert panel.coords == {"layer": [0, 1], "head": [0, 1, 2, 3]}
            assert panel.nonfinite == 0
    convention = records["head_scores/induction"].convention
    # 61 ids leave room for two blocks of 30 tokens.
    assert (convention["length"], convention["offset"]) == (30, 29)
    assert convention["display"] == {"headline": "induction", "ranks": 2, "picture": "map"}
    first, second, gain = (
        records[f"head_scores/{n}"].item()
        for n in ("loss_first_copy", "loss_second_copy", "copy_gain")
    )
    assert gain == pytest.approx(first - second, abs=1e-6)
    losses = mi.NextToken().token_losses(model(batch).logits.detach(), batch)
    icl = records["head_scores/icl_score"]
    assert (icl.convention["early"], icl.convention["late"]) == (3, 29)
    assert icl.item() == pytest.approx(float((losses[:, 28] - losses[:, 2]).mean()), abs=1e-5)


def test_measurement_is_the_function_on_its_protocol() -> None:
    model = gpt2()
    records = {r.what: r.panel for r in mi.measure(model, HeadScores(tokens=PROTOCOL))}
    each = scores(model, PROTOCOL.tokens(), reduce=None)
    matched = scores(model, PROTOCOL.matched(), positions_of=PROTOCOL.tokens())
    for name in SCORES:
        assert torch.allclose(records[name].values, each[name].mean(0), atol=1e-7)
        stderr = each[name].std(0) / 2
        assert torch.allclose(records[f"{name}_stderr"].values, stderr, atol=1e-7)
    null = records["induction_matched_null"].values
    assert torch.allclose(null, matched["induction"], atol=1e-6)
    varied = scores(model, PROTOCOL.random_period())["induction"]
    assert torch.allclose(records["induction_random_period"].values, varied, atol=1e-6)


def test_given_tokens_are_those_of_the_batch() -> None:
    model, batch = gpt2(), torch.randint(0, 9, (3, 30))
    records = {r.what: r.panel for r in mi.measure(model, HeadScores(tokens=None), batch=batch)}
    assert torch.equal(records["induction"].values, scores(model, batch)["induction"])
    assert "copy_gain" not in records
    assert "induction_matched_null" not in records


def test_protocol_fits_a_context_that_only_the_model_knows() -> None:
    class Short(Mixed):
        def __init__(self) -> None:
            super().__init__((2,))
            self.places = nn.Embedding(20, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
            return self.layers[0](x) @ self.table.weight.T

    records = {r.what: r.panel for r in mi.measure(Short(), HeadScores())}
    assert records["induction"].convention["length"] == 10
    assert records["induction"].convention["vocabulary_size"] == 50


def test_batch_of_windows_with_one_token_more() -> None:
    class Fixed(Mixed):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.layers[0](x + self.places[: ids.shape[1]]) @ self.table.weight.T

    model = Fixed((2,))
    model.places = nn.Parameter(torch.zeros(16, 16))
    records = {
        r.name: r.panel
        for r in mi.measure(
            model, [HeadScores(), PromptAttention()], batch=torch.randint(0, 50, (2, 17))
        )
    }
    assert records["head_scores/induction"].convention["length"] == 8
    assert records["prompt/attention"].values.shape == (2, 16)


def test_prompt_shows_the_strongest_heads_and_the_answers() -> None:
    model, protocol = Oracle(10.0), RepeatedTokens(40, length=8, sequences=2)
    batch = protocol.tokens()
    records = {r.what: r.panel for r in mi.measure(model, PromptAttention(), batch=batch)}
    attention, answers = records["attention"], records["answers"]
    assert attention.coords["head"] == ["L0H0", "L1H0"]
    # The last position predicts nothing that is known; the one before it should look here:
    assert attention.values.shape == (2, 15)
    assert int(attention.values[1].argmax()) == 7
    assert attention.coords["key_position"] == [str(int(i)) for i in batch[0, :15]]
    assert answers.convention["target_id"] == int(batch[0, 15])
    assert answers.coords["token"][:2].count(str(int(batch[0, 15]))) == 1
    probabilities = model(batch)[0, 14].softmax(-1)
    assert torch.allclose(answers.values, probabilities.topk(3).values, atol=1e-6)


def test_prompt_keeps_as_many_heads_as_asked() -> None:
    model, batch = gpt2(), torch.randint(0, 61, (2, 12))
    records = mi.measure(model, [HeadScores(), PromptAttention(heads=3)], batch=batch)
    induction = next(r.panel for r in records if r.name == "head_scores/induction").values
    attention = next(r.panel for r in records if r.name == "prompt/attention")
    best = induction.flatten().topk(3).indices.sort().values.tolist()
    assert attention.coords["head"] == [f"L{i // 4}H{i % 4}" for i in best]
    assert torch.allclose(attention.values.sum(1), torch.ones(3))


def test_losses_of_a_model_that_sees_the_future_are_undefined() -> None:
    batch = torch.randint(0, 50, (2, 12))
    records = {r.what: r.panel for r in mi.measure(Mixed(), HeadScores(), batch=batch)}
    for name in ("copy_gain", "loss_first_copy", "icl_score"):
        assert math.isnan(records[name].item())
        assert records[name].convention["reason"] == (
            "attention sees the tokens that would be predicted"
        )
    assert records["induction"].values[1].isfinite().all()


def test_special_tokens_of_a_configuration_are_not_drawn() -> None:
    model = gpt2(bos_token_id=7, eos_token_id=9)
    records = {r.what: r.panel for r in mi.measure(model, HeadScores())}
    convention = records["induction"].convention
    assert convention["special"] == [7, 9]
    assert convention["length"] == 29


def test_nothing_keeps_the_model_alive() -> None:
    model = gpt2(attn_implementation="eager")
    gone = weakref.ref(model)
    mi.measure(model, [HeadScores(), PromptAttention()], batch=torch.randint(0, 61, (2, 12)))
    head_scores(model, RepeatedTokens(61, length=4).tokens())
    del model
    gc.collect()
    assert gone() is None


# Losses.


def test_in_context_learning_score_and_slope() -> None:
    index = torch.arange(1.0, 41.0)
    losses = (5.0 - 0.5 * index.log()).repeat(3, 1)
    score, indices = icl_score(losses)
    assert indices == (5, 40)
    assert float(score) == pytest.approx(-0.5 * math.log(8), abs=1e-6)
    assert float(icl_slope(losses)) == pytest.approx(-0.5, abs=1e-6)
    score, indices = icl_score(torch.arange(1.0, 701.0)[None])
    assert (float(score), indices) == (450.0, (50, 500))


def test_in_context_learning_score_counts_from_the_first_real_token() -> None:
    losses = torch.arange(1.0, 21.0).repeat(2, 1)
    known = torch.ones_like(losses, dtype=torch.bool)
    known[1, :4] = False
    known[0, 16:] = False
    score, (early, late) = icl_score(losses, known)
    assert (early, late) == (2, 16)
    assert float(score) == 14.0


def test_losses_of_the_copies() -> None:
    protocol = RepeatedTokens(50, length=4, repeats=3, bos=1)
    losses = torch.zeros(2, 13)
    losses[:, 1:4] = 3.0  # predictions of r_2, r_3, r_4
    losses[:, 4] = 100.0  # r_4 is followed by r_1: unknowable the first time
    losses[:, 5:8], losses[:, 9:12] = 1.0, 2.0
    assert [float(x) for x in copy_losses(losses, protocol)] == [3.0, 1.5]
