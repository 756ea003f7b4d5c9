"""Products of per-example gradients with directions, without storing a per-example gradient."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .point import Point, math_attention, wide

__all__ = ["gradient_dots", "mean_gradient"]


class LossFunction(Protocol):
    """The loss of each example."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return shape ``[example]``."""


def gradient_dots(point: Point, losses: LossFunction, batch: Any, directions: Tensor) -> Tensor:
    """Return ∇ℓᵢ · d for every example i of a batch and every direction d.

    Args:
        point: The model.
        losses: The loss of each example; examples must not depend on each other.
        batch: The examples.
        directions: Vectors ``[direction, P]`` in parameter space.

    Returns:
        Shape ``[example, direction]``, in double precision.
    """
    columns = [point.derivative(lambda m: losses(m, batch), d) for d in directions]
    return torch.stack(columns, 1).to(wide(point.device))


def mean_gradient(
    point: Point, losses: LossFunction, batches: Iterable[Any], weight: float = 1.0
) -> Tensor:
    """Return weight · Σᵢ ∇ℓᵢ over all examples of some batches.

    Args:
        point: The model.
        losses: The loss of each example.
        batches: Any iterable of batches.
        weight: 1/n for the mean.

    Returns:
        A vector ``[P]`` in double precision.
    """
    total = torch.zeros(point.size, dtype=wide(point.device), device=point.device)
    for batch in batches:
        with math_attention():
            each = point.call(partial(losses, batch=batch))
            total += point.flat(point.gradient(each.sum()))
    return total * weight
