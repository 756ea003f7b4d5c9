"""A record taken during training equals the one that a sweep takes from the checkpoint."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import language_model, loaders, trainer
from test_harmless import all_monitors

from lightning_mi import Run, sweep
from lightning_mi.callbacks import ScheduledCheckpoint

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


def moment(record: Any) -> tuple[Any, ...]:
    return (record.step, record.epoch, record.samples, record.tokens, record.weights)
