"""Gradients of queries, several at a time where that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..batch import batch_size
from ..measurement import IndexedData
from ..target import Target
from .blocks import dense_all
from .data import chunks, of_one_shape
from .gathered import Gathered
from .objective import Objective
from .outputs import slope_of_query
from .per_example import mean_gradient
from .point import Point

__all__ = ["asked_gradients", "loss_gradients"]

MANY = 2**25
"""Entries of gradients that exist at once."""


def asked_gradients(
    point: Point, objective: Objective, query: Target, data: IndexedData, size: int | None = None
) -> Tensor:
    """Return ∇L_q of every example of a data set, each asked about by itself.

    Args:
        point: The model.
        objective: Gives outputs.
        query: What is asked about.
        data: The examples. Where all have one shape, so that none pads another, they are run
            several at a time.
        size: Examples run at once.

    Returns:
        Shape ``[query, P]``, in double precision.
    """
    indices = range(len(data))
    if objective.asks_by_itself(query) or not of_one_shape(data):
        losses = partial(objective.query_losses, query=query)
        singles = chunks(data, indices, 1, point)
        return torch.stack([mean_gradient(point, losses, [batch]) for batch in singles])
    return _rows(point, objective, query, data, indices, size)


def loss_gradients(
    point: Point,
    objective: Objective,
    data: IndexedData,
    indices: Sequence[int],
    size: int | None = None,
) -> Iterator[Tensor]:
    """Yield ∇ℓᵢ of training examples, so many at a time that they have `MANY` entries.

    Args:
        point: The model.
        objective: Gives outputs and losses.
        data: The examples.
        indices: Which of them.
        size: Examples run at once.

    Yields:
        Shape ``[example, P]``, in double precision; the examples in order.
    """
    step = max(1, MANY // point.size)
    for start in range(0, len(indices), step):
        yield _rows(point, objective, None, data, indices[start : start + step], size)


def _rows(
    point: Point,
    objective: Objective,
    query: Target | None,
    data: IndexedData,
    indices: Sequence[int],
    size: int | None,
) -> Tensor:
    gathered, rows = Gathered(point, objective, lambda: ()), []
    for batch in chunks(data, indices, size, point):
        if query is None:
            pieces = gathered.own(batch)
        else:
            pieces = gathered.of(batch, partial(slope_of_query, query, batch=batch))
        rows.append(dense_all(gathered.blocks, pieces, batch_size(batch), point.size))
    return torch.cat(rows) if len(rows) > 1 else rows[0]
