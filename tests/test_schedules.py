"""Monitors fire when they should, whatever the Trainer does with steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import cases
import pytest
import torch
from cases import Failing, Norm, language_model, loaders, trainer
from torch.utils.data import DataLoader

from lightning_mi import LightningMIError, Run
from lightning_mi.attribution import IntegratedGradients, Saliency
from lightning_mi.callbacks import MeasurementMonitor, ScheduledCheckpoint
from lightning_mi.circuits import HeadScores
from lightning_mi.schedule import Schedule


def steps_of(folder: Any, **options: Any) -> list[int]:
    return sorted({r.step for r in Run.open(folder).records("norm", **options)})


def fire(folder: Any, schedule: dict[str, Any], *, model: Any = None, **options: Any) -> list[int]:
    monitor = MeasurementMonitor(measurements=[Norm()], **schedule)
    fitted = trainer(callbacks=[monitor], default_root_dir=folder, **options)
    fitted.fit(model or language_model(), *loaders())
    return steps_of(folder)


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ({"every_n_train_steps": 2}, {"max_steps": 5}, [0, 2, 4, 5]),
        ({"every_n_train_steps": 2, "at_end": False}, {"max_steps": 5}, [0, 2, 4]),
        ({"every_n_train_steps": 2, "at_start": False}, {"max_steps": 4}, [2, 4]),
        ({"every_n_train_steps": 2}, {"max_steps": 4, "accumulate_grad_batches": 4}, [0, 2, 4]),
        # Epochs of 6 batches, shorter than the accumulation: every epoch ends with a step.
        (
            {"every_n_train_steps": 1},
            {"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 8},
            [0, 1, 2],
        ),
        ({"at_steps": "log"}, {"max_steps": 9}, [0, 1, 2, 4, 8, 9]),
        ({"at_steps": "log", "every_n_train_steps": 3}, {"max_steps": 9}, [0, 1, 2, 3, 6, 9]),
        ({"at_steps": [0, 3]}, {"max_steps": 5}, [0, 3]),
        ({"every_n_epochs": 1}, {"max_epochs": 2, "max_steps": -1}, [6, 12]),
        ({"on_validation": True}, {"max_steps": 4, "val_check_interval": 2}, [2, 4]),
        ({"at_end": True}, {"max_steps": 3}, [3]),
        ({}, {"max_steps": 3}, [0, 3]),
        ({"train_time_interval": timedelta(microseconds=1)}, {"max_steps": 2}, [1, 2]),
        ({"every_n_train_steps": 2}, {"max_steps": 2, "limit_val_batches": 0}, [0, 2]),
        ({"every_n_train_steps": 2}, {"max_steps": 2, "num_sanity_val_steps": 0}, [0, 2]),
    ],
)
def test_fires_at(schedule: Any, options: Any, expected: list[int], tmp_path: Any) -> None:
    assert fire(tmp_path, schedule, **options) == expected


def test_two_manual_optimizers_jump_by_two(tmp_path: Any) -> None:
    pl = cases.lightning()

    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.b(self.a(x))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self(batch).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr) for m, lr in ((self.a, 0.1), (self.b, 0.2))]

    monitor = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=3)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=8)
    model = Manual()
    fitted.fit(model, DataLoader(torch.randn(16, 2), 2))
    assert steps_of(tmp_path) == [0, 4, 6, 8]


def test_fast_dev_run_measures_and_writes_nothing(tmp_path: Any) -> None:
    monitor = MeasurementMonitor(measurements=[Norm()])
    saver = ScheduledCheckpoint()
    fitted = trainer(callbacks=[monitor, saver], default_root_dir=tmp_path, fast_dev_run=True)
    fitted.fit(language_model(), *loaders())
    assert monitor.run_path is None
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_run_never_mixes_with_the_first(tmp_path: Any) -> None:
    fire(tmp_path, {"every_n_train_steps": 2}, max_steps=4)
    before = (tmp_path / "mi" / "records.jsonl").read_text()
    fire(tmp_path, {"every_n_train_steps": 2}, max_steps=2)
    assert (tmp_path / "mi" / "records.jsonl").read_text() == before
    assert steps_of(tmp_path / "mi-v1") == [0, 2]


@pytest.mark.parametrize("same_folder", [True, False])
def test_resumed_run_has_each_step_once(same_folder: bool, tmp_path: Any) -> None:
    def run(folder: Any, steps: int, checkpoint: Any = None) -> Any:
        monitor = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=2)
        saver = ScheduledCheckpoint(tmp_path / "saved", every_n_train_steps=4)
        fitted = trainer(callbacks=[monitor, saver], default_root_dir=folder, max_steps=steps)
        fitted.fit(language_model(), *loaders(), ckpt_path=checkpoint)
        return monitor

    first = run(tmp_path / "a", 6)
    second = run(tmp_path / ("a" if same_folder else "b"), 10, tmp_path / "saved" / "step=4.ckpt")
    assert (first.run_path == second.run_path) is same_folder
    records = Run.open(second.run_path).records("norm")
    assert [r.step for r in records] == [0, 2, 4, 6, 8, 10]
    assert [r.samples for r in records] == [8 * r.step for r in records]


def test_validating_after_training_keeps_what_was_recorded(tmp_path: Any) -> None:
    monitor = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=2, on_validation=True)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=4)
    model = language_model()
    fitted.fit(model, *loaders())
    assert steps_of(tmp_path) == [0, 2, 4]
    fitted.validate(model, loaders()[1], verbose=False)
    assert steps_of(tmp_path) == [0, 2, 4]
    run = Run.open(tmp_path)
    assert run.info["state"] == "finished"
    assert {r.step: r.samples for r in run.records("norm")} == {0: 0, 2: 16, 4: 32}


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_second_fit_of_a_trainer_goes_on(tmp_path: Any) -> None:
    monitor = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=2)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=4)
    model = language_model()
    fitted.fit(model, *loaders())
    fitted.fit_loop.epoch_loop.max_steps = 8
    fitted.fit(model, *loaders())
    assert steps_of(tmp_path) == [0, 2, 4, 6, 8]
    run = Run.open(tmp_path)
    assert run.info["state"] == "finished"
    assert run.info["max_steps"] == 8


def test_steps_that_were_trained_away_do_not_count(tmp_path: Any) -> None:
    def run(every: int, steps: int, checkpoint: Any = None) -> None:
        monitor = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=every)
        saver = ScheduledCheckpoint(tmp_path / "saved", every_n_train_steps=4)
        fitted = trainer(callbacks=[monitor, saver], default_root_dir=tmp_path, max_steps=steps)
        fitted.fit(language_model(), *loaders(), ckpt_path=checkpoint)

    run(2, 7)
    run(3, 9, tmp_path / "saved" / "step=4.ckpt")
    assert steps_of(tmp_path) == [0, 2, 4, 6, 9]


def test_report_is_written_whichever_monitor_asks_and_fails(tmp_path: Any) -> None:
    pl = cases.lightning()

    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("the run breaks")

    quiet = MeasurementMonitor(measurements=[Norm()], every_n_train_steps=1)
    asks = MeasurementMonitor(measurements=[Norm("second")], at_end=True, report=True)
    fitted = trainer(callbacks=[quiet, asks, Breaks()], default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="the run breaks"):
        fitted.fit(language_model(), *loaders())
    run = Run.open(tmp_path)
    assert run.info["state"] == "interrupted"
    assert run.report.exists()


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_later_failure_is_a_warning_first_one_an_error(tmp_path: Any) -> None:
    def run(after: int) -> None:
        monitor = MeasurementMonitor(
            measurements=[Failing(after=after), Norm()], every_n_train_steps=2
        )
        fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=3)
        fitted.fit(language_model(), *loaders())

    with pytest.warns(UserWarning, match=r"'failing' of step 2 was not.*training goes on"):
        run(after=1)
    assert steps_of(tmp_path) == [0, 2, 3]  # of the other measurement nothing is lost
    with pytest.raises(RuntimeError, match="on purpose"):
        run(after=0)


def test_max_overhead_skips_and_counts(tmp_path: Any) -> None:
    monitor = MeasurementMonitor(
        measurements=[Norm()], every_n_train_steps=1, max_overhead=1e-9, at_end=False
    )
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=5)
    fitted.fit(language_model(), *loaders())
    assert steps_of(tmp_path) == [0]
    assert monitor.skipped == 5


def test_validation_only_without_validation_is_refused(tmp_path: Any) -> None:
    monitor = MeasurementMonitor(measurements=[Norm()], on_validation=True)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, limit_val_batches=0)
    with pytest.raises(LightningMIError, match="on_validation: expected a Trainer that validates"):
        fitted.fit(language_model(), *loaders())


def test_exclusive_options_are_refused() -> None:
    with pytest.raises(LightningMIError, match="only one of every_n_train_steps, every_n_epochs"):
        MeasurementMonitor(measurements=[Norm()], every_n_train_steps=1, every_n_epochs=1)


def test_two_measurements_of_one_name_are_refused(tmp_path: Any) -> None:
    monitors = [MeasurementMonitor(measurements=m) for m in ([Norm()], [Norm(), Failing()])]
    fitted = trainer(callbacks=monitors, default_root_dir=tmp_path)
    with pytest.raises(LightningMIError, match="name='…'"):
        fitted.fit(language_model(), *loaders())


def test_unwritable_folder_is_refused(tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monitor = MeasurementMonitor(measurements=[Norm()], dirpath=blocked / "mi")
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path)
    with pytest.raises(LightningMIError, match="dirpath: expected a folder that can be written"):
        fitted.fit(language_model(), *loaders())


def test_sharded_strategy_is_refused(tmp_path: Any) -> None:
    class FSDPStrategy:
        """Only its name matters: Lightning's own needs a GPU."""

    class Sharded:
        def __init__(self) -> None:
            self.strategy, self.callbacks = FSDPStrategy(), []

    monitor = MeasurementMonitor(measurements=[Norm()])
    with pytest.raises(LightningMIError, match="got FSDPStrategy"):
        monitor.setup(Sharded(), language_model(), "fit")  # type: ignore[arg-type]


def test_scheduled_checkpoint_leaves_the_default_one(tmp_path: Any) -> None:
    saver = ScheduledCheckpoint(at_steps="log", every_n_train_steps=4)
    fitted = trainer(
        callbacks=[saver], default_root_dir=tmp_path, enable_checkpointing=True, max_steps=6
    )
    fitted.fit(language_model(), *loaders())
    assert [p.name for p in saver.paths] == [f"step={n}.ckpt" for n in (0, 1, 2, 4, 6)]
    assert len(fitted.checkpoint_callbacks) == 1
    assert list(tmp_path.rglob("epoch=*.ckpt"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("measured", ["full", "trainer"])
def test_precisions(precision: str, measured: Any, tmp_path: Any) -> None:
    measurements = [HeadScores(), Saliency(), IntegratedGradients()]
    monitor = MeasurementMonitor(measurements=measurements, precision=measured)
    options = {"precision": precision, "max_steps": 2}
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, **options)
    fitted.fit(language_model(), *loaders())
    records = Run.open(tmp_path).records()
    assert {r.step for r in records} == {0, 2}
    scores = [r for r in records if r.name == "head_scores/induction"]
    assert all(bool(r.panel.values.isfinite().all()) for r in scores)


def test_crossing_is_not_modulo() -> None:
    every = Schedule(every_n_train_steps=3)
    assert [s for s in (2, 4, 6) if every.crossed(s, s - 2)] == [4, 6]
