"""What reaches the loggers: keys, pictures, and nothing lost in any of them."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _wandb
import numpy as np
import pytest
import torch
from cases import PACKAGES, language_model, lightning, loaders, trainer

from lightning_mi import Context, Panel, Reading, Record, Run
from lightning_mi.callbacks import MeasurementMonitor
from lightning_mi.errors import ArgumentError
from lightning_mi.record import scalar
from lightning_mi.sinks import (
    CSVSink,
    Guarded,
    MLFlowSink,
    ScalarSink,
    TensorBoardSink,
    WandbSink,
    plan,
    sinks_for,
)
from lightning_mi.sinks.base import _say_once
from lightning_mi.sinks.canvas import BLUE, INK, ORANGE, VIOLET, blend, ink_on
from lightning_mi.sinks.examples import examples_html, examples_markdown, examples_of
from lightning_mi.sinks.head_map import chance
from lightning_mi.sinks.longtable import COLUMNS, long_table
from lightning_mi.sinks.pictures import Scales, caption, draw

HEADS = ("layer", "head")
STRIP = ("example", "position")
NAN = math.nan


def record(
    name: str, values: Any, axes: tuple[str, ...] = (), step: int = 4, **more: Any
) -> Record:
    coords = more.pop("coords", {})
    return Record(name, Panel(torch.as_tensor(values), axes, coords, "1", more), step=step)


def firing(step: int = 4) -> list[Record]:
    """Return records of every kind that is shown."""
    texts = [["Ġthe", "Ġ<b>", "Ċ"], ["a", "&", "é"]]
    tokens = {"example,position": texts}
    shown = {"train_example": [7, 9], "train_example,position": texts}
    return [
        record("head_scores/induction", [[0.1, 0.9], [NAN, 0.2]], HEADS, step, null=0.05),
        record("head_scores/induction_null", [[0.1, 0.1], [0.1, 0.1]], HEADS, step),
        record("head_scores/copy_gain", 0.5, (), step),
        record("saliency/values", [[0.0, 1, 3], [1, 1, 1.0]], STRIP, step, coords=tokens),
        record("vision/values", torch.zeros(1, 1, 4, 6), ("example", "channel", "y", "x"), step),
        record("table/values", [[1.0, -2.0]], ("example", "feature"), step),
        record(
            "influence/tokens",
            [[0.5, -0.1, 0.2], [NAN, -0.3, -0.1]],
            ("train_example", "position"),
            step,
            coords=shown,
        ),
    ]


@dataclass(frozen=True)
class Everything:
    """A measurement with every kind of panel."""

    name: str = "head_scores"

    def __call__(self, model: torch.nn.Module, context: Context) -> Reading:
        return {r.what: r.panel for r in firing() if r.measurement == "head_scores"} | {
            "strip": Panel(torch.rand(1, 3), STRIP)
        }


class Keeper:
    """A logger of no known kind."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((metrics, step))


class TestKeys:
    def test_defaults_follow_axes_and_names(self) -> None:
        planned = plan(firing())
        assert dict(planned.scalars) == {
            "mi/induction": pytest.approx(0.9),
            "mi_head_scores/induction_1": pytest.approx(0.9),
            "mi/copy_gain": 0.5,
            "mi/nonfinite": 2.0,
            "mi/step": 4.0,
        }
        assert [(shown.key, shown.kind) for shown in planned.pictures] == [
            ("mi_head_scores/map", "map"),
            ("mi_saliency/strip", "strip"),
            ("mi_vision/image", "image"),
            ("mi_table/bars", "bars"),
            ("mi_influence/top", "examples"),
        ]

    def test_panel_decides(self) -> None:
        gap = record("integrated_gradients/gap", [0.1, -0.4, NAN], ("example",))
        gap = gap.replace(panel=Panel(gap.panel.values, ("example",), {}, "1", {"display": {}}))
        assert set(plan([gap]).scalars) == {"mi/step", "mi/nonfinite"}
        for wanted, key, value in [
            ({"scalar": "gap"}, "mi_integrated_gradients/gap", 0.4),
            ({"headline": "agree_ig"}, "mi/agree_ig", 0.1),
            ({"ranks": 2}, "mi_integrated_gradients/gap_2", -0.4),
        ]:
            panel = Panel(gap.panel.values, ("example",), {}, "1", {"display": wanted})
            assert plan([gap.replace(panel=panel)]).scalars[key] == pytest.approx(value)

    def test_booleans_and_counts(self) -> None:
        done = Panel(
            torch.tensor([True, False]), ("example",), {}, "1", {"display": {"scalar": "c"}}
        )
        assert plan([Record("m/c", done)]).scalars["mi_m/c"] == 1.0

    def test_bare_picture_is_enough(self) -> None:
        panel = Panel([1.0], ("train_example",), {}, "1", {"picture": "examples"})
        assert [s.key for s in plan([Record("influence/proponents", panel)]).pictures] == [
            "mi_influence/top"
        ]

    def test_unknown_picture_is_refused(self) -> None:
        panel = Panel([1.0], ("token",), {}, "1", {"display": {"picture": "pie"}})
        with pytest.raises(ArgumentError, match=r"display of a/b: .*'pie'"):
            plan([Record("a/b", panel)])

    def test_at_most_eight_keys_a_section(self) -> None:
        many = [record(f"head_scores/s{i}", [[0.1, 0.2]], HEADS) for i in range(12)]
        many += [record(f"other/x{i}", 1.0, display={"headline": f"h{i}"}) for i in range(12)]
        planned = plan(many)
        keys = [*planned.scalars, *(s.key for s in planned.pictures)]
        sections = [key.split("/")[0] for key in keys if key != "mi/step"]
        assert sections.count("mi_head_scores") == 8
        assert sections.count("mi") == 8
        assert "mi/nonfinite" in keys

    def test_which_keys_are_kept_does_not_depend_on_nan(self) -> None:
        good = [record(f"m/x{i}", float(i)) for i in range(10)]
        bad = [record("m/x0", NAN), *good[1:]]
        assert set(plan(good).scalars) - set(plan(bad).scalars) == {"mi_m/x0"}

    def test_nothing_finite(self) -> None:
        planned = plan([record("head_scores/induction", [[NAN, math.inf]], HEADS)])
        assert dict(planned.scalars) == {"mi/nonfinite": 2.0, "mi/step": 4.0}


class TestPictures:
    def drawn(self, *records: Record, scales: Scales | None = None) -> Any:
        (shown,) = plan(records).pictures
        return draw(shown, scales or Scales())

    @pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 4), (12, 12), (48, 64)])
    def test_map_starts_at_chance(self, layers: int, heads: int) -> None:
        values = torch.full((layers, heads), 0.2)
        values[0, 0] = 1.0
        image = self.drawn(record("head_scores/induction", values, HEADS, null=0.2))
        cell = max(6, min(38, 420 // heads))
        first = image[54 + 2, 34 + 2]
        last = image[54 + cell * (layers - 1) + 2, 34 + cell * (heads - 1) + 2]
        assert image.dtype == np.uint8
        assert tuple(first.tolist()) == VIOLET
        assert tuple(last.tolist()) == (VIOLET if layers * heads == 1 else (255, 255, 255))

    def test_chance_may_be_a_panel_of_its_own(self) -> None:
        score = record("head_scores/induction", [[0.25, 1.0]], HEADS, null="uniform")
        null = record("head_scores/induction_null", [[0.2, 0.3]], HEADS, display={})
        assert chance(score, [null, score]) == pytest.approx(0.25)
        image = self.drawn(score, null)
        assert tuple(image[56, 36].tolist()) == (255, 255, 255)
        assert tuple(self.drawn(score)[56, 36].tolist()) != (255, 255, 255)

    def test_signed_strip_supports_in_blue(self) -> None:
        image = self.drawn(record("ig/values", [[1.0, -1.0, 0.0]], STRIP))
        colours = {tuple(c) for c in image.reshape(-1, 3).tolist()}
        assert {BLUE, ORANGE} <= colours
        unsigned = self.drawn(record("s/values", [[1.0, 0.0, 0.0]], STRIP, sign="none"))
        colours = {tuple(c) for c in unsigned.reshape(-1, 3).tolist()}
        assert INK in colours
        assert BLUE not in colours

    def test_scale_has_a_floor_and_never_shrinks(self) -> None:
        scales = Scales()
        (flat,) = plan([record("s/values", [[1.0] * 30], STRIP)]).pictures
        assert scales.of(flat) == pytest.approx(0.1)  # Three even shares of 30.
        (peak,) = plan([record("s/values", [[1.0] + [0.0] * 29], STRIP)]).pictures
        assert scales.of(peak) == 1.0
        assert scales.of(flat) == 1.0

    @pytest.mark.parametrize(
        ("values", "axes"),
        [
            (torch.zeros(2, 3, 4, 6), ("example", "channel", "y", "x")),
            (torch.full((1, 1, 5, 3), NAN), ("example", "channel", "y", "x")),
            (torch.randn(2, 7, 5), ("example", "y", "x")),
            (torch.randn(2, 3, 2, 4, 4), ("example", "channel", "position", "y", "x")),
        ],
    )
    def test_images_of_any_shape(self, values: torch.Tensor, axes: tuple[str, ...]) -> None:
        image = self.drawn(record("vision/values", values, axes))
        assert image.ndim == 3
        assert image.shape[2] == 3

    def test_image_colours_are_clipped_at_a_percentile(self) -> None:
        values = torch.rand(1, 1, 40, 40) + 0.5
        values[0, 0, 0, 0] = 1e6
        (shown,) = plan([record("v/values", values, ("example", "channel", "y", "x"))]).pictures
        assert Scales().of(shown) < 2

    def test_inputs_lie_under_the_heat(self) -> None:
        axes = ("example", "channel", "y", "x")
        heat = record("v/values", torch.zeros(1, 1, 8, 8), axes)
        picture = torch.rand(1, 3, 8, 8)
        beneath = record("v/inputs", picture, axes, display={})
        grey = self.drawn(heat, beneath)[-140:-40, 5:160]
        assert len(np.unique(grey)) > 20
        assert (grey[..., 0] == grey[..., 1]).all()  # zero is the image itself
        assert len(np.unique(self.drawn(heat)[45:-40, 5:160])) == 1

    @pytest.mark.parametrize("values", [[[NAN, NAN]], [[0.0, 0.0]], [[math.inf, 1.0]]])
    @pytest.mark.parametrize(
        "axes", [HEADS, STRIP, ("example", "feature"), ("train_example", "position")]
    )
    def test_undefined_values_are_drawn(self, values: Any, axes: tuple[str, ...]) -> None:
        (shown,) = plan([record("m/values", values, axes)]).pictures
        if shown.kind == "examples":
            assert "step 4" in examples_html(shown.records, Scales().of(shown))
        else:
            assert draw(shown, Scales()).size

    def test_target_position_is_marked(self) -> None:
        plain = self.drawn(record("s/values", [[0.0] * 9], STRIP, sign="none"))
        marked = self.drawn(
            record("s/values", [[0.0] * 9], STRIP, sign="none", target_position=[8])
        )
        assert (plain != marked).any()

    def test_caption_has_step_and_top_head(self) -> None:
        (shown,) = plan(firing()[:2]).pictures
        assert caption(shown, Scales()) == "step 4 · induction L0H1 0.90"

    def test_no_figure_is_left_and_pyplot_never_loaded(self) -> None:
        for shown in plan(firing()).pictures:
            if shown.kind != "examples":
                draw(shown, Scales())
        gc.collect()
        pyplot = sys.modules.get("matplotlib.pyplot")
        assert pyplot is None or not pyplot.get_fignums()

    def test_text_on_colour_is_the_better_of_black_and_white(self) -> None:
        def luminance(c: tuple[int, ...]) -> float:
            linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else v / 255 / 12.92 for v in c]
            return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

        for colour in [BLUE, ORANGE, VIOLET, INK, blend(BLUE, 0.5), (118, 118, 118)]:
            light = luminance(colour)
            best = (0, 0, 0) if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else (255, 255, 255)
            assert ink_on(colour) == best


class TestExamples:
    def test_text_is_escaped(self) -> None:
        tokens = [r for r in firing() if r.name == "influence/tokens"]
        page = examples_html(tokens, 0.5)
        assert "<b> " not in page
        assert "&lt;b&gt;" in page
        words = examples_markdown(tokens)
        assert "<b>" not in words
        assert "&lt;b&gt;" in words

    def test_panels_are_joined_by_example(self) -> None:
        scores = record(
            "influence/proponents",
            [0.6],
            ("train_example",),
            coords={"train_example": [7]},
            descriptions=["Genesis <1>"],
            texts=["the <b>"],
            side="proponents",
            query_text="In the *beginning*",
        )
        tokens = [r for r in firing() if r.name == "influence/tokens"]
        (example,) = examples_of([scores, *tokens])
        assert (example.side, example.name, example.score) == (
            "proponents",
            "Genesis <1>",
            pytest.approx(0.6),
        )
        assert sum(example.shares) == pytest.approx(example.score)
        assert "Genesis &lt;1&gt;" in examples_html([scores, *tokens], 1.0)
        assert examples_of([scores])[0].pieces == ("the <b>",)
        assert "In the \\*beginning\\*" in examples_markdown([scores])


class TestTable:
    def test_long_format(self) -> None:
        rows = long_table(firing())
        assert len(COLUMNS) == len(rows[0])
        assert rows[1][:3] == ("head_scores/induction", 4, "layer=0 head=1")
        assert rows[2][3] is None  # NaN has no number.
        assert sum(row[0] == "saliency/values" for row in rows) == 6

    def test_thinned_evenly_with_both_ends(self) -> None:
        many = [record("a/b", torch.zeros(10), ("token",), step) for step in range(100)]
        rows = long_table(many, limit=100)
        steps = sorted({row[1] for row in rows})
        assert len(rows) <= 120
        assert (steps[0], steps[-1]) == (0, 99)


class TestWhichSink:
    @pytest.mark.parametrize("package", PACKAGES)
    def test_loggers_of_both_packages(self, package: str, tmp_path: Path, monkeypatch: Any) -> None:
        # Where another test imported it, the experiment of W&B's logger would be looked at.
        monkeypatch.delitem(sys.modules, "trackio", raising=False)
        kinds = lightning(package).loggers
        made = [
            kinds.WandbLogger(offline=True),
            kinds.TensorBoardLogger(tmp_path),
            kinds.MLFlowLogger.__new__(kinds.MLFlowLogger),
            kinds.CSVLogger(tmp_path),
            lightning(package).loggers.logger.DummyLogger(),
        ]
        chosen = [type(s.sink) for s in sinks_for(made) if isinstance(s, Guarded)]
        assert chosen == [WandbSink, TensorBoardSink, MLFlowSink, CSVSink]

    def test_subclasses_and_strangers(self, tmp_path: Path) -> None:
        base = lightning().loggers.TensorBoardLogger
        own = type("Own", (base,), {})(tmp_path)
        chosen = [s.sink for s in sinks_for([own, Keeper(), object()]) if isinstance(s, Guarded)]
        assert [type(sink) for sink in chosen] == [TensorBoardSink, ScalarSink]

    def test_scalars_in_one_call_with_step(self) -> None:
        keeper = Keeper()
        (sink,) = sinks_for([keeper])
        sink.write_all(firing())
        sink.write(record("a/b", 1.0, step=9))
        assert [step for _, step in keeper.calls] == [4, 9]
        assert keeper.calls[0][0]["mi/step"] == 4.0

    def test_undefined_values_add_up_over_a_step(self) -> None:
        keeper = Keeper()
        (sink,) = sinks_for([keeper])
        for step in (1, 1, 2):
            sink.write(record("a/b", NAN, step=step))
        sink.write(record("a/b", 0.5, step=2))
        assert [metrics["mi/nonfinite"] for metrics, _ in keeper.calls] == [1, 2, 1, 1]

    def test_told_once_what_is_lacking(self, caplog: Any, tmp_path: Path) -> None:
        made = [lightning().loggers.CSVLogger(tmp_path / str(i)) for i in range(2)]
        channel = logging.getLogger("pytorch_lightning")
        level = channel.level
        channel.setLevel(logging.INFO)
        _say_once.cache_clear()  # Another test may have heard it.
        try:
            for sink in sinks_for(made):
                sink.write_all(firing(1))
                sink.write_all(firing(2))
        finally:
            channel.setLevel(level)
        told = [m for m in caplog.messages if "pictures" in m]
        assert len(told) == 1
        assert told[0].startswith("CSVLogger")


class Raising:
    """A logger whose every call raises."""

    def __init__(self) -> None:
        self.calls = 0

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.calls += 1
        raise RuntimeError("disk full")


class TestGuard:
    def test_one_warning_then_silence(self, tmp_path: Path) -> None:
        raising, keeper = Raising(), Keeper()
        sinks = sinks_for([raising, keeper])
        run = Run.create(tmp_path)

        def everything() -> None:
            for sink in sinks:
                for step in range(3):
                    sink.write_all(firing(step))
                sink.finish(run, {"a": 1.0})

        with pytest.warns(UserWarning, match="Raising failed .RuntimeError: disk full") as caught:
            everything()
        assert len(caught) == 1
        assert raising.calls == 1
        assert len(keeper.calls) == 4

    @pytest.mark.parametrize("package", PACKAGES)
    def test_training_ends_normally(self, package: str, tmp_path: Path) -> None:
        base = lightning(package).loggers.CSVLogger

        def broken(self: Any, *args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

        class Broken(base):  # type: ignore[misc, valid-type]
            log_metrics = broken

        monitor = MeasurementMonitor(measurements=[Everything()], every_n_train_steps=1)
        options = {"callbacks": [monitor], "logger": Broken(tmp_path), "max_steps": 6}
        fitted = trainer(package, default_root_dir=tmp_path, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted.fit(language_model(package), *loaders())
        assert fitted.global_step == 6
        assert sum("no space left" in str(w.message) for w in caught) == 1
        (found,) = tmp_path.rglob("records.jsonl")
        steps = {r.step for r in Run.open(found.parent).records("head_scores")}
        assert {1, 2, 3, 4, 5, 6} <= steps

    def test_interrupt_passes(self) -> None:
        def stop(metrics: Any, step: int) -> None:
            raise KeyboardInterrupt

        (sink,) = sinks_for([SimpleNamespace(log_metrics=stop)])
        with pytest.raises(KeyboardInterrupt):
            sink.write_all(firing())


class TestCSV:
    def test_rows_of_both_survive(self, tmp_path: Path) -> None:
        logger = lightning().loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=2)
        (sink,) = sinks_for([logger])
        for step in range(1, 11):
            logger.log_metrics({"loss": float(step)}, step=step)
            sink.write_all(firing(step) if step % 3 == 0 else [record("late/x", 1.0, step=step)])
        sink.finish(Run.create(tmp_path / "mi"), {"onset": 6, "head": "L0H1"})
        logger.finalize("success")
        with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(r["step"]) for r in rows if r["loss"]] == list(range(1, 11))
        assert [float(r["mi/step"]) for r in rows if r["mi/step"]] == list(range(1, 11))
        assert [int(r["step"]) for r in rows if r["mi/induction"]] == [3, 6, 9]
        assert [float(r["mi_run/onset"]) for r in rows if r["mi_run/onset"]] == [6.0]


def tensorboard(folder: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder, {"scalars": 0, "images": 0, "tensors": 0}).Reload()


class TestTensorBoard:
    def test_scalars_images_and_text(self, tmp_path: Path) -> None:
        logger = lightning().loggers.TensorBoardLogger(tmp_path)
        (sink,) = sinks_for([logger])
        sink.start({"model": "tiny"})
        for step in (1, 2):
            sink.write_all(firing(step))
        sink.finish(Run.create(tmp_path / "mi"), {"onset": 1, "head": "L0H1"})
        logger.finalize("success")
        events = tensorboard(logger.log_dir)
        assert [e.step for e in events.Scalars("mi/induction")] == [1, 2]
        assert [e.step for e in events.Images("mi_head_scores/map")] == [1, 2]
        assert "mi_run/onset" in events.Tags()["scalars"]
        texts = events.Tags()["tensors"]
        for tag in ("mi_run/config", "mi_influence/top", "mi_run/summary"):
            assert f"{tag}/text_summary" in texts


class TestMLFlow:
    def test_metrics_images_and_files(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        logger = lightning().loggers.MLFlowLogger(save_dir=str(tmp_path / "ml"))
        run = Run.create(tmp_path / "mi")
        run.write_all(firing(1))
        run.report.write_text("<p>report</p>", encoding="utf-8")
        sink = MLFlowSink(logger)  # Unguarded: a failure must show.
        sink.start({"model": "tiny", "parameters": 3})
        for step in (1, 2):
            sink.write_all(firing(step))
        sink.finish(run, {"mi/onset": 1, "head": "L0H1"})
        client, run_id = logger.experiment, logger.run_id
        history = client.get_metric_history(run_id, "mi/induction")
        assert [metric.step for metric in history] == [1, 2]
        tags = client.get_run(run_id).data.tags
        assert (tags["lightning_mi.parameters"], tags["head"]) == ("3", "L0H1")
        logger.finalize("success")
        names = [path.name for path in (tmp_path / "ml").rglob("*") if path.is_file()]
        assert {"step_0000001.html", "step_0000002.html", "table.csv", "report.html"} <= set(names)
        assert sum("head_scores~map" in n and n.endswith(".png") for n in names) == 2


@pytest.fixture
def wandb_off() -> Any:
    """End a run that a failing test left open, or the next logger would take it over."""
    import wandb

    yield wandb
    if wandb.run is not None:
        wandb.finish()


class Logs:
    """Mixed into a LightningModule: the user's own logging."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        self.log("loss", loss)  # type: ignore[attr-defined]
        return loss


def user_model(package: str = "pytorch_lightning") -> Any:
    model = language_model(package)
    model.__class__ = type("User", (Logs, type(model)), {})
    return model


def fit(logger: Any, folder: Path, steps: int, **options: Any) -> Any:
    monitor = MeasurementMonitor(measurements=[Everything()], every_n_train_steps=1)
    ckpt = options.pop("ckpt_path", None)
    settings = {"callbacks": [monitor], "logger": logger, "max_steps": steps} | options
    fitted = trainer(default_root_dir=folder, **settings)
    fitted.fit(user_model(), *loaders(), ckpt_path=ckpt)
    return fitted


def steps_with(rows: list[dict[str, Any]], key: str) -> list[int]:
    return [int(row["mi/step"]) for row in rows if key in row]


class TestWandb:
    def test_thirty_steps_are_complete(self, tmp_path: Path, wandb_off: Any) -> None:
        logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path)
        run_dir = logger.experiment.dir
        run = Run.create(tmp_path / "mi")
        run.report.write_text("<p>report</p>", encoding="utf-8")
        sink = WandbSink(logger)  # Unguarded: a failure must show.
        sink.start({"model": "tiny", "parameters": 3})
        for step in range(1, 31):
            if step % 3 == 0:  # Lightning's own rows, one step behind.
                logger.log_metrics({"loss": 1 / step}, step=step - 1)
            taken = firing(step) if step % 5 == 0 else firing(step)[:3]
            sink.write_all(taken)
            run.write_all(taken)
        sink.finish(run, {"mi_head_scores/onset": 12, "head": "L0H1"})
        sink.finish(run, {"again": 1.0})
        wandb_off.finish()
        found = _wandb.entries(run_dir)
        rows = [e["history"]["item"] for e in found if e["type"] == "history"]
        assert steps_with(rows, "mi/induction") == list(range(1, 31))
        assert steps_with(rows, "mi_head_scores/map._type") == list(range(1, 31))
        assert steps_with(rows, "mi_influence/top._type") == list(range(5, 31, 5))
        assert sum("loss" in row for row in rows) == 10
        assert steps_with(rows, "mi_run/report._type") == [30]
        table = next(row for row in rows if "mi_run/table._type" in row)
        assert table["mi_run/table.nrows"] == len(long_table(run.records()))
        assert "step 30" in rows[-3]["mi_head_scores/map.captions"][0]
        assert steps_with(rows, "mi_saliency/grid._type") == [30]
        kept = _wandb.summary(run_dir)
        assert (kept["mi_head_scores/onset"], kept["head"]) == (12, "L0H1")
        assert "again" not in kept
        assert self.config(found) == {"model": "tiny", "parameters": 3}

    @staticmethod
    def config(found: list[dict[str, Any]]) -> Any:
        updates = [e["config"]["update"] for e in found if e["type"] == "config"]
        return next(u["lightning_mi"] for u in updates if "lightning_mi" in u)

    def test_x_axis_of_every_key_is_ours(self, tmp_path: Path, wandb_off: Any) -> None:
        logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path)
        run_dir = logger.experiment.dir
        sink = WandbSink(logger)
        sink.start({})
        sink.write_all(firing())
        wandb_off.finish()
        metrics = [e["metric"] for e in _wandb.entries(run_dir) if e["type"] == "metric"]
        ours = {m["name"] for m in metrics if m.get("step_metric") == "mi/step" and "name" in m}
        shown = plan(firing())
        keys = {*shown.scalars, *(p.key for p in shown.pictures)} - {"mi/step"}
        # By exact name: WandbLogger's own "*" and a glob of ours would tie.
        assert ours == keys
        globs = {m.get("glob_name") for m in metrics if m.get("step_metric") == "mi/step"}
        assert "mi*" not in globs
        assert {"mi/*", "mi_head_scores/*"} <= globs
        (axis,) = [m for m in metrics if m.get("name") == "mi/step"]
        assert axis["options"]["hidden"]

    def test_run_made_by_the_user(self, tmp_path: Path, wandb_off: Any) -> None:
        made = wandb_off.init(mode="offline", dir=tmp_path, project="own")
        logger = lightning().loggers.WandbLogger(experiment=made)
        sink = WandbSink(logger)
        sink.start({"model": "tiny"})
        for step in (1, 2, 3):
            made.log({"mixup/loss": 1.0})
            sink.write_all(firing(step))
        wandb_off.finish()
        rows = _wandb.rows(made.dir)
        assert steps_with(rows, "mi/induction") == [1, 2, 3]
        assert sum("mixup/loss" in row for row in rows) == 3

    def test_undefined_values(self, tmp_path: Path, wandb_off: Any) -> None:
        logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path)
        run_dir = logger.experiment.dir
        sink = WandbSink(logger)
        nothing = record("head_scores/induction", [[NAN, NAN]], HEADS, 1)
        run = Run.create(tmp_path / "mi")
        run.write(nothing)
        sink.start({})
        sink.write(nothing)
        sink.finish(run, {"onset": NAN})
        wandb_off.finish()
        (row,) = [row for row in _wandb.rows(run_dir) if "mi/nonfinite" in row]
        assert row["mi/nonfinite"] == 2
        assert "mi/induction" not in row

    @pytest.mark.slow
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_trainer_with_own_logging(
        self, accumulate: int, tmp_path: Path, wandb_off: Any
    ) -> None:
        logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path)
        options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 3}
        fit(logger, tmp_path, 30, **options)
        run_dir = logger.experiment.dir
        wandb_off.finish()
        rows = _wandb.rows(run_dir)
        assert sorted(set(steps_with(rows, "mi_head_scores/induction_1")) - {0}) == list(
            range(1, 31)
        )
        assert sum("loss" in row for row in rows) == 10

    @pytest.mark.slow
    def test_resumed(self, tmp_path: Path, wandb_off: Any) -> None:
        seen: list[int] = []
        first = None
        for steps in (5, 10):
            logger = lightning().loggers.WandbLogger(offline=True, save_dir=tmp_path, version="one")
            ckpt = tmp_path / "last.ckpt"
            fitted = fit(logger, tmp_path, steps, ckpt_path=first)
            first = str(ckpt)
            fitted.save_checkpoint(first)
            run_dir = logger.experiment.dir
            wandb_off.finish()
            seen += steps_with(_wandb.rows(run_dir), "mi_head_scores/induction_1")
            time.sleep(1.1)  # Names of offline run folders count seconds.
        assert sorted(step for step in seen if step) == list(range(1, 11))

    @pytest.mark.slow
    def test_beside_csv_and_tensorboard(self, tmp_path: Path, wandb_off: Any) -> None:
        kinds = lightning().loggers
        made = [
            kinds.CSVLogger(tmp_path / "csv"),
            kinds.TensorBoardLogger(tmp_path / "tb"),
            kinds.WandbLogger(offline=True, save_dir=tmp_path),
        ]
        fit(made, tmp_path, 8, log_every_n_steps=2)
        run_dir = made[2].experiment.dir
        wandb_off.finish()
        with open(Path(made[0].log_dir) / "metrics.csv", newline="") as file:
            table = [row for row in csv.DictReader(file) if row["mi/induction"]]
        steps = set(range(1, 9))
        assert steps <= {int(row["step"]) for row in table}
        events = tensorboard(made[1].log_dir)
        assert steps <= {e.step for e in events.Scalars("mi/induction")}
        assert steps <= set(steps_with(_wandb.rows(run_dir), "mi/induction"))


def test_import_stays_light() -> None:
    import subprocess

    code = (
        "import json, sys, lightning_mi.sinks\n"
        "heavy = ('wandb', 'matplotlib', 'PIL', 'pytorch_lightning', 'lightning', 'mlflow')\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_scalar_helper_makes_default_keys() -> None:
    assert plan([Record("own/speed", scalar(2.0))]).scalars["mi_own/speed"] == 2.0
