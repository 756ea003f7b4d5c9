"""Resumed, swept, side by side: each logger holds what the run folder holds, each row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from _loggers import RESUMED, USERS, Place, place, standing
from cases import Gradients, Norm, language_model, lightning, loaders, trainer

from lightning_mi import Record, Run, sweep
from lightning_mi.callbacks import MeasurementMonitor, ScheduledCheckpoint
from lightning_mi.sinks import plan, sinks_for

# MLflow asks SQLAlchemy for what 2.1 gives up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated",
    "ignore:Experiment logs directory .* exists and is not empty:UserWarning",
)
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("W&B", "MLflow", "Comet", "trackio")
]
EACH = pytest.mark.parametrize("name", ["TensorBoard", "CSV", *SLOW])

COUNTS = ("mi/step", "mi/nonfinite", RESUMED)
"""Keys that stand in several rows of a step: they say nothing of a single record."""


class Logs:
    """Mixed into a LightningModule: the user's own logging."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        self.log("loss", loss)  # type: ignore[attr-defined]
        self.log(USERS, loss / 2)  # type: ignore[attr-defined]
        return loss


def fit(logger: Any, folder: Path, steps: int, *, every: int = 1, **options: Any) -> Path:
    """Train, and return the run folder."""
    lightning().seed_everything(options.pop("seed", 1), verbose=False)
    checkpoint = options.pop("ckpt_path", None)
    monitors = [MeasurementMonitor(measurements=[Norm()], every_n_train_steps=every)]
    saver = ScheduledCheckpoint(folder / "saved", every_n_train_steps=1)
    callbacks = options.pop("callbacks", [*monitors, saver])
    settings = {"logger": logger, "max_steps": steps, "log_every_n_steps": 1} | options
    fitted = trainer(callbacks=callbacks, default_root_dir=folder, **settings)
    model = language_model()
    model.__class__ = type("User", (Logs, type(model)), {})
    fitted.fit(model, *loaders(), ckpt_path=checkpoint)
    path = monitors[0].run_path
    return folder if path is None else path


def expected(records: Iterable[Record]) -> dict[tuple[str, int], float]:
    """Return what a logger has to show of a run: a number for each key and step."""
    found: dict[int, dict[str, Record]] = {}
    for record in records:
        steps = found.setdefault(record.step, {})
        if record.source == "live" or record.name not in steps:
            steps[record.name] = record
    planned = {step: plan(list(group.values())).scalars for step, group in found.items()}
    return {
        (key, step): value
        for step, scalars in planned.items()
        for key, value in scalars.items()
        if key not in COUNTS
    }


def check(where: Place, logger: Any, run: Run) -> None:
    """Compare a closed logger with a run folder, step by step."""
    rows = [row for row in standing(where.rows(logger)) if row.key not in COUNTS]
    wanted = expected(run.records())
    assert Counter((row.key, row.step) for row in rows) == Counter(wanted.keys())
    for row in rows:
        assert row.value == pytest.approx(wanted[row.key, row.step], rel=1e-6), row


@EACH
def test_resumed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    where = place(name, tmp_path, monkeypatch)
    first = where.make()
    fit(first, tmp_path, 6)
    where.close(first)
    logger = where.make()
    step_4 = tmp_path / "saved" / "step=4.ckpt"
    run = Run.open(fit(logger, tmp_path, 10, every=2, ckpt_path=step_4))
    where.close(logger)
    assert [r.step for r in run.records("norm")] == [0, 1, 2, 3, 4, 6, 8, 10]
    check(where, logger, run)
    goes_on = first.version == logger.version and name != "CSV"
    marks = [row.value for row in where.rows(logger) if row.key == RESUMED]
    assert marks == ([4.0] if goes_on else [])


@EACH
def test_swept_into_the_run_that_trained(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    where = place(name, tmp_path, monkeypatch)
    logger = where.make()
    run = Run.open(fit(logger, tmp_path, 6, every=2))
    where.close(logger)
    again = where.make()
    for _ in range(2):  # Repeated, a sweep has nothing to add.
        sweep(tmp_path / "saved", language_model(), [Norm(), Gradients()], run=run, logger=again)
    where.close(again)
    assert {r.step for r in run.records("norm", source="sweep")} == set(range(7))
    check(where, again, run)


@EACH
def test_seeds_side_by_side(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    where = place(name, tmp_path, monkeypatch)
    done = []
    for seed in (1, 2, 3):
        logger = where.make(f"seed{seed}")
        done.append((logger, fit(logger, tmp_path / str(seed), 3, seed=seed)))
        where.close(logger)
    values = set()
    for logger, path in done:
        run = Run.open(path)
        check(where, logger, run)
        values.add(run.records("norm")[-1].panel.item())
    assert len(values) == 3


@EACH
def test_the_users_rows_are_the_same_without_us(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    where = place(name, tmp_path, monkeypatch)
    found = []
    for kind in ("with", "without"):
        logger = where.make(kind)
        options = {} if kind == "with" else {"callbacks": []}
        fit(logger, tmp_path / kind, 4, **options)
        where.close(logger)
        found.append((where.others(logger), bool(where.rows(logger))))
    (with_us, ours), (without, none) = found
    assert ours
    assert not none
    assert with_us == without
    assert Counter(key for key, *_ in with_us) == {"loss": 4, USERS: 4}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_logger_that_joins_late_gets_what_was_measured(
    earlier: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    where = place("TensorBoard", tmp_path, monkeypatch)
    first = where.make("other") if earlier else False
    fit(first, tmp_path, 4)
    logger = where.make()
    run = Run.open(fit(logger, tmp_path, 6, ckpt_path=tmp_path / "saved" / "step=4.ckpt"))
    where.close(logger)
    assert [r.step for r in run.records("norm")] == list(range(7))
    check(where, logger, run)


@pytest.mark.parametrize("logged", [(False, True, True), (True, False, True)])
def test_three_sessions(logged: tuple[bool, ...], tmp_path: Path, monkeypatch: Any) -> None:
    where = place("TensorBoard", tmp_path, monkeypatch)
    checkpoint, path = None, tmp_path
    for session, wanted in enumerate(logged, 1):
        logger = where.make() if wanted else False
        path = fit(logger, tmp_path, 2 * session, ckpt_path=checkpoint)
        checkpoint = tmp_path / "saved" / f"step={2 * session}.ckpt"
        if logger:
            where.close(logger)
    run = Run.open(path)
    assert [r.step for r in run.records("norm")] == list(range(7))
    check(where, logger, run)


def test_a_sweep_of_its_own_reaches_several_loggers(tmp_path: Path, monkeypatch: Any) -> None:
    fit(False, tmp_path, 3)
    places = [place(name, tmp_path, monkeypatch) for name in ("TensorBoard", "CSV")]
    made = [where.make() for where in places]
    run = sweep(tmp_path / "saved", language_model(), Norm(), run=tmp_path / "own", logger=made)
    assert [(r.step, r.source) for r in run.records("norm")] == [(s, "sweep") for s in range(4)]
    for where, logger in zip(places, made, strict=True):
        where.close(logger)
        check(where, logger, run)


class Nameless:
    """A logger that cannot say what it is called."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        raise RuntimeError("not connected")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append(metrics)


def test_a_broken_logger_harms_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    fit(False, tmp_path, 2)
    where = place("CSV", tmp_path, monkeypatch)
    broken, logger = Nameless(), where.make()
    with pytest.warns(UserWarning, match="Nameless failed .RuntimeError: not connected"):
        run = sweep(tmp_path / "saved", language_model(), Norm(), logger=[broken, logger])
    where.close(logger)
    check(where, logger, run)
    assert not broken.rows
    assert len(sinks_for([broken, logger])) == 2
