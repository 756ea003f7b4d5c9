"""Paths of real words: from a token's embedding to a baseline, by way of other tokens' embeddings.

A path depends on the token and its baseline alone, so it is the same in every batch.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Strategy", "word_paths"]

Strategy: TypeAlias = Literal["greedy", "maxcount"]
"""How the next word is chosen: the one that has to be moved least, or in the fewest dimensions."""

NUMBERS = 2**22
"""Most numbers that one portion of the search holds."""


def word_paths(
    table: Tensor,
    ids: Tensor,
    ends: Tensor,
    steps: int,
    strategy: Strategy = "greedy",
    neighbours: int = 100,
) -> Tensor:
    """Return paths that pass near embeddings of words and are monotone in every dimension.

    From the word where the path is, the next one is chosen out of its nearest neighbours c in the
    table. In dimensions in which c lies between the point p and the end b the path moves to c, in
    all others by 1/(steps left) of what is left to b. ``"greedy"`` takes the c that is nearest to
    the point so found, ``"maxcount"`` the one that is between in most dimensions.

    Args:
        table: Embeddings of all words, ``[word, channel]``.
        ids: Where the paths begin, ``[path]``.
        ends: Where they end, ``[path, channel]``.
        steps: Number of pieces.
        strategy: How the next word is chosen.
        neighbours: Number of words to choose from.

    Returns:
        ``[steps + 1, path, channel]``, beginning at the words and ending at ``ends``.

    Example:
        >>> table = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> word_paths(table, torch.tensor([2]), torch.zeros(1, 1), steps=2).flatten().tolist()
        [2.0, 1.0, 0.0]
    """
    count = min(neighbours, len(table) - 1)
    if not len(ids):
        return ends.new_zeros(steps + 1, *ends.shape)
    held = max(len(table), count * table.shape[1])
    portion = max(1, NUMBERS // held)
    parts = [
        _portion(table, some, end, steps, (strategy, count))
        for some, end in zip(torch.split(ids, portion), torch.split(ends, portion), strict=True)
    ]
    return torch.cat(parts, 1)


def _portion(
    table: Tensor, ids: Tensor, ends: Tensor, steps: int, choice: tuple[Strategy, int]
) -> Tensor:
    strategy, count = choice
    point = table[ids]
    points, anchors = [point], ids
    squares = table.square().sum(1)
    for left in range(steps, 1, -1):
        if count:
            near = _nearest(table, squares, anchors, count)
            words = table[near]
            # From where the path is, not from the word: so it never turns back.
            moved, between = _moved(point, words, ends, left)
            best = _best(moved, words, between, strategy)
            point = moved.gather(1, best[:, None, None].expand(-1, 1, table.shape[1]))[:, 0]
            anchors = near.gather(1, best[:, None])[:, 0]
        else:
            point = point + (ends - point) / left
        points.append(point)
    return torch.stack([*points, ends])


def _nearest(table: Tensor, squares: Tensor, anchors: Tensor, count: int) -> Tensor:
    distances = squares - 2 * table[anchors] @ table.t()
    distances.scatter_(1, anchors[:, None], float("inf"))  # Not the word itself.
    return distances.topk(count, 1, largest=False).indices


def _moved(point: Tensor, words: Tensor, ends: Tensor, left: int) -> tuple[Tensor, Tensor]:
    point, ends = point[:, None], ends[:, None]
    low, high = torch.minimum(point, ends), torch.maximum(point, ends)
    between = (words >= low) & (words <= high)
    return torch.where(between, words, point + (ends - point) / left), between


def _best(moved: Tensor, words: Tensor, between: Tensor, strategy: Strategy) -> Tensor:
    if strategy == "maxcount":
        return between.sum(2).argmax(1)
    return (moved - words).square().sum(2).argmin(1)
