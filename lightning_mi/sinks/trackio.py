"""trackio.

Lightning has no logger of its own for it. As trackio speaks W&B's language, a run of it can be
given to Lightning's: ``WandbLogger(experiment=trackio.init(project="…"))``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..record import plain
from ..runs import Run
from .base import RUN_SECTION, LoggerSink, summary_markdown
from .examples import examples_html
from .keys import STEP, Shown
from .longtable import COLUMNS, long_table
from .pictures import caption, draw

__all__ = ["TrackioSink", "is_trackio"]


def is_trackio(logger: Any) -> bool:
    """Say whether a logger of W&B's kind writes to a run of trackio.

    Args:
        logger: A ``WandbLogger``. Its experiment is looked at only where trackio was imported:
            looking starts a run of W&B.

    Returns:
        Whether the experiment comes from trackio.
    """
    if "trackio" not in sys.modules:
        return False
    return type(logger.experiment).__module__.split(".")[0] == "trackio"


class TrackioSink(LoggerSink):
    """Sends records to a run of trackio: metrics, images, HTML, and the final table.

    The rows of trackio have a count of their own as step; ``mi/step`` stands in every row of ours.
    """

    @property
    def kind(self) -> str:
        """Name of the place, as the logger has that of another."""
        return "trackio"

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Log all pictures in one more row, with its own ``mi/step``.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        self._log({shown.key: self._media(shown) for shown in pictures}, step)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Store constants in the run's config; trackio writes it with the first row.

        Args:
            info: Plain JSON.
        """
        self.logger.experiment.config["lightning_mi"] = plain(info)

    def log_files(self, run: Run) -> None:
        """Log the long table and the report.

        Args:
            run: All records, and the report if there is one.
        """
        import trackio

        records = run.records()
        media: dict[str, Any] = {}
        if records:
            rows = [list(row) for row in long_table(records)]
            media[f"{RUN_SECTION}/table"] = trackio.Table(columns=list(COLUMNS), data=rows)
        if run.report.exists():
            page = run.report.read_text(encoding="utf-8")
            media[f"{RUN_SECTION}/report"] = trackio.Html(page, inject=False)
        if media:
            self._log(media, self.last_step)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log files and summary: all of it as text, its numbers as metrics.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        import trackio

        if summary:
            words = trackio.Markdown(summary_markdown(summary))
            self._log({f"{RUN_SECTION}/summary": words}, self.last_step)
        super().log_end(run, summary)

    def _media(self, shown: Shown) -> Any:
        import trackio

        if shown.kind == "examples":
            page = examples_html(shown.records, self.scales.of(shown))
            return trackio.Html(page, inject=False)
        return trackio.Image(draw(shown, self.scales), caption=caption(shown, self.scales))

    def _log(self, media: Mapping[str, Any], step: int) -> None:
        self.logger.log_metrics({**media, STEP: float(step)}, step=step)
