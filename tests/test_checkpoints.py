"""The same measurements over saved checkpoints."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mi import ArgumentError, Context, ModelError, Panel, Run, measure, sweep
from lightning_mi.callbacks import ScheduledCheckpoint
from lightning_mi.checkpoints import STATE_MARK, Checkpoint, find_checkpoints, load_weights
from lightning_mi.record import scalar

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
BATCH = (X, torch.tensor([0, 1, 1, 0]))


@dataclass(frozen=True)
class Facts:
    """Mean output, and what the context knows."""

    name: str = "facts"

    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        rates = context.learning_rates
        return {
            "mean": scalar(context.outputs(model)[:, 0].mean()),
            "rate": scalar(rates.get("weight", 0.0)),
            "examples": scalar(float(len(context.batch[0]))),
        }


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


def mean_of(value: float) -> float:
    model = nn.Linear(3, 2)
    model.load_state_dict(weights(value))
    return measure(model, Facts(), batch=BATCH)[0].panel.item()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder of bare state dicts, written in another order than that of their steps."""
    for step in (10, 2, 0):
        torch.save(weights(step), tmp_path / f"step={step}.ckpt")
    return tmp_path


def test_files_come_in_order_of_their_numbers(saved: Path) -> None:
    (saved / "notes.txt").write_text("")
    names = ["step=0.ckpt", "step=2.ckpt", "step=10.ckpt"]
    assert [p.name for p in find_checkpoints(saved)] == names
    assert [p.name for p in find_checkpoints(str(saved / names[2]))] == names[2:]
    chosen = [saved / names[2], str(saved / names[0])]
    assert [p.name for p in find_checkpoints(chosen)] == [names[2], names[0]]


def test_nothing_to_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"checkpoints: expected a folder with \.ckpt.*none in"):
        find_checkpoints(tmp_path)
    with pytest.raises(ArgumentError, match=r"checkpoints: .*got .*missing\.ckpt"):
        find_checkpoints([tmp_path / "missing.ckpt"])
    with pytest.raises(ArgumentError, match=r"checkpoints: .*none in"):
        find_checkpoints([])


def test_a_sweep_measures_every_checkpoint_on_a_copy(saved: Path) -> None:
    model = nn.Linear(3, 2)
    before, grad = copy.deepcopy(model.state_dict()), torch.ones(2, 3)
    model.weight.grad = grad
    run = sweep(saved, model, Facts(), batch=BATCH)
    assert run.path == saved / "mi"
    found = run.records("facts/mean")
    assert [(r.step, r.source, r.panel.item()) for r in found] == [
        (step, "sweep", mean_of(step)) for step in (0, 2, 10)
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.weight.grad is grad
    assert torch.equal(grad, torch.ones(2, 3))
    assert model.training
    assert Run.open(saved).names() == ["facts/mean", "facts/rate", "facts/examples"]


@dataclass(frozen=True)
class Beyond:
    """Fails where weights are larger than a limit."""

    limit: float
    name: str = "beyond"

    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        largest = max(float(p.detach().max()) for p in model.parameters())
        if largest > self.limit:
            raise RuntimeError(f"{largest:g}")
        return {"largest": scalar(largest)}


def test_what_fails_at_a_later_checkpoint_takes_nothing_along(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"sweep: 'beyond' was not measured at step 2, 10 .*: 2"):
        run = sweep(saved, nn.Linear(3, 2), [Beyond(1), Facts()], batch=BATCH)
    assert [r.step for r in run.records("facts/mean")] == [0, 2, 10]
    assert [r.step for r in run.records("beyond/largest")] == [0]
    with pytest.raises(RuntimeError, match="0"):
        sweep(saved, nn.Linear(3, 2), [Beyond(-1), Facts()], batch=BATCH)


@pytest.mark.parametrize("kind", ["path", "run", "text"])
def test_where_the_records_go(saved: Path, kind: str) -> None:
    place = saved / "elsewhere"
    run: Any = {"path": place, "run": Run.create(place), "text": str(place)}[kind]
    sweep(saved, nn.Linear(3, 2), [Facts()], batch=BATCH, run=run)
    assert len(Run.open(place).records("facts/mean")) == 3
    assert not (saved / "mi").exists()


def test_a_second_sweep_replaces_the_first(saved: Path) -> None:
    for _ in range(2):
        run = sweep(saved, nn.Linear(3, 2), Facts(), batch=BATCH)
    assert len(run.records("facts/mean")) == 3


def test_the_batch_of_the_run_is_taken(saved: Path) -> None:
    run = Run.create(saved / "mi")
    run.save_batch((X[:2].double(), BATCH[1][:2]))  # cast to the model's type
    sweep(saved, nn.Linear(3, 2), Facts(), run=run)
    assert {r.panel.item() for r in run.records("facts/examples")} == {2.0}


def test_bad_arguments_are_named_before_anything_is_read(saved: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match=r'weights: expected "current" or "average", got \'ema'):
        sweep(saved, model, Facts(), batch=BATCH, weights="ema")
    with pytest.raises(ArgumentError, match="got 'facts' twice"):
        sweep(saved, model, [Facts(), Facts()], batch=BATCH)
    with pytest.raises(ArgumentError, match="the class Facts"):
        sweep(saved, model, Facts, batch=BATCH)
    assert not (saved / "mi").exists()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step=12.ckpt", 12),
        ("epoch=3-step=100.ckpt", 100),
        ("step=100-v1.ckpt", 100),
        ("step_0007-loss=0.25.ckpt", 7),
        ("model-30.pt", 30),
        ("last.ckpt", 0),
    ],
)
def test_bare_weights_take_their_step_from_the_name(tmp_path: Path, name: str, step: int) -> None:
    torch.save(weights(1), tmp_path / name)
    assert Checkpoint.load(tmp_path / name).step == step


# -------------------------------------------------------------------- what Lightning saves


def module_of(pl: Any, rate: float = 0.1, optimized: Callable[[Any], Any] = lambda o: o) -> Any:
    """Return a linear classifier; what its optimizer comes with is made of the optimizer."""

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimized(torch.optim.SGD(self.parameters(), rate))

    return Module()


def fit(pl: Any, module: Any, callback: Any, folder: Path, *, steps: int) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = torch.utils.data.TensorDataset(*BATCH)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_checkpoints_of_lightning(tmp_path: Path, package: str) -> None:
    pl = pytest.importorskip(package)

    module, live = module_of(pl), []

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            step = trainer.global_step
            trainer.save_checkpoint(tmp_path / f"step={step}.ckpt")
            live.extend(measure(module, Facts(), batch=BATCH, step=step))

    fit(pl, module, Saver(), tmp_path, steps=3)
    # The fitted module, a fresh one, and the bare network behind a prefix.
    for index, model in enumerate((module, module_of(pl), nn.Linear(3, 2))):
        run = sweep(tmp_path, model, Facts(), batch=BATCH, run=tmp_path / f"run{index}")
        found = run.records("facts/mean")
        expected = [r for r in live if r.name == "facts/mean"]
        assert [r.step for r in found] == [1, 2, 3]
        assert all(a.panel.equal(b.panel) for a, b in zip(found, expected, strict=True))
        assert len({r.panel.item() for r in found}) == 3


def lightning_content(**more: Any) -> dict[str, Any]:
    return {"state_dict": weights(1), "global_step": 7, "epoch": 2, **more}


def test_counts_and_rates_come_from_the_monitors_state(tmp_path: Path) -> None:
    state = {STATE_MARK: 1, "samples": 56, "tokens": 112, "learning_rates": {"weight": 0.5}}
    callbacks = {"Other": {"samples": 1}, "Odd": None, "Monitor": state}
    torch.save(lightning_content(callbacks=callbacks), tmp_path / "step=7.ckpt")
    run = sweep(tmp_path, nn.Linear(3, 2), Facts(), batch=BATCH)
    (record,) = run.records("facts/rate")
    assert (record.step, record.epoch, record.samples, record.tokens) == (7, 2, 56, 112)
    assert record.panel.item() == 0.5
    torch.save(lightning_content(), tmp_path / "step=7.ckpt")
    assert Checkpoint.load(tmp_path / "step=7.ckpt").samples is None


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_rates_are_those_of_the_step_before_the_scheduler_moved_on(
    tmp_path: Path, package: str
) -> None:
    pl = pytest.importorskip(package)

    def halved(optimizer: torch.optim.Optimizer) -> Any:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    saver = ScheduledCheckpoint(tmp_path, every_n_train_steps=1)
    fit(pl, module_of(pl, 0.5, halved), saver, tmp_path, steps=4)
    rates = [Checkpoint.load(p).learning_rates for p in saver.paths]
    assert [r["net.weight"] for r in rates] == [0.5, 0.5, 0.5, 0.25, 0.25]  # steps 0 to 4
    assert saver.state_dict() == {}
    saver.load_state_dict({})  # as older checkpoints have it


def test_averaged_and_current_weights(tmp_path: Path) -> None:
    content = lightning_content(current_model_state=weights(3))  # state_dict holds the average
    torch.save(content, tmp_path / "step=7.ckpt")
    found = {}
    for which in ("current", "average"):
        run = sweep(
            tmp_path, nn.Linear(3, 2), Facts(), batch=BATCH, weights=which, run=tmp_path / which
        )
        (record,) = run.records("facts/mean")
        assert record.weights == which
        found[which] = record.panel.item()
    assert found == {"current": mean_of(3), "average": mean_of(1)}


def test_a_missing_average_is_named(saved: Path) -> None:
    with pytest.raises(ArgumentError, match="weights: expected a checkpoint that weight averaging"):
        sweep(saved, nn.Linear(3, 2), Facts(), batch=BATCH, weights="average")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_usual_keys_of_weights(tmp_path: Path, key: str) -> None:
    torch.save({key: weights(1), "optimizer": {}}, tmp_path / "a.ckpt")
    assert Checkpoint.load(tmp_path / "a.ckpt").weights.keys() == weights(1).keys()


# -------------------------------------------------------------------- refusals


def test_python_objects_are_refused_unless_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(lightning_content(hyper_parameters=argparse.Namespace(a=1)), path)
    with pytest.raises(
        ArgumentError, match=r"python objects .*Pass weights_only=False if you trust"
    ):
        sweep(tmp_path, nn.Linear(3, 2), Facts(), batch=BATCH)
    sweep(tmp_path, nn.Linear(3, 2), Facts(), batch=BATCH, weights_only=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"checkpoints: expected a mapping with the key state_dict, got a list"),
        ({"step": 1}, r"checkpoints: expected a mapping .*got the keys \['step'\]"),
    ],
)
def test_files_without_weights_are_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ArgumentError, match=message):
        Checkpoint.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("size", [0, 30, 700])
def test_broken_files_are_named(saved: Path, size: int) -> None:
    path = saved / "step=2.ckpt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArgumentError, match=r"checkpoints: .*step=2\.ckpt"):
        Checkpoint.load(path)


def test_another_architecture_is_named(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)saved in 'step=0.ckpt', got .*size mismatch"):
        sweep(saved, nn.Linear(4, 2), Facts(), batch=BATCH)
    with pytest.raises(ModelError, match="Missing key"):
        sweep(saved, nn.Sequential(nn.Linear(3, 2)), Facts(), batch=BATCH)


def test_two_networks_of_one_architecture_are_not_guessed() -> None:
    both = {f"{n}.{k}": v for n in ("student", "teacher") for k, v in weights(1).items()}
    with pytest.raises(ModelError, match=r"'a', got \['student\.', 'teacher\.'\]"):
        load_weights(nn.Linear(3, 2), both, Path("a"))
    model = nn.Linear(3, 2)
    load_weights(model, {k: v for k, v in both.items() if k[0] == "t"}, Path("a"))
    assert model.weight.unique().item() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_wrappers_do_not_matter() -> None:
    inner = nn.Sequential(nn.Linear(3, 2))
    inner[0] = torch.compile(inner[0], backend="eager")
    assert "0._orig_mod.weight" in inner.state_dict()
    for prefix in ("0.", "0._orig_mod.", "_orig_mod.0.", "net.0._orig_mod."):
        for value, model in enumerate((inner, nn.Sequential(nn.Linear(3, 2)))):
            load_weights(model, {prefix + k: v for k, v in weights(value).items()}, Path("a"))
            assert all(p.unique().item() == value for p in model.parameters())
