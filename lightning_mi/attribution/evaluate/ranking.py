"""Orders in which units are removed: by score, at random, by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checks import counted
from ..drifting import Drift, drift
from .stage import Stage

__all__ = ["alike", "beside_chance", "counts", "ranks", "recency"]


def ranks(scores: Tensor, free: Tensor, seed: int) -> Tensor:
    """Return the place of every unit in order of removal, the highest score first.

    Ties, of which black pixels make many, are broken at random: by index they would be removed
    from the top left corner on, or from the first word.

    Args:
        scores: ``[example, unit]``.
        free: Which units may be removed; the others come last.
        seed: Of the order among ties.

    Returns:
        Long ``[example, unit]``, from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.rand(scores.shape, generator=generator, dtype=torch.float64).argsort(1)
    mixed = mixed.to(scores.device)
    least = torch.finfo(scores.dtype).min
    keyed = scores.clamp(min=least).masked_fill(~free, float("-inf"))
    order = mixed.gather(1, keyed.gather(1, mixed).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def counts(free: Tensor, steps: int) -> Tensor:
    """Return how many units are removed at each of ``steps + 1`` equidistant shares.

    Args:
        free: Which units may be removed, ``[example, unit]``.
        steps: Number of steps from none to all.

    Returns:
        Long ``[step, example]``: share times number of free units, rounded.
    """
    k = torch.arange(steps + 1, device=free.device)[:, None]
    return (2 * k * free.sum(1) + steps) // (2 * steps)


def recency(stage: Stage) -> Tensor:
    """Return the scores of the attribution that knows the position alone: later is more.

    Args:
        stage: The model and its inputs, which are tokens.

    Returns:
        ``[example, unit]``; positions behind the one that is read count as the oldest.
    """
    free = stage.free
    places = torch.arange(free.shape[1], device=free.device, dtype=torch.float64)
    places = places.expand(free.shape)
    if stage.question.position is None:
        return places
    return torch.where(places <= stage.question.position[:, None], places, -1 - places)


def shuffles(free: Tensor, draws: int, seed: int) -> Tensor:
    """Return random orders of the units that may be removed.

    Args:
        free: Which units may be removed, ``[example, unit]``; the others keep their place.
        draws: How many orders.
        seed: Of their generator.

    Returns:
        Long ``[draw, example, unit]``: whose score each unit gets.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # not the order among ties
    shape = (draws, *free.shape)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64).to(free.device)
    # The k-th free unit in random order gets what the k-th free unit in order had.
    to = drawn.masked_fill(~free, 2.0).argsort(dim=-1, stable=True)
    of = (~free).long().argsort(dim=-1, stable=True).expand(shape)
    return torch.empty_like(to).scatter_(-1, to, of)


def beside_chance(
    stage: Stage, scores: Tensor, draws: int, seed: int, judge: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Judge scores, random scores, and for tokens those of position alone.

    Args:
        stage: The model and its inputs.
        scores: ``[example, unit]``.
        draws: Number of random attributions.
        seed: Of their generator.
        judge: Gives anything for scores ``[example, unit]``.

    Returns:
        ``scores``, ``random`` (a list) and, for tokens, ``recency``: what the judge gave.
    """
    found: dict[str, Any] = {
        "scores": judge(scores),
        "random": [judge(scores.gather(1, i)) for i in shuffles(stage.free, draws, seed)],
    }
    if stage.entry.is_tokens:
        found["recency"] = judge(recency(stage))
    return found


def alike(stage: Stage, x: Tensor, y: Tensor, k: int | None = None) -> Drift:
    """Compare scores over the units that may be removed: padding always agrees.

    Args:
        stage: The model and its inputs.
        x: ``[example, unit]``.
        y: ``[example, unit]``.
        k: Number of units for the Jaccard index.

    Returns:
        The comparison; k and number of units are those of the first example.
    """
    if bool(stage.free.all()):
        return drift(x, y, k)
    kept = zip(x, y, stage.free, strict=True)
    rows = [drift(a[free][None], b[free][None], k) for a, b, free in kept]
    return dataclasses.replace(
        rows[0],
        spearman=torch.cat([row.spearman for row in rows]),
        absolute=torch.cat([row.absolute for row in rows]),
        jaccard=torch.cat([row.jaccard for row in rows]),
        cosine=torch.cat([row.cosine for row in rows]),
    )


def undefined(scores: Tensor, free: Tensor) -> Tensor:
    """Return which examples cannot be judged: NaN among their scores, or nothing to remove.

    Args:
        scores: ``[example, unit]``.
        free: Which units may be removed.

    Returns:
        Boolean ``[example]``.
    """
    return (scores.isnan() & free).any(1) | ~free.any(1)


def check_counts(**numbers: int) -> None:
    """Refuse impossible numbers.

    Args:
        **numbers: By name; ``draws`` and ``seed`` may be 0, all others are at least 1.

    Raises:
        ArgumentError: If one is too small or no int.
    """
    for name, value in numbers.items():
        counted(name, value, 0 if name in ("draws", "seed") else 1, "Pass an int.")
