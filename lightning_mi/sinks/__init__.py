"""Where records go besides the run folder: one sink for each logger of the Trainer.

`sinks_for` recognises a logger by the names of its classes, so that the loggers of both Lightning
packages, and subclasses of them, are served alike. Every sink guards itself: the first exception
that its logger raises switches it off with one warning, and training goes on.

What each logger shows is the table of ``docs/loggers.md``.

Which keys are logged is decided in `lightning_mi.sinks.keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Guarded, LoggerSink, Sink
from .comet import CometSink
from .history import NOTES, join, send_swept
from .keys import Plan, Shown, plan
from .mlflow import MLFlowSink
from .scalars import CSVSink, ScalarSink
from .tensorboard import TensorBoardSink
from .trackio import TrackioSink, is_trackio
from .wandb import WandbSink

__all__ = [
    # what the callbacks use
    "NOTES",
    "Sink",
    "join",
    "send_swept",
    "sinks_for",
    # one kind of logger each
    "CSVSink",
    "CometSink",
    "MLFlowSink",
    "ScalarSink",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    # to write another
    "Guarded",
    "LoggerSink",
    "Plan",
    "Shown",
    "plan",
]

KINDS: tuple[tuple[str, type[LoggerSink]], ...] = (
    ("WandbLogger", WandbSink),
    ("TensorBoardLogger", TensorBoardSink),
    ("MLFlowLogger", MLFlowSink),
    ("CometLogger", CometSink),
    ("TrackioLogger", TrackioSink),
    ("CSVLogger", CSVSink),
)
"""Class names, from either Lightning package, and the sinks that know what they can do."""

IGNORED = ("DummyLogger",)
"""What a Trainer puts in place of its loggers under ``fast_dev_run``."""


def sinks_for(loggers: Sequence[Any]) -> list[Sink]:
    """Return a guarded sink for each logger.

    Call it on rank zero only.

    Args:
        loggers: ``trainer.loggers``; those that have no ``log_metrics`` are passed over.

    Returns:
        The sinks, in the order of their loggers.
    """
    chosen = ((logger, _kind(logger)) for logger in loggers)
    return [Guarded(kind(logger)) for logger, kind in chosen if kind is not None]


def _kind(logger: Any) -> type[LoggerSink] | None:
    """Compare names, never classes: the two Lightning packages have one class each."""
    names = {cls.__name__ for cls in type(logger).__mro__}
    if names & set(IGNORED):
        return None
    if "WandbLogger" in names and is_trackio(logger):
        return TrackioSink
    for name, kind in KINDS:
        if name in names:
            return kind
    return ScalarSink if callable(getattr(logger, "log_metrics", None)) else None
