"""Torch functions that are made of others, written in those: attention, gates, group norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention.observer import _with_globals
from ..errors import ModelError

__all__ = ["opened"]


def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return what a function is made of.

    Args:
        func: A torch function.

    Returns:
        The same function, written in functions that have rules; None if it is not made of any.
    """
    if func is F.scaled_dot_product_attention:
        return _attention
    if func is F.multi_head_attention_forward:
        return _with_globals(func)
    return COMPOSED.get(func)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention out of functions that have rules."""
    if dropout_p > 0.0:
        raise ModelError(
            f"attn_lrp: expected no dropout of attention weights, got p={dropout_p}. The model "
            "should pass 0.0 to scaled_dot_product_attention in evaluation mode."
        )
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        here = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~here, -math.inf)
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    else:
        scores = scores + attn_mask
    nowhere = (scores == -math.inf).all(-1, keepdim=True)
    pattern = scores.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)
    return pattern @ value


def _gated_linear(input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    groups = groups - groups.mean(-1, keepdim=True)
    scale = ((groups * groups).mean(-1, keepdim=True) + eps).rsqrt()
    shape = (1, -1, *(1,) * (input.ndim - 2))
    normed = (groups * scale).reshape(input.shape)
    normed = normed if weight is None else normed * weight.reshape(shape)
    return normed if bias is None else normed + bias.reshape(shape)


def _maximum(input: Tensor, other: Tensor) -> Tensor:
    return torch.where(input >= other, input, other)


def _minimum(input: Tensor, other: Tensor) -> Tensor:
    return torch.where(input <= other, input, other)


COMPOSED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.glu: _gated_linear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    torch.maximum: _maximum,
    Tensor.maximum: _maximum,
    torch.minimum: _minimum,
    Tensor.minimum: _minimum,
}
"""Functions written in terms of functions that have rules."""
