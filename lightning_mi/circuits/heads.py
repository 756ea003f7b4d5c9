"""Head scores: which heads do induction, copy positions, find duplicates, or rest on a sink.

Prefix matching and the repeated-random-token protocol are those of Olsson et al. (2022),
"In-context learning and induction heads".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import tap
from ..batch import attention_mask_of, main_input
from ..behaviors import RepeatedTokens
from ..errors import ArgumentError
from ..inferring import infer_task
from ..isolation import untouched
from ..measurement import Context
from ..record import Panel, scalar
from ..task import IGNORED, NextToken, Task
from .entries import SCORES, Entries
from .losses import copy_losses, icl_score, icl_slope
from .survey import survey
from .table import HeadTable, check_tokens, head_table

__all__ = ["HeadScores", "head_scores", "scored"]

MATCHED = ("induction", "duplicate_token")
"""Scores that depend on what the tokens are, hence have a matched null."""

WHAT = {
    "induction": "mean over queries t of sum of A[t, p + 1] over p < t with the token of t",
    "previous_token": "mean over t >= 2 of A[t, t - 1]",
    "duplicate_token": "mean over queries t of sum of A[t, p] over p < t with the token of t",
    "current_token": "mean over t >= 2 of A[t, t]",
    "first_position": "mean over t >= 2 of A[t, 0]: a sink, not a circuit",
}


def head_scores(
    model: nn.Module,
    tokens: Tensor,
    *,
    reduce: Literal["mean"] | None = "mean",
    attention_mask: Tensor | None = None,
    positions_of: Tensor | None = None,
    task: Task | None = None,
) -> dict[str, Tensor]:
    """Score every attention head by where it looks.

    With A the attention pattern, T the targets of a query, and x the tokens:

    - ``induction``: mean of Σ A[t, s] over s in T(t) = {p+1 : p<t, x_p = x_t}, over all t that have
      a target (prefix matching). On tokens repeated with period L that is A[t, t−L+1].
    - ``duplicate_token``: the same with T(t) = {p : p<t, x_p = x_t}, hence A[t, t−L].
    - ``previous_token``, ``current_token``, ``first_position``: mean over t ≥ 2 of A[t, t−1],
      A[t, t] and A[t, 0].

    Targets are found from the tokens themselves, so natural text is scored as well. Beside each
    ``<name>`` stands ``<name>_null``, its value if the head attended uniformly to all keys that
    its real mask leaves. Queries without a reachable target (a window shorter than the period)
    are left out. Every sequence counts the same.

    With grad enabled the scores are differentiable; under ``torch.no_grad`` no pattern is stored,
    and the pass ends at the last attention.

    Args:
        model: Any model of token ids with self-attention; its mode and state are left as they are.
        tokens: Ids ``[sequence, position]``, on the model's device.
        reduce: ``"mean"`` over sequences, or None.
        attention_mask: 1 at real tokens; positions count from the first real one.
        positions_of: Tokens whose targets are read instead, the same shape: with
            ``tokens=protocol.matched()`` this is the matched null.
        task: How the model is called, if not with the ids alone.

    Returns:
        By name ``[layer, head]``, or ``[sequence, layer, head]`` for ``reduce=None``. Layers are
        the self-attentions in the order in which they run; NaN where there is nothing to measure.

    Raises:
        ArgumentError: If tokens are no batch of ids, or ``reduce`` is neither.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50))
        >>> scores = head_scores(model, RepeatedTokens(length=8).tokens(50))
        >>> tuple(scores["induction"].shape)
        (2, 2)
    """
    check_tokens(tokens, model)
    if reduce not in ("mean", None):
        raise ArgumentError.of("reduce", expected="'mean' or None", got=repr(reduce), do="Choose.")
    chosen, wants_grad = task or Task(), torch.is_grad_enabled()
    entries = None if positions_of is None else Entries.of(positions_of, attention_mask)
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        with torch.no_grad():
            last = survey(plain, chosen).sites - 1
        table = head_table(plain, chosen, tokens, attention_mask, entries=entries, stop_after=last)
    named = {}
    for name in table.scores:
        named[name], named[f"{name}_null"] = table.scores[name], table.nulls[name]
    return {n: v if reduce is None else v.nanmean(0) for n, v in named.items()}


@dataclass(frozen=True)
class HeadScores:
    """Head scores on repeated random tokens, their nulls, and what the second copy is worth.

    Panels over (layer, head), all attention probabilities: the five scores of `head_scores`;
    ``<name>_null`` (uniform over the real mask); ``<name>_stderr`` (standard error over
    sequences); ``induction_matched_null`` and ``duplicate_token_matched_null``, the same entries
    with the first block replaced by fresh tokens, which a head that merely attends at a fixed
    offset does not beat; ``induction_random_period``, the score where each sequence has its own
    period. Scalars in nats: ``loss_first_copy``, ``loss_second_copy``, ``copy_gain`` (their
    difference; positive: the model copies), ``icl_score`` (loss late − loss early in the measured
    batch; negative: context helps) and ``icl_slope``.

    Args:
        name: First part of the records' names.
        tokens: The protocol, shortened to what the model takes and without the special tokens that
            its configuration names; None scores the measured batch's own tokens, without what
            only repeated tokens have.

    Example:
        >>> HeadScores().tokens.positions
        64
    """

    name: str = "head_scores"
    tokens: RepeatedTokens | None = field(default_factory=RepeatedTokens)

    def __call__(self, model: nn.Module, context: Context) -> dict[str, Panel]:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        found = scored(model, context, self.tokens)
        panels = _score_panels(found.main, found.convention)
        if found.control is not None:
            panels |= _control_panels(found.control, found.convention)
        if found.protocol is not None:
            panels |= _copy_panels(found)
        return panels | _icl_panels(model, context, found)


@dataclass(frozen=True)
class Scored:
    """Head tables of one firing, shared by all measurements that need them."""

    main: HeadTable
    control: HeadTable | None
    protocol: RepeatedTokens | None
    losses: Tensor | None
    convention: dict[str, Any]


def scored(model: nn.Module, context: Context, tokens: RepeatedTokens | None) -> Scored:
    """Return the head tables of a firing, computed once.

    Args:
        model: The user's model.
        context: Batch, task and memo.
        tokens: The protocol, or None for the batch's own tokens.

    Returns:
        The tables.
    """
    key: Hashable = ("circuits.heads", tokens)

    def compute() -> Scored:
        with torch.no_grad():
            if tokens is None:
                return _given(model, context)
            return _repeated(model, context, tokens)

    return context.shared(key, compute)


def _given(model: nn.Module, context: Context) -> Scored:
    _require_ids(model, context)
    ids, mask = context.task.inputs(context.batch), attention_mask_of(context.batch)
    mask = None if mask is None else mask[:, : ids.shape[1]]
    last = survey(model, context.task).sites - 1
    table = head_table(model, context.task, ids, mask, stop_after=last)
    convention = {"protocol": "given tokens", "sequences": len(ids), "positions": ids.shape[1]}
    return Scored(table, None, None, None, convention)


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
        losses = NextToken().token_losses(main.outputs.float(), ids)
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
    return Scored(main, control, protocol, losses, convention)


def _control(
    model: nn.Module, task: Task, protocol: RepeatedTokens, ids: Tensor, last: int
) -> HeadTable:
    """Score the matched control and the random periods in one pass that ends at the last site."""
    matched = protocol.matched().to(ids.device)
    varied = protocol.random_period().to(ids.device)
    tokens = torch.cat([matched, varied])
    same = Entries.of(ids)
    own = Entries.of(varied).triples("induction")
    names = (*(f"{name}_matched_null" for name in MATCHED), "induction_random_period")
    lists = [*(same.triples(name) for name in MATCHED), own + own.new_tensor([len(matched), 0, 0])]
    entries = Entries.join(names, lists, tokens)
    return head_table(model, task, tokens, entries=entries, stop_after=last)


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


def _score_panels(table: HeadTable, convention: dict[str, Any]) -> dict[str, Panel]:
    panels: dict[str, Panel] = {}
    for name in SCORES:
        about = {**convention, "what": WHAT[name], "excluded_queries": table.excluded[name]}
        about |= {"null": "uniform over the real mask", "corrected": "(value - null) / (1 - null)"}
        about |= _offset(name, convention)
        null = table.nulls[name].nanmean(0)
        values, quiet = table.scores[name], {**about, "display": {}}
        panels[name] = _panel(values.nanmean(0), {**about, "display": _display(name)}, table)
        panels[f"{name}_null"] = _panel(null, quiet, table)
        panels[f"{name}_stderr"] = _panel(_standard_error(values), quiet, table)
    return panels


def _control_panels(table: HeadTable, convention: dict[str, Any]) -> dict[str, Panel]:
    panels = {}
    for name, values in table.scores.items():
        what = (
            "induction score where each sequence has a period of its own"
            if name == "induction_random_period"
            else "the same entries, all blocks but the last replaced by fresh tokens"
        )
        about = {**convention, "what": what, "display": {}}
        panels[name] = _panel(values.nanmean(0), about, table)
    return panels


def _copy_panels(found: Scored) -> dict[str, Panel]:
    protocol, about = found.protocol, {**found.convention, "tokens": "r_2 … r_L of each copy"}
    if protocol is None or found.losses is None:
        reason = "the model's outputs are no next-token logits [example, position, token]"
        return _undefined(("loss_first_copy", "loss_second_copy", "copy_gain"), reason)
    first, second = copy_losses(found.losses, protocol)
    return {
        "loss_first_copy": scalar(first, "nats", **about, display={}),
        "loss_second_copy": scalar(second, "nats", **about, display={}),
        "copy_gain": scalar(
            first - second,
            "nats",
            **about,
            sign="loss in the first copy minus loss in later ones; positive: the model copies",
            display={"headline": "copy_gain"},
        ),
    }


def _icl_panels(model: nn.Module, context: Context, found: Scored) -> dict[str, Panel]:
    losses, known, where = found.losses, None, "repeated random tokens"
    if context.has_batch and isinstance(context.task, NextToken):
        with torch.no_grad():
            outputs = context.outputs(model)
            if outputs.ndim == 3:
                losses = context.task.token_losses(outputs.float(), context.batch)
                known, where = context.task.labels(context.batch) != IGNORED, "the measured batch"
    elif losses is not None:
        losses = losses[:, :-1]
    if losses is None:
        return _undefined(("icl_score", "icl_slope"), "there are no next-token losses")
    score, (early, late) = icl_score(losses, known)
    about: dict[str, Any] = {"tokens": where, "index": "loss of predicting the token at that index"}
    about |= {"early": early, "late": late, "sign": "late minus early; negative: context helps"}
    shown = {"headline": "icl_score"}
    return {
        "icl_score": scalar(score, "nats", **about, display=shown),
        "icl_slope": scalar(icl_slope(losses, known), "nats", tokens=where, display={}),
    }


def _undefined(names: tuple[str, ...], reason: str) -> dict[str, Panel]:
    return {name: scalar(math.nan, "nats", reason=reason, display={}) for name in names}


def _panel(values: Tensor, convention: dict[str, Any], table: HeadTable) -> Panel:
    coords = {"layer": range(values.shape[0]), "head": range(values.shape[1])}
    return Panel(values, ("layer", "head"), coords, "1", {**convention, "modules": table.modules})


def _offset(name: str, convention: dict[str, Any]) -> dict[str, Any]:
    length = convention.get("length")
    fixed = {"previous_token": 1, "current_token": 0}
    if length is not None:
        fixed |= {"induction": length - 1, "duplicate_token": length}
    return {"offset": fixed[name]} if name in fixed else {}


def _display(name: str) -> dict[str, Any]:
    if name == "induction":
        return {"headline": "induction", "ranks": 2, "picture": "map"}
    return {"headline": "prev_token", "ranks": 2} if name == "previous_token" else {}


def _standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over sequences, NaN with fewer than two."""
    count = values.isfinite().sum(0)
    spread = (values - values.nanmean(0)).square().nansum(0) / (count - 1).clamp(min=1)
    return (spread / count.clamp(min=1)).sqrt().where(count > 1, torch.nan)
