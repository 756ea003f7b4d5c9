"""A whole offline run with the four monitors, read with W&B's own tools, without an account."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _wandb
import pytest
from cases import language_model, lightning, loaders, trainer
from test_workspace import HEADLINES, all_keys, needs_extra

from lightning_mi import Run
from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    IntegratedGradientsMonitor,
    SaliencyMonitor,
)
from lightning_mi.sinks import plan
from lightning_mi.sinks.wandb import build_workspace
from lightning_mi.sinks.workspace_keys import STANDARD, logged

PATIENCE = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Return the run folder and the folder of the offline W&B run of one training.

    The user's model logs a key of its own that begins like ours.
    """
    import wandb

    class Own(type(language_model())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("mixup/loss", loss)
            return loss

    folder = tmp_path_factory.mktemp("leet")
    logger = lightning().loggers.WandbLogger(offline=True, save_dir=folder)
    kinds = (HeadMonitor, SaliencyMonitor, IntegratedGradientsMonitor, InfluenceMonitor)
    monitors = [kind(every_n_train_steps=3, report=True) for kind in kinds]
    options = {"callbacks": monitors, "logger": logger, "max_steps": 9, "log_every_n_steps": 1}
    try:
        trainer(default_root_dir=folder, **options).fit(Own(), *loaders())
        files = Path(logger.experiment.dir)
    finally:
        if wandb.run is not None:
            wandb.finish()
    assert monitors[0].run_path is not None
    return Run.open(monitors[0].run_path), files.parent


@pytest.fixture(scope="module")
def rows(finished: tuple[Run, Path]) -> list[dict[str, Any]]:
    return _wandb.rows(finished[1])


def keys_of(rows: list[dict[str, Any]]) -> set[str]:
    """Return the keys of this package, without what W&B notes beside a picture."""
    found = {key.split(".")[0] for row in rows for key in row}
    return {key for key in found if key.startswith(("mi/", "mi_"))} - {"mi/step"}


def test_values_are_those_of_the_records(
    finished: tuple[Run, Path], rows: list[dict[str, Any]]
) -> None:
    run, _ = finished
    compared = 0
    for step in (0, 3, 6, 9):
        live = [r for r in run.records(source="live") if r.step == step]
        shown = [r for r in live if not r.what.endswith("_final")]
        read = {k: v for row in rows if row.get("mi/step") == step for k, v in row.items()}
        for measurement in {r.measurement for r in shown}:
            scalars = plan([r for r in shown if r.measurement == measurement]).scalars
            for key in scalars.keys() - {"mi/nonfinite", "mi/overhead"}:
                assert read[key] == scalars[key], (step, key)
                compared += 1
    assert compared > 40


def test_summary_says_how_it_came_out(finished: tuple[Run, Path]) -> None:
    kept = _wandb.summary(finished[1])
    for key, name in (("induction", "induction"), ("prev_token", "previous_token")):
        curve = finished[0].records(f"head_scores/{name}", source="live")
        best = [r.panel.values.max().item() for r in curve if r.what == name]
        assert (kept[f"{key}_final"], kept[f"{key}_best"]) == (best[-1], max(best))
        assert f"{key}_onset" not in kept  # too few steps to claim one


def test_every_key_is_foreseen(finished: tuple[Run, Path], rows: list[dict[str, Any]]) -> None:
    run, _ = finished
    assert keys_of(rows) == set(logged(run))
    others = {key for key in STANDARD if key.endswith(("/image", "/bars"))}
    assert keys_of(rows) == set(STANDARD) - others


def test_own_keys_of_the_user_keep_their_axis(finished: tuple[Run, Path]) -> None:
    found = _wandb.entries(finished[1])
    metrics = [e["metric"] for e in found if e["type"] == "metric"]
    ours = [m for m in metrics if m.get("step_metric") == "mi/step"]
    globs = [m["glob_name"] for m in ours if "glob_name" in m]
    assert "mi/*" in globs
    for key in ("mixup/loss", "mi", "mish/x", "mi_", "train/mi/x"):
        assert not [glob for glob in globs if fnmatch.fnmatch(key, glob)]
    assert "mixup/loss" not in {m.get("name") for m in ours}
    rows = [e["history"]["item"] for e in found if e["type"] == "history"]
    assert sum("mixup/loss" in row for row in rows) == 9


def test_report_and_table_come_once(rows: list[dict[str, Any]]) -> None:
    for key in ("mi_run/report._type", "mi_run/table._type"):
        assert [row["mi/step"] for row in rows if key in row] == [9]


@needs_extra
def test_dashboard_shows_every_key_once(
    finished: tuple[Run, Path], rows: list[dict[str, Any]]
) -> None:
    made = build_workspace("team", "project", run=finished[0])
    assert sorted(all_keys(made)) == sorted(keys_of(rows))


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux, which shows the screen, is missing")
@pytest.mark.parametrize(
    ("columns", "lines", "pressed"),
    [(200, 50, ()), (120, 36, ("[", "]"))],
    ids=["with side panes", "without"],
)
def test_first_page_of_leet_shows_the_headlines(
    columns: int, lines: int, pressed: tuple[str, ...], finished: tuple[Run, Path], tmp_path: Path
) -> None:
    page = screen(finished[1], (columns, lines), pressed, tmp_path)
    titles = re.findall(r"│(mi[/_]\S+) ", page)
    assert set(titles) >= {*HEADLINES, "mi/step"}, page
    assert not [t for t in titles if t.startswith("mi/") and t.endswith("...")]


def screen(folder: Path, size: tuple[int, int], pressed: tuple[str, ...], tmp_path: Path) -> str:
    """Open a run in leet, in a terminal of this size, and return what stands in it."""
    tmux = ["tmux", "-u", "-f", os.devnull, "-L", f"leet-{os.getpid()}"]
    # Under settings of its own: leet keeps its layout in the user's.
    shown = ["env", f"WANDB_CONFIG_DIR={tmp_path}", sys.executable, "-m", "wandb", "leet"]
    start = ["new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), *shown, str(folder)]
    subprocess.run([*tmux, *start], check=True)
    try:
        _wait(tmux, "│mi/agree_ig")
        for key in pressed:
            subprocess.run([*tmux, "send-keys", key], check=True)
        return _wait(tmux, "│mi/prev_token")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def _wait(tmux: list[str], words: str) -> str:
    """Return the screen once it shows these words and has stopped changing."""
    before, end = "", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        command = [*tmux, "capture-pane", "-p"]
        page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if words in page and page == before:
            return page
        before = page
        time.sleep(0.5)
    raise AssertionError(f"leet did not show {words!r} in {PATIENCE:.0f} s:\n{before}")
