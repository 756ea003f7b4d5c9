"""MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..record import plain
from ..runs import Run
from .base import RUN_SECTION, LoggerSink
from .examples import examples_html
from .keys import Shown
from .longtable import csv_text
from .pictures import draw

__all__ = ["MLFlowSink"]

TAG = 5000
"""Longest text of a tag that every MLflow server takes."""


class MLFlowSink(LoggerSink):
    """Sends records to an ``MLFlowLogger``: metrics, images by step, and artifacts.

    Constants become tags and not parameters: a parameter cannot change when a run is resumed.
    """

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Log images by step, and examples as HTML files.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        client, run_id = self.logger.experiment, self.logger.run_id
        for shown in pictures:
            if shown.kind == "examples":
                page = examples_html(shown.records, self.scales.of(shown))
                client.log_text(run_id, page, f"{shown.key}/step_{step:07d}.html")
            else:
                client.log_image(run_id, draw(shown, self.scales), key=shown.key, step=step)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Set one tag for each constant.

        Args:
            info: Plain JSON.
        """
        for name, value in plain(info).items():
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self._tag(f"lightning_mi.{name}", words)

    def log_files(self, run: Run) -> None:
        """Log the long table as a CSV file, and the report.

        Args:
            run: All records, and the report if there is one.
        """
        client, run_id = self.logger.experiment, self.logger.run_id
        records = run.records()
        if records:
            client.log_text(run_id, csv_text(records), f"{RUN_SECTION}/table.csv")
        if run.report.exists():
            client.log_artifact(run_id, str(run.report), RUN_SECTION)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log files and summary; the words of a summary are tags.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        for name, value in summary.items():
            if isinstance(value, str):
                self._tag(name, value)
        super().log_end(run, summary)

    def _tag(self, name: str, words: str) -> None:
        self.logger.experiment.set_tag(self.logger.run_id, name, words[:TAG])
