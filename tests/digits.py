"""Real models of scikit-learn's digits, and many of them trained again on parts of the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_mi.influence.evaluate import Subsets

RIDGE = 0.01
STEPS, RATE, DECAY = 250, 0.3, 1e-3
TRAIN, QUERIES, PARTS = 1500, 200, 40


def pixels(order: Tensor) -> tuple[Tensor, Tensor]:
    """Digits in some order, scaled to 0 to 1, in double precision, and their labels."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    return x[order], y[order]


# ------------------------------------------------------------------ softmax regression


@cache
def softmax_data(wrong: float = 0.0) -> tuple[TensorDataset, TensorDataset]:
    """400 training and 50 test examples with a column of ones; a share of wrong labels."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:450]
    x, y = pixels(order)
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    count = round(400 * wrong)
    y[:count] = (y[:count] + 3) % 10
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


def ridge(model: nn.Module) -> Tensor:
    """½ · 0.01 ‖W‖²."""
    return RIDGE / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def softmax_fit(data: TensorDataset, rows: Sequence[int] | None = None) -> nn.Linear:
    """Minimise mean cross-entropy + ridge on some rows by Newton's method, to ‖g‖ < 1e-9."""
    x, y = (t if rows is None else t[list(rows)] for t in data.tensors)
    n, d = x.shape
    weight = torch.zeros(10, d).double()
    for _ in range(30):
        p = (x @ weight.T).softmax(1)
        slope = (p - F.one_hot(y, 10)).T @ x / n + RIDGE * weight
        if float(slope.norm()) < 1e-9:
            break
        bend = torch.zeros(10, d, 10, d).double()
        for a in range(10):
            for b in range(a, 10):
                both = x.T @ (x * (p[:, a] * (float(a == b) - p[:, b]))[:, None]) / n
                bend[a, :, b], bend[b, :, a] = both, both.T
        matrix = bend.reshape(10 * d, 10 * d) + RIDGE * torch.eye(10 * d).double()
        weight = weight - torch.linalg.solve(matrix, slope.flatten()).view_as(weight)
    assert float(slope.norm()) < 1e-9
    model = nn.Linear(d, 10, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


# ------------------------------------------------------------------ a network


@cache
def mlp_data() -> tuple[TensorDataset, TensorDataset]:
    """1,500 training examples, a tenth with wrong labels, and 200 test examples."""
    order = np.random.RandomState(0).permutation(1797)[: TRAIN + QUERIES]
    x, y = pixels(torch.tensor(order))
    wrong = torch.tensor(np.random.RandomState(1).choice(TRAIN, TRAIN // 10, replace=False))
    y[wrong] = (y[wrong] + 3) % 10
    x = x.float()
    return TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])


def network(seed: int = 0) -> nn.Sequential:
    """64-32-10 with tanh, untrained: 2,410 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train_many(rows: Tensor, seeds: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Train a network on each row of indices, all at once; weights and the test losses."""
    (x, y), (tests, answers) = (d.tensors for d in mlp_data())
    base = network()
    weights, _ = stack_module_state([network(s) for s in seeds])
    weights = {k: v.detach() for k, v in weights.items()}

    def loss(w: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        decay = torch.stack([v.square().sum() for v in w.values()]).sum()
        return F.cross_entropy(functional_call(base, w, (inputs,)), labels) + DECAY / 2 * decay

    slope, inputs, labels = vmap(grad(loss)), x[rows], y[rows]
    speed = {k: torch.zeros_like(v) for k, v in weights.items()}
    for step in range(STEPS):
        slopes, rate = slope(weights, inputs, labels), RATE * min(1, (STEPS - step) / 100)
        speed = {k: 0.9 * speed[k] + slopes[k] for k in weights}
        weights = {k: weights[k] - rate * speed[k] for k in weights}

    def test(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(base, w, (tests,)), answers, reduction="none")

    return weights, vmap(test)(weights)


@cache
def retrained() -> tuple[nn.Sequential, Subsets]:
    """The network of all examples, and the losses of those of forty halves, two seeds each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(TRAIN, generator=generator) for _ in range(PARTS)])
    rows = rows[:, : TRAIN // 2]
    each = [train_many(rows, [100 * s + i for i in range(PARTS)])[1] for s in (0, 1)]
    members = torch.zeros(PARTS, TRAIN, dtype=torch.bool).scatter_(1, rows, True)
    whole, _ = train_many(torch.arange(TRAIN)[None], [0])
    model = network()
    model.load_state_dict({k: v[0] for k, v in whole.items()})
    return model, Subsets(members, torch.stack(each, 1).double())
