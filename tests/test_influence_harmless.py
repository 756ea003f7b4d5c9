"""Every way of asking leaves model, optimizer and generators exactly as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import same
from test_influence_batch_sizes import SOLVERS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import Classification, Context, IndexedData, measure
from lightning_mi.influence import (
    InfluenceFunction,
    InfluenceScores,
    Objective,
    TracIn,
    influence_scores,
    self_influence,
    source,
    tracin,
)
from lightning_mi.influence.evaluate import (
    MislabelDetection,
    TailPatching,
    mislabel_auc,
    pbrf,
    query_losses,
    tail_patch,
)

pytestmark = pytest.mark.filterwarnings("ignore:The model is far", "ignore:The solver stopped")

GOAL = Objective(Classification())
EXAMPLES = 9


class Tied(nn.Module):
    """Tied weights, dropout, running statistics, a frozen parameter and a frozen module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.first.weight
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(4, 3)
        self.fixed = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.last(self.fixed(self.again(x)).tanh())


class Trained:
    """A model in the middle of its training, and all that training depends on."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self.model = Tied()
        self.model.fixed.requires_grad_(False)
        self.data = TensorDataset(torch.randn(EXAMPLES, 4), torch.arange(EXAMPLES) % 3)
        self.fired: list[int] = []
        self.model.first.register_forward_hook(lambda *_: self.fired.append(1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.model.train()
        self.model.norm.eval()  # What the user froze stays frozen.
        self.steps(2)
        self.loss().backward()  # Half-accumulated gradients.

    def loss(self) -> Tensor:
        x, y = self.data.tensors
        return nn.functional.cross_entropy(self.model(x + 0.1 * torch.randn_like(x)), y)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        named = list(self.model.named_parameters(remove_duplicate=False))
        return {
            "identities": [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in named],
            "gradients": [None if p.grad is None else p.grad.clone() for _, p in named],
            "weights": {k: v.clone() for k, v in self.model.state_dict().items()},
            "flags": [(n, m.training) for n, m in self.model.named_modules()],
            "hooks": [
                (n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for n, m in self.model.named_modules()
            ],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),  # type: ignore[index]
            "python": random.getstate(),
            "default": torch.get_default_dtype(),
            "attention": torch.backends.cuda.flash_sdp_enabled(),
        }


def scores() -> InfluenceScores:
    values = torch.randn(2, EXAMPLES, generator=torch.Generator().manual_seed(0)).double()
    return InfluenceScores(values, tuple(range(EXAMPLES)), EXAMPLES, "influence function")


def queries(t: Trained) -> TensorDataset:
    return TensorDataset(*t.data[:2])


def measured(measurement: Any) -> Callable[[Trained, Any], Any]:
    def ask(t: Trained, _: Any) -> Any:
        rates = {n: 0.1 for n, _ in t.model.named_parameters()}
        context = Context(
            t.model,
            list(t.data[:2]),
            Classification(),
            dataset=IndexedData(t.data),
            learning_rates=rates,
        )
        return measure(t.model, measurement, context=context)

    return ask


def along(function: Any, **options: Any) -> Callable[[Trained, Any], Any]:
    def ask(t: Trained, folder: Any) -> Any:
        for step in (1, 2):
            content = {"state_dict": t.model.state_dict(), "global_step": step}
            torch.save(content, folder / f"step={step}.ckpt")
        rates = {"learning_rates": 0.1, **options}
        return function(folder, GOAL, t.data, queries(t), like=t.model, **rates)

    return ask


def solving(solver: Any) -> Callable[[Trained, Any], Any]:
    return lambda t, _: influence_scores(
        t.model, GOAL, t.data, queries(t), solver=solver, damping=0.1
    )


WAYS: dict[str, Callable[[Trained, Any], Any]] = {
    **{f"influence_scores, {n}": solving(s) for n, s in SOLVERS.items()},
    "influence_scores, hessian": lambda t, _: influence_scores(
        t.model, GOAL, t.data, queries(t), solver="exact", curvature="hessian", damping=1.0
    ),
    "influence_scores, double": lambda t, _: influence_scores(
        t.model, GOAL, t.data, queries(t), solver="exact", dtype=torch.float64
    ),
    "self_influence": lambda t, _: self_influence(t.model, GOAL, t.data),
    "tracin": lambda t, _: tracin(t.model, GOAL, t.data, queries(t)),
    "tracin over checkpoints": along(tracin),
    "source": along(source),
    "mislabel_auc": lambda t, _: mislabel_auc(t.model, GOAL, t.data, [0, 4]),
    "tail_patch": lambda t, _: tail_patch(
        t.model, GOAL, t.data, queries(t), scores(), k=2, learning_rate=0.1
    ),
    "pbrf": lambda t, _: pbrf(
        t.model, GOAL, t.data, queries(t), damping=0.5, candidates=[3], max_iterations=3
    ),
    "query_losses": lambda t, _: query_losses(t.model, GOAL, queries(t)),
    "InfluenceFunction": measured(InfluenceFunction(queries=2, solver="ekfac")),
    "TracIn": measured(TracIn(queries=2)),
    "MislabelDetection": measured(MislabelDetection(wrong=[0, 4])),
    "TailPatching": measured(TailPatching(k=2, method=TracIn(queries=2))),
}


@pytest.fixture(scope="module")
def untouched_training() -> dict[str, Any]:
    trained = Trained()
    trained.steps(3)
    return trained.state()


@pytest.mark.parametrize("way", WAYS)
def test_everything_is_left_as_it_was(way: str, tmp_path: Any, untouched_training: Any) -> None:
    trained = Trained()
    before = trained.state()
    WAYS[way](trained, tmp_path)
    after = trained.state()
    assert [key for key in before if not same(before[key], after[key])] == []
    assert trained.model.again.weight is trained.model.first.weight
    fired = len(trained.fired)
    trained.steps(3)
    assert len(trained.fired) == fired + 3  # The user's own hook is still there, once.
    later = trained.state()
    for key in ("weights", "torch", "numpy", "python", "flags"):
        assert same(later[key], untouched_training[key]), key


def test_the_check_can_fail(untouched_training: Any) -> None:
    trained = Trained()
    torch.rand(1)
    trained.steps(3)
    assert not same(trained.state()["weights"], untouched_training["weights"])


class Failing(Classification):
    """Fails once it has given so many losses."""

    def __init__(self, after: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", after)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[has-type]
        if self.left < 0:
            raise ZeroDivisionError("in the middle")
        return super().loss(outputs, batch)


@pytest.mark.parametrize("solver", ["exact", "cg", "ekfac", "trak"])
@pytest.mark.parametrize("after", [0, 2])
def test_and_so_after_a_failure(solver: str, after: int) -> None:
    trained = Trained()
    before = trained.state()
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        influence_scores(
            trained.model,
            Objective(Failing(after)),
            trained.data,
            queries(trained),
            solver=solver,
            batch_size=2,
        )
    after_it = trained.state()
    assert [key for key in before if not same(before[key], after_it[key])] == []
