"""Every refusal names the argument, what was expected, what came, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import language_model, loaders, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mi import LightningMIError, attribution, measure
from lightning_mi.attribution import Saliency
from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    MeasurementMonitor,
    SaliencyMonitor,
)
from lightning_mi.influence import Objective, influence_scores


def refusal(call: Any) -> str:
    """Run something that must be refused, and return the message."""
    with pytest.raises(LightningMIError) as caught:
        call()
    return str(caught.value)


def fit(monitor: Any, model: Any, train: Any, folder: Any) -> None:
    validation = loaders()[1] if hasattr(model, "losses") else None
    trainer(callbacks=[monitor], default_root_dir=folder).fit(model, train, validation)


def classifier() -> Any:
    pl = __import__("pytorch_lightning")

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Classifier()


def recurrent() -> Any:
    """A next-token model without attention."""
    pl = __import__("pytorch_lightning")

    class Recurrent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(17, 8)
            self.net = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 17)

        def forward(self, ids: Any) -> Any:
            return self.head(self.net(self.tokens(ids))[0])

        def training_step(self, ids: Any, batch_idx: int) -> Any:
            return self(ids).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Recurrent()


def pairs() -> Any:
    return DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,))), 4)


class Stream(IterableDataset[Any]):
    """Data without an index."""

    def __iter__(self) -> Any:
        return iter(torch.randint(0, 17, (16, 10)))


def test_heads_of_a_model_without_attention(tmp_path: Any) -> None:
    message = refusal(lambda: fit(HeadMonitor(), recurrent(), loaders()[0], tmp_path))
    assert "attention" in message
    assert "Recurrent" in message


def test_heads_of_a_model_without_tokens(tmp_path: Any) -> None:
    message = refusal(lambda: fit(HeadMonitor(), classifier(), pairs(), tmp_path))
    assert "Classifier" in message or "token" in message


def test_ids_for_a_method_that_needs_floats() -> None:
    class OneHot(nn.Module):
        def forward(self, ids: Any) -> Any:
            return nn.functional.one_hot(ids, 5).float().sum(1)

    message = refusal(lambda: attribution.saliency(OneHot(), torch.tensor([[1, 2]]), 0))
    assert "nn.Embedding" in message
    assert "inputs" in message


def test_baseline_of_the_wrong_shape() -> None:
    message = refusal(
        lambda: attribution.integrated_gradients(
            nn.Linear(4, 3), torch.ones(2, 4), 0, baseline=torch.zeros(7)
        )
    )
    assert message.startswith("baseline: expected")
    assert "(7,)" in message


@pytest.mark.parametrize("target", [3, -1, torch.tensor([0, 9])])
def test_target_out_of_range(target: Any) -> None:
    message = refusal(lambda: attribution.saliency(nn.Linear(4, 3), torch.ones(2, 4), target))
    assert message.startswith("target: expected an index from 0 to 2")


def test_batch_on_another_device() -> None:
    batch = (torch.ones(2, 4, device="meta"), torch.zeros(2, dtype=torch.long))
    message = refusal(lambda: measure(nn.Linear(4, 3), Saliency(), batch=batch))
    assert message.startswith("batch: expected tensors on the model's device, cpu, got meta")


def test_stream_to_influence_monitor(tmp_path: Any) -> None:
    stream = DataLoader(Stream(), 4)
    message = refusal(lambda: fit(InfluenceMonitor(), language_model(), stream, tmp_path))
    assert "map-style" in message
    assert "Stream" in message


def test_stream_to_influence_scores() -> None:
    from lightning_mi import Classification

    data = TensorDataset(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    model, goal = nn.Linear(4, 3), Objective(Classification())
    message = refusal(lambda: influence_scores(model, goal, Stream(), data, damping=0.1))
    assert message.startswith("train: expected a map-style dataset")


def test_other_monitors_accept_a_stream(tmp_path: Any) -> None:
    stream = DataLoader(Stream(), 4)
    fit(SaliencyMonitor(), language_model(), stream, tmp_path)


def test_task_that_cannot_be_inferred(tmp_path: Any) -> None:
    unlabelled = DataLoader(torch.randn(8, 4), 4)
    model = classifier()
    model.training_step = lambda batch, i: model(batch).square().mean()
    message = refusal(lambda: fit(SaliencyMonitor(), model, unlabelled, tmp_path))
    assert message.startswith("task: expected")
    assert "labels none" in message


def test_measurement_that_returns_no_panels() -> None:
    class Wrong:
        name = "wrong"

        def __init__(self, reading: Any) -> None:
            self.reading = reading

        def __call__(self, model: Any, context: Any) -> Any:
            return self.reading

    for reading in (torch.zeros(2), {"x": 1.0}):
        message = refusal(lambda r=reading: measure(nn.Linear(1, 1), Wrong(r)))
        assert message.startswith("measurement 'wrong': expected a mapping of names to Panels")


def test_things_that_are_no_measurements() -> None:
    for thing in (Saliency, lambda model, context: {}):
        message = refusal(lambda t=thing: MeasurementMonitor(measurements=[t]))
        assert message.startswith("measurements: expected measurements")


def test_tokenizer_that_cannot_decode(tmp_path: Any) -> None:
    monitor = SaliencyMonitor(tokenizer="gpt2")
    message = refusal(lambda: fit(monitor, language_model(), loaders()[0], tmp_path))
    assert message.startswith("tokenizer: expected an object with decode")


def test_monitor_outside_a_trainer() -> None:
    monitor = MeasurementMonitor(measurements=[])
    message = refusal(lambda: monitor.on_train_start(None, None))  # type: ignore[arg-type]
    assert "Trainer(callbacks=[…])" in message
