"""A record taken during training equals the one that a sweep takes from the checkpoint."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import language_model, loaders, trainer
from test_harmless import all_monitors

from lightning_mi import Run, sweep
from lightning_mi.callbacks import InfluenceMonitor, ScheduledCheckpoint

SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "averaging": {"averaging": True},
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("first", ["monitors", "checkpoint"])
def test_live_equals_sweep(scene: str, first: str, tmp_path: Any) -> None:
    options = dict(SCENES[scene])
    cases.lightning().seed_everything(5, verbose=False)
    monitors = all_monitors(every_n_train_steps=3)
    checkpoint = ScheduledCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3)
    callbacks = [*monitors, checkpoint] if first == "monitors" else [checkpoint, *monitors]
    if options.pop("averaging", False):
        callbacks.insert(0, cases.lightning().callbacks.EMAWeightAveraging(decay=0.5))
    train, validation = loaders()
    model = language_model(scheduler=True)
    fitted = trainer(callbacks=callbacks, default_root_dir=tmp_path, max_steps=7, **options)
    fitted.fit(model, train, validation)
    live = Run.open(tmp_path)
    fresh = language_model(scheduler=True)
    sweep(
        tmp_path / "checkpoints",
        fresh,
        [m for monitor in monitors for m in monitor.measurements],
        run=live,
        dataset=train.dataset,
    )
    taken = {(r.name, r.step): r for r in live.records(source="live")}
    swept = {(r.name, r.step): r for r in live.records(source="sweep")}
    taken = {k: r for k, r in taken.items() if r.measurement != "monitor"}
    assert {step for _, step in taken} == {0, 3, 6, 7}
    assert {r.measurement for r in taken.values()} >= {
        "head_scores",
        "prompt",
        "saliency",
        "integrated_gradients",
        "influence",
        "agreement",
    }
    assert taken.keys() == swept.keys()
    unequal = [k for k, r in taken.items() if not r.panel.equal(swept[k].panel)]
    assert unequal == []
    moments = [k for k, r in taken.items() if moment(r) != moment(swept[k])]
    assert moments == []


def test_sweep_of_other_steps_goes_to_the_run_beside_it(tmp_path: Any) -> None:
    monitor = InfluenceMonitor(candidates=6, every_n_train_steps=4)
    saver = ScheduledCheckpoint(at_steps="log", every_n_train_steps=4)
    train, validation = loaders()
    fitted = trainer(callbacks=[monitor, saver], default_root_dir=tmp_path, max_steps=8)
    fitted.fit(language_model(), train, validation)
    folder = tmp_path / "scheduled_checkpoints"
    run = sweep(folder, language_model(), monitor.measurements, dataset=train.dataset)
    assert run.path == tmp_path / "mi"
    assert {r.step for r in run.records("influence/scores", source="sweep")} == {0, 1, 2, 4, 8}
    live = {(r.name, r.step): r for r in run.records("influence", source="live")}
    swept = {(r.name, r.step): r for r in run.records("influence", source="sweep")}
    unequal = {key for key, r in live.items() if not r.panel.equal(swept[key].panel)}
    # The firing before is another one where other steps are swept; `at_step` says which.
    changes = {"influence/rank_correlation", "influence/top_overlap"}
    assert {name for name, _ in unequal} <= changes
    assert {name for name, _ in live} > changes
    assert ("influence/sum", 8) in live


def moment(record: Any) -> tuple[Any, ...]:
    return (record.step, record.epoch, record.samples, record.tokens, record.weights)
