"""What the report shows of texts: tokens, attributions, attention, answers, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..comparison import permutation_floor, spearman
from ..emergence import HeadOnset
from ..record import Panel, Record
from .heads import curve
from .methods import cap, methods, recipe, record_of, signed, target, targets, title, unit
from .pack import pack, thin
from .phrases import highest_first, in_state
from .shelf import Shelf, stack

__all__ = [
    "agreement",
    "answers",
    "attention",
    "attribution",
    "ceiling",
    "prompt",
    "source_of_copy",
]

POSITIONS = ("example", "position")

EXAMPLES = 6
"""So many examples are drawn as coloured texts."""

AGREEING = {"integrated_gradients": "integrated gradients", "saliency": "saliency"}
"""Methods that are compared with the attention of a head."""

ATTENDED = ("head", "key_position")


def prompt(shelf: Shelf) -> dict[str, Any] | None:
    """Return the shown prompt: its tokens, what follows, and which token there is to copy.

    It is the prompt of the recorded attention, or the first example of the attributions.
    """
    attended = shelf.last("prompt/attention", ATTENDED)
    # Only looked at: without the names of its tokens an attribution cannot be drawn.
    explained = [shelf.peek(record_of(m), POSITIONS) for m in methods(shelf)]
    lists = [_labels(attended, "key_position")] + [_asked(r[-1]) for r in explained if r]
    tokens = next((tokens for tokens in lists if tokens), None)
    if tokens is None:
        return None
    return {"tokens": tokens, "ends": len(tokens) - 1, "source": source_of_copy(tokens)}


def _asked(record: Record | None) -> list[str]:
    """Tokens of the first example up to the position whose logits the target reads."""
    tokens = _first_example(record)
    ends = record.panel.convention.get("target_position") if record is not None else None
    return tokens[: int(ends[0]) + 1] if isinstance(ends, list) and ends else tokens


def source_of_copy(tokens: Sequence[str]) -> int | None:
    """Return where the continuation of the longest earlier copy of the ending begins.

    Args:
        tokens: The prompt.

    Returns:
        The position that an induction head should look at from the last token, or None where the
        last token did not occur before.

    Example:
        >>> source_of_copy(["a", "b", "c", "x", "b", "a", "b"])
        2
    """
    best, at = 0, None
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length > best:
            best, at = length, end + 1
    return at


def attention(shelf: Shelf, tokens: Sequence[str]) -> dict[str, Any] | None:
    """Return the attention of the kept heads from the last token, at each step."""
    records = shelf.get("prompt/attention", ATTENDED)
    if not records or not _same(_labels(records[-1], "key_position") or tokens, tokens):
        return None
    labels = list(dict.fromkeys(h for r in records for h in _heads(r)))
    records = records[thin(len(records), len(labels) * len(tokens))]
    values = np.full((len(records), len(labels), records[-1].panel.values.shape[1]), np.nan)
    for i, record in enumerate(records):
        # The kept heads may change from step to step, as other ones become the strongest.
        rows = [labels.index(h) for h in _heads(record)]
        values[i, rows] = np.asarray(record.panel.values, float)
    packed = pack(values, bits=8)
    return {
        "heads": labels,
        "at": [r.step for r in records],
        "values": packed,
        "width": values.shape[2],
    }


def _heads(record: Record) -> list[str]:
    count = record.panel.values.shape[0]
    return [str(h) for h in record.panel.coords.get("head", range(count))]


def answers(shelf: Shelf) -> dict[str, Any] | None:
    """Return the model's best continuations at each step, and what really follows."""
    records = shelf.get("prompt/answers", ("token",))
    if not records:
        return None
    facts = records[-1].panel.convention
    texts = [[str(t) for t in r.panel.coords.get("token", [])] for r in records]
    return {
        "at": [r.step for r in records],
        "top": [
            [[t, round(float(v), 4)] for t, v in zip(names, r.panel.values, strict=False)]
            for names, r in zip(texts, records, strict=True)
        ],
        "right": _pick(facts, "target", "truth", "answer", "next"),
        "probability": [
            _pick(r.panel.convention, "target_probability", "probability", "p") for r in records
        ],
    }


def _pick(facts: Any, *keys: str) -> Any:
    return next((facts[k] for k in keys if k in facts), None)


def attribution(shelf: Shelf, method: str, tokens: Sequence[str]) -> dict[str, Any] | None:
    """Return one method's value of every token of the prompt at each step.

    Args:
        shelf: The records.
        method: Name of the measurement.
        tokens: The tokens of the prompt, which the first example must have.

    Returns:
        Values with one scale for the whole run, signed ones as they are and others as shares of
        their example; None where there are none for this prompt.
    """
    records = shelf.peek(record_of(method), POSITIONS)
    if not records or not _same(_first_example(records[-1]) or tokens, tokens):
        return None
    records = shelf.get(record_of(method), POSITIONS)
    count, width = records[-1].panel.values.shape
    count = min(count, EXAMPLES)
    records = records[thin(len(records), count * width)]
    values, panel = stack(records)[:, :count], records[-1].panel
    with_sign = signed(panel)
    if not with_sign:
        total = np.nansum(np.abs(values), axis=2, keepdims=True)
        # Nothing to share out is undefined, not zero.
        values = np.divide(values, total, out=np.full_like(values, np.nan), where=total > 0)
    floor = 0.5 if panel.unit in ("logits", "nats") else 0.0
    return {
        "title": title(method),
        "signed": with_sign,
        "at": [r.step for r in records],
        "values": pack(values[:, 0]),
        "width": width,
        "unit": unit(panel) if with_sign else "share of the total",
        "cap": cap(values, floor if with_sign else 3 / width),
        "target": target(panel),
        "how": recipe(records[-1]),
        "gap": _gap(shelf, method, [r.step for r in records]) if with_sign else None,
        "texts": _texts(panel, count),
        "each": pack(values, bits=8),
    }


def _texts(panel: Panel, count: int) -> list[dict[str, Any]]:
    """Tokens and target of each example, padding at the end left out; nothing where unnamed."""
    named = panel.coords.get("example,position")
    if not isinstance(named, list) or count < 2:
        return []
    asked = targets(panel)
    ends = panel.convention.get("lengths")
    return [
        {
            "tokens": [str(t) for t in row][: int(ends[i]) if isinstance(ends, list) else None],
            "target": asked[i] if i < len(asked) else None,
        }
        for i, row in enumerate(named[:count])
    ]


def _gap(shelf: Shelf, method: str, steps: list[int]) -> Any:
    records = {r.step: r for r in shelf.get(f"{method.split('/')[0]}/gap", ("example",))}
    if not records:
        return None
    missing = np.nan
    return pack(
        np.array([float(records[s].panel.values[0]) if s in records else missing for s in steps])
    )


def agreement(shelf: Shelf, heads: Sequence[HeadOnset] = ()) -> dict[str, Any] | None:
    """Return the rank correlations of attributions with the head's attention over steps."""
    series = []
    facts: dict[str, Any] = {}
    for method, name in AGREEING.items():
        found = curve(shelf, f"agreement/{method}", name)
        if found is not None:
            series.append({**found, "key": method})
            facts |= (shelf.last(f"agreement/{method}", ()) or shelf.all[0]).panel.convention
    if not series:
        return None
    keep = {k: facts.get(k) for k in ("n", "head")}
    return {
        "series": series,
        "floor": floor(facts.get("floor")),
        "ceiling": ceiling(shelf, heads),
        **keep,
    }


def ceiling(shelf: Shelf, heads: Sequence[HeadOnset]) -> dict[str, Any] | None:
    """Return how well the attention of a second induction head agrees with that of the first.

    Two heads of one role look at the prompt for the same reason. An explanation of the model cannot
    be asked to agree with one of them better than the other does.

    Args:
        shelf: The records.
        heads: Onsets of the induction heads.

    Returns:
        ``value``, the median rank correlation over the last quarter of the steps, and ``says``;
        None where fewer than two induction heads formed, the attention of one was not kept, or the
        two agree no more than random orders do.
    """
    best = highest_first(in_state(heads, "formed"))[:2]
    records = shelf.get("prompt/attention", ATTENDED)
    if len(best) < 2 or not records:
        return None
    late = records[-max(3, len(records) // 4) :]
    found = [_alike(r, best[0].label, best[1].label) for r in late]
    known = [rho for rho in found if np.isfinite(rho)]
    # Two heads that agree no more than random orders do bound nothing.
    if not known or np.median(known) <= permutation_floor(records[-1].panel.values.shape[1]):
        return None
    says = f"the attention of {best[1].label} against that of {best[0].label}, at the end"
    return {"value": round(float(np.median(known)), 4), "says": says}


def _alike(record: Record, one: str, other: str) -> float:
    """Rank correlation of two heads' attention; NaN where a row was not kept."""
    names = _heads(record)
    if one not in names or other not in names:
        return float("nan")
    rows = record.panel.values[[names.index(one), names.index(other)]].double()
    return spearman(rows[0], rows[1])


def floor(found: Any) -> list[float] | None:
    """Return the interval of a random order, from one bound or two."""
    if isinstance(found, list | tuple) and len(found) == 2:
        return [float(found[0]), float(found[1])]
    if isinstance(found, int | float) and np.isfinite(found):
        return [-abs(float(found)), abs(float(found))]
    return None


def _labels(record: Record | None, axis: str) -> list[str]:
    return [] if record is None else [str(t) for t in record.panel.coords.get(axis, [])]


def _first_example(record: Record | None) -> list[str]:
    if record is None:
        return []
    texts = record.panel.coords.get("example,position") or record.panel.coords.get("position") or []
    first = texts[0] if texts and isinstance(texts[0], list) else texts
    return [str(t) for t in first]


def _same(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether the shorter is the beginning of the longer."""
    shared = min(len(a), len(b))
    return list(a[:shared]) == list(b[:shared])
