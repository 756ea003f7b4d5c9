"""The factors of a head as its neighbours see them: what it reads, what it writes, per layer.

W_OV = W_V·W_O and W_QK = W_Q·W_Kᵀ are d_model × d_model matrices of rank d_head at most. Nothing
here ever forms them: a product of factors is replaced by one with the same singular values and the
same action on one side, ``[d_head, d_model]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...anatomy.shared import check_anatomy
from ...attention.site import widened
from ...errors import ArgumentError
from ...nodes import Head, parse

if TYPE_CHECKING:
    from ...anatomy import Anatomy, Norm

__all__ = [
    "Role",
    "centres",
    "check_count",
    "earlier",
    "head_of",
    "heads_of",
    "norm_before",
    "padded",
    "reads",
    "role_of",
    "triangle",
    "unit",
    "writes",
]

Role = Literal["Q", "K", "V"]


def role_of(value: str, argument: str) -> Role:
    """Return one of the three inputs of a head.

    Args:
        value: What the user wrote.
        argument: How the argument is called.

    Returns:
        The role.

    Raises:
        ArgumentError: If it is none.
    """
    for role in ("Q", "K", "V"):
        if value == role:
            return role
    raise ArgumentError.of(
        argument, expected="'Q', 'K' or 'V'", got=repr(value), do="Name one input of the reader."
    )


def head_of(anatomy: Anatomy, head: Head | str, argument: str) -> Head:
    """Return a head of the model, of its name.

    Args:
        anatomy: The model's anatomy.
        head: The head, or a name such as ``"L1H3"``.
        argument: How the argument is called.

    Returns:
        The head.

    Raises:
        ArgumentError: If the model has no such head.
    """
    check_anatomy(anatomy)
    found = parse(head) if isinstance(head, str) else head
    heads = dict(enumerate(anatomy.n_heads))
    if isinstance(found, Head) and 0 <= found.head < heads.get(found.layer, 0):
        return found
    raise ArgumentError.of(
        argument,
        expected=f"a head of {anatomy.n_layers} layers of {anatomy.n_heads} heads",
        got=str(head),
        do="Layers and heads count from 0.",
    )


def check_count(value: int, argument: str) -> None:
    """Refuse what is no number of things.

    Args:
        value: What was given.
        argument: How the argument is called.

    Raises:
        ArgumentError: If it is not a positive int.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError.of(
            argument, expected="a positive int", got=repr(value), do="Leave it out for the default."
        )


def reads(anatomy: Anatomy, layer: int, role: Role, *, fold: bool = True) -> Tensor:
    """Return what a layer's heads read with, the gain of its norm folded in.

    Args:
        anatomy: The model's anatomy.
        layer: Layer.
        role: Which input.
        fold: Fold the norm's gain, and for LayerNorm drop the all-ones direction.

    Returns:
        ``[head, d_model, d_head]``, in float32 at least; grouped keys and values repeated.
    """
    weight = widened(anatomy.W_Q[layer] if role == "Q" else anatomy.grouped(layer, role))
    norm = norm_before(anatomy, layer)
    return norm.folded(weight) if fold and norm is not None else weight


def writes(anatomy: Anatomy, layer: int, *, fold: bool = True) -> Tensor:
    """Return what a layer's heads write with.

    Where a norm stands between the heads and the stream (a sandwich norm), its gain is folded in:
    it turns the direction of what is written, its scale does not matter here.

    Args:
        anatomy: The model's anatomy.
        layer: Layer.
        fold: Fold that gain.

    Returns:
        ``[head, d_head, d_model]``, in float32 at least.
    """
    weight = widened(anatomy.W_O[layer])
    norm = next((w.norm for w in anatomy.writers if w.kind == "heads" and w.layer == layer), None)
    if norm is None or norm.kind == "other" or not fold:
        return weight
    return norm.linear(weight, torch.ones(1, dtype=weight.dtype, device=weight.device))


def centres(anatomy: Anatomy, layer: int) -> bool:
    """Say whether a layer's heads are blind to the all-ones direction, because of LayerNorm.

    Args:
        anatomy: The model's anatomy.
        layer: Layer.

    Returns:
        Whether they are.
    """
    norm = norm_before(anatomy, layer)
    return norm is not None and norm.kind == "layer"


def norm_before(anatomy: Anatomy, layer: int) -> Norm | None:
    """Return the norm before a layer's attention if its gain can be folded.

    Args:
        anatomy: The model's anatomy.
        layer: Layer.

    Returns:
        The norm, or None.
    """
    norm = anatomy.attention_norms[layer] if anatomy.attention_norms else None
    return None if norm is None or norm.kind == "other" else norm


def triangle(weight: Tensor) -> Tensor:
    """Return R of W = Q·R: ‖W·M‖ = ‖R·M‖ for every M, and R is small.

    Args:
        weight: ``[…, d_model, d_head]``.

    Returns:
        ``[…, min(d_model, d_head), d_head]``.
    """
    found: Tensor = torch.linalg.qr(weight, mode="r").R
    return found


def unit(values: Tensor) -> Tensor:
    """Return matrices scaled to Frobenius norm 1; zero stays zero.

    Args:
        values: ``[…, row, column]``.

    Returns:
        The same shape.
    """
    largest = values.abs().amax((-2, -1), keepdim=True)
    values = values / largest.where(largest > 0, 1.0)
    sizes: Tensor = torch.linalg.matrix_norm(values, keepdim=True)
    return values / sizes.where(sizes > 0, 1.0)


def padded(anatomy: Anatomy, like: Tensor) -> Tensor:
    """Return zeros for all pairs of heads, NaN for heads that a layer does not have.

    Args:
        anatomy: The model's anatomy.
        like: Gives dtype and device.

    Returns:
        ``[layer, head, layer, head]``.
    """
    real = heads_of(anatomy.n_heads, like)
    both = real[:, :, None, None] & real
    return torch.zeros(both.shape, dtype=like.dtype, device=like.device).where(both, torch.nan)


def heads_of(n_heads: Sequence[int], like: Tensor) -> Tensor:
    """Return which heads there are, bool ``[layer, head]``.

    Args:
        n_heads: Number of heads of each layer.
        like: Gives the device.

    Returns:
        True where a layer has that head.
    """
    counts = torch.tensor(n_heads, device=like.device)
    return torch.arange(max(n_heads), device=like.device) < counts[:, None]


def earlier(values: Tensor) -> Tensor:
    """Return which pairs have the writer in an earlier layer.

    Args:
        values: ``[layer, head, layer, head]``.

    Returns:
        Bool, broadcastable to it.
    """
    layer = torch.arange(len(values), device=values.device)
    return (layer[:, None] < layer)[:, None, :, None]
