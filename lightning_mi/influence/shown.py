"""Panels of the top proponents and opponents, as loggers and the report show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import fingerprint, main_input
from ..beneath import grey
from ..measurement import Context, IndexedData
from ..record import Panel, Reading
from ..task import NextToken
from .data import row
from .result import InfluenceScores, TokenShares, extremes
from .tokens import text_ids

__all__ = ["shown_panels"]

DEPTH = 8
"""Examples that are looked through for each that is shown, to find equal ones."""

PICTURE = {"picture": "examples"}
"""Tells loggers and the report to draw the examples themselves."""


def shown_panels(result: InfluenceScores, context: Context, data: IndexedData, k: int) -> Reading:
    """Return the top and bottom examples of the first query; equal examples count as one.

    Args:
        result: The scores.
        context: Decodes tokens.
        data: The training examples.
        k: Proponents and opponents that are shown.

    Returns:
        ``proponents`` and ``opponents`` (scores over ``train_example``, texts and descriptions in
        the convention, with ``copies``, the dataset indices of equal examples, where there are
        any), for images ``images`` (grey, over train_example, y, x), and for language models
        ``tokens`` (shares over train_example, position).
    """
    scores = result.values[0]
    rows = result.details.get("rows")
    asked = rows[0] if rows else _query_text(context)
    common = {**PICTURE, "query_text": asked, "orientation": result.orientation}
    panels: dict[str, Panel] = {}
    shown: dict[str, list[int]] = {}
    sides = zip(("proponents", "opponents"), extremes(scores, DEPTH * k), strict=True)
    for name, columns in sides:
        found = _distinct(columns, result, data, k)
        shown[name] = [result.indices[c] for c, _ in found]
        if found:
            about = {**common, "side": name}
            panels[name] = _table(scores, found, result, data, context, about)
    images = _images([i for name in shown for i in shown[name]], data, common)
    if images is not None:
        panels["images"] = images
    shares = result.tokens[0] if result.tokens else None
    kept = None if shares is None else _kept(shares, shown)
    if kept is not None and kept.indices:
        count = len(set(kept.indices) & set(shown["proponents"]))
        panels["tokens"] = _strip(kept, context, {**common, "proponents": count})
    return panels


def _distinct(
    columns: Sequence[int], result: InfluenceScores, data: IndexedData, k: int
) -> list[tuple[int, list[int]]]:
    """Return the first k columns whose examples differ, each with the indices of its copies.

    The one with the smallest index stands for equal ones, so that it is the same at every step.
    """
    found: dict[str, list[int]] = {}
    for column in columns:
        mark = fingerprint(data.batch([result.indices[column]]))
        if mark not in found and len(found) >= k:
            break
        found.setdefault(mark, []).append(column)
    groups = (sorted(same, key=lambda c: result.indices[c]) for same in found.values())
    return [(first, [result.indices[c] for c in rest]) for first, *rest in groups]


def _table(
    scores: Tensor,
    found: Sequence[tuple[int, list[int]]],
    result: InfluenceScores,
    data: IndexedData,
    context: Context,
    convention: dict[str, Any],
) -> Panel:
    indices = [result.indices[c] for c, _ in found]
    copies = [equal for _, equal in found]
    words: dict[str, Any] = {
        "descriptions": [
            data.describe(i) + (f" and {len(c)} equal" if c else "")
            for i, c in zip(indices, copies, strict=True)
        ]
    }
    if any(copies):
        words["copies"] = copies
    if result.tokens:
        words["texts"] = [_text(i, context, data) for i in indices]
    values = scores[[c for c, _ in found]]
    coords = {"train_example": indices}
    return Panel(values, ("train_example",), coords, "1", {**convention, **words})


def _images(indices: Sequence[int], data: IndexedData, convention: dict[str, Any]) -> Panel | None:
    """Return the examples in grey, where they are images."""
    if not indices:
        return None
    inputs = [main_input(data.batch([i])) for i in indices]
    first = inputs[0]
    fits = first.ndim == 4 and first.is_floating_point() and first.shape[1] in (1, 3)
    if not fits or any(x.shape != first.shape for x in inputs):
        return None
    about = {"display": {}, "of": "training examples in grey, each stretched to 0 … 255"}
    coords = {"train_example": list(indices)}
    return Panel(grey(torch.cat(inputs)), ("train_example", "y", "x"), coords, "1", about)


def _kept(shares: TokenShares, shown: dict[str, list[int]]) -> TokenShares:
    """Return the shares of the examples that are shown."""
    wanted = {i for indices in shown.values() for i in indices}
    rows = [r for r, i in enumerate(shares.indices) if i in wanted]
    indices = tuple(shares.indices[r] for r in rows)
    return TokenShares(indices, shares.values[rows], shares.ids[rows])


def _strip(shares: TokenShares, context: Context, convention: dict[str, Any]) -> Panel:
    coords = {
        "train_example": shares.indices,
        "train_example,position": [pieces(ids, context) for ids in shares.ids],
    }
    return Panel(shares.values, ("train_example", "position"), coords, "1", convention)


def pieces(ids: Tensor, context: Context) -> list[str]:
    """Return the text of each token, empty where it is padding.

    Args:
        ids: Token ids, -1 for padding.
        context: Decodes them.

    Returns:
        One text for each.
    """
    known = [i for i in ids.tolist() if i >= 0]
    found = iter(context.texts(known))
    return [next(found) if i >= 0 else "" for i in ids.tolist()]


def _text(index: int, context: Context, data: IndexedData) -> str:
    return _glued(data.batch([index]), context) or ""


def _glued(batch: Any, context: Context) -> str | None:
    if not isinstance(context.task, NextToken):
        return None
    ids = text_ids(context.task, batch)[0]
    glue = "" if context.decode is not None else " "
    return glue.join(p for p in pieces(ids, context) if p)


def _query_text(context: Context) -> str | None:
    return _glued(row(context.batch, 0), context)
