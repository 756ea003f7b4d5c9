"""Influence while a model trains: factors of the passes that run anyway, rates, rankings."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from contextlib import ExitStack
from typing import Any

import cases
import pytest
import torch
from cases import PACKAGES
from test_influence import language, multilayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi import (
    ArgumentError,
    Classification,
    Context,
    IndexedData,
    NextToken,
    Panel,
    Record,
    Run,
    Task,
    measure,
)
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import HeadScores
from lightning_mi.influence import (
    EKFAC,
    KFAC,
    Objective,
    RankingChange,
    Score,
    TracIn,
    TrainingFactors,
    TrainingInfluence,
    influence_scores,
    ranking_change,
    step_rates,
    tracin,
)

# ------------------------------------------------------------------ factors


def convolutional() -> tuple[nn.Module, Any, Task]:
    layers = [nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)]
    images = torch.randn(8, 1, 6, 6)
    return (
        nn.Sequential(*layers),
        TensorDataset(images, torch.randint(0, 3, (8,))),
        Classification(),
    )


class Text(nn.Module):
    """Embedding, norm, a turned linear layer, a shared head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.inner, self.head = Conv1D(4, 4), nn.Linear(4, 9, bias=False)
        self.root = nn.RMSNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.root(x + self.inner(self.norm(x)).tanh()))


def text() -> tuple[nn.Module, Any, Task]:
    return Text(), TensorDataset(torch.randint(0, 9, (6, 5))), NextToken()


def turned() -> tuple[nn.Module, Any, Task]:
    """A turned layer whose weight has the shape of a Linear's with a bias, and the other way."""
    from transformers.pytorch_utils import Conv1D

    layers = [Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)]
    data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    return nn.Sequential(*layers), data, Classification()


def perceptron() -> tuple[nn.Module, Any, Task]:
    model, data = multilayer()
    return model.float(), TensorDataset(data[:][0].float(), data[:][1]), Classification()


def gather(
    factors: TrainingFactors, model: nn.Module, data: Any, task: Task, scale: float = 1.0
) -> None:
    """One backward pass of training on all of the data."""
    batch = data[:]
    model.train()
    with factors.watching(model, len(data), scale):
        (task.loss(task.outputs(model, batch), batch).mean() * scale).backward()
    model.zero_grad()


def scored(model: nn.Module, task: Task, data: Any, solver: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model is far", UserWarning)
        return influence_scores(model, Objective(task), data, data, solver=solver, damping=0.05)


@pytest.mark.parametrize("case", [perceptron, convolutional, text, turned])
@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_factors_of_one_pass_are_those_that_are_gathered_afterwards(
    case: Any, scale: float
) -> None:
    torch.manual_seed(0)
    model, data, task = case()
    factors = TrainingFactors(model, damping=0.05)
    gather(factors, model, data, task, scale)
    found = scored(model, task, data, factors)
    twin = scored(model, task, data, KFAC(labels="true"))
    torch.testing.assert_close(found.values, twin.values, rtol=1e-3, atol=1e-5)
    assert found.convention["parameters_covered"] == 1
    assert "empirical Fisher" in found.convention["factors"]


@pytest.mark.parametrize("case", [perceptron, convolutional, text, turned])
def test_corrected_eigenvalues_are_those_of_whole_examples(case: Any) -> None:
    torch.manual_seed(0)
    model, data, task = case()
    factors = TrainingFactors(model, damping=0.05, corrected=True)
    gather(factors, model, data, task)
    factors.refresh()
    gather(factors, model, data, task)
    found = scored(model, task, data, factors)
    twin = scored(model, task, data, EKFAC(labels="true"))
    torch.testing.assert_close(found.values, twin.values, rtol=1e-3, atol=1e-5)
    assert "lagged" in found.convention["factors"]


def test_the_past_counts_less() -> None:
    torch.manual_seed(0)
    model, data, task = perceptron()
    halves = [TensorDataset(*data[:4]), TensorDataset(*data[4:])]
    factors = TrainingFactors(model, damping=0.05, decay=0.5)
    for half in halves:
        gather(factors, model, half, task)
    late = TrainingFactors(model, damping=0.05, decay=0.0)
    for half in halves:
        gather(late, model, half, task)
    only = TrainingFactors(model, damping=0.05)
    gather(only, model, halves[1], task)
    right = torch.ones(1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    assert torch.equal(late.inverse()(right).vectors, only.inverse()(right).vectors)
    assert not torch.allclose(factors.inverse()(right).vectors, only.inverse()(right).vectors)
    assert factors.examples == 0.5 * 4 + 6
    assert (factors.batches, only.batches) == (2, 1)


def test_tied_frozen_and_shared_parameters() -> None:
    model, data = language()
    model.float().train()
    model.block.out.weight.requires_grad_(False)
    factors = TrainingFactors(model, damping=0.1)
    gather(factors, model, data, NextToken())
    found = scored(model, NextToken(), data, factors)
    # The gain is no layer's, and positions are shared by the batch.
    missing = model.gain.numel() + model.place.weight.numel()
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.convention["parameters_covered"] == pytest.approx(1 - missing / total)
    assert found.values.isfinite().all()


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    model, data, task = perceptron()
    factors = TrainingFactors(model, damping=0.05)
    gather(factors, model, data, task)
    right = torch.ones(1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    before = factors.inverse()(right).vectors
    gather(factors, model, TensorDataset(data[:][0] * math.nan, data[:][1]), task)
    assert factors.batches == 1
    assert torch.equal(before, factors.inverse()(right).vectors)


def test_hooks_come_off_and_change_no_gradient() -> None:
    model, data, task = text()
    batch = data[:]
    task.loss(model(batch[0]), batch).mean().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    factors = TrainingFactors(model, damping=0.05)
    with ExitStack() as stack:
        factors.attach(stack, model, len(data), 1.0)
        task.loss(model(batch[0]), batch).mean().backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), factors.watching(model, 6, 1.0):
        _ = 1 / 0
    assert not any(m._forward_hooks for m in model.modules())
    assert factors.batches == 0


# ------------------------------------------------------------------ learning rates


def test_the_rates_of_adam_foretell_its_step() -> None:
    """With momentum off, one more step of Adam moves by rate · gradient but for its own square."""
    torch.manual_seed(0)
    model, data, task = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9999), eps=1e-3)
    batch = data[:]
    for _ in range(50):
        optimizer.zero_grad()
        task.loss(model(batch[0]), batch).mean().backward()
        optimizer.step()
    rates = step_rates([optimizer], model)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    task.loss(model(batch[0]), batch).mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        torch.testing.assert_close(moved, rates[name] * grads[name], rtol=0.02, atol=1e-7)


def test_tracin_with_a_rate_for_each_number() -> None:
    model, data, task = perceptron()
    rates = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    found = tracin(model, Objective(task), data, data, learning_rates=rates)
    ones = dict.fromkeys(rates, 1.0)
    plain = tracin(model, Objective(task), data, data, learning_rates=ones)
    assert found.convention["optimizer_aware"] is True
    assert plain.convention["optimizer_aware"] is False
    grads = []
    for i in range(len(data)):
        batch = data[i : i + 1]
        loss = task.loss(model(batch[0]), batch).sum()
        grads.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        )
    each = torch.stack(grads).double()
    flat = torch.cat([r.flatten() for r in rates.values()]).double()
    torch.testing.assert_close(found.values, (each * flat) @ each.T, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ rankings


def record(step: int, values: Any, indices: list[int]) -> Record:
    panel = Panel(
        torch.tensor([values]), ("query", "train_example"), {"train_example": indices}, "1", {}
    )
    return Record("influence/scores", panel, step)


def test_how_the_ranking_changes() -> None:
    records = [
        record(0, [4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3]),
        record(5, [40.0, 30.0, 20.0, 10.0], [0, 1, 2, 3]),
        record(9, [1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3]),
        record(12, [1.0, 9.0], [7, 8]),
    ]
    found = {(r.name, r.step): r.panel for r in RankingChange(k=2)(records)}
    assert found["influence/rank_correlation", 5].values.tolist() == [1.0]
    assert found["influence/top_overlap", 5].values.tolist() == [1.0]
    assert found["influence/rank_correlation", 9].values.tolist() == [-1.0]
    assert found["influence/top_overlap", 9].values.tolist() == [0.0]
    assert found["influence/top_overlap", 9].convention["null"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["influence/top_overlap", 9].convention["at_step"] == 5
    assert found["influence/rank_correlation", 12].nonfinite == 1
    assert (
        "no two training examples" in found["influence/rank_correlation", 12].convention["reason"]
    )
    assert not any(step == 0 for _, step in found)


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"damping": 0.1}, {"damping": 0.2}, "differ in damping"),
        ({"query": "Loss()"}, {"query": "Margin()"}, "differ in query"),
        ({"rows": ["a"]}, {"rows": ["b"]}, "differ in rows"),
        ({}, {}, None),
    ],
)
def test_only_scores_of_one_kind_are_compared(before: Any, now: Any, reason: str | None) -> None:
    old, new = record(0, [3.0, 2.0, 1.0], [0, 1, 2]), record(5, [3.0, 2.0, 1.0], [0, 1, 2])
    first = old.replace(panel=dataclasses.replace(old.panel, convention=before))
    second = new.replace(panel=dataclasses.replace(new.panel, convention=now))
    for found in ranking_change(first, second):
        assert (found.panel.nonfinite == 1) is (reason is not None)
        assert (reason or "") in found.panel.convention.get("reason", "")


def test_other_numbers_of_queries_are_not_compared() -> None:
    new = record(5, [3.0, 2.0], [0, 1])
    two = dataclasses.replace(new.panel, values=new.panel.values.repeat(2, 1))
    found, _ = ranking_change(record(0, [3.0, 2.0], [0, 1]), new.replace(panel=two))
    assert "different numbers of queries" in found.panel.convention["reason"]


# ------------------------------------------------------------------ in a Trainer


def fit(package: str, folder: Any, *callbacks: Any, steps: int = 6, **options: Any) -> nn.Module:
    pl = cases.lightning(package)
    pl.seed_everything(0, verbose=False)

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Text()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return NextToken().loss(self(batch), batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    model = Module()
    texts = torch.randint(0, 9, (10, 5), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(texts, 4, shuffle=True))  # the last batch has 2
    return model


def monitor(folder: Any, **options: Any) -> Any:
    from lightning_mi.callbacks import InfluenceMonitor

    options = {"every_n_train_steps": 2, "candidates": 10, "top": 2, **options}
    return InfluenceMonitor(
        batch=torch.tensor([[1, 2, 3, 1, 2]]), task=NextToken(), dirpath=folder / "mi", **options
    )


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac"},
        {"method": "ekfac", "gather_every": 1},
        {"method": "tracin", "optimizer_aware": True},
    ],
    ids=str,
)
def test_training_is_the_same_with_and_without(package: str, options: Any, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    plain = fit(package, tmp_path, **settings)
    watched = monitor(tmp_path, **options)
    model = fit(package, tmp_path, watched, **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    assert not any(m._forward_hooks for m in model.modules())
    run = Run.open(tmp_path / "mi")
    name = "influence" if options["method"] == "tracin" else "influence_function"
    scores = run.records(f"{name}/scores")
    assert [r.step for r in scores] == [0, 2, 4, 6]
    assert all(not r.panel.nonfinite for r in scores[1:])
    changes = run.records(f"{name}/rank_correlation")
    assert len(changes) == (3 if name == "influence" else 2)
    for r in changes:
        assert -1 <= float(r.panel.values[0]) <= 1
    if name == "influence":
        assert scores[-1].panel.convention["optimizer_aware"] is True
    else:
        assert scores[0].panel.nonfinite == 10
        assert "no training step" in scores[0].panel.convention["reason"]
        assert scores[-1].panel.convention["damping"] == scores[1].panel.convention["damping"]
        assert run.records(f"{name}/gradient_norm")[-1].panel.item() > 0
        assert not run.records("influence/sum")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_knows_of_accumulation(accumulate: int, tmp_path: Any) -> None:
    """The factors are of the examples' own losses, whatever the loss was divided by."""
    seen: list[TrainingFactors] = []
    watched = monitor(tmp_path, method="kfac", gather_every=1, every_n_train_steps=1)
    original = watched._measure

    def measured(*args: Any) -> Any:
        found = original(*args)
        seen.append(copy.copy(watched._factors))
        return found

    watched._measure = measured
    fit("pytorch_lightning", tmp_path, watched, steps=1, accumulate_grad_batches=accumulate)
    factors = seen[-1]
    assert factors.batches == accumulate
    torch.manual_seed(0)
    # A batch of n examples has S = E[Σ s sᵀ]: its trace is the mean squared size, about 1/5 a text.
    head = factors._sums["net.head.weight"]
    trace = float(head.wholes[0].diag().sum()) / factors.examples
    assert 0.1 < trace < 0.4


def test_a_measurement_of_a_head_while_training(tmp_path: Any) -> None:
    from test_queries import Attention

    torch.manual_seed(0)
    model = Attention()
    data = TensorDataset(torch.randint(0, 11, (6, 8)))
    factors = TrainingFactors(model, damping=0.1)
    gather(factors, model, data, NextToken())
    query = Score(
        HeadScores(tokens=RepeatedTokens(length=4, sequences=2)), "induction", layer=0, head=0
    )
    context = Context(model, task=NextToken(), dataset=IndexedData(data))
    context.shared(("influence", "training factors"), lambda: (factors, 0.5))
    records = measure(model, TrainingInfluence(query=query, top=1), context=context)
    panels = {r.what: r.panel for r in records}
    assert "would lower" in panels["scores"].convention["orientation"]
    assert panels["scores"].size == {"query": 1, "train_example": 6}
    assert panels["gradient_norm"].item() == 0.5


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainingInfluence(method="magic"),
        lambda: TrainingInfluence(damping=0.0),
        lambda: TrainingInfluence(queries=0),
    ],
)
def test_arguments_are_checked(make: Any) -> None:
    with pytest.raises(ArgumentError):
        make()


@pytest.mark.parametrize("measurement", [TrainingInfluence(), TracIn(optimizer_aware=True)])
def test_outside_training_it_is_said_what_to_do(measurement: Any) -> None:
    model, data, task = text()
    context = Context(model, data[:2], task, dataset=IndexedData(data))
    with pytest.raises(ArgumentError, match="not being trained"):
        measure(model, measurement, context=context)
