"""Prompts that begin to repeat a block of tokens, and three ways to take the answer away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..behavior import Behavior, BehaviorLike
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .metrics import metric_of

__all__ = ["CORRUPTIONS", "Blocks", "Corruption", "copied", "distance", "partners", "shown_of"]

Corruption = Literal["answer", "trigger", "block"]

CORRUPTIONS = ("answer", "trigger", "block")


@dataclass(frozen=True)
class Blocks:
    """Blocks that are repeated, and where the repetition stops.

    Args:
        own: The blocks r ``[example, L]``.
        other: Blocks of the same shape that have nothing to do with them; their token k+1 is not
            that of ``own``.
        partner: For each example j, whose r_j changes places with the trigger r_k, ``[example]``,
            counted from 0; None where nothing is swapped.
        shown: k, tokens of the last copy that are shown.
        bos: Token in front, None for none.
        repeats: Number of copies, the last of which is cut.
    """

    own: Tensor
    other: Tensor
    partner: Tensor | None
    shown: int
    bos: int | None = None
    repeats: int = 2


def copied(blocks: Blocks, corruption: Corruption, metric: str, name: str) -> Behavior:
    """Return prompts [BOS] r_1 … r_L r_1 … r_k, whose answer is r_{k+1}.

    The corrupted prompts differ in the whole copies alone, never in the part that is shown again:

    - ``"answer"``: r_{k+1} is replaced by a token of the other block, which becomes the answer. An
      induction head still attends to the same place and copies something else: values change.
    - ``"trigger"``: r_k and r_j change places, so that r_k is now followed by r_{j+1}. An
      induction head attends to another place: what the previous-token head told its keys changes.
    - ``"block"``: the whole block is replaced by the other one; there is nothing to repeat. The
      wrong answer is token k+1 of the other block, at which a head that attends at a fixed
      distance would arrive.

    Positions, all in the last whole copy but the last: ``trigger`` (r_k), ``answer`` (r_{k+1}),
    ``last`` (r_k again).

    Args:
        blocks: What is repeated.
        corruption: What is taken away.
        metric: One of `metrics.METRICS`.
        name: Name of the behavior.

    Returns:
        The behavior.

    Raises:
        ArgumentError: If the corruption has another name.
    """
    own, k, rows = blocks.own, blocks.shown, torch.arange(len(blocks.own))
    changed, wrong = own.clone(), blocks.other[:, k]
    if corruption == "answer":
        changed[:, k] = wrong
    elif corruption == "block":
        changed = blocks.other
    elif corruption == "trigger" and blocks.partner is not None:
        changed[:, k - 1], changed[rows, blocks.partner] = own[rows, blocks.partner], own[:, k - 1]
        wrong = own[rows, blocks.partner + 1]
    else:
        raise ArgumentError.of(
            "corruption", expected=f"one of {CORRUPTIONS}", got=repr(corruption), do="Choose."
        )
    start = (blocks.bos is not None) + (blocks.repeats - 2) * own.shape[1]
    return Behavior(
        _prompts(blocks, own),
        _prompts(blocks, changed),
        metric_of(metric, own[:, k], wrong),
        name=name,
        positions={
            "trigger": start + k - 1,
            "answer": start + k,
            "last": start + own.shape[1] + k - 1,
        },
        answers=own[:, k].clone(),
        wrong=wrong.clone(),
    )


def shown_of(shown: int | None, length: int) -> int:
    """Return k, how much of the last copy is shown.

    Args:
        shown: What was asked for; None means half.
        length: L, tokens in a block.

    Returns:
        From 1 to L − 1.

    Raises:
        ArgumentError: If it is out of range.
    """
    k = length // 2 if shown is None else shown
    if not 1 <= k < length:
        raise ArgumentError.of(
            "shown",
            expected=f"1 to {length - 1}, inside a block of {length}",
            got=k,
            do="The answer is the token after those that are shown.",
        )
    return k


def distance(whole: BehaviorLike, half: BehaviorLike) -> Characteristic:
    """Return the characteristic that a copy does not depend on how far back it is found.

    Args:
        whole: Blocks of full length.
        half: Blocks of half the length.

    Returns:
        ``distance_insensitivity``: accuracies within .15.
    """
    return Characteristic(
        "distance_insensitivity",
        "The token is found by what stood before it, however far back that is.",
        {"full_length": whole, "half_length": half},
        (Expectation("full_length", "near", "half_length", 0.15),),
    )


def partners(blocks: Tensor, shown: int, generator: torch.Generator) -> Tensor:
    """Return for each block a place whose token can change places with the trigger.

    Both tokens, and the two that follow them, must be four that occur once in the block, so that
    the swap makes one other answer and no more.

    Args:
        blocks: ``[example, L]``.
        shown: k; the trigger is token k, counted from 1.
        generator: Of the draw.

    Returns:
        Places ``[example]``, counted from 0; −1 where there is none.
    """
    trigger, length = shown - 1, blocks.shape[1]
    once = (blocks[:, :, None] == blocks[:, None, :]).sum(-1) == 1
    place = torch.arange(length - 1)
    apart = (place - trigger).abs() >= 2
    fits = once[:, :-1] & once[:, 1:] & apart & once[:, [trigger]] & once[:, [trigger + 1]]
    weights = torch.rand(fits.shape, generator=generator)
    chosen = torch.where(fits, weights, -1.0).max(1)
    return torch.where(chosen.values >= 0, chosen.indices, -1)


def _prompts(blocks: Blocks, whole: Tensor) -> Tensor:
    parts = [whole] * (blocks.repeats - 1) + [blocks.own[:, : blocks.shown]]
    if blocks.bos is not None:
        parts.insert(0, torch.full_like(whole[:, :1], blocks.bos))
    return torch.cat(parts, 1)
