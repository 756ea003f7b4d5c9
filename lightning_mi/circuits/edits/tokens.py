"""Suppressing and boosting tokens in the output head, and what else that touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...task import Task
from .edit import Edit, as_ids, output_head, swapped

__all__ = ["boost_tokens", "spellings", "suppress_tokens"]


def suppress_tokens(
    model: nn.Module,
    tokens: int | Sequence[int] | Tensor,
    *,
    amount: float = 10.0,
    example: Any,
    task: Task | None = None,
) -> Edit:
    """Lower the logits of tokens: a bias of the output head, so no direction is lost.

    Each logit is lowered by ``amount``, so the odds of a token against any other one are divided
    by exp(amount), wherever it stands. The output head gets a bias of its own meanwhile; a weight
    that it shares with the input embedding (tied weights) stays as it is, for both. Where the model
    scales what its head returns, the bias makes up for it; where it caps it (Gemma 2), logits near
    the cap move less.

    Args:
        model: The user's model.
        tokens: Which.
        amount: By how much, in logits (nats of odds).
        example: A batch that the model can be run on, to find the output head.
        task: How it is called; None calls it with the batch.

    Returns:
        The edit.

    Raises:
        ArgumentError: If a token is none, or no module returns the logits.
    """
    return _offset(model, tokens, -amount, example, task, f"suppress by {amount:g}")


def boost_tokens(
    model: nn.Module,
    tokens: int | Sequence[int] | Tensor,
    *,
    amount: float = 10.0,
    example: Any,
    task: Task | None = None,
) -> Edit:
    """Raise the logits of tokens; see `suppress_tokens`.

    Args:
        model: The user's model.
        tokens: Which.
        amount: By how much, in logits.
        example: A batch that the model can be run on.
        task: How it is called.

    Returns:
        The edit.

    Raises:
        ArgumentError: If a token is none, or no module returns the logits.
    """
    return _offset(model, tokens, amount, example, task, f"boost by {amount:g}")


def _offset(
    model: nn.Module, tokens: Any, amount: float, example: Any, task: Task | None, name: str
) -> Edit:
    head, factor = output_head(model, example, task or Task())
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or not isinstance(weight, Tensor):
        raise ArgumentError.of(
            "model",
            expected="an output head that is a Linear layer",
            got=type(head).__name__,
            do="Add the offset to the logits by a hook of your own.",
        )
    chosen = as_ids(tokens, len(weight))

    @contextmanager
    def opened() -> Iterator[None]:
        bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias.detach().clone()
        bias[chosen] += amount / factor
        with swapped(head, "bias", bias):
            yield

    return Edit(model, f"{name} of {len(chosen)} tokens", opened, tuple(chosen))


def spellings(tokenizer: Any, token: int) -> list[int]:
    """Return tokens that spell the same word in another way: other case, with or without a space.

    Args:
        tokenizer: With ``encode`` and ``decode``, as those of transformers.
        token: The token.

    Returns:
        Other single tokens, in a fixed order.

    Raises:
        ArgumentError: If the tokenizer cannot decode.
    """
    if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "encode"):
        raise ArgumentError.of(
            "tokenizer",
            expected="one with encode() and decode()",
            got=type(tokenizer).__name__,
            do="Or pass variants=[…], the ids of other spellings.",
        )
    text = tokenizer.decode([token])
    word = text.strip()
    if not word:
        return []
    found: list[int] = []
    for form in dict.fromkeys([word, word.lower(), word.upper(), word.capitalize()]):
        for space in ("", " "):
            ids = _encoded(tokenizer, space + form)
            if len(ids) == 1 and ids[0] != token and ids[0] not in found:
                found.append(ids[0])
    return found


def _encoded(tokenizer: Any, text: str) -> list[int]:
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except TypeError:
        ids = tokenizer.encode(text)
    return [int(i) for i in getattr(ids, "ids", ids)]
