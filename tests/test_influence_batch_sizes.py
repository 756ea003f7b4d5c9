"""No score depends on how examples are cut into batches, ordered by a loader, or kept in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi import Classification, IndexedData, Margin
from lightning_mi.influence import (
    CG,
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    DataInf,
    Direct,
    LiSSA,
    LoGra,
    Objective,
    influence_scores,
    self_influence,
    source,
    tracin,
)
from lightning_mi.influence.point import Point
from lightning_mi.influence.products import Curvature

pytestmark = pytest.mark.filterwarnings("ignore:The model is far", "ignore:The solver stopped")

EXAMPLES = 11  # Cut by 7 the last batch is a short one; 40 takes all at once.
GOAL = Objective(Classification(), regularizer=lambda m: 0.01 * m[0].weight.square().sum())

SOLVERS: dict[str, Any] = {
    "exact": Direct(),
    "cg": CG(max_iterations=4),
    "cg, preconditioned": CG(max_iterations=2, preconditioner=EKFAC()),
    "lissa": LiSSA(depth=3),
    "lissa, drawn": LiSSA(depth=3, examples=5, seed=3),
    "arnoldi": Arnoldi(dimension=5, rank=4),
    "kfac": KFAC(),
    "ekfac": EKFAC(),
    "ekfac, sampled labels": EKFAC(labels="sampled"),
    "ekfac, true labels": EKFAC(labels="true"),
    "ekfac, drawn rows": EKFAC(rows=6),
    "ekfac, relative damping": EKFAC(relative_damping=0.1),
    "datainf": DataInf(),
    "datainf, relative damping": DataInf(relative_damping=0.1),
    "logra": LoGra(rank=3),
    "trak": TRAK(dimension=10),
}
"""Everything that `influence_scores` solves with."""

Scored = Callable[..., Tensor]


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(EXAMPLES, 4).double(), torch.randint(0, 3, (EXAMPLES,))
    return model, TensorDataset(x, y), TensorDataset(x[:4] + 0.3, y[:4])


def same(first: Tensor, *others: Tensor) -> None:
    assert bool(first.isfinite().all())
    assert bool(first.any())
    for other in others:
        assert torch.allclose(first, other, rtol=1e-6, atol=1e-9 * float(first.abs().max()))


@pytest.mark.parametrize("name", SOLVERS)
def test_batches_loaders_and_memory_do_not_matter(name: str, problem: Any) -> None:
    model, train, queries = problem
    given = {"solver": SOLVERS[name], "damping": 0.05}
    if name == "trak":
        given["query"] = Margin()
    by_size = [
        influence_scores(model, GOAL, train, queries, batch_size=size, **given).values
        for size in (1, 7, 40)
    ]
    same(*by_size)
    loader = DataLoader(train, batch_size=7, shuffle=True, drop_last=True)
    asked = DataLoader(queries, batch_size=2, shuffle=True)
    shuffled = influence_scores(model, GOAL, loader, asked, batch_size=7, **given)
    assert torch.equal(shuffled.values, by_size[1])
    assert shuffled.indices == tuple(range(EXAMPLES))
    little = influence_scores(
        model, GOAL, train, queries, batch_size=7, memory_budget=0, **given
    ).values
    same(by_size[1], little)
    again = influence_scores(model, GOAL, train, queries, batch_size=7, **given).values
    assert torch.equal(again, by_size[1])


@pytest.mark.parametrize("name", ["exact", "cg", "ekfac", "trak"])
def test_scores_of_a_part_are_those_of_the_whole(name: str, problem: Any) -> None:
    model, train, queries = problem
    given = {"solver": SOLVERS[name], "damping": 0.05}
    whole = influence_scores(model, GOAL, train, queries, **given)
    few = influence_scores(model, GOAL, train, queries, candidates=[9, 2, 10], **given)
    same(whole.values[:, [9, 2, 10]], few.values)
    one = influence_scores(model, GOAL, train, TensorDataset(*queries[2:3]), **given)
    same(whole.values[2:3], one.values)


@pytest.mark.parametrize("name", ["exact", "ekfac", "kfac", "datainf", "logra"])
def test_self_influence_does_not_depend_on_batches(name: str, problem: Any) -> None:
    model, train, _ = problem
    given = {"solver": SOLVERS[name], "damping": 0.05}
    by_size = [self_influence(model, GOAL, train, batch_size=b, **given) for b in (1, 7, 40)]
    little = self_influence(model, GOAL, train, batch_size=7, memory_budget=0, **given)
    same(*(s.values for s in by_size), little.values)


@pytest.mark.parametrize("seeded", [LiSSA(depth=3, examples=5), EKFAC(rows=6), TRAK(dimension=6)])
def test_what_is_drawn_follows_the_seed(seeded: Any, problem: Any) -> None:
    model, train, queries = problem
    first, other = (
        influence_scores(model, GOAL, train, queries, solver=solver, damping=0.05, seed=seed)
        for solver, seed in ((seeded, 0), (_reseeded(seeded), 1))
    )
    assert not torch.allclose(first.values, other.values, rtol=1e-6)


def _reseeded(solver: Any) -> Any:
    """Solvers with a seed of their own take that; the others take the call's."""
    found = copy.copy(solver)
    if hasattr(found, "seed"):
        object.__setattr__(found, "seed", 1)
    return found


@pytest.fixture(scope="module")
def run(problem: Any, tmp_path_factory: Any) -> list[Path]:
    """Four checkpoints of gradient descent, as Lightning writes them."""
    model, train, _ = problem
    state, folder = copy.deepcopy(model), tmp_path_factory.mktemp("run")
    optimizer = torch.optim.SGD(state.parameters(), lr=0.2)
    paths = []
    for step in range(1, 9):
        optimizer.zero_grad()
        x, y = train.tensors
        nn.functional.cross_entropy(state(x), y).backward()
        optimizer.step()
        if step % 2 == 0:
            paths.append(folder / f"step={step}.ckpt")
            content = {
                "state_dict": state.state_dict(),
                "global_step": step,
                "optimizer_states": [optimizer.state_dict()],
            }
            torch.save(content, paths[-1])
    return paths


@pytest.mark.parametrize("method", ["tracin", "tracin over checkpoints", "source"])
def test_scores_along_a_run_do_not_depend_on_batches(
    method: str, problem: Any, run: list[Path]
) -> None:
    model, train, queries = problem

    def scored(data: Any, asked: Any, size: int | None) -> Tensor:
        if method == "source":
            found = source(run, GOAL, data, asked, like=model, segments=2, batch_size=size)
        elif method == "tracin":
            found = tracin(model, GOAL, data, asked, batch_size=size)
        else:
            found = tracin(run, GOAL, data, asked, like=model, batch_size=size)
        return found.values

    by_size = [scored(train, queries, size) for size in (1, 7, 40, None)]
    same(*by_size)
    loader = DataLoader(train, batch_size=7, shuffle=True, drop_last=True)
    assert torch.equal(scored(loader, queries, 7), by_size[1])


@pytest.mark.parametrize("name", [n for n in SOLVERS if "relative" not in n])
def test_the_curvature_of_decay_counts_as_damping(name: str, problem: Any) -> None:
    """½ r ‖θ‖² bends by r in every direction, whatever the solver approximates."""
    model, train, _ = problem
    data, point = IndexedData(train), Point(model)

    def decay(m: nn.Module) -> Tensor:
        return 0.02 * torch.stack([p.square().sum() for p in m.parameters()]).sum()

    def found(regularizer: Any, damping: float) -> Tensor:
        curvature = Curvature(
            point,
            Objective(Classification(), regularizer=regularizer),
            lambda: [data.batch(range(EXAMPLES))],
            EXAMPLES,
            damping=damping,
            subset=lambda places: [data.batch(places)],
        )
        right = torch.ones(2, point.size).double()
        return SOLVERS[name].solve(curvature, right).vectors

    same(found(decay, 0.01), found(None, 0.05))
