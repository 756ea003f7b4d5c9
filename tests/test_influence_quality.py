"""Influence beside what training again really does, on scikit-learn's digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lightning_mi import Classification
from lightning_mi.influence import (
    CG,
    InfluenceScores,
    Objective,
    influence_scores,
    self_influence,
    tracin,
)
from lightning_mi.influence.evaluate import (
    LDS,
    Subsets,
    lds,
    leave_one_out,
    mislabel_auc,
    query_losses,
    retrain_subsets,
)

REFERENCE = Path(__file__).parent / "reference" / "digits_mlp.npz"
DAMPING = 0.01


# ------------------------------------------------------------------ softmax regression


def softmax(curvature: Any = "gauss-newton", **options: Any) -> InfluenceScores:
    train, test = digits.softmax_data()
    return influence_scores(
        digits.softmax_fit(train),
        Objective(Classification(), regularizer=digits.ridge),
        train,
        test,
        damping=0.0,
        curvature=curvature,
        **options,
    )


def softmax_again(indices: Sequence[int], seed: int) -> Tensor:
    train, test = digits.softmax_data()
    goal = Objective(Classification())
    return query_losses(digits.softmax_fit(train, indices), goal, test)


@pytest.mark.slow
def test_direct_and_cg_agree_on_softmax_regression() -> None:
    direct, iterated = softmax(solver="exact"), softmax(solver=CG(rtol=1e-9))
    largest = direct.values.abs().max()
    assert (direct.values - iterated.values).abs().max() < 1e-6 * largest
    # The Gauss-Newton matrix of a linear model is its Hessian.
    hessian = softmax("hessian", solver="exact")
    assert (direct.values - hessian.values).abs().max() < 1e-9 * largest
    assert direct.gradient_norm is not None
    assert direct.gradient_norm < 1e-8


@pytest.mark.slow
def test_leaving_one_of_softmax_regression_out_is_predicted() -> None:
    exact = softmax(solver="exact")
    found = leave_one_out(exact, softmax_again, removals=40)
    assert found.pearson.mean >= 0.995
    assert 1 <= found.slope.mean <= 1.3  # Over 1 − leverage.
    train, test = digits.softmax_data()
    dots = tracin(digits.softmax_fit(train), Objective(Classification()), train, test)
    own = dots.values[:, list(found.removed)]
    weak = type(found)(own, found.changes, found.removed, found.truth)
    assert weak.pearson.mean < 0.8  # What gradients alone give: the test can fail.


@pytest.mark.slow
def test_halves_of_softmax_regression_are_predicted() -> None:
    train, test = digits.softmax_data()
    known = retrain_subsets(softmax_again, len(train), seeds=(0,))
    found = lds(softmax(solver="exact"), known)
    assert found.mean >= 0.97
    dots = tracin(digits.softmax_fit(train), Objective(Classification()), train, test)
    assert found.minus(lds(dots, known)).low > 0.2


@pytest.mark.slow
def test_wrong_labels_of_softmax_regression_are_found() -> None:
    train, _ = digits.softmax_data(0.1)
    goal = Objective(Classification(), regularizer=digits.ridge)
    model = digits.softmax_fit(train)
    own = self_influence(model, goal, train, solver="exact", damping=0.0)
    found = mislabel_auc(model, goal, train, range(40), own=own)
    assert found.auc.mean >= 0.98
    assert found.areas["loss"].mean >= 0.98
    assert found.areas["gradient_norm"].mean >= 0.98


# ------------------------------------------------------------------ a network


def scored(model: nn.Module, solver: Any, curvature: Any = "gauss-newton") -> InfluenceScores:
    """All 1,500 × 200 scores; nearly at a minimum of a loss that carries weight decay."""
    train, test = digits.mlp_data()
    goal = Objective(Classification())
    return influence_scores(
        model, goal, train, test, solver=solver, curvature=curvature, damping=DAMPING
    )


def judged(scores: InfluenceScores, halves: Subsets) -> LDS:
    """`lds` with intervals of a few resamples, which suffice for differences as large as these."""
    return dataclasses.replace(lds(scores, halves), draws=100)


@cache
def stored() -> tuple[nn.Module, Subsets, dict[str, LDS]]:
    """A trained network, models trained again on halves, and what peers predict of them."""
    kept = np.load(REFERENCE)
    model = digits.network()
    model.load_state_dict({k[6:]: torch.tensor(kept[k]) for k in kept if k.startswith("param.")})
    members = np.unpackbits(kept["members"], axis=1, count=digits.TRAIN)
    halves = Subsets(torch.tensor(members).bool(), torch.tensor(kept["losses"]).double())
    peers = {
        k[5:]: LDS(torch.tensor(kept[k]).double(), halves.losses, digits.TRAIN)
        for k in kept
        if k.startswith("sums.")
    }
    return model, halves, peers


def test_exact_scores_predict_retraining_better_than_any_approximation() -> None:
    model, halves, peers = stored()
    exact = judged(scored(model, "exact"), halves)
    assert exact.mean >= 0.76
    assert 0.93 < exact.ceiling < 0.95
    for peer in ("kronfluence_ekfac", "captum_arnoldi", "dattri_trak", "captum_tracin_fast"):
        assert exact.minus(peers[peer]).low > 0.1, peer
    # The whole Hessian at the same damping is a little better still.
    assert exact.minus(peers["dattri_cg"]).low > -0.03


def test_factored_scores_predict_retraining_as_kronfluence_does() -> None:
    model, halves, peers = stored()
    factored = judged(scored(model, "ekfac"), halves)
    assert factored.mean >= 0.53
    assert factored.minus(peers["kronfluence_ekfac"]).low > -0.01
    dots = tracin(model, Objective(Classification()), *digits.mlp_data())
    plain = judged(dots, halves)
    assert plain.minus(peers["kronfluence_identity"]).mean == pytest.approx(0, abs=1e-3)
    assert factored.minus(plain).low > 0.15


@pytest.mark.slow
def test_projected_scores_predict_retraining_better_than_trak_of_peers() -> None:
    model, halves, peers = stored()
    assert judged(scored(model, "trak"), halves).minus(peers["dattri_trak"]).low > 0.1


@pytest.mark.slow
def test_the_whole_hessian_is_that_of_dattri() -> None:
    model, halves, peers = stored()
    found = lds(scored(model, "exact", "hessian"), halves)
    assert found.minus(peers["dattri_cg"]).mean == pytest.approx(0, abs=2e-3)


@pytest.mark.slow
def test_exact_scores_equal_their_dense_twin() -> None:
    """The damped Gauss-Newton matrix written out, in double precision."""
    model, _, _ = stored()
    train, test = digits.mlp_data()
    twin = digits.network().double()
    twin.load_state_dict(model.state_dict())
    weights = {k: v.detach() for k, v in twin.named_parameters()}

    def slopes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def logits(w: dict[str, Tensor], row: Tensor) -> Tensor:
            return functional_call(twin, w, (row[None],))[0]

        each = vmap(jacrev(logits), (None, 0))(weights, x.double())
        rows = torch.cat([v.flatten(2) for v in each.values()], 2)
        p = twin(x.double()).softmax(1).detach()
        return rows, p, torch.einsum("nkd,nk->nd", rows, p - nn.functional.one_hot(y, 10))

    matrix = DAMPING * torch.eye(2410).double()
    own = []
    for x, y in zip(*(t.split(100) for t in train.tensors), strict=True):
        rows, p, slope = slopes(x, y)
        bent = p[:, :, None] * (rows - torch.einsum("nkd,nk->nd", rows, p)[:, None])
        matrix += rows.flatten(0, 1).T @ bent.flatten(0, 1) / digits.TRAIN
        own.append(slope)
    asked = slopes(*test.tensors)[2]
    expected = asked @ torch.linalg.solve(matrix, torch.cat(own).T) / digits.TRAIN
    found = scored(model, "exact").values
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.999999


@pytest.mark.slow
def test_models_trained_anew_are_predicted_as_well() -> None:
    model, halves = digits.retrained()
    exact, factored = (lds(scored(model, s), halves) for s in ("exact", "ekfac"))
    assert exact.mean >= 0.74
    assert factored.mean >= 0.50
    assert exact.minus(factored).low > 0.1
