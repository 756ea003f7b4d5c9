"""The run folder: what is written is read back, whatever happened in between."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mi import ArgumentError, Panel, Record, Run, RunError
from lightning_mi.record import scalar
from lightning_mi.runs import INLINE

NAN, INF = math.nan, math.inf


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "mi")


def record(step: int = 1, value: float = 0.5, name: str = "m/value", **changes: Any) -> Record:
    return Record(name, scalar(value), step=step, **changes)


def values(run: Run, **which: Any) -> dict[int, float]:
    return {r.step: r.panel.item() for r in run.records(**which)}


# -------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor([NAN, INF, -INF, -0.0, 1e-45, 3.4e38]),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(4, 3).T,
        torch.tensor([2**62, -(2**62) + 1]),
        torch.tensor([True, False]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.zeros(0, 3),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.randn(INLINE + 1),
        torch.randn(40, 50).T,
        torch.full((INLINE + 1,), NAN, dtype=torch.float64),
        torch.arange(INLINE + 1) > 7,
    ],
)
def test_values_are_bit_equal(run: Run, tensor: torch.Tensor) -> None:
    panel = Panel(tensor, ("layer", "head")[: tensor.ndim])
    run.write(Record("m/values", panel, step=3))
    (found,) = Run.open(run.path).records()
    assert found.panel.equal(panel)
    if tensor.is_floating_point() and tensor.numel():
        assert torch.equal(found.panel.values.signbit(), panel.values.signbit())
    is_large = tensor.numel() > INLINE
    assert [p.name for p in (run.path / "arrays").iterdir()] == ["m.values.3.live.npy"] * is_large


def test_everything_beside_the_values_is_kept(run: Run) -> None:
    text = ["nan", "inf", "\n", "é", "\u2028", "\ud800", '"']
    panel = Panel(
        torch.zeros(7, 2),
        ("position", "head"),
        {"position": text, "position,head": [[0.5, NAN]] * 7},
        "nats",
        {"floor": NAN, "top": [INF, -INF], "nested": {"text": "nan", "none": None}},
    )
    made_by = {"class_path": "a.B", "init_args": {"limit": INF}}
    kept = Record("m/x", panel, 3, 2, 100, 2**40, "average", "sweep", made_by)
    run.write(kept)
    (found,) = Run.open(run.path).records()
    fields = ("name", "step", "epoch", "samples", "tokens", "weights", "source", "made_by")
    assert [getattr(found, f) for f in fields] == [getattr(kept, f) for f in fields]
    assert found.panel.coords["position"] == text
    assert math.isnan(found.panel.coords["position,head"][0][1])
    assert math.isnan(found.panel.convention["floor"])
    assert found.panel.convention["top"] == [INF, -INF]
    assert found.panel.convention["nested"] == {"text": "nan", "none": None}
    assert found.panel.unit == "nats"
    for line in (run.path / "records.jsonl").read_text("utf-8").strip().split("\n"):
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_line_is_on_disk_when_write_returns(run: Run) -> None:
    run.write(record(1))
    assert values(Run.open(run.path)) == {1: 0.5}
    run.write_all([record(2), record(3)])
    assert list(values(Run.open(run.path))) == [1, 2, 3]


def test_of_one_key_the_last_line_counts(run: Run) -> None:
    run.write_all([record(2, 0.25), record(1), record(2, 0.75), record(2, 9, source="sweep")])
    assert values(run, source="live") == {1: 0.5, 2: 0.75}
    assert values(run, source="sweep") == {2: 9}
    assert len(run.records()) == 3


def test_large_arrays_of_live_and_sweep_are_two_files(run: Run) -> None:
    live, sweep = torch.zeros(2000), torch.ones(2000)
    run.write(Record("m/x", Panel(live, ("token",)), step=1))
    run.write(Record("m/x", Panel(sweep, ("token",)), step=1, source="sweep"))
    assert [float(r.panel.values[0]) for r in run.records()] == [0, 1]


def test_records_by_name_in_order_of_step(run: Run) -> None:
    run.write_all([record(3), record(1), record(1, name="m/other"), record(1, name="mm/value")])
    assert [r.step for r in run.records("m/value")] == [1, 3]
    assert len(run.records("m")) == 3, "a measurement is no prefix of another"
    assert run.names() == ["m/value", "m/other", "mm/value"]
    assert run.records("nothing") == []


def test_the_recipe_in_force_is_attached(run: Run) -> None:
    run.write(record(1, made_by={"n": 1}))
    run.write(record(2, made_by={"n": 1}))
    run.write(record(3, made_by={"n": 2}))
    run.write(record(4, name="other/value", made_by={"n": 3}))
    run.write(record(5, made_by={"n": 2}))
    assert [r.made_by["n"] for r in run.records()] == [1, 1, 2, 3, 2]
    assert (run.path / "records.jsonl").read_text().count("recipe") == 3


def test_lines_of_a_later_version_are_passed_over(run: Run) -> None:
    run.write(record(1))
    with (run.path / "records.jsonl").open("a") as file:
        file.write('{"kind": "note", "text": "unknown"}\n')
    assert values(run) == {1: 0.5}
    assert run.names() == ["m/value"]


# -------------------------------------------------------------------- torn and continued


@pytest.mark.parametrize(
    "tail", ['{"name": "m/value", "st', '{"name": "\xc3', "{", "12", '"te', "\0"]
)
def test_a_torn_last_line_warns_and_is_not_fatal(run: Run, tail: str) -> None:
    run.write(record(1))
    with (run.path / "records.jsonl").open("ab") as file:
        file.write(tail.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"records\.jsonl: skipped 1 unfinished line"):
        assert values(Run.open(run.path)) == {1: 0.5}


@pytest.mark.parametrize("how", ["create", "open"])
def test_writing_goes_on_after_a_torn_line(run: Run, how: str) -> None:
    run.write(record(1))
    with (run.path / "records.jsonl").open("a") as file:
        file.write('{"name": "m/value", "step": 2, "va')
    again = Run.create(run.path) if how == "create" else Run.open(run.path)
    again.write(record(2, 0.25, made_by={"n": 2}))
    with pytest.warns(UserWarning, match="skipped 1 unfinished"):
        found = again.records()
    assert [(r.step, r.panel.item(), r.made_by) for r in found] == [
        (1, 0.5, {}),
        (2, 0.25, {"n": 2}),
    ]


def test_a_line_whose_array_is_missing_is_skipped(run: Run) -> None:
    run.write(Record("m/x", Panel(torch.zeros(2000), ("token",))))
    run.write(record(1))
    next((run.path / "arrays").iterdir()).unlink()
    with pytest.warns(UserWarning, match="unfinished"):
        assert values(run) == {1: 0.5}


def test_a_run_can_be_copied_and_sent(run: Run) -> None:
    run.write(record(1))
    for twin in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        twin.write(record(2))
    run.write(record(3))
    assert list(values(run)) == [1, 2, 3]


WRITER = """
import sys, torch
from lightning_mi import Panel, Record, Run
run, first = Run.create(sys.argv[1]), int(sys.argv[2])
for step in range(first, 10**6):
    big = torch.full((1500 if step % 3 == 0 else 5,), float(step))
    run.write(Record("m/x", Panel(big, ("token",)), step=step, made_by={"start": first}))
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


# One process imports and forks: importing torch twenty times would take a minute.
PARENT = """
import os, sys
import torch, lightning_mi
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        sys.argv = ["", sys.argv[1], line]
        exec(sys.argv[1:] and WRITER)
    os.close(write)
    os.write(1, b"%d\\n" % child)
    while piece := os.read(read, 65536):
        os.write(1, piece)
    os.waitpid(child, 0)
    os.close(read)
    os.write(1, b"dead\\n")
"""


def steps_until_killed(parent: Any, first: int, wanted: int, delay: float) -> list[int]:
    """Let a child write, kill it after ``wanted`` steps, return the steps it acknowledged."""
    parent.stdin.write(f"{first}\n")
    parent.stdin.flush()
    child, seen = int(parent.stdout.readline()), []
    for line in iter(parent.stdout.readline, "dead\n"):
        seen.append(int(line))
        if len(seen) == wanted:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    return seen


def test_what_was_written_before_a_kill_is_readable(tmp_path: Path) -> None:
    rng, first = random.Random(0), 0
    acknowledged: set[int] = set()
    code = PARENT.replace("sys.argv[1:] and WRITER", repr(WRITER))
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        for _ in range(20):
            seen = steps_until_killed(parent, first, rng.randint(1, 40), rng.random() * 2e-3)
            acknowledged.update(seen)
            first = max(seen)  # as from a checkpoint: the last step is taken once more
    check_all_there(tmp_path, acknowledged)


@pytest.mark.filterwarnings("ignore:.*unfinished line:UserWarning")
def check_all_there(path: Path, acknowledged: set[int]) -> None:
    found = Run.open(path).records("m/x")
    steps = [r.step for r in found]
    assert len(acknowledged) > 100
    assert acknowledged <= set(steps)
    assert len(set(steps)) == len(steps)
    for r in found:
        assert r.panel.values.unique().tolist() == [r.step]
        assert r.made_by["start"] <= r.step


# -------------------------------------------------------------------- folders


def test_opening(tmp_path: Path, run: Run) -> None:
    assert Run.open(tmp_path).path == run.path
    assert Run.open(str(run.path)).path == run.path
    with pytest.raises(RunError, match=r"path: expected a run folder .*got '.*nowhere'"):
        Run.open(tmp_path / "nowhere")


@pytest.mark.parametrize("inside", ["", "sub/mi"])
def test_an_unwritable_folder_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")  # root may write everywhere, but not into a file
    with pytest.raises(
        RunError, match=r"dirpath: expected a folder that can be written, got '.*fi"
    ):
        Run.create(tmp_path / "file" / inside)


def test_a_folder_that_vanishes_is_named(run: Run) -> None:
    (run.path / "records.jsonl").unlink()
    (run.path / "arrays").rmdir()
    (run.path / "run.json").unlink()
    run.path.rmdir()
    with pytest.raises(RunError, match="run: expected a folder that can be written"):
        run.write(record(1))


def test_a_folder_without_records_is_empty(tmp_path: Path) -> None:
    assert Run(tmp_path).records() == []
    assert Run(tmp_path).info == {}
    assert Run(tmp_path).batch() is None


def test_facts_are_merged(run: Run) -> None:
    run.update_info(model="GPT", sizes=(1, 2), loss=NAN)
    again = Run.create(run.path, {"seed": np.int64(3)})
    assert again.info == {"format": 1, "model": "GPT", "sizes": [1, 2], "loss": "nan", "seed": 3}
    assert run.report.name == "report.html"
    assert [p.name for p in run.path.iterdir() if "part" in p.name] == []


def test_the_batch_is_kept(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    x = torch.randn(2, 3)
    run.save_batch(transformers.BatchEncoding({"x": x, "n": np.arange(2), "text": ["a", "b"]}))
    found = run.batch()
    assert type(found) is dict
    assert torch.equal(found["x"], x)
    assert found["n"].tolist() == [0, 1]
    assert found["text"] == ["a", "b"]


def test_a_batch_with_objects_is_not_loaded(run: Run) -> None:
    run.save_batch((torch.ones(1), Path("a")))
    with pytest.raises(RunError, match="batch: expected tensors and built-in types"):
        run.batch()


# -------------------------------------------------------------------- labelled arrays


def scores(step: int, **changes: Any) -> Record:
    panel = Panel(torch.full((2, 3), float(step)), ("layer", "head"), {"head": list("abc")}, "1")
    return Record("head_scores/induction", panel, step=step, samples=8 * step, **changes)


def test_dimensions_and_moments(run: Run) -> None:
    run.write_all([scores(4), scores(0), record(4, name="head_scores/icl", samples=32)])
    run.write(record(2))
    data = run.dataset("head_scores")
    assert data["induction"].dims == ("step", "layer", "head")
    assert data["induction"].sel(step=4, head="b", layer=1) == 4
    assert data["icl"].sel(step=4) == 0.5
    assert bool(data["icl"].sel(step=0).isnull())
    assert data["step"].values.tolist() == [0, 4]
    assert data["samples"].sel(step=4) == 32
    assert bool(data["tokens"].isnull().all())


def test_live_records_come_first(run: Run) -> None:
    run.write_all([scores(1), scores(2, source="sweep")])
    assert run.dataset("head_scores")["step"].values.tolist() == [1]
    assert run.dataset("head_scores", source="sweep")["step"].values.tolist() == [2]


def test_labels_that_differ_are_aligned(run: Run) -> None:
    for step, labels in ((1, [7, 3]), (2, [3, 9])):
        panel = Panel([1.0 * step, 10.0 * step], ("train_example",), {"train_example": labels})
        run.write(Record("influence/values", panel, step=step))
    data = run.dataset("influence")["values"]
    assert sorted(data["train_example"].values.tolist()) == [3, 7, 9]
    assert data.sel(train_example=3).values.tolist() == [10, 2]
    assert math.isnan(data.sel(step=1, train_example=9))


def test_labels_that_repeat_are_counted_instead(run: Run) -> None:
    for step, text in ((1, ["the", "cat", "the"]), (2, ["a", "a", "b"])):
        panel = Panel([1.0, 2, 3], ("position",), {"position": text})
        run.write(Record("saliency/values", panel, step=step))
    data = run.dataset("saliency")["values"]
    assert data["position"].values.tolist() == [0, 1, 2]
    assert data.values.tolist() == [[1, 2, 3]] * 2


def test_an_unknown_measurement_is_named(run: Run) -> None:
    run.write(record(1))
    with pytest.raises(ArgumentError, match=r"measurement: expected one of \['m'\], got 'x'"):
        run.dataset("x")
