"""Products of per-example gradients with directions, without storing a per-example gradient."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..batch import batch_size
from .blocks import dot, dot_of_one
from .point import Point, repeatable_attention, wide
from .reader import Layout, Plan, Reader, ValueFunction
from .recording import Matrix, Use

__all__ = ["GradientDots", "LossFunction", "gradient_dots", "mean_gradient"]

LARGEST = 2**24
"""Entries of the per-example weight gradients of one layer that may exist at once."""


LossFunction = ValueFunction
"""The loss of each example, shape ``[example]``."""


class GradientDots:
    """∇ℓᵢ · d for every example i and every direction d.

    One forward and one backward pass to the layers' outputs, and one matrix product for each layer.
    Parameters that `Reader` cannot read are differentiated twice backwards instead. Both are exact.

    Args:
        point: The model.
        losses: The loss of each example; examples must not depend on each other.
        directions: Vectors ``[direction, P]`` in parameter space.
    """

    def __init__(self, point: Point, losses: LossFunction, directions: Tensor) -> None:
        self.point, self.losses = point, losses
        self.directions = directions.to(wide(point.device))
        self.reader = Reader(point, losses)
        parts = dict(zip(point.parameters, point.shaped(directions), strict=True))
        self._by_name = [{n: t[d] for n, t in parts.items()} for d in range(len(directions))]

    @property
    def plan(self) -> Plan | None:
        """How batches of several examples are read, once one was."""
        return self.reader.plan

    def __call__(self, batch: Any) -> Tensor:
        """Return the products for a batch.

        Args:
            batch: The examples.

        Returns:
            Shape ``[example, direction]``, in double precision.
        """
        examples = batch_size(batch)
        if examples == 1:
            return (mean_gradient(self.point, self.losses, [batch]) @ self.directions.T)[None]
        read = self.reader.read(batch, _ones)
        total = self._zeros(examples)
        for use, layout, gradient in zip(
            read.uses, read.layouts, *read.gradients, strict=bool(read.uses)
        ):
            if gradient is not None:
                total += self._contract(use, layout, gradient, examples)
        return total + self._apart(batch, examples, read.lost)

    # -------------------------------------------------------------- the fast way

    @torch.no_grad()
    def _contract(self, use: Use, layout: Layout, gradient: Tensor, examples: int) -> Tensor:
        if use.matrix is not None:
            return self._multiply(use.matrix, layout, gradient, examples)
        g = layout.split(gradient, examples)
        pushed = (use.push(d).expand_as(gradient) for d in self._by_name)
        return torch.cat([dot(layout.split(p, examples), g) for p in pushed], 1)

    def _multiply(self, matrix: Matrix, layout: Layout, gradient: Tensor, examples: int) -> Tensor:
        """Return the products with the gradients of a layer's weight and bias."""
        x, g = layout.rows(matrix.x, examples), layout.rows(gradient, examples)
        weights = torch.stack([matrix.weight(d) for d in self._by_name])  # [direction, out, in]
        if len(weights) == 1:
            found = dot_of_one(g, x, weights[0])
        else:
            step = max(1, LARGEST // weights[0].numel())
            pairs = zip(torch.split(g, step), torch.split(x, step), strict=True)
            flat = weights.flatten(1).T
            found = torch.cat([_whole(b, a).flatten(1) @ flat for b, a in pairs])
        if matrix.bias is not None:
            found = found + g.sum(1) @ torch.stack([matrix.bias(d) for d in self._by_name]).T
        return found

    # -------------------------------------------------------------- the general way

    def _apart(self, batch: Any, examples: int, names: frozenset[str]) -> Tensor:
        """Return the part of some parameters, by whichever of two exact ways is shorter."""
        if not names:
            return self._zeros(examples)
        kept = [torch.full((p.numel(),), n in names) for n, p in self.point.parameters.items()]
        directions = self.directions * torch.cat(kept).to(self.directions)
        if 2 * len(directions) <= examples:
            function = partial(self.losses, batch=batch)
            columns = [self.point.derivative(function, d) for d in directions]
            return torch.stack(columns, 1).to(wide(self.point.device))
        with repeatable_attention(self.point.device):
            losses = self.point.call(partial(self.losses, batch=batch))
            rows = [
                self.point.flat(self.point.gradient(loss, retain_graph=True)) for loss in losses
            ]
        return torch.stack(rows) @ directions.T

    def _zeros(self, examples: int) -> Tensor:
        device = self.point.device
        return torch.zeros(examples, len(self.directions), dtype=wide(device), device=device)


def gradient_dots(
    point: Point, losses: LossFunction, batches: Iterable[Any], directions: Tensor
) -> Tensor:
    """Return ∇ℓᵢ · d for every example of some batches and every direction.

    Args:
        point: The model.
        losses: The loss of each example; examples must not depend on each other.
        batches: The examples.
        directions: Vectors ``[direction, P]``.

    Returns:
        Shape ``[example, direction]``, in double precision.
    """
    dots = GradientDots(point, losses, directions)
    return torch.cat([dots(batch) for batch in batches])


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
        with repeatable_attention(point.device):
            each = point.call(partial(losses, batch=batch))
            total += point.flat(point.gradient(each.sum()))
    return total * weight


def _whole(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradients of a weight in full, ``[example, out, in]``."""
    return g.transpose(1, 2) * x if x.shape[1] == 1 else g.transpose(1, 2) @ x


def _ones(losses: Tensor) -> list[Tensor]:
    return [torch.ones_like(losses)]
