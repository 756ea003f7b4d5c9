"""What the report shows of influence: proponents and opponents as texts or images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..record import Record
from .methods import unit
from .pack import pack
from .shelf import Shelf

__all__ = ["examples"]

SHOWN = 5

TOKENS = 64
"""So many tokens of an example are shown, around the one with the largest share."""

PIXELS = 64 * 64
"""Larger images of examples are shown smaller: each pixel is then the mean of several."""

PAIR = ("query", "train_example")

MEASUREMENTS = ("influence", "influence_function")

NOT_KEPT = "its text was not kept: it was never among the top at one step"
"""Of an example that leads the sum over steps without leading at any of them."""

MEANINGS = {
    "tracin": ("a step on them lowers the loss", "a step on them raises it"),
    "": ("removing them would raise the loss", "removing them would lower it"),
}


def examples(shelf: Shelf) -> dict[str, Any] | None:
    """Return the training examples with the largest influence on the first query.

    Scores are the sum over checkpoints where there are several, else those of the only one.
    """
    for name in MEASUREMENTS:
        scored = shelf.get(f"{name}/scores", PAIR)
        if scored:
            return _examples(shelf, name, scored)
    return None


def _examples(shelf: Shelf, name: str, scored: list[Record]) -> dict[str, Any]:
    last = _summed(shelf, name, scored)
    total = {i: v for i, v in _scores(last).items() if np.isfinite(v)}
    by = {r.step: _scores(r) for r in scored}
    known = _known(shelf, name)
    groups = ({i, *entry.get("copies", ())} for i, entry in known.items())
    equal = {j for group in groups for j in group - {min(group)}}
    order = sorted((i for i in total if i not in equal), key=lambda i: -total[i])
    # Where no example has a text (images, tables), its absence is no news.
    texts = any(entry.get("text") or "shares" in entry for entry in known.values())
    high = [i for i in order if total[i] > 0][:SHOWN]
    low = [i for i in reversed(order) if total[i] < 0][:SHOWN]
    facts = last.panel.convention
    method = str(facts.get("method", name)).replace("_", " ")
    return {
        "proponents": [_example(i, total[i], by, known.get(i), texts) for i in high],
        "opponents": [_example(i, total[i], by, known.get(i), texts) for i in low],
        "meaning": MEANINGS.get(method, MEANINGS[""]),
        "unit": unit(last.panel),
        "candidates": len(total),
        "of": facts.get("n"),
        "steps": sorted(by),
        "at": last.step,
        "method": {"tracin": "TracIn"}.get(method, method),
    }


def _summed(shelf: Shelf, name: str, scored: list[Record]) -> Record:
    """The sum over steps: recorded, or made from the scores, which is the same."""
    from ..influence import tracin_sum

    recorded = shelf.last(f"{name}/sum", PAIR)
    if recorded is not None:
        return recorded
    labelled = all("train_example" in r.panel.coords for r in scored)
    if len(scored) < 2 or not labelled or name != "influence":
        return scored[-1]
    return tracin_sum(scored, name=name)[-1]


def _scores(record: Record) -> dict[int, float]:
    """Scores of the first query by dataset index."""
    row = record.panel.values[0]
    index = record.panel.coords.get("train_example", range(len(row)))
    return {int(i): float(v) for i, v in zip(index, row, strict=True)}


def _known(shelf: Shelf, name: str) -> dict[int, dict[str, Any]]:
    """Words, text, tokens and shares of every example that was shown, newest first."""
    found: dict[int, dict[str, Any]] = {}
    for what in ("tokens", "proponents", "opponents"):
        shelf.get(f"{name}/{what}")
        for record in reversed(shelf.both(f"{name}/{what}")):
            facts = record.panel.convention
            words = facts.get("descriptions", facts.get("description", []))
            for row, i in enumerate(record.panel.coords.get("train_example", [])):
                entry = found.setdefault(int(i), {})
                entry["words"] = entry.get("words") or _entry(words, row)
                entry["copies"] = entry.get("copies") or _equal(facts.get("copies", []), row)
                entry["text"] = entry.get("text") or _entry(facts.get("texts", []), row)
                if record.panel.axes == ("train_example", "position"):
                    entry.setdefault("shares", _shares(record, row))
    shelf.get(f"{name}/images")
    for record in reversed(shelf.both(f"{name}/images")):
        for row, i in enumerate(record.panel.coords.get("train_example", [])):
            found.setdefault(int(i), {}).setdefault("image", (record, row))
    return found


def _image(record: Record, row: int) -> dict[str, Any]:
    """One image in grey, 0 to 255, small enough for its place."""
    grey = np.asarray(record.panel.values[row], float)
    times = math.ceil(math.sqrt(grey.size / PIXELS))
    height, width = (size // times * times for size in grey.shape)
    blocks = grey[:height, :width].reshape(height // times, times, width // times, times)
    small = blocks.mean((1, 3))
    return {"height": small.shape[0], "width": small.shape[1], "values": pack(small, bits=8)}


def _equal(copies: Sequence[Sequence[int]], row: int) -> list[int]:
    """Dataset indices of examples that equal one, which stands for all of them."""
    return list(copies[row]) if row < len(copies) else []


def _entry(texts: Sequence[Any], row: int) -> str:
    return str(texts[row]) if row < len(texts) else ""


def _shares(record: Record, row: int) -> dict[str, Any]:
    texts = record.panel.coords.get("train_example,position", [])
    values = np.asarray(record.panel.values[row], float)
    tokens = list(texts[row]) if row < len(texts) else [""] * len(values)
    return {"tokens": tokens, "values": values, "step": record.step}


def _example(
    index: int,
    score: float,
    by: dict[int, dict[int, float]],
    known: dict[str, Any] | None,
    texts: bool,
) -> dict[str, Any]:
    note = NOT_KEPT if known is None and texts else None
    known = known or {}
    words = known.get("words", "")
    own = f"train[{index:,}]"
    made: dict[str, Any] = {
        "index": index,
        "score": score,
        "name": own,
        "note": note,
        "words": "" if words == own else words,
        "by": [by[step].get(index) for step in sorted(by)],
        "tokens": [[known["text"], None]] if known.get("text") else [],
        "image": _image(*known["image"]) if "image" in known else None,
    }
    return made | (_window(known["shares"]) if "shares" in known else {})


def _window(shares: dict[str, Any]) -> dict[str, Any]:
    """Cut a long example to what lies around its largest share; padding has no text."""
    tokens, values = shares["tokens"], shares["values"]
    real = [i for i, text in enumerate(tokens) if text != ""]
    start = 0
    if len(real) > TOKENS:
        sizes = [abs(values[i]) if np.isfinite(values[i]) else 0.0 for i in real]
        start = max(0, min(int(np.argmax(sizes)) - TOKENS * 2 // 3, len(real) - TOKENS))
    kept = real[start : start + TOKENS]
    return {
        "tokens": [[str(tokens[i]), _number(values[i])] for i in kept],
        "before": start > 0,
        "after": start + TOKENS < len(real),
        "split": {"step": shares["step"], "score": _number(np.nansum(values))},
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
