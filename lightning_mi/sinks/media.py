"""What loggers of W&B's kind share: pictures, pages and tables are values in a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ..runs import Run
from .base import RUN_SECTION, LoggerSink
from .examples import examples_html
from .keys import STEP, Shown
from .longtable import COLUMNS, long_table
from .pictures import caption, draw

__all__ = ["MediaSink"]


class MediaSink(LoggerSink):
    """Logs media as rows with their own ``mi/step``, in the classes of a library."""

    @property
    @abstractmethod
    def library(self) -> Any:
        """The module with ``Image``, ``Html`` and ``Table``, imported when it is first needed."""

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Log all pictures in one more row, with its own ``mi/step``.

        Args:
            pictures: What to draw.
            step: Optimizer steps taken.
        """
        self.log_media({shown.key: self._media(shown) for shown in pictures}, step)

    def log_files(self, run: Run) -> None:
        """Log the long table and the report.

        Args:
            run: All records, and the report if there is one.
        """
        records = run.records()
        media: dict[str, Any] = {}
        if records:
            rows = [list(row) for row in long_table(records)]
            media[f"{RUN_SECTION}/table"] = self.library.Table(columns=list(COLUMNS), data=rows)
        if run.report.exists():
            page = run.report.read_text(encoding="utf-8")
            media[f"{RUN_SECTION}/report"] = self.library.Html(page, inject=False)
        if media:
            self.log_media(media, self.last_step)

    def log_media(self, media: Mapping[str, Any], step: int) -> None:
        """Log one row.

        Args:
            media: Values of the library, by key.
            step: Optimizer steps taken.
        """
        self.logger.log_metrics({**media, STEP: float(step)}, step=step)

    def image(self, shown: Shown) -> Any:
        """Draw a picture.

        Args:
            shown: What to draw.

        Returns:
            The value that is logged for it.
        """
        return self.library.Image(draw(shown, self.scales), caption=caption(shown, self.scales))

    def _media(self, shown: Shown) -> Any:
        if shown.kind == "examples":
            page = examples_html(shown.records, self.scales.of(shown))
            return self.library.Html(page, inject=False)
        return self.image(shown)
