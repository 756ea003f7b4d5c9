"""`ClampHeads`: training with heads held, and nothing else changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import language_model, loaders, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_mi import Context, Panel, Run
from lightning_mi.attention import tap
from lightning_mi.callbacks import ClampHeads, MeasurementMonitor
from lightning_mi.circuits import At, zero
from lightning_mi.errors import ArgumentError, LightningMIError
from lightning_mi.nodes import Head

PACKAGES = ["pytorch_lightning", "lightning.pytorch"]


def fit(
    clamp: Any = None, steps: int = 6, package: str = PACKAGES[0], folder: Any = None, **more: Any
) -> Any:
    """Return a trained model, and what its heads wrote in each training step."""
    torch.manual_seed(3)
    model = language_model(package)
    callbacks = [clamp] if clamp is not None else []
    callbacks += more.pop("callbacks", [])
    fitted = trainer(package, callbacks=callbacks, max_steps=steps, default_root_dir=folder, **more)
    model.seen = []
    for block in model.net.blocks:
        block.out.register_forward_hook(
            lambda m, args, out: model.seen.append(args[0].detach().clone()) if m.training else None
        )
    fitted.fit(model, *loaders())
    model.fitted = fitted
    return model


@pytest.mark.parametrize("package", PACKAGES)
def test_heads_are_held_inside_the_window_only(package: str, tmp_path: Any) -> None:
    free = fit(steps=8, package=package, folder=tmp_path / "a")
    clamp = ClampHeads(["L0H1", "L1H0"], 0.5, start=3, stop=5)
    held = fit(clamp, steps=8, package=package, folder=tmp_path / "b")
    assert len(held.seen) == 16
    for step in range(8):
        first, second = held.seen[2 * step], held.seen[2 * step + 1]
        inside = 3 <= step < 5
        assert bool((first[..., 8:] == 0.5).all()) == inside
        assert bool((second[..., :8] == 0.5).all()) == inside
        assert not bool((first[..., :8] == 0.5).any())
        if step < 3:  # Bit for bit the same until the window opens.
            assert torch.equal(first, free.seen[2 * step])
            assert torch.equal(held.losses[step], free.losses[step])
    assert not torch.equal(held.losses[5], free.losses[5])
    assert held.fitted.callback_metrics["mi/clamped_heads"] == 0.0
    # The same data in the same order: no random number was drawn by the clamp.
    assert all(torch.equal(a, b) for a, b in zip(held.order, free.order, strict=True))


def test_training_after_the_window_is_what_it_would_be_from_those_weights(tmp_path: Any) -> None:
    held = fit(ClampHeads(["L0H0"], stop=2), folder=tmp_path / "a", callbacks=[Keep(2)])
    keep = held.fitted.callbacks[1]
    other = fit(folder=tmp_path / "b", callbacks=[Swap(2, keep)])
    for a, b in zip(held.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_mean_is_taken_once_and_held(tmp_path: Any) -> None:
    reference = torch.randint(17, (5, 10))
    model = fit(ClampHeads(["L1H1"], "mean", reference=reference), steps=3, folder=tmp_path)
    values = [model.seen[2 * step + 1][..., 8:] for step in range(3)]
    assert float(values[0].std((0, 1)).max()) < 1e-6
    assert torch.equal(values[0][0, 0], values[2][0, 0])
    assert float(values[0].abs().max()) > 1e-4
    first = fit(ClampHeads(["L1H1"], "mean"), steps=1, folder=tmp_path / "first")
    assert float(first.seen[1][..., 8:].std((0, 1)).max()) < 1e-6


def test_checkpoints_have_the_same_form_and_a_resumed_run_goes_on(tmp_path: Any) -> None:
    whole = fit(ClampHeads(["L0H0"], "mean", stop=5), steps=6, folder=tmp_path / "whole")
    keys = set(fit(steps=1, folder=tmp_path / "free").state_dict())
    assert set(whole.state_dict()) == keys
    part = fit(
        ClampHeads(["L0H0"], "mean", stop=5), steps=3, folder=tmp_path / "part",
    )  # fmt: skip
    part.fitted.save_checkpoint(tmp_path / "part.ckpt")
    saved = torch.load(tmp_path / "part.ckpt", weights_only=False)
    assert set(saved["state_dict"]) == keys
    clamp = ClampHeads(["L0H0"], "mean", stop=5)
    model = language_model()
    model.seen = []
    model.net.blocks[0].out.register_forward_hook(
        lambda m, args, out: model.seen.append(args[0].detach().clone()) if m.training else None
    )
    fitted = trainer(callbacks=[clamp], max_steps=6, default_root_dir=tmp_path / "resumed")
    fitted.fit(model, *loaders(), ckpt_path=tmp_path / "part.ckpt", weights_only=False)
    assert len(model.seen) == 3
    assert torch.equal(model.seen[0][0, 0, :8], part.seen[0][0, 0, :8])
    assert not torch.equal(model.seen[2][0, 0, :8], part.seen[0][0, 0, :8])


def test_validation_and_monitors_see_the_model_itself(tmp_path: Any) -> None:
    def seen(clamp: ClampHeads, folder: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model, found = language_model(), list[Tensor]()
        model.net.blocks[0].out.register_forward_hook(
            lambda m, args, out: found.append(args[0]) if not m.training else None
        )
        fitted = trainer(callbacks=[clamp], max_steps=6, default_root_dir=folder)
        fitted.fit(model, *loaders())
        return found

    free = seen(ClampHeads(["L0H0"]), tmp_path / "a")
    assert free
    assert all(bool((z[..., :8] != 0).any()) for z in free)
    held = seen(ClampHeads(["L0H0"], in_validation=True), tmp_path / "b")
    assert bool((held[-1][..., :8] == 0).all())
    monitor = MeasurementMonitor(
        measurements=[Written()], every_n_train_steps=1, dirpath=tmp_path / "run"
    )
    fit(ClampHeads(["L0H0"]), steps=2, folder=tmp_path / "c", callbacks=[monitor])
    found = [r.panel.values for r in Run.open(tmp_path / "run").records("written/size")]
    assert len(found) == 3
    assert all(float(values[0]) > 0.0 for values in found)


def test_patterns_queries_and_mappings_can_be_held(tmp_path: Any) -> None:
    even = torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    clamp = ClampHeads({At(Head(0, 0), "pattern"): even, "L1H1.q": zero()})
    model = fit(clamp, steps=2, folder=tmp_path)
    assert len(model.losses) == 2
    with torch.no_grad():
        x = model.net.tokens.weight  # The model went on training.
        assert bool(x.isfinite().all())


def test_a_compiled_model_is_held_as_well(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = language_model(dropout=0.0)
    seen: list[Tensor] = []
    model.net.blocks[0].out.register_forward_hook(
        lambda m, args, out: seen.append(args[0].detach().clone()) if m.training else None
    )
    model.net = torch.compile(model.net, backend="eager")
    fitted = trainer(
        callbacks=[ClampHeads(["L0H1"], stop=1)], max_steps=2, default_root_dir=tmp_path
    )
    fitted.fit(model, *loaders())
    assert bool((seen[0][..., 8:] == 0).all())
    assert not bool((seen[-1][..., 8:] == 0).all())


def test_an_exception_lets_go(tmp_path: Any) -> None:
    model = language_model()

    def broken(batch: Any, batch_idx: int) -> None:
        model(batch)
        raise RuntimeError("on purpose")

    model.training_step = broken
    fitted = trainer(callbacks=[ClampHeads(["L0H0"])], max_steps=2, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted.fit(model, *loaders())
    own = [model.net.head]  # Its hook is the model's own.
    left = [m for m in model.modules() if (m._forward_hooks or m._forward_pre_hooks)]
    assert left == own
    assert bool((model(torch.randint(17, (2, 10)))).isfinite().all())


def test_a_sharded_strategy_is_refused() -> None:
    class FSDPStrategy:
        """Only its name matters."""

    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(LightningMIError, match="got FSDPStrategy"):
        ClampHeads(["L0H0"]).setup(Sharded(), language_model(), "fit")  # type: ignore[arg-type]


def test_what_cannot_be_meant_is_refused(tmp_path: Any) -> None:
    for match, made in (
        ("heads", lambda: ClampHeads([])),
        ("heads", lambda: ClampHeads("L0H0")),
        ("node", lambda: ClampHeads(["Q"])),
        ("value", lambda: ClampHeads(["L0H0"], "median")),  # type: ignore[arg-type]
        ("start", lambda: ClampHeads(["L0H0"], start=5, stop=5)),
    ):
        with pytest.raises(ArgumentError, match=match):
            made()
    with pytest.raises(ArgumentError, match="head"):
        fit(ClampHeads(["L0H7"]), steps=1, folder=tmp_path)


@dataclass(frozen=True)
class Written:
    """How large what heads of the first layer write is."""

    name: str = "written"

    def __call__(self, model: nn.Module, context: Context) -> dict[str, Panel]:
        with tap(model) as seen, torch.no_grad():
            context.task.outputs(model, context.batch)
        return {"size": Panel(seen.sites[0].z.abs().mean((0, 2, 3)), ("head",))}


def _callbacks() -> tuple[type, type]:
    import copy

    import pytorch_lightning as pl

    class Keep(pl.Callback):
        def __init__(self, step: int) -> None:
            self.step, self.kept = step, None

        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, index: int) -> None:
            if trainer.global_step == self.step:
                self.kept = copy.deepcopy((model.state_dict(), trainer.optimizers[0].state_dict()))

    class Swap(Keep):
        def __init__(self, step: int, other: Keep) -> None:
            super().__init__(step)
            self.other = other

        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, index: int) -> None:
            if trainer.global_step == self.step:
                model.load_state_dict(self.other.kept[0])
                trainer.optimizers[0].load_state_dict(self.other.kept[1])

    return Keep, Swap


Keep, Swap = _callbacks()  # type: ignore[misc]


class Turned(torch.utils.data.Dataset[Tensor]):
    """Eight distinct tokens, then the same ones turned round by some places.

    What follows a token has to be looked up by the token: no offset is right.
    """

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        first = torch.rand(64, 16, generator=generator).argsort(1)[:, :8]
        turn = torch.randint(8, (64, 1), generator=generator)
        return torch.cat([first, first.gather(1, (torch.arange(8) + turn) % 8)], 1)


@pytest.mark.slow
def test_without_its_previous_token_head_induction_does_not_form(tmp_path: Any) -> None:
    import pytorch_lightning as pl

    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.read = nn.LayerNorm(48), nn.Linear(48, 144, bias=False)
            self.write = nn.Linear(48, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part[:, None] for part in self.read(self.norm(x)).chunk(3, -1))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.write(z[:, 0])

    class Small(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(16, 48), nn.Embedding(16, 48)
            self.layers = nn.Sequential(OneHead(), OneHead())
            self.unembed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 16))
            nn.init.normal_(self.tokens.weight, std=0.3)
            self.found: list[float] = []

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
            out: Tensor = self.unembed(self.layers(x))
            return out

        def training_step(self, ids: Tensor) -> Tensor:
            logits = self(ids)[:, 8:-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 9:].flatten())
            self.found.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 3e-3)

    def train(callbacks: list[Any]) -> Any:
        torch.manual_seed(1)
        model = Small()
        fitted = trainer(callbacks=callbacks, max_steps=500, default_root_dir=tmp_path)
        fitted.fit(model, DataLoader(Turned(), batch_size=None))
        return model

    free = train([])
    held = train([ClampHeads(["L0H0"])])
    late = train([ClampHeads(["L0H0"], stop=250)])
    assert sum(free.found[200:250]) / 50 < 0.2
    assert min(held.found) > 1.0
    assert min(late.found[:250]) > 1.0
    assert sum(late.found[-20:]) / 20 < 0.2  # Let go, it forms after all.
