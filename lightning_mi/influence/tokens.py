"""Scores of language-model examples, split over their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import attention_mask_of
from ..task import IGNORED, NextToken
from .point import Point, wide
from .result import TokenShares

__all__ = ["text_ids", "token_shares"]


def token_shares(
    point: Point,
    task: NextToken,
    batch: Any,
    indices: list[int],
    direction: Tensor,
    constant: float = 0.0,
) -> TokenShares:
    """Split ∇ℓᵢ · d + c over the tokens of each example.

    ℓᵢ is the mean of the losses of its predicted tokens, so the derivative of each of them along d
    is the token's own share. c belongs to no token and is spread over them evenly.

    Args:
        point: The model.
        task: Gives the loss of every token.
        batch: The examples.
        indices: Their dataset indices.
        direction: d, a vector ``[P]``.
        constant: c, what the score contains beside the loss (the regulariser's part).

    Returns:
        The shares, each on the token that was predicted.
    """
    slopes = point.derivative(
        lambda m: task.token_losses(task.outputs(m, batch), batch), direction
    ).to(wide(point.device))
    known = (task.labels(batch) != IGNORED).to(slopes)
    shares = (slopes + constant * known) / known.sum(1, keepdim=True).clamp(min=1)
    ids = text_ids(task, batch)
    values = torch.cat([torch.zeros_like(shares[:, :1]), shares], 1)[:, : ids.shape[1]]
    return TokenShares(tuple(indices), values.cpu(), ids.cpu())


def text_ids(task: NextToken, batch: Any) -> Tensor:
    """Return the ids that were read and, where it is known, the one after the last of them."""
    ids, labels = task.inputs(batch), task.labels(batch)
    mask = attention_mask_of(batch)
    if mask is not None:
        ids = ids.masked_fill(mask[:, : ids.shape[1]] == 0, -1)
    last = labels[:, -1:].masked_fill(labels[:, -1:] == IGNORED, -1)
    return torch.cat([ids, last], 1) if bool((last >= 0).any()) else ids
