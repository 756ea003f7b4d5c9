"""A transformer with grouped queries, in variants, and the same written out by hand.

The module computes attention as models do (one kernel, or a softmax between two products where
logits are capped); `written_out` uses nothing of it but its weights, goes head by head, and can be
told to put anything in the place of any query, key, value, pattern, z, MLP or stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, KV, SIZE, VOCABULARY = 12, 4, 2, 3, 11
GROUP = HEADS // KV

Put = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Grouped queries, biases everywhere, and a soft-cap of logits if wanted."""

    def __init__(self, cap: float | None) -> None:
        super().__init__()
        self.cap = cap
        self.q_proj = nn.Linear(WIDTH, HEADS * SIZE)
        self.k_proj = nn.Linear(WIDTH, KV * SIZE)
        self.v_proj = nn.Linear(WIDTH, KV * SIZE)
        self.o_proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, SIZE)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.cap is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
            scores = q @ k.transpose(-1, -2) * SIZE**-0.5
            scores = self.cap * torch.tanh(scores / self.cap)
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
            z = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
        out: Tensor = self.o_proj(z.transpose(1, 2).flatten(2))
        return out


class Feedforward(nn.Module):
    """Two maps and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """One layer; with ``parallel`` attention and MLP read the same stream."""

    def __init__(self, cap: float | None, parallel: bool) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attn, self.mlp, self.parallel = Attention(cap), Feedforward(), parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attn(self.attn_norm(x)) + self.mlp(self.mlp_norm(x))
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Grouped(nn.Module):
    """Four query heads on two key-value heads in each of two layers."""

    def __init__(self, *, cap: float | None = None, parallel: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(9, WIDTH)
        self.blocks = nn.ModuleList([Block(cap, parallel) for _ in range(2)])
        self.norm = nn.RMSNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                fan = p.shape[-1] if p.ndim > 1 else 4
                p.copy_(torch.randn(p.shape, generator=generator) * (1.4 / fan) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.unembed(self.norm(x))
        return out


def prompts(examples: int = 3, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two batches that differ everywhere."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(VOCABULARY, (examples, length), generator=generator)
    return clean, (clean + 1 + torch.randint(3, clean.shape, generator=generator)) % VOCABULARY


def written_out(
    model: Grouped, ids: Tensor, puts: Mapping[str, Put] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and everything on the way by name: ``q0``, ``pattern1``, ``mlp0``, ``resid1``.

    Args:
        model: The weights.
        ids: The prompts.
        puts: What is done to a tensor of that name before the model goes on with it.

    Returns:
        Logits, and the tensors as they were before anything was done to themselves.
    """
    puts, seen = puts or {}, dict[str, Tensor]()

    def through(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return puts[name](value) if name in puts else value

    x = model.embed.weight[ids] + model.pos.weight[: ids.shape[1]]
    x = through("embed", x)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x = through(f"resid{layer}", x)
        wrote = _heads(block, _rms(x, block.attn_norm.weight), layer, through)
        read = x if block.parallel else x + wrote
        n = _rms(read, block.mlp_norm.weight)
        mlp = block.mlp
        hidden = F.gelu(n @ mlp.up.weight.T + mlp.up.bias)
        x = x + wrote + through(f"mlp{layer}", hidden @ mlp.down.weight.T + mlp.down.bias)
    x = through("resid2", x)
    return _rms(x, model.norm.weight) @ model.unembed.weight.T, seen


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return (x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()) * gain


def _heads(block: Block, n: Tensor, layer: int, through: Callable[[str, Tensor], Tensor]) -> Tensor:
    at, length = block.attn, n.shape[1]

    def read(name: str, linear: nn.Linear, heads: int) -> Tensor:
        parts = [
            n @ linear.weight[h * SIZE : (h + 1) * SIZE].T + linear.bias[h * SIZE : (h + 1) * SIZE]
            for h in range(heads)
        ]
        return through(f"{name}{layer}", torch.stack(parts, 1))

    q = read("q", at.q_proj, HEADS)
    k, v = read("k", at.k_proj, KV), read("v", at.v_proj, KV)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    patterns = []
    for h in range(HEADS):
        scores = q[:, h] @ k[:, h // GROUP].mT / SIZE**0.5
        scores = scores if at.cap is None else at.cap * (scores / at.cap).tanh()
        patterns.append(scores.masked_fill(later, float("-inf")).softmax(-1))
    pattern = through(f"pattern{layer}", torch.stack(patterns, 1))
    z = torch.stack([pattern[:, h] @ v[:, h // GROUP] for h in range(HEADS)], 1)
    z = through(f"z{layer}", z)
    weight = at.o_proj.weight.T.reshape(HEADS, SIZE, WIDTH)
    return sum((z[:, h] @ weight[h] for h in range(HEADS)), at.o_proj.bias.expand_as(n))


def one(name: str, index: int | None, new: Tensor) -> dict[str, Put]:
    """Return what puts one head of a tensor (or all of it) in the place of the model's own."""

    def put(old: Tensor) -> Tensor:
        if index is None:
            return new
        made = old.clone()
        made[:, index] = new[:, index]
        return made

    return {name: put}
