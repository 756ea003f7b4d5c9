"""Attention rollout and attention × gradient: products by hand, dense autograd, any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Network
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi.attribution import (
    AttentionGradient,
    AttentionRollout,
    attention_gradient,
    attention_rollout,
)
from lightning_mi.errors import ArgumentError, ModelError, NoAttentionError

BOTH = (attention_rollout, attention_gradient)
IDS = torch.tensor([[3, 5, 3, 7, 11, 5], [2, 2, 9, 4, 1, 8]])


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


class Written(nn.Module):
    """Two layers of attention written by hand, each pattern a tensor that can be differentiated."""

    def __init__(self, heads: int = 4, groups: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.groups, self.causal = heads, groups, causal
        self.e, self.p = nn.Embedding(12, 8), nn.Embedding(16, 8)
        self.q = nn.ModuleList(nn.Linear(8, heads * 2) for _ in range(2))
        self.k = nn.ModuleList(nn.Linear(8, groups * 2) for _ in range(2))
        self.v = nn.ModuleList(nn.Linear(8, groups * 2) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(heads * 2, 8) for _ in range(2))
        self.head = nn.Linear(8, 12)
        self.patterns: list[Tensor] = []

    def weights(self, i: int, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (
            m(x).unflatten(2, (-1, 2)).transpose(1, 2) for m in (self.q[i], self.k[i], self.v[i])
        )
        times = self.heads // self.groups
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        logits = q @ k.mT * 2.0
        T = x.shape[1]
        if self.causal:
            logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -1e9)
        if padding is not None:
            logits = logits.masked_fill(~padding.bool()[:, None, None], -1e9)
        return logits.softmax(-1), v

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        self.patterns.clear()
        x = self.e(ids) + self.p(torch.arange(ids.shape[1]))
        for i in range(2):
            pattern, v = self.weights(i, x, padding)
            if pattern.requires_grad:
                pattern.retain_grad()
            self.patterns.append(pattern)
            x = x + self.o[i]((pattern @ v).transpose(1, 2).flatten(2))
        return self.head(x)


class Fused(Written):
    """The same numbers by torch's kernel with grouped queries: no pattern is ever written down."""

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.e(ids) + self.p(torch.arange(ids.shape[1]))
        mask = None if padding is None else padding.bool()[:, None, None]
        if self.causal and mask is not None:
            mask = mask & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        for i in range(2):
            q, k, v = (
                m(x).unflatten(2, (-1, 2)).transpose(1, 2)
                for m in (self.q[i], self.k[i], self.v[i])
            )
            z = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=self.causal and mask is None, scale=2.0, enable_gqa=True
            )
            x = x + self.o[i](z.transpose(1, 2).flatten(2))
        return self.head(x)


def written(kind: type[Written] = Written, **options: Any) -> Written:
    torch.manual_seed(1)
    return kind(**options).eval().double()


def dense_rollout(patterns: list[Tensor], fuse: Callable[[Tensor], Tensor]) -> Tensor:
    """Follow Abnar & Zuidema word for word: whole matrices, first layer first."""
    joint = None
    for pattern in patterns:
        mixed = fuse(pattern) + torch.eye(pattern.shape[-1])
        mixed = mixed / mixed.sum(-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    assert joint is not None
    return joint


def dense_gradient(model: Written, ids: Tensor, token: int, layer: int | None) -> Tensor:
    """Differentiate by the patterns themselves and roll whole matrices."""
    model(ids)[:, -1, token].sum().backward()
    weighted = [(p * p.grad).clamp(min=0).mean(1).detach() for p in model.patterns]  # type: ignore[operator]
    if layer is not None:
        return weighted[layer].sum(1)
    eye = torch.eye(ids.shape[1], dtype=torch.float64)
    rolled = eye.expand(len(ids), -1, -1)
    for each in weighted:
        rolled = rolled + each @ rolled
    return rolled[:, -1] - eye[-1]


@pytest.mark.parametrize("kind", [Written, Fused])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_is_the_product_of_whole_matrices(kind: type[Written], fusion: str) -> None:
    model = written()
    model(IDS)
    patterns = [p.detach() for p in model.patterns]
    fuse = (lambda a: a.mean(1)) if fusion == "mean" else (lambda a: getattr(a, f"a{fusion}")(1))
    whole = dense_rollout(patterns, fuse)
    subject = written(kind)
    found = attention_rollout(subject, IDS, 3, fusion=fusion)  # type: ignore[arg-type]
    close(found.values, whole[:, -1])
    close(attention_rollout(subject, IDS, 3, fusion=fusion, query=2).values, whole[:, 2])  # type: ignore[arg-type]
    close(found.values.sum(1), torch.ones(2))


@pytest.mark.parametrize("kind", [Written, Fused])
@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_gradient_is_that_of_the_patterns_themselves(
    kind: type[Written], layer: int | None
) -> None:
    expected = dense_gradient(written(), IDS, 4, layer)
    found = attention_gradient(written(kind), IDS, 4, layer=layer)
    assert expected.max() > 1e-4
    close(found.values, expected, 1e-7)
    assert found.unit == ("1" if layer is None else "logits")


def test_query_mean_and_encoders_without_a_position() -> None:
    model = written(causal=False)
    model(IDS)
    whole = dense_rollout([p.detach() for p in model.patterns], lambda a: a.mean(1))
    close(attention_rollout(model, IDS, 3, query="mean").values, whole.mean(1))
    pooled = nn.Sequential(model, First())
    close(attention_rollout(pooled, IDS, 3).values, whole[:, 0])  # CLS
    causal = written()
    causal(IDS)
    whole = dense_rollout([p.detach() for p in causal.patterns], lambda a: a.mean(1))
    close(attention_rollout(nn.Sequential(causal, Last()), IDS, 3).values, whole[:, -1])


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


class Named(nn.Module):
    """Takes a dictionary batch with a mask, as models of transformers do."""

    def __init__(self, model: Written) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("kind", [Written, Fused])
@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_batch_gives_what_its_examples_give(
    method: Any, kind: type[Written], causal: bool
) -> None:
    model = Named(written(kind, causal=causal))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    both = method(model, {"input_ids": IDS, "attention_mask": mask}, 3).values
    for row, size in enumerate((4, 6)):
        cut = {"input_ids": IDS[row : row + 1, :size], "attention_mask": mask[row : row + 1, :size]}
        close(both[row, :size], method(model, cut, 3).values[0])
    assert both[0, :4].max() > 0
    assert (both[0, 4:] == 0).all()


class Table(Oracle):
    """The induction model with its one-hot lookup in an ``nn.Embedding``."""

    def __init__(self, beta: float) -> None:
        super().__init__(beta, 12, 9)
        self.words = nn.Embedding.from_pretrained(torch.eye(12))

    def embed(self, ids: Tensor) -> Tensor:
        own = super().embed(ids)
        return torch.cat([self.words(ids), own[..., self.V :]], 2)


def test_induction_reads_the_token_after_the_first_occurrence() -> None:
    ids = torch.tensor([[4, 7, 1, 9, 3, 7]])  # After 7 came 1.
    model = Table(30.0)
    assert int(model(ids)[0, -1].topk(2).indices[0]) in (1, 7)
    found = attention_gradient(model, ids, 1).values[0]
    assert int(found.argmax()) == 2
    # Half stays, half goes to 2 and half of that on to what head 0.0 reads there.
    rolled = attention_rollout(model, ids, 1).values[0]
    close(rolled, torch.tensor([0, 0.25, 0.25, 0, 0.25, 0.25]), 1e-3)
    assert attention_gradient(Table(0.0), ids, 1).values[0].max() < 0.5 * found.max()


class Vit(nn.Module):
    def __init__(self, extra: int, size: tuple[int, int] = (8, 12)) -> None:
        super().__init__()
        self.extra = extra
        self.cut = nn.Conv2d(1, 8, 4, 4)
        self.first = nn.Parameter(torch.randn(1, extra, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.cut(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        x = self.layer(x)
        return self.out(x[:, 0] if self.extra else x.mean(1))


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_tokens_of_an_image_are_laid_over_its_patches(extra: int) -> None:
    model, image = Vit(extra).eval(), torch.randn(2, 1, 8, 12)
    with mi.attention.tap(model) as seen, torch.no_grad():
        model(image)
        pattern = seen.sites[0].pattern().mean(1)
    row = pattern[:, 0] if extra else (pattern + torch.eye(6)).mean(1)
    found = attention_rollout(model, image, 1)
    assert found.axes == ("example", "y", "x")
    assert found.convention["left_out"] == extra
    close(found.values[:, ::4, ::4], row[:, extra:].reshape(2, 2, 3) / 2)
    assert (found.values[:, :4, :4] == found.values[:, :1, :1]).all()
    assert attention_gradient(model, image, 1).values.shape == (2, 8, 12)


def test_any_target_and_the_sign_of_the_gradient() -> None:
    model = written()
    up = attention_gradient(model, IDS, lambda o, b: o[:, -1, 2])
    down = attention_gradient(model, IDS, lambda o, b: -o[:, -1, 2])
    assert not torch.allclose(up.values, down.values)
    flat = attention_gradient(model, IDS, lambda o, b: o[:, -1, 2] * 0)
    assert (flat.values == 0).all()
    # A function names no position, so the last of a causal model is taken: the same here.
    close(up.values, attention_gradient(model, IDS, 2).values)


@pytest.mark.parametrize("method", BOTH)
def test_half_precision_and_double(method: Any) -> None:
    model = Network(0.0).eval()
    exact = method(Network(0.0).eval().double(), IDS, 1)
    torch.manual_seed(0)
    assert exact.values.dtype == torch.float64
    single = method(model, IDS, 1)
    half = method(model.to(torch.bfloat16), IDS, 1)
    close(half.values / single.values.max(), single.values / single.values.max(), 0.1)
    assert half.values.dtype == torch.float32


@pytest.mark.parametrize("method", BOTH)
def test_the_model_is_left_as_it_was(method: Any) -> None:
    model = Network().train()
    model.frozen.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    method(model, IDS, 1)
    with pytest.raises(ZeroDivisionError):
        method(model, IDS, lambda o, b: o.sum((1, 2)) * (1 // 0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert not model.tokens.weight.requires_grad
    assert model.head.weight.requires_grad


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(12, 8)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.e(ids), self.e(ids[:, :3]))


@pytest.mark.parametrize("method", BOTH)
def test_what_cannot_be_followed_is_refused_by_name(method: Any) -> None:
    with pytest.raises(ModelError, match="cross-attention"):
        method(Cross(), IDS, 1)
    with pytest.raises(NoAttentionError):
        method(nn.Linear(4, 3), torch.ones(2, 4), 1)
    with pytest.raises(ArgumentError, match="query"):
        method(written(), IDS, 1, query=6)
    with pytest.raises(ArgumentError, match="query"):
        method(written(), IDS, 1, query="cls")
    with pytest.raises(ArgumentError, match="query"):
        method(written(), IDS, 1, query=-7)


def test_arguments_are_checked_before_there_is_a_model() -> None:
    with pytest.raises(ArgumentError, match="fusion"):
        AttentionRollout(fusion="sum")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layer"):
        AttentionGradient(layer="last")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        attention_gradient(written(), IDS, 1, layer=2)


def test_measurements_record_what_the_functions_return() -> None:
    model = written()
    asked = [AttentionRollout(target=3, fusion="max"), AttentionGradient(target=3, examples=1)]
    panels = {r.name: r.panel for r in mi.measure(model, asked, batch=IDS)}
    rolled = panels["attention_rollout/values"]
    close(rolled.values, attention_rollout(model, IDS, 3, fusion="max").values)
    assert rolled.axes == ("example", "position")
    assert rolled.convention["fusion"] == "max"
    weighted = panels["attention_gradient/values"]
    close(weighted.values, attention_gradient(model, IDS[:1], 3).values)
