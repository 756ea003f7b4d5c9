"""Evaluations of influence as measurements: in notebooks, over checkpoints, from YAML."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_influence_evaluate import blobs, decay, fitted, line
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mi import (
    ArgumentError,
    Classification,
    Context,
    IndexedData,
    Measurement,
    Regression,
    Run,
    RunError,
    measure,
    sweep,
)
from lightning_mi.circuits import HeadScores
from lightning_mi.influence import (
    InfluenceFunction,
    Objective,
    Score,
    TracIn,
    influence_scores,
)
from lightning_mi.influence.evaluate import (
    LinearDatamodelingScore,
    MislabelDetection,
    Subsets,
    TailPatching,
    lds,
    mislabel_auc,
    query_losses,
    retrain_subsets,
    tail_patch,
)

QUERIES = 5


def retrained() -> tuple[nn.Module, TensorDataset, list[Tensor], Subsets]:
    """Ridge regression, its data, the measured batch, and the losses of models of halves."""
    model, data = line()
    x, y = data.tensors
    batch = [x[:QUERIES] + 0.5, y[:QUERIES]]
    goal, queries = Objective(Regression()), TensorDataset(*batch)

    def retrain(indices: Any, seed: int) -> Tensor:
        rows = list(indices)
        return query_losses(fitted(x[rows], y[rows]), goal, queries)

    return model, data, batch, retrain_subsets(retrain, len(data), subsets=12, seeds=(0,))


def method(**options: Any) -> InfluenceFunction:
    given = {"queries": QUERIES, "solver": "exact", "damping": 0.0, "regularizer": decay}
    return InfluenceFunction(**{**given, **options})


def test_the_datamodeling_score_is_that_of_the_function(tmp_path: Path) -> None:
    model, data, batch, known = retrained()
    known.save(tmp_path / "halves.pt")
    context = Context(model, batch, Regression(), dataset=IndexedData(data))
    goal = Objective(Regression(), regularizer=decay)
    scores = influence_scores(model, goal, data, TensorDataset(*batch), solver="exact", damping=0.0)
    expected = lds(scores, known)
    assert expected.mean > 0.8
    measured = LinearDatamodelingScore(retrained=str(tmp_path / "halves.pt"), method=method())
    records = {r.what: r for r in measure(model, measured, context=context)}
    assert records["lds"].name == "influence_lds/lds"
    assert records["lds"].panel.item() == pytest.approx(expected.mean)
    assert torch.allclose(records["values"].panel.values, expected.values)
    said = records["lds"].panel.convention
    assert said["scores"] == "influence_function"
    assert said["solver"] == "exact"
    assert said["subsets"] == 12
    short = LinearDatamodelingScore(retrained=known, method=method(queries=2))
    with pytest.raises(ArgumentError, match="losses of 2 queries"):
        measure(model, short, context=context)


def test_the_file_is_read_again_only_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, batch, known = retrained()
    known.save(tmp_path / "halves.pt")
    read: list[Path] = []
    load = Subsets.load

    def counted(path: Path) -> Subsets:
        read.append(path)
        return load(path)

    monkeypatch.setattr(Subsets, "load", counted)
    judge = LinearDatamodelingScore(retrained=tmp_path / "halves.pt", method=method())
    context = Context(model, batch, Regression(), dataset=IndexedData(data))

    def ask() -> float:
        records = measure(model, judge, context=context)
        return next(r.panel.item() for r in records if r.what == "lds")

    first = ask()
    assert ask() == first
    assert len(read) == 1
    Subsets(known.members[:10], -known.losses[:10]).save(tmp_path / "halves.pt")
    assert ask() < 0 < first
    assert len(read) == 2


def test_a_sweep_shows_when_scores_begin_to_foretell(tmp_path: Path) -> None:
    """At the end of training they do; of weights that know nothing they need not."""
    model, data, batch, known = retrained()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, scale in ((0, 0.0), (10, 0.5), (20, 1.0)):
        state = {k: scale * v for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, "global_step": step}, folder / f"step={step}.ckpt")
    kept = copy.deepcopy(model.state_dict())
    run = sweep(
        folder,
        model,
        LinearDatamodelingScore(retrained=known, method=method()),
        batch=batch,
        task=Regression(),
        dataset=data,
        run=tmp_path / "mi",
    )
    found = Run.open(run.path).records("influence_lds/lds")
    assert [r.step for r in found] == [0, 10, 20]
    values = [r.panel.item() for r in found]
    assert values[2] > 0.8
    assert values[2] > values[0]
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())


def test_wrong_labels_are_found_at_a_checkpoint() -> None:
    model, data, wrong = blobs()
    context = Context(model, list(data[:4]), Classification(), dataset=IndexedData(data))
    records = {
        r.what: r.panel
        for r in measure(model, MislabelDetection(wrong=wrong, solver="exact"), context=context)
    }
    expected = mislabel_auc(model, Objective(Classification()), data, wrong, solver="exact")
    assert set(records) == {"self_influence", "loss", "gradient_norm", "scores"}
    assert records["self_influence"].item() == pytest.approx(expected.auc.mean)
    assert records["loss"].item() == pytest.approx(expected.areas["loss"].mean)
    with pytest.raises(ArgumentError, match="wrong"):
        measure(model, MislabelDetection(wrong=[]), context=context)


def test_a_step_on_proponents_at_a_checkpoint() -> None:
    model, data, _ = blobs()
    rates = {n: 1e-3 for n, _ in model.named_parameters()}
    context = Context(
        model,
        list(data[:6]),
        Classification(),
        dataset=IndexedData(data),
        learning_rates=rates,
    )
    scored = TracIn(queries=6)
    measured = TailPatching(method=scored, k=3)
    records = {r.what: r.panel for r in measure(model, measured, context=context)}
    panel = measure(model, scored, context=context)[0].panel
    goal, queries = Objective(Classification()), TensorDataset(*data[:6])
    scores = influence_scores_of(panel)
    expected = tail_patch(model, goal, data, queries, scores, k=3, learning_rate=1e-3)
    assert torch.allclose(records["fall"].values, expected.falls.to(records["fall"].values))
    assert torch.allclose(records["random"].values, expected.random.to(records["fall"].values))
    assert records["margin"].item() > 0
    assert records["fall"].convention["scores"] == "influence"
    bare = Context(model, list(data[:6]), Classification(), dataset=IndexedData(data))
    with pytest.raises(ArgumentError, match="learning_rate"):
        measure(model, measured, context=bare)
    question = Score(HeadScores(), "induction", layer=0, head=0)
    with pytest.raises(ArgumentError, match=r"method: .*target"):
        TailPatching(method=TracIn(query=question), learning_rate=0.1).judge(model, bare, scores)


def influence_scores_of(panel: Any) -> Any:
    from lightning_mi.influence import InfluenceScores

    columns = tuple(panel.coords["train_example"])
    return InfluenceScores(panel.values.double(), columns, panel.convention["n"], "tracin")


def test_what_has_no_scores_is_refused() -> None:
    model, data, batch, known = retrained()
    context = Context(model, batch, Regression(), dataset=IndexedData(data))
    wrong = LinearDatamodelingScore(
        retrained=known, method=MislabelDetection(wrong=[0, 1], regularizer=decay)
    )
    with pytest.raises(ArgumentError, match=r"method: .*MislabelDetection"):
        measure(model, wrong, context=context)


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere"):
        Subsets.load(tmp_path / "nowhere.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(RunError, match=r"other\.pt.*KeyError"):
        Subsets.load(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(RunError, match=r"text\.pt"):
        Subsets.load(tmp_path / "text.pt")


def test_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--measurements", type=list[Measurement])
    place = "lightning_mi.influence.evaluate"
    inner = {"class_path": "lightning_mi.influence.TracIn", "init_args": {"queries": 3}}
    options = [
        {
            "class_path": f"{place}.LinearDatamodelingScore",
            "init_args": {"retrained": "halves.pt", "method": inner},
        },
        {"class_path": f"{place}.TailPatching", "init_args": {"k": 4, "learning_rate": 0.1}},
        {"class_path": f"{place}.MislabelDetection", "init_args": {"wrong": [1, 5]}},
    ]
    found = parser.instantiate(parser.parse_object({"measurements": options})).measurements
    assert found[0].retrained == "halves.pt"
    assert found[0].method == TracIn(queries=3)
    assert (found[1].k, found[1].learning_rate) == (4, 0.1)
    assert found[1].judged.name == "influence_function"
    assert list(found[2].wrong) == [1, 5]
