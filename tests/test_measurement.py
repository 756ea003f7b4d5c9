"""Measuring at one state of a model."""

from __future__ import annotations

import enum
import functools
import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mi import (
    ArgumentError,
    Behavior,
    Classification,
    Context,
    IndexedData,
    LogitDifference,
    Measurement,
    NextToken,
    Panel,
    Task,
    measure,
)
from lightning_mi.measurement import describe
from lightning_mi.record import scalar

BATCH = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0]))


@dataclass(frozen=True)
class Mean(Measurement):
    """Mean and size of the outputs."""

    name: str = "mean"
    factor: float = 1.0
    extra: Any = None

    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        outputs = context.outputs(model)
        return {
            "value": scalar(outputs.mean() * self.factor),
            "size": scalar(float(len(outputs))),
        }


@dataclass(frozen=True)
class Gradient(Measurement):
    """Gradient of the loss by the inputs: needs everything that inference mode forbids."""

    name: str = "gradient"

    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        inputs = context.task.inputs(context.batch).requires_grad_()
        batch = context.task.with_inputs(context.batch, inputs)
        loss = context.task.loss(context.task.outputs(model, batch), batch).sum()
        (gradient,) = torch.autograd.grad(loss, inputs)
        return {"values": Panel(gradient, ("example", "feature"))}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.training)
        found: Tensor = self.inner(x)
        return found


def test_one_record_for_each_panel() -> None:
    model = nn.Linear(3, 2)
    records = measure(model, [Mean(), Mean("twice", 2.0)], batch=BATCH, step=7)
    assert [r.name for r in records] == ["mean/value", "mean/size", "twice/value", "twice/size"]
    assert {(r.step, r.epoch, r.samples, r.source, r.weights) for r in records} == {
        (7, 0, None, "live", "current")
    }
    torch.testing.assert_close(records[0].panel.values, model(BATCH[0]).mean().detach())
    assert records[2].panel.item() == 2 * records[0].panel.item()
    assert records[2].made_by["init_args"]["factor"] == 2.0


def test_moments_come_from_the_context() -> None:
    model = nn.Linear(3, 2)
    context = Context(model, BATCH, Classification(), step=5, epoch=2, samples=40, tokens=80)
    record = measure(model, Mean(), context=context, source="sweep", weights="average")[0]
    assert (record.step, record.epoch, record.samples, record.tokens) == (5, 2, 40, 80)
    assert (record.source, record.weights) == ("sweep", "average")


def test_forward_passes_are_shared() -> None:
    model = Counting()
    measure(model, [Mean(), Mean("b"), Mean("c")], batch=BATCH, task=Classification())
    assert model.calls == [False]
    measure(model, Mean(), batch=BATCH, task=Classification())
    assert model.calls == [False, False], "another firing computes again"
    assert model.training


def test_what_is_shared_is_computed_once() -> None:
    context, calls = Context(nn.Linear(1, 1)), []

    def compute() -> None:
        calls.append(1)

    assert [context.shared("key", compute) for _ in range(3)] == [None] * 3
    context.shared("other", compute)
    assert len(calls) == 2


def test_gradients_in_inference_mode_with_a_batch_made_there() -> None:
    model = nn.Linear(3, 2)
    expected = measure(model, Gradient(), batch=tuple(t.clone() for t in BATCH))[0].panel
    with torch.inference_mode():
        batch = tuple(t.clone() for t in BATCH)
        found = measure(model, Gradient(), batch=batch)[0].panel
    assert found.equal(expected)
    assert expected.values.abs().sum() > 0


def test_measuring_happens_inside_what_is_asked_for() -> None:
    events = []

    @contextmanager
    def inside() -> Any:
        events.append("in")
        with torch.autocast("cpu", torch.bfloat16):
            yield
        events.append("out")

    model = nn.Linear(3, 2)
    fine = measure(model, Mean(), batch=BATCH)[0].panel.item()
    coarse = measure(model, Mean(), batch=BATCH, inside=inside)[0].panel.item()
    assert events == ["in", "out"]
    assert fine != coarse
    assert fine == pytest.approx(coarse, abs=0.02)


def test_names_are_unique() -> None:
    with pytest.raises(ArgumentError, match=r"measurements: .*got 'mean' twice. Pass Mean\(name="):
        measure(nn.Linear(3, 2), [Mean(), Mean(factor=2.0)], batch=BATCH)
    with pytest.raises(ArgumentError, match="without a slash for each, got 'a/b'"):
        measure(nn.Linear(3, 2), Mean("a/b"), batch=BATCH)


@pytest.mark.parametrize(
    ("bad", "got"),
    [(Mean, "the class Mean"), ([Mean], "the class Mean"), (3, "a int"), ("a", "str")],
)
def test_what_is_no_measurement_is_refused(bad: Any, got: str) -> None:
    with pytest.raises(
        ArgumentError, match=f"measurements: expected measurements.*got {got}|a str"
    ):
        measure(nn.Linear(3, 2), bad, batch=BATCH)


def test_a_batch_elsewhere_is_refused() -> None:
    with pytest.raises(ArgumentError, match="batch: expected tensors on the model's device, meta"):
        measure(nn.Linear(3, 2, device="meta"), Mean(), batch=BATCH, task=Classification())


def test_a_missing_batch_is_named() -> None:
    context = Context(nn.Linear(3, 2))
    assert not context.has_batch
    with pytest.raises(ArgumentError, match="batch: expected a batch to measure on, got none"):
        measure(nn.Linear(3, 2), Mean())


def test_a_measurement_without_a_batch() -> None:
    @dataclass(frozen=True)
    class Norm:
        name: str = "norm"

        def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
            return {"value": scalar(sum(p.square().sum() for p in model.parameters()))}

    assert measure(nn.Linear(3, 2), Norm())[0].panel.item() > 0


def test_texts_of_tokens() -> None:
    assert Context(nn.Linear(1, 1)).texts(torch.tensor([3, 5])) == ["3", "5"]
    decode = Context(nn.Linear(1, 1), decode=lambda ids: [chr(97 + i) for i in ids])
    assert decode.texts([0, 2]) == ["a", "c"]


def test_the_targets_of_a_context_know_its_task() -> None:
    context = Context(nn.Linear(3, 2), BATCH)
    assert context.target(LogitDifference(0)).task == Classification()


# -------------------------------------------------------------------- recipes


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Inner:
    shown: int = 1
    hidden: int = field(default=2, init=False)
    missing: None = None


def things() -> list[Any]:
    return [
        None,
        True,
        0.5,
        "text",
        np.int64(3),
        np.float32(0.5),
        torch.device("cpu"),
        torch.float32,
        Path("a/b"),
        timedelta(seconds=5),
        Colour.RED,
        torch.ones(2),
        np.ones(2),
        {"a": [1, (2, 3)], 4: {5, 6}},
        Inner(),
        torch.relu,
        lambda x: x,
        functools.partial(max, 1),
        nn.Linear(2, 2),
        torch.utils.data.TensorDataset(torch.ones(3)),
        IndexedData([1, 2]),
        object(),
        NextToken("net"),
        LogitDifference(torch.tensor([1, 2]), other=3),
        Behavior(torch.ones(1, 2), torch.zeros(1, 2)),
        Mean(extra=object()),
    ]


@pytest.mark.parametrize("index", range(len(things())))
def test_recipes_are_json_without_addresses(index: int) -> None:
    first, second = describe(things()[index]), describe(things()[index])
    assert first == second
    text = json.dumps(first, allow_nan=False)
    assert json.loads(text) == first
    assert not re.search(r"0x[0-9a-f]{6,}", text)


def test_recipes_read_like_yaml() -> None:
    assert describe(Inner()) == {"class_path": f"{__name__}.Inner", "init_args": {"shown": 1}}
    assert describe(Colour.RED) == "RED"
    assert describe(np.int64(3)) == 3
    assert describe(Path("a/b")) == "a/b"
    assert describe(torch.float16) == "torch.float16"
    assert describe(IndexedData([1, 2]))["length"] == 2
    assert describe({6, 5}) == [5, 6]


def test_recipes_tell_tensors_apart() -> None:
    ones, zeros = describe(torch.ones(2)), describe(torch.zeros(2))
    assert ones["tensor"] != zeros["tensor"]
    assert describe(np.ones(2)) != describe(np.zeros(2))


# -------------------------------------------------------------------- data and behaviours


def test_examples_by_index() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(5.0), torch.arange(5))
    data = IndexedData(dataset)
    x, y = data.batch(torch.tensor([4, 0]))
    assert (x.tolist(), y.tolist(), len(data)) == ([4, 0], [4, 0], 5)
    assert IndexedData(dataset, collate=len).batch([1, 2, 3]) == 3
    assert data.describe(1234) == "train[1,234]"
    dataset.describe = lambda index: f"number {index}"
    assert data.describe(3) == "number 3"


def test_a_stream_has_no_index() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            yield 1

    with pytest.raises(ArgumentError, match=r"dataset: expected a map-style dataset .*a Stream"):
        IndexedData(Stream())


def test_clean_and_corrupted_prompts_have_one_shape() -> None:
    with pytest.raises(
        ArgumentError, match=r"corrupted: expected the shape .*\(1, 2\), got \(1, 3"
    ):
        Behavior(torch.zeros(1, 2), torch.zeros(1, 3))


def test_an_own_task_is_used() -> None:
    class Half(Task):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return super().outputs(model, batch) / 2

    model = nn.Linear(3, 2)
    whole, half = (
        measure(model, Mean(), batch=BATCH, task=t)[0].panel.item() for t in (Task(), Half())
    )
    assert half == pytest.approx(whole / 2)
