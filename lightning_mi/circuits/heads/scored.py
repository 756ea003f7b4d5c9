"""Head tables of one firing: on repeated tokens with their controls, or on given tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import tap
from ...batch import main_input
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...inferring import infer_task
from ...measurement import Context
from ...task import NextToken, Task
from .entries import Entries, queries_of
from .layout import layout_of
from .survey import survey
from .table import HeadTable, head_table

__all__ = ["Scored", "scored"]

MATCHED = ("induction", "duplicate_token")
"""Scores that depend on what the tokens are: their matched null has other tokens."""


@dataclass(frozen=True)
class Scored:
    """Head tables of one firing, shared by all measurements that need them."""

    main: HeadTable
    control: HeadTable | None
    protocol: RepeatedTokens | None
    losses: Tensor | None
    convention: dict[str, Any]
    causal: bool = True


def scored(model: nn.Module, context: Context, tokens: RepeatedTokens | None) -> Scored:
    """Return the head tables of a firing, computed once.

    Args:
        model: The user's model.
        context: Batch, task and memo.
        tokens: The protocol, or None for the batch's own tokens.

    Returns:
        The tables.

    Raises:
        ArgumentError: If tokens are no protocol.
    """
    if tokens is not None and not isinstance(tokens, RepeatedTokens):
        raise ArgumentError.of(
            "tokens",
            expected="a RepeatedTokens protocol, or None",
            got=f"a {type(tokens).__name__}",
            do="Pass for example RepeatedTokens(length=25); head_scores takes token ids.",
        )
    key: Hashable = ("circuits.heads", tokens)

    def compute() -> Scored:
        with torch.no_grad():
            if tokens is None:
                return _given(model, context)
            return _repeated(model, context, tokens)

    return context.shared(key, compute)


def _given(model: nn.Module, context: Context) -> Scored:
    _require_ids(model, context)
    ids = context.task.inputs(context.batch)
    seen = survey(model, context.task)
    layout = layout_of(context.batch, ids)
    table = head_table(model, context.task, ids, layout, stop_after=seen.sites - 1)
    convention = {"protocol": "given tokens", "sequences": len(ids), "positions": ids.shape[1]}
    return Scored(table, None, None, None, convention, seen.causal)


def _repeated(model: nn.Module, context: Context, tokens: RepeatedTokens) -> Scored:
    task = _task(model, context)
    seen = survey(model, task)
    special = tuple(sorted({*tokens.special, *seen.special}))
    protocol = dataclasses.replace(tokens, special=special)
    protocol = protocol.fitted(seen.vocabulary_size, _room(context, seen.context_length))
    ids = protocol.tokens().to(context.device)
    main = head_table(model, task, ids)
    control = _control(model, task, protocol, ids, len(main.modules) - 1)
    losses = None
    if isinstance(task, NextToken) and main.outputs is not None and main.outputs.ndim == 3:
        # One sequence at a time: log-probabilities of a large vocabulary are large as well.
        pairs = zip(main.outputs, ids, strict=True)
        rows = [NextToken().token_losses(o[None].float(), i[None]) for o, i in pairs]
        losses = torch.cat(rows) if seen.causal else None
    convention = {
        "protocol": "repeated random tokens",
        "length": protocol.length,
        "repeats": protocol.repeats,
        "sequences": protocol.sequences,
        "seed": protocol.seed,
        "bos": protocol.bos,
        "special": protocol.special,
        "vocabulary_size": protocol.vocabulary_size,
    }
    return Scored(main, control, protocol, losses, convention, seen.causal)


def _control(
    model: nn.Module, task: Task, protocol: RepeatedTokens, ids: Tensor, last: int
) -> HeadTable:
    """Score the matched control and the random periods in one pass that ends at the last site."""
    matched = protocol.matched().to(ids.device)
    varied = protocol.random_period().to(ids.device)
    tokens = torch.cat([matched, varied])
    same = Entries.of(ids)
    own = Entries.of(varied).triples("induction")
    beside = _one_beside(ids)
    names = (*(f"{name}_matched_null" for name in (*MATCHED, *beside)), "induction_random_period")
    lists = [*(same.triples(name) for name in MATCHED), *beside.values()]
    lists.append(own + own.new_tensor([len(matched), 0, 0]))
    entries = Entries.join(names, lists, tokens)
    return head_table(model, task, tokens, entries=entries, stop_after=last)


def _one_beside(ids: Tensor) -> dict[str, Tensor]:
    """Return for the scores that only read positions the entries one position further."""
    example, query, first = queries_of(ids, least=3).unbind(1)
    return {
        "previous_token": torch.stack([example, query, query - 2], 1),
        "current_token": torch.stack([example, query, query - 1], 1),
        "first_position": torch.stack([example, query, first + 1], 1),
    }


def _task(model: nn.Module, context: Context) -> Task:
    if context.has_batch:
        _require_ids(model, context)
        return context.task
    try:
        return context.task
    except ArgumentError:  # neither task nor batch: two tokens show how the model is called
        return infer_task(model, torch.ones(1, 2, dtype=torch.long, device=context.device))


def _require_ids(model: nn.Module, context: Context) -> None:
    inputs = main_input(context.batch)
    if inputs.ndim == 2 and not inputs.is_floating_point():
        return
    with tap(model, keep=False):  # A model without attention is told so first.
        context.task.outputs(model, context.batch)
    raise ArgumentError.of(
        "batch",
        expected="token ids [example, position], the input of a language model",
        got=f"inputs {tuple(inputs.shape)} of {str(inputs.dtype)[6:]}",
        do="Head scores are defined by repeated tokens; use lightning_mi.attention.tap to look at "
        "the attention of other models.",
    )


def _room(context: Context, seen: int | None) -> int | None:
    """Return the longest sequence that a model is known to take."""
    if seen is not None or not context.has_batch:
        return seen
    return context.task.inputs(context.batch).shape[1]
