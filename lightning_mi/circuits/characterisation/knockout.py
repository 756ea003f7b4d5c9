"""Attention knockout: tokens stop seeing others, layer by layer (Geva et al. 2023)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...attention import tap
from ...batch import main_input
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, Reading
from ...task import Task
from ..causal.edges import coinciding
from ..causal.ports import Change, Ports
from ..causal.streams import repeated

__all__ = [
    "AttentionKnockout",
    "Span",
    "around",
    "attention_knockout",
    "position_of",
    "span_of",
]

Span: TypeAlias = str | tuple[str, str]
"""A position that a behavior names, or from one to another one, both included."""

DRAWS = 4


def attention_knockout(
    model: nn.Module,
    behavior: BehaviorLike,
    source: Span = "last",
    target: Span = ("subject", "subject_last"),
    *,
    window: int = 1,
    renormalise: bool = True,
    task: Task | None = None,
    seed: int = 0,
) -> dict[str, Panel]:
    """Measure what is lost when some tokens cannot see others, in a window of layers.

    In the clean run the attention of all heads from ``source`` to ``target`` is cut in ``window``
    layers around each layer. The number is the share of the effect that is lost,
    (m(clean) − m(cut)) / (m(clean) − m(corrupted)). The null cuts, from the same source, as many
    other positions that it can see, drawn anew four times.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts and metric, for example `lightning_mi.behaviors.KnowledgeRecall`.
        source: Which queries: a position that the behavior names, or (from, to).
        target: Which keys, likewise.
        window: Number of layers that are cut at once, centred at each layer.
        renormalise: True cuts before the softmax: the rest of the row is scaled up to what the row
            held, as if the keys had been masked. False cuts after it: the rest stays, and the row
            holds less.
        task: How the model is called; None calls it with the batch.
        seed: Seed of the null.

    Returns:
        ``effect`` and ``null`` over ``layer``, shares; NaN with the reason where the metric is the
        same on clean and corrupted prompts.

    Raises:
        ArgumentError: If window is below 1, or there are no such positions.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ArgumentError.of("window", expected="at least 1", got=window, do="Count layers.")
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        chosen = task or Task()
        rows, keys = span_of(own, source), span_of(own, target)
        with tap(plain, keep=True) as seen:
            clean = own.metric(chosen.outputs(plain, own.clean)).float()
        corrupted = own.metric(chosen.outputs(plain, own.corrupted)).float()
        layers = sum(not site.cross for site in seen.sites)
        reason = coinciding(float(clean.mean()), float(corrupted.mean()), "attention")
        whole = float(clean.mean() - corrupted.mean())
        cutter = _Cutter(plain, chosen, own, rows, renormalise)

        effect = null = torch.full((layers,), math.nan)
        if reason is None:
            blocked = [keys, *(_others(rows, keys, seed + i) for i in range(DRAWS))]
            made = [cutter(around(i, window, layers), blocked) for i in range(layers)]
            lost = (clean.mean().cpu() - torch.stack(made)) / whole
            effect, null = lost[:, 0], lost[:, 1:].mean(1)
    about = {
        "direction": "noise",
        "ablation": "attention cut before the softmax, rows renormalised"
        if renormalise
        else "attention cut after the softmax, rows not renormalised",
        "source": _told(source),
        "target": _told(target),
        "window": window,
        "clean": float(clean.mean()),
        "corrupted": float(corrupted.mean()),
        "behavior": own.name,
        "examples": len(own),
        "sign": "1: what the source sees there is all that matters",
    }
    if reason is not None:
        about["reason"] = reason
    what = f"share lost when {_told(source)} cannot see {_told(target)}"
    where = {"what": what, "null": [None if math.isnan(v) else v for v in null.tolist()]}
    beside = {"what": "the same for as many other positions, mean of four draws", "null": 0.0}
    return {
        "effect": Panel(effect, ("layer",), {}, "share", {**about, **where}),
        "null": Panel(null, ("layer",), {}, "share", {**about, **beside, "display": {}}),
    }


def position_of(behavior: Behavior, name: str) -> Tensor:
    """Return a position of each prompt.

    Args:
        behavior: The prompts.
        name: A position that it names, or ``"last"``: where it names none, the last that is not
            padding.

    Returns:
        Long tensor ``[example]``, not negative.

    Raises:
        ArgumentError: If there is no such position.
    """
    positions = {"last": -1, **behavior.positions}
    return dataclasses.replace(behavior, positions=positions).where(name)


def span_of(behavior: Behavior, span: Span) -> Tensor:
    """Return which positions are meant.

    Args:
        behavior: The prompts.
        span: A position that it names, ``"last"``, or (from, to).

    Returns:
        Boolean ``[example, position]``.

    Raises:
        ArgumentError: If there is no such position, or a span ends before it begins.
    """
    ids = main_input(behavior.clean)
    steps = torch.arange(ids.shape[1], device=ids.device)
    ends = (span, span) if isinstance(span, str) else tuple(span)
    if len(ends) != 2:
        raise ArgumentError.of(
            "span",
            expected="a position, or the two that it goes from and to",
            got=repr(span),
            do='For example "last" or ("subject", "subject_last").',
        )
    first, last = ends
    start, stop = (position_of(behavior, name).to(ids.device) for name in (first, last))
    if bool((stop < start).any()):
        raise ArgumentError.of(
            "span",
            expected="a beginning before its end",
            got=f"{first} after {last}",
            do="Swap them.",
        )
    return (steps >= start[:, None]) & (steps <= stop[:, None])


@dataclass(eq=False)
class _Cutter:
    """Runs the clean prompts with some attention cut, once for each set of keys."""

    model: nn.Module
    task: Task
    behavior: Behavior
    rows: Tensor
    renormalise: bool

    def __call__(self, layers: list[int], keys: list[Tensor]) -> Tensor:
        """Return the mean metric for each set of keys."""
        ports = Ports(self.model, self.task, _no_anatomy, "rows")
        change = Change(self._cut(torch.cat(keys)))
        size = len(self.behavior)
        with ports.opened({("pattern", layer): change for layer in layers}):
            batch = repeated(self.behavior.clean, size, len(keys))
            outputs = self.task.outputs(self.model, batch)
        blocks = torch.split(outputs, size)
        return torch.stack([self.behavior.metric(block).float().mean() for block in blocks]).cpu()

    def _cut(self, keys: Tensor) -> Callable[[Tensor], Tensor]:
        rows = self.rows.repeat(len(keys) // len(self.rows), 1)

        def apply(pattern: Tensor) -> Tensor:
            where = (rows[:, :, None] & keys[:, None, :]).to(pattern.device)[:, None]
            kept = pattern.masked_fill(where, 0.0)
            if not self.renormalise:
                return kept
            # What a softmax without the cut keys would give, also where rows hold a sink besides.
            gone = (pattern * where).sum(-1, keepdim=True)
            left = 1.0 - gone
            scaled = kept / left.clamp(min=torch.finfo(pattern.dtype).eps)
            return torch.where(left > 1e-6, scaled, 0.0)

        return apply


def _no_anatomy() -> Any:
    raise ArgumentError.of(
        "model", expected="a model with attention", got="another one", do="Pass a transformer."
    )


def around(layer: int, window: int, layers: int) -> list[int]:
    """Return the layers that are changed at once.

    Args:
        layer: Their middle.
        window: How many.
        layers: How many there are; a window ends with them.

    Returns:
        Their indices.
    """
    start = layer - (window - 1) // 2
    return [i for i in range(start, start + window) if 0 <= i < layers]


def _others(rows: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Return as many other keys that the last of the queries can see, drawn at random."""
    size, length = keys.shape
    steps = torch.arange(length, device=keys.device)
    last = torch.where(rows, steps, -1).amax(1)
    free = (steps <= last[:, None]) & ~keys & ~rows
    weights = torch.rand(size, length, generator=torch.Generator().manual_seed(seed))
    weights = weights.to(keys.device).masked_fill(~free, -1.0)
    rank = weights.argsort(1, descending=True).argsort(1)
    return (rank < keys.sum(1, keepdim=True)) & free


def _told(span: Span) -> str:
    return span if isinstance(span, str) else f"{span[0]} to {span[1]}"


@dataclass(frozen=True)
class AttentionKnockout:
    """What is lost when some tokens cannot see others, by layer; see `attention_knockout`.

    Panels over ``layer``: ``effect`` and its ``null``, shares of the effect.

    Args:
        behavior: Prompts and metric.
        name: First part of the records' names.
        source: Which queries.
        target: Which keys.
        window: Number of layers that are cut at once.
        renormalise: Whether the rest of a row is scaled up.
    """

    behavior: BehaviorLike
    name: str = "attention_knockout"
    source: str | tuple[str, str] = "last"
    target: str | tuple[str, str] = ("subject", "subject_last")
    window: int = 1
    renormalise: bool = True

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        return attention_knockout(
            model,
            as_behavior(self.behavior).to(context.device),
            self.source,
            self.target,
            window=self.window,
            renormalise=self.renormalise,
            task=context.known_task,
        )
