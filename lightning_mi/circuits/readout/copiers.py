"""Copying and anti-copying as roles: read off the weights, against shuffled tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import LightningMIError
from ...measurement import Context

__all__ = ["Copied", "copied"]

SAMPLE, SHUFFLES = 4096, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Copied:
    """Eigenvalue copying scores and their matched null.

    Args:
        scores: ``[layer, head]``, in [−1, 1].
        matched: The largest absolute score under three shuffles of the tokens that W_U stands for:
            the same weights, which then copy nothing.
        reason: Why there are none, or empty.
        approximate: Why they say less than they seem to, empty where they are exact.
    """

    scores: Tensor
    matched: Tensor
    reason: str = ""
    approximate: tuple[str, ...] = ()


def copied(model: nn.Module, context: Context, shape: torch.Size, seed: int = 0) -> Copied:
    """Return how much each head copies, computed once a firing.

    Args:
        model: The user's model, in evaluation mode.
        context: Batch, task and memo.
        shape: Layers and heads of other scores.
        seed: Seed of the generator that shuffles.

    Returns:
        The scores; NaN with a reason where the weights cannot be read.
    """

    def compute() -> Copied:
        try:
            return _copied(model, context, shape, seed)
        except LightningMIError as error:
            nothing = torch.full(shape, torch.nan)
            return Copied(nothing, nothing, str(error))

    with torch.no_grad():
        return context.shared(("circuits.readout.copied", tuple(shape), seed), compute)


def _copied(model: nn.Module, context: Context, shape: torch.Size, seed: int) -> Copied:
    from ..weights import copying_score, vocabulary

    anatomy = shared_anatomy(model, context)
    task = context.task if context.has_batch else context.known_task
    tokens = vocabulary(anatomy, model=model, task=task, size=SAMPLE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    nulls = []
    for _ in range(SHUFFLES):
        order = torch.randperm(len(tokens.ids), generator=generator).to(tokens.ids.device)
        other = dataclasses.replace(tokens, unembedding=tokens.unembedding[:, order])
        nulls.append(copying_score(anatomy, tokens=other).abs())
    scores = copying_score(anatomy, tokens=tokens)
    if scores.shape != shape:
        nothing = torch.full(shape, torch.nan)
        return Copied(nothing, nothing, "the anatomy has other layers than the forward pass")
    approximate = tuple(anatomy.approximate(circuit="OV"))
    return Copied(scores, torch.stack(nulls).amax(0), approximate=approximate)
