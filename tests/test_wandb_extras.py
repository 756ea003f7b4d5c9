"""`WandbExtras`: alerts on emergence, and the run folder as an artifact."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _wandb
import pytest
import torch
from cases import PACKAGES, language_model, lightning, loaders, trainer

from lightning_mi import Context, Panel, Reading
from lightning_mi.callbacks import MeasurementMonitor, WandbExtras
from lightning_mi.errors import ArgumentError

HEADS = ("layer", "head")


@dataclass(frozen=True)
class Rising:
    """Scores of a head that rises at step 3, beside one that never does."""

    name: str = "head_scores"

    def __call__(self, model: torch.nn.Module, context: Context) -> Reading:
        risen = 0.9 if context.step >= 3 else 0.05
        shown: Any = {"display": {}}
        return {
            "induction": Panel([[0.05, risen]], HEADS, {}, "1", shown),
            "induction_null": Panel([[0.05, 0.05]], HEADS, {}, "1", shown),
            "previous_token": Panel([[0.05, 0.05]], HEADS, {}, "1", shown),
        }


class Experiment(SimpleNamespace):
    """Takes what a W&B run takes, and keeps alerts and artifacts."""

    def __init__(self) -> None:
        super().__init__(id="a b", summary={}, config={}, alerts=[], artifacts=[], rows=[])

    def define_metric(self, *args: Any, **options: Any) -> None:
        pass

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)


def logger_of(package: str, folder: Path, experiment: Experiment | None = None) -> Any:
    """Return a logger that is taken for a WandbLogger of this Lightning package."""

    class WandbLogger(lightning(package).loggers.CSVLogger):  # type: ignore[misc]
        experiment = property(lambda self: self.kept)

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.kept.rows.append(metrics)

        def save(self) -> None:
            pass

    made = WandbLogger(folder)
    made.kept = Experiment() if experiment is None else experiment
    return made


def fit(package: str, folder: Path, steps: int, logger: Any, *more: Any, **options: Any) -> Any:
    monitor = MeasurementMonitor(
        measurements=[Rising()], every_n_train_steps=1, report=True, dirpath=folder / "mi"
    )
    callbacks = [
        *more,
        monitor,
    ]  # before the monitor: its report must be in the artifact all the same
    fitted = trainer(
        package, default_root_dir=folder, callbacks=callbacks, logger=logger, max_steps=steps
    )
    fitted.fit(language_model(package), *loaders(), **options)
    return fitted


@pytest.mark.parametrize("package", PACKAGES)
def test_one_alert_when_the_role_has_formed(package: str, tmp_path: Path) -> None:
    logger = logger_of(package, tmp_path)
    fit(package, tmp_path, 14, logger, WandbExtras(artifact=False))
    ((title, text),) = logger.experiment.alerts
    assert title == "Induction heads formed"
    assert text.startswith("L0H1 formed at step 3 (after 2): from 0.05 to 0.90 (chance 0.05)")
    assert logger.experiment.artifacts == []
    assert logger.experiment.summary["induction_onset"] == 3


def test_a_resumed_run_does_not_tell_again(tmp_path: Path) -> None:
    first, second = (logger_of(PACKAGES[0], tmp_path) for _ in range(2))
    fitted = fit(PACKAGES[0], tmp_path, 14, first, WandbExtras(artifact=False))
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    resumed = {"ckpt_path": tmp_path / "last.ckpt"}
    fit(PACKAGES[0], tmp_path, 18, second, WandbExtras(artifact=False), **resumed)
    assert (len(first.experiment.alerts), second.experiment.alerts) == (1, [])


def test_no_alert_while_nothing_has_formed(tmp_path: Path) -> None:
    logger = logger_of(PACKAGES[0], tmp_path)
    fit(PACKAGES[0], tmp_path, 6, logger, WandbExtras(artifact=False))
    assert logger.experiment.alerts == []


def test_the_whole_folder_becomes_an_artifact(tmp_path: Path) -> None:
    logger = logger_of(PACKAGES[0], tmp_path)
    fit(PACKAGES[0], tmp_path, 3, logger, WandbExtras(alert=False))
    (made,) = logger.experiment.artifacts
    assert (made.name, made.type) == ("mi-a_b", "lightning_mi")
    folder = tmp_path / "mi"
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert {"records.jsonl", "run.json", "report.html"} <= files
    assert set(made.manifest.entries) == files
    assert made.metadata["model"] == "LanguageModel"
    assert logger.experiment.alerts == []


def test_a_failure_is_one_warning(tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no network")

    logger = logger_of(PACKAGES[0], tmp_path)
    logger.experiment.alert = logger.experiment.log_artifact = refuse
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit(PACKAGES[0], tmp_path, 14, logger, WandbExtras())
    assert fitted.global_step == 14
    assert sum("WandbExtras: W&B took no" in str(w.message) for w in caught) == 1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="alert, artifact: expected at least one"):
        WandbExtras(alert=False, artifact=False)
    with pytest.raises(ArgumentError, match="logger: expected a WandbLogger"):
        fit(PACKAGES[0], tmp_path, 1, False, WandbExtras())
    alone = trainer(callbacks=[WandbExtras()], logger=logger_of(PACKAGES[0], tmp_path))
    with pytest.raises(ArgumentError, match="callbacks: expected a monitor"):
        alone.fit(language_model(), *loaders())


@pytest.mark.slow
def test_both_stand_in_an_offline_run(tmp_path: Path) -> None:
    import wandb

    logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path)
    try:
        fit(PACKAGES[0], tmp_path, 14, logger, WandbExtras())
        run_dir = logger.experiment.dir
    finally:
        if wandb.run is not None:
            wandb.finish()
    found = _wandb.entries(run_dir)
    (alert,) = [entry["alert"] for entry in found if entry["type"] == "alert"]
    assert alert["title"] == "Induction heads formed"
    kept = [entry["artifact"] for entry in found if entry["type"] == "artifact"]
    (folder,) = [artifact for artifact in kept if artifact["type"] == "lightning_mi"]
    names = {entry["path"] for entry in folder["manifest"]["contents"]}
    assert names == {"records.jsonl", "run.json", "batch.pt", "report.html"}
