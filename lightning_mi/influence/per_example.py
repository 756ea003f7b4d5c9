"""Products of per-example gradients with directions, without storing a per-example gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch import batch_size, cut
from .point import Point, repeatable_attention, wide
from .recording import Matrix, Recorder, Use

__all__ = ["GradientDots", "LossFunction", "gradient_dots", "mean_gradient"]

PROBE = 2
"""Examples in the pass that finds out which part of each layer's output is whose."""

LARGEST = 2**24
"""Entries of the per-example weight gradients of one layer that may exist at once."""


class LossFunction(Protocol):
    """The loss of each example."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return shape ``[example]``."""


@dataclass(frozen=True)
class Layout:
    """Which part of a tensor belongs to which example.

    Args:
        second: Examples are counted by the second dimension. Otherwise by the first, which may
            count the positions of each as well.
        tail: Shape of one example's part.
        verified: An example's gradient was seen in its own part and nowhere else. Where all
            gradients were zero this cannot be known.
    """

    second: bool
    tail: tuple[int, ...]
    verified: bool

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the tensor as ``[example, everything else]``."""
        return (tensor.transpose(0, 1) if self.second else tensor).reshape(examples, -1)

    def rows(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the tensor as ``[example, row, last dimension]``."""
        return self.split(tensor, examples).reshape(examples, -1, tensor.shape[-1])


@dataclass(frozen=True)
class Plan:
    """What a probing pass found out: how to read each use, and which parameters to do apart."""

    layouts: dict[str, Layout]
    through: frozenset[str]
    lost: frozenset[str]


class GradientDots:
    """∇ℓᵢ · d for every example i and every direction d.

    One forward and one backward pass to the layers' outputs, and one matrix product for each layer.
    A pass over the first two examples of a batch finds out how each layer lays its examples out
    (batch first or second, merged with positions or not) by seeing where one example's gradient
    goes; parameters for which this cannot be found out, or that enter in a way that is not known to
    be linear, are differentiated twice backwards instead. Both are exact.

    Args:
        point: The model.
        losses: The loss of each example; examples must not depend on each other.
        directions: Vectors ``[direction, P]`` in parameter space.
    """

    def __init__(self, point: Point, losses: LossFunction, directions: Tensor) -> None:
        self.point, self.losses, self.directions = point, losses, directions
        self.plan: Plan | None = None
        parts = dict(zip(point.parameters, point.shaped(directions), strict=True))
        self._by_name = [{n: t[d] for n, t in parts.items()} for d in range(len(directions))]

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
        if self.plan is None:
            self.plan = self._probe(batch)
        found = self._read(batch, examples, self.plan)
        if found is None:  # Laid out otherwise, for example padded to another length.
            self.plan = self._probe(batch)
            found = self._read(batch, examples, self.plan)
        if found is None:
            self.plan = Plan({}, frozenset(), frozenset(self.point.parameters))
            found = self._read(batch, examples, self.plan)
        total = self._zeros(examples) if found is None else found
        return total + self._apart(batch, examples, self.plan.lost)

    # -------------------------------------------------------------- the fast way

    def _record(self, batch: Any, plan: Plan) -> tuple[Tensor, Recorder]:
        wanted = {n: p for n, p in self.point.parameters.items() if n not in plan.lost}
        recorder = Recorder(wanted, plan.through)
        with recorder:
            losses = self.point.call(partial(self.losses, batch=batch))
        return losses, recorder

    @torch.no_grad()
    def _read(self, batch: Any, examples: int, plan: Plan) -> Tensor | None:
        """Return the part of all parameters that are not lost, or None if the plan does not fit."""
        total = self._zeros(examples)
        if len(plan.lost) == len(self.point.parameters):
            return total
        with repeatable_attention(self.point.device), torch.enable_grad():
            losses, recorder = self._record(batch, plan)
            gradients = _gradients(losses.sum(), recorder.uses)
        if recorder.lost:
            return None
        for use, gradient in zip(recorder.uses, gradients, strict=True):
            if gradient is None:
                continue
            layout = plan.layouts.get(use.key)
            if layout is None or not _fits(layout, use, examples) or not use.intact:
                return None
            if not layout.verified and bool(gradient.any()):
                return None
            total += self._contract(use, layout, gradient, examples)
        return total

    def _contract(self, use: Use, layout: Layout, gradient: Tensor, examples: int) -> Tensor:
        if use.matrix is not None:
            return self._multiply(use.matrix, layout, gradient, examples)
        g = layout.split(gradient, examples)
        pushed = (use.push(d).expand_as(gradient) for d in self._by_name)
        return torch.cat([_dot(layout.split(p, examples), g) for p in pushed], 1)

    def _multiply(self, matrix: Matrix, layout: Layout, gradient: Tensor, examples: int) -> Tensor:
        """Return the products with the gradients of a layer's weight and bias."""
        x, g = layout.rows(matrix.x, examples), layout.rows(gradient, examples)
        weights = torch.stack([matrix.weight(d) for d in self._by_name])  # [direction, out, in]
        if len(weights) == 1:  # Through the narrower side, which saves the larger product.
            wide_out = g.shape[-1] > x.shape[-1]
            found = _dot(g @ weights[0], x) if wide_out else _dot(x @ weights[0].T, g)
        elif x.shape[1] == 1:
            pushed = (x[:, 0] @ weights.flatten(0, 1).T).view(examples, *weights.shape[:2])
            found = torch.einsum("edo,eo->ed", pushed, g[:, 0])
        else:
            step = max(1, LARGEST // weights[0].numel())
            pairs = zip(torch.split(g, step), torch.split(x, step), strict=True)
            flat = weights.flatten(1).T
            found = torch.cat([(b.transpose(1, 2) @ a).flatten(1) @ flat for b, a in pairs])
        if matrix.bias is not None:
            found = found + g.sum(1) @ torch.stack([matrix.bias(d) for d in self._by_name]).T
        return found

    # -------------------------------------------------------------- finding the way

    def _probe(self, batch: Any) -> Plan:
        """Find a plan by passes over two examples, usually one or two of them."""
        small = cut(batch, PROBE)
        plan, unplaced = self._look(small, Plan({}, frozenset(), frozenset()))
        for _ in range(2):  # Look through what could not be placed: it may be made of parameters.
            if unplaced:
                through = plan.through | {use.key for use in unplaced}
                plan, unplaced = self._look(small, Plan({}, through, plan.lost))
        while unplaced:
            lost = plan.lost.union(*(use.roots for use in unplaced))
            plan, unplaced = self._look(small, Plan({}, plan.through, lost))
        return plan

    def _look(self, small: Any, plan: Plan) -> tuple[Plan, list[Use]]:
        """Return the plan with the layouts of one pass, and the uses that have none."""
        examples = batch_size(small)
        if len(plan.lost) == len(self.point.parameters):
            return plan, []
        with repeatable_attention(self.point.device):
            losses, recorder = self._record(small, plan)
            gradients = _gradients(losses[-1], recorder.uses, retain_graph=True)
        lost = recorder.lost | _unseen(losses, recorder, self.point)
        if lost:  # Start again without them: their other uses would be read in vain.
            return self._look(small, Plan({}, plan.through, plan.lost | lost))
        pairs = zip(recorder.uses, gradients, strict=True)
        found = [(use, _layout(use, gradient, examples)) for use, gradient in pairs]
        layouts = {use.key: layout for use, layout in found if layout is not None}
        return Plan(layouts, plan.through, plan.lost), [u for u, layout in found if layout is None]

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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a · b of each example as ``[example, 1]``, without a tensor of the products."""
    if a.element_size() < 4 or b.element_size() < 4:  # Long sums in half precision lose too much.
        a, b = a.float(), b.float()
    return (a.flatten(1)[:, None] @ b.flatten(1)[:, :, None])[:, 0]


def _gradients(loss: Tensor, uses: list[Use], **options: Any) -> list[Tensor | None]:
    if not uses or not loss.requires_grad:
        return [None] * len(uses)
    edges = [use.edge for use in uses]
    return list(torch.autograd.grad(loss, edges, allow_unused=True, **options))


def _layout(use: Use, gradient: Tensor | None, examples: int) -> Layout | None:
    """Return where the last example's gradient is alone, or None if nowhere."""
    for second in (False, True):
        tail = _tail(use.shape, second, examples)
        if tail is None:
            continue
        if gradient is None:
            return Layout(second, tail, False)
        layout = Layout(second, tail, bool(gradient.any()))
        if not bool(layout.split(gradient, examples)[:-1].any()):
            return layout
    return None


def _tail(shape: torch.Size, second: bool, examples: int) -> tuple[int, ...] | None:
    if not second:
        whole = len(shape) > 0 and shape[0] % examples == 0
        return (shape[0] // examples, *shape[1:]) if whole else None
    if len(shape) > 1 and shape[1] == examples:
        return (shape[0], *shape[2:])
    return None


def _fits(layout: Layout, use: Use, examples: int) -> bool:
    return _tail(use.shape, layout.second, examples) == layout.tail


def _unseen(losses: Tensor, recorder: Recorder, point: Point) -> set[str]:
    """Return parameters that enter the graph more often than the recorder saw.

    Custom autograd functions and compiled modules are not torch functions.
    """
    names = {id(p): n for n, p in point.parameters.items() if n in recorder.names}
    edges: Counter[str] = Counter()
    seen: set[Any] = set()
    ahead = [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        for following, _ in () if node is None else node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None:
                edges[name] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)
    return {name for name, count in edges.items() if count > recorder.reads[name]}
