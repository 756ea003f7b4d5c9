"""Residual graphs of known architectures as their authors wrote them, stated by module names.

What a model's own code says, beside what `Anatomy.of` finds by asking the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi import MLP, Embedding
from lightning_mi.anatomy import Anatomy, Norm, ReaderInput, Writer


@dataclass(frozen=True)
class Names:
    """Names of modules; those of a layer stand behind ``layers.<i>.``."""

    layers: str
    embed: str
    attention: str
    out: str
    mlp: str
    before: tuple[str, str]
    final: str
    unembed: str
    others: tuple[str, ...] = ()
    after: tuple[str, str] | None = None
    through: tuple[str, str] | None = None
    embed_norm: str | None = None


LLAMA = Names(
    "model.layers", "model.embed_tokens", "self_attn", "self_attn.o_proj", "mlp",
    ("input_layernorm", "post_attention_layernorm"), "model.norm", "lm_head",
)  # fmt: skip
STATED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "gemma2": Names(
        "model.layers", "model.embed_tokens", "self_attn", "self_attn.o_proj", "mlp",
        ("input_layernorm", "pre_feedforward_layernorm"), "model.norm", "lm_head",
        after=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "neox": Names(
        "gpt_neox.layers", "gpt_neox.embed_in", "attention", "attention.dense", "mlp",
        ("input_layernorm", "post_attention_layernorm"), "gpt_neox.final_layer_norm", "lm_head",
    ),
    "phi": Names(
        "model.layers", "model.embed_tokens", "self_attn", "self_attn.dense", "mlp",
        ("input_layernorm", "input_layernorm"), "model.final_layernorm", "lm_head",
    ),
    "opt": Names(
        "model.decoder.layers", "model.decoder.embed_tokens", "self_attn", "self_attn.out_proj",
        "fc2", ("self_attn_layer_norm", "final_layer_norm"), "model.decoder.final_layer_norm",
        "lm_head", ("model.decoder.embed_positions",),
    ),
    "bert": Names(
        "body.encoder.layer", "body.embeddings.word_embeddings", "attention.output.dense",
        "attention.output.dense", "output.dense", ("attention.self", "intermediate"), "", "unembed",
        ("body.embeddings.token_type_embeddings", "body.embeddings.position_embeddings"),
        through=("attention.output.LayerNorm", "output.LayerNorm"),
        embed_norm="body.embeddings.LayerNorm",
    ),
    "encoder": Names(
        "body.layers", "table", "self_attn", "self_attn.out_proj", "linear2",
        ("self_attn", "linear1"), "", "unembed", through=("norm1", "norm2"),
    ),
    "encoder, pre-norm": Names(
        "body.layers", "table", "self_attn", "self_attn.out_proj", "linear2", ("norm1", "norm2"),
        "body.norm", "unembed",
    ),
}  # fmt: skip


def norm_at(model: nn.Module, name: str) -> Norm:
    """Return a norm as its class defines it."""
    module: Any = model.get_submodule(name)
    kind = type(module).__name__
    weight = module.weight.detach()
    if "RMS" in kind:
        gain = 1 + weight if "Gemma" in kind else weight
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Norm(name, "rms", gain, None, eps)
    return Norm(name, "layer", weight, module.bias.detach(), module.eps)


def stated(model: Any, name: str, heads: int = 4) -> Anatomy:
    """Return the residual graph of an architecture, with W_O and W_U, and no other weights."""
    n = STATED[name]
    count = len(model.get_submodule(n.layers))
    table: Any = model.get_submodule(n.embed)
    width = table.weight.shape[1]
    first = () if n.embed_norm is None else (norm_at(model, n.embed_norm),)
    chain = _through(model, n, count)
    writers = [Writer("embed", n.embed, -1, "embed", node=Embedding(), through=first + chain)]
    for other in n.others:
        writers.append(Writer("pos", other, -1, "position", through=first + chain))
    readers: list[ReaderInput] = []
    W_O, b_O = [], []
    for layer in range(count):
        inside = f"{n.layers}.{layer}."
        out: Any = model.get_submodule(inside + n.out)
        W_O.append(out.weight.detach().T.reshape(heads, -1, width))
        b_O.append(torch.zeros(width) if out.bias is None else out.bias.detach())
        after = [None if n.after is None else norm_at(model, inside + a) for a in n.after or "ab"]
        rest = chain[2 * layer :]
        writers.append(
            Writer(f"attn{layer}", inside + n.attention, layer, "heads", after[0], through=rest)
        )
        mlp = inside + n.mlp
        writers.append(
            Writer(f"MLP{layer}", mlp, layer, "mlp", after[1], 1.0, rest[1:], MLP(layer))
        )
        readers.append(ReaderInput(f"attn{layer}", inside + n.before[0], layer, "attention"))
        readers.append(ReaderInput(f"MLP{layer}", inside + n.before[1], layer, "mlp"))
    readers.append(ReaderInput("logits", n.final or n.unembed, count, "logits"))
    unembed: Any = model.get_submodule(n.unembed)
    nothing: tuple[Tensor, ...] = (torch.empty(0),) * count
    return Anatomy(
        n_layers=count,
        n_heads=(heads,) * count,
        n_kv_heads=(heads,) * count,
        d_head=(W_O[0].shape[1],) * count,
        d_model=width,
        modules=tuple(f"{n.layers}.{i}.{n.attention}" for i in range(count)),
        W_Q=nothing,
        W_K=nothing,
        W_V=nothing,
        W_O=tuple(W_O),
        b_Q=nothing,
        b_K=nothing,
        b_V=nothing,
        b_O=tuple(b_O),
        scale=(1.0,) * count,
        W_U=unembed.weight.detach().T,
        b_U=None if unembed.bias is None else unembed.bias.detach(),
        final_norm=norm_at(model, n.final) if n.final else None,
        logit_softcap=getattr(getattr(model, "config", None), "final_logit_softcapping", None),
        writers=tuple(writers),
        readers=tuple(readers),
    )


def _through(model: nn.Module, names: Names, count: int) -> tuple[Norm, ...]:
    if names.through is None:
        return ()
    return tuple(
        norm_at(model, f"{names.layers}.{i}.{part}") for i in range(count) for part in names.through
    )


def stated_oracle(model: Any) -> Anatomy:
    """Return the anatomy of the hand-built model with its embeddings in modules."""
    width = model.table.weight.shape[1]
    layers = list(model.layers)
    writers = [Writer("embed", "table", -1, "embed", node=Embedding())]
    writers.append(Writer("pos", "places", -1, "position"))
    writers += [Writer(f"attn{i}", f"layers.{i}", i, "heads") for i in range(2)]
    readers = [ReaderInput(f"attn{i}", f"layers.{i}", i, "attention") for i in range(2)]
    readers.append(ReaderInput("logits", "unembed", 2, "logits"))
    size = layers[0].W_O.shape[0]
    return Anatomy(
        n_layers=2,
        n_heads=(1, 1),
        n_kv_heads=(1, 1),
        d_head=(size, size),
        d_model=width,
        modules=("layers.0", "layers.1"),
        W_Q=tuple(a.W_Q.detach()[None] for a in layers),
        W_K=tuple(a.W_K.detach()[None] for a in layers),
        W_V=tuple(a.W_V.detach()[None] for a in layers),
        W_O=tuple(a.W_O.detach()[None] for a in layers),
        b_Q=(torch.zeros(1, size),) * 2,
        b_K=(torch.zeros(1, size),) * 2,
        b_V=(torch.zeros(1, size),) * 2,
        b_O=(torch.zeros(width),) * 2,
        scale=(1.0, 1.0),
        W_E=model.table.weight.detach(),
        W_pos=model.places.weight.detach(),
        W_U=model.unembed.weight.detach().T,
        attention_norms=(None, None),
        mlp_norms=(None, None),
        parallel=(False, False),
        writers=tuple(writers),
        readers=tuple(readers),
    )
