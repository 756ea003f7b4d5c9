"""Adaptive nodes: a slow twin, kinks that are found, what they cost, and what they leave alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mi.attribution import Attribution, IntegratedGradients, integrated_gradients
from lightning_mi.attribution.refining import HELD
from lightning_mi.target import Probability


def relu_net(sizes: tuple[int, ...] = (20, 64, 64, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Counting(nn.Module):
    """Counts the rows that pass with a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Any:
        if x.requires_grad:
            self.rows.append(len(x))
        return self.net(x)


def gaps(found: Attribution) -> Tensor:
    assert found.gap is not None
    return found.gap.abs()


def steps(found: Attribution) -> list[int]:
    assert found.steps is not None
    return found.steps.tolist()


def close(a: Tensor, b: Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def off(scores: Any, change: float) -> float:
    return float(abs(scores.sum() - change) / max(abs(change), 0.01 * abs(scores).sum()))


def twin(model: nn.Module, x: Tensor, tolerance: float, most: int) -> tuple[Any, int]:
    """Refine one example with lists and loops."""

    def at(alpha: float) -> tuple[float, np.ndarray]:
        point = (alpha * x).requires_grad_()
        value = model(point[None])[0, 0]
        return value.item(), (torch.autograd.grad(value, point)[0] * x).numpy()

    alphas, weights = np.polynomial.legendre.leggauss(8)
    known = {float(a): at(float(a)) for a in (alphas + 1) / 2}
    first, last = at(0.0)[0], at(1.0)[0]
    scores = np.stack([slopes for _, slopes in known.values()]).T @ (weights / 2)
    while off(scores, last - first) > tolerance and len(known) < most:
        places = sorted(known)
        edges = [(0.0, first, known[places[0]][1])]
        edges += [(a, *known[a]) for a in places]
        edges += [(1.0, last, known[places[-1]][1])]
        pieces = list(itertools.pairwise(edges))
        parts = [(b[0] - a[0]) * (a[2] + b[2]) / 2 for a, b in pieces]
        errors = [abs(p.sum() - (b[1] - a[1])) for p, (a, b) in zip(parts, pieces, strict=True)]
        k = next(i for i, error in enumerate(errors) if error >= 0.99 * max(errors))
        left, right = pieces[k][0][0], pieces[k][1][0]
        share = {0: 1 / 3, len(pieces) - 1: 2 / 3}.get(k, 1 / 2)
        place = left + share * (right - left)
        known[place] = at(place)
        places = sorted(known)
        bounds = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), 1.0]
        widths = np.diff(bounds)
        scores = np.stack([known[a][1] for a in places]).T @ widths
    return scores, len(known)


def test_slow_twin() -> None:
    model, x = relu_net().double(), torch.randn(12, 20).double()
    found = integrated_gradients(model, x, 0, tolerance=0.01, max_steps=HELD)
    for row, value, used in zip(x, found.values, steps(found), strict=True):
        scores, expected = twin(model, row, 0.01, HELD)
        close(value, torch.from_numpy(scores), 1e-10)
        assert used == expected


def test_one_kink_is_closed_in_on() -> None:
    # relu(2α − 0.9) rises by 1.1: fixed nodes miss the kink by 1/n, bisection by 2⁻ⁿ.
    inner = nn.Linear(1, 1).double()
    inner.weight.data.fill_(1.0)
    inner.bias.data.fill_(-0.9)
    function = nn.Sequential(inner, nn.ReLU())
    found = integrated_gradients(function, torch.tensor([[2.0]]).double(), 0, tolerance=1e-5)
    assert float(gaps(found)) <= 1e-5
    close(found.values, torch.tensor([[1.1]]).double(), 2e-5)
    assert steps(found)[0] <= 24
    fixed = integrated_gradients(function, torch.tensor([[2.0]]).double(), 0, steps=24)
    assert float(gaps(fixed)) > 1e-4


def test_the_gap_is_what_is_missing_from_the_scores() -> None:
    model, x = relu_net(), torch.randn(32, 20)
    found = integrated_gradients(model, x, 0)
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x)))[:, 0]
    guarded = torch.maximum(change.abs(), 0.01 * found.values.abs().sum(1))
    missing = (found.values.sum(1) - change) / guarded
    close(missing.abs(), gaps(found), 1e-4)
    assert float(gaps(found).max()) <= 0.01
    assert found.converged is not None
    assert bool(found.converged.all())


def test_no_gradient_is_wasted() -> None:
    model = Counting(relu_net())
    found = integrated_gradients(model, torch.randn(40, 20), 0, max_steps=HELD)
    assert sum(model.rows) == sum(steps(found))
    assert min(steps(found)) == 8


def test_it_takes_a_fraction_of_fixed_nodes() -> None:
    model, x = relu_net(), torch.randn(64, 20)
    found = integrated_gradients(model, x, 0, max_steps=4096)
    assert bool((gaps(found) <= 0.01).all())
    counts = sorted(steps(found))
    assert counts[len(counts) // 2] <= 16
    same = integrated_gradients(model, x, 0, steps=counts[len(counts) // 2])
    assert int((gaps(same) > 0.01).sum()) > len(x) // 4


def test_smooth_model_keeps_gauss_legendre() -> None:
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    x = torch.randn(6, 5).double()
    adapted, fixed = (integrated_gradients(model, x, 0, steps=n) for n in (None, 8))
    assert torch.equal(adapted.values, fixed.values) or bool(
        (adapted.values - fixed.values).abs().max() < 1e-14
    )
    assert set(steps(adapted)) == {8}


def test_beyond_what_is_held_the_nodes_are_doubled() -> None:
    model, x = relu_net(), torch.randn(4, 20)
    found = integrated_gradients(model, x, 0, tolerance=0.0, max_steps=100)
    fixed = integrated_gradients(model, x, 0, steps=100)
    assert steps(found) == [100] * 4
    close(found.values, fixed.values, 1e-6)


@pytest.mark.parametrize("most", [1, 2, 5, 8, 9, 12, 64, 65])
def test_most_nodes(most: int) -> None:
    model, x = relu_net(), torch.randn(4, 20)
    found = integrated_gradients(model, x, 0, tolerance=0.0, max_steps=most)
    assert steps(found) == [most] * 4
    assert found.convention["most_steps"] == most


def test_batched_equals_one_by_one_at_every_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = relu_net(), torch.randn(9, 20)
    found = integrated_gradients(model, x, 2)
    for portion in (1, 2**12, 2**30):
        monkeypatch.setattr("lightning_mi.attribution.line.PORTION", {"cpu": portion})
        alone = [integrated_gradients(model, row[None], 2) for row in x]
        close(torch.cat([a.values for a in alone]), found.values, 1e-6)
        assert [steps(a)[0] for a in alone] == steps(found)


def test_nothing_to_integrate_and_nothing_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 2.0]])
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    found = integrated_gradients(model, x, 0)
    assert found.converged is not None
    assert found.converged.tolist()[:2] == [True, False]
    assert steps(found)[1] == 8
    assert bool(found.values[1].isnan().any())


def test_gradient_that_does_not_exist_at_the_baseline_is_not_asked_for() -> None:
    # √x has no derivative at 0; the score of a sum of roots is √x each.
    def roots(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.sqrt().sum(1)

    x = torch.tensor([[4.0, 9.0]]).double()
    found = integrated_gradients(nn.Identity(), x, roots)
    close(found.values, torch.tensor([[2.0, 3.0]]).double(), 0.06)
    assert float(gaps(found)) <= 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = relu_net((20, 64, 1)), torch.randn(8, 20)
    exact = integrated_gradients(model, x, 0, steps=256).values
    half = integrated_gradients(model.to(dtype), x.to(dtype), 0)
    assert half.values.dtype == dtype
    close(half.values.float(), exact, 0.03)
    assert half.gap is not None
    assert half.gap.dtype == torch.float32


def test_measurement_of_few_nodes_refines_them() -> None:
    found = IntegratedGradients(target=0, examples=None, max_steps=12)
    assert found.max_steps == 12
    model, x = relu_net(), torch.randn(16, 20)
    adapted = integrated_gradients(model, x, 0, max_steps=12)
    fixed = integrated_gradients(model, x, 0, steps=12)
    assert float(gaps(adapted).median()) < float(gaps(fixed).median())
    assert max(steps(adapted)) <= 12


def test_saturated_probability_is_warned_of_and_the_logit_offered() -> None:
    model, x = nn.Linear(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    model.weight.data.copy_(torch.tensor([[20.0, 20.0], [0.0, 0.0]]))
    model.bias.data.zero_()
    with pytest.warns(UserWarning, match=r"1 of 2 probabilities .* target=Logit"):
        found = integrated_gradients(model, x, Probability(0))
    # From an even chance to certainty; the path still shares it in full.
    close(found.values.sum(1), torch.tensor([0.5, 0.0]), 5e-3)


def test_probability_keeps_its_class_on_the_way() -> None:
    # At the baseline the model would answer 1, at the inputs it answers 0: asked about is 0.
    model, x = nn.Linear(1, 2), torch.tensor([[1.0]])
    model.weight.data.copy_(torch.tensor([[3.0], [0.0]]))
    model.bias.data.copy_(torch.tensor([-1.0, 0.0]))
    found = integrated_gradients(model, x, Probability())
    expected = torch.sigmoid(torch.tensor([[2.0]])) - torch.sigmoid(torch.tensor([[-1.0]]))
    close(found.values, expected, 1e-4)
