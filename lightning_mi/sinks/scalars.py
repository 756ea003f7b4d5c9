"""Loggers that only take numbers: CSV, and any that this package does not know."""

from __future__ import annotations

from .base import LoggerSink

__all__ = ["ScalarSink"]


class ScalarSink(LoggerSink):
    """Sends scalars through ``log_metrics``; that pictures are missing is said once.

    ``CSVLogger`` keeps our rows beside the user's at the same step, and rewrites its header when a
    key is new, so nothing is lost by having other keys than the user's.
    """
