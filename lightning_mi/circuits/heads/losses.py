"""What context is worth: the in-context-learning score and the gain of a second copy.

Index convention: ``losses[b, t]`` is the loss of predicting the token at index t + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...behaviors import RepeatedTokens

__all__ = ["copy_losses", "icl_indices", "icl_score", "icl_slope"]


def icl_indices(positions: int) -> tuple[int, int]:
    """Return the early and the late index that `icl_score` compares.

    Args:
        positions: T, number of tokens of a sequence.

    Returns:
        (50, 500) as in Olsson et al. (2022) where a sequence has both, else (⌈T/10⌉, T − 1).

    Example:
        >>> icl_indices(64)
        (7, 63)
    """
    return (50, 500) if positions > 500 else (max(1, math.ceil(positions / 10)), positions - 1)


def icl_score(losses: Tensor, known: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Return loss at a late index − loss at an early one (Olsson et al. 2022).

    Negative: the model makes use of context. The mean is over sequences in which both indices are
    known; indices count from a sequence's first known one.

    Args:
        losses: Loss of each next token, ``[example, position]``, nats.
        known: Where there is a next token, the same shape; None means everywhere.

    Returns:
        A scalar in nats (NaN where no sequence is long enough), and the two indices.

    Example:
        >>> icl_score(torch.linspace(4.0, 1.0, 31)[None])
        (tensor(-2.7000), (4, 31))
    """
    known = torch.ones_like(losses, dtype=torch.bool) if known is None else known.bool()
    first = known.float().argmax(1)
    lengths = torch.where(known, torch.arange(known.shape[1], device=known.device), -1).amax(1)
    positions = int((lengths - first).max()) + 2 if losses.numel() else 0
    early, late = icl_indices(positions)
    values, defined = [], torch.ones_like(first, dtype=torch.bool)
    for index in (early, late):
        column = first + index - 1
        inside = column.clamp(max=losses.shape[1] - 1)[:, None]
        defined &= (column < losses.shape[1]) & known.gather(1, inside)[:, 0]
        values.append(losses.gather(1, inside)[:, 0])
    return (values[1] - values[0])[defined].mean(), (early, late)


def icl_slope(losses: Tensor, known: Tensor | None = None) -> Tensor:
    """Return ∂loss / ∂ln(index), a least-squares slope over all indices: a check on `icl_score`.

    Args:
        losses: Loss of each next token, ``[example, position]``, nats.
        known: Where there is a next token; None means everywhere.

    Returns:
        A scalar in nats; negative: later tokens are predicted better.
    """
    known = torch.ones_like(losses, dtype=torch.bool) if known is None else known.bool()
    first = known.float().argmax(1, keepdim=True)
    index = torch.arange(1, losses.shape[1] + 1, device=losses.device) - first
    x, y = index.clamp(min=1).to(losses.dtype).log()[known], losses[known]
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / x.square().sum()


def copy_losses(losses: Tensor, tokens: RepeatedTokens) -> tuple[Tensor, Tensor]:
    """Return the mean loss in the first copy, and in the later copies, of repeated tokens.

    Both are over the tokens r_2 … r_L, each predicted from inside its own copy: where r_L is
    followed by r_1 nothing could be known the first time. Their difference is the gain of copying.

    Args:
        losses: Loss of each next token, ``[sequence, position]``, nats.
        tokens: The protocol that made the sequences.

    Returns:
        Two scalars in nats.
    """
    end = tokens.start + tokens.length * tokens.repeats
    copies = losses[:, tokens.start : end]
    if copies.shape[1] < tokens.length * tokens.repeats:  # the last token predicts nothing
        copies = torch.nn.functional.pad(
            copies, (0, tokens.length * tokens.repeats - copies.shape[1])
        )
    copies = copies.reshape(len(losses), tokens.repeats, tokens.length)[:, :, :-1]
    return copies[:, 0].mean(), copies[:, 1:].mean()
