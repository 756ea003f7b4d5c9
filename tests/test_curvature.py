"""Curvature in factors: dense autograd twins, numbers of kronfluence, invariances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import Classification, IndexedData, NextToken, Regression
from lightning_mi.influence import EKFAC, KFAC, Objective, influence_scores
from lightning_mi.influence.blocks import dense_all
from lightning_mi.influence.dense import gauss_newton
from lightning_mi.influence.factors import eigen_of
from lightning_mi.influence.gathered import Gathered
from lightning_mi.influence.pieces import Matrix, Vector
from lightning_mi.influence.point import Point

REFERENCE = Path(__file__).parent / "reference"


# ------------------------------------------------------------------ models


class Images(nn.Module):
    """Convolutions with strides and padding, channel norms, a bare gain, a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.norm, self.group = nn.BatchNorm2d(3), nn.GroupNorm(1, 3)
        self.second = nn.Conv2d(3, 2, (2, 1), dilation=(1, 2), bias=False)
        self.gain, self.shift = nn.Parameter(torch.rand(())), nn.Parameter(torch.randn(2, 1, 1))
        self.last = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.group(self.norm(self.first(x))))
        return self.last((self.second(x) * self.gain - self.shift).flatten(1))


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1, stride=2)
        self.grouped = nn.Conv1d(3, 3, 1, groups=3)
        self.last = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.conv(x).tanh()).mean(-1) / 2)


class Conv1D(nn.Module):
    """Hugging Face's layout: weight ``[in, out]``, multiplied by addmm."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, out)), nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], -1)


class Words(nn.Module):
    """Tied embedding, positions, a reused layer, both norms, a turned weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=None if tied else 3)
        self.place = nn.Parameter(0.3 * torch.randn(9, 4))
        self.mix, self.down = nn.Linear(4, 4), Conv1D(4, 4)
        self.norm, self.rms = nn.LayerNorm(4), nn.RMSNorm(4)
        self.tied = tied
        self.head = nn.Parameter(torch.randn(4, 7))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for _ in range(2):
            x = x + self.mix(self.norm(x)).cumsum(1).tanh()
        x = self.rms(x + self.down(x))
        return x @ self.embed.weight.T if self.tied else x @ self.head


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


def case(kind: str) -> tuple[nn.Module, Any, TensorDataset]:
    torch.manual_seed(1)
    y = torch.randint(0, 3, (5,))
    if kind == "mlp":
        net: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        return net.double(), Classification(), TensorDataset(torch.randn(5, 4).double(), y)
    if kind == "regression":
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))
        targets = torch.randn(5, 2).double()
        return net.double(), Regression(), TensorDataset(torch.randn(5, 4).double(), targets)
    if kind == "images":
        images = torch.randn(5, 2, 7, 6).double()
        return Images().double(), Classification(), TensorDataset(images, y)
    if kind == "signals":
        return Signals().double(), Classification(), TensorDataset(torch.randn(5, 2, 8).double(), y)
    if kind == "recurrent":
        sequences = torch.randn(5, 4, 3).double()
        return Recurrent().double(), Classification(), TensorDataset(sequences, y)
    words = TensorDataset(torch.randint(0, 7, (5, 4)))
    return Words(tied=kind == "tied").double(), NextToken(), words


KINDS = ["mlp", "regression", "images", "signals", "recurrent", "tied", "untied"]


def gathered(kind: str, labels: Any = "auto", size: int = 5) -> tuple[Gathered, Any, Any, Any]:
    model, task, data = case(kind)
    model.eval()
    indexed, point = IndexedData(data), Point(model)

    def batches() -> Any:
        return [indexed.batch(range(i, min(i + size, 5))) for i in range(0, 5, size)]

    return Gathered(point, Objective(task), batches, labels), model, task, indexed


def jacobian(model: nn.Module, task: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """d outputs / d θ of one example by autograd alone, and its outputs."""
    own = list(model.parameters())
    out = task.outputs(model, batch).reshape(-1)
    rows = []
    for value in out:
        found = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
        pairs = zip(found, own, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(rows), out.detach()


def bent(task: Any, out: Tensor, batch: Any) -> Tensor:
    """∇²_out ℓ of one example by autograd alone."""
    shape = (1, -1, 7) if isinstance(task, NextToken) else (1, -1)
    hessian: Any = torch.autograd.functional.hessian
    found: Tensor = hessian(lambda o: task.loss(o.view(shape), batch).sum(), out)
    return found


def dense_twin(model: nn.Module, task: Any, data: IndexedData) -> Tensor:
    total = torch.zeros(())
    for i in range(len(data)):
        batch = data.batch([i])
        rows, out = jacobian(model, task, batch)
        total = total + rows.T @ bent(task, out, batch) @ rows / len(data)
    return total


# ------------------------------------------------------------------ gradients in factors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_gradients_equal_those_of_autograd(kind: str, size: int) -> None:
    found, model, task, data = gathered(kind, size=size)
    rows = torch.cat(
        [dense_all(found.blocks, c.losses, c.examples, found.point.size) for c in found]
    )
    for i in range(5):
        batch = data.batch([i])
        loss = task.loss(task.outputs(model, batch), batch).sum()
        own = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(own, model.parameters(), strict=True)
        expected = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]
        )
        assert torch.allclose(rows[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_known_layers_are_read_in_factors(kind: str) -> None:
    found, *_ = gathered(kind)
    pieces = next(iter(found)).losses
    matrices = {p.name for p in pieces if isinstance(p, Matrix)}
    vectors = {p.name for p in pieces if isinstance(p, Vector)}
    expected = {
        "mlp": ({"0.weight", "2.weight"}, set()),
        "regression": ({"0.weight", "2.weight"}, set()),
        "images": (
            {"first.weight", "second.weight", "last.weight"},
            {"norm.weight", "norm.bias", "group.weight", "group.bias", "gain", "shift"},
        ),
        "signals": ({"conv.weight", "last.weight"}, {"grouped.weight", "grouped.bias"}),
        "recurrent": (
            {"last.weight"},
            {f"cell.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        ),
        "tied": (
            {"embed.weight", "mix.weight", "down.weight"},
            {"place", "norm.weight", "norm.bias", "rms.weight"},
        ),
        "untied": (
            {"embed.weight", "mix.weight", "down.weight", "head"},
            {"place", "norm.weight", "norm.bias", "rms.weight"},
        ),
    }
    assert (matrices, vectors) == expected[kind]


@pytest.mark.parametrize("kind", ["mlp", "regression", "images", "signals", "tied"])
@pytest.mark.parametrize("size", [2, 5])
def test_the_matrix_equals_its_dense_twin(kind: str, size: int) -> None:
    found, model, task, data = gathered(kind, "exact", size=size)
    matrix, order = gauss_newton(found)
    expected = dense_twin(model, task, data)[order][:, order]
    assert torch.allclose(matrix, expected, rtol=1e-8, atol=1e-11)


# ------------------------------------------------------------------ K-FAC and EK-FAC


@pytest.mark.parametrize("kind", ["mlp", "images", "tied", "untied"])
def test_eigenvalues_equal_those_of_whole_gradients(kind: str) -> None:
    found, model, task, data = gathered(kind, "exact", size=2)
    eigen = eigen_of(found)
    for block in found.blocks:
        own = eigen[block.name]
        total = torch.zeros(block.shape).double()
        for i in range(5):
            batch = data.batch([i])
            rows, out = jacobian(model, task, batch)
            values, vectors = torch.linalg.eigh(bent(task, out, batch))
            whole = (vectors * values.clamp(min=0).sqrt()).T @ rows  # [column, P]
            total += own.turned(block.take(whole)).square().sum(0) / 5
        assert torch.allclose(own.values, total, rtol=1e-7, atol=1e-12), block.name


def kronfluence() -> tuple[nn.Module, TensorDataset, TensorDataset, Any]:
    stored = np.load(REFERENCE / "kronfluence_mlp.npz")
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(
        {k[6:]: torch.tensor(stored[k]) for k in stored if k.startswith("param.")}
    )
    sets = [("x", "y"), ("x_test", "y_test")]
    train, test = (TensorDataset(*(torch.tensor(stored[k]) for k in keys)) for keys in sets)
    return model, train, test, stored


@pytest.mark.parametrize("damping", [0.001, 0.1, None])
@pytest.mark.parametrize(("solver", "name"), [(EKFAC, "ekfac"), (KFAC, "kfac")])
@pytest.mark.filterwarnings("ignore:The model is far")
def test_the_number_of_kronfluence(solver: Any, name: str, damping: float | None) -> None:
    model, train, test, stored = kronfluence()
    chosen = solver(labels="true", relative_damping=0.1 if damping is None else None)
    result = influence_scores(
        model,
        Objective(Classification()),
        train,
        test,
        solver=chosen,
        damping=damping or 0.0,
        batch_size=25,
    )
    expected = torch.tensor(stored[f"scores.{name}.damping={damping}"]).double()
    assert torch.allclose(
        result.values * result.n, expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("solver", ["exact", "ekfac", "kfac"])
@pytest.mark.parametrize("kind", ["mlp", "images", "tied"])
@pytest.mark.filterwarnings("ignore:The model is far")
def test_batches_do_not_matter(solver: str, kind: str) -> None:
    model, task, data = case(kind)
    every = [
        influence_scores(model, Objective(task), data, data, solver=solver, batch_size=b).values
        for b in (1, 3, 5)
    ]
    for other in every[1:]:
        assert torch.allclose(every[0], other, rtol=1e-7, atol=1e-10 * float(every[0].abs().max()))
