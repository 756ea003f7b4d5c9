"""Faults that users of other libraries met, each with the small input that shows it."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from test_curvature import system
from test_influence import Dictionaries, multilayer, padded, tiny_gpt2
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_mi import Classification, IndexedData, NextToken
from lightning_mi.influence import (
    EKFAC,
    KFAC,
    TRAK,
    DataInf,
    LoGra,
    Objective,
    influence_scores,
    self_influence,
    tracin,
)

pytestmark = pytest.mark.filterwarnings("ignore:The model is far", "ignore:The solver stopped")

GOAL = Objective(Classification())


@pytest.mark.parametrize("kind", ["weighted", "distributed", "subset"])
@pytest.mark.parametrize("solver", ["tracin", "exact", "ekfac"])
def test_a_sampler_neither_moves_nor_repeats_columns(kind: str, solver: str) -> None:
    """Scores are keyed by the index in the dataset, whatever a loader would have drawn."""
    model, data = multilayer()
    samplers: dict[str, Any] = {
        "weighted": WeightedRandomSampler(torch.arange(10.0).tolist(), 20),
        "distributed": DistributedSampler(data, num_replicas=4, rank=1),  # Pads 10 to 12.
        "subset": SubsetRandomSampler([4, 2, 7]),
    }
    loader: Any = DataLoader(data, batch_size=3, sampler=samplers[kind])

    def scored(train: Any) -> Any:
        if solver == "tracin":
            return tracin(model, GOAL, train, data)
        return influence_scores(model, GOAL, train, data, solver=solver)

    found, plain = scored(loader), scored(data)
    assert found.indices == tuple(range(10))
    assert found.n == 10
    assert torch.equal(found.values, plain.values)


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=11,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double().eval()


def labelled(items: list[Any]) -> Any:
    return {**padded(items), "labels": torch.tensor([int(i.sum()) % 3 for i in items])}


def padded_left(items: list[Any]) -> Any:
    found = padded([item.flip(0) for item in items])
    mask = found["attention_mask"].flip(1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": found["input_ids"].flip(1),
        "attention_mask": mask,
        "position_ids": places,
    }


SOLVERS = [
    EKFAC(),
    EKFAC(labels="exact"),
    EKFAC(labels="sampled"),
    EKFAC(labels="true"),
    EKFAC(rows=12),
    KFAC(),
    LoGra(rank=3),
    DataInf(),
]


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        *itertools.product(["language model", "classifier"], SOLVERS),
        *itertools.product(["padded on the left"], [EKFAC(), EKFAC(rows=12), KFAC()]),
    ],
)
def test_padding_by_longer_examples_changes_no_score(kind: str, solver: Any) -> None:
    """Rows of padding are in no mean of a factor, and how many there are decides nothing."""
    torch.manual_seed(0)
    texts, reads = Dictionaries([4, 9, 5, 7, 3]), kind != "classifier"
    model, goal = (tiny_gpt2(), NextToken()) if reads else (tiny_bert(), Classification())
    collate = {"classifier": labelled, "padded on the left": padded_left}.get(kind, padded)
    data = IndexedData(texts, collate)
    alone, together = (
        influence_scores(
            model, Objective(goal), data, data, solver=solver, damping=0.5, batch_size=size
        ).values
        for size in (1, 5)
    )
    assert torch.allclose(alone, together, rtol=1e-6, atol=1e-9 * float(alone.abs().max()))


def test_projections_inside_layers_weigh_layers_alike() -> None:
    """The scale of a projection that depends on a layer's shape would reweigh the layers."""
    curvature, _, right = system()
    gathered = curvature.gathered("true")
    for place, block in enumerate(b for b in gathered.blocks if len(b.shape) == 2):
        vector = block.take(right[:1])[0]
        ratios = []
        for seed in range(300):
            left, side = LoGra(rank=3, seed=seed)._sides(block, place, gathered)
            small = left @ vector.to(left) @ side.T
            ratios.append(float(small.square().sum() / vector.square().sum()))
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.15), block.name


@pytest.mark.parametrize("solver", [TRAK(dimension=30), LoGra(rank=4), "exact", "ekfac", "kfac"])
def test_fewer_examples_than_directions_give_finite_scores(solver: Any) -> None:
    """Without damping the covariance of three gradients has no inverse."""
    model, data = multilayer()
    few = TensorDataset(*data[:3])
    found = influence_scores(model, GOAL, few, data, solver=solver, damping=0.0)
    assert bool(found.values.isfinite().all())
    assert bool(found.values.any())


def test_the_same_query_twice_with_one_solver_object() -> None:
    """Nothing is added in place to what a solver keeps."""
    model, data = multilayer()
    for solver in (EKFAC(relative_damping=0.1), LoGra(), TRAK(dimension=9)):
        first, second = (
            influence_scores(model, GOAL, data, data, solver=solver).values for _ in range(2)
        )
        assert torch.equal(first, second)
    own, again = (self_influence(model, GOAL, data, solver=EKFAC()).values for _ in range(2))
    assert torch.equal(own, again)


def alive() -> int:
    gc.collect()
    # Not isinstance: some objects of torch warn when they are looked at.
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("solver", ["cg", "ekfac", "tracin"])
def test_nothing_stays_in_memory(solver: str) -> None:
    model, data = multilayer()
    scored = tracin if solver == "tracin" else partial(influence_scores, solver=solver)
    scored(model, GOAL, data, data)
    before = alive()
    for _ in range(3):
        scored(model, GOAL, data, data)
    assert alive() <= before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("solver", ["exact", "cg", "ekfac", "kfac", "datainf", "logra", "trak"])
def test_a_model_that_is_one_layer(solver: str) -> None:
    torch.manual_seed(0)
    bare = nn.Linear(4, 3).double()
    wrapped = nn.Sequential(copy.deepcopy(bare))
    _, data = multilayer()
    first, second = (
        influence_scores(m, GOAL, data, data, solver=solver, damping=0.1).values
        for m in (bare, wrapped)
    )
    assert torch.allclose(first, second, rtol=1e-9)
