"""What every score says about itself: its certificate."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_influence_batch_sizes import GOAL, SOLVERS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import ArgumentError, Classification, Context, IndexedData, measure
from lightning_mi.influence import (
    EKFAC,
    Direct,
    InfluenceFunction,
    InfluenceScores,
    Objective,
    TrainingFactors,
    TrainingInfluence,
    influence_scores,
    relatif,
    self_influence,
    source,
    tracin,
)
from lightning_mi.influence.during_measured import FACTORS
from lightning_mi.influence.evaluate import pbrf
from lightning_mi.influence.result import CERTIFICATE

pytestmark = pytest.mark.filterwarnings("ignore:The model is far", "ignore:The solver stopped")

EXACT = {"exact", "cg", "cg, preconditioned", "lissa", "lissa, drawn", "arnoldi"}
"""Solvers that know their residual."""


def problem(queries: int = 3) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    return model, TensorDataset(x, y), TensorDataset(x[:queries] + 0.3, y[:queries])


def checked(scores: InfluenceScores) -> dict[str, Any]:
    """The convention, after each part of the certificate was found said or explained."""
    said = json.loads(json.dumps(scores.convention))
    missing = said.get("absent", {})
    for key in CERTIFICATE:
        assert (key in said) != (key in missing), key
    assert all(isinstance(v, str) and v for v in missing.values())
    assert said["n"] == 20
    assert said["orientation"].startswith("positive = ")
    return said


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_says_all_of_it(name: str) -> None:
    model, train, queries = problem()
    scores = influence_scores(model, GOAL, train, queries, solver=SOLVERS[name], damping=0.05)
    said = checked(scores)
    assert "absent" not in said
    assert said["scale"] == "1/n"
    assert said["solver"] == repr(SOLVERS[name])
    assert said["gradient_norm"] == pytest.approx(slope(model, train), rel=1e-9)
    assert len(said["residual"]) == len(said["stopped"]) == 3
    known = name in EXACT
    assert [math.isfinite(r) for r in said["residual"]] == [known] * 3
    assert said["residual_from"].startswith("not computed") != known
    relative = "relative" in name
    assert said["damping"] == (0.1 if relative else 0.05)
    assert (said["damping_unit"] == "mean curvature") != relative
    assert said["parameters_covered"] == 1.0


def slope(model: nn.Module, train: TensorDataset) -> float:
    """‖∇J‖ of `GOAL`, written out."""
    x, y = train.tensors
    ridge = 0.01 * next(model.parameters()).square().sum()
    value = nn.functional.cross_entropy(model(x), y) + ridge
    found = torch.autograd.grad(value, [*model.parameters()])
    return float(torch.cat([g.flatten() for g in found]).norm())


@pytest.mark.parametrize("name", ["exact", "ekfac", "cg", "ekfac, relative damping"])
@pytest.mark.parametrize("candidates", [None, [3, 7]])
def test_self_influence_says_all_of_it(name: str, candidates: Any) -> None:
    model, train, _ = problem()
    given = {"solver": SOLVERS[name], "damping": 0.05, "candidates": candidates}
    own = self_influence(model, GOAL, train, **given)
    said = checked(own)
    assert "absent" not in said
    assert said["gradient_norm"] == pytest.approx(slope(model, train), rel=1e-9)
    assert math.isfinite(said["residual"]) == (name in EXACT)
    assert said["damping"] == (0.1 if "relative" in name else 0.05)
    scores = influence_scores(model, GOAL, train, train, **given)
    assert "self-influence" in checked(relatif(scores, own))["scale"]


def test_scores_are_relative_to_self_influence_of_the_same_inverse() -> None:
    model, train, _ = problem()
    scores = influence_scores(model, GOAL, train, train, solver="ekfac", damping=0.05)
    same = self_influence(model, GOAL, train, solver=EKFAC(), damping=0.05)
    assert relatif(scores, same).convention["damping"] == 0.05
    for other, message in (
        ({"damping": 0.5}, "damping 0.05.*got 0.5"),
        ({"solver": "exact"}, "solver EKFAC.*got Direct"),
        ({"solver": "exact", "curvature": "hessian"}, "own"),
    ):
        own = self_influence(model, GOAL, train, **{"solver": "ekfac", "damping": 0.05, **other})
        with pytest.raises(ArgumentError, match=message):
            relatif(scores, own)


def test_methods_that_solve_nothing_say_why(tmp_path: Any) -> None:
    model, train, queries = problem()
    path = tmp_path / "step=5.ckpt"
    torch.save({"state_dict": model.state_dict(), "global_step": 5}, path)
    solved = {"damping", "damping_unit", "residual", "residual_from", "gradient_norm"}
    dots = checked(tracin(model, GOAL, train, queries))
    assert set(dots["absent"]) == {"solver", *solved}
    assert dots["parameters_covered"] == 1
    assert dots["scale"] == "not divided by n"
    along = source([path], GOAL, train, queries, like=model, learning_rates=0.1)
    unrolled = checked(along)
    assert set(unrolled["absent"]) == solved
    assert "EK-FAC" in unrolled["solver"]
    response = checked(pbrf(model, GOAL, train, queries, damping=0.1, candidates=[2]))
    assert set(response["absent"]) == {"residual", "residual_from", "gradient_norm"}
    assert "BFGS" in response["solver"]


def test_what_another_library_does_not_say_is_unknown() -> None:
    class Module:
        def influences(self, train_idxs: Any, test_idxs: Any) -> Tensor:
            return torch.ones(len(train_idxs))

    model, train, queries = problem()
    said = checked(influence_scores(model, GOAL, train, queries, solver=Module()))
    assert said["solver"] == "Module"
    assert "not known" in said["absent"]["damping"]


def test_an_estimated_residual_is_said_and_near_the_true_one() -> None:
    """A singular matrix leaves of a right-hand side what lies in its kernel."""
    matrix = torch.diag(torch.cat([torch.arange(1.0, 21), torch.zeros(20)])).double()
    right = torch.randn(40, 40).double()
    true = right[:, 20:].norm(dim=1) / right.norm(dim=1)
    some, all_of_them = (Direct().solve(lambda v: v @ matrix, right[:n]) for n in (20, 40))
    assert torch.allclose(some.residual, true[:20], rtol=1e-9)
    assert some.residual_from == "a product with the whole matrix"
    assert all_of_them.residual_from.startswith("32 random projections")
    quotients = all_of_them.residual / true
    assert 0.5 < float(quotients.min()) < float(quotients.max()) < 1.5
    assert float(quotients.mean()) == pytest.approx(1, abs=0.05)
    model, train, _ = problem()
    many = TensorDataset(*(torch.cat([t, t]) for t in train.tensors))
    found = influence_scores(model, GOAL, train, many, solver="exact")
    assert found.convention["residual_from"] == all_of_them.residual_from


def test_the_measurement_keeps_it() -> None:
    model, train, queries = problem()
    context = Context(model, list(queries.tensors), GOAL.task, dataset=IndexedData(train))
    measured = InfluenceFunction(queries=3, solver="exact", damping=0.05)
    records = {r.what: r.panel for r in measure(model, measured, context=context)}
    said = records["scores"].convention
    assert {*CERTIFICATE} <= {*said}


@pytest.mark.parametrize("seen", [False, True])
def test_scores_while_training_say_all_of_it(seen: bool) -> None:
    model, train, queries = problem()
    factors = TrainingFactors(model, damping=0.05)
    if seen:
        x, y = train.tensors
        with factors.watching(model, len(x), 1.0):
            nn.functional.cross_entropy(model(x), y).backward()
    context = Context(model, list(queries.tensors), GOAL.task, dataset=IndexedData(train))
    context.shared(FACTORS, lambda: (factors, 0.5 if seen else None))
    measured = TrainingInfluence(method="kfac", damping=0.05, queries=3)
    panels = {r.what: r.panel for r in measure(model, measured, context=context)}
    said = panels["scores"].convention
    absent = said["absent"]
    for key in CERTIFICATE:
        assert (key in said) != (key in absent), key
    assert said["damping"] == 0.05
    assert "residual" in absent
    assert ("gradient_norm" in absent) != seen


# ------------------------------------------------------------------ the doubts


def decay(model: nn.Module) -> Tensor:
    return 0.05 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def fitted() -> tuple[nn.Module, TensorDataset]:
    """A model at a minimum of cross-entropy with decay."""
    model, train, _ = problem()
    x, y = train.tensors
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y) + decay(model)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return model, train


@pytest.mark.parametrize("ask", [influence_scores, self_influence])
def test_a_model_far_from_stationary_is_warned_of_and_one_at_a_minimum_is_not(
    ask: Callable[..., InfluenceScores],
) -> None:
    goal = Objective(Classification(), regularizer=decay)
    model, train, _ = problem()
    arguments = (train,) if ask is self_influence else (train, train)
    with pytest.warns(UserWarning, match="far from a minimum"):
        ask(model, goal, *arguments, solver="exact")
    model, train = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ask(model, goal, *arguments, solver="exact")
    assert found.gradient_norm is not None
    assert found.query_norm is not None
    assert found.gradient_norm < 1e-3 * found.query_norm
