"""Rules of AttnLRP, one for each kind of function, written as modified gradients.

A rule turns a function, at the point where the model is, into an affine map y = J·x + b that
agrees with it there: the relevance of an input is then x times the gradient of that map, and what
b takes up reaches no input. Every rule returns the function's own value, through which gradients
flow by J, and a *replay*: the same affine map as a function of other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lrp_slots import Call

__all__ = [
    "Replay",
    "Step",
    "detached",
    "divided",
    "normed",
    "picked",
    "product",
    "ratio",
    "taylor",
]

Replay = Callable[[Call], Any]
"""A call with other tensors -> what the affine map gives."""


@dataclass(frozen=True, eq=False)
class Step:
    """What happened at one call.

    Args:
        func: The function that was called.
        replay: Its affine map; None where the function is linear or knows nothing of the inputs.
        source: Slot of which the result is an elementwise function.
        scaled: Whether it is that slot times a number.
        gated: Whether the result was taken as a function of its factors' common source.
    """

    func: Callable[..., Any]
    replay: Replay | None = None
    source: int | None = None
    scaled: bool = False
    gated: bool = False


def native(call: Call) -> Any:
    """Return a function's own value, as a constant.

    Args:
        call: The call; arguments that it would change in place are copied.

    Returns:
        The value.
    """
    with torch.no_grad():
        return call.filled([t.detach().clone() for t in call.slots])()


def valued(value: Tensor, linear: Tensor) -> Tensor:
    """Return the exact value with another gradient.

    Args:
        value: A constant.
        linear: Whose gradient is meant.

    Returns:
        The value.
    """
    return value + (linear - linear.detach())


def product(call: Call, factors: list[int], epsilon: float) -> tuple[Tensor, Replay]:
    """Split the relevance of a product evenly among the factors that depend on the inputs.

    y = a·b is taken as ½(a·b̄ + ā·b), with bars for constants. With one such factor it is linear.

    Args:
        call: A product, perhaps with an addend.
        factors: Slots of the factors that depend on the inputs.
        epsilon: Of the ε rule.

    Returns:
        Value and replay.
    """
    kept = [t.detach() for t in call.slots]

    def spread(again: Call) -> Tensor:
        if len(factors) < 2:
            plain: Tensor = again()
            return plain
        own, parts = again.slots, []
        for free in factors:
            held = {i: kept[i] for i in factors if i != free}
            parts.append(again.filled([held.get(i, t) for i, t in enumerate(own)])())
        return torch.stack(parts).mean(0) if len(parts) > 2 else (parts[0] + parts[1]) / 2

    result = spread(call)
    if not epsilon:
        return result, spread
    value = result.detach()
    share = value.abs() / (value.abs() + epsilon)
    return valued(value, result * share), lambda again: spread(again) * share + value * (1 - share)


def ratio(call: Call, source: Tensor, slot: int = 0) -> tuple[Tensor, Replay]:
    """Hand relevance through an elementwise function with f(0) = 0: y = x · (f(x)/x), held fixed.

    Args:
        call: The function.
        source: x.
        slot: Where x stands among the arguments.

    Returns:
        Value and replay.
    """
    value, x = native(call), source.detach()
    factor = torch.where(x == 0, 0.0, value / x).to(value.dtype)
    return valued(value, source * factor), lambda again: again.slots[slot] * factor


def gated(call: Call, source: Tensor) -> tuple[Tensor, Tensor]:
    """Take a product such as x·σ(x) as one elementwise function of x.

    Args:
        call: The product.
        source: x.

    Returns:
        Value, and y/x.
    """
    value, x = native(call), source.detach()
    factor = torch.where(x == 0, 0.0, value / x).to(value.dtype)
    return valued(value, source * factor), factor


def taylor(call: Call) -> tuple[Tensor, Replay]:
    """Take a function as its first-order Taylor series at the point: b = f(x) − J·x.

    For softmax this gives R_j = x_j (R_j − s_j Σ R) (Achtibat et al. 2024, eq. 13).

    Args:
        call: The function, of one tensor that depends on the inputs.

    Returns:
        Value and replay.
    """
    result = call()
    point, value = call.slots[0].detach(), result.detach()

    def replay(again: Call) -> Tensor:
        moved = again.slots[0] - point
        if call.func in SOFTMAX:
            bent: Tensor = value + _softmax_slope(value, moved, call.argument(1, "dim", -1))
            return bent
        others = again.slots[1:]
        straight: Tensor = value + _slope(lambda x: again.filled([x, *others])(), point, moved)
        return straight

    return result, replay


def _slope(function: Callable[[Tensor], Tensor], point: Tensor, moved: Tensor) -> Tensor:
    """Return J·moved, as the gradient of u ↦ Jᵀ·u, which any function with a gradient has."""
    with torch.enable_grad():
        x = point.detach().requires_grad_()
        value = function(x)
        u = torch.zeros_like(value, requires_grad=True)
        (back,) = torch.autograd.grad(value, x, u, create_graph=True)
        (found,) = torch.autograd.grad(back, u, moved)
    return found


SOFTMAX: frozenset[Callable[..., Any]] = frozenset(
    {torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax, torch.special.softmax}
)


def _softmax_slope(s: Tensor, moved: Tensor, axis: int) -> Tensor:
    # A masked logit is −inf at both points, and weighs nothing.
    moved = torch.where(s > 0, moved.to(s.dtype), 0.0)
    return s * (moved - (s * moved).sum(axis, keepdim=True))


def normed(call: Call) -> tuple[Tensor, Replay]:
    """Take layer normalisation as linear: its scale 1/√(Var + ε), or 1/rms, is held fixed.

    Args:
        call: ``layer_norm`` or ``rms_norm``.

    Returns:
        Value and replay.
    """
    shape = call.argument(1, "normalized_shape")
    axes = tuple(range(-len(tuple(shape)), 0))
    centred = "layer_norm" in call.func.__name__
    x = call.slots[0].detach()
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias") if centred else None
    scale = _scale(x, axes, call.argument(4 if centred else 3, "eps", 1e-5), centred)

    def affine(again: Call) -> Tensor:
        y = again.slots[0]
        y = (y - y.mean(axes, keepdim=True) if centred else y) * scale.to(y.dtype)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return valued(native(call), affine(call)), affine


def _scale(x: Tensor, axes: tuple[int, ...], eps: float | None, centred: bool) -> Tensor:
    wide = x.float() if x.element_size() < 4 else x
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    wide = wide - wide.mean(axes, keepdim=True) if centred else wide
    return (wide.square().mean(axes, keepdim=True) + eps).rsqrt()


def picked(call: Call) -> tuple[Any, Replay]:
    """Hold fixed which entries are the largest, or the first in order.

    Args:
        call: A function that returns values and indices along an axis, or the largest value.

    Returns:
        Value and replay.
    """
    result = call()
    if isinstance(result, Tensor):
        return taylor(call)
    place = 2 if call.func.__name__ in ("topk", "kthvalue") else 1
    axis, indices = call.argument(place, "dim", -1), result.indices
    whole = indices.ndim == call.slots[0].ndim
    wide = indices if whole else indices.unsqueeze(axis)

    def replay(again: Call) -> Any:
        values = again.slots[0].gather(axis, wide)
        return type(result)((values if whole else values.squeeze(axis), indices))

    return result, replay


def divided(call: Call) -> tuple[Tensor, Replay]:
    """Hold what is divided by fixed, as the scale of a norm is.

    Args:
        call: A quotient.

    Returns:
        Value and replay.
    """
    kept = call.slots[-1].detach()
    result = call.filled([*call.slots[:-1], kept])()
    return result, lambda again: again.filled([*again.slots[:-1], kept])()


def detached(call: Call) -> tuple[Any, Replay]:
    """Hold a result fixed: a norm, a comparison, whatever carries no relevance.

    Args:
        call: The function.

    Returns:
        Value and replay.
    """
    result = native(call)
    return result, lambda again: result
