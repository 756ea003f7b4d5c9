"""Curvature in factors: dense autograd twins, numbers of kronfluence, invariances."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import ArgumentError, Classification, IndexedData, NextToken, Regression
from lightning_mi.influence import (
    CG,
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    DataInf,
    Direct,
    KeptBases,
    LiSSA,
    LoGra,
    Objective,
    influence_scores,
    relatif,
    self_influence,
)
from lightning_mi.influence.blocks import dense_all
from lightning_mi.influence.dense import gauss_newton
from lightning_mi.influence.factors import Eigens, eigen_of
from lightning_mi.influence.gathered import Gathered
from lightning_mi.influence.outputs import curvature_columns, slope, slope_of_loss
from lightning_mi.influence.pieces import Matrix, Vector
from lightning_mi.influence.point import Point
from lightning_mi.influence.products import Curvature

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


@pytest.mark.parametrize("kind", ["mlp", "images", "signals", "tied", "untied"])
def test_right_hand_sides_in_factors_are_those_in_full(kind: str) -> None:
    found, *_ = gathered(kind)
    eigen = eigen_of(found)
    inverse = Eigens(found.blocks, eigen, dict.fromkeys(eigen, 0.01), found.used, found.kind)
    pieces = next(iter(found)).losses
    right = dense_all(found.blocks, pieces, 5, found.point.size)
    solution, norms = inverse.of(pieces, 5, right.shape[1])
    assert torch.allclose(solution.vectors, inverse(right).vectors, rtol=1e-8, atol=1e-10)
    assert torch.allclose(norms, right.norm(dim=1))
    part = replace(inverse, blocks=found.blocks[:1])  # As factors of a run that left a layer out.
    beside = torch.ones(right.shape[1], dtype=torch.bool)
    beside[found.blocks[0].index] = False
    del solution  # Memory that holds no zeros.
    for vectors in (part(right).vectors, part.of(pieces, 5, right.shape[1])[0].vectors):
        assert bool((vectors[:, beside] == 0).all())


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


# ------------------------------------------------------------------ the other solvers

SOLVERS: list[Any] = [
    "exact",
    "ekfac",
    "kfac",
    "datainf",
    LoGra(rank=3),
    TRAK(dimension=12),
    "arnoldi",
    LiSSA(depth=12),
    LiSSA(depth=12, examples=3),
    CG(preconditioner=EKFAC()),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.filterwarnings("ignore:The model is far", "ignore:The solver stopped")
def test_no_solver_depends_on_batches(solver: Any) -> None:
    model, task, data = case("mlp")
    every = [
        influence_scores(
            model, Objective(task), data, data, solver=solver, batch_size=b, damping=0.05
        )
        for b in (1, 3, 5)
    ]
    for other in every[1:]:
        assert torch.allclose(every[0].values, other.values, rtol=1e-7, atol=1e-10)
    assert 0 < every[0].convention["parameters_covered"] <= 1
    assert bool(every[0].values.any())


def system(kind: str = "mlp", damping: float = 0.05) -> tuple[Curvature, Tensor, Tensor]:
    """A curvature, its dense twin, and right-hand sides."""
    model, task, data = case(kind)
    indexed, point = IndexedData(data), Point(model)
    curvature = Curvature(
        point, Objective(task), lambda: [indexed.batch(range(5))], 5, damping=damping
    )
    matrix = dense_twin(model, task, indexed) + damping * torch.eye(point.size).double()
    return curvature, matrix, torch.randn(3, point.size).double()


@pytest.mark.parametrize(
    "solver", [Arnoldi(dimension=99, rank=None), LiSSA(depth=120), CG(preconditioner=EKFAC())]
)
def test_iterative_solvers_reach_the_inverse(solver: Any) -> None:
    damping = 0.5 if isinstance(solver, LiSSA) else 0.05
    curvature, matrix, right = system(damping=damping)
    if isinstance(solver, Arnoldi):  # Right-hand sides inside its Krylov space.
        right = right @ (matrix - 0.05 * torch.eye(len(matrix)).double())
    found = solver.solve(curvature, right)
    expected = torch.linalg.solve(matrix, right.T).T
    assert torch.allclose(
        found.vectors, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    rest = (right - found.vectors @ matrix).norm(dim=1) / right.norm(dim=1)
    assert torch.allclose(found.residual, rest, atol=1e-9)


def test_a_preconditioner_saves_products() -> None:
    model, train, _, _ = kronfluence()
    batch, point = [train.tensors[0].double(), train.tensors[1]], Point(model.double())
    right, counts = torch.randn(2, point.size).double(), []
    for preconditioner in (None, Direct()):
        calls: list[int] = []

        class Counted(Curvature):
            def __call__(self, vectors: Tensor) -> Tensor:
                calls.append(1)  # noqa: B023
                return super().__call__(vectors)

        counted = Counted(point, Objective(Classification()), lambda: [batch], 60, damping=1e-3)
        found = CG(preconditioner=preconditioner).solve(counted, right)
        assert set(found.stopped) == {"converged"}
        counts.append(len(calls))
    assert counts[1] <= 3 < counts[0]  # The whole inverse leaves nothing to do.


def test_lissa_says_that_it_diverged() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0])).double()
    found = LiSSA(depth=50).solve(lambda v: v @ matrix, torch.ones(1, 2).double())
    assert found.stopped == ("diverged",)
    assert bool(found.vectors.isnan().all())


def test_datainf_equals_its_formula() -> None:
    curvature, _, right = system(damping=0.3)
    found = DataInf().solve(curvature, right).vectors
    gathered_rows = curvature.gathered("true")
    (chunk,) = list(gathered_rows)
    rows = dense_all(gathered_rows.blocks, chunk.losses, 5, curvature.point.size)
    expected = torch.zeros_like(right)
    for block in gathered_rows.blocks:
        total = torch.zeros(())
        for g in block.take(rows).flatten(1):
            inverse = torch.linalg.inv(torch.outer(g, g) + 0.3 * torch.eye(len(g)).double())
            total = total + block.take(right).flatten(1) @ inverse / 5
        block.put(expected, total)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_projections_keep_inner_products_on_average() -> None:
    curvature, _, right = system(damping=1.0)
    kept = []
    for seed in range(200):
        solver = TRAK(dimension=8, seed=seed)
        gathered_rows = curvature.gathered("true")
        total = torch.zeros(())
        for place, block in enumerate(gathered_rows.blocks):
            for where, matrix in solver._parts(place, block, gathered_rows):
                part = block.take(right[:1]).flatten(1)[:, where] @ matrix
                total = total + part
        kept.append(float(total.square().sum()))
    assert np.mean(kept) == pytest.approx(float(right[0].square().sum()), rel=0.1)


@pytest.mark.parametrize("solver", [EKFAC(), KFAC(), DataInf(), LoGra(), TRAK()])
def test_what_approximates_gauss_newton_refuses_the_hessian(solver: Any) -> None:
    model, task, data = case("mlp")
    with pytest.raises(ArgumentError, match="gauss-newton"):
        influence_scores(model, Objective(task), data, data, solver=solver, curvature="hessian")


@pytest.mark.filterwarnings("ignore:The model is far")
def test_little_memory_gives_the_same() -> None:
    model, task, data = case("tied")
    kept, anew = (
        influence_scores(
            model, Objective(task), data, data, solver="ekfac", batch_size=2, memory_budget=b
        )
        for b in (2**30, 0)
    )
    assert torch.allclose(kept.values, anew.values, rtol=1e-10)


# ------------------------------------------------------------------ self-influence


@pytest.mark.parametrize("solver", ["exact", "ekfac", "cg"])
@pytest.mark.filterwarnings("ignore:The model is far")
def test_self_influence_is_the_diagonal(solver: str) -> None:
    model, task, data = case("mlp")
    own = self_influence(model, Objective(task), data, solver=solver, damping=0.1)
    whole = influence_scores(model, Objective(task), data, data, solver=solver, damping=0.1)
    assert torch.allclose(own.values[0], whole.values.diagonal(), rtol=1e-5)
    assert bool((own.values > 0).all())
    few = self_influence(
        model, Objective(task), data, solver=solver, damping=0.1, candidates=[3, 1]
    )
    assert torch.allclose(few.values[0], own.values[0, [3, 1]], rtol=1e-7)
    relative = relatif(whole, own)
    assert torch.allclose(relative.values, whole.values / own.values.sqrt())
    with pytest.raises(ArgumentError, match="self_influence"):
        relatif(whole, whole)


def test_self_influence_of_kronfluence() -> None:
    model, train, _, stored = kronfluence()
    found = self_influence(
        model, Objective(Classification()), train, solver=EKFAC(labels="true"), damping=0.1
    )
    expected = torch.tensor(stored["self_scores.ekfac.damping=0.1"]).double().flatten()
    assert torch.allclose(found.values[0] * 60, expected, rtol=2e-3)


def test_the_leverage_identity_of_ridge_regression() -> None:
    """Removing i raises its own squared error from e² to (e / (1 − h))²."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    ridge = 0.3
    gram = torch.linalg.inv(x.T @ x / 20 + ridge * torch.eye(3).double())
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_((gram @ x.T @ y / 20).T)
    objective = Objective(Regression(), regularizer=lambda m: ridge * m.weight.square().sum())
    own = self_influence(model, objective, TensorDataset(x, y), solver="exact", damping=0.0)
    error = (y - x @ model.weight.T)[:, 0].detach()
    leverage = (x @ gram * x).sum(1) / 20
    assert torch.allclose(own.values[0], 2 * error.square() * leverage, rtol=1e-9)


# ------------------------------------------------------------------ memory


@pytest.mark.filterwarnings("ignore:The model is far")
def test_what_does_not_fit_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found, *_ = gathered("tied", size=1)
    sizes = [sum(t.nbytes for p in c.curvature for t in p.tensors) for c in found]
    assert not list(tmp_path.glob("lightning_mi*"))
    small, *_ = gathered("tied", size=1)
    small.budget = 3 * max(sizes)
    passes = [list(small), list(small), list(small)]
    (folder,) = tmp_path.glob("lightning_mi*")
    assert 0 < len(list(folder.iterdir())) < 5  # Some in memory, some on disk.
    for chunks in zip(found, *passes, strict=True):
        for pieces in zip(*(c.curvature for c in chunks), strict=True):
            for tensors in zip(*(p.tensors for p in pieces), strict=True):
                assert all(torch.equal(tensors[0], t) for t in tensors)
    assert small._kept is not None
    assert small._kept.size <= small.budget
    del small, passes, chunks, pieces
    assert not list(tmp_path.glob("lightning_mi*"))


def test_the_model_is_run_once_whatever_fits() -> None:
    model, task, data = case("mlp")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for budget in (2**30, 0):
        calls.clear()
        with pytest.warns(UserWarning, match="far"):
            influence_scores(
                model, Objective(task), data, data, solver="ekfac", memory_budget=budget
            )
        found.append(len(calls))
    assert found[0] == found[1]


# ------------------------------------------------------------------ drawn examples, kept bases


def many() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, TensorDataset(torch.randn(400, 3).double(), torch.randint(0, 3, (400,)))


@pytest.mark.filterwarnings("ignore:The model is far")
def test_factors_of_a_draw_tend_to_those_of_all() -> None:
    model, data = many()
    queries = TensorDataset(*(t[:6] for t in data.tensors))
    whole, part, half, same = (
        influence_scores(
            model, Objective(Classification()), data, queries, solver=EKFAC(rows=r), batch_size=b
        )
        for r, b in ((None, 7), (200, 7), (200, 40), (2**15, 40))
    )
    assert torch.allclose(part.values, half.values, rtol=1e-9)
    assert torch.allclose(whole.values, same.values, rtol=1e-9)
    assert whole.details["factor_examples"] == 400
    assert part.details["factor_examples"] == 200
    near = torch.corrcoef(torch.stack([whole.values.flatten(), part.values.flatten()]))[0, 1]
    assert 0.97 < near < 0.9999999
    assert part.gradient_norm == pytest.approx(whole.gradient_norm)  # Over all examples.


@pytest.mark.filterwarnings("ignore:The model is far")
def test_kept_bases_measure_eigenvalues_anew() -> None:
    model, data = many()
    goal, queries = Objective(Classification()), TensorDataset(*(t[:6] for t in data.tensors))
    kept = KeptBases()
    fresh = influence_scores(model, goal, data, queries, solver="ekfac")
    first = influence_scores(model, goal, data, queries, solver=EKFAC(bases=kept))
    assert torch.allclose(fresh.values, first.values, rtol=1e-9)
    again = influence_scores(model, goal, data, queries, solver=EKFAC(bases=kept))
    assert torch.allclose(fresh.values, again.values, rtol=1e-9)
    assert again.details["bases"] == "kept"
    assert again.details["basis_drift"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    moved = influence_scores(model, goal, data, queries, solver=EKFAC(bases=kept))
    right = influence_scores(model, goal, data, queries, solver="ekfac")
    assert moved.details["bases"] == "kept"
    assert not torch.allclose(moved.values, right.values, rtol=1e-9)
    assert (
        torch.corrcoef(torch.stack([moved.values.flatten(), right.values.flatten()]))[0, 1] > 0.99
    )
    with torch.no_grad():
        model[0].weight.normal_()
        model[2].weight.normal_()
    anew = influence_scores(model, goal, data, queries, solver=EKFAC(bases=KeptBases(most=-1)))
    assert anew.details["bases"] == "new"
    turned = influence_scores(model, goal, data, queries, solver=EKFAC(bases=kept))
    assert turned.details["basis_drift"] > again.details["basis_drift"]
    other, task, words = case("tied")
    with pytest.raises(ArgumentError, match="same parameters"):
        influence_scores(other, Objective(task), words, words, solver=EKFAC(bases=kept))
    with pytest.raises(ArgumentError, match="EKFAC"):
        influence_scores(model, goal, data, queries, solver=KFAC(bases=kept))


@pytest.mark.parametrize("kind", ["tied", "images"])
@pytest.mark.filterwarnings("ignore:The model is far")
def test_kept_bases_of_every_kind_of_block(kind: str) -> None:
    model, task, data = case(kind)
    kept = KeptBases()
    first, again = (
        influence_scores(model, Objective(task), data, data, solver=EKFAC(bases=kept))
        for _ in range(2)
    )
    assert torch.allclose(first.values, again.values, rtol=1e-9)


# ------------------------------------------------------------------ processes

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from lightning_mi import Classification
from lightning_mi.influence import EKFAC, Objective, influence_scores
from test_curvature import many

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    model, data = many()
    queries = torch.utils.data.TensorDataset(*(t[:6] for t in data.tensors))
    values = [
        influence_scores(
            model, Objective(Classification()), data, queries,
            solver=EKFAC(all_reduce=True, rows=rows), candidates=range(rank, 400, 2),
        ).values
        for rows in (None, 200)
    ]
    torch.save(values, store + str(rank) + ".pt")
    dist.destroy_process_group()
"""


@pytest.mark.filterwarnings("ignore:The model is far")
def test_two_processes_share_the_factors(tmp_path: Path) -> None:
    script, store = tmp_path / "shared.py", tmp_path / "store"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", str(script)]
    running = [
        subprocess.Popen([*command, str(rank), str(store)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    model, data = many()
    queries = TensorDataset(*(t[:6] for t in data.tensors))
    parts = [torch.load(f"{store}{rank}.pt") for rank in (0, 1)]
    for place, rows in enumerate((None, 200)):
        alone = influence_scores(
            model, Objective(Classification()), data, queries, solver=EKFAC(rows=rows)
        )
        for rank in (0, 1):
            assert torch.allclose(alone.values[:, rank::2], parts[rank][place], rtol=1e-9)


def test_factors_are_shared_between_processes_alone() -> None:
    model, data = many()
    with pytest.raises(ArgumentError, match="all_reduce"):
        influence_scores(
            model, Objective(Classification()), data, data, solver=EKFAC(all_reduce=True)
        )


# ------------------------------------------------------------------ losses in the outputs


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_slopes_of_cross_entropies_are_those_of_autograd(classes: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    outputs = (4 * torch.randn(6, 3, classes, dtype=torch.float64)).to(kind)
    labels = torch.randint(classes, (6, 3))
    labels[0, 1:], labels[4] = -100, -100  # An example with one label, and one with none.
    texts = (torch.zeros(6, 3, dtype=torch.long), labels)
    cases = [(NextToken(), outputs, texts), (Classification(), outputs[:, 0], (None, labels[:, 0]))]
    for task, values, batch in cases:
        expected = slope(values, lambda o, t=task, b=batch: t.loss(o, b))
        found = slope_of_loss(task, values, batch)
        assert found.dtype == kind
        assert bool((found[4] == 0).all())
        rounding = 4 * torch.finfo(kind).eps
        assert torch.allclose(found, expected, rtol=rounding, atol=rounding)


def test_columns_of_a_classifier_make_its_curvature() -> None:
    outputs = 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    outputs[0, 2] += 20  # In single precision 1 − p is 0 here.
    batch = (None, torch.zeros(4, dtype=torch.long))
    goal = Objective(Classification())
    _, columns = curvature_columns(goal, outputs, batch, "exact", range(4), 0)
    root = torch.stack(columns, 2).double()
    p = outputs.double().softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert torch.allclose(root @ root.transpose(1, 2), expected, rtol=1e-5, atol=1e-7)
    found = float(root[0, 2, 2].abs())
    assert found == pytest.approx(float(beside(outputs[0], 2)), rel=1e-5, abs=0)


def beside(outputs: Tensor, sure: int) -> Tensor:
    """Return 1 − p of a class without losing it to rounding."""
    others = torch.cat([outputs[:sure], outputs[sure + 1 :]]).double()
    return (others.logsumexp(0) - outputs.double().logsumexp(0)).exp()
