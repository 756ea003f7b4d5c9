"""Every monitor works with no argument at all, on whatever the model is."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import loaders, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_mi as mi
from lightning_mi import Run
from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    IntegratedGradientsMonitor,
    SaliencyMonitor,
    ScheduledCheckpoint,
)
from lightning_mi.callbacks.influence import affordable
from lightning_mi.influence import TracIn


def black_boxes() -> list[Any]:
    return [SaliencyMonitor(), IntegratedGradientsMonitor(), InfluenceMonitor()]


def module(net: nn.Module, loss: Any, *, has_forward: bool = True) -> Any:
    """Wrap a network in a LightningModule that trains it on ``(inputs, labels)``."""
    pl = cases.lightning()

    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    class WithForward(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return WithForward() if has_forward else Bare()


def fit(model: Any, data: Any, monitors: list[Any], folder: Any) -> Run:
    fitted = trainer(callbacks=monitors, default_root_dir=folder, max_steps=3)
    fitted.fit(model, *data)
    return Run.open(folder)


def pairs(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    data = TensorDataset(x, y)
    return DataLoader(data, 4, shuffle=True), DataLoader(data, 4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_forward", [True, False])
def test_images(channels: int, has_forward: bool, tmp_path: Any) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    data = pairs(torch.randn(16, channels, 8, 6), torch.randint(0, 3, (16,)))
    model = module(net, F.cross_entropy, has_forward=has_forward)
    run = fit(model, data, black_boxes(), tmp_path)
    for name in ("saliency", "integrated_gradients"):
        values = run.dataset(name)["values"]
        assert values.dims == ("step", "example", "channel", "y", "x")
        assert bool((values != 0).any())
    assert run.dataset("influence")["scores"].sizes["query"] == 1


def test_tables(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    data = pairs(torch.randn(16, 5), torch.randn(16, 1))
    run = fit(module(net, F.mse_loss), data, black_boxes(), tmp_path)
    assert run.dataset("saliency")["values"].dims == ("step", "example", "feature")
    assert float(abs(run.dataset("integrated_gradients")["gap"]).max()) < 0.05


def test_language_model(tmp_path: Any) -> None:
    monitors = [HeadMonitor(), *black_boxes(), ScheduledCheckpoint()]
    run = fit(cases.language_model(), loaders(), monitors, tmp_path)
    heads = run.dataset("head_scores")
    assert heads["induction"].dims == ("step", "layer", "head")
    assert heads["induction"].shape == (2, 2, 2)
    assert {"mi/step"} <= {"mi/step", *run.names()}
    assert {r.name for r in run.records("agreement")} == {
        "agreement/saliency",
        "agreement/integrated_gradients",
    }


def test_heads_of_a_text_classifier(tmp_path: Any) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = cases.Network()
            self.head = nn.Linear(cases.VOCABULARY, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(ids).mean(1))

    data = pairs(cases.Tokens(16).ids, torch.randint(0, 3, (16,)))
    model = module(Pooled(), F.cross_entropy)
    run = fit(model, data, [HeadMonitor(), *black_boxes()], tmp_path)
    assert run.dataset("head_scores")["induction"].shape[1:] == (2, 2)
    assert not run.records("prompt")
    assert run.dataset("saliency")["values"].dims == ("step", "example", "position")


def test_report_is_kept_fresh(tmp_path: Any) -> None:
    seen: list[bool] = []

    class Watch(cases.lightning().Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((tmp_path / "mi" / "report.html").exists())

    monitors = [HeadMonitor(report=True), SaliencyMonitor()]
    run = fit(cases.language_model(), loaders(), [*monitors, Watch()], tmp_path)
    assert seen == [True, True, True]  # written at step 0, then left alone for a while
    assert "finished" in run.report.read_text()
    assert run.info["state"] == "finished"


class Padded(Dataset[Any]):
    """Dictionaries as a Hugging Face tokenizer makes them, padded on the right."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 31, (12,), generator=generator)
        mask = (torch.arange(12) < 6 + index % 6).long()
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "labels": torch.where(mask.bool(), ids, -100),
        }


def test_hugging_face_dictionaries(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pl = cases.lightning()
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip

    class Tuned(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    data = DataLoader(Padded(), 4, shuffle=True), DataLoader(Padded(), 4)
    run = fit(Tuned(), data, [HeadMonitor(), *black_boxes()], tmp_path)
    assert run.dataset("head_scores")["induction"].shape[1:] == (2, 2)
    saliency = run.dataset("saliency")["values"].values
    assert (saliency[:, 0, 6:] == 0).all()  # padding explains nothing
    assert (saliency[:, 0, :5] > 0).any()


def test_default_influence_stays_within_its_budget() -> None:
    for passes, available in ((25, 1000), (100, 1000), (1000, 1000), (1000, 40), (10, 1000)):
        chosen = affordable(TracIn(), passes, available)
        assert isinstance(chosen.candidates, int)
        assert 8 <= chosen.candidates <= available
        assert chosen.cost() <= passes or chosen.candidates == 8
    assert affordable(TracIn(), 1000, 1000).cost() == 1000


def test_more_candidates_than_there_are(tmp_path: Any) -> None:
    monitor = InfluenceMonitor(candidates=10**6)
    fit(cases.language_model(), loaders(), [monitor], tmp_path)
    assert monitor.measurements[0].candidates == 48  # type: ignore[attr-defined]


def test_subpackages_are_reachable_from_the_top() -> None:
    assert mi.circuits.head_scores is not None
    assert mi.attribution.saliency is not None
    with pytest.raises(AttributeError, match="no_such_room"):
        _ = mi.no_such_room
