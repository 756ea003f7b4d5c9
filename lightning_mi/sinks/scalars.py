"""Loggers that only take numbers: CSV, and any that this package does not know."""

from __future__ import annotations

from .base import LoggerSink
from .keys import STEP

__all__ = ["CSVSink", "ScalarSink"]


class ScalarSink(LoggerSink):
    """Sends scalars through ``log_metrics``; that pictures are missing is said once."""


class CSVSink(ScalarSink):
    """Sends scalars to a ``CSVLogger``.

    It keeps our rows beside the user's at the same step, and rewrites its header when a key is new,
    so nothing is lost by having other keys than the user's. But it deletes the file of an earlier
    run of the same version, also where that run is resumed.
    """

    def is_empty(self) -> bool:
        """Say whether the table holds no row of ours."""
        writer = self.logger.experiment
        rows = any(STEP in row for row in getattr(writer, "metrics", ()))
        return not rows and STEP not in getattr(writer, "metrics_keys", ())
