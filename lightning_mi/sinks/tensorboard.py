"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..record import plain
from ..runs import Run
from .base import RUN_SECTION, LoggerSink, summary_markdown
from .examples import examples_markdown
from .keys import Shown
from .pictures import caption, draw

__all__ = ["TensorBoardSink"]


class TensorBoardSink(LoggerSink):
    """Sends records to a ``TensorBoardLogger``: scalars, images, and examples as Markdown.

    Image captions are not shown by TensorBoard; they are logged as text under ``<key>_caption``.
    """

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Add images, and examples as text.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        writer = self.logger.experiment
        for shown in pictures:
            if shown.kind == "examples":
                writer.add_text(shown.key, examples_markdown(shown.records), step)
            else:
                writer.add_image(shown.key, draw(shown, self.scales), step, dataformats="HWC")
                writer.add_text(f"{shown.key}_caption", caption(shown, self.scales), step)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Add constants as text.

        Args:
            info: Plain JSON.
        """
        text = json.dumps(plain(info), indent=1, ensure_ascii=False)
        quoted = "\n".join(f"    {line}" for line in text.splitlines())
        self.logger.experiment.add_text(f"{RUN_SECTION}/config", quoted, 0)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Add the summary: its numbers as scalars, all of it as a table.

        Args:
            run: All records.
            summary: Values by name.
        """
        if summary:
            words = summary_markdown(summary)
            self.logger.experiment.add_text(f"{RUN_SECTION}/summary", words, self.last_step)
        super().log_end(run, summary)
        self.logger.experiment.flush()  # nobody closes the logger of a sweep
