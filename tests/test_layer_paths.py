"""Integrated gradients of layers: captum's numbers, a slow twin, and what lies below run once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi.attribution import (
    LayerIntegratedGradients,
    integrated_gradients,
    layer_integrated_gradients,
)
from lightning_mi.attribution.rules import nodes
from lightning_mi.errors import ArgumentError, ModelError

REFERENCE = Path(__file__).parent / "reference"


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Any:
        return self.out(torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).mean(2))


class Counted(nn.Linear):
    """Counts the rows it computed."""

    rows = 0

    def forward(self, input: Tensor) -> Tensor:
        type(self).rows += len(input)
        return super().forward(input)


class Stack(nn.Module):
    """Below, the layer, a residual branch around it, and above."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Sequential(Counted(5, 7), nn.Tanh())
        self.layer = nn.Linear(7, 7)
        self.above = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Any:
        hidden = self.below(x)
        return self.above(self.layer(hidden) + hidden)


def stacked() -> tuple[Stack, Tensor]:
    return Stack().double().eval(), torch.randn(6, 5).double()


def test_captums_layers() -> None:
    with np.load(REFERENCE / "captum_text.npz") as loaded:
        data = {key: torch.from_numpy(loaded[key]) for key in loaded}
    model = Text().double()
    model.load_state_dict({k[6:]: v for k, v in data.items() if k.startswith("param.")})
    for layer in ("emb", "conv"):
        found = layer_integrated_gradients(
            model, data["ids"], data["target"], layer=layer, baseline=data["ref"], steps=24
        )
        close(found.values, data[f"layer_ig_{layer}"], 1e-7)
        close(found.delta, data[f"layer_ig_{layer}_delta"], 1e-6)  # type: ignore[arg-type]
    assert found.axes == ("example", "channel", "position")


@pytest.mark.parametrize("layer", ["below", "below.0", "layer", "above.0"])
def test_captum_alive(layer: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model, x = stacked()
    module = model.get_submodule(layer)
    found = layer_integrated_gradients(model, x, 1, layer=layer, steps=20)
    theirs = attr.LayerIntegratedGradients(model, module).attribute(x, 0 * x, target=1, n_steps=20)
    close(found.values, theirs, 1e-6)


def test_slow_twin() -> None:
    model, x = stacked()
    found = layer_integrated_gradients(model, x, 2, layer=model.layer, steps=9)
    below = model.below(x).detach()
    here, there = model.layer(below).detach(), model.layer(model.below(0 * x)).detach()
    total = torch.zeros_like(here)
    for alpha, weight in zip(*nodes("gauss-legendre", 9), strict=True):
        point = (there + alpha * (here - there)).requires_grad_()
        value = model.above(point + below)[:, 2].sum()
        total += weight * torch.autograd.grad(value, point)[0]
    close(found.values, total * (here - there))


def test_completeness_where_all_passes_the_layer() -> None:
    model, x = stacked()
    found = layer_integrated_gradients(model, x, 0, layer="below", tolerance=1e-3)
    with torch.no_grad():
        change = (model(x) - model(0 * x))[:, 0]
    close(found.output_change, change)  # type: ignore[arg-type]
    assert float(found.gap.abs().max()) <= 1e-3  # type: ignore[union-attr]
    # Beside the layer, the residual branch keeps its value.
    part = layer_integrated_gradients(model, x, 0, layer="layer", tolerance=1e-3)
    assert not torch.allclose(part.output_change, change)  # type: ignore[arg-type]


def test_the_first_layer_of_a_linear_start_agrees_with_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).double()
    dict(model.named_parameters())["0.weight"].data.copy_(torch.eye(4))
    x = torch.randn(3, 4).double()
    close(
        layer_integrated_gradients(model, x, 1, layer="0", steps=16).values,
        integrated_gradients(model, x, 1, steps=16).values,
    )


def test_what_lies_below_runs_once() -> None:
    model, x = stacked()
    Counted.rows = 0
    found = layer_integrated_gradients(model, x, 0, layer="layer", steps=50)
    # At the inputs, at both ends, and where it is checked that it may be handed out.
    assert Counted.rows <= 6 * len(x)
    assert "forward" not in vars(model.below)
    close(found.values, layer_integrated_gradients(model, x, 0, layer="layer", steps=50).values, 0)


def test_a_table_of_as_many_positions_as_examples_is_not_taken_for_examples() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Any:
            hidden = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return self.out(torch.tanh(self.layer(hidden)).mean(1))

    model, ids = Placed().double(), torch.randint(0, 9, (5, 5))
    both = layer_integrated_gradients(model, ids, 1, layer="layer", steps=8)
    alone = [
        layer_integrated_gradients(model, row[None], 1, layer="layer", steps=8).values
        for row in ids
    ]
    close(both.values, torch.cat(alone))
    assert both.axes == ("example", "position", "channel")


def test_adapted_batch_equals_one_by_one() -> None:
    model, x = stacked()
    both = layer_integrated_gradients(model, x, 1, layer="below")
    alone = [layer_integrated_gradients(model, row[None], 1, layer="below").values for row in x]
    close(both.values, torch.cat(alone), 1e-9)


def test_tuple_outputs_move_their_first_tensor() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            hidden, _ = self.rnn(x)
            return self.out(torch.tanh(hidden).mean(1))

    model, x = Recurrent().double(), torch.randn(2, 5, 3).double()
    found = layer_integrated_gradients(model, x, 0, layer="rnn", channels="sum")
    assert found.axes == ("example", "position")
    assert found.values.shape == (2, 5)
    with torch.no_grad():
        change = (model(x) - model(0 * x))[:, 0]
    close(found.output_change, change)  # type: ignore[arg-type]


def test_tokens_of_a_layer_carry_their_ids() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            hidden = torch.tanh(self.layer(self.words(input_ids))) * attention_mask[..., None]
            return self.out(hidden.sum(1) / attention_mask.sum(1, keepdim=True))

    model = Encoder()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    found = layer_integrated_gradients(model, batch, 1, layer="layer", channels="sum")
    assert found.ids is not None
    assert float(found.values[1, 2]) == 0
    labelled = {**batch, "labels": torch.tensor([0, 1])}
    record = LayerIntegratedGradients(layer="layer", target=1)
    panels = {r.name: r.panel for r in mi.measure(model, [record], batch=labelled)}
    values = panels["layer_integrated_gradients/values"]
    assert values.axes == ("example", "position")
    assert values.convention["layer"] == "layer"
    close(values.values, found.values, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_in_is_precision_out(dtype: torch.dtype) -> None:
    model, x = stacked()
    exact = layer_integrated_gradients(model, x, 1, layer="layer", steps=16).values
    found = layer_integrated_gradients(model.to(dtype), x.to(dtype), 1, layer="layer", steps=16)
    assert found.values.dtype == dtype
    close(found.values.double(), exact, 0.05 if dtype == torch.bfloat16 else 1e-5)


def test_layer_without_effect_scores_zero() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            self.idle(x)
            return self.out(x)

    found = layer_integrated_gradients(Idle(), torch.randn(2, 3), 0, layer="idle")
    assert float(found.values.abs().max()) == 0


def test_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pairs = nn.Linear(3, 3), nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.layer(x)) + self.pairs([x])[0]

    model, x = Twice(), torch.randn(2, 3)
    with pytest.raises(ModelError, match="'layer' to be called once"):
        layer_integrated_gradients(model, x, 0, layer="layer")
    with pytest.raises(ArgumentError, match="layer"):
        layer_integrated_gradients(model, x, 0, layer="none")
    with pytest.raises(ArgumentError, match="channels"):
        layer_integrated_gradients(model, x, 0, layer="layer", channels="all")  # type: ignore[arg-type]
    assert not model.layer._forward_hooks


def test_model_is_left_as_it_was_after_a_failure() -> None:
    model, x = stacked()
    calls = []

    def target(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(len(outputs))
        if len(calls) > 6:
            raise RuntimeError("enough")
        return outputs[:, 0]

    with pytest.raises(RuntimeError, match="enough"):
        layer_integrated_gradients(model, x, target, layer="layer", steps=60)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
