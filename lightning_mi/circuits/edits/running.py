"""Edits of what runs, not of weights: heads are scaled, the stream is steered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...errors import ArgumentError
from ...isolation import untouched, unwrapped
from ...nodes import MLP, Head
from ...task import Task
from ..causal.places import At, Residual, as_place
from ..causal.ports import Change, Ports
from .edit import Edit

__all__ = ["scale_heads", "steer"]


def scale_heads(model: nn.Module, factors: Mapping[Head, float]) -> Edit:
    """Multiply what heads write: 0 ablates them, 1 leaves them, −1 turns them round.

    It acts before the output projection, so its bias stays. Gradients flow through.

    Args:
        model: The user's model.
        factors: Heads and numbers.

    Returns:
        The edit.

    Raises:
        ArgumentError: If there is no head.
    """
    if not factors or not all(isinstance(h, Head) for h in factors):
        raise ArgumentError.of(
            "factors",
            expected="heads and numbers",
            got=repr(factors)[:60],
            do="For example {Head(1, 3): 0.0}.",
        )
    by_layer: dict[int, dict[int, float]] = defaultdict(dict)
    for head, factor in factors.items():
        by_layer[head.layer][head.head] = float(factor)

    def change(own: dict[int, float]) -> Change:
        def apply(z: Tensor) -> Tensor:
            scale = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
            scale[list(own)] = torch.tensor(list(own.values())).to(scale)
            return z * scale[:, None, None]

        return Change(apply, tuple(own))

    ports = Ports(unwrapped(model), Task(), _unneeded)
    changes = {("z", layer): change(own) for layer, own in by_layer.items()}
    told = ", ".join(f"{head} × {factor:g}" for head, factor in factors.items())
    return Edit(model, told, lambda: ports.opened(changes))  # type: ignore[arg-type]


def steer(
    model: nn.Module,
    part: Head | MLP | Residual,
    direction: Tensor,
    *,
    amount: float = 1.0,
    positions: int | Sequence[int] | Tensor | None = None,
    example: Any = None,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
) -> Edit:
    """Add a direction to what a part writes, or to the stream that enters a layer.

    Args:
        model: The user's model.
        part: A head (its z), an MLP, or `Residual`.
        direction: What is added ``[d]``, times ``amount``; it is not normalised.
        amount: How much of it.
        positions: Where; None is everywhere. See `At`.
        example: A batch, needed for MLPs and the stream where no anatomy is given, and for the
            stream always.
        anatomy: What the model is made of, where that is known already.
        task: How the model is called.

    Returns:
        The edit.

    Raises:
        ArgumentError: If the direction does not fit the part.
    """
    place = as_place(At(part, positions=positions))
    plain = unwrapped(model)
    find = cache(lambda: anatomy or Anatomy.of(plain, example, task=task))
    ports = Ports(plain, task or Task(), find)
    if place.kind == "residual":
        with untouched(model), torch.no_grad():
            ports.find_streams(example)
    added = amount * direction.detach()

    def apply(value: Tensor) -> Tensor:
        old = place.taken(value)
        if added.shape != old.shape[-1:]:
            raise ArgumentError.of(
                "direction",
                expected=f"shape {tuple(old.shape[-1:])}, the width of {place.name}",
                got=tuple(added.shape),
                do="A head's z is d_head wide, the stream d_model.",
            )
        return place.put(value, old + added.to(old))

    changes = {place.port: Change(apply)}
    return Edit(model, f"steer {place.name} by {amount:g}", lambda: ports.opened(changes))


def _unneeded() -> Anatomy:
    raise ArgumentError.of("anatomy", expected="none for heads", got="a call", do="Report this.")
