"""trackio.

Lightning has no logger of its own for it. As trackio speaks W&B's language, a run of it can be
given to Lightning's: ``WandbLogger(experiment=trackio.init(project="…"))``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..record import plain
from ..runs import Run
from .base import RUN_SECTION, summary_markdown
from .media import MediaSink

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


class TrackioSink(MediaSink):
    """Sends records to a run of trackio: metrics, images, HTML, and the final table.

    The rows of trackio have a count of their own as step; ``mi/step`` stands in every row of ours.
    """

    @property
    def kind(self) -> str:
        """Name of the place, as the logger has that of another."""
        return "trackio"

    @property
    def library(self) -> Any:
        """The module with the classes of media."""
        import trackio

        return trackio

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Store constants in the run's config; trackio writes it with the first row.

        Args:
            info: Plain JSON.
        """
        self.logger.experiment.config["lightning_mi"] = plain(info)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log files and summary: all of it as text, its numbers as metrics.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        if summary:
            words = self.library.Markdown(summary_markdown(summary))
            self.log_media({f"{RUN_SECTION}/summary": words}, self.last_step)
        super().log_end(run, summary)
