"""The dashboard for Weights & Biases: which panels, in which order, over which axis; no account."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mi import Panel, Record, Run
from lightning_mi.__main__ import main
from lightning_mi.errors import ArgumentError, LightningMIError, RunError
from lightning_mi.sinks import WandbSink
from lightning_mi.sinks.wandb import build_workspace
from lightning_mi.sinks.workspace_keys import STANDARD, kinds_of, logged

HERE = importlib.util.find_spec("wandb_workspaces") is not None
needs_extra = pytest.mark.skipif(not HERE, reason="the extra 'workspace' is not installed")

HEADLINES = [
    "mi/induction",
    "mi/prev_token",
    "mi/copy_gain",
    "mi/icl_score",
    "mi/agree_ig",
    "mi/agree_sal",
    "mi/overhead",
    "mi/nonfinite",
]


def spec(workspace: Any) -> dict[str, Any]:
    """Return what would be sent, as plain JSON."""
    found: dict[str, Any] = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    return found["section"]


def sections(workspace: Any) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in spec(workspace)["panelBankConfig"]["sections"]}


def keys_of(panel: dict[str, Any]) -> list[str]:
    """Return the keys of one panel of the JSON."""
    config = panel["config"]
    if panel["viewType"] == "Weave":
        return [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]]
    return config.get("metrics") or config["mediaKeys"]


def all_keys(workspace: Any) -> list[str]:
    panels = [p for s in sections(workspace).values() for p in s["panels"]]
    return [key for panel in panels for key in keys_of(panel)]


class Fake:
    """Takes everything that a WandbLogger takes, and keeps the keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.experiment = SimpleNamespace(define_metric=lambda *a, **k: None, summary={}, config={})

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.keys += metrics


def record(name: str, values: Any, axes: tuple[str, ...] = (), step: int = 0) -> Record:
    return Record(name, Panel(torch.as_tensor(values), axes), step=step)


def firing(step: int) -> list[Record]:
    return [
        record("own/map", 0.5, (), step),  # a scalar, though its name is that of a picture
        record("own/speed", 2.0, (), step),
        record("saliency/values", [[0.0, 1.0, step]], ("example", "position"), step),
        record("saliency_drift/spearman", 0.9, (), step),
        record("head_scores/induction", [[0.1, 0.9]], ("layer", "head"), step),
        record("head_scores/induction_null", [[0.1, 0.1]], ("layer", "head"), step),
        record("monitor/overhead", 0.01, (), step),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(tmp_path / "mi", {"summary": {"induction_onset": 3}})
    for step in (0, 5):
        made.write_all(firing(step))
    made.write(record("saliency_drift/spearman_final", 1.0, (), 5))  # never sent to a logger
    made.write(record("other/x", 1.0, (), 5).replace(source="sweep"))
    made.report.write_text("<p>report</p>", encoding="utf-8")
    return made


class TestKeys:
    def test_are_those_that_the_sink_logs(self, run: Run) -> None:
        fake = Fake()
        sink = WandbSink(fake)
        for step in (0, 5):
            sink.write_all(firing(step))
        sink.finish(run, {})
        assert set(logged(run)) == set(fake.keys) - {"mi/step"}
        assert logged(run)["mi_own/map"] == "scalar"
        assert logged(run)["mi_head_scores/map"] == "media"

    def test_of_a_sweep_alone_are_those_it_measured(self, tmp_path: Path) -> None:
        swept = Run.create(tmp_path / "mi")
        swept.write_all(r.replace(source="sweep") for r in firing(5))
        assert "mi/induction" in logged(swept)

    def test_standard_ones_have_room_and_good_names(self) -> None:
        kinds = kinds_of(STANDARD)
        shown = [key for key in kinds if key.split("/")[1] not in ("image", "bars")]
        assert len(shown) == 25
        by_section = [key.split("/")[0] for key in shown]
        assert max(by_section.count(section) for section in by_section) == 8
        assert all(len(key) <= 13 for key in kinds if key.startswith("mi/"))

    @pytest.mark.parametrize("key", ["mixup/loss", "mi", "mi/", "train_loss", "mish/x"])
    def test_keys_of_others_are_refused(self, key: str) -> None:
        with pytest.raises(ArgumentError, match=r"keys: .*beside="):
            kinds_of([key])


@needs_extra
class TestWorkspace:
    def test_order_of_sections_and_headlines(self) -> None:
        made = sections(build_workspace("team", "project", beside=["train_loss"]))
        assert list(made) == [
            "Headlines",
            "Training",
            "Head scores",
            "Saliency",
            "Saliency drift",
            "Integrated gradients",
            "Integrated gradients drift",
            "Influence",
            "The run",
        ]
        assert [keys_of(p) for p in made["Headlines"]["panels"]] == [[k] for k in HEADLINES]
        assert [name for name, s in made.items() if s["pinned"]] == ["Headlines"]
        assert [p["viewType"] for p in made["The run"]["panels"]] == ["Media Browser", "Weave"]
        kinds = [p["viewType"] for p in made["Head scores"]["panels"]]
        assert kinds == ["Run History Line Plot"] * 4 + ["Media Browser"]

    def test_every_standard_key_stands_once(self) -> None:
        assert sorted(all_keys(build_workspace("team", "project"))) == sorted(STANDARD)

    def test_every_key_of_a_run_stands_once(self, run: Run) -> None:
        made = build_workspace("team", "project", run=run.path.parent)
        assert sorted(all_keys(made)) == sorted(logged(run))
        assert "Own" in sections(made)
        assert made.runset_settings.pinned_columns == [
            "run:displayName",
            "summary:induction_onset",
        ]

    def test_x_axis_is_ours_and_nothing_is_smoothed(self) -> None:
        whole = spec(build_workspace("team", "project", beside=["train_loss"]))
        settings = [whole["settings"]]
        settings += [s["localPanelSettings"] for s in whole["panelBankConfig"]["sections"]]
        for found in settings:
            assert found["xAxis"] == "mi/step"
            assert (found["smoothingType"], found["smoothingActive"]) == ("none", False)
        lines = [
            panel["config"]
            for section in whole["panelBankConfig"]["sections"]
            for panel in section["panels"]
            if panel["viewType"] == "Run History Line Plot"
        ]
        assert len(lines) == 8 + 1 + 4 + 2 + 1 + 2
        for config in lines:
            assert (config["xAxis"], config["smoothingType"]) == ("mi/step", "none")

    def test_titles_are_words(self) -> None:
        made = sections(build_workspace("team", "project"))
        titles = [
            p["config"]["chartTitle"]
            for s in made.values()
            for p in s["panels"]
            if p["viewType"] != "Weave"
        ]
        assert len(set(titles)) == len(titles)
        assert not [t for t in titles if "_" in t or "/" in t]
        assert "Induction, best head" in titles
        assert "Integrated gradients over steps" in titles

    def test_a_page_holds_the_panels(self) -> None:
        for section in sections(build_workspace("team", "project")).values():
            flow = section["flowConfig"]
            assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"])

    def test_keys_instead_of_a_run(self) -> None:
        keys = ["mi_own/x", "mi/mine", "mi/overhead", "mi/induction", "mi/step", "mi_own/x"]
        made = build_workspace("team", "project", keys=keys)
        assert all_keys(made) == ["mi/induction", "mi/mine", "mi/overhead", "mi_own/x"]

    def test_refusals(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=r"keys: .*beside run"):
            build_workspace("team", "project", run=run, keys=["mi/induction"])
        with pytest.raises(ArgumentError, match=r"entity: .*'a/b'"):
            build_workspace("a/b", "project")
        with pytest.raises(ArgumentError, match=r"project: .*''"):
            build_workspace("team", "")
        with pytest.raises(ArgumentError, match="keys: expected at least one key"):
            build_workspace("team", "project", keys=["mi/step"])
        with pytest.raises(ArgumentError, match="run: expected at least one key"):
            build_workspace("team", "project", run=Run.create(tmp_path / "empty"))
        with pytest.raises(RunError):
            build_workspace("team", "project", run=tmp_path / "nowhere")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LightningMIError, match=r"lightning-mi\[workspace\]"):
        build_workspace("team", "project")


class TestCommand:
    @pytest.fixture
    def saved(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Keep what would be saved."""
        kept: list[Any] = []
        monkeypatch.setattr(self.kind(), "save", lambda self: kept.append(self))
        return kept

    @staticmethod
    def kind() -> Any:
        return type(build_workspace("team", "project"))

    @needs_extra
    def test_saves(self, run: Run, saved: list[Any]) -> None:
        options = ["--run", str(run.path), "--beside", "train_loss", "--name", "mine"]
        assert main(["wandb-workspace", "team/project", *options]) == 0
        (made,) = saved
        assert (made.entity, made.project, made.name) == ("team", "project", "mine")
        assert sorted(all_keys(made)) == sorted([*logged(run), "train_loss"])

    @needs_extra
    @pytest.mark.parametrize("given", ["project", "a/b/c", "/project", "team/"])
    def test_malformed_project(self, given: str, saved: list[Any], capsys: Any) -> None:
        assert main(["wandb-workspace", given]) == 2
        assert saved == []
        said = capsys.readouterr().err
        assert said.startswith("lightning-mi: ENTITY/PROJECT: expected")
        assert said.count("\n") == 1

    @needs_extra
    def test_not_logged_in(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        from wandb.errors import UsageError

        def refuse(self: Any) -> None:
            raise UsageError("No API key configured.")

        monkeypatch.setattr(self.kind(), "save", refuse)
        assert main(["wandb-workspace", "team/project"]) == 2
        said = capsys.readouterr().err
        assert "UsageError: No API key configured." in said
        assert "wandb login" in said

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        for name in ("wandb_workspaces", "wandb_workspaces.workspaces"):
            monkeypatch.setitem(sys.modules, name, None)
        assert main(["wandb-workspace", "team/project"]) == 2
        assert "lightning-mi[workspace]" in capsys.readouterr().err
