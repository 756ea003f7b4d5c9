"""What the report shows of influence: proponents and opponents with the share of each token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..record import Record
from .shelf import Shelf

__all__ = ["examples"]

SHOWN = 5

TOKENS = 64
"""So many tokens of an example are shown, around the one with the largest share."""

PAIR = ("query", "train_example")
SHARES = ("train_example", "position")


def examples(shelf: Shelf) -> dict[str, Any] | None:
    """Return the training examples with the largest influence on the first query.

    Scores are the running sum over checkpoints where there is one, else those of the last one.
    """
    last = shelf.last("influence/sum", PAIR) or shelf.last("influence/scores", PAIR)
    if last is None:
        last = shelf.last("influence/values", PAIR)
    if last is None:
        return None
    total = _scores(last)
    by = {r.step: _scores(r) for r in shelf.get("influence/scores", PAIR) if r is not last}
    shares = _shares(shelf)
    known = [i for i in total if np.isfinite(total[i])]
    order = sorted(known, key=lambda i: -total[i])
    chosen = (
        [i for i in order if total[i] > 0][:SHOWN],
        [i for i in order[::-1] if total[i] < 0][:SHOWN],
    )
    made = [[_example(i, total[i], by, shares.get(i)) for i in side] for side in chosen]
    return {
        "proponents": made[0],
        "opponents": made[1],
        "unit": "" if last.panel.unit == "1" else last.panel.unit,
        "candidates": len(total),
        "steps": sorted(by),
        "at": last.step,
        "summed": last.what == "sum",
        "method": _method(last),
        "query": _query(last),
    }


def _scores(record: Record) -> dict[int, float]:
    """Scores of the first query by dataset index."""
    row = record.panel.values[0]
    index = record.panel.coords.get("train_example", range(len(row)))
    return {int(i): float(v) for i, v in zip(index, row, strict=True)}


def _method(record: Record) -> str:
    path = str(record.made_by.get("class_path", "")) if record.made_by else ""
    return path.rpartition(".")[2] or "influence"


def _query(record: Record) -> str | None:
    found = record.panel.convention.get("query") or record.panel.coords.get("query")
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, str) else None


def _shares(shelf: Shelf) -> dict[int, dict[str, Any]]:
    """Tokens, shares and words of each shown example, newest record first."""
    found: dict[int, dict[str, Any]] = {}
    for what in ("tokens", "proponents", "opponents"):
        for record in reversed(
            [r for r in shelf.both(f"influence/{what}") if r.panel.axes == SHARES]
        ):
            shelf.get(record.name)
            panel = record.panel
            index = panel.coords.get("train_example", [])
            texts = panel.coords.get("train_example,position", [])
            words = panel.convention.get("description", panel.convention.get("descriptions", []))
            for row, i in enumerate(index):
                entry = {
                    "tokens": list(texts[row]) if row < len(texts) else [],
                    "shares": np.asarray(panel.values[row], float),
                    "words": str(words[row]) if row < len(words) else "",
                }
                found.setdefault(int(i), entry)
    return found


def _example(
    index: int, score: float, by: dict[int, dict[int, float]], shown: dict[str, Any] | None
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "index": index,
        "score": score,
        "words": f"train[{index:,}]",
        "by": [by[step].get(index) for step in sorted(by)],
        "tokens": [],
    }
    if shown is None:
        return made
    if shown["words"] and shown["words"] != made["words"]:
        made["words"] += f", {shown['words']}" if not shown["words"].startswith("train[") else ""
    return made | _window(shown["tokens"], shown["shares"])


def _window(tokens: list[Any], shares: Any) -> dict[str, Any]:
    """Cut a long example to what lies around its largest share."""
    count = min(len(tokens), len(shares))
    start = 0
    if count > TOKENS and np.isfinite(shares[:count]).any():
        peak = int(np.nanargmax(np.abs(shares[:count])))
        start = max(0, min(peak - TOKENS * 2 // 3, count - TOKENS))
    span = range(start, min(count, start + TOKENS))
    return {
        "tokens": [[str(tokens[i]), _number(shares[i])] for i in span],
        "before": start > 0,
        "after": start + TOKENS < count,
    }


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
