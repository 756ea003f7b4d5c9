"""Adaptive nodes on a path: each new node goes where the path's increase of F is missed most.

Between two neighbouring nodes the increase of F is known, for F is computed with every gradient. So
the error of the quadrature is known piece by piece, Σ_k w_k · way · g_k − ΔF, and one node more
goes into the worst piece. On ReLU networks that closes in on the kinks, which rules with more and
more fixed nodes hit by chance. All gradients that were taken stay in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .line import Line
from .rules import FIRST, nodes

__all__ = ["HELD", "refine"]

HELD = 64
"""Most nodes whose gradients are kept. More would cost more memory than a pass through a model."""

Gap = Callable[[Tensor, Tensor], Tensor]
"""Scores and numbers of the examples -> their gap."""


def refine(line: Line, most: int, tolerance: float, gap_of: Gap) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate with Gauss–Legendre nodes, then refine each example until its gap is small.

    Args:
        line: The path.
        most: Most nodes, at most `HELD`.
        tolerance: Largest |gap| at which an example is done.
        gap_of: Computes the gap from the scores.

    Returns:
        Scores ``[example, …]``, nodes used and gap, ``[example]``. What is not finite is not
        refined.
    """
    alphas, weights = nodes("gauss-legendre", min(FIRST, most))
    pieces = _Pieces(line, alphas)
    scores = pieces.scores(weights.expand(len(line.rows), -1))
    used, gap = torch.full_like(line.rows, len(alphas)), gap_of(scores, line.rows)
    while pieces.count < most:
        missed = gap[pieces.rows].abs()
        pieces.keep((missed > tolerance) & missed.isfinite())
        if not len(pieces.rows):
            break
        pieces.split()
        rows = pieces.rows
        scores[rows] = pieces.scores(pieces.weights())
        used[rows], gap[rows] = pieces.count, gap_of(scores[rows], rows)
    return scores, used, gap


class _Pieces:
    """Gradients at some nodes of each example; between the nodes lie the pieces of its path.

    Numbers of nodes and pieces are kept on the CPU in float64, sorted along the path: nodes α_k,
    values F_k and slopes d_k = way · g_k, each ``[row, node]``.
    """

    def __init__(self, line: Line, alphas: Tensor) -> None:
        self.line, self.rows = line, line.rows
        self.alphas = alphas.expand(len(self.rows), -1)
        self.gradients: list[Tensor] = []
        self.values = self.slopes = self.alphas[:, :0]
        self.start, self.end = _exact(line.end - line.change), _exact(line.end)
        self._take(self.alphas)

    @property
    def count(self) -> int:
        """Number of nodes of an example."""
        return self.alphas.shape[1]

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the examples.

        Args:
            chosen: Boolean, ``[row]``.
        """
        if bool(chosen.all()):
            return
        self.rows = self.rows[chosen]
        self.gradients = [gradient[chosen] for gradient in self.gradients]
        here = chosen.cpu()
        self.alphas, self.values = self.alphas[here], self.values[here]
        self.slopes, self.start, self.end = self.slopes[here], self.start[here], self.end[here]

    def weights(self) -> Tensor:
        """Return the weights: half of the pieces on either side, all of the first and the last."""
        order = self.alphas.argsort(1)
        length = _edged(self.alphas.gather(1, order), 0.0, 1.0).diff(dim=1)
        share = torch.full_like(length, 0.5)
        share[:, 0] = share[:, -1] = 1.0
        part = length * share
        before, after = part[:, :-1], part[:, 1:]
        return torch.empty_like(self.alphas).scatter_(1, order, before + after)

    def split(self) -> None:
        """Put one node more into the worst piece of each example."""
        order = self.alphas.argsort(1)
        alphas = _edged(self.alphas.gather(1, order), 0.0, 1.0)
        values = self.values.gather(1, order)
        values = torch.cat([self.start[:, None], values, self.end[:, None]], 1)
        slopes = self.slopes.gather(1, order)
        slopes = torch.cat([slopes[:, :1], slopes, slopes[:, -1:]], 1)
        mean = (slopes[:, 1:] + slopes[:, :-1]) / 2
        error = (mean * alphas.diff(dim=1) - values.diff(dim=1)).abs()
        # The first of those that are as bad as the worst: rounding must not decide between equals.
        worst = (error >= 0.99 * error.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        left, right = (alphas.gather(1, (worst + i)[:, None]) for i in (0, 1))
        # In the middle; at the ends where three equal parts have their own nodes in the middle.
        place = torch.full_like(left, 0.5)
        place[worst == 0], place[worst == self.count] = 1 / 3, 2 / 3
        new = left + place * (right - left)
        self._take(new)
        self.alphas = torch.cat([self.alphas, new], 1)

    def scores(self, weights: Tensor) -> Tensor:
        """Return (x − x′) · Σ_k w_k g_k.

        Args:
            weights: Weights w_k, ``[row, node]``.

        Returns:
            Shape ``[row, …]``.
        """
        way = self.line.way[self.rows]
        total = way.new_zeros(way.shape)
        for gradient, weight in zip(self.gradients, weights.unbind(1), strict=True):
            total.addcmul_(gradient, weight.to(way).view(-1, *[1] * (way.ndim - 1)))
        return total.mul_(way)

    def _take(self, alphas: Tensor) -> None:
        way = self.line.way[self.rows]
        for value, gradient in self.line.sampled(alphas.t(), self.rows):
            slope = (gradient * way).flatten(1).sum(1)
            self.gradients.append(gradient)
            self.values = torch.cat([self.values, _exact(value)[:, None]], 1)
            self.slopes = torch.cat([self.slopes, _exact(slope)[:, None]], 1)


def _edged(values: Tensor, first: float, last: float) -> Tensor:
    edge = values[:, :1]
    return torch.cat([torch.full_like(edge, first), values, torch.full_like(edge, last)], 1)


def _exact(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)
