"""Influence beside what training again really does, on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import digits
import pytest
from torch import Tensor

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
    lds,
    leave_one_out,
    mislabel_auc,
    query_losses,
    retrain_subsets,
)

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
