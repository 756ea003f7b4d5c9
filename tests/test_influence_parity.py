"""Every number of torch-influence and kronfluence that is kept, beyond their scores themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_curvature import kronfluence
from test_influence import decay, reference
from torch import Tensor

from lightning_mi import Classification, IndexedData, Loss
from lightning_mi.influence import (
    CG,
    EKFAC,
    KFAC,
    Direct,
    Group,
    LiSSA,
    Objective,
    Solution,
    influence_scores,
    self_influence,
    tracin,
)
from lightning_mi.influence.asking import loss_gradients
from lightning_mi.influence.factors import Eigen, eigen_of
from lightning_mi.influence.point import Point
from lightning_mi.influence.products import Curvature
from lightning_mi.influence.scores import regularizer_gradient

GOAL = Objective(Classification(), regularizer=decay)
PLAIN = Objective(Classification())


def gradients(point: Point, objective: Objective, data: Any, count: int) -> Tensor:
    return torch.cat(list(loss_gradients(point, objective, IndexedData(data), range(count))))


def near(found: Tensor, expected: Any, tolerance: float) -> None:
    expected = torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


# ------------------------------------------------------------------ torch-influence


def curvature_of(name: str, kind: Any) -> tuple[Curvature, Any]:
    model, train, _, stored = reference(name)
    data = IndexedData(train)
    return (
        Curvature(
            Point(model),
            GOAL,
            lambda: [data.batch(range(60))],
            60,
            kind=kind,
            damping=float(stored["damp"]),
        ),
        stored,
    )


@pytest.mark.parametrize("name", ["logreg", "mlp"])
def test_gradients_of_torch_influence(name: str) -> None:
    model, train, test, stored = reference(name)
    point = Point(model)
    own = regularizer_gradient(point, GOAL)  # Theirs are with it where they train.
    near(gradients(point, GOAL, train, 60) + own, stored["train_grads"], 1e-12)
    near(gradients(point, GOAL, test, 12), stored["test_grads"], 1e-12)


@pytest.mark.parametrize("name", ["logreg", "mlp"])
def test_inverses_of_torch_influence(name: str) -> None:
    curvature, stored = curvature_of(name, "hessian")
    whole = torch.eye(curvature.point.size).double()
    near(Direct().solve(curvature, whole).vectors, stored["inverse_hessian"], 1e-9)
    asked = torch.as_tensor(stored["test_grads"])[:2]
    near(Direct().solve(curvature, asked).vectors, stored["stest.autograd"], 1e-9)
    near(CG(rtol=1e-12).solve(curvature, asked).vectors, stored["stest.cg"], 1e-9)
    bent, _ = curvature_of(name, "gauss-newton")
    near(CG(rtol=1e-12).solve(bent, asked).vectors, stored["stest.cg_gnh"], 1e-9)


@pytest.mark.parametrize("name", ["logreg", "mlp"])
@pytest.mark.parametrize(
    ("curvature", "column"),
    [("hessian", "autograd"), ("hessian", "cg"), ("gauss-newton", "cg_gnh")],
)
def test_influence_on_a_set_of_torch_influence(name: str, curvature: Any, column: str) -> None:
    model, train, test, stored = reference(name)
    found = influence_scores(
        model,
        GOAL,
        train,
        test,
        query=Group(Loss(), [list(range(12))]),
        solver=CG(rtol=1e-12),
        curvature=curvature,
        damping=float(stored["damp"]),
    )
    near(found.values[0], stored[f"influence_set.{column}"], 1e-9)


@pytest.mark.parametrize("name", ["logreg", "mlp"])
def test_sums_over_draws_of_torch_influence(name: str) -> None:
    """Theirs is drawn with another generator, so that they are near and not equal."""
    model, train, test, stored = reference(name)
    few = torch.utils.data.TensorDataset(*test[:4])
    given = {"damping": float(stored["damp"])}
    exact = influence_scores(model, GOAL, train, few, solver="exact", **given).values
    drawn = influence_scores(model, GOAL, train, few, solver=LiSSA(depth=150), **given).values
    theirs = torch.as_tensor(stored["influence.lissa_gnh"])
    for found in (exact, drawn):
        both = torch.stack([found.flatten(), theirs.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.99


# ------------------------------------------------------------------ kronfluence


def eigen(corrected: bool) -> tuple[dict[str, Eigen], Any]:
    model, train, _, stored = kronfluence()
    data = IndexedData(train)
    curvature = Curvature(Point(model), PLAIN, lambda: [data.batch(range(60))], 60)
    return eigen_of(curvature.gathered("true"), corrected=corrected), stored


@pytest.mark.parametrize("layer", ["0", "2"])
def test_factors_of_kronfluence(layer: str) -> None:
    measured, stored = eigen(corrected=True)
    product, _ = eigen(corrected=False)
    kept = {k[7:-2]: torch.as_tensor(stored[k]) for k in stored if k.endswith(f".{layer}")}
    name = f"{layer}.weight"
    assert int(kept["num_lambda_processed"]) == 60
    near(measured[name].values, kept["lambda_matrix"] / 60, 1e-3)
    outer = torch.outer(kept["gradient_eigenvalues"], kept["activation_eigenvalues"])
    near(product[name].values, outer, 1e-4)
    for side, which in enumerate(("gradient", "activation")):
        basis = product[name].bases[side]
        assert basis is not None
        covariance = kept[f"{which}_covariance"] / kept[f"num_{which}_covariance_processed"]
        turned = basis.T @ covariance.double() @ basis  # Bases are those of their covariance.
        near(turned, torch.diag(kept[f"{which}_eigenvalues"]), 1e-4)


@pytest.mark.parametrize("damping", [0.001, 0.1, None])
def test_the_identity_of_kronfluence_is_the_gradient_dot(damping: float | None) -> None:
    model, train, test, stored = kronfluence()
    near(
        tracin(model, PLAIN, train, test).values, stored[f"scores.identity.damping={damping}"], 1e-4
    )


def test_self_scores_of_kronfluence() -> None:
    model, train, _, stored = kronfluence()
    squares = gradients(Point(model), PLAIN, train, 60).square().sum(1)
    near(squares, stored["self_scores.identity.damping=0.1"].reshape(-1), 1e-4)
    for name, solver in (("kfac", KFAC), ("ekfac", EKFAC), ("diagonal", Diagonal)):
        found = self_influence(model, PLAIN, train, solver=solver(labels="true"), damping=0.1)
        near(found.values[0] * 60, stored[f"self_scores.{name}.damping=0.1"].reshape(-1), 2e-3)


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of the empirical Fisher matrix; a solver of a user's own."""

    labels: str = "true"
    relative_damping: float | None = None

    def solve(self, product: Any, right: Tensor) -> Solution:
        rows = torch.cat(list(self._rows(product)))
        diagonal = rows.square().mean(0)
        added = torch.full_like(diagonal, product.damping)
        if self.relative_damping is not None:
            for block in product.gathered("true").blocks:
                mean = block.take(diagonal[None]).mean()
                added[block.index.flatten()] = self.relative_damping * mean
        return Solution.approximate(right / (diagonal + added), "approximation", {})

    @staticmethod
    def _rows(product: Any) -> Iterator[Tensor]:
        for batch in product.batches():
            for i in range(len(batch[1])):
                single = [t[i : i + 1] for t in batch]
                losses = product.point.call(
                    lambda m, b=single: product.objective.example_losses(m, b)
                )
                yield product.point.flat(product.point.gradient(losses.sum()))[None]


@pytest.mark.parametrize("damping", [0.001, 0.1, None])
@pytest.mark.filterwarnings("ignore:The model is far")
def test_the_diagonal_of_kronfluence_by_a_solver_of_ones_own(damping: float | None) -> None:
    model, train, test, stored = kronfluence()
    relative = 0.1 if damping is None else None
    found = influence_scores(
        model,
        PLAIN,
        train,
        test,
        solver=Diagonal(relative_damping=relative),
        damping=damping or 0.0,
    )
    near(found.values * 60, stored[f"scores.diagonal.damping={damping}"], 2e-3)
