"""Objectives: from a LightningModule, from torch-influence, on batches of every form."""

from __future__ import annotations

import copy
import threading
from importlib.util import find_spec
from typing import Any

import cases
import pytest
import torch
from cases import PACKAGES
from foreign_influence import ForeignModule, ForeignObjective
from test_influence import influence_scores_quietly, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi import (
    ArgumentError,
    Classification,
    IndexedData,
    ModelError,
    NextToken,
    Regression,
)
from lightning_mi.influence import CG, Direct, Objective, influence_scores

# ------------------------------------------------------------------ from a LightningModule


def module(package: str = "pytorch_lightning", kind: str = "mean", bias: bool = True) -> Any:
    pl = cases.lightning(package)

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Dropout(0.5), nn.Linear(6, 3))
            self.register_buffer("calls", torch.zeros(()))
            self.automatic_optimization = kind != "manual"

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            self.calls += 1
            smooth = 0.1 if kind == "smooth" else 0.0
            loss = F.cross_entropy(self(x), y, label_smoothing=smooth)
            self.log("loss", loss)
            if kind == "sum":
                return loss * len(x)
            if kind == "penalty":
                return loss + 0.1 * sum(p.square().sum() for p in self.net.parameters())
            if kind == "nothing":
                return None
            return {"loss": loss} if kind == "dict" else loss

    torch.manual_seed(0)
    return Classifier()


def batch() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(7, 4, generator=draw), torch.randint(0, 3, (7,), generator=draw)]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", ["mean", "dict"])
def test_the_objective_of_a_module_is_verified(package: str, kind: str) -> None:
    model = module(package, kind)
    model.net[0].eval()
    flags, random = [m.training for m in model.modules()], torch.get_rng_state()
    names = set(vars(model))
    objective = Objective.of(model, batch())
    assert type(objective.task) is Classification
    assert objective.regularization(model) is None
    assert flags == [m.training for m in model.modules()]
    assert float(model.calls) == 0
    assert torch.equal(random, torch.get_rng_state())
    assert set(vars(model)) == names
    assert all(p.grad is None for p in model.parameters())


def test_a_module_in_a_trainer_logs_nothing(tmp_path: Any) -> None:
    pl = cases.lightning("pytorch_lightning")
    model, seen = module(), []

    class Ask(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, own: Any, *args: Any) -> None:
            before = dict(trainer.callback_metrics)
            seen.append(Objective.of(own, batch()).task)
            assert own.trainer is trainer
            assert dict(trainer.callback_metrics) == before

    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[Ask()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(TensorDataset(*batch()), 4))
    assert len(seen) == 2


def penalty(model: nn.Module) -> Tensor:
    return 0.1 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_a_penalty_in_the_loss_has_to_be_named() -> None:
    model = module(kind="penalty")
    with pytest.raises(ArgumentError, match="from training_step"):
        Objective.of(model, batch())
    objective = Objective.of(model, batch(), regularizer=penalty)
    torch.testing.assert_close(objective.regularization(model), penalty(model))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("sum", "divide its loss"), ("smooth", "Pass a Task"), ("penalty", "regularizer")],
)
def test_another_loss_is_said(kind: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Objective.of(module(kind=kind), batch())


@pytest.mark.parametrize("kind", ["manual", "nothing"])
def test_a_module_without_a_loss_is_said(kind: str) -> None:
    with pytest.raises(ModelError, match="Say what was minimised"):
        Objective.of(module(kind=kind), batch())
    with pytest.raises(ModelError, match="without one"):
        Objective.of(nn.Linear(4, 3), batch())


def test_a_step_that_asks_the_trainer_is_said() -> None:
    model = module()
    step = type(model).training_step

    def asking(self: Any, batch: Any, index: int) -> Any:
        assert self.optimizers() is not None
        return step(self, batch, index)

    type(model).training_step = asking
    with pytest.raises(ModelError, match=r"without a Trainer, got RuntimeError.*Say what was"):
        Objective.of(model, batch())


def test_a_module_that_cannot_be_copied_is_said() -> None:
    model = module()
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"deepcopy copies, got TypeError.*Say what was"):
        Objective.of(model, batch())


def test_the_decay_of_an_optimizer() -> None:
    model = module()
    groups = [
        {"params": [model.net[0].weight], "weight_decay": 0.2},
        {"params": [model.net[0].bias, *model.net[2].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    objective = Objective.of(model, batch(), optimizer=optimizer)
    value = objective.regularization(model)
    torch.testing.assert_close(value, 0.1 * model.net[0].weight.square().sum())
    before = copy.deepcopy(model)
    loss = value + 0 * sum(p.sum() for p in model.parameters())
    loss.backward()
    (slope,) = torch.autograd.grad(objective.regularization(before), before.net[0].weight)
    torch.testing.assert_close(slope, 0.2 * before.net[0].weight)
    plain = torch.optim.Adam(model.parameters())
    assert Objective.of(model, batch(), optimizer=plain).regularization(model) is None
    with pytest.raises(ArgumentError, match="no minimum"):
        Objective.of(model, batch(), optimizer=torch.optim.AdamW(model.parameters()))


class Encoding(dict[str, Tensor]):
    """As a tokenizer returns it: a mapping of its own class."""


@pytest.mark.parametrize("ragged", [False, True])
def test_a_language_model_of_hugging_face(ragged: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    pl = cases.lightning("pytorch_lightning")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=8)

    class Language(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = GPT2LMHeadModel(config)

        def forward(self, **inputs: Any) -> Any:
            return self.net(**inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(**batch).loss

    ids = torch.randint(1, 13, (3, 8))
    mask, labels = torch.ones_like(ids), ids.clone()
    if ragged:
        mask[0, 5:], labels[0, 5:] = 0, -100
    given = Encoding(input_ids=ids, attention_mask=mask, labels=labels)
    if ragged:
        with pytest.raises(ArgumentError, match="of one length"):
            Objective.of(Language(), given)
    else:
        assert isinstance(Objective.of(Language(), given).task, NextToken)


def test_a_regression() -> None:
    pl = cases.lightning("pytorch_lightning")

    class Line(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any) -> Tensor:
            return F.mse_loss(self(batch["x"]), batch["y"])

    given = {"x": torch.randn(5, 2), "y": torch.randn(5, 1)}
    assert isinstance(Objective.of(Line(), given).task, Regression)


# ------------------------------------------------------------------ forms of batches


@pytest.mark.parametrize("form", ["tuple", "dict", "encoding"])
@pytest.mark.parametrize("solver", [CG(max_iterations=20), "ekfac"])
def test_every_form_of_batch_gives_the_same_scores(form: str, solver: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    plain = TensorDataset(x, y)

    def collate(rows: list[Any]) -> Any:
        xs, ys = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        if form == "tuple":
            return xs, ys
        return (Encoding if form == "encoding" else dict)(x=xs, labels=ys)

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    options = {"solver": solver, "damping": 0.1}
    data = IndexedData(plain, collate)
    found = influence_scores_quietly(
        Takes(), Classification(), data, batch_size=3, **options
    )  # 3 + 3 + 1
    expected = influence_scores_quietly(model, Classification(), plain, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-7, atol=1e-10)


# ------------------------------------------------------------------ torch-influence


def both_ways(make: Any, objective: Any) -> None:
    """Its solver inside ours, its objective in ours, and ours: one number."""
    model, train, test, _ = reference("mlp")
    asked = TensorDataset(*test[:3])
    solver = make(
        model=copy.deepcopy(model),
        objective=objective,
        train_loader=DataLoader(train, 20),
        test_loader=DataLoader(asked, 3),
        device=torch.device("cpu"),
        damp=0.05,
    )
    theirs = influence_scores(model, Objective(Classification()), train, asked, solver=solver)
    options: dict[str, Any] = {"solver": Direct(), "curvature": "hessian", "damping": 0.05}
    inside = influence_scores(model, objective, train, asked, **options)

    def decay(m: nn.Module) -> Tensor:
        return 0.005 * torch.stack([p.square().sum() for p in m.parameters()]).sum()

    own = Objective(Classification(), regularizer=decay)
    ours = influence_scores(model, own, train, asked, **options)
    scale = ours.values.abs().max()
    assert (inside.values - ours.values).abs().max() < 1e-9 * scale
    assert (theirs.values - ours.values).abs().max() < 1e-6 * scale
    assert theirs.orientation == ours.orientation


def test_objective_and_solver_of_another_library() -> None:
    both_ways(ForeignModule, ForeignObjective())


@pytest.mark.skipif(find_spec("torch_influence") is None, reason="torch-influence is not installed")
def test_objective_and_solver_of_torch_influence() -> None:
    import torch_influence

    class Theirs(ForeignObjective, torch_influence.BaseObjective):  # type: ignore[misc, name-defined]
        pass

    both_ways(torch_influence.AutogradInfluenceModule, Theirs())
