"""What each logger shows, as the table of the docs says, read back from real runs."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from _loggers import PLACES, REPORT, place
from test_sinks import firing

from lightning_mi import Run
from lightning_mi.report import write_report
from lightning_mi.sinks import sinks_for
from lightning_mi.sinks.base import _say_once

# MLflow asks SQLAlchemy for what 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

PAGE = Path(__file__).parents[1] / "docs" / "loggers.md"
LIMITS = {
    "pictures": "pictures",
    "examples": "training examples",
    "constants": "constants",
    "table": "table of all records",
    "report": "the report",
}
"""By column: how a logger without it is told."""

SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("W&B", "MLflow", "Comet", "trackio")
]
FAST = ["TensorBoard", "CSV"]


def documented() -> dict[str, dict[str, str]]:
    """Return the table of the docs: logger, column, cell."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def filled(folder: Path) -> Run:
    """Return a run folder with records of two steps, and a report."""
    run = Run.create(folder, {"model": "tiny", "summary": {"onset": 6, "head": "L0H1"}})
    run.write_all([*firing(1), *firing(2)])
    run.report.write_text(REPORT, encoding="utf-8")
    return run


def pictures_open() -> list[int]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else list(pyplot.get_fignums())


def test_the_table_names_every_logger() -> None:
    assert set(documented()) == {*PLACES, "none"}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_every_cell(name: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    where = place(name, tmp_path, monkeypatch)
    run = filled(tmp_path / "mi")
    channel = logging.getLogger("pytorch_lightning")
    monkeypatch.setattr(channel, "level", logging.INFO)
    channel.manager._clear_cache()  # type: ignore[attr-defined]
    _say_once.cache_clear()
    logger = where.make()
    for sink in sinks_for([logger]):
        sink.start({"model": "tiny"})
        for step in (1, 2):
            sink.write_all(firing(step))
        sink.finish(run, run.info["summary"])
    where.close(logger)
    row = documented()[name]
    assert where.holds(logger) == row
    for column, words in LIMITS.items():
        told = [message for message in caplog.messages if f"no place for the {words}" in message]
        told += [m for m in caplog.messages if f"and {words} of" in m]
        assert len(told) == (row[column] == "no"), (column, told)
    assert not pictures_open()


def test_no_logger(tmp_path: Path) -> None:
    run = filled(tmp_path)
    records = {(r.name, r.step) for r in run.records()}
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    page = write_report(run).read_text(encoding="utf-8")
    found = {
        "scalars": "records" if ("head_scores/copy_gain", 2) in records else "no",
        "pictures": "report" if "head_scores" in page else "no",
        "examples": "report" if "influence" in page else "no",
        "constants": "run.json" if facts["model"] == "tiny" else "no",
        "summary": "run.json" if facts["summary"]["head"] == "L0H1" else "no",
        "table": "records" if ("head_scores/induction", 1) in records else "no",
        "report": "HTML file" if "<html" in page else "no",
    }
    assert found == documented()["none"]
