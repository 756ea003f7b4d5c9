"""Parameters used in unusual ways, and losses of users: scores equal those of autograd alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_mi import Classification, IndexedData, Task
from lightning_mi.influence import CG, EKFAC, KFAC, influence_scores, tracin
from lightning_mi.influence.factors import eigen_of
from lightning_mi.influence.gathered import Gathered
from lightning_mi.influence.objective import Objective
from lightning_mi.influence.outputs import curvature_columns
from lightning_mi.influence.point import Point

pytestmark = pytest.mark.filterwarnings("ignore:The model is far")

DAMPING = 0.05


class Used(nn.Module):
    """A weight that no module owns, used as the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.scale, self.last = nn.Parameter(torch.tensor(1.3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).tanh())

    def hidden(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InFactorsAndInFull(Used):
    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b) + (x[:, None] * self.w).sum(-1)


class BesideAnUnknownUse(Used):
    """The weight has to be differentiated apart; the bias beside it is read."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b) + torch.einsum("ni,io->no", x, self.w)


class Scaled(Used):
    """The scale is a number, in a product that the weight is made of and beside a layer."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.scale, self.b) * self.scale


class Positional(Task):
    """A user's loss whose arguments have names of their own."""

    def loss(self, predicted: Tensor, given: Any) -> Tensor:
        return (predicted - given[1][:, None]).abs().pow(3).sum(1)


def data(seed: int, count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (count,), generator=generator))


def twins(model: nn.Module, task: Task, train: Any, queries: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both, example by example, and the Gauss-Newton matrix, by autograd alone."""
    own = list(model.parameters())

    def rows(values: Tensor) -> Tensor:
        each = []
        for value in values:
            found = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
            pairs = zip(found, own, strict=True)
            each.append([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        return torch.stack([torch.cat(e) for e in each])

    matrix = torch.zeros(())
    gradients: list[list[Tensor]] = [[], []]
    hessian: Any = torch.autograd.functional.hessian
    for place, examples in enumerate((train, queries)):
        for i in range(len(examples)):
            batch = IndexedData(examples).batch([i])
            out = task.outputs(model, batch)
            gradients[place].append(rows(task.loss(out, batch)))
            if place == 0:
                bent = hessian(lambda o, b=batch: task.loss(o[None], b).sum(), out[0].detach())
                one = rows(out[0])
                matrix = matrix + one.T @ bent @ one / len(train)
    return torch.cat(gradients[0]), torch.cat(gradients[1]), matrix


@pytest.mark.parametrize("kind", [InFactorsAndInFull, BesideAnUnknownUse, Scaled])
@pytest.mark.parametrize("size", [None, 2])
def test_scores_of_unusual_uses_equal_those_of_autograd(kind: type[Used], size: Any) -> None:
    torch.manual_seed(0)
    check(kind().double(), Classification(), data(0, 7), data(1, 3), size)


def test_a_users_loss_may_name_its_arguments() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    check(net.double(), Positional(), data(0, 7), data(1, 3), 3)


def test_a_loss_that_is_put_on_a_task_counts() -> None:
    torch.manual_seed(0)
    task: Any = Classification()
    task.loss = lambda outputs, batch: 3 * F.cross_entropy(outputs, batch[1], reduction="none")
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    check(net.double(), task, data(0, 7), data(1, 3), 3)


def test_an_example_without_a_label_has_no_curvature() -> None:
    torch.manual_seed(0)
    train = data(0, 7)
    train.tensors[1][[2, 5]] = -100
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    check(net.double(), Classification(), train, data(1, 3), 3)
    outputs, batch = torch.randn(7, 40), (None, train.tensors[1])
    _, (drawn,) = curvature_columns(
        Objective(Classification()), outputs, batch, "sampled", range(7), 0
    )
    assert bool((drawn[[2, 5]] == 0).all())
    assert bool((drawn[[0, 1, 3, 4, 6]] != 0).any(1).all())


def check(model: nn.Module, task: Task, train: Any, queries: Any, size: int | None) -> None:
    """Compare every way of scoring with its twin."""
    own, asked, matrix = twins(model, task, train, queries)
    found = tracin(model, task, train, queries, batch_size=size).values
    assert torch.allclose(found, asked @ own.T, rtol=1e-8, atol=1e-10)

    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    exact = asked @ torch.linalg.solve(damped, own.T) / len(own)
    expected = {
        "exact": exact,
        CG(rtol=1e-12): exact,
        EKFAC(): in_blocks(model, task, train, matrix, asked, own),
        KFAC(): in_blocks(model, task, train, None, asked, own),
    }
    for solver, scores in expected.items():
        result = influence_scores(
            model, task, train, queries, solver=solver, damping=DAMPING, batch_size=size
        )
        assert torch.allclose(result.values, scores, rtol=1e-6, atol=1e-9), solver
        assert result.gradient_norm == pytest.approx(float(own.mean(0).norm()))


def in_blocks(
    model: nn.Module, task: Task, train: Any, matrix: Tensor | None, asked: Tensor, own: Tensor
) -> Tensor:
    """Scores with blocks' eigenvalues from the whole matrix, or without it with those of K-FAC."""
    everything = IndexedData(train)
    batches = [everything.batch(range(len(train)))]
    gathered = Gathered(Point(model), Objective(task), lambda: batches)
    eigen = eigen_of(gathered, corrected=matrix is not None)
    total = torch.zeros(())
    covered = torch.zeros(gathered.point.size)
    for block in gathered.blocks:
        places, found = block.index.flatten(), eigen[block.name]
        covered[places] += 1
        bases = [
            torch.eye(n, dtype=own.dtype) if b is None else b.contiguous()
            for b, n in zip(found.bases, block.shape, strict=True)
        ]
        basis = bases[0] if len(bases) == 1 else torch.kron(*bases)
        values = found.values.flatten()
        if matrix is not None:
            values = (basis.T @ matrix[places][:, places] @ basis).diagonal()
        turned = asked[:, places] @ basis / (values + DAMPING)
        total = total + turned @ (own[:, places] @ basis).T
    assert bool((covered == 1).all())
    return total / len(own)
