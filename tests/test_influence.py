"""Influence: closed forms, dense autograd twins, numbers of torch-influence, real retraining."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mi import (
    ArgumentError,
    Classification,
    Context,
    IndexedData,
    Logit,
    LogProbability,
    Loss,
    Margin,
    Measurement,
    ModelError,
    NextToken,
    Record,
    Regression,
    measure,
)
from lightning_mi.influence import (
    CG,
    Direct,
    Group,
    InfluenceFunction,
    Objective,
    TracIn,
    influence_scores,
    tracin,
    tracin_sum,
)
from lightning_mi.influence.per_example import GradientDots
from lightning_mi.influence.point import Point
from lightning_mi.influence.products import Curvature

REFERENCE = Path(__file__).parent / "reference"
WEIGHT_DECAY = 0.01


# ------------------------------------------------------------------ cases


class Language(nn.Module):
    """A two-layer transformer with everything that makes per-example gradients hard.

    Tied embedding, positions shared by the batch, a reused block, fused attention, a bare gain.
    """

    def __init__(self, vocabulary: int = 11, width: int = 4, context: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.block = Block(width)
        self.gain = nn.Parameter(torch.ones(width) + 0.1 * torch.randn(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for _ in range(2):
            x = self.block(x)
        return self.head(x * self.gain)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t[:, None] for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def language() -> tuple[nn.Module, TensorDataset]:
    model = Language().double()
    return model, TensorDataset(torch.randint(0, 11, (6, 7)))


def multilayer() -> tuple[nn.Module, TensorDataset]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, TensorDataset(torch.randn(10, 4).double(), torch.randint(0, 3, (10,)))


def reference(name: str) -> tuple[nn.Module, TensorDataset, TensorDataset, Any]:
    stored = np.load(REFERENCE / f"torch_influence_{name}.npz")
    if name == "logreg":
        model: nn.Module = nn.Linear(5, 3)
    else:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    state = {k[6:]: torch.tensor(stored[k]) for k in stored if k.startswith("param.")}
    model.double().load_state_dict(state)
    sets = [("x", "y"), ("x_test", "y_test")]
    train, test = (TensorDataset(*(torch.tensor(stored[k]) for k in keys)) for keys in sets)
    return model, train, test, stored


def decay(model: nn.Module) -> Tensor:
    return WEIGHT_DECAY / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def task_of(model: nn.Module) -> Any:
    return NextToken() if isinstance(model, Language) else Classification()


# ------------------------------------------------------------------ slow twins


def naive_gradients(model: nn.Module, task: Any, data: Any, count: int | None = None) -> Tensor:
    """Every per-example gradient, one example and one backward pass at a time."""
    indexed, rows = IndexedData(data), []
    for i in range(len(indexed) if count is None else count):
        batch = indexed.batch([i])
        loss = task.loss(task.outputs(model, batch), batch).sum()
        own = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, own, allow_unused=True)
        pairs = zip(found, own, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])
        )
    return torch.stack(rows)


def as_function(model: nn.Module) -> tuple[Tensor, Any]:
    """θ as one vector, and the model as a function of it."""
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    theta = torch.cat([p.reshape(-1) for p in named.values()])

    def call(vector: Tensor, function: Any) -> Tensor:
        parts = torch.split(vector, [p.numel() for p in named.values()])
        tensors = {n: v.view_as(p) for (n, p), v in zip(named.items(), parts, strict=True)}

        class Caller(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self) -> Tensor:
                return function(self.inner)

        return functional_call(Caller(), {f"inner.{n}": t for n, t in tensors.items()}, ())

    return theta, call


def dense_curvature(model: nn.Module, task: Any, batch: Any, kind: str, ridge: bool) -> Tensor:
    """The whole matrix from autograd's own Hessian and Jacobian."""
    theta, call = as_function(model)
    ours = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with ours:
        if kind == "hessian":

            def mean(vector: Tensor) -> Tensor:
                return call(vector, lambda m: task.loss(task.outputs(m, batch), batch).mean())

            matrix = torch.autograd.functional.hessian(mean, theta)
        else:

            def out(vector: Tensor) -> Tensor:
                return call(vector, lambda m: task.outputs(m, batch)).reshape(-1)

            jacobian = torch.autograd.functional.jacobian(out, theta)
            shape = task.outputs(model, batch).shape

            def loss(flat: Tensor) -> Tensor:
                return task.loss(flat.view(shape), batch).mean()

            bend = torch.autograd.functional.hessian(loss, out(theta).detach())
            matrix = jacobian.T @ bend @ jacobian
    if ridge:
        matrix = matrix + WEIGHT_DECAY * torch.eye(len(theta)).double()
    return matrix


# ------------------------------------------------------------------ torch-influence's numbers


@pytest.mark.parametrize("name", ["logreg", "mlp"])
@pytest.mark.parametrize(
    ("solver", "curvature", "column"),
    [
        (CG(rtol=1e-12), "hessian", "cg"),
        (CG(rtol=1e-12), "gauss-newton", "cg_gnh"),
        ("direct", "hessian", "autograd"),
        ("exact", "gauss-newton", "cg_gnh"),
    ],
)
def test_the_number_of_torch_influence(name: str, solver: Any, curvature: Any, column: str) -> None:
    model, train, test, stored = reference(name)
    result = influence_scores(
        model,
        Objective(Classification(), regularizer=decay),
        train,
        test,
        solver=solver,
        curvature=curvature,
        damping=float(stored["damp"]),
        batch_size=40,
    )
    expected = torch.tensor(stored[f"influence.{column}"])
    assert (result.values - expected).abs().max() < 1e-10 * expected.abs().max()
    assert result.values.shape == (12, 60)
    assert result.gradient_norm is not None
    assert result.gradient_norm < 1e-7
    assert result.residual is not None
    assert result.residual.max() < 1e-10
    assert result.n == 60


def test_scores_predict_real_leave_one_out_retraining() -> None:
    model, train, test, stored = reference("logreg")
    objective = Objective(Classification(), regularizer=decay)
    values = influence_scores(model, objective, train, test, damping=0.0).values
    truth = torch.tensor(stored["loo_test_loss_change"])
    both = torch.stack([values.reshape(-1), truth.reshape(-1)])
    assert torch.corrcoef(both)[0, 1] > 0.975


class TorchInfluenceObjective:
    """Shaped like torch_influence.BaseObjective: flat parameters, mean losses, keywords."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return WEIGHT_DECAY / 2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_an_objective_of_torch_influence_works_as_it_is(curvature: Any) -> None:
    model, train, test, stored = reference("mlp")
    result = influence_scores(
        model,
        TorchInfluenceObjective(),  # type: ignore[arg-type]
        train,
        TensorDataset(*test[:3]),
        solver=CG(rtol=1e-7),
        curvature=curvature,
        damping=float(stored["damp"]),
    )
    expected = torch.tensor(
        stored["influence.cg" if curvature == "hessian" else "influence.cg_gnh"]
    )[:3]
    assert (result.values - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_solver_object_of_torch_influence_is_asked() -> None:
    model, train, test, stored = reference("logreg")
    table = torch.tensor(stored["influence.cg"])

    class Module:
        def influences(self, train_idxs: Any, test_idxs: Any) -> Tensor:
            return table[test_idxs][:, train_idxs].mean(0)

    result = influence_scores(model, Objective(Classification()), train, test, solver=Module())
    assert torch.equal(result.values, table)
    assert result.residual is None
    for query in (Margin(), Logit(2), 2, Group()):
        with pytest.raises(ArgumentError, match="knows no more"):
            influence_scores(
                model, Objective(Classification()), train, test, solver=Module(), query=query
            )


# ------------------------------------------------------------------ closed form


def test_ridge_regression_closed_form() -> None:
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    model = nn.Linear(3, 1, bias=False).double()
    hessian = 2 * x.T @ x / 20 + 2 * 0.1 * torch.eye(3).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(hessian, 2 * x.T @ y / 20).T)
    objective = Objective(Regression(), regularizer=lambda m: 0.1 * m.weight.square().sum())
    data = TensorDataset(x, y)
    result = influence_scores(model, objective, data, data, solver=CG(rtol=1e-13), damping=0.0)
    theta = model.weight.detach()
    gradients = 2 * (x @ theta.T - y) * x
    right = torch.linalg.solve(hessian, gradients.T)
    expected = ((gradients + 0.2 * theta) @ right).T / 20
    assert torch.allclose(result.values, expected, rtol=1e-10, atol=1e-14)


def test_the_sign_is_that_of_real_removal() -> None:
    """An example that pulls towards the query must be a proponent."""
    x = torch.ones(4, 1).double()
    y = torch.tensor([[1.0], [1.0], [1.0], [-3.0]]).double()
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data, asked = TensorDataset(x, y), TensorDataset(x[:1], y[:1])
    values = influence_scores(model, Objective(Regression()), data, asked, damping=0.0).values[0]
    assert values[0] > 0 > values[3]
    assert tracin(model, Objective(Regression()), data, asked).values[0, 0] > 0


# ------------------------------------------------------------------ curvature


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize(
    ("case", "ridge"), [(multilayer, False), (multilayer, True), (language, True)]
)
def test_products_equal_the_dense_matrix(kind: Any, case: Any, ridge: bool) -> None:
    model, data = case()
    task, indexed = task_of(model), IndexedData(data)
    point = Point(model)
    objective = Objective(task, regularizer=decay if ridge else None)
    vectors = torch.randn(2, point.size).double()
    matrix = dense_curvature(model, task, indexed.batch(range(len(data))), kind, ridge)
    expected = vectors @ (matrix + 0.3 * torch.eye(point.size).double())
    for size in (1, 4, len(data)):
        cuts = [list(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]
        product = Curvature(
            point,
            objective,
            lambda cuts=cuts: (indexed.batch(c) for c in cuts),
            len(data),
            kind=kind,
            damping=0.3,
        )
        assert torch.allclose(product(vectors), expected, rtol=1e-9, atol=1e-11)


def test_fused_attention_is_allowed_again_afterwards() -> None:
    before = [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]
    model, data = language()
    influence_scores_quietly(model, NextToken(), data)
    after = [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]
    assert before == after


def influence_scores_quietly(model: nn.Module, task: Any, data: Any, **options: Any) -> Any:
    """Three iterations, whatever they lead to, and no warnings."""
    options = {"solver": CG(max_iterations=3), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model is far|The solver stopped", UserWarning)
        return influence_scores(model, Objective(task), data, data, **options)


def test_double_precision_is_computed_on_a_copy() -> None:
    model, data = multilayer()
    low = copy.deepcopy(model).float()
    exact = copy.deepcopy(low).double()
    high = influence_scores_quietly(low, Classification(), data, dtype=torch.float64)
    expected = influence_scores_quietly(exact, Classification(), data)
    assert torch.allclose(high.values, expected.values, rtol=1e-10)
    assert next(low.parameters()).dtype == torch.float32


# ------------------------------------------------------------------ solvers


def test_cg_stops_where_curvature_is_not_positive() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]).double())
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double()
    solution = CG().solve(lambda v: v @ matrix, right)
    assert solution.stopped == ("converged", "non-positive curvature", "converged")
    assert solution.vectors[0].tolist() == [1.0, 0.0]
    assert solution.vectors[1].isnan().all()
    assert solution.vectors[2].tolist() == [0.0, 0.0]
    assert solution.residual[2] == 0


def test_cg_says_that_it_ran_out_of_iterations() -> None:
    matrix = torch.diag(torch.arange(1.0, 9.0).double())
    right = torch.ones(1, 8).double()
    solution = CG(rtol=1e-12, max_iterations=2).solve(lambda v: v @ matrix, right)
    assert solution.stopped == ("iteration limit",)
    true = (right - solution.vectors @ matrix).norm() / right.norm()
    assert torch.allclose(solution.residual[0], true)


def test_cg_goes_on_after_convergence_without_nan() -> None:
    """More iterations than there are dimensions must not divide 0 by 0."""
    right = torch.randn(3, 2).double()
    solution = CG(rtol=0.0, max_iterations=50).solve(lambda v: 2 * v, right)
    assert torch.allclose(solution.vectors, right / 2)


def test_direct_says_that_the_matrix_is_not_positive() -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0, 0.0]).double())
    solution = Direct().solve(lambda v: v @ matrix, torch.tensor([[2.0, 3.0, 0.0]]).double())
    assert solution.vectors.tolist() == [[1.0, -3.0, 0.0]]
    assert solution.stopped == ("non-positive curvature",)


def test_direct_refuses_a_large_model() -> None:
    with pytest.raises(ArgumentError, match=r'solver: .*at most 2 .*got 3.*solver="cg"'):
        Direct(max_parameters=2).solve(lambda v: v, torch.zeros(1, 3))


# ------------------------------------------------------------------ doubts are voiced


def test_a_model_far_from_a_minimum_is_said() -> None:
    model, data = multilayer()
    with pytest.warns(UserWarning, match="far from a minimum"):
        influence_scores(model, Objective(Classification()), data, data)


def test_an_early_stop_is_said() -> None:
    model, train, test, _ = reference("mlp")
    with pytest.warns(UserWarning, match=r"stopped early \(iteration limit\) for 12 of 12"):
        influence_scores(
            model,
            Objective(Classification(), regularizer=decay),
            train,
            test,
            solver=CG(max_iterations=1),
        )


# ------------------------------------------------------------------ invariance


@pytest.mark.parametrize("case", [multilayer, language])
def test_scores_do_not_depend_on_the_batch_size(case: Any) -> None:
    model, data = case()
    task = task_of(model)
    runs = [influence_scores_quietly(model, task, data, batch_size=size) for size in (1, 7, 40)]
    for run in runs[1:]:
        assert torch.allclose(run.values, runs[0].values, rtol=1e-8, atol=1e-12)
    traces = [tracin(model, Objective(task), data, data, batch_size=s).values for s in (1, 7, 40)]
    for trace in traces[1:]:
        assert torch.allclose(trace, traces[0], rtol=1e-10, atol=1e-12)


def test_a_shuffled_loader_changes_nothing() -> None:
    model, data = multilayer()
    loader = DataLoader(data, batch_size=3, shuffle=True, drop_last=True)
    plain = tracin(model, Objective(Classification()), data, data)
    shuffled = tracin(model, Objective(Classification()), loader, data)
    assert torch.equal(plain.values, shuffled.values)
    assert shuffled.indices == tuple(range(10))


def test_loaders_of_other_kinds_are_read_by_index() -> None:
    model, data = multilayer()
    batches = torch.utils.data.BatchSampler(range(3), 2, drop_last=True)
    expected = tracin(model, Objective(Classification()), data, data).values
    for options in ({"batch_sampler": batches}, {"batch_size": None}):
        loader: Any = DataLoader(data, **options)  # type: ignore[arg-type]
        found = tracin(model, Objective(Classification()), loader, data).values
        assert torch.equal(found, expected)


def test_one_example_is_enough() -> None:
    model, data = multilayer()
    single = TensorDataset(*data[:1])
    result = influence_scores_quietly(model, Classification(), single, batch_size=7)
    assert result.values.shape == (1, 1)
    assert result.values.item() > 0


def test_the_same_twice() -> None:
    model, data = language()
    first, second = (tracin(model, Objective(NextToken()), data, data) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert first.tokens is not None
    assert second.tokens is not None
    assert torch.equal(first.tokens[0].values, second.tokens[0].values)


# ------------------------------------------------------------------ per-example gradients


class Encoder(nn.Module):
    """A class token, a slice of a position table, and torch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(20, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.head(self.layers(x + self.place[: x.shape[1]])[:, 0])


class SequenceFirst(nn.Module):
    """Positions before examples, in as many dimensions as ``merged`` leaves."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.a, self.norm = nn.Linear(4, 5), nn.LayerNorm(5)
        self.gain, self.out = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        h = turned.reshape(-1, 4) if self.merged else turned
        h = self.norm(self.a(h).tanh()) * self.gain @ self.out
        return h.view(*turned.shape[:2], 3).mean(0)


class Experts(nn.Module):
    """Rows are gathered by their content: no fixed place belongs to an example."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 4)
        total, choice = torch.zeros_like(rows), (rows[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            mine = (choice == i).nonzero()[:, 0]
            total = total.index_add(0, mine, expert(rows[mine]))
        return self.out(total.view(x.shape).mean(1))


class Secret(torch.autograd.Function):
    """Uses its weight where no torch function shows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Secretive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(Secret.apply(x, self.w)) + x @ self.w


class Lookup(nn.Module):
    """A padding token without gradient, and a normalised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Sums(nn.Module):
    """Arithmetic on parameters in the forms that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.c, self.d = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * (1.0 + self.a) - self.b
        x += self.c
        x = (2.0 - self.c) + x
        return torch.einsum("bk,ok->bo", x, self.d) + self.a[:3] / x.exp().sum(1, keepdim=True)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 3, groups=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model


def silent() -> nn.Module:
    """Gradients below the last layer are exactly zero, as at the start of some trainings."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.zeros_(model[2].weight)
    return model


SEQUENCES = (6, 6, 4)  # as many positions as examples, so that shapes alone tell nothing
KINDS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4), ""),
    "multilayer": (lambda: multilayer()[0], (6, 4), ""),
    "convolutional": (convolutional, (6, 1, 9, 9), ""),
    "encoder": (Encoder, (6, 5, 8), "layers.layers.0.self_attn"),
    "sequence first": (lambda: SequenceFirst(merged=False), SEQUENCES, ""),
    "merged sequence first": (lambda: SequenceFirst(merged=True), SEQUENCES, "a norm gain out"),
    "experts": (Experts, SEQUENCES, "experts out"),
    "custom function": (Secretive, (6, 4), "w"),
    "lookup": (Lookup, (6, 5), "out.parametrizations"),
    "recurrent": (Recurrent, (6, 5, 4), "cell"),
    "sums": (Sums, (6, 4), ""),
    "partly frozen": (partly_frozen, (6, 4), ""),
    "silent": (silent, (6, 4), ""),
}
"""Model, shape of its inputs, and the parameters that have to go the long way round."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 4])
def test_gradient_dots_equal_a_loop_for_every_kind_of_module(kind: str, directions: int) -> None:
    build, shape, apart = KINDS[kind]
    model = build().double().eval()
    ids = kind == "lookup"
    x = torch.randint(0, 7, shape) if ids else torch.randn(shape).double()
    data = TensorDataset(x, torch.randint(0, 3, (6,)))
    check_dots(model, Classification(), data, directions, apart.split())


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("positions", [5, 6])
def test_gradient_dots_of_a_tied_and_reused_transformer(directions: int, positions: int) -> None:
    data = TensorDataset(torch.randint(0, 11, (6, positions)))
    check_dots(Language().double().eval(), NextToken(), data, directions, [])


@pytest.mark.parametrize("directions", [1, 4])
def test_gradient_dots_of_hugging_face_gpt2(directions: int) -> None:
    data = TensorDataset(torch.randint(0, 11, (6, 7)))
    check_dots(tiny_gpt2(), NextToken(), data, directions, [])


def check_dots(model: nn.Module, task: Any, data: Any, directions: int, apart: list[str]) -> None:
    point = Point(model)
    vectors = torch.randn(directions, point.size).double()
    dots = GradientDots(point, lambda m, batch: task.loss(task.outputs(m, batch), batch), vectors)
    found = dots(IndexedData(data).batch(range(6)))
    expected = naive_gradients(model, task, data) @ vectors.T
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert dots.plan is not None
    for name in point.parameters:
        assert (name in dots.plan.lost) == any(name.startswith(a) for a in apart), name


def test_batches_of_other_lengths_are_read_with_a_new_plan() -> None:
    model = Language().double().eval()
    point, task = Point(model), NextToken()
    dots = GradientDots(
        point,
        lambda m, batch: task.loss(task.outputs(m, batch), batch),
        torch.randn(2, point.size).double(),
    )
    for positions in (5, 8, 3):
        data = TensorDataset(torch.randint(0, 11, (4, positions)))
        found = dots(IndexedData(data).batch(range(4)))
        expected = naive_gradients(model, task, data) @ dots.directions.T
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_large_layers_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mi.influence.per_example.LARGEST", 100)
    test_gradient_dots_of_a_tied_and_reused_transformer(4, 5)


class Placed(nn.Module):
    """Positions that a batch shares look like the example's own where it is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 4), nn.Embedding(6, 4)
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.mix(self.places(torch.arange(ids.shape[1])))
        return self.out(torch.tanh(self.words(ids) + places))


@pytest.mark.filterwarnings("ignore:The model is far")
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_an_example_alone_in_its_batch_is_read_as_among_others(name: str) -> None:
    torch.manual_seed(0)
    model, ids = Placed().double(), torch.randint(0, 11, (5, 6))
    train, asked = TensorDataset(ids), TensorDataset(ids[:3])
    by_size = [
        influence_scores(
            model, Objective(NextToken()), train, asked,
            solver=name, damping=0.1, batch_size=size, shown=0,
        ).values
        for size in (1, 4, 5)
    ]  # fmt: skip
    for found in by_size[1:]:
        assert torch.allclose(found, by_size[0], rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------ TracIn

RATES: dict[str, Any] = {
    "one": lambda name, p: 0.3,
    "for each parameter": lambda name, p: 0.1 + 0.01 * len(name),
    "for each number": lambda name, p: torch.rand_like(p),
}


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("kind", [*KINDS, "tied transformer"])
def test_tracin_equals_a_loop_for_every_kind_of_module(kind: str, rates: str) -> None:
    """However batches fall: the last one may be a single example."""
    build, shape, _ = KINDS.get(kind, (Language, (6, 5), ""))
    model = build().double().eval()
    ids = kind in ("lookup", "tied transformer")
    x = torch.randint(0, 7, shape) if ids else torch.randn(shape).double()
    task, labels = task_of(model), torch.randint(0, 3, (6,))
    data = TensorDataset(x) if kind == "tied transformer" else TensorDataset(x, labels)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = {n: RATES[rates](n, p.detach()) for n, p in own.items()}
    each = [torch.as_tensor(given[n], dtype=torch.float64).expand(p.shape) for n, p in own.items()]
    scale = torch.cat([e.flatten() for e in each])
    gradients = naive_gradients(model, task, data)
    expected = (gradients[:5] * scale) @ gradients.T
    asked = TensorDataset(*data[:5])
    for size in (5, 4, None):
        found = tracin(
            model, Objective(task), data, asked, learning_rates=given, batch_size=size, shown=0
        )
        assert torch.allclose(found.values, expected, rtol=1e-9, atol=1e-12)


def test_layers_with_one_row_need_no_gradient_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of rows, in one part or in several; with a rate of each number they will not do."""
    model, data = multilayer()
    goal = Objective(Classification())
    whole = tracin(model, goal, data, data).values
    given = {n: torch.full_like(p.detach(), 1.0) for n, p in model.named_parameters()}
    given["0.weight"][0, 0] = 1.5

    def refused(*_: Any) -> None:
        raise AssertionError("gradients in full")

    monkeypatch.setattr("lightning_mi.influence.paired.add_dots", refused)
    monkeypatch.setattr("lightning_mi.influence.paired.PRODUCTS", 30)
    assert torch.allclose(tracin(model, goal, data, data).values, whole, rtol=1e-12)
    with pytest.raises(AssertionError, match="in full"):
        tracin(model, goal, data, data, learning_rates=given)


@pytest.mark.parametrize("case", [multilayer, language])
def test_tracin_equals_the_naive_loop(case: Any) -> None:
    model, data = case()
    task = task_of(model)
    rates = {n: 0.1 * (i + 1) for i, (n, _) in enumerate(model.named_parameters())}
    each = torch.cat([torch.full((p.numel(),), rates[n]) for n, p in model.named_parameters()])
    gradients = naive_gradients(model, task, data)
    result = tracin(model, Objective(task), data, data, learning_rates=rates)
    expected = gradients * each.double() @ gradients.T
    assert torch.allclose(result.values, expected, rtol=1e-7, atol=1e-12)
    assert result.details["learning_rate"] == pytest.approx(
        [min(rates.values()), max(rates.values())]
    )
    assert result.details["learning_rate_assumed_1"] == 0


def test_a_query_of_which_more_is_better_is_turned() -> None:
    model, data = multilayer()
    gradients = naive_gradients(model, Classification(), data)
    rows = []
    for i in range(10):
        logits = model(data[i : i + 1][0])
        found = torch.autograd.grad(-logits[0, 2], list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    result = tracin(model, Objective(Classification()), data, data, query=Logit(2))
    assert torch.allclose(result.values, torch.stack(rows) @ gradients.T, rtol=1e-10)


def test_tracin_sum_adds_over_steps_and_keeps_common_candidates() -> None:
    model, data = multilayer()
    records: list[Record] = []
    expected = 0.0
    for step, candidates in enumerate([[1, 4, 6], [4, 1, 6], [4, 6]]):
        with torch.no_grad():
            model[0].weight.add_(0.1)
        context = Context(model, data[:2], Classification(), step=step, dataset=IndexedData(data))
        records += measure(model, TracIn(candidates=candidates, queries=2), context=context)
        found = tracin(model, Objective(Classification()), data, data, candidates=[4, 6])
        expected = expected + found.values[:2]
    sums = tracin_sum(records)
    assert [r.name for r in sums] == ["influence/sum"] * 3
    assert [r.step for r in sums] == [0, 1, 2]
    last = sums[-1].panel
    assert last.coords["train_example"] == [4, 6]
    assert last.convention["sum_over_steps"] == 3
    assert torch.allclose(last.values, expected)


# ------------------------------------------------------------------ shares of tokens


def test_shares_add_up_to_the_score_and_belong_to_the_predicted_token() -> None:
    model, data = language()
    for result in (
        tracin(model, Objective(NextToken()), data, data, shown=3),
        influence_scores_quietly(model, NextToken(), data, shown=3),
    ):
        assert result.tokens is not None
        for q, shares in enumerate(result.tokens):
            high, low = result.top(q, 3)
            assert list(shares.indices) == [*high, *low]
            assert torch.equal(shares.ids, data[list(shares.indices)][0])
            scores = result.values[q, list(shares.indices)]
            assert torch.allclose(shares.values.sum(1), scores, rtol=1e-9, atol=1e-14)
            assert (shares.values[:, 0] == 0).all()


def test_shares_include_the_regularizer() -> None:
    model, data = language()
    objective = Objective(NextToken(), regularizer=decay)
    with pytest.warns(UserWarning, match="far from"):
        result = influence_scores(model, objective, data, data, shown=2, solver=CG(rtol=0.1))
    assert result.tokens is not None
    scores = result.values[0, list(result.tokens[0].indices)]
    assert torch.allclose(result.tokens[0].values.sum(1), scores, rtol=1e-9, atol=1e-14)


def test_a_share_is_the_derivative_of_its_tokens_loss() -> None:
    """Split by hand: one token's loss at a time."""
    model, data = language()
    (ids,) = data[:1]
    result = tracin(model, Objective(NextToken()), TensorDataset(ids), data, shown=1)
    gradient = naive_gradients(model, NextToken(), data, 1)[0]
    losses = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
    own = list(model.parameters())
    by_hand = []
    for t in range(6):
        found = torch.autograd.grad(losses[t], own, retain_graph=True, allow_unused=True)
        by_hand.append(torch.cat([g.reshape(-1) for g in found]) @ gradient / 6)
    assert result.tokens is not None
    assert torch.allclose(result.tokens[0].values[0, 1:], torch.stack(by_hand), rtol=1e-9)


def test_windows_of_one_token_more_show_the_last_one_too() -> None:
    model, data = language()
    task = NextToken(drop_last_input=True)
    result = tracin(model, Objective(task), data, data, shown=2)
    assert result.tokens is not None
    shares = result.tokens[0]
    assert torch.equal(shares.ids, data[list(shares.indices)][0])
    assert (shares.values[:, -1] != 0).all()


# ------------------------------------------------------------------ the model is left alone


def test_the_model_is_left_exactly_as_it_was() -> None:
    model, data = language()
    model.train()
    model.block.out.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    list(model.parameters())[1].grad = torch.ones_like(list(model.parameters())[1])
    names = [
        (n, id(p), p.requires_grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    weights = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    influence_scores_quietly(model, NextToken(), data, dtype=torch.float64)
    influence_scores_quietly(model, NextToken(), data, curvature="hessian", solver="direct")
    tracin(model, Objective(NextToken()), data, data)
    for (name, same, needs, grad), (other, p) in zip(
        names, model.named_parameters(remove_duplicate=False), strict=True
    ):
        assert (name, same, needs) == (other, id(p), p.requires_grad)
        assert (grad is None) == (p.grad is None)
        assert grad is None or torch.equal(grad, p.grad)
    assert model.head.weight is model.embed.weight
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(data[:2][0]).sum().backward()
    optimizer.step()
    assert not torch.equal(weights["head.weight"], model.head.weight)


# ------------------------------------------------------------------ measurements


def context_of(model: nn.Module, data: Any, **options: Any) -> Context:
    return Context(model, data[:2], task_of(model), dataset=IndexedData(data), **options)


def test_the_reading_of_tracin() -> None:
    model, data = language()
    rates = {n: 0.5 for n, _ in model.named_parameters()}
    words = [f"<{i}>" for i in range(11)]
    context = context_of(
        model, data, learning_rates=rates, decode=lambda ids: [words[i] for i in ids]
    )
    records = {r.what: r.panel for r in measure(model, TracIn(queries=2, top=3), context=context)}
    assert set(records) == {"scores", "proponents", "opponents", "tokens"}
    scores = records["scores"]
    assert scores.axes == ("query", "train_example")
    assert scores.size == {"query": 2, "train_example": 6}
    assert scores.convention["learning_rate"] == [0.5, 0.5]
    assert "positive = proponent" in scores.convention["orientation"]
    assert scores.convention["n"] == 6
    order = scores.values[0].argsort(descending=True).tolist()
    assert records["proponents"].coords["train_example"] == order[:3]
    assert records["opponents"].coords["train_example"] == order[::-1][:3]
    tokens = records["tokens"]
    assert tokens.coords["train_example"] == order[:3] + order[::-1][:3]
    assert tokens.convention["picture"] == "examples"
    texts = tokens.coords["train_example,position"]
    assert texts[0] == [words[i] for i in data[order[0]][0]]
    assert records["proponents"].convention["texts"][0] == "".join(texts[0])
    assert records["proponents"].convention["query_text"] == "".join(words[i] for i in data[0][0])
    rows = tokens.values.sum(1)
    assert torch.allclose(rows, scores.values[0, tokens.coords["train_example"]], atol=1e-12)


def test_the_reading_without_tokens_has_descriptions() -> None:
    class Described(TensorDataset):
        def describe(self, index: int) -> str:
            return f"row {index}"

    model, data = multilayer()
    described = Described(*data.tensors)
    records = {
        r.what: r.panel
        for r in measure(model, TracIn(candidates=6, seed=3), context=context_of(model, described))
    }
    assert set(records) == {"scores", "proponents", "opponents"}
    columns = records["scores"].coords["train_example"]
    assert columns == sorted(columns)
    assert len(columns) == 6
    top = records["proponents"]
    assert top.size == {"train_example": 3}  # never one example on both sides
    assert top.convention["descriptions"] == [f"row {i}" for i in top.coords["train_example"]]


def test_candidates_are_drawn_alike_at_every_step() -> None:
    model, data = multilayer()
    draws = []
    for step in range(2):
        torch.manual_seed(step)
        records = measure(model, TracIn(candidates=4), context=context_of(model, data, step=step))
        draws.append(records[0].panel.coords["train_example"])
    assert draws[0] == draws[1]


def test_influence_function_reads_what_the_function_returns() -> None:
    model, train, test, stored = reference("mlp")
    context = Context(model, test[:3], Classification(), dataset=IndexedData(train))
    measurement = InfluenceFunction(
        regularizer=decay,
        queries=3,
        damping=float(stored["damp"]),
        solver=CG(rtol=1e-12),
        candidates=[5, 40, 7],
    )
    records = {r.what: r for r in measure(model, measurement, context=context)}
    assert records["scores"].name == "influence_function/scores"
    expected = torch.tensor(stored["influence.cg_gnh"])[:3, [5, 40, 7]]
    assert torch.allclose(records["scores"].panel.values, expected, rtol=1e-8)
    assert records["scores"].panel.coords["train_example"] == [5, 40, 7]
    assert records["scores"].panel.convention["damping"] == 0.05
    assert records["residual"].panel.values.max() < 1e-10
    assert records["gradient_norm"].panel.item() < 1e-7


def test_the_cost_is_known_beforehand() -> None:
    assert TracIn(candidates=100, queries=2, top=5).cost() == 100 + 2 + 20 + 16
    assert TracIn(candidates=[1, 2], top=5).cost() == 2 + 1 + 4 + 16
    assert TracIn().cost(1000) == 1000 + 1 + 20 + 16


# ------------------------------------------------------------------ batches and bad input


class Dictionaries:
    """Items as Hugging Face's tokenizers give them, padded by their collate."""

    def __init__(self, lengths: list[int]) -> None:
        self.items = [torch.randint(1, 11, (n,)) for n in lengths]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


def padded(items: list[Tensor]) -> UserDict[str, Tensor]:
    width = max(len(i) for i in items)
    ids = torch.stack([F.pad(i, (0, width - len(i))) for i in items])
    mask = torch.stack([F.pad(torch.ones_like(i), (0, width - len(i))) for i in items])
    return UserDict({"input_ids": ids, "attention_mask": mask})


def test_padding_by_longer_examples_changes_nothing() -> None:
    model = tiny_gpt2()
    data = IndexedData(Dictionaries([4, 9, 5, 7, 3, 8, 6]), padded)
    together = tracin(model, Objective(NextToken()), data, data, batch_size=7)
    alone = tracin(model, Objective(NextToken()), data, data, batch_size=1)
    assert torch.allclose(together.values, alone.values, rtol=1e-9, atol=1e-12)
    assert together.tokens is not None
    for shares in together.tokens:
        assert (shares.values[shares.ids == -1] == 0).all()
        assert [(row >= 0).sum() for row in shares.ids] == [
            len(data.dataset[i]) for i in shares.indices
        ]


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield torch.zeros(2)

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("function", [tracin, influence_scores])
def test_a_stream_is_refused(function: Any) -> None:
    model, data = multilayer()
    with pytest.raises(ArgumentError, match=r"train: expected a map-style dataset, got a Stream"):
        function(model, Objective(Classification()), Stream(), data)
    with pytest.raises(ArgumentError, match="queries: expected a map-style dataset"):
        function(model, Objective(Classification()), data, DataLoader(Stream()))


def test_a_missing_dataset_is_named() -> None:
    model, data = multilayer()
    context = Context(model, data[:2], Classification())
    with pytest.raises(ArgumentError, match="dataset: expected a map-style dataset, got none"):
        measure(model, TracIn(), context=context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "magic"}, "solver: expected one of"),
        ({"curvature": "fisher"}, "curvature: expected"),
        ({"damping": -1.0}, "damping: expected 0 or more, got -1.0"),
        ({"candidates": [3, 99]}, "candidates: expected .* from 0 to 9"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_named(options: Any, message: str) -> None:
    model, data = multilayer()
    with pytest.raises(ArgumentError, match=message):
        influence_scores(model, Objective(Classification()), data, data, **options)


def test_a_frozen_model_is_refused() -> None:
    model, data = multilayer()
    with pytest.raises(ModelError, match="expected trainable parameters"):
        tracin(model.requires_grad_(False), Objective(Classification()), data, data)


def test_something_that_is_no_task_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"task: .*torch_influence.*got a int"):
        Objective(3)


# ------------------------------------------------------------------ elsewhere


@pytest.mark.parametrize("query", [LogProbability(3), Margin(3), Logit(3), Loss()])
def test_measurements_from_yaml(query: Any) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--measurements", type=list[Measurement])
    arguments = {} if isinstance(query, Loss) else {"token": 3}
    named = {"class_path": f"lightning_mi.{type(query).__name__}", "init_args": arguments}
    chosen = {"candidates": [1, 2], "query": named}
    solver = {"class_path": "lightning_mi.influence.CG", "init_args": {"rtol": 0.1}}
    options = [
        {"class_path": "lightning_mi.influence.TracIn", "init_args": chosen},
        {"class_path": "lightning_mi.influence.InfluenceFunction", "init_args": {"solver": solver}},
    ]
    found = parser.instantiate(parser.parse_object({"measurements": options}))
    first, second = found.measurements
    assert first == TracIn(candidates=[1, 2], query=query)
    assert second == InfluenceFunction(solver=CG(rtol=0.1))


@pytest.mark.parametrize("directions", [1, 3])
def test_half_precision_is_summed_in_single(directions: int) -> None:
    model, data = Language(width=8).eval(), TensorDataset(torch.randint(0, 11, (6, 9)))
    low = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(low).double()
    asked = TensorDataset(*data[:directions])
    found = tracin(low, Objective(NextToken()), data, asked).values
    expected = tracin(exact, Objective(NextToken()), data, asked).values
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_inside_autocast_as_in_training() -> None:
    model, data = Language(width=8).eval(), TensorDataset(torch.randint(0, 11, (6, 9)))
    context = Context(model, data[:1], NextToken(), dataset=IndexedData(data))
    expected = measure(model, TracIn(), context=context)[0].panel.values
    lower = measure(
        model, TracIn(), context=context, inside=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    found = lower[0].panel.values
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_within_inference_mode() -> None:
    model, data = multilayer()
    plain = tracin(model, Objective(Classification()), data, data)
    with torch.inference_mode():
        inside = tracin(model, Objective(Classification()), data, data)
    assert torch.equal(plain.values, inside.values)
