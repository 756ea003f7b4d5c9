"""What the methods that follow attention share: from which token, and over which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..attention import Site
from ..batch import attention_mask_of
from ..errors import ArgumentError, ModelError, NoAttentionError
from .entry import Entry
from .question import Question

__all__ = ["Placed", "Query", "check_query", "follow", "place", "reader", "self_attention"]

Query: TypeAlias = int | Literal["mean"] | None
"""A position, the mean over all positions, or None: the position that the target reads."""


def self_attention(sites: Sequence[Site], model: nn.Module, examples: int) -> list[Site]:
    """Return the sites, if relevance can be followed through them from layer to layer.

    Args:
        sites: In the order they ran in.
        model: For the message.
        examples: Number of examples.

    Returns:
        The sites.

    Raises:
        NoAttentionError: If there are none.
        ModelError: If one of them attends to another sequence, or to windows of this one.
    """
    if not sites:
        raise NoAttentionError(
            f"model: expected attention in {type(model).__name__}, got a forward pass without any. "
            "Explain this model by integrated_gradients or attn_lrp."
        )
    length = sites[0].z.shape[2]
    for site in sites:
        if site.cross or tuple(site.z.shape[::2][:2]) != (examples, length):
            raise ModelError(
                f"model: expected every attention of {type(model).__name__} to run over one "
                f"sequence of {length} positions for each of {examples} examples, got z of shape "
                f"{tuple(site.z.shape)} with {site.k.shape[2]} keys in {site.module!r}. Attention "
                "cannot be followed through cross-attention, windows or pooled sequences; use "
                "integrated_gradients or attn_lrp."
            )
    return list(sites)


def check_query(query: Query) -> None:
    """Refuse what names no position.

    Args:
        query: What the user gave.

    Raises:
        ArgumentError: If it is neither an int, nor "mean", nor None.
    """
    if query is not None and query != "mean" and type(query) is not int:
        raise ArgumentError.of(
            "query",
            expected="a position, 'mean' or None",
            got=repr(query),
            do="None takes the position that the target reads, else the first (CLS).",
        )


def reader(entry: Entry, question: Question, query: Query, sites: Sequence[Site]) -> Tensor:
    """Return how much the target reads of each position, adding up to 1.

    Args:
        entry: The model and its inputs.
        question: What was asked.
        query: What the user gave.
        sites: All attentions of the model.

    Returns:
        Shape ``[example, position]``: one-hot, or uniform over the positions that are no padding.

    Raises:
        ArgumentError: If the position does not exist.
    """
    length = sites[0].z.shape[2]
    real = _real(entry, length)
    if query is None and question.position is None and _extra(entry, length) == 0:
        query = "mean"  # No token stands for the whole image: it was pooled over all.
    if query == "mean":
        return real / real.sum(1, keepdim=True)
    steps = torch.arange(length, device=real.device)
    last = torch.where(real > 0, steps, -1).amax(1)
    if query is None:
        index = question.position
        if index is None:  # The first (CLS); where no position sees a later one, the last.
            index = last if _causal(sites) else torch.where(real > 0, steps, length).amin(1)
    else:
        index = last + 1 + query if query < 0 else torch.full_like(last, query)
    if bool((index < 0).any()) or bool((index >= length).any()):
        raise ArgumentError.of(
            "query",
            expected=f"a position among {length}",
            got=query if query is not None else index.tolist(),
            do="Negative positions count from the last one that is not padding.",
        )
    return nn.functional.one_hot(index, length).to(real)


def follow(start: Tensor, sites: Sequence[Site], step: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Carry relevance from the last layer to the first.

    Args:
        start: ``[example, position]``.
        sites: In the order they ran in.
        step: ``(number of the site, row) -> row``.

    Returns:
        Shape ``[example, position]``.
    """
    row = start
    for index in reversed(range(len(sites))):
        row = step(index, row)
    return row


@dataclass(frozen=True, eq=False)
class Placed:
    """Scores of positions, laid over the inputs.

    Args:
        values: ``[example, position]``, or ``[example, y, x]`` for images.
        axes: Names of their axes.
        convention: How pixels were made of positions.
    """

    values: Tensor
    axes: tuple[str, ...]
    convention: dict[str, Any]


def place(entry: Entry, scores: Tensor) -> Placed:
    """Lay scores of positions over the inputs.

    The tokens of an image are the patches of a grid, row by row, after such as stand for no
    patch; every pixel gets the score of its patch.

    Args:
        entry: The model and its inputs.
        scores: ``[example, position]``.

    Returns:
        The scores.

    Raises:
        ModelError: If the inputs are ids, and attention runs over another number of positions.
    """
    length, shape = scores.shape[1], entry.inputs.shape
    if entry.is_tokens and shape[1:].numel() != length:
        raise ModelError(
            f"model: expected attention over the {shape[1:].numel()} tokens of the inputs, got "
            f"{length} positions. Which position belongs to which token cannot be told; use "
            "integrated_gradients or attn_lrp."
        )
    extra = _extra(entry, length)
    if len(shape) != 4 or extra is None:
        return Placed(scores, ("example", "position"), {})
    size = _patch(shape, length - extra)
    grid = scores[:, extra:].reshape(len(scores), shape[2] // size, shape[3] // size)
    pixels = grid.repeat_interleave(size, 1).repeat_interleave(size, 2)
    said = {"patch": size, "left_out": extra, "of_a_pixel": "the score of its patch"}
    return Placed(pixels, ("example", "y", "x"), said)


def _extra(entry: Entry, length: int) -> int | None:
    """Return how many leading tokens are no patches of an image (CLS, registers), if it is one."""
    shape = entry.inputs.shape
    if len(shape) != 4:
        return None
    found = (k for k in range(min(length, 9)) if _patch(shape, length - k))
    return next(found, None)


def _patch(shape: torch.Size, patches: int) -> int:
    """Return the side of square patches that cut an image into so many, or 0."""
    height, width = shape[2:]
    side = round((height * width / max(patches, 1)) ** 0.5)
    fits = side and not height % side and not width % side
    return side if fits and (height // side) * (width // side) == patches else 0


def _causal(sites: Sequence[Site]) -> bool:
    return not any(bool(site.pattern().triu(1).any()) for site in sites)


def _real(entry: Entry, length: int) -> Tensor:
    mask = attention_mask_of(entry.batch)
    if mask is None or tuple(mask.shape) != (len(entry.inputs), length):
        return torch.ones(len(entry.inputs), length, device=entry.inputs.device)
    return mask.bool().float()
