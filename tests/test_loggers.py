"""What each logger shows, as the table of the docs says, read back from real runs."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _loggers import PLACES, REPORT, place
from cases import language_model, loaders, trainer
from test_sinks import firing

from lightning_mi import Context, Reading, Run
from lightning_mi.callbacks import MeasurementMonitor
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


@dataclass(frozen=True)
class Canned:
    """The panels of one measurement out of `firing`."""

    name: str

    def __call__(self, model: torch.nn.Module, context: Context) -> Reading:
        return {r.what: r.panel for r in firing() if r.measurement == self.name}


CANNED = [Canned(name) for name in ("head_scores", "saliency", "vision", "table", "influence")]


def test_no_logger(tmp_path: Path) -> None:
    monitor = MeasurementMonitor(measurements=CANNED, every_n_train_steps=1, report=True)
    fitted = trainer(callbacks=[monitor], logger=False, default_root_dir=tmp_path, max_steps=2)
    fitted.fit(language_model(), *loaders())
    run = Run.open(tmp_path / "mi")
    records = {(r.name, r.step): r.panel for r in run.records()}
    page = run.report.read_text(encoding="utf-8")
    facts = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    found = {
        "scalars": "records" if records["head_scores/copy_gain", 2].item() == 0.5 else "no",
        "pictures": "report" if "head_scores" in page and "saliency" in page else "no",
        "examples": "report" if "influence" in page and "train_example" in page else "no",
        "constants": "run.json" if facts["model"] == "LanguageModel" else "no",
        "summary": "run.json" if "summary" in facts else "no",
        "table": "records"
        if {("influence/tokens", s) for s in (0, 1, 2)} <= set(records)
        else "no",
        "report": "HTML file" if "<html" in page else "no",
    }
    assert found == documented()["none"]


def test_several_loggers_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    places = [place(name, tmp_path, monkeypatch) for name in FAST]
    made = [where.make() for where in places]
    monitor = MeasurementMonitor(measurements=CANNED, every_n_train_steps=1)
    fitted = trainer(callbacks=[monitor], logger=made, default_root_dir=tmp_path, max_steps=2)
    fitted.fit(language_model(), *loaders())
    for name, where, logger in zip(FAST, places, made, strict=True):
        where.close(logger)
        held, row = where.holds(logger), documented()[name]
        assert (held["scalars"], held["pictures"]) == (row["scalars"], row["pictures"])
    assert not pictures_open()
