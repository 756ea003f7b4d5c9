"""Comet."""

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
from .pictures import caption, draw

__all__ = ["CometSink"]


class CometSink(LoggerSink):
    """Sends records to a ``CometLogger``, online or offline: metrics, images, and assets.

    Constants go under "other" and not to the parameters, which belong to the user.
    """

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Log images by step, and examples as HTML files.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        from PIL import Image

        experiment = self.logger.experiment
        for shown in pictures:
            if shown.kind == "examples":
                page = examples_html(shown.records, self.scales.of(shown))
                name = f"{shown.key}/step_{step:07d}.html"
                experiment.log_asset_data(page, name=name, step=step)
            else:
                # Comet stretches the colours of an array; an image it takes as it is.
                image = Image.fromarray(draw(shown, self.scales))
                said = {"caption": caption(shown, self.scales)}
                experiment.log_image(image, name=shown.key, step=step, metadata=said)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Keep each constant as one "other" value.

        Args:
            info: Plain JSON.
        """
        for name, value in plain(info).items():
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self.logger.experiment.log_other(f"lightning_mi.{name}", words)

    def log_files(self, run: Run) -> None:
        """Log the long table as a CSV file, and the report.

        Args:
            run: All records, and the report if there is one.
        """
        experiment, step = self.logger.experiment, self.last_step
        records = run.records()
        if records:
            table = f"{RUN_SECTION}/table.csv"
            experiment.log_asset_data(csv_text(records), name=table, step=step, overwrite=True)
        if run.report.exists():
            page = f"{RUN_SECTION}/report.html"
            experiment.log_asset(str(run.report), file_name=page, step=step, overwrite=True)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log files and summary; the words of a summary are "other" values.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        for name, value in summary.items():
            if isinstance(value, str):
                self.logger.experiment.log_other(name, value)
        super().log_end(run, summary)
        self.logger.experiment.flush()
