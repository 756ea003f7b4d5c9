"""Weights & Biases.

Rows are logged through the logger, never with ``step=``: beside Lightning's own rows W&B would drop
most of them. The x axis is our own ``mi/step``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..record import plain
from ..runs import Run
from .base import RUN_SECTION, LoggerSink
from .examples import examples_html
from .keys import STEP, Plan, Shown
from .longtable import COLUMNS, long_table
from .pictures import caption, draw
from .workspace import build_workspace

__all__ = ["WandbSink", "build_workspace"]


class WandbSink(LoggerSink):
    """Sends records to a ``WandbLogger``, online or offline, also around a user's own run."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._defined: set[str] = set()

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

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Log all pictures in one more row, with its own ``mi/step``.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        self._log({shown.key: self._media(shown) for shown in pictures}, step)

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
        import wandb

        for name, value in summary.items():
            self.logger.experiment.summary[name] = value
        records = run.records()
        media: dict[str, Any] = {}
        if records:
            rows = [list(row) for row in long_table(records)]
            media[f"{RUN_SECTION}/table"] = wandb.Table(columns=list(COLUMNS), data=rows)
        if run.report.exists():
            page = run.report.read_text(encoding="utf-8")
            media[f"{RUN_SECTION}/report"] = wandb.Html(page, inject=False)
        if media:
            self._log(media, self.last_step)

    def _media(self, shown: Shown) -> Any:
        import wandb

        if shown.kind == "examples":
            page = examples_html(shown.records, self.scales.of(shown))
            return wandb.Html(page, inject=False)
        pixels = draw(shown, self.scales)
        return [wandb.Image(pixels, caption=caption(shown, self.scales))]

    def _log(self, media: Mapping[str, Any], step: int) -> None:
        self._define(media)
        self.logger.log_metrics({**media, STEP: float(step)}, step=step)

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
