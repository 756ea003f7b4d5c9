"""What can be asked of influence: scores of measurements, groups, tokens, modules."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_influence import Language, influence_scores_quietly, language, multilayer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import (
    ArgumentError,
    Behavior,
    Classification,
    Context,
    IndexedData,
    LogitDifference,
    Loss,
    Margin,
    Measurement,
    NextToken,
    Panel,
    Task,
    measure,
)
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import (
    ActivationPatching,
    EdgeAttribution,
    HeadScores,
    head_scores,
)
from lightning_mi.influence import (
    Direct,
    Group,
    InfluenceFunction,
    Objective,
    PerModule,
    PerToken,
    RandomDirections,
    Score,
    TracIn,
    influence_scores,
    tracin,
)
from lightning_mi.influence.point import Point
from lightning_mi.influence.queries import question_gradients
from lightning_mi.influence.queries_following import measured, slope_along
from lightning_mi.isolation import untouched
from lightning_mi.record import scalar

PROTOCOL = RepeatedTokens(length=4, sequences=3)


class Attention(nn.Module):
    """Two layers of attention alone, two heads each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, width), nn.Embedding(12, width)
        layers = [
            nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


def attention() -> nn.Module:
    torch.manual_seed(3)
    model = Attention().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


def texts() -> TensorDataset:
    return TensorDataset(torch.randint(0, 11, (6, 8), generator=torch.Generator().manual_seed(1)))


def gradient(model: nn.Module, query: Any, data: Any = None) -> Tensor:
    with untouched(model) as plain:
        indexed = None if data is None else IndexedData(data)
        point = Point(plain)
        return question_gradients(point, Objective(task(model)), query, indexed, None).gradients


def task(model: nn.Module) -> Task:
    return NextToken() if isinstance(model, Language | Attention) else Classification()


def behavior() -> Behavior:
    ids = torch.randint(0, 11, (2, 3, 8), generator=torch.Generator().manual_seed(2))
    return Behavior(ids[0], ids[1], target=LogitDifference(1, other=2))


# ------------------------------------------------------------------ scores of measurements


def test_the_gradient_of_a_head_score_is_that_of_the_pure_function() -> None:
    model = attention()
    found = gradient(model, Score(HeadScores(tokens=PROTOCOL), "induction", layer=1, head=0))
    ids = PROTOCOL.fitted(11, 12).tokens()
    value = head_scores(model, ids)["induction"][1, 0]
    own = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(own, model.parameters(), strict=True)
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )
    torch.testing.assert_close(found[0], -flat, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "query",
    [
        Score(HeadScores(tokens=PROTOCOL), "copy_gain"),
        Score(EdgeAttribution(behavior()), "edges", writer="L0H0", reader="L1H1.q"),
        Score(EdgeAttribution(behavior(), steps=2), "nodes", writer="L0H1"),
        Score(ActivationPatching(behavior()), "effect", layer=0, head=1),
        Score(ActivationPatching(behavior(), what="mlp"), "effect", layer=0, position=3),
    ],
    ids=str,
)
def test_gradients_of_circuits_are_slopes_in_other_directions(query: Score) -> None:
    model = attention()
    found = gradient(model, query)[0]
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(len(found), generator=generator, dtype=torch.float64)
    with untouched(model) as plain:
        point = Point(plain)

        def value(at: Point) -> Tensor:
            return measured(at, query.measurement, query.panel, query.index, None, NextToken())

        slope = slope_along(point, value, direction / direction.norm(), 1e-3) * direction.norm()
    assert abs(float(-found @ direction) / slope - 1) < 2e-2  # panels are in single precision


def test_a_positive_score_is_of_an_example_that_raises_the_measurement() -> None:
    model, data = attention(), texts()
    query = Score(HeadScores(tokens=PROTOCOL), "induction", layer=0, head=1)
    scores = tracin(model, NextToken(), data, None, query=query).values[0]
    for i in (int(scores.argmax()), int(scores.argmin())):
        rate = 1e-5
        ends = [value_of(stepped(model, data[i : i + 1], r)) for r in (rate, -rate)]
        assert abs((ends[0] - ends[1]) / (2 * rate) / float(scores[i]) - 1) < 0.02


def stepped(model: nn.Module, batch: Any, rate: float) -> nn.Module:
    """A step of gradient descent on one example."""
    moved = copy.deepcopy(model)
    NextToken().loss(moved(batch[0]), batch).sum().backward()
    with torch.no_grad():
        for p in moved.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    return moved


def value_of(model: nn.Module) -> float:
    records = measure(model, HeadScores(tokens=PROTOCOL), task=NextToken())
    (panel,) = (r.panel for r in records if r.what == "induction")
    return float(panel.values[0, 1])


def test_a_score_works_with_every_way_of_asking() -> None:
    model, data = attention(), texts()
    query = Score(HeadScores(tokens=PROTOCOL), "induction", layer=1, head=0)
    whole = influence_scores_quietly(
        model, NextToken(), data, query=[query, RandomDirections(2)], solver="ekfac", shown=0
    )
    assert whole.values.shape == (3, 6)
    assert whole.convention["rows"][0] == "head_scores/induction[layer=1, head=0]"
    assert whole.convention["slope_error"][0] < 0.01
    assert "would lower head_scores/induction[layer=1, head=0]" in whole.orientation
    context = Context(model, data[:3], NextToken(), dataset=IndexedData(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measurement = InfluenceFunction(query=query, solver="ekfac", top=0)
        records = measure(model, [measurement, TracIn(query=query)], context=context)
    (panel,) = (r.panel for r in records if r.name == "influence_function/scores")
    torch.testing.assert_close(panel.values[0], whole.values[0])
    assert "slope_error" in panel.convention
    assert panel.size["query"] == 1
    made_by = next(r.made_by for r in records if r.measurement == "influence_function")
    assert made_by["init_args"]["query"]["init_args"]["index"] == {"layer": 1, "head": 0}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (None, "would raise the query's loss"),
        (Loss(), "would raise the query's loss"),
        (Group(), "would raise the query's loss (mean over the group)"),
        (Margin(), "would lower the query"),
        (2, "would lower the query"),
        (Group(Margin()), "would lower the query"),
        (PerModule(Margin()), "would lower the query"),
        (PerModule(Group(Margin())), "would lower the query"),
    ],
)
def test_what_a_positive_score_says_of_queries_of_which_more_is_better(
    query: Any, says: str
) -> None:
    model, data = multilayer()
    assert says in tracin(model, Classification(), data, data, query=query).orientation


def test_the_model_is_left_as_it_was() -> None:
    model = attention().train()
    model.layers[0].eval()
    model.head.weight.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    for query in (
        Score(EdgeAttribution(behavior()), "nodes", writer="L0H0"),
        Score(HeadScores(tokens=PROTOCOL), "induction", layer=1, head=0),
        Score(ActivationPatching(behavior()), "effect", layer=0, head=0),
    ):
        gradient(model, query)
    with pytest.raises(RuntimeError, match="the user's own"):
        gradient(model, Score(Broken(), "value"))
    assert flags == [m.training for m in model.modules()]
    assert needs == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.embed.weight.grad, torch.ones_like(model.embed.weight))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.ones(1, requires_grad=True).detach().requires_grad  # nothing stays switched


@dataclass(frozen=True)
class Own:
    """A user's own measurement of a kind, each wrong in another way."""

    kind: str = "fine"
    name: str = "own"

    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        with torch.no_grad():
            weight = next(model.parameters())
            total = weight.square().sum()
        if self.kind == "steps":
            total = (weight * 10).round().sum()
        if self.kind == "stopped":
            total = total.detach() + weight.sum() - float(weight.sum())
        if self.kind == "constant":
            total = torch.tensor(3.0)
        if self.kind == "undefined":
            total = total * math.nan
        if self.kind == "tiny":
            total = 1e-7 * (5 * weight).sin().sum()
        return {"value": scalar(total)}


class Broken(Own):
    def __call__(self, model: nn.Module, context: Context) -> Mapping[str, Panel]:
        raise RuntimeError("the user's own")


def test_a_users_own_measurement_is_differentiated_through_no_grad() -> None:
    model, _ = multilayer()
    found = gradient(model, Score(Own(), "value"))[0]
    weight = next(model.parameters())
    torch.testing.assert_close(found[: weight.numel()], -2 * weight.detach().flatten())
    assert not found[weight.numel() :].any()


def test_a_tiny_measurement_is_not_measured_far_away() -> None:
    """Before training an edge's effect is 1e-7: a step that would change it by much is a leap."""
    model, _ = multilayer()
    found = gradient(model, Score(Own("tiny"), "value"))[0]
    weight = next(model.parameters()).detach().flatten()
    torch.testing.assert_close(found[: len(weight)], -5e-7 * (5 * weight).cos(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("steps", "does not move"),
        ("stopped", "off the measured slope"),
        ("constant", "does not move"),
        ("undefined", "nan"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(kind: str, message: str) -> None:
    model, _ = multilayer()
    with pytest.raises(ArgumentError, match=message):
        gradient(model, Score(Own(kind), "value"))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Score(Own(), "other"), "panel: expected one of"),
        (Score(Own(), "value", layer=0), "index"),
        (Score(HeadScores(tokens=PROTOCOL), "induction", layer=1), "index"),
        (Score(HeadScores(tokens=PROTOCOL), "induction", layer=1, head=9), "head: expected one of"),
        ([Margin()], "query: expected one target"),
        ([], "query: expected one target"),
        (PerModule(None, ["nothing"]), "modules"),
        (Group(groups=[[99]]), "groups"),
    ],
    ids=str,
)
def test_wrong_questions_are_named(query: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        influence_scores(attention(), NextToken(), texts(), texts(), query=query)


def test_arguments_are_checked_when_they_are_given() -> None:
    with pytest.raises(ArgumentError, match="measurement"):
        Score(HeadScores, "induction")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="groups"):
        Group(groups=[[]])
    with pytest.raises(ArgumentError, match="queries: expected a map-style dataset"):
        influence_scores(attention(), NextToken(), texts(), None, query=Group())
    with pytest.raises(ArgumentError, match="PerToken"):
        influence_scores(*small(), query=PerToken())
    solver = Foreign()
    with pytest.raises(ArgumentError, match="knows no more"):
        influence_scores(*small(), query=Group(), solver=solver)


class Foreign:
    def influences(self, train: Any, test: Any) -> Tensor:
        return torch.zeros(len(train))


def small() -> tuple[nn.Module, Task, Any, Any]:
    model, data = multilayer()
    return model, Classification(), data, data


# ------------------------------------------------------------------ groups, tokens, modules


def test_a_group_is_the_mean_of_its_examples() -> None:
    model, data = multilayer()
    single = gradient(model, Margin(), data)
    groups = gradient(model, Group(Margin(), [[0, 3], [1, 2, 4]]), data)
    torch.testing.assert_close(groups[0], single[[0, 3]].mean(0))
    torch.testing.assert_close(groups[1], single[[1, 2, 4]].mean(0))
    torch.testing.assert_close(gradient(model, Group(Margin()), data)[0], single.mean(0))


def test_tokens_add_up_to_the_loss() -> None:
    model, data = language()
    each = gradient(model, PerToken(example=2), data)
    assert len(each) == 6
    torch.testing.assert_close(each.mean(0), gradient(model, None, data)[2])


@pytest.mark.parametrize("solver", ["direct", "ekfac"])
def test_modules_add_up_to_the_score(solver: Any) -> None:
    model, data = multilayer()
    options: dict[str, Any] = {"solver": solver, "damping": 0.1}
    whole = influence_scores_quietly(model, Classification(), data, **options)
    parts = influence_scores_quietly(model, Classification(), data, query=PerModule(), **options)
    assert parts.convention["modules"] == ["0", "2"]
    summed = parts.values.reshape(len(whole.values), 2, -1).sum(1)
    torch.testing.assert_close(summed, whole.values)


def test_modules_of_a_score_and_the_rest() -> None:
    model = attention()
    query = Score(HeadScores(tokens=PROTOCOL), "induction", layer=1, head=0)
    parts = gradient(model, PerModule(query, ["layers.0", "embed"]))
    torch.testing.assert_close(parts.sum(0), gradient(model, query)[0])
    assert len(parts) == 3
    assert all(p.any() for p in parts)


def test_random_directions_are_drawn_alike() -> None:
    model, _ = multilayer()
    before = torch.get_rng_state()
    rows = gradient(model, RandomDirections(5, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert rows.norm(dim=1).sub(1).abs().max() < 1e-9
    assert torch.equal(rows, gradient(model, RandomDirections(5, seed=1)))
    assert not torch.equal(rows, gradient(model, RandomDirections(5, seed=2)))


def test_influence_of_a_group_predicts_removal() -> None:
    """A group's score is the mean of its examples' scores."""
    model, data = multilayer()
    options: dict[str, Any] = {"solver": Direct(), "damping": 0.05}
    single = influence_scores_quietly(model, Classification(), data, **options)
    group = influence_scores_quietly(
        model, Classification(), data, query=Group(groups=[[1, 5]]), **options
    )
    torch.testing.assert_close(group.values[0], single.values[[1, 5]].mean(0))


# ------------------------------------------------------------------ from YAML


def score_in_yaml() -> dict[str, Any]:
    heads = {"class_path": "lightning_mi.circuits.HeadScores"}
    return {
        "class_path": "lightning_mi.influence.Score",
        "init_args": {"measurement": heads, "panel": "induction"},
        "dict_kwargs": {"layer": 1, "head": 0},
    }


@pytest.mark.parametrize("measurement", ["InfluenceFunction", "TracIn", "TrainingInfluence"])
def test_a_score_from_yaml(measurement: str) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--measurements", type=list[Measurement])
    given = {
        "class_path": f"lightning_mi.influence.{measurement}",
        "init_args": {"query": score_in_yaml()},
    }
    (found,) = parser.instantiate(parser.parse_object({"measurements": [given]})).measurements
    assert found.query == Score(HeadScores(), "induction", layer=1, head=0)


def test_a_monitor_with_a_score_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    from lightning_mi.callbacks import InfluenceMonitor

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--monitor", type=InfluenceMonitor)
    options = {"query": score_in_yaml(), "method": "kfac", "damping": 0.1}
    given = {"class_path": "lightning_mi.callbacks.InfluenceMonitor", "init_args": options}
    found = parser.instantiate(parser.parse_object({"monitor": given})).monitor
    (measurement,) = found.measurements
    assert measurement.query == Score(HeadScores(), "induction", layer=1, head=0)
    assert (measurement.method, measurement.damping) == ("kfac", 0.1)
