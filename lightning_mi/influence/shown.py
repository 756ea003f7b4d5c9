"""Panels of the top proponents and opponents, as loggers and the report show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..measurement import Context, IndexedData
from ..record import Panel, Reading
from ..task import NextToken
from .data import row
from .result import InfluenceScores, TokenShares, extremes
from .tokens import text_ids

__all__ = ["shown_panels"]

PICTURE = {"picture": "examples"}
"""Tells loggers and the report to draw the examples themselves."""


def shown_panels(result: InfluenceScores, context: Context, data: IndexedData, k: int) -> Reading:
    """Return the top and bottom examples of the first query.

    Args:
        result: The scores.
        context: Decodes tokens.
        data: The training examples.
        k: Proponents and opponents that are shown.

    Returns:
        ``proponents`` and ``opponents`` (scores over ``train_example``, texts and descriptions in
        the convention) and for language models ``tokens`` (shares over train_example, position).
    """
    scores = result.values[0]
    high, low = extremes(scores, k)
    shares = result.tokens[0] if result.tokens else None
    texts = {} if shares is None else _joined(shares, context)
    rows = result.details.get("rows")
    asked = rows[0] if rows else _query_text(context)
    common = {**PICTURE, "query_text": asked, "orientation": result.orientation}
    panels = {}
    for name, columns in (("proponents", high), ("opponents", low)):
        if columns:
            indices = [result.indices[c] for c in columns]
            panels[name] = _table(scores[columns], indices, data, texts, {**common, "side": name})
    if shares is not None and shares.indices:
        panels["tokens"] = _strip(shares, context, {**common, "proponents": len(high)})
    return panels


def _table(
    values: Tensor,
    indices: Sequence[int],
    data: IndexedData,
    texts: dict[int, str],
    convention: dict[str, Any],
) -> Panel:
    words = {"descriptions": [data.describe(i) for i in indices]}
    if texts:
        words["texts"] = [texts[i] for i in indices]
    return Panel(
        values, ("train_example",), {"train_example": indices}, "1", {**convention, **words}
    )


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


def _joined(shares: TokenShares, context: Context) -> dict[int, str]:
    glue = "" if context.decode is not None else " "
    rows = zip(shares.indices, shares.ids, strict=True)
    return {i: glue.join(p for p in pieces(ids, context) if p) for i, ids in rows}


def _query_text(context: Context) -> str | None:
    if not isinstance(context.task, NextToken):
        return None
    ids = text_ids(context.task, row(context.batch, 0))[0]
    glue = "" if context.decode is not None else " "
    return glue.join(p for p in pieces(ids, context) if p)
