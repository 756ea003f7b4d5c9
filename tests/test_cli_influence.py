"""``lightning-mi influence``: from a run folder and its checkpoints to proponents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mi import (
    ArgumentError,
    Classification,
    LogitDifference,
    Loss,
    Margin,
    Run,
)
from lightning_mi.__main__ import main
from lightning_mi.cli_influence import checkpoints_of, parsed_query, referred
from lightning_mi.influence import Score

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def _data(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=draw)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=draw))

def train():
    return _data(9, 1)

def queries():
    return _data(2, 2)

def decay(module):
    return 0.05 * sum(p.square().sum() for p in module.parameters())

class Size:
    name = "size"

    def __call__(self, module, context):
        from lightning_mi.record import scalar
        return {"total": scalar(sum(p.square().sum() for p in module.parameters()))}

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a batch, a script, and three checkpoints beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT)
    model = referred("mine.py:model", "--model")
    run = Run.create(tmp_path / "mi", {"model": "Sequential"})
    (tmp_path / "mi" / "records.jsonl").touch()
    run.save_batch(list(referred("mine.py:queries", "--queries").tensors))
    (tmp_path / "checkpoints").mkdir()
    for step in (2, 10, 4):
        state = {n: p * (1 + step / 10) for n, p in model.state_dict().items()}
        content = {"state_dict": state, "global_step": step}
        torch.save(content, tmp_path / "checkpoints" / f"step={step}.ckpt")
    return tmp_path


def call(folder: Path, *more: str) -> int:
    given = ["--model", "mine.py:model", "--train", "mine.py:train", *more]
    return main(["influence", str(folder / "mi"), *given])


def test_the_last_checkpoint_is_scored(folder: Path, capsys: Any) -> None:
    options = ("--solver", "cg", "--damping", "0.1", "--regularizer", "mine.py:decay")
    assert call(folder, *options, "--top", "2") == 0
    printed = capsys.readouterr().out
    run = Run.open(folder / "mi")
    (scores,) = run.records("influence_function/scores")
    assert (scores.step, scores.source) == (10, "sweep")
    model, data = (referred(f"mine.py:{name}", "x") for name in ("model", "train"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    from lightning_mi.influence import Objective, influence_scores

    decay = referred("mine.py:decay", "x", call=False)
    asked = referred("mine.py:queries", "x")
    with pytest.warns(UserWarning, match="far from a minimum"):
        expected = influence_scores(
            model, Objective(Classification(), regularizer=decay), data, asked, damping=0.1
        )
    torch.testing.assert_close(scores.panel.values, expected.values, rtol=1e-4, atol=1e-7)
    high, low = expected.top(k=2)
    for index in (*high, *low):
        assert f"train[{index}]" in printed
    assert "step 10: Loss" in printed
    assert "removing the example would raise the query's loss" in printed
    assert "gradient norm of the objective" in printed


def test_every_checkpoint_and_how_the_ranking_changes(folder: Path, capsys: Any) -> None:
    queries = ("--queries", "mine.py:queries", "--query", "margin")
    assert call(folder, "--all", *queries, "--report") == 0
    run = Run.open(folder / "mi")
    assert [r.step for r in run.records("influence_function/scores")] == [2, 4, 10]
    changes = run.records("influence_function/rank_correlation")
    assert [r.step for r in changes] == [4, 10]
    assert all(r.source == "sweep" for r in changes)
    assert run.report.exists()
    assert str(run.report) in capsys.readouterr().out


def test_a_measurement_of_ones_own(folder: Path, capsys: Any) -> None:
    assert call(folder, "--query", "mine.py:Size/total", "--candidates", "4") == 0
    printed = capsys.readouterr().out
    assert "would lower size/total" in printed
    (scores,) = Run.open(folder / "mi").records("influence_function/scores")
    assert scores.panel.size == {"query": 1, "train_example": 4}


def test_what_was_scored_before_is_not_told(folder: Path, capsys: Any) -> None:
    assert call(folder) == 0  # step 10
    capsys.readouterr()
    assert call(folder, "--query", "margin", "--checkpoints", "checkpoints/step=4.ckpt") == 0
    assert "step 4: Margin" in capsys.readouterr().out
    assert call(folder, "--all", "--name", "of_margin", "--query", "margin") == 0
    run = Run.open(folder / "mi")
    (loss,) = [r for r in run.records("influence_function/scores") if r.step == 10]
    assert loss.panel.convention["query"] == "Loss()"
    (mixed,) = run.records("influence_function/rank_correlation")
    assert mixed.panel.nonfinite
    assert "differ in" in mixed.panel.convention["reason"]
    assert all(not r.panel.nonfinite for r in run.records("of_margin/rank_correlation"))


TEXTS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def train():
    return TensorDataset(torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 3], [0, 0, 1]]))

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))

def letters(ids):
    return "".join("abcd"[i] for i in ids)

def bpe(size):
    return size
"""


def test_a_function_decodes_and_equal_texts_are_told_once(folder: Path, capsys: Any) -> None:
    (folder / "texts.py").write_text(TEXTS)
    model = referred("texts.py:model", "--model")
    torch.save({"state_dict": model.state_dict(), "global_step": 3}, folder / "texts.ckpt")
    run = Run.create(folder / "texts", {})
    (run.path / "records.jsonl").touch()
    given = ["--model", "texts.py:model", "--train", "texts.py:train", "--queries"]
    given += ["texts.py:train", "--checkpoints", "texts.ckpt", "--tokenizer", "texts.py:letters"]
    assert main(["influence", str(run.path), *given]) == 0
    assert "'bcd' and 1 equal" in capsys.readouterr().out
    assert main(["influence", str(run.path), *given, "--model", "texts.py:bpe"]) == 2
    assert "--model: expected an nn.Module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--query", "what"), "--query: expected loss"),
        (("--query", "logit:x"), "--query: expected loss"),
        (("--query", "head_scores/induction[layer]"), "axis=entry"),
        (("--query", "nowhere.py:Size/total"), "--query: expected file.py:name"),
        (("--solver", "magic"), "solver"),
        (("--queries", "mine.py:nothing"), "--queries: expected file.py:name"),
        (("--model", "mine.py:number"), "--model: expected an nn.Module"),
        (("--train", "no.such.module:x"), "--train: expected file.py:name"),
        (("--checkpoints", "nowhere"), "checkpoints"),
        (("--damping", "-1"), "damping"),
    ],
)
def test_mistakes_are_said_without_a_traceback(
    folder: Path, more: tuple[str, ...], message: str, capsys: Any
) -> None:
    assert call(folder, *more) == 2
    assert message in capsys.readouterr().err
    assert not Run.open(folder / "mi").records()


def test_queries_by_name() -> None:
    assert parsed_query("loss") == Loss()
    assert parsed_query("margin") == Margin()
    assert parsed_query("logit-difference:2") == LogitDifference(2)
    score = parsed_query("head_scores/induction[layer=1, head=0]")
    assert isinstance(score, Score)
    assert score.index == {"layer": 1, "head": 0}
    assert parsed_query("head_scores/copy_gain").index == {}


def test_checkpoints_beside_a_run(folder: Path, tmp_path: Path) -> None:
    found = checkpoints_of(None, folder / "mi", every=True)
    assert [p.name for p in found] == ["step=2.ckpt", "step=4.ckpt", "step=10.ckpt"]
    (folder / "scheduled_checkpoints").mkdir()
    again = folder / "scheduled_checkpoints" / "again.ckpt"
    again.write_bytes((folder / "checkpoints" / "step=4.ckpt").read_bytes())
    once = checkpoints_of(None, folder / "mi", every=True)
    assert [p.name for p in once] == ["step=2.ckpt", "again.ckpt", "step=10.ckpt"]
    (last,) = checkpoints_of([folder / "checkpoints"], folder / "mi", every=False)
    assert last.name == "step=10.ckpt"
    with pytest.raises(ArgumentError, match="none beside"):
        checkpoints_of(None, tmp_path / "elsewhere" / "mi", every=False)
