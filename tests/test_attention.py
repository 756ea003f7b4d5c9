"""The attention tap, on every architecture we could name and every way of writing attention."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_mi import ArgumentError, ModelError, NoAttentionError, TapError, untouched
from lightning_mi.attention import tap

V = 61
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 5}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": V}
OLD |= {"bos_token_id": 0, "eos_token_id": 0}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
RELATIVE |= {"max_relative_positions": 16}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
SINKS = {
    **WINDOW,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}

# model class, configuration class, settings, module of the first site, key-value heads
CASES: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD, "transformer.h.0.attn", 4),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "model.layers.0.self_attn", 2),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**GROUPED, "sliding_window": 5},
        "model.layers.0.self_attn",
        2,
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**WINDOW, "attn_logit_softcapping": 3.0},
        "model.layers.0.self_attn",
        2,
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", WINDOW, "model.layers.0.self_attn", 2),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**GROUPED, "head_dim": 8},
        "model.layers.0.self_attn",
        2,
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED, "model.layers.0.self_attn", 2),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, "model.layers.0.self_attn", 2),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL, "model.layers.0.self_attn", 4),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, "gpt_neox.layers.0.attention", 4),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers.0.self_attn",
        4,
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", SMALL, "transformer.h.0.self_attention", 1),
    "falcon alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        {**SMALL, "alibi": True, "multi_query": False},
        "transformer.h.0.self_attention",
        4,
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**OLD, "rotary_dim": 4},
        "transformer.h.0.attn",
        4,
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": V, "max_seq_len": 64},
        "transformer.blocks.0.attn",
        4,
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": V,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "transformer.h.0.attn.attention",
        4,
    ),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", OLD, "transformer.h.0.attn", 1),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**SMALL, **LATENT},
        "model.layers.0.self_attn",
        4,
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": V},
        "transformer.h.0.self_attention",
        4,
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", SINKS, "model.layers.0.self_attn", 2),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "transformer.layer.0.rel_attn",
        4,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL, "bert.encoder.layer.0.attention.self", 4),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": V},
        "distilbert.transformer.layer.0.attention",
        4,
    ),
    "deberta": (
        "DebertaForMaskedLM",
        "DebertaConfig",
        {**SMALL, **RELATIVE},
        "deberta.encoder.layer.0.attention.self",
        4,
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**SMALL, **RELATIVE, "position_buckets": 8},
        "deberta.encoder.layer.0.attention.self",
        4,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": V,
            "decoder_start_token_id": 0,
        },
        "encoder.block.0.layer.0.SelfAttention",
        4,
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ,
        "model.encoder.layers.0.self_attn",
        4,
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {**SMALL, "image_size": 16, "patch_size": 4},
        "layers.0.attention",
        4,
    ),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [4, 4],
            "window_size": 4,
        },
        "encoder.layers.0.blocks.0.attention",
        4,
    ),
}
EAGER_ONLY = {"gemma2", "mpt", "gpt-neo", "bloom", "gpt-oss", "xlnet", "deberta", "deberta-v2"}
BOTH = [(n, i) for n in CASES for i in ("sdpa", "eager") if i == "eager" or n not in EAGER_ONLY]


def random_weights(model: nn.Module, size: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, size)
    return model


def build(name: str, implementation: str = "sdpa", **changes: Any) -> nn.Module:
    library = importlib.import_module("transformers")
    model, config, settings, *_ = CASES[name]
    made = getattr(library, config)(**{**settings, **changes})
    torch.manual_seed(0)
    network = getattr(library, model)._from_config(made, attn_implementation=implementation)
    return random_weights(network.eval())


def inputs(name: str, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name in ("vit", "swin"):
        side = CASES[name][2]["image_size"]
        return {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    ids = torch.randint(3, V, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    own = {"input_ids": ids, "attention_mask": mask}
    return {**own, "decoder_input_ids": ids[:, :9]} if name in ("t5", "bart") else own


def result(output: Any) -> Tensor:
    found = output.get("logits")
    return output["last_hidden_state"] if found is None else found


@pytest.mark.parametrize(("name", "implementation"), BOTH)
def test_architectures(name: str, implementation: str) -> None:
    model, batch = build(name, implementation), inputs(name)
    module, groups = CASES[name][3:]
    with torch.no_grad():
        plain = result(model(**batch))
        with tap(model, check="all") as seen:
            tapped = result(model(**batch))
        with tap(model, normalizers=True, keep=False):
            fast = result(model(**batch))
    assert torch.equal(plain, tapped)
    assert torch.equal(plain, fast)
    assert len(seen.sites) == (6 if name in ("t5", "bart") else 2)
    names = [m for m, _ in model.named_modules()]
    for site in seen.sites:
        assert site.module in names
        assert site.z.shape[1] == 4
        assert site.k.shape[1] == site.v.shape[1] == groups
        pattern = site.pattern()
        assert pattern.shape == (*site.z.shape[:3], site.k.shape[2])
        wide = site.v.repeat_interleave(4 // groups, 1)
        assert torch.allclose(pattern @ wide, site.z, atol=1e-4 * float(wide.abs().max()))
        rows, somewhere = pattern.sum(-1), pattern.amax(-1) > 0
        if name != "gpt-oss":  # which keeps a sink of its own
            assert torch.allclose(rows, somewhere.to(rows.dtype), atol=1e-5)
            assert bool(somewhere[0].all())
        reachable = site.reachable()
        assert reachable is None or not bool((pattern > 1e-30)[~reachable.expand_as(pattern)].any())
    assert seen.sites[0].module == module


# Falcon's two implementations do not agree with each other where it has ALiBi.
@pytest.mark.parametrize("name", sorted(CASES.keys() - EAGER_ONLY - {"falcon alibi"}))
def test_both_implementations_agree(name: str) -> None:
    batch = inputs(name)
    found = []
    for implementation in ("sdpa", "eager"):
        model = build(name, implementation)
        with torch.no_grad(), tap(model) as seen:
            model(**batch)
        found.append(seen.sites)
    for a, b in zip(*found, strict=True):
        # Rows of padding differ, as kernels treat rows without any key differently.
        real = torch.ones_like(a.pattern()[1, :, 3:])
        assert torch.allclose(a.pattern()[0], b.pattern()[0], atol=2e-5)
        if name not in ("vit", "swin"):
            assert torch.allclose(
                a.pattern()[1, :, 3:] * real, b.pattern()[1, :, 3:] * real, atol=2e-5
            )
        assert torch.allclose(a.q[0], b.q[0], atol=2e-4)
        assert torch.allclose(a.k[0], b.k[0], atol=2e-4)
        assert a.scale == pytest.approx(b.scale)
        assert a.cross == b.cross


def test_what_is_known_of_a_site() -> None:
    sites = {}
    for name in ("gemma2", "opt", "t5"):
        model = build(name, "eager")
        with torch.no_grad(), tap(model) as seen:
            model(**inputs(name))
        sites[name] = seen.sites
    gemma = sites["gemma2"][0]
    assert gemma.softcap == 3.0
    assert gemma.scale == pytest.approx(256**-0.5)
    window = gemma.reachable()
    assert window is not None
    assert window[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5]
    assert sites["opt"][0].scale == sites["t5"][0].scale == 1.0
    assert [s.cross for s in sites["t5"]] == [False, False, False, True, False, True]


def test_cross_attention_of_equal_length_is_recognised() -> None:
    model, batch = build("bart"), inputs("bart")
    batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad(), tap(model) as seen:
        model(**batch)
    assert [s.cross for s in seen.sites] == [False, False, False, True, False, True]
    decoder = nn.TransformerDecoderLayer(8, 2, 8, batch_first=True).eval()
    with tap(decoder) as seen:
        decoder(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    assert [(s.module, s.cross) for s in seen.sites] == [
        ("self_attn", False),
        ("multihead_attn", True),
    ]


def test_long_rotary_positions_with_scaling() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    ids = torch.randint(3, V, (1, 512))
    patterns = []
    for implementation in ("sdpa", "eager"):
        model = build(
            "llama",
            implementation,
            num_hidden_layers=1,
            max_position_embeddings=512,
            rope_parameters=scaling,
        )
        with torch.no_grad(), tap(model) as seen:
            model(ids)
        patterns.append(seen.sites[0].pattern())
    assert torch.allclose(*patterns, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_grouped_queries_keep_their_own_keys(groups: int, implementation: str) -> None:
    changes = {"hidden_size": 28, "num_attention_heads": 14, "num_key_value_heads": groups}
    model, batch = build("llama", implementation, **changes), inputs("llama")
    with torch.no_grad(), tap(model, check="all") as seen:
        model(**batch)
    site = seen.sites[0]
    assert site.q.shape[1] == 14
    assert site.k.shape[1] == groups
    head = 13
    scores = site.q[0, head] @ site.k[0, head * groups // 14].T * site.scale
    scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
    assert torch.allclose(site.pattern()[0, head], scores.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(kind: torch.dtype, implementation: str) -> None:
    model, batch = build("llama", implementation).to(kind), inputs("llama")
    with torch.no_grad(), tap(model) as seen:
        tapped = result(model(**batch))
    with torch.no_grad():
        plain = result(model(**batch))
    # Some kernels leave rows without any key undefined.
    assert torch.allclose(tapped, plain, rtol=0, atol=0, equal_nan=True)
    pattern = seen.sites[0].pattern()
    assert pattern.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert pattern[0].isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_stays_as_it_is(implementation: str) -> None:
    model, batch = build("gpt2", implementation), inputs("gpt2")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = result(model(**batch))
        with tap(model, normalizers=True) as seen:
            tapped = result(model(**batch))
    assert torch.equal(plain, tapped)
    assert seen.sites[0].pattern().dtype == torch.float32


# Attention written by hand.


class Hand(nn.Module):
    """A block whose heads are computed in a given way."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (y.view(shape).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v, self.drop).reshape(x.shape))


def future(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def nano(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(future(q.shape[2])[None, None], float("-inf"))
    return (drop(F.softmax(att, dim=-1)) @ v).transpose(1, 2)


def in_place(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    att = torch.matmul(q, k.mT)
    att /= math.sqrt(k.size(-1))
    att += torch.full(att.shape[-2:], -1e9).triu(1)
    return torch.matmul(nn.Softmax(dim=-1)(att), v).transpose(1, 2)


def einsum(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    att = torch.einsum("bqhd, bkhd -> bhqk", q, k) / math.sqrt(q.shape[-1])
    att = torch.where(future(q.shape[1]), torch.tensor(-1e4), att)
    return torch.einsum("bhqk,bkhd->bqhd", att.softmax(-1), v)


def three_dimensional(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    batch, heads, T, d = q.shape
    q, k, v = (x.reshape(batch * heads, T, d) for x in (q, k, v))
    mask = torch.zeros(T, T).masked_fill(future(T), float("-inf"))
    att = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=d**-0.5)
    z = torch.bmm(torch.softmax(att, -1), v)
    return z.view(batch, heads, T, d).transpose(1, 2)


def grouped_five(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    q = q.unflatten(1, (2, 2))
    k, v = k[:, :2, None], v[:, :2, None]
    att = (q @ k.mT) * q.shape[-1] ** -0.5 + torch.full((q.shape[3],) * 2, -1e30).triu(1)
    return (att.softmax(-1) @ v).flatten(1, 2).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("attend", [nano, in_place, einsum, three_dimensional, grouped_five, fused])
def test_hand_written_attention(attend: Callable[..., Tensor]) -> None:
    model, x = Hand(attend).eval(), torch.randn(3, 7, 16)
    plain = model(x)
    with tap(model, check="all") as seen:
        assert torch.equal(model(x), plain)
    (site,) = seen.sites
    q, k, v = (y.view(3, 7, 4, 4).transpose(1, 2) for y in model.qkv(x).chunk(3, -1))
    if attend is grouped_five:
        k, v = (y[:, [0, 0, 1, 1]] for y in (k, v))
        assert site.k.shape == (3, 2, 7, 4)
    scores = (q @ k.mT / 2.0).masked_fill(future(7), -math.inf).softmax(-1)
    assert torch.allclose(site.pattern(), scores, atol=1e-6)
    assert torch.allclose(site.z, scores @ v, atol=1e-6)
    assert torch.allclose(site.q, q, atol=1e-6)
    assert site.scale == pytest.approx(0.5)
    reachable = site.reachable()
    assert reachable is not None
    assert torch.equal(reachable.expand(3, 4, 7, 7), ~future(7).expand(3, 4, 7, 7))


@pytest.mark.parametrize("attend", [nano, in_place, einsum, three_dimensional, grouped_five, fused])
def test_replacing_a_head(attend: Callable[..., Tensor]) -> None:
    model, x = Hand(attend).eval(), torch.randn(3, 7, 16)
    with tap(model) as seen:
        model(x)
    z = seen.sites[0].z.detach().clone()
    z[:, 2] = 0.0
    expected = model.out(z.transpose(1, 2).reshape(3, 7, 16))
    with tap(model, edit=lambda i, own: torch.cat([own[:, :2], own[:, 2:3] * 0, own[:, 3:]], 1)):
        assert torch.allclose(model(x), expected, atol=1e-6)
    # Gradients with respect to every head's output, and through it.
    with tap(model) as seen:
        loss = model(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, [seen.sites[0].z])
    own = seen.sites[0].z.detach().requires_grad_()
    by_hand = model.out(own.transpose(1, 2).reshape(3, 7, 16)).square().sum()
    assert torch.allclose(gradient, torch.autograd.grad(by_hand, own)[0], atol=1e-5)


class OneHead(nn.Module):
    """Attention without a head axis."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv = fused, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / math.sqrt(8)).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False])
def test_attention_without_a_head_axis_is_one_head(fused: bool) -> None:
    model, x = OneHead(fused), torch.randn(3, 5, 8)
    with tap(model, check="all") as seen:
        output = model(x)
    assert torch.equal(output, model(x))
    assert seen.sites[0].pattern().shape == (3, 1, 5, 5)
    with tap(model, edit=lambda i, z: z * 2):
        assert torch.allclose(model(x), 2 * output)


# nn.MultiheadAttention.


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both"])
def test_multi_head_module(need_weights: bool, batch_first: bool, masked: str) -> None:
    model = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    x = torch.randn(2, 6, 12)
    options: dict[str, Any] = {"need_weights": need_weights}
    if masked in ("padding", "both"):
        options["key_padding_mask"] = torch.zeros(2, 6, dtype=torch.bool)
        options["key_padding_mask"][0, 4:] = True
    if masked in ("causal", "both"):
        options["attn_mask"] = future(6)
    x = x if batch_first else x.transpose(0, 1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            plain, weights = model(x, x, x, **options, average_attn_weights=False)
            with tap(model, check="all") as seen:
                output, own = model(x, x, x, **options, average_attn_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(plain, output)
    (site,) = seen.sites
    assert not site.cross
    assert site.module == ""
    assert site.z.shape == (2, 3, 6, 4)
    assert (own is None) == (not need_weights)
    if need_weights:
        assert torch.equal(own, weights)
        assert torch.allclose(site.pattern(), weights, atol=1e-6)


def test_encoder_keeps_its_global_switch() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, pads = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
    pads[1, 4:] = True
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), tap(model, check="all") as seen:
        assert not torch.backends.mha.get_fastpath_enabled()
        model(x, src_key_padding_mask=pads)
    assert torch.backends.mha.get_fastpath_enabled()
    assert [s.module for s in seen.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert bool((seen.sites[0].pattern()[1, :, :, 4:] == 0).all())


# Taps in taps, errors, and the user's own hooks.


def test_inner_tap_sees_what_the_outer_one_made() -> None:
    model, x = nn.Sequential(Hand(nano), Hand(fused)).eval(), torch.randn(2, 5, 16)

    def zero(index: int, z: Tensor) -> Tensor:
        return torch.zeros_like(z) if index == 0 else z

    with tap(model, edit=zero) as outer:
        expected = model(x)
        with tap(model[1]) as part, tap(model, edit=lambda i, z: z + 1, check="all") as inner:
            changed = model(x)
        again = model(x)
    assert torch.equal(again, expected)
    assert not torch.allclose(changed, expected)
    assert bool((inner.sites[0].z == 1).all())
    assert [s.module for s in part.sites] == [""]
    assert [s.module for s in outer.sites] == ["0", "1"]
    with tap(model, edit=lambda i, z: torch.ones_like(z) if i == 0 else z + 1):
        assert torch.allclose(model(x), changed, atol=1e-6)


def test_indices_begin_anew_with_every_pass_also_in_pieces() -> None:
    model, x = nn.Sequential(Hand(nano), Hand(fused)).eval(), torch.randn(2, 5, 16)
    indices: list[int] = []
    with tap(model, visit=lambda i, site: indices.append(i)) as seen:
        model(x)
        model(x)
        model[1](model[0](x))
    assert indices == [0, 1] * 3
    assert len(seen.sites) == 2


@pytest.mark.parametrize("hand", [nano, fused])
def test_forward_pass_can_be_ended_early(hand: Callable[..., Tensor]) -> None:
    model, x = nn.Sequential(Hand(hand), Hand(hand), Hand(hand)).eval(), torch.randn(2, 5, 16)
    ran = []
    model[2].register_forward_pre_hook(lambda m, a: ran.append(1))
    with tap(model, stop_after=1) as seen:
        model(x)
        ran.append(2)  # never reached
    assert ran == []
    assert len(seen.sites) == 2
    # An outer tap's stop passes through the inner one.
    with tap(model, stop_after=0) as outer, tap(model) as inner:
        model(x)
    assert outer.total == 1
    assert len(inner.sites) <= 1
    assert model(x).shape == x.shape


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_of_the_user_stay_and_ours_go() -> None:
    model, x = nn.Sequential(Hand(nano), Hand(fused)).eval(), torch.randn(2, 5, 16)
    calls = []
    model[0].register_forward_hook(lambda m, a, o: calls.append(1))
    before = hooks(model)
    with tap(model):
        model(x)
    assert hooks(model) == before

    def fail(index: int, z: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), tap(model, edit=fail):
        model(x)
    assert hooks(model) == before
    model(x)
    assert len(calls) == 2  # the pass that failed never got there
    with tap(model) as seen:
        model(x)
    assert len(seen.sites) == 2


def test_bad_edit_is_refused() -> None:
    model, x = Hand(nano).eval(), torch.randn(2, 5, 16)
    for edit, got in ((lambda i, z: z[:, :1], r"\(2, 1, 5, 4\)"), (lambda i, z: None, "NoneType")):
        with pytest.raises(ArgumentError, match="edit: expected .*got " + got), tap(model, edit):
            model(x)


def test_model_without_attention_is_an_error_and_not_an_empty_result() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(NoAttentionError, match=r"Sequential.*flex_attention"), tap(model):
        model(torch.randn(1, 4))


def test_model_that_was_not_run_is_an_error() -> None:
    model = Hand(nano)
    with pytest.raises(TapError, match="Hand to be run"), tap(model):
        pass
    with pytest.raises(KeyError), tap(model):  # an error of the block itself comes first
        raise KeyError


class Lying(TorchFunctionMode):
    """A kernel that does something else than it says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        return z + 0.05 if func is F.scaled_dot_product_attention else z


def test_pattern_that_does_not_reproduce_the_output_is_an_error() -> None:
    model, x = nn.Sequential(Hand(nano), Hand(fused)).eval(), torch.randn(2, 5, 16)
    with Lying(), pytest.raises(TapError, match=r"'1'.*0\.05.*position 2 of head"), tap(model):
        model(x)
    with Lying(), tap(model, check="none") as seen:
        model(x)
    assert len(seen.sites) == 2


@pytest.mark.parametrize("how", ["fused", "eager", "module"])
def test_dropout_is_refused(how: str) -> None:
    x = torch.randn(2, 5, 16)
    if how == "fused":
        always = Hand(
            lambda q, k, v, drop: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        ).eval()
        call = lambda: always(x)  # noqa: E731
        model: nn.Module = always
    elif how == "eager":
        model = Hand(nano).train()
        call = lambda: model(x)  # noqa: E731
    else:
        model = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True).train()
        call = lambda: model(x, x, x)  # noqa: E731
    with pytest.raises(ModelError, match=r"no dropout.*p=0\.[123]"), tap(model):
        call()


def test_odd_layouts_are_refused_by_name() -> None:
    five = Hand(lambda q, k, v, d: F.scaled_dot_product_attention(q[None], k[None], v[None])[0])
    with pytest.raises(ModelError, match="Heads cannot be told apart"), tap(five.eval()):
        five(torch.randn(2, 5, 16))


@pytest.mark.parametrize(("reentrant", "backward"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("attend", [nano, fused])
def test_checkpointing_is_captured_once(
    attend: Callable[..., Tensor], reentrant: bool, backward: bool
) -> None:
    class Saving(nn.Module):
        def __init__(self, save: bool) -> None:
            super().__init__()
            self.a, self.b, self.save = Hand(attend), Hand(attend), save

        def forward(self, x: Tensor) -> Tensor:
            for block in (self.a, self.b):
                x = checkpoint(block, x, use_reentrant=reentrant) if self.save else block(x)
            return x

    def double(index: int, z: Tensor) -> Tensor:
        return z * 2 if index == 1 else z

    x, found = torch.randn(2, 5, 16), []
    for save in (True, False):
        torch.manual_seed(0)
        model = Saving(save).eval()
        with tap(model, edit=double) as seen:
            loss = model(x.clone().requires_grad_()).square().sum()
            if backward:
                loss.backward()
                gradients = [p.grad for p in model.parameters()]
            else:
                gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        assert [s.module for s in seen.sites] == ["a", "b"]
        assert seen.total == 2
        found.append(torch.cat([g.flatten() for g in gradients]))
    # Recomputed layers get the same edit, so gradients are those of the edited model.
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("how", ["wrapper", "in place", "part"])
def test_compiled_models_are_seen(how: str) -> None:
    model, x = nn.Sequential(Hand(nano), Hand(fused)).eval(), torch.randn(2, 5, 16)
    expected = model(x)
    compiled: Any = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    with torch.no_grad():
        compiled(x)
    with tap(compiled) as seen:
        assert torch.allclose(compiled(x), expected)
    assert [s.module for s in seen.sites] == ["0", "1"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_with_respect_to_every_head(implementation: str) -> None:
    model, batch = build("llama", implementation), inputs("llama")
    with tap(model) as seen:
        loss = model(**batch).logits[:, -1].logsumexp(-1).sum()
    gradients = torch.autograd.grad(loss, [s.z for s in seen.sites])
    for layer, gradient in enumerate(gradients):
        step = torch.zeros_like(gradient)
        step[0, 3, 11] = torch.randn(8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            values = []
            for sign in (1e-2, -1e-2):
                with tap(model, edit=lambda i, z, s=sign: z + s * step if i == layer else z):  # noqa: B023
                    values.append(model(**batch).logits[:, -1].logsumexp(-1).sum())
        expected = float(values[0] - values[1]) / 2e-2
        assert float((gradient * step).sum()) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_inside_untouched_and_without_gradients() -> None:
    model, batch = build("gpt2").train(), inputs("gpt2")
    with torch.inference_mode(), untouched(model) as quiet, tap(quiet) as seen:
        quiet(**{k: v.clone() for k, v in batch.items()})
    assert len(seen.sites) == 2
    with torch.inference_mode(), tap(build("gpt2")) as seen:
        build("gpt2")  # another model inside the block is not ours
        with pytest.raises(NoAttentionError), tap(nn.Linear(2, 2)) as other:
            other.model(torch.randn(1, 2))
        seen.model(**batch)
    assert len(seen.sites) == 2


def test_memory_of_eager_scores_is_let_go() -> None:
    import gc
    import weakref

    kept = []

    def attend(q: Tensor, k: Tensor, v: Tensor, drop: nn.Module) -> Tensor:
        raw = q @ k.mT
        att = raw.softmax(-1)
        kept.extend([weakref.ref(raw), weakref.ref(att)])
        return (att @ v).transpose(1, 2)

    model = nn.Sequential(Hand(attend), Hand(attend)).eval()
    alive = []

    def visit(index: int, site: Any) -> None:
        alive.append(sum(r() is not None for r in kept))

    with torch.no_grad(), tap(model, visit=visit, keep=False):
        model(torch.randn(2, 5, 16))
        gc.collect()
        assert all(r() is None for r in kept)
    assert alive == [2, 2]  # each layer sees its own scores and pattern alive, no older ones
