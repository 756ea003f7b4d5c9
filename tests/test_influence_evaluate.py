"""Evaluation of scores: correlations written out, real retraining, folders, processes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi import ArgumentError, Classification, IndexedData, Regression, RunError
from lightning_mi.influence import InfluenceScores, Objective, influence_scores, self_influence
from lightning_mi.influence.evaluate import (
    FreshTrainer,
    Retraining,
    agreement,
    brittleness,
    lds,
    leave_one_out,
    mislabel_auc,
    pbrf,
    query_losses,
    retrain_subsets,
    tail_patch,
)
from lightning_mi.influence.evaluate.ranking import auc, bootstrap, pearson, ranks, spearman


def scores_of(values: Tensor, n: int | None = None) -> InfluenceScores:
    size = values.shape[1]
    return InfluenceScores(values.double(), tuple(range(size)), n or size, "influence function")


def added(indices: Sequence[int], seed: int) -> list[float]:
    """Stands for training: losses are sums of known parts, with a little luck."""
    luck = torch.randn(2, generator=torch.Generator().manual_seed(seed))
    total = PARTS[:, list(indices)].sum(1) + 1e-3 * luck
    return (-total).tolist()


PARTS = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------ numbers


def test_correlations_equal_those_of_numpy() -> None:
    a, b = torch.randn(3, 9).double(), torch.randn(3, 9).double()
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert np.allclose(pearson(a, b), expected)
    a[:, :3] = a[:, 3:6]  # Ties.
    for x, y in zip(a, ranks(a), strict=True):
        below = (x[None] < x[:, None]).sum(1) + (x[None] == x[:, None]).sum(1) / 2 - 0.5
        assert torch.allclose(y, below.double())
    assert math.isnan(float(spearman(torch.ones(1, 5), torch.randn(1, 5))))
    assert math.isnan(float(pearson(torch.ones(1, 2), torch.randn(1, 2))))


def test_the_area_counts_pairs_in_order() -> None:
    scores, wrong = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert auc(scores, wrong) == (1 + 1 + 1 + 0.5) / 4
    assert math.isnan(auc(scores, torch.ones(4).bool()))


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        drawn = torch.randn(40, generator=torch.Generator().manual_seed(seed)).double()
        found = bootstrap(lambda p, d=drawn: d[p[0]].mean(1), [40], 300, seed)
        assert found.mean == pytest.approx(float(drawn.mean()))
        held += found.low <= 0 <= found.high
    assert 85 <= held <= 99


# ------------------------------------------------------------------ by training again


def test_right_scores_have_an_lds_of_one_and_wrong_ones_of_minus_one() -> None:
    known = retrain_subsets(added, 12, subsets=20)
    assert known.members.sum(1).tolist() == [6] * 20
    good, bad = (lds(scores_of(sign * PARTS), known) for sign in (1, -1))
    assert good.mean == pytest.approx(1, abs=0.01)
    assert bad.mean == pytest.approx(-1, abs=0.01)
    difference = good.minus(bad)
    assert difference.low <= difference.mean == pytest.approx(2, abs=0.02)
    assert good.agreement == pytest.approx(1, abs=0.01)
    assert good.ceiling == pytest.approx(1, abs=0.01)
    reading = good.reading()
    assert reading["lds"].item() == good.mean
    assert reading["lds"].convention["subsets"] == 20
    assert good.minus(lds(scores_of(PARTS), known)).mean == 0


def test_scores_that_are_not_numbers_have_no_rank() -> None:
    known, values = retrain_subsets(added, 12, subsets=20, seeds=(0,)), PARTS.clone()
    values[0, 3] = math.nan
    found = lds(scores_of(values), known)
    assert math.isnan(float(found.values[0]))
    assert found.mean == pytest.approx(float(found.values[1]))
    broken = brittleness(scores_of(values), added, counts=(1, 2))
    whole = brittleness(scores_of(values.nan_to_num(nan=-9.0)), added, counts=(1, 2))
    assert torch.equal(broken.changes, whole.changes)


def test_the_ceiling_is_what_the_truth_without_luck_reaches() -> None:
    """With luck as large as the signal, exact scores reach the ceiling and not 1."""
    parts = torch.randn(40, 30).double()

    def noisy(indices: Sequence[int], seed: int) -> Tensor:
        luck = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        return -parts[:, list(indices)].sum(1) + 2.0 * luck

    found = lds(scores_of(parts), noisy, subsets=60, seeds=(0, 1, 2))
    assert found.mean < 0.95
    assert found.ceiling == pytest.approx(found.mean, abs=0.04)
    one = lds(scores_of(parts), noisy, subsets=10, seeds=(0,))
    assert math.isnan(one.ceiling)


def test_examples_without_a_score_are_in_every_part() -> None:
    few = InfluenceScores(PARTS[:, [2, 5, 7, 8]].double(), (2, 5, 7, 8), 12, "influence function")
    found = lds(few, added, subsets=12)
    assert found.mean > 0.95
    with pytest.raises(ArgumentError, match="example 0, which has no score"):
        lds(few, retrain_subsets(added, 12, subsets=20))


def test_a_training_that_failed_is_left_out() -> None:
    def sometimes(indices: Sequence[int], seed: int) -> list[float]:
        return [math.nan, math.nan] if 3 in indices and 4 in indices else added(indices, seed)

    found = lds(scores_of(PARTS), sometimes, subsets=20)
    assert found.mean > 0.95
    assert 0 < found.reading()["lds"].convention["failed_subsets"] < 20
    nothing = lds(scores_of(PARTS), lambda indices, seed: [math.nan] * 2, subsets=4)
    assert "reason" in nothing.reading()["lds"].convention


def test_leaving_one_out_finds_the_slope() -> None:
    found = leave_one_out(scores_of(PARTS / 2), added, removals=12)
    assert found.pearson.mean == pytest.approx(1, abs=1e-3)
    assert found.slope.mean == pytest.approx(2, abs=0.01)
    assert found.slope.low <= found.slope.mean <= found.slope.high
    assert torch.allclose(found.changes, PARTS.double(), atol=1e-5)  # The luck is the same.
    assert set(found.reading()) == {"pearson", "spearman", "slope", "values"}
    some = leave_one_out(scores_of(PARTS), added, removals=[4, 1, 9])
    assert some.removed == (4, 1, 9)


def test_removing_proponents_raises_the_loss() -> None:
    found = brittleness(scores_of(PARTS), added, counts=(1, 4))
    top = PARTS.sort(descending=True).values.double()
    assert torch.allclose(found.changes, torch.stack([top[:, 0], top[:, :4].sum(1)], 1), atol=1e-5)
    assert found.margins[1].mean > 0
    assert found.reading()["change"].coords["step"] == [1, 4]
    one = brittleness(scores_of(PARTS), added, counts=(1,), queries=[1])
    assert torch.allclose(one.changes, found.changes[1:, :1])


# ------------------------------------------------------------------ folders and processes


def test_results_are_kept_and_not_made_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(indices: Sequence[int], seed: int) -> list[float]:
        calls.append(seed)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return added(indices, seed)

    again = Retraining(counted, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lds(scores_of(PARTS), again, subsets=6)
    assert len(list(tmp_path.glob("*.json"))) == 4
    found = lds(scores_of(PARTS), again, subsets=6)
    assert len(calls) == 13  # Twelve, and the one that was stopped.
    assert torch.equal(found.losses, lds(scores_of(PARTS), added, subsets=6).losses)
    lds(scores_of(-PARTS), again, subsets=6)
    leave_one_out(scores_of(PARTS), again, removals=2)
    leave_one_out(scores_of(PARTS), again, removals=2)
    assert len(calls) == 13 + 3


def test_not_a_number_is_kept_too(tmp_path: Path) -> None:
    again = Retraining(lambda indices, seed: [math.nan, 1.5], tmp_path)
    first, second = again([((0,), 1)]), again([((0,), 1)])
    assert math.isnan(float(first[0, 0]))
    assert math.isnan(float(second[0, 0]))
    assert float(second[0, 1]) == 1.5


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    again = Retraining(added, tmp_path)
    again([((0, 1), 1)])
    (path,) = tmp_path.glob("*.json")
    path.write_text('{"losses": [')
    with pytest.raises(RunError, match=path.name):
        again([((0, 1), 1)])
    path.write_text(json.dumps({"losses": ["1.0"]}))
    with pytest.raises(ArgumentError, match="one set of queries"):
        again([((0, 1), 1), ((0, 2), 1)])


def test_processes_give_the_same(tmp_path: Path) -> None:
    alone = Retraining(added)([((0, 1), 1), ((2, 3), 2), ((0, 4), 3)])
    both = Retraining(added, tmp_path, processes=2)([((0, 1), 1), ((2, 3), 2), ((0, 4), 3)])
    assert torch.equal(alone, both)
    assert len(list(tmp_path.glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retraining(added, processes=0), "processes"),
        (lambda: Retraining(lambda i, s: [0.0], processes=2), "cannot be sent"),
        (lambda: Retraining(3), "retrain"),
        (lambda: Retraining(lambda i, s: torch.zeros(()))([((0,), 0)]), "shape"),
        (lambda: retrain_subsets(added, 12, fraction=1.0), "fraction"),
        (lambda: retrain_subsets(added, 12, subsets=2), "subsets"),
        (lambda: retrain_subsets(added, 12, seeds=()), "seeds"),
        (lambda: lds(scores_of(PARTS[:1]), added), "queries"),
        (lambda: lds(scores_of(PARTS), retrain_subsets(added, 10)), "12 training examples"),
        (lambda: lds(scores_of(PARTS), added).minus(lds(scores_of(PARTS), added, seed=1)), "other"),
        (lambda: leave_one_out(scores_of(PARTS), added, removals=[99]), "removals"),
        (lambda: leave_one_out(scores_of(PARTS), added, removals=0), "removals"),
        (lambda: leave_one_out(scores_of(PARTS[:1]), added), "queries"),
        (lambda: brittleness(scores_of(PARTS), added, counts=(12,)), "counts"),
        (lambda: brittleness(scores_of(PARTS), added, queries=[2], counts=(1,)), "queries"),
        (lambda: brittleness(scores_of(PARTS), added, seeds=(), counts=(1,)), "seeds"),
        (lambda: agreement(scores_of(PARTS), scores_of(PARTS[:1])), "truth"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_scores_of_another_sign_are_refused() -> None:
    model, data = line()
    own = self_influence(model, Objective(Regression(), regularizer=decay), data)
    with pytest.raises(ArgumentError, match="proponent"):
        lds(own, added)


# ------------------------------------------------------------------ real training


def line() -> tuple[nn.Linear, TensorDataset]:
    torch.manual_seed(0)
    x = torch.randn(14, 3).double()
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]]).double() + 0.3 * torch.randn(14, 1).double()
    return fitted(x, y), TensorDataset(x, y)


def fitted(x: Tensor, y: Tensor, ridge: float = 0.05) -> nn.Linear:
    """Ridge regression in closed form."""
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        gram = x.T @ x / len(x) + ridge * torch.eye(3).double()
        model.weight.copy_(torch.linalg.solve(gram, x.T @ y / len(x)).T)
    return model


def decay(model: Any) -> Tensor:
    return 0.05 * model.weight.square().sum()


def test_ridge_regression_left_out_in_closed_form() -> None:
    model, data = line()
    x, y = data.tensors
    queries = TensorDataset(x[:5] + 0.5, y[:5])
    goal = Objective(Regression(), regularizer=decay)

    def retrain(indices: Sequence[int], seed: int) -> Tensor:
        rows = list(indices)
        return query_losses(fitted(x[rows], y[rows]), goal, queries)

    scores = influence_scores(model, goal, data, queries, solver="exact", damping=0.0)
    found = leave_one_out(scores, retrain, removals=14)
    assert found.pearson.mean > 0.97
    assert 1 <= found.slope.mean < 1.6  # Over 1 − leverage, of which the mean is 3/14.
    assert lds(scores, retrain, seeds=(0,)).mean > 0.85


def test_a_fresh_trainer_each_time() -> None:
    pl = cases.lightning()

    class Line(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    _, data = line()
    again = FreshTrainer(Line, trainer, data, data, Regression(), batch_size=4)
    state = torch.get_rng_state()
    first, second = again([0, 1, 2, 5, 7], 3), again([0, 1, 2, 5, 7], 3)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, again([0, 1, 2, 5, 7], 4))
    assert not torch.equal(first, again([0, 1, 2, 5, 8], 3))
    for read in (IndexedData(data), DataLoader(data, 2, shuffle=True)):
        other = FreshTrainer(Line, trainer, read, data, Regression(), batch_size=4)
        assert torch.equal(other([0, 1, 2, 5, 7], 3), first)
    used = trainer()
    FreshTrainer(Line, lambda: used, data, data, Regression())([0, 1], 0)
    with pytest.raises(ArgumentError, match="new Trainer"):
        FreshTrainer(Line, lambda: used, data, data, Regression())([0, 1], 0)
    idle = FreshTrainer(Line, lambda: trainer(0), data, data, Regression())
    with pytest.raises(ArgumentError, match="takes a step"):
        idle([0, 1], 0)


def trainer(epochs: int = 2) -> Any:
    return cases.lightning().Trainer(
        max_epochs=epochs,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def blobs(n: int = 40, wrong: int = 4) -> tuple[nn.Module, TensorDataset, list[int]]:
    """Two clouds, some labels turned, and a network that was stopped early."""
    torch.manual_seed(2)
    y = torch.arange(n) % 2
    x = torch.randn(n, 3) * 0.7 + (2.0 * y - 1)[:, None]
    y[:wrong] = 1 - y[:wrong]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, TensorDataset(x, y), list(range(wrong))


def test_wrong_labels_are_found_beside_the_baselines() -> None:
    model, data, wrong = blobs()
    found = mislabel_auc(model, Objective(Classification()), data, wrong, solver="exact")
    losses = F.cross_entropy(model(data.tensors[0]), data.tensors[1], reduction="none")
    assert torch.allclose(found.scores["loss"], losses.double(), rtol=1e-5)
    assert found.auc.mean > 0.9
    assert found.auc.low <= found.auc.mean <= found.auc.high
    difference = found.areas["self_influence"].mean - found.areas["loss"].mean
    assert found.margin("loss").mean == pytest.approx(difference)
    squares = []
    for i in range(len(losses)):
        grads = torch.autograd.grad(losses[i], list(model.parameters()), retain_graph=True)
        squares.append(sum(float(g.square().sum()) for g in grads))
    assert np.allclose(found.scores["gradient_norm"], squares, rtol=1e-4)
    assert set(found.reading()) == {"self_influence", "loss", "gradient_norm", "scores"}
    perfect = scores_of(torch.tensor([[1.0] * 4 + [0.0] * 36]))
    given = mislabel_auc(model, Objective(Classification()), data, wrong, own=perfect)
    assert given.auc.mean == 1
    for bad in ([], [99], range(40)):
        with pytest.raises(ArgumentError, match="wrong"):
            mislabel_auc(model, Objective(Classification()), data, bad, own=perfect)
    with pytest.raises(ArgumentError, match="one row"):
        mislabel_auc(model, Objective(Classification()), data, wrong, own=scores_of(PARTS))
    with pytest.raises(ArgumentError, match="baseline"):
        found.margin("luck")


def test_a_step_on_proponents_lowers_the_loss_by_what_it_should() -> None:
    model, data, _ = blobs()
    goal, queries = Objective(Classification()), TensorDataset(*(t[:6] for t in data.tensors))
    before = [p.detach().clone() for p in model.parameters()]
    scores = influence_scores(model, goal, data, queries, solver="exact")
    found = tail_patch(model, goal, data, queries, scores, k=3, learning_rate=1e-3)
    assert found.margin.mean > 0
    top, _ = scores.top(2, 3)
    batch = [t[top] for t in data.tensors]
    grads = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), [*model.parameters()])
    query = F.cross_entropy(model(queries.tensors[0][2:3]), queries.tensors[1][2:3])
    own = torch.autograd.grad(query, [*model.parameters()])
    first_order = 1e-3 * sum(float((g * h).sum()) for g, h in zip(grads, own, strict=True))
    assert float(found.falls[2]) == pytest.approx(first_order, rel=0.05)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert set(found.reading()) == {"fall", "random", "margin"}
    for options in ({"k": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            tail_patch(model, goal, data, queries, scores, **{"learning_rate": 0.1, **options})
    with pytest.raises(ArgumentError, match="queries"):
        tail_patch(model, goal, data, data, scores, learning_rate=0.1)


def test_the_proximal_response_is_what_scores_linearise() -> None:
    """Far from a minimum, where leaving out and training again measures something else."""
    model, data, _ = blobs()
    goal = Objective(Classification(), regularizer=lambda m: 0.01 * m[0].weight.square().sum())
    queries = TensorDataset(*(t[10:16] for t in data.tensors))
    before = [p.detach().clone() for p in model.parameters()]
    truth = pbrf(model, goal, data, queries, damping=0.1, candidates=range(10))
    assert truth.details["converged"] == 10
    with pytest.warns(UserWarning, match="far from a minimum"):
        scores = influence_scores(
            model, goal, data, queries, solver="exact", damping=0.1, dtype=torch.float64
        )
    found = agreement(scores, truth)
    assert found.pearson.mean > 0.98
    assert found.slope.mean == pytest.approx(1, abs=0.15)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(ArgumentError, match="damping"):
        pbrf(model, goal, data, queries, damping=0.0)


def test_the_proximal_response_minimises_its_objective() -> None:
    """The objective written out and minimised by another method."""
    model, data, _ = blobs(n=10, wrong=1)
    model = model.double()
    x, y = data.tensors[0].double(), data.tensors[1]
    queries = TensorDataset(x[:3], y[:3])
    truth = pbrf(
        model, Objective(Classification()), TensorDataset(x, y), queries, damping=0.2,
        candidates=[4], rtol=1e-9,
    )  # fmt: skip
    assert truth.details["converged"] == 1
    start = [p.detach().clone() for p in model.parameters()]
    outputs = model(x).detach()
    tilt = outputs.softmax(1) - F.one_hot(y, 2)
    other, _, _ = blobs(n=10, wrong=1)
    other = other.double()
    other.load_state_dict(model.state_dict())

    def value() -> Tensor:
        new = other(x)
        bregman = F.cross_entropy(new, y, reduction="sum") - (tilt * (new - outputs)).sum()
        pairs = zip(other.parameters(), start, strict=True)
        near = sum((p - q).square().sum() for p, q in pairs)
        return bregman / 10 + 0.1 * near - F.cross_entropy(new[4:5], y[4:5]) / 10

    optimizer = torch.optim.LBFGS(
        other.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = value()
        found.backward()
        return found

    optimizer.step(closure)  # type: ignore[arg-type]
    after = F.cross_entropy(other(x[:3]), y[:3], reduction="none")
    before = F.cross_entropy(model(x[:3]), y[:3], reduction="none")
    assert torch.allclose(truth.values[:, 0], (after - before).detach(), rtol=1e-4, atol=1e-9)
