"""Expected gradients and IDGI: closed forms, slow twins, what adds up, batches and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi.attribution import (
    Attribution,
    ExpectedGradients,
    Idgi,
    expected_gradients,
    idgi,
    integrated_gradients,
)
from lightning_mi.errors import ArgumentError


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def tanh_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        hidden = torch.tanh(hidden)
        if attention_mask is None:
            return self.out(hidden.mean(1))
        return self.out(
            (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        )


PADDED = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def slopes(model: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    point = x.detach().clone().requires_grad_()
    value = model(point)[:, target]
    return value.detach(), torch.autograd.grad(value.sum(), point)[0]


# --- expected gradients ---------------------------------------------------------------------------


def test_linear_model_is_weight_times_distance_from_the_mean() -> None:
    model, x, references = nn.Linear(4, 3).double(), torch.randn(6, 4), torch.randn(5, 4)
    x, references = x.double(), references.double()
    found = expected_gradients(model, x, 1, references=references, samples=10)
    close(found.values, (x - references.mean(0)) * model.weight[1].detach())
    assert float(found.gap.abs().max()) < 1e-12  # type: ignore[union-attr]


def test_one_reference_tends_to_integrated_gradients() -> None:
    model, x, start = tanh_net(), torch.randn(4, 5).double(), torch.randn(1, 5).double()
    exact = integrated_gradients(model, x, 0, baseline=start[0], steps=32).values
    off = []
    for samples in (8, 400):
        found = expected_gradients(model, x, 0, references=start, samples=samples)
        off.append(float((found.values - exact).abs().max()))
    assert off[1] < 1e-3
    assert off[1] < off[0] / 10


def test_adds_up_to_the_mean_over_the_references() -> None:
    model, x, references = tanh_net(), torch.randn(4, 5).double(), torch.randn(7, 5).double()
    found = expected_gradients(model, x, 2, references=references, samples=70)
    with torch.no_grad():
        change = model(x)[:, 2] - model(references)[:, 2].mean()
    close(found.output_change, change)  # type: ignore[arg-type]
    close(found.delta, found.values.sum(1) - change)  # type: ignore[arg-type]
    many = expected_gradients(model, x, 2, references=references, samples=2800)
    assert many.delta is not None
    assert found.delta is not None
    assert float(many.delta.abs().max()) < float(found.delta.abs().max())
    assert float(many.delta.abs().max()) < 0.02


def test_expected_gradients_of_a_batch_equal_one_by_one() -> None:
    model, x, references = tanh_net(), torch.randn(4, 5).double(), torch.randn(3, 5).double()
    both = expected_gradients(model, x, 1, references=references, samples=20).values
    alone = [
        expected_gradients(model, row[None], 1, references=references, samples=20).values
        for row in x
    ]
    close(both, torch.cat(alone))
    close(both, expected_gradients(model, x, 1, references=references, samples=20).values, 0)
    other = expected_gradients(model, x, 1, references=references, samples=20, seed=1).values
    assert not torch.equal(both, other)


def test_references_of_ids_are_embedded_and_padding_scores_zero() -> None:
    model = Words().double()
    references = torch.randint(0, 9, (5, 4))
    both = expected_gradients(model, PADDED, 1, references=references, samples=400)
    assert both.values.shape == (2, 4)
    assert both.values[1, 2:].abs().max() == 0
    short = {key: value[1:, :2] for key, value in PADDED.items()}
    alone = expected_gradients(model, short, 1, references=references[:, :2], samples=400)
    close(both.values[1:, :2], alone.values)
    assert float(both.delta.abs().max()) < 0.01  # type: ignore[union-attr]


@pytest.mark.parametrize("references", [torch.zeros(5), torch.zeros(2, 4), torch.zeros(0, 5)])
def test_references_of_another_shape(references: Tensor) -> None:
    with pytest.raises(ArgumentError, match="references"):
        expected_gradients(tanh_net(), torch.randn(2, 5).double(), 0, references=references)
    with pytest.raises(ArgumentError, match="samples"):
        expected_gradients(tanh_net(), torch.randn(2, 5).double(), 0, samples=0)


# --- IDGI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_increments_telescope(steps: int) -> None:
    model, x, start = tanh_net(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    found = idgi(model, x, 1, baseline=start, steps=steps)
    with torch.no_grad():
        change = (model(x) - model(start))[:, 1]
    close(found.values.sum(1), change)
    assert found.converged is not None
    assert bool(found.converged.all())


def test_idgi_slow_twin() -> None:
    model, x, start = tanh_net(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    total = torch.zeros_like(x)
    for k in range(7):
        value, slope = slopes(model, start + k / 7 * (x - start), 2)
        after, _ = slopes(model, start + (k + 1) / 7 * (x - start), 2)
        share = slope.square() / slope.square().sum(1, keepdim=True)
        total += share * (after - value)[:, None]
    close(idgi(model, x, 2, baseline=start, steps=7).values, total)


def test_linear_model_shares_by_squared_weights() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    weight = model.weight[0].detach()
    change = (x @ weight)[:, None]
    close(idgi(model, x, 0, steps=5).values, change * weight.square() / weight.square().sum())


def test_steps_without_a_gradient_are_lost_and_said_to_be() -> None:
    # relu(x − 1) from 0 to 2: the step on which it begins to rise begins without a gradient.
    inner = nn.Linear(1, 1).double()
    inner.weight.data.fill_(1.0)
    inner.bias.data.fill_(-1.0)
    model = nn.Sequential(inner, nn.ReLU())
    found = idgi(model, torch.tensor([[2.0]]).double(), 0, steps=1)
    assert float(found.values) == 0
    assert float(found.gap) == pytest.approx(-1)  # type: ignore[arg-type]
    assert not bool(found.converged)
    assert float(idgi(model, torch.tensor([[2.0]]).double(), 0, steps=4).values) == 0.5
    assert bool(idgi(model, torch.tensor([[2.0]]).double(), 0, steps=400).converged)


def test_small_gradients_do_not_vanish() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.mul_(1e-25)
    found = idgi(model, torch.ones(1, 3), 0, steps=2)
    weight = model.weight.detach()[0].double()
    expected = weight.sum() * weight.square() / weight.square().sum()
    torch.testing.assert_close(found.values[0].double(), expected, rtol=1e-4, atol=0)


def test_idgi_of_padded_ids_equals_one_by_one() -> None:
    model = Words().double()
    both = idgi(model, PADDED, 1, steps=8)
    assert both.values[1, 2:].abs().max() == 0
    short = {key: value[1:, :2] for key, value in PADDED.items()}
    close(both.values[1:, :2], idgi(model, short, 1, steps=8).values)
    kept = idgi(model, PADDED, 1, steps=8, keep=[1, 5])
    assert kept.values[:, 0].abs().max() == 0


def test_model_that_mixes_its_batch() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tanh_net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x - x.mean(0) + torch.linspace(0, 1, len(x))[:, None])

    model, x = Centred().double(), torch.randn(4, 5).double()
    found = idgi(model, x, 0, steps=8)
    with torch.no_grad():
        change = (model(x) - model(0 * x))[:, 0]
    close(found.values.sum(1), change)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [idgi, expected_gradients])
def test_half_precision_and_no_graph(method: Any) -> None:
    model, x = tanh_net().bfloat16(), torch.randn(3, 5).bfloat16()
    found: Attribution = method(model, x, 0)
    assert found.values.dtype == torch.bfloat16
    assert found.gap is not None
    assert found.gap.dtype == torch.float32
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in vars(found).values())


def test_measurements() -> None:
    model = tanh_net().float()
    batch = (torch.randn(8, 5), torch.randint(0, 3, (8,)))
    measurements = [ExpectedGradients(samples=16), Idgi(steps=4)]
    panels = {r.name: r.panel for r in mi.measure(model, measurements, batch=batch)}
    for name, function, options in (
        ("expected_gradients", expected_gradients, {"samples": 16, "references": batch[0]}),
        ("idgi", idgi, {"steps": 4}),
    ):
        values = panels[f"{name}/values"]
        assert values.size == {"example": 2, "feature": 5}
        direct = function(model, batch[0][:2], batch[1][:2], **options)
        close(values.values, direct.values, 1e-6)
        assert f"{name}/gap" in panels
