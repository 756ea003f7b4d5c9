"""Anatomies that are found: weights against those that are stored, whatever the architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi.anatomy import Anatomy
from lightning_mi.attention import tap
from lightning_mi.circuits import logit_attribution

SIZE, WIDTH, HEADS, HEAD = 53, 32, 4, 8
SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
ROWS = {"q": (HEADS, 0), "k": (HEADS, 1), "v": (HEADS, 2)}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model with gains and biases that count."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0.05 * torch.randn_like(p))
    return model


def ids() -> Tensor:
    return torch.randint(3, SIZE, (2, 9), generator=torch.Generator().manual_seed(1))


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """Split a stored ``[out, in]`` into ``[head, in, d_head]``."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(1, 2)


def separate(layer: str, q: str, k: str, v: str, o: str, kv: int = HEADS) -> Any:
    """Describe four projections of their own."""

    def stored(model: Any, index: int) -> dict[str, Tensor]:
        at = model.get_submodule(layer.format(index))
        part = {n: at.get_submodule(p) for n, p in (("Q", q), ("K", k), ("V", v), ("O", o))}
        count = {"Q": HEADS, "K": kv, "V": kv}
        found = {f"W_{n}": heads_of(part[n].weight, c) for n, c in count.items()}
        for n, c in count.items():
            found[f"b_{n}"] = bias_of(part[n], c)
        out = part["O"]
        found["W_O"] = out.weight.T.reshape(HEADS, HEAD, WIDTH)
        found["b_O"] = torch.zeros(WIDTH) if out.bias is None else out.bias
        return found

    return stored


def bias_of(part: Any, heads: int) -> Tensor:
    width = part.weight.shape[0] // heads
    return (torch.zeros(heads * width) if part.bias is None else part.bias).reshape(heads, -1)


def fused(layer: str, qkv: str, o: str, order: str, transposed: bool = False) -> Any:
    """Describe one projection for all three: by part (``qkv``) or by head (``head``)."""

    def stored(model: Any, index: int) -> dict[str, Tensor]:
        at = model.get_submodule(layer.format(index))
        own, out = at.get_submodule(qkv), at.get_submodule(o)
        weight = own.weight.T if transposed else own.weight
        bias = torch.zeros(len(weight)) if own.bias is None else own.bias
        parts = weight.reshape(3, HEADS, HEAD, WIDTH)
        biases = bias.reshape(3, HEADS, HEAD)
        if order == "head":
            parts = weight.reshape(HEADS, 3, HEAD, WIDTH).transpose(0, 1)
            biases = bias.reshape(HEADS, 3, HEAD).transpose(0, 1)
        found = {f"W_{n}": parts[i].transpose(1, 2) for i, n in enumerate("QKV")}
        found |= {f"b_{n}": biases[i] for i, n in enumerate("QKV")}
        out_weight = out.weight if transposed else out.weight.T
        found["W_O"] = out_weight.reshape(HEADS, HEAD, WIDTH)
        found["b_O"] = torch.zeros(WIDTH) if out.bias is None else out.bias
        return found

    return stored


LLAMA = separate("model.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj", 2)
BERT = separate(
    "encoder.layer.{}.attention", "self.query", "self.key", "self.value", "output.dense"
)


class Written(nn.Module):
    """In the manner of nanoGPT: one fused projection, softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(SIZE, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(WrittenBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, SIZE, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


class WrittenAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p.view(batch, length, HEADS, HEAD).transpose(1, 2) for p in self.qkv(x).split(WIDTH, 2)
        )
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5
        hidden = torch.ones(length, length).tril() == 0
        pattern = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        z = (pattern @ v).transpose(1, 2).contiguous().view(batch, length, WIDTH)
        return self.out(z)


class WrittenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), WrittenAttention()
        self.between = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Vision(nn.Module):
    """In the manner of timm: patches, a class token, fused qkv, SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(z.transpose(1, 2).reshape(batch, length, WIDTH))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = (
            nn.LayerNorm(WIDTH),
            VisionAttention(),
            nn.LayerNorm(WIDTH),
        )
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Torch(nn.Module):
    """Torch's own encoder."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(SIZE, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.unembed = nn.Linear(WIDTH, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.body(self.table(tokens)))


class TorchDecoder(nn.Module):
    """Torch's own decoder, which attends to a memory of the model's own."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.table, self.memory = nn.Embedding(SIZE, WIDTH), nn.Parameter(torch.randn(1, 5, WIDTH))
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.body = nn.TransformerDecoder(layer, 2)
        self.unembed = nn.Linear(WIDTH, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        memory = self.memory.expand(len(tokens), -1, -1)
        return self.unembed(self.body(self.table(tokens), memory, tgt_mask=mask))


def in_projection(model: Any, index: int) -> dict[str, Tensor]:
    at = model.body.layers[index].self_attn
    parts = at.in_proj_weight.reshape(3, HEADS, HEAD, WIDTH)
    found = {f"W_{n}": parts[i].transpose(1, 2) for i, n in enumerate("QKV")}
    found |= {f"b_{n}": at.in_proj_bias.reshape(3, HEADS, HEAD)[i] for i, n in enumerate("QKV")}
    found["W_O"] = at.out_proj.weight.T.reshape(HEADS, HEAD, WIDTH)
    return found | {"b_O": at.out_proj.bias}


def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def both() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids().flip(1)}


# name: model, example, stored weights, name of the attention modules, writers of a layer
TABLE: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any, str, str]] = {
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=SIZE, n_embd=WIDTH, n_layer=2, n_head=HEADS)
        ),
        ids,
        fused("transformer.h.{}.attn", "c_attn", "c_proj", "part", transposed=True),
        "transformer.h.{}.attn",
        "transformer.h.{}.mlp.c_proj",
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
        ids,
        fused("gpt_neox.layers.{}.attention", "query_key_value", "dense", "head"),
        "gpt_neox.layers.{}.attention",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "llama, eager": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attn_implementation="eager")),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=HEAD)),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**GROUPED, head_dim=HEAD, attn_implementation="eager")
        ),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "phi": (
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL)),
        ids,
        separate("model.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.fc2",
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=SIZE,
                hidden_size=WIDTH,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                word_embed_proj_dim=WIDTH,
            )
        ),
        ids,
        separate("model.decoder.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        "model.decoder.layers.{}.self_attn",
        "model.decoder.layers.{}.fc2",
    ),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**SMALL)),
        ids,
        BERT,
        "encoder.layer.{}.attention.self",
        "encoder.layer.{}.output.dense",
    ),
    "roberta": (
        lambda: hf.RobertaModel(hf.RobertaConfig(**SMALL)),
        ids,
        BERT,
        "encoder.layer.{}.attention.self",
        "encoder.layer.{}.output.dense",
    ),
    "vit": (
        lambda: hf.ViTModel(
            hf.ViTConfig(
                hidden_size=WIDTH,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                image_size=16,
                patch_size=4,
            )
        ),
        images,
        separate("layers.{}.attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        "layers.{}.attention",
        "layers.{}.mlp.fc2",
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=SIZE,
                d_model=WIDTH,
                d_kv=HEAD,
                d_ff=48,
                num_layers=1,
                num_heads=HEADS,
                decoder_start_token_id=0,
            )
        ),
        both,
        lambda model, index: separate(
            f"{('encoder', 'decoder')[index]}.block.0.layer.0.SelfAttention", "q", "k", "v", "o"
        )(model, index),
        "",
        "",
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=SIZE, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
        ),
        ids,
        fused("transformer.h.{}.self_attention", "query_key_value", "dense", "head"),
        "transformer.h.{}.self_attention",
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "deberta": (
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
        ids,
        separate(
            "encoder.layer.{}.attention",
            "self.query_proj",
            "self.key_proj",
            "self.value_proj",
            "output.dense",
        ),
        "encoder.layer.{}.attention.self",
        "encoder.layer.{}.output.dense",
    ),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**GROUPED, head_dim=HEAD, num_local_experts=2, num_experts_per_tok=1)
        ),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.experts",
    ),
    "yarn": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **GROUPED,
                max_position_embeddings=64,
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            )
        ),
        ids,
        LLAMA,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp.down_proj",
    ),
    "by hand": (
        Written,
        ids,
        fused("blocks.{}.attention", "qkv", "out", "part"),
        "blocks.{}.attention",
        "blocks.{}.mlp.2",
    ),
    "vision": (
        Vision,
        images,
        fused("blocks.{}.attn", "qkv", "proj", "part"),
        "blocks.{}.attn",
        "blocks.{}.mlp",
    ),
    "torch": (
        lambda: Torch(norm_first=False),
        ids,
        in_projection,
        "body.layers.{}.self_attn",
        "body.layers.{}.linear2",
    ),
    "torch, pre-norm": (
        lambda: Torch(norm_first=True),
        ids,
        in_projection,
        "body.layers.{}.self_attn",
        "body.layers.{}.linear2",
    ),
    "torch, decoder": (
        lambda: TorchDecoder(norm_first=False),
        ids,
        in_projection,
        "body.layers.{}.self_attn",
        "body.layers.{}.linear2",
    ),
    "torch, pre-norm decoder": (
        lambda: TorchDecoder(norm_first=True),
        ids,
        in_projection,
        "body.layers.{}.self_attn",
        "body.layers.{}.linear2",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_weights_are_those_that_are_stored(name: str) -> None:
    make, example, stored, module, writer = TABLE[name]
    model = seeded(make)
    anatomy = Anatomy.of(model, example())
    assert anatomy.n_layers == 2
    assert anatomy.n_heads == (HEADS, HEADS)
    for layer in range(2):
        for part, value in stored(model, layer).items():
            found = getattr(anatomy, part)[layer]
            assert found.shape == value.shape, part
            assert (found - value).abs().max() <= 1e-5, (part, layer)
        if module:
            assert anatomy.modules[layer] == module.format(layer)
            mlps = [w.module for w in anatomy.writers if w.kind == "mlp"]
            assert mlps[layer] == writer.format(layer)


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("t5", "qwen3")])
def test_weights_and_scale_reproduce_the_logits_of_attention(name: str) -> None:
    model, batch = seeded(TABLE[name][0]), TABLE[name][1]()
    anatomy = Anatomy.of(model, batch)
    with torch.no_grad(), tap(model) as seen:
        model(batch)
    for layer, site in enumerate(s for s in seen.sites if not s.cross):
        reader = next(r for r in anatomy.readers if r.kind == "attention" and r.layer == layer)
        x = entering(model, batch, reader.module)
        x = x if reader.norm is None else reader.norm(x)
        kv = anatomy.kv_head(layer)
        q = torch.einsum("bd,hde->bhe", x[:, 0], anatomy.W_Q[layer]) + anatomy.b_Q[layer]
        k = torch.einsum("bd,hde->bhe", x[:, 0], anatomy.W_K[layer]) + anatomy.b_K[layer]
        found = (q * k[:, kv]).sum(-1) * anatomy.scale[layer]
        expected = (site.q[:, :, 0] * site.k[:, kv, 0]).sum(-1) * site.scale
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def entering(model: nn.Module, batch: Any, name: str) -> Tensor:
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(batch)
    handle.remove()
    return kept[0]


def test_self_attention_of_t5_is_served_by_name() -> None:
    anatomy = Anatomy.of(seeded(TABLE["t5"][0]), both())
    name = "{}.block.0.layer.0.SelfAttention"
    assert anatomy.modules == (name.format("encoder"), name.format("decoder"))
    refused = [n.reason for n in anatomy.notes if n.kind == "refused"]
    assert len(refused) == 1
    assert refused[0].startswith("decoder.block.0.layer.1.EncDecAttention")


def test_notes_say_what_is_approximate() -> None:
    said = {
        name: " ".join(map(str, Anatomy.of(seeded(TABLE[name][0]), TABLE[name][1]()).notes))
        for name in ("gpt2", "qwen3", "gemma2", "t5", "bert")
    }
    assert said["gpt2"] == ""
    assert "queries and keys are normalised" in said["qwen3"]
    assert "a norm follows before the stream" in said["gemma2"]
    assert "soft-capped, c·tanh(·/c) with c = 50" in said["gemma2"]
    assert "EncDecAttention attends to another sequence" in said["t5"]
    assert "W_U: unknown" in said["bert"]


def test_graph_of_parallel_sandwich_and_post_norm_blocks() -> None:
    phi = Anatomy.of(seeded(TABLE["phi"][0]), ids())
    gpt2 = Anatomy.of(seeded(TABLE["gpt2"][0]), ids())
    assert (phi.parallel, gpt2.parallel) == ((True, True), (False, False))
    gemma = Anatomy.of(seeded(TABLE["gemma2"][0]), ids())
    assert [w.norm is not None for w in gemma.writers] == [False, True, True, True, True]
    assert gemma.logit_softcap == pytest.approx(30.0)
    assert gemma.softcap == pytest.approx((50.0, 50.0))
    bert = Anatomy.of(seeded(TABLE["bert"][0]), ids())
    assert [len(w.through) for w in bert.writers] == [5, 5, 5, 4, 3, 2, 1]
    assert gpt2.W_pos is not None
    assert [w.label for w in gpt2.writers] == ["embed", "pos", "attn0", "MLP0", "attn1", "MLP1"]


class Bare(nn.Module):
    """A block whose norms are functions, or whose projections are plain parameters."""

    def __init__(self, called: bool, raw: bool) -> None:
        super().__init__()
        self.called, self.raw = called, raw
        self.table, self.norm = nn.Embedding(SIZE, WIDTH), nn.LayerNorm(WIDTH)
        self.end, self.unembed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SIZE)
        self.W_O = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        h = self.norm(x)
        if self.called:
            h = F.layer_norm(x, (WIDTH,), self.norm.weight, self.norm.bias)
        q, k, v = (
            p.view(*p.shape[:2], HEADS, HEAD).transpose(1, 2) for p in self.qkv(h).chunk(3, -1)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + (z @ self.W_O if self.raw else self.out(z))
        return self.unembed(self.end(x))


def test_what_cannot_be_asked_is_unknown_and_said() -> None:
    called = Anatomy.of(seeded(lambda: Bare(called=True, raw=False)), ids())
    assert called.W_Q[0].isnan().all()
    assert "layer_norm is called as a function there" in " ".join(map(str, called.notes))
    model = seeded(lambda: Bare(called=False, raw=False))
    assert torch.allclose(called.W_O[0], Anatomy.of(model, ids()).W_O[0], atol=1e-6)
    raw = Anatomy.of(seeded(lambda: Bare(called=False, raw=True)), ids())
    assert raw.W_Q[0].isfinite().all()
    assert raw.W_O[0].isnan().all()
    assert "no module returns what the heads write" in " ".join(map(str, raw.notes))


def test_granite_multipliers_are_factors() -> None:
    config = hf.GraniteConfig(
        **GROUPED, residual_multiplier=0.7, embedding_multiplier=3.0, logits_scaling=2.0
    )
    model: Any = seeded(lambda: hf.GraniteForCausalLM(config))
    anatomy = Anatomy.of(model, ids())
    assert [w.factor for w in anatomy.writers] == pytest.approx([3.0, 0.7, 0.7, 0.7, 0.7])
    assert anatomy.W_U is not None
    assert anatomy.W_E is not None
    assert torch.allclose(anatomy.W_U, model.lm_head.weight.T / 2)
    assert torch.allclose(anatomy.W_E, model.model.embed_tokens.weight * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    model = seeded(TABLE["llama"][0])
    narrow = copy.deepcopy(model).to(dtype)
    anatomy = Anatomy.of(narrow, ids())
    expected = LLAMA(copy.deepcopy(narrow).float(), 0)["W_Q"]
    assert anatomy.W_Q[0].dtype in (torch.float32, torch.float64)
    assert (anatomy.W_Q[0] - expected).abs().max() <= 1e-5
    assert all(p.dtype == dtype for p in narrow.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = seeded(TABLE["gpt2"][0]).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    Anatomy.of(model, ids())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


def test_compiled_and_wrapped_models() -> None:
    model = seeded(Written)
    expected = Anatomy.of(model, ids())
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(Anatomy.of(compiled, ids()).W_Q[0], expected.W_Q[0])  # type: ignore[arg-type]

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    found = Anatomy.of(Wrapping(), ids(), task=mi.NextToken(module="net"))
    assert found.modules == ("net.blocks.0.attention", "net.blocks.1.attention")
    assert torch.equal(found.W_O[1], expected.W_O[1])


def test_token_ids_are_made_where_no_example_is_given() -> None:
    model = seeded(TABLE["gpt2"][0])
    assert torch.equal(Anatomy.of(model).W_V[1], Anatomy.of(model, ids()).W_V[1])
    with pytest.raises(mi.ArgumentError, match="example: expected a batch"):
        Anatomy.of(seeded(Vision))


def test_models_without_attention_are_refused_by_name() -> None:
    mamba = hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=SIZE, hidden_size=WIDTH, num_hidden_layers=1)
    )
    with pytest.raises(mi.NoAttentionError, match="MambaForCausalLM"):
        Anatomy.of(mamba, ids())
    mixer = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
    with pytest.raises(mi.NoAttentionError, match="Sequential"):
        Anatomy.of(mixer, images())


def test_padding_and_packing_of_the_example_change_no_weight() -> None:
    model = seeded(TABLE["llama"][0])
    expected = Anatomy.of(model, ids())
    real = torch.ones_like(ids())
    real[0, :4] = 0
    blocks = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(5, 5).tril()).bool()
    starts = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)
    long = torch.ones(14, 14).tril().bool()
    for batch in (
        {"attention_mask": real},
        # Padding that is called position 1, where rotary embedding is not the identity.
        {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).masked_fill(real == 0, 1)},
        {"attention_mask": blocks.expand(2, 1, 9, 9), "position_ids": starts},
        {"input_ids": ids().repeat(1, 2)[:, :14], "attention_mask": long.expand(2, 1, 14, 14)},
        {"position_ids": torch.arange(5, 14).expand(2, -1)},
        {"use_cache": True},
    ):
        found = Anatomy.of(model, {"input_ids": ids(), **batch})
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            for layer in range(2):
                apart = getattr(found, name)[layer] - getattr(expected, name)[layer]
                assert apart.abs().max() <= 1e-6, (name, list(batch))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: Anatomy.of("gpt2", ids()), "model: expected a torch module"),  # type: ignore[arg-type]
        (lambda m: Anatomy.of(m, torch.rand(2, 4)), "example: expected a batch that GPT2LMHead"),
        (lambda m: Anatomy.of(m, ids() + 1000), "example: expected a batch that GPT2LMHead"),
        (lambda m: Anatomy.of(m, ids()[:0]), "example: expected a batch with at least one"),
        (lambda m: Anatomy.of(m).kv_head(7), "layer: expected 0 to 1, got 7"),
        (lambda m: Anatomy.of(m).grouped(0, "Q"), "which: expected 'K' or 'V'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_used_is_named(wrong: Any, message: str) -> None:
    model = seeded(TABLE["gpt2"][0]).train()
    with pytest.raises(mi.ArgumentError, match=message):
        wrong(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_sequence_alone_is_a_batch() -> None:
    model = seeded(TABLE["gpt2"][0])
    assert torch.equal(Anatomy.of(model, ids()[0]).W_Q[1], Anatomy.of(model, ids()).W_Q[1])


class Beginnings(Written):
    """Positions that no module looks up, and logits that no module makes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.own = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.register_buffer("waves", torch.randn(16, WIDTH))
        self.shift = nn.Parameter(torch.randn(SIZE))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.table(tokens)
        x = x + (self.own[:, :length] if self.kind == "parameter" else self.waves[:length])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.kind == "parameter":
            return x @ self.table.weight.T + self.shift
        return 7 * torch.tanh((torch.einsum("btd,vd->btv", x, self.table.weight) + self.shift) / 7)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_positions_and_logits_without_modules(kind: str) -> None:
    model: Any = seeded(lambda: Beginnings(kind))
    anatomy = Anatomy.of(model, ids())
    assert anatomy.notes == ()
    assert anatomy.W_E is not None
    assert torch.equal(anatomy.W_E, model.table.weight)
    assert anatomy.W_pos is not None
    assert torch.equal(anatomy.W_pos, model.own[0] if kind == "parameter" else model.waves)
    assert anatomy.W_U is not None
    assert torch.allclose(anatomy.W_U, model.table.weight.T, atol=1e-6)
    assert anatomy.b_U is not None
    assert torch.allclose(anatomy.b_U, model.shift, atol=1e-6)
    with torch.no_grad():
        found = logit_attribution(model, ids(), 5, wrong=7, anatomy=anatomy)
        x = entering(model, ids(), "norm")
    assert found.gap <= 1e-5
    assert {"embed", "pos"} <= set(found.labels)
    assert any("pos: what no module returns" in reason for reason in found.approximate)
    positions = model.own[0] if kind == "parameter" else model.waves
    centred = positions[: x.shape[1]] - positions[: x.shape[1]].mean(-1, keepdim=True)
    scale = (x.var(-1, unbiased=False) + model.norm.eps).sqrt()
    apart = model.table.weight[5] - model.table.weight[7]
    expected = (centred * model.norm.weight) @ apart / scale
    part = found.values[..., found.labels.index("pos")]
    assert torch.allclose(part, expected, atol=1e-4)


def test_an_embedding_that_is_no_table_is_noted() -> None:
    class Normed(Written):
        def forward(self, tokens: Tensor) -> Tensor:
            x = F.layer_norm(self.table(tokens), (WIDTH,))
            for block in self.blocks:
                x = block(x)
            return self.unembed(self.norm(x))

    anatomy = Anatomy.of(seeded(Normed), ids())
    assert anatomy.W_E is None
    assert [n.part for n in anatomy.notes] == ["W_E"]
    assert anatomy.approximate(circuit="heads") == []
