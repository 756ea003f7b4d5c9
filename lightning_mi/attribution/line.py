"""The straight line from a baseline to the inputs, and integrals of the gradient along it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .asking import everything, slope
from .entry import Entry
from .question import Question, widened

__all__ = ["Line"]

PORTION = {"cpu": 2**18, "cuda": 2**24}
"""Bytes of points and outputs that one pass should hold.

One pass takes one node for every example, and several only while that stays within these bytes:
on a processor's cache small portions are fastest, on a graphics card large ones are.
"""


class Line:
    """A model along x′ + α(x − x′), 0 ≤ α ≤ 1, for every example of a batch.

    Args:
        entry: The model and its inputs x.
        question: The target F.
        start: The baseline x′, in the precision of the sums.

    Attributes:
        end: F(x), ``[example]``.
        change: F(x) − F(x′), ``[example]``.
        size: max(|F(x)|, |F(x′)|), ``[example]``.
        rows: Numbers of the examples.
        separable: Whether examples can be stacked and left out: not where the model mixes the
            examples of its batch, or counts on its size.
        dtype: Precision of the inputs, which the scores get back.
    """

    def __init__(self, entry: Entry, question: Question, start: Tensor) -> None:
        self.entry, self.question, self.start = entry, question, start
        point = entry.point
        self.dtype = point.dtype
        self.way = widened(point) - start
        self.rows = everything(entry)
        self.end = question(entry.outputs, self.rows)
        begin = self._narrowed_begin(widened(point))
        self.change = self.end - begin
        self.size = torch.maximum(self.end.abs(), begin.abs())

    def integrate(self, alphas: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """Return (x − x′) · Σ_k w_k ∂F/∂x(x′ + α_k (x − x′)).

        Args:
            alphas: Nodes α_k, float64 on the CPU.
            weights: Weights w_k.
            rows: For which examples, ``[row]``.

        Returns:
            Shape ``[row, …]``.
        """
        if not self.separable:
            return self._sum(alphas, weights, self.rows, 1)[rows]
        return self._sum(alphas, weights, rows, self._nodes_a_pass(len(rows)))

    def sampled(self, alphas: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield F and its gradient at nodes that may differ from example to example.

        Args:
            alphas: Nodes, ``[node, row]``, float64 on the CPU.
            rows: For which examples, ``[row]``; all of them if the path is not `separable`.

        Yields:
            For each node F ``[row]`` and ∂F/∂x ``[row, …]``, without a graph.
        """
        start, way = self.start[rows], self.way[rows]
        many = self._nodes_a_pass(len(rows)) if self.separable else 1
        for part in torch.split(alphas, many):
            scale = part.to(way).view(*part.shape, *[1] * (way.ndim - 1))
            value, gradient = self._at((start + scale * way).flatten(0, 1), rows)
            yield from zip(value.chunk(len(part)), gradient.chunk(len(part)), strict=True)

    def _sum(self, alphas: Tensor, weights: Tensor, rows: Tensor, many: int) -> Tensor:
        whole = len(rows) == len(self.rows)
        start, way = (self.start, self.way) if whole else (self.start[rows], self.way[rows])
        total = way.new_zeros(way.shape)  # Contiguous, whatever the form of the inputs.
        for points, weight in _portions(start, way, alphas, weights, many):
            gradient = self._at(points, rows)[1].reshape(len(weight), -1)
            # In place and without a graph, so that memory stays what one pass needs.
            total.view(-1).addmv_(gradient.t(), weight)
        return total.mul_(way)

    def _at(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = points.requires_grad_()
        value = self.question(self.entry.run(leaf, rows), rows)
        return value.detach(), slope(self.entry, self.question, value, (leaf,))[0]

    def _nodes_a_pass(self, examples: int) -> int:
        point, output = self.start[0], self.entry.outputs[0]
        held = point.numel() * point.element_size() + output.numel() * output.element_size()
        portion = PORTION.get(point.device.type, PORTION["cpu"])
        return max(1, portion // (held * examples))

    def _narrowed_begin(self, point: Tensor) -> Tensor:
        """Return F(x′), and find out whether it is enough to unembed the position that is read."""
        self.entry.reads = self.question.reads if self.entry.head is not None else None
        if self.entry.reads is not None:
            try:
                begin = self._begin(point)
                if self.separable:  # So the target at the inputs is what it was.
                    return begin
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                pass  # The model goes on with its logits, and wants all of them.
            self.entry.reads = None
        return self._begin(point)

    @torch.no_grad()
    def _begin(self, point: Tensor) -> Tensor:
        """Return F(x′), and find out whether examples can be stacked and left out."""
        try:
            both = torch.cat([point, self.start])
            end, begin = self.question(self.entry.run(both, self.rows), self.rows).chunk(2)
            slack = 1e-2 if self.dtype.itemsize < 4 else 1e-3
            self.separable = bool((end - self.end).abs().max() <= slack * self.end.abs().max())
        except (RuntimeError, ValueError, IndexError):
            self.separable = False  # The forward pass counts on the size of its batch.
        if self.separable:
            return begin
        return self.question(self.entry.run(self.start, self.rows), self.rows)


def _portions(
    start: Tensor, way: Tensor, alphas: Tensor, weights: Tensor, many: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the points of a few nodes at a time, stacked along the first axis, and the weights."""
    for alpha, weight in zip(torch.split(alphas, many), torch.split(weights, many), strict=True):
        scale = alpha.to(way).view(-1, *[1] * way.ndim)
        yield (start + scale * way).flatten(0, 1), weight.to(way)
