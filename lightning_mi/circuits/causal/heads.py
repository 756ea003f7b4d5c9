"""Attention, head by head: from what each input of each head reads to what the head writes.

A model computes all heads from one stream. To let every input of every head read its own sum of
what others wrote, queries, keys and values are computed from the anatomy's matrices, and what lies
between these and the kernel (a norm of queries, rotary embedding, a factor) is recognised by
comparing with those that the model computed itself. What is so computed must reproduce the model's
own values, or the layer is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...anatomy import Anatomy, Norm
from ...attention import Site
from ...attention.site import grouped_product, safe_softmax, widened
from ...errors import ModelError

__all__ = ["HeadInputs", "Turn", "added", "attend", "head_inputs", "norm_pullback"]

Role: TypeAlias = Literal["q", "k", "v"]
ROLES: tuple[Role, ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Turn:
    """What a model does to queries or keys of one position: pairs of entries are turned.

    Args:
        first: Index of the first entry of each pair.
        second: Index of the second entry.
        factor: Complex number that each pair is multiplied by ``[example or 1, position, pair]``.
        rest: Number that all other entries are multiplied by.
    """

    first: Tensor
    second: Tensor
    factor: Tensor
    rest: float

    def since(self, start: int) -> Turn:
        """Return the turn of the positions from one on.

        Args:
            start: The first position.

        Returns:
            The turn.
        """
        return dataclasses.replace(self, factor=self.factor[:, start:]) if start else self

    def __call__(self, p: Tensor, *, back: bool = False) -> Tensor:
        """Return p turned, or (transposed) turned back.

        Args:
            p: Shape ``[head, example, position, d_head]``; examples may be several times those
                that the turn was found on.
            back: Whether the transposed map is meant.

        Returns:
            The same shape.
        """
        made = p * self.rest
        if not len(self.first):
            return made
        c = (
            self.factor.repeat(p.shape[1] // len(self.factor), 1, 1)
            if len(self.factor) > 1
            else (self.factor)
        )
        real, imaginary = c.real, -c.imag if back else c.imag
        a, b = p[..., self.first], p[..., self.second]
        made = made.index_copy(-1, self.first, a * real - b * imaginary)
        return made.index_copy(-1, self.second, a * imaginary + b * real)


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """How the heads of one layer get their queries, keys and values from the stream.

    Args:
        norm: The norm before the attention, or None.
        weights: For each role ``[head, d_model, d_head]``.
        biases: For each role ``[head, d_head]``.
        inner: For each role the norm after the matrix, or None.
        turns: For each role what follows it.
    """

    norm: Norm | None
    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor]
    inner: dict[Role, Norm | None]
    turns: dict[Role, Turn]

    def __call__(self, role: Role, x: Tensor) -> Tensor:
        """Return queries, keys or values, each head from an input of its own.

        Args:
            role: Which.
            x: The stream as each head reads it ``[head, example, position, d_model]``.

        Returns:
            Shape ``[example, head, position, d_head]``.
        """
        n = x if self.norm is None else self.norm(x)
        return self.turned(role, self.projected(role, n)).transpose(0, 1)

    def projected(self, role: Role, n: Tensor) -> Tensor:
        """Return W n + b of each head from the normalised ``[head, …, d_model]``."""
        weight, bias = self.weights[role].to(n), self.biases[role].to(n)
        made = torch.unflatten(n.flatten(1, 2) @ weight, 1, n.shape[1:3])
        projected: Tensor = made + bias[:, None, None]
        return projected

    def turned(self, role: Role, p: Tensor) -> Tensor:
        """Return what enters the kernel from what a matrix gave ``[head, …, d_head]``."""
        norm = self.inner[role]
        return self.turns[role](p if norm is None else norm(p))

    def since(self, start: int) -> HeadInputs:
        """Return the maps of the positions from one on.

        Args:
            start: The first position.

        Returns:
            The maps.
        """
        turns = {role: turn.since(start) for role, turn in self.turns.items()}
        return dataclasses.replace(self, turns=turns)

    def pullback(
        self,
        given: Mapping[Role, Tensor],
        values: Mapping[Role, Tensor],
        x: Tensor,
        steps: int,
        size: int,
    ) -> Tensor:
        """Return the gradient at each input of each head from those at queries, keys and values.

        The exact vector-Jacobian product: turned back, through the norm of queries where there is
        one, through the head's matrix W, and through the norm of the stream. With W' = gain·W and
        g at x̂W' the last is Σ (g/s) W'ᵀ − Σ x̂·(g · x̂W')/(d·s) − Σ (g · mean of W')/s: only sums
        over steps are as wide as the stream. g · x̂W' is known from the values themselves.

        Args:
            given: Gradients at each role ``[row, head, position, d_head]``.
            values: Queries, keys and values as they enter the kernel, likewise.
            x: The stream that all heads read ``[row, position, d_model]``.
            steps: Rows are ``[…, step, example]``: how many steps are added up.
            size: Number of examples.

        Returns:
            Shape ``[input, row / steps, position, d_model]``: queries, keys, values.
        """
        wide = widened(x)
        back = [self._back(role, given[role], values[role], wide) for role in ROLES]
        weights = [self.weights[role].to(wide) for role in ROLES]
        if self.norm is None:
            gradients = (added(g, 1, steps, size) for g, _ in back)
            return torch.cat([_widen(g, W) for g, W in zip(gradients, weights, strict=True)])
        scale, unit = _scaled(self.norm, wide)
        scaled = (added(g / scale, 1, steps, size) for g, _ in back)
        made = torch.cat([_widen(g, W) for g, W in zip(scaled, weights, strict=True)])
        if self.norm.weight is not None:
            made *= self.norm.weight.to(made)
        if self.norm.kind == "layer":
            made -= made.mean(-1, keepdim=True)
        along = torch.cat([a for _, a in back]) / (wide.shape[-1] * scale[..., 0])
        parts = torch.unflatten(along, 1, (-1, steps, size))
        units = torch.unflatten(unit, 0, (-1, steps, size))
        made -= torch.einsum("hgsbt,gsbtd->hgbtd", parts, units).flatten(1, 2)
        return made

    def _back(self, role: Role, given: Tensor, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient g at what the matrix gave ``[head, row, …]``, and g · x̂W'."""
        given = widened(given).transpose(0, 1)
        g, inner = self.turns[role](given, back=True), self.inner[role]
        if inner is None:  # What follows the matrix is linear.
            along = (given * widened(value).transpose(0, 1)).sum(-1)
        else:
            n = x if self.norm is None else self.norm(x)
            projected = self.projected(role, n[None])
            g = norm_pullback(inner, g, projected)
            along = (g * projected).sum(-1)
        constant = self.biases[role].to(g)
        if self.norm is not None and self.norm.bias is not None:
            constant = constant + self.norm.bias.to(g) @ self.weights[role].to(g)
        return g, along - torch.einsum("hntk,hk->hnt", g, constant)


def added(values: Tensor, axis: int, steps: int, size: int) -> Tensor:
    """Return rows ``[…, step, example]`` added up over steps.

    Args:
        values: Any tensor.
        axis: Where its rows are.
        steps: How many steps.
        size: How many examples.

    Returns:
        As many rows as before, divided by ``steps``.
    """
    if steps == 1:
        return values
    parts = torch.unflatten(values, axis, (-1, steps, size))
    return parts.sum(axis + 1).flatten(axis, axis + 1)


def _widen(g: Tensor, weight: Tensor) -> Tensor:
    """Return g Wᵀ of each head: ``[head, row, position, d_model]``."""
    made: Tensor = torch.unflatten(g.flatten(1, 2) @ weight.mT, 1, g.shape[1:3])
    return made


def _scaled(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a norm divides by, and x̂."""
    scale = norm.scale(x)
    return scale, (x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x) / scale


def norm_pullback(norm: Norm, given: Tensor, x: Tensor) -> Tensor:
    """Return the gradient at the input of a norm from that at its output.

    With x̂ = (x − mean) / s and g' = gain · g it is (g' − x̂·mean(g'·x̂) − mean(g')) / s, the last
    term only for a LayerNorm.

    Args:
        norm: The norm, ``"layer"`` or ``"rms"``.
        given: Gradient ``[…, d]``.
        x: What entered the norm, broadcastable.

    Returns:
        The same shape as ``given``.
    """
    scale, unit = _scaled(norm, x)
    g = given if norm.weight is None else given * norm.weight.to(given)
    along = (g * unit).mean(-1, keepdim=True)
    made = g - unit * along
    if norm.kind == "layer":
        made = made - g.mean(-1, keepdim=True)
    return made / scale


def head_inputs(anatomy: Anatomy, layer: int, site: Site, x: Tensor) -> HeadInputs | None:
    """Return how the heads of a layer read, or None if their values cannot be reproduced.

    Args:
        anatomy: What the model is made of.
        layer: The layer.
        site: Its attention in some pass.
        x: What entered the layer in that pass ``[example, position, d_model]``.

    Returns:
        The maps, checked against the site.
    """
    norm = anatomy.attention_norms[layer]
    if norm is not None and norm.kind == "other":
        return None
    wide = widened(x.detach())
    n = (wide if norm is None else norm(wide))[None]
    found = HeadInputs(
        norm,
        {"q": anatomy.W_Q[layer], "k": anatomy.W_K[layer], "v": anatomy.W_V[layer]},
        {"q": anatomy.b_Q[layer], "k": anatomy.b_K[layer], "v": anatomy.b_V[layer]},
        {"q": anatomy.query_norms[layer], "k": anatomy.key_norms[layer], "v": None},
        {},
    )
    tolerance = 1e-3 if site.q.element_size() >= 4 else 5e-2
    for role in ROLES:
        seen = widened(getattr(site, role).detach()).transpose(0, 1)
        made = found.projected(role, n)
        inner = found.inner[role]
        if made.shape != seen.shape or (inner is not None and inner.kind == "other"):
            return None
        turn = _turn(made if inner is None else inner(made), seen, tolerance)
        if turn is None:
            return None
        found.turns[role] = turn
    return found


def _turn(p: Tensor, q: Tensor, tolerance: float) -> Turn | None:
    """Return the turn that leads from p to q, both ``[head, example, position, d_head]``."""
    factor = float((p * q).detach().sum() / p.square().sum().clamp(min=1e-30))
    none = torch.zeros(0, dtype=torch.long, device=p.device)
    plain = Turn(none, none, torch.ones(1, 1, 0, dtype=torch.complex64, device=p.device), factor)
    if _same(plain(p), q, tolerance):
        # A factor that rounding made is none.
        return dataclasses.replace(plain, rest=1.0) if abs(factor - 1.0) < tolerance else plain
    moved = (q - p).abs().amax((0, 1, 2)) > tolerance * q.abs().max()
    for width in _widths(int(moved.nonzero().max()) + 1, p.shape[-1]):
        half = torch.arange(width // 2, device=p.device)
        for first, second in ((half, half + width // 2), (2 * half, 2 * half + 1)):
            for pooled in (True, False):
                turn = _fitted(p, q, first, second, pooled)
                if turn is not None and _same(turn(p), q, tolerance):
                    return turn
    return None


def _widths(least: int, whole: int) -> list[int]:
    """Return how many entries may be turned, the likeliest first.

    At least those that moved; more, as the slowest pairs hardly move within a short prompt.
    """
    even = range(least + least % 2, whole + 1, 2)
    return list(dict.fromkeys([*even[-1:], *even[:1], *even]))


def _fitted(p: Tensor, q: Tensor, first: Tensor, second: Tensor, pooled: bool) -> Turn | None:
    if int(second.max()) >= p.shape[-1]:
        return None
    axes = (0, 1) if pooled else (0,)
    a, b = (torch.complex(v[..., first], v[..., second]) for v in (p, q))
    size = a.abs().square().sum(axes).clamp(min=1e-30)
    c = (a.conj() * b).sum(axes) / size
    c = c[None] if pooled else c
    length = c.abs()
    if not bool((length - length.median()).abs().max() <= 0.05 * length.median()):
        return None  # No rotation times a number: a pairing that only seems to fit.
    return Turn(first, second, c, 1.0)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-12))


def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what heads write when queries, keys and values are others.

    Args:
        site: The attention; its mask, scale and soft-cap are kept.
        q: Queries ``[example, head, position, d_head]``.
        k: Keys ``[example, kv_head, position, d_head]``.
        v: Values ``[example, kv_head, position, d_head]``.

    Returns:
        z ``[example, head, position, d_head]``, in single precision at least.
    """
    cap = site.softcap
    bare = dataclasses.replace(site, q=q, k=k, v=v, probabilities=None, replay=None)
    if cap is None:
        return grouped_product(safe_softmax(bare.logits()), v)
    free = dataclasses.replace(bare, mask=None, causal=False).logits()
    masked = dataclasses.replace(bare, scale=0.0).logits()  # 0 where open, else the mask's value.
    return grouped_product(safe_softmax(cap * (free / cap).tanh() + masked), v)


def require_same(
    site: Site, z: Tensor, made: Tensor, layer: int, real: Tensor | None = None
) -> None:
    """Refuse a layer whose attention was not reproduced.

    Args:
        site: The attention.
        z: What the model computed.
        made: What `attend` computed from the same queries, keys and values.
        layer: The layer.
        real: Positions that are no padding ``[example, position]``; None for all. Padding that may
            look nowhere looks everywhere in some models, and nobody reads what it finds.

    Raises:
        ModelError: If they differ.
    """
    tolerance = 1e-3 if z.element_size() >= 4 else 5e-2
    whole = widened(z)
    if real is not None:
        padding = ~real[:, None, :, None]
        made, whole = made.masked_fill(padding, 0.0), whole.masked_fill(padding, 0.0)
    if not _same(made, whole, tolerance):
        raise ModelError(
            f"model: expected the attention of layer {layer} ({site.module!r}) to be a softmax of "
            "masked products of queries and keys, got one that differs from it (a sink logit or a "
            "bias of its own?). Its heads cannot be given inputs of their own."
        )
