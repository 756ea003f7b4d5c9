"""All records of a run as one long table: one value a row."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence

from ..record import Panel, Record
from .texts import labels

__all__ = ["COLUMNS", "Row", "csv_text", "long_table"]

COLUMNS = ["name", "step", "coordinates", "value"]
Row = tuple[str, int, str, float | None]

LARGEST_PANEL = 4096
"""Larger panels (images, patterns) stay in the run folder: a table of pixels helps nobody."""


def long_table(records: Sequence[Record], limit: int = 50_000) -> list[Row]:
    """Return the values of all records.

    Args:
        records: Records of a run.
        limit: About so many rows at most; where there are more, steps are thinned evenly and the
            first and the last of each record stay.

    Returns:
        Rows of `COLUMNS`; coordinates are text such as ``"layer=1 head=3"``, and a value that is
        not finite is None.

    Example:
        >>> long_table([Record("head_scores/induction", Panel([0.5, 0.75], ("head",)), step=4)])[1]
        ('head_scores/induction', 4, 'head=1', 0.75)
    """
    kept = [record for record in records if record.panel.values.numel() <= LARGEST_PANEL]
    total = sum(record.panel.values.numel() for record in kept)
    every = math.ceil(total / limit) if total > limit else 1
    return [row for record in _thinned(kept, every) for row in _rows(record)]


def csv_text(records: Sequence[Record]) -> str:
    """Return the long table as the text of a CSV file.

    Args:
        records: Records of a run.

    Returns:
        A line of `COLUMNS`, then one a row; a value that is not finite is left empty.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(long_table(records))
    return file.getvalue()


def _thinned(records: Sequence[Record], every: int) -> Iterator[Record]:
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    for series in by_name.values():
        last = len(series) - 1
        yield from (r for i, r in enumerate(series) if i % every == 0 or i == last)


def _rows(record: Record) -> Iterator[Row]:
    values: list[float] = record.panel.values.double().flatten().tolist()
    for place, value in zip(_places(record.panel), values, strict=True):
        yield record.name, record.step, place, value if math.isfinite(value) else None


def _places(panel: Panel) -> Iterator[str]:
    named = [[f"{axis}={label}" for label in labels(panel, axis)] for axis in panel.axes]
    return (" ".join(place) for place in itertools.product(*named))
