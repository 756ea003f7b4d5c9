"""Weights & Biases.

Rows are logged through the logger, never with ``step=``: beside Lightning's own rows W&B would drop
most of them. The x axis is our own ``mi/step``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..record import plain
from ..runs import Run
from .keys import STEP, Plan, Shown
from .media import MediaSink
from .workspace import build_workspace

__all__ = ["WandbSink", "build_workspace"]


class WandbSink(MediaSink):
    """Sends records to a ``WandbLogger``, online or offline, also around a user's own run."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._defined: set[str] = set()

    @property
    def library(self) -> Any:
        """The module with the classes of media."""
        import wandb

        return wandb

    def start(self, info: Mapping[str, Any]) -> None:
        """Declare the x axis and store constants in the run's config under ``lightning_mi``.

        Args:
            info: Plain JSON.
        """
        self._defined.clear()
        self.logger.experiment.define_metric(STEP, hidden=True)
        super().start(info)

    def log_scalars(self, planned: Plan, step: int) -> None:
        """Log one row.

        Args:
            planned: What to log.
            step: Optimizer steps taken.
        """
        self._define(planned.scalars)
        super().log_scalars(planned, step)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Store constants in the run's config.

        Args:
            info: Plain JSON.
        """
        config = self.logger.experiment.config
        config.update({"lightning_mi": plain(info)}, allow_val_change=True)

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log the long table and the report once, and put the summary into the run's.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        for name, value in summary.items():
            self.logger.experiment.summary[name] = value
        self.log_files(run)

    def image(self, shown: Shown) -> Any:
        """Draw a picture; W&B takes pictures as a list.

        Args:
            shown: What to draw.

        Returns:
            A list of one image.
        """
        return [super().image(shown)]

    def log_media(self, media: Mapping[str, Any], step: int) -> None:
        """Log one row.

        Args:
            media: W&B's values, by key.
            step: Optimizer steps taken.
        """
        self._define(media)
        super().log_media(media, step)

    def _define(self, keys: Iterable[str]) -> None:
        """Give each section and each key our x axis, the first time it is seen.

        The globs alone do not do: ``WandbLogger`` has defined ``"*"``, and of two globs that match
        W&B takes either. An exact name wins over both.
        """
        for key in keys:
            for name in (f"{key.split('/')[0]}/*", key):
                if key != STEP and name not in self._defined:
                    self._defined.add(name)
                    self.logger.experiment.define_metric(name, step_metric=STEP)
