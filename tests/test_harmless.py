"""Training is bit-identical with and without monitors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import PACKAGES, Gradients, language_model, loaders, same, trainer
from torch import Tensor, nn

from lightning_mi import measure
from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    IntegratedGradientsMonitor,
    MeasurementMonitor,
    SaliencyMonitor,
    ScheduledCheckpoint,
)


def all_monitors(**schedule: Any) -> list[Any]:
    """Every monitor that there is, firing often."""
    return [
        HeadMonitor(**schedule),
        SaliencyMonitor(**schedule),
        IntegratedGradientsMonitor(**schedule),
        InfluenceMonitor(candidates=6, **schedule),
        MeasurementMonitor(measurements=[Gradients()], **schedule),
    ]


class Accumulated:
    """Keeps the half-accumulated gradients of every batch."""

    @staticmethod
    def of(package: str) -> Any:
        pl = cases.lightning(package)

        class Watch(pl.Callback):
            def __init__(self) -> None:
                self.seen: list[Tensor] = []

            def on_train_batch_end(self, trainer: Any, model: Any, *rest: Any) -> None:
                grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                self.seen.append(torch.cat(grads).clone() if grads else torch.empty(0))

        return Watch()


def state(model: Any, fitted: Any, watch: Any) -> dict[str, Any]:
    """Everything that training determines."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "optimizer": [o.state_dict() for o in fitted.optimizers],
        "losses": torch.stack(model.losses),
        "order": torch.stack(model.order),
        "gradients": watch.seen,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
        "flags": [(n, m.training) for n, m in model.named_modules()],
        "requires_grad": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        ],
    }


def fit(package: str, folder: Any, monitors: list[Any], **options: Any) -> dict[str, Any]:
    cases.lightning(package).seed_everything(3, verbose=False)
    model = language_model(package)
    watch = Accumulated.of(package)
    extra = options.pop("callbacks", [])
    defaults = {"max_steps": 5, "accumulate_grad_batches": 2, "default_root_dir": folder}
    fitted = trainer(package, callbacks=[*extra, *monitors, watch], **{**defaults, **options})
    fitted.fit(model, *loaders())
    return state(model, fitted, watch)


@pytest.mark.parametrize("package", PACKAGES)
def test_training_is_bit_identical(package: str, tmp_path: Any) -> None:
    plain = fit(package, tmp_path / "a", [])
    monitors = [*all_monitors(every_n_train_steps=2), ScheduledCheckpoint(every_n_train_steps=2)]
    watched = fit(package, tmp_path / "b", monitors)
    differing = [key for key in plain if not same(plain[key], watched[key])]
    assert differing == []


def test_validation_end_is_bit_identical(tmp_path: Any) -> None:
    options = {"val_check_interval": 2, "max_steps": 4}
    plain = fit(PACKAGES[0], tmp_path / "a", [], **options)
    watched = fit(PACKAGES[0], tmp_path / "b", all_monitors(on_validation=True), **options)
    assert [key for key in plain if not same(plain[key], watched[key])] == []


def test_weight_averaging_is_bit_identical(tmp_path: Any) -> None:
    averaging = cases.lightning().callbacks.EMAWeightAveraging

    def run(name: str, monitors: list[Any]) -> dict[str, Any]:
        return fit(PACKAGES[0], tmp_path / name, monitors, callbacks=[averaging(decay=0.9)])

    plain, watched = run("a", []), run("b", all_monitors(every_n_train_steps=1))
    assert [key for key in plain if not same(plain[key], watched[key])] == []


def test_without_isolation_training_changes(tmp_path: Any, monkeypatch: Any) -> None:
    """The negative control: the comparison above can fail."""

    @contextmanager
    def careless(model: nn.Module) -> Iterator[nn.Module]:
        yield model

    plain = fit(PACKAGES[0], tmp_path / "a", [])
    monkeypatch.setattr("lightning_mi.measurement.untouched", careless)
    monitor = MeasurementMonitor(measurements=[Gradients()], every_n_train_steps=2)
    watched = fit(PACKAGES[0], tmp_path / "b", [monitor])
    differing = [key for key in plain if not same(plain[key], watched[key])]
    assert {"weights", "losses", "torch"} <= set(differing)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_measures_inside_inference_mode(stage: str, tmp_path: Any) -> None:
    pl = cases.lightning()
    found = []

    class Inside(pl.Callback):
        def on_validation_batch_end(self, t: Any, model: Any, out: Any, batch: Any, i: int) -> None:
            flags = [m.training for m in model.modules()]
            before = {k: v.clone() for k, v in model.state_dict().items()}
            assert torch.is_inference_mode_enabled()
            found.extend(measure(model, Gradients(), batch=batch.clone()))
            assert same(before, dict(model.state_dict()))
            assert flags == [m.training for m in model.modules()]

        on_test_batch_end = on_validation_batch_end

    model = language_model()
    monitors = all_monitors(on_validation=True)[:3]
    fitted = trainer(callbacks=[Inside(), *monitors], default_root_dir=tmp_path)
    getattr(fitted, stage)(model, loaders()[1], verbose=False)
    assert found
    run = monitors[0].run_path
    assert run is not None
    fitted = trainer(default_root_dir=tmp_path, max_steps=2)
    fitted.fit(model, *loaders())  # measuring in inference mode must not spoil later training
    assert fitted.global_step == 2


def test_batch_of_the_user_is_measured_inside_inference_mode(tmp_path: Any) -> None:
    model = language_model().double()
    with torch.inference_mode():
        batch = torch.randint(0, cases.VOCABULARY, (2, cases.LENGTH))
    monitor = SaliencyMonitor(batch=batch, on_validation=True)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path)
    fitted.validate(model, loaders()[1], verbose=False)
    assert monitor.run_path is not None
    assert not batch.is_floating_point()


@pytest.mark.parametrize("own", [True, False])
def test_floats_are_measured_inside_inference_mode(own: bool, tmp_path: Any) -> None:
    """Moving a batch to the precision of the weights makes new tensors, there without gradients."""
    pl = cases.lightning()

    class Table(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0].double())

    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    batch = (torch.randn(2, 4), torch.tensor([0, 1])) if own else None
    monitor = SaliencyMonitor(batch=batch, on_validation=True)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path)
    fitted.validate(Table(), torch.utils.data.DataLoader(data, 4), verbose=False)
    assert monitor.failed == 0
    assert monitor.run_path is not None


def test_model_is_let_go(tmp_path: Any) -> None:
    import gc
    import weakref

    model = language_model()
    monitor = SaliencyMonitor(every_n_train_steps=2)
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=2)
    fitted.fit(model, *loaders())
    reference = weakref.ref(model)
    del fitted, model, monitor  # Lightning itself ties a callback to the model it logs for
    gc.collect()
    assert reference() is None
