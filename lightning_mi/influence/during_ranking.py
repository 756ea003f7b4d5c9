"""How the ranking of training examples changes from one step to the next: a Series."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attribution import drift
from ..record import Panel, Record
from ..series import named
from .result import columns_of

__all__ = ["RankingChange", "ranking_change"]

SAME = ("orientation", "query", "rows", "solver", "curvature", "damping")
"""Parts of the convention that both steps share, or their scores are no two of one kind."""

CORRELATION, OVERLAP = "rank_correlation", "top_overlap"


@dataclass(frozen=True)
class RankingChange:
    """Compare the scores of each step with those of the step before: a `Series`.

    Records ``<name>/rank_correlation`` (Spearman over the examples that both steps scored, −1 to 1)
    and ``<name>/top_overlap`` (Jaccard index of the k highest scores, 0 to 1; what chance gives is
    in the convention), each by query. Steps at which something else was asked, or with another
    solver or damping, are not compared: NaN, with the reason.

    Args:
        name: Name of the measurement whose ``scores`` are compared.
        k: How many proponents; fewer where there are fewer than 2k examples.
    """

    name: str = "influence"
    k: int = 10

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Return the comparisons.

        Args:
            records: Records of one run and one source.

        Returns:
            Two records at each step but the first.
        """
        known = named(records, f"{self.name}/scores")
        scores = [r for r in known if of_training(r) and "reason" not in r.panel.convention]
        pairs = itertools.pairwise(scores)
        return [r for before, now in pairs for r in ranking_change(before, now, self.k)]


def of_training(record: Record) -> bool:
    """Return whether a record holds scores of training examples, by query.

    Args:
        record: Any record.
    """
    return record.panel.axes == ("query", "train_example")


def ranking_change(before: Record | None, now: Record, k: int = 10) -> list[Record]:
    """Compare the scores of one step with those of an earlier one.

    Args:
        before: Record ``<name>/scores``, or None where there is none.
        now: A later one.
        k: How many proponents are compared.

    Returns:
        Two records, none without an earlier one; NaN with a reason where nothing can be compared.
    """
    if before is None or before.step >= now.step:
        return []
    old, new = _common(before.panel, now.panel)
    top = max(1, min(k, old.shape[1] // 2))
    reason = _incomparable(before.panel, now.panel, old.shape[1])
    if reason is None:
        correlation = drift(old, new, top).spearman
        overlap = torch.tensor([_jaccard(a, b, top) for a, b in zip(old, new, strict=True)])
    else:
        correlation = overlap = torch.full((new.shape[0],), math.nan)
    about: dict[str, Any] = {
        "compared_with": "previous",
        "at_step": before.step,
        "examples": old.shape[1],
    }
    if reason is not None:
        about["reason"] = reason
    chance = top / (2 * max(old.shape[1], top) - top)
    panels = {
        CORRELATION: Panel(correlation, ("query",), {}, "1", {**about, "null": 0.0}),
        OVERLAP: Panel(overlap, ("query",), {}, "1", {**about, "null": chance, "k": top}),
    }
    stem = now.name.rsplit("/", 1)[0]
    return [now.replace(name=f"{stem}/{what}", panel=panel) for what, panel in panels.items()]


def _incomparable(before: Panel, now: Panel, common: int) -> str | None:
    """Return why two steps cannot be compared; None where they can."""
    a, b = before.convention, now.convention
    differs = [key for key in SAME if a.get(key) != b.get(key)]
    if differs:
        return f"the two steps differ in {', '.join(differs)}"
    if before.size["query"] != now.size["query"]:
        return "the two steps have scores of different numbers of queries"
    return None if common > 1 else "the two steps have no two training examples in common"


def _common(before: Panel, now: Panel) -> tuple[Tensor, Tensor]:
    a, b = (list(p.coords["train_example"]) for p in (before, now))
    known = set(a)
    both = [i for i in b if i in known]
    return before.values[:, columns_of(a, both)], now.values[:, columns_of(b, both)]


def _jaccard(a: Tensor, b: Tensor, k: int) -> float:
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return math.nan
    first, second = (set(t.argsort(descending=True, stable=True)[:k].tolist()) for t in (a, b))
    return len(first & second) / len(first | second)
