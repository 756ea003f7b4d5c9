"""Panels of head scores: values, nulls, errors and losses, with their conventions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...measurement import Context
from ...record import Panel, scalar
from ...task import IGNORED, NextToken
from .entries import SCORES
from .losses import copy_losses, icl_score, icl_slope
from .scored import Scored
from .table import HeadTable

__all__ = ["control_panels", "copy_panels", "icl_panels", "score_panels"]

WHAT = {
    "induction": "mean over queries t of sum of A[t, p + 1] over p < t with the token of t",
    "previous_token": "mean over t >= 2 of A[t, t - 1]",
    "duplicate_token": "mean over queries t of sum of A[t, p] over p < t with the token of t",
    "current_token": "mean over t >= 2 of A[t, t]",
    "first_position": "mean over t >= 2 of A[t, 0]: a sink, not a circuit",
}


SAME = "the same entries, all blocks but the last replaced by fresh tokens"
CONTROLS = {
    "induction_random_period": "induction score where each sequence has a period of its own",
    "previous_token_matched_null": "one position further, t >= 3: mean of A[t, t - 2]",
    "current_token_matched_null": "one position further, t >= 3: mean of A[t, t - 1]",
    "first_position_matched_null": "one position further, t >= 3: mean of A[t, 1]",
}


def score_panels(table: HeadTable, convention: dict[str, Any]) -> dict[str, Panel]:
    """Return the five scores with their nulls and standard errors.

    Args:
        table: Scores by sequence.
        convention: The protocol.

    Returns:
        Names to panels over (layer, head).
    """
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


def control_panels(table: HeadTable, convention: dict[str, Any]) -> dict[str, Panel]:
    """Return the matched nulls and the score with random periods.

    Args:
        table: Values by sequence.
        convention: The protocol.

    Returns:
        Names to panels over (layer, head).
    """
    panels = {}
    for name, values in table.scores.items():
        about = {**convention, "what": CONTROLS.get(name, SAME), "display": {}}
        panels[name] = _panel(values.nanmean(0), about, table)
    return panels


def copy_panels(found: Scored) -> dict[str, Panel]:
    """Return the losses of the copies and the gain of copying.

    Args:
        found: What was scored.

    Returns:
        Names to scalars in nats; NaN with a reason where there are no next-token losses.
    """
    protocol, about = found.protocol, {**found.convention, "tokens": "r_2 … r_L of each copy"}
    if protocol is None or found.losses is None:
        return _undefined(("loss_first_copy", "loss_second_copy", "copy_gain"), found)
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


def icl_panels(model: nn.Module, context: Context, found: Scored) -> dict[str, Panel]:
    """Return the in-context-learning score and slope, of the measured batch if it has tokens.

    Args:
        model: The user's model.
        context: Batch, task and shared outputs.
        found: What was scored.

    Returns:
        Names to scalars in nats; NaN with a reason where there are no next-token losses.
    """
    losses, known, where = found.losses, None, "repeated random tokens"
    if found.causal and context.has_batch and isinstance(context.task, NextToken):
        with torch.no_grad():
            outputs = context.outputs(model)
            if outputs.ndim == 3:
                losses = context.task.token_losses(outputs.float(), context.batch)
                known, where = context.task.labels(context.batch) != IGNORED, "the measured batch"
    elif losses is not None:
        losses = losses[:, :-1]
    if losses is None:
        return _undefined(("icl_score", "icl_slope"), found)
    score, (early, late) = icl_score(losses, known)
    about: dict[str, Any] = {"tokens": where, "index": "loss of predicting the token at that index"}
    about |= {"early": early, "late": late, "sign": "late minus early; negative: context helps"}
    shown = {"headline": "icl_score"}
    return {
        "icl_score": scalar(score, "nats", **about, display=shown),
        "icl_slope": scalar(icl_slope(losses, known), "nats", tokens=where, display={}),
    }


def _undefined(names: tuple[str, ...], found: Scored) -> dict[str, Panel]:
    reason = "attention sees the tokens that would be predicted"
    if found.causal:
        reason = "the model's outputs are no next-token logits [example, position, token]"
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
