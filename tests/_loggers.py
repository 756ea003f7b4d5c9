"""Real loggers that stay on this machine, and what each holds when it is read back."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _wandb
import pytest
from cases import lightning

RESUMED = "mi_run/resumed_at"
REPORT = "<p>the report</p>"
USERS = "mixup/loss"
"""A key of the user's, which begins like ours."""

OURS = re.compile(r"mi(_\w+)?/")


@dataclass(frozen=True)
class Row:
    """One number that a logger holds; `at` orders the rows of a logger in time."""

    at: float
    key: str
    step: int
    value: float


class Place:
    """One logger: made, closed, read.

    Args:
        folder: Where it keeps everything.
        monkeypatch: Sets what its package reads from the environment.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.environment(monkeypatch)

    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep the package on this machine."""

    def make(self, run: str = "one") -> Any:
        """Return a logger that starts a run, or goes on with it."""
        raise NotImplementedError

    def close(self, logger: Any) -> None:
        """Write everything out."""
        logger.finalize("success")

    def numbers(self, logger: Any) -> list[Row]:
        """Return all numbers of a closed logger's run, those of its earlier sessions too."""
        raise NotImplementedError

    def rows(self, logger: Any) -> list[Row]:
        """Return our numbers."""
        return [row for row in self.numbers(logger) if OURS.match(row.key)]

    def others(self, logger: Any) -> list[tuple[str, int, float]]:
        """Return the user's numbers, in order."""
        return [(r.key, r.step, r.value) for r in self.numbers(logger) if r.key in ("loss", USERS)]

    def holds(self, logger: Any) -> dict[str, str]:
        """Return what a closed logger holds, in the words of the table in the docs."""
        raise NotImplementedError


def word(held: Sequence[tuple[str, Any]]) -> str:
    """Return the kinds that were found, or ``no``."""
    return " and ".join(kind for kind, found in held if found) or "no"


def standing(rows: Sequence[Row]) -> list[Row]:
    """Leave out what a later row ``mi_run/resumed_at`` says was trained away."""
    marks = [row for row in rows if row.key == RESUMED]
    return [r for r in rows if not any(r.at < m.at and r.step > m.value for m in marks)]


def table_of(found: list[dict[str, Any]], theirs: str = "trainer/global_step") -> list[Row]:
    """Return the numbers of a log that is a list of rows; `theirs` is the step of Lightning's."""
    return [
        Row(at, key, int(float(row.get("mi/step") or row[theirs])), float(value))
        for at, row in enumerate(found)
        if row.get("mi/step") or row.get(theirs) is not None
        for key, value in row.items()
        if (OURS.match(key) or key in ("loss", USERS)) and _is_number(value)
    ]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class CSV(Place):
    def make(self, run: str = "one") -> Any:
        return lightning().loggers.CSVLogger(self.folder, name="csv", version=run)

    def read(self, logger: Any) -> list[dict[str, Any]]:
        path = Path(logger.log_dir) / "metrics.csv"
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def numbers(self, logger: Any) -> list[Row]:
        return table_of(self.read(logger), "step")

    def holds(self, logger: Any) -> dict[str, str]:
        keys = {row.key for row in self.rows(logger)}
        files = {p.name for p in Path(logger.log_dir).rglob("*") if p.is_file()}
        plain = self.read(logger)
        return {
            "scalars": word([("yes", "mi/induction" in keys)]),
            "pictures": word([("image", any(".png" in name for name in files))]),
            "examples": word([("HTML", any(".html" in name for name in files))]),
            "constants": word([("hyperparameters", "tiny" in str(files))]),
            "summary": word([("scalars", any(row.get("mi_run/onset") for row in plain))]),
            "table": word([("table", any("table" in name for name in files))]),
            "report": word([("HTML", any("report" in name for name in files))]),
        }


class TensorBoard(Place):
    def make(self, run: str = "one") -> Any:
        return lightning().loggers.TensorBoardLogger(self.folder, name="tb", version=run)

    def read(self, logger: Any) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        sizes = {"scalars": 0, "images": 0, "tensors": 0}
        return EventAccumulator(logger.log_dir, sizes).Reload()

    def numbers(self, logger: Any) -> list[Row]:
        events = self.read(logger)
        return [
            Row(event.wall_time, key, event.step, event.value)
            for key in events.Tags()["scalars"]
            for event in events.Scalars(key)
        ]

    def holds(self, logger: Any) -> dict[str, str]:
        events = self.read(logger)
        tags = events.Tags()

        def text(tag: str) -> str:
            name = f"{tag}/text_summary"
            if name not in tags["tensors"]:
                return ""
            (said,) = events.Tensors(name)[-1].tensor_proto.string_val
            return said.decode()

        everything = [*tags["scalars"], *tags["images"], *tags["tensors"]]
        return {
            "scalars": word([("yes", "mi/induction" in tags["scalars"])]),
            "pictures": word([("image", "mi_head_scores/map" in tags["images"])]),
            "examples": word([("Markdown", "&lt;b&gt;" in text("mi_influence/top"))]),
            "constants": word([("text", '"tiny"' in text("mi_run/config"))]),
            "summary": word(
                [
                    ("text", "L0H1" in text("mi_run/summary")),
                    ("scalars", "mi_run/onset" in tags["scalars"]),
                ]
            ),
            "table": word([("table", any("mi_run/table" in tag for tag in everything))]),
            "report": word([("HTML", any("mi_run/report" in tag for tag in everything))]),
        }


class MLflow(Place):
    """In a database of SQLite, beside which its files lie."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.runs: dict[str, str] = {}

    def make(self, run: str = "one") -> Any:
        database = self.folder / "mlflow.db"
        if not database.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._empty_database(), database)
        logger = lightning().loggers.MLFlowLogger(
            tracking_uri=f"sqlite:///{database}",
            artifact_location=(self.folder / "files").as_uri(),
            run_id=self.runs.get(run),
        )
        self.runs[run] = logger.run_id
        return logger

    def _empty_database(self) -> Path:
        """Return a database that is made once for all tests: it takes some ten seconds."""
        from mlflow.tracking import MlflowClient

        path = self.folder.parent.parent / "empty-mlflow.db"
        if not path.exists():
            MlflowClient(f"sqlite:///{path}").search_experiments()
        return path

    def numbers(self, logger: Any) -> list[Row]:
        client, run_id = logger.experiment, logger.run_id
        return [
            Row(metric.timestamp, key, metric.step, metric.value)
            for key in client.get_run(run_id).data.metrics
            for metric in client.get_metric_history(run_id, key)
        ]

    def holds(self, logger: Any) -> dict[str, str]:
        data = logger.experiment.get_run(logger.run_id).data
        files = {p.relative_to(self.folder): p for p in self.folder.rglob("*") if p.is_file()}
        named = {str(name): path for name, path in files.items()}

        def text(ending: str) -> str:
            found = [path for name, path in named.items() if name.endswith(ending)]
            return found[-1].read_text(encoding="utf-8") if found else ""

        images = [n for n in named if "head_scores~map" in n and n.endswith(".png")]
        return {
            "scalars": word([("yes", "mi/induction" in data.metrics)]),
            "pictures": word([("image", images)]),
            "examples": word(
                [("HTML file", "&lt;b&gt;" in text("mi_influence/top/step_0000002.html"))]
            ),
            "constants": word([("tags", data.tags.get("lightning_mi.model") == "tiny")]),
            "summary": word(
                [
                    ("tags", data.tags.get("head") == "L0H1"),
                    ("scalars", data.metrics.get("mi_run/onset") == 6),
                ]
            ),
            "table": word([("CSV file", "layer=0 head=1" in text("mi_run/table.csv"))]),
            "report": word([("HTML file", REPORT in text("mi_run/report.html"))]),
        }


class Wandb(Place):
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.sessions: dict[str, list[str]] = {}

    def make(self, run: str = "one") -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.sessions:
            time.sleep(1.1)  # Names of offline run folders count seconds.
        return lightning().loggers.WandbLogger(offline=True, save_dir=self.folder, version=run)

    def close(self, logger: Any) -> None:
        self.sessions.setdefault(logger.version, []).append(logger.experiment.dir)
        logger.experiment.finish()

    def entries(self, logger: Any) -> list[dict[str, Any]]:
        folders = dict.fromkeys(self.sessions[logger.version])
        return [entry for folder in folders for entry in _wandb.entries(folder)]

    def numbers(self, logger: Any) -> list[Row]:
        rows = [entry["history"]["item"] for entry in self.entries(logger) if "history" in entry]
        # Sizes of a table or a picture are no numbers of ours.
        media = [{k.removesuffix("._type") for k in row if k.endswith("._type")} for row in rows]
        return table_of(
            [
                {key: value for key, value in row.items() if key.rpartition(".")[0] not in those}
                for row, those in zip(rows, media, strict=True)
            ]
        )

    def holds(self, logger: Any) -> dict[str, str]:
        entries = self.entries(logger)
        rows = [entry["history"]["item"] for entry in entries if "history" in entry]
        kinds = {key: row[key] for row in rows for key in row}
        config = [entry["config"].get("update", {}) for entry in entries if "config" in entry]
        summary = {}
        for entry in entries:
            summary.update(entry.get("summary", {}).get("update", {}))
        return {
            "scalars": word([("yes", "mi/induction" in kinds)]),
            "pictures": word([("image", "images" in str(kinds.get("mi_head_scores/map._type")))]),
            "examples": word([("HTML", kinds.get("mi_influence/top._type") == "html-file")]),
            "constants": word(
                [("config", any(u.get("lightning_mi", {}).get("model") == "tiny" for u in config))]
            ),
            "summary": word(
                [("summary", (summary.get("onset"), summary.get("head")) == (6, "L0H1"))]
            ),
            "table": word([("table", kinds.get("mi_run/table._type") == "table-file")]),
            "report": word([("HTML", kinds.get("mi_run/report._type") == "html-file")]),
        }


class Comet(Place):
    """An experiment that is kept in a ZIP file until it is uploaded."""

    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("COMET_START_ONLINE", "COMET_ERROR_TRACKING_ENABLE"):
            monkeypatch.setenv(name, "false")
        for name in ("CODE", "GRAPH", "GIT_METADATA", "GIT_PATCH", "ENV_DETAILS", "CLI_ARGUMENTS"):
            monkeypatch.setenv(f"COMET_AUTO_LOG_{name}", "false")
        monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")  # The logger sets it for good.

    def make(self, run: str = "one") -> Any:
        return lightning().loggers.CometLogger(
            project=run,
            offline_directory=str(self.folder),
            auto_output_logging=False,
            display_summary_level=0,
        )

    def close(self, logger: Any) -> None:
        logger.finalize("success")
        logger.experiment.end()

    def archive(self, logger: Any) -> zipfile.ZipFile:
        (path,) = self.folder.glob(f"{logger.version}*.zip")
        return zipfile.ZipFile(path)

    def messages(self, logger: Any) -> list[dict[str, Any]]:
        with self.archive(logger) as archive:
            lines = archive.read("messages.json").decode().splitlines()
        return [json.loads(line) for line in lines]

    def numbers(self, logger: Any) -> list[Row]:
        metrics = [
            (m["payload"]["message_id"], m["payload"]["metric"])
            for m in self.messages(logger)
            if m["type"] == "metric_msg"
        ]
        return [Row(at, m["metricName"], m["step"], m["metricValue"]) for at, m in metrics]

    def holds(self, logger: Any) -> dict[str, str]:
        messages = self.messages(logger)
        others = {
            m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"
        }
        files: dict[str, tuple[str, bytes]] = {}
        with self.archive(logger) as archive:
            for message in messages:
                if message["type"] == "file_upload":
                    payload = message["payload"]
                    more = payload["additional_params"]
                    name = more.get("fileName") or more["figName"]
                    files[name] = (payload["upload_type"], archive.read(payload["file_path"]))
        nothing = ("", b"")
        rows = {row.key: row.value for row in self.rows(logger)}
        image = files.get("mi_head_scores/map", nothing)
        example = files.get("mi_influence/top/step_0000002.html", nothing)
        table = files.get("mi_run/table.csv", nothing)[1]
        return {
            "scalars": word([("yes", "mi/induction" in rows)]),
            "pictures": word([("image", image[0] == "visualization" and b"PNG" in image[1][:8])]),
            "examples": word([("HTML file", b"&lt;b&gt;" in example[1])]),
            "constants": word([("other", others.get("lightning_mi.model") == "tiny")]),
            "summary": word(
                [
                    ("other", others.get("head") == "L0H1"),
                    ("scalars", rows.get("mi_run/onset") == 6),
                ]
            ),
            "table": word([("CSV file", b"layer=0 head=1" in table)]),
            "report": word(
                [("HTML file", REPORT.encode() in files.get("mi_run/report.html", nothing)[1])]
            ),
        }


class Trackio(Place):
    """A run of trackio, given to the logger of W&B."""

    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Read when the package is imported: all its tests share a folder, each has its own project.
        os.environ.setdefault("TRACKIO_DIR", str(self.folder.parent.parent / "trackio"))

    @property
    def project(self) -> str:
        return f"p{abs(hash(str(self.folder))):x}"

    def make(self, run: str = "one") -> Any:
        import trackio

        quiet = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        made = trackio.init(project=self.project, name=run, resume="allow", **quiet)
        return lightning().loggers.WandbLogger(experiment=made)

    def close(self, logger: Any) -> None:
        import trackio

        trackio.finish()

    def read(self, logger: Any) -> list[dict[str, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        found: list[dict[str, Any]] = SQLiteStorage.get_logs(self.project, logger.experiment.name)
        return found

    def numbers(self, logger: Any) -> list[Row]:
        return table_of(self.read(logger))

    def holds(self, logger: Any) -> dict[str, str]:
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import MEDIA_DIR

        last = {key: value for row in self.read(logger) for key, value in row.items()}
        config = SQLiteStorage.get_run_config(self.project, logger.experiment.name) or {}

        def file(key: str, kind: str) -> str:
            found = last.get(key, {})
            if not isinstance(found, dict) or found.get("_type") != kind:
                return ""
            return (MEDIA_DIR / found["file_path"]).read_text("latin-1")

        return {
            "scalars": word([("yes", isinstance(last.get("mi/induction"), float))]),
            "pictures": word([("image", "PNG" in file("mi_head_scores/map", "trackio.image"))]),
            "examples": word([("HTML", "&lt;b&gt;" in file("mi_influence/top", "trackio.html"))]),
            "constants": word([("config", config.get("lightning_mi", {}).get("model") == "tiny")]),
            "summary": word(
                [
                    ("text", "L0H1" in str(last.get("mi_run/summary"))),
                    ("scalars", last.get("mi_run/onset") == 6),
                ]
            ),
            "table": word([("table", "layer=0 head=1" in str(last.get("mi_run/table")))]),
            "report": word([("HTML", REPORT in file("mi_run/report", "trackio.html"))]),
        }


PLACES: dict[str, tuple[type[Place], str]] = {
    "W&B": (Wandb, "wandb"),
    "TensorBoard": (TensorBoard, "tensorboard"),
    "MLflow": (MLflow, "sqlalchemy"),
    "Comet": (Comet, "comet_ml"),
    "trackio": (Trackio, "trackio"),
    "CSV": (CSV, "csv"),
}
"""By the name that the docs give each; and the package without which it cannot be tried."""


def place(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Return a place by name, or skip the test where its package is not installed."""
    kind, package = PLACES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return kind(folder / name.lower().replace("&", ""), monkeypatch)
