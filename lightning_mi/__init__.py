"""See why a model does what it does, and when it learned to.

Measurements of saliency, integrated gradients, influence and attention heads that run unchanged
during training (``lightning_mi.callbacks``), over saved checkpoints (`sweep`) and in a notebook
(`measure`).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .behavior import Behavior
from .checkpoints import sweep
from .errors import (
    ArgumentError,
    LightningMIError,
    ModelError,
    NoAttentionError,
    RunError,
    TapError,
)
from .inferring import infer_task
from .isolation import untouched
from .measurement import Context, IndexedData, Measurement, measure
from .nodes import MLP, Embedding, Head, Logits, Neuron, Reader, parse
from .progress import track
from .record import Panel, Reading, Record
from .runs import Run
from .schedule import Schedule
from .series import Series
from .target import (
    Logit,
    LogitDifference,
    LogProbability,
    Loss,
    Margin,
    Probability,
    Rank,
    Target,
    as_target,
)
from .task import Classification, NextToken, Regression, Task

__version__ = "0.1.0.dev0"

__all__ = [
    # what a measurement returns and what is kept of it
    "Panel",
    "Reading",
    "Record",
    # what only the user knows
    "Task",
    "Classification",
    "NextToken",
    "Regression",
    "infer_task",
    # what a question is asked about
    "Target",
    "Logit",
    "LogitDifference",
    "LogProbability",
    "Margin",
    "Probability",
    "Rank",
    "Loss",
    "as_target",
    "Behavior",
    # measuring
    "Measurement",
    "Context",
    "IndexedData",
    "measure",
    "sweep",
    "untouched",
    "Series",
    "Schedule",
    "Run",
    "track",
    # names of the parts of a model
    "Embedding",
    "Head",
    "Logits",
    "MLP",
    "Neuron",
    "Reader",
    "parse",
    # errors
    "LightningMIError",
    "ArgumentError",
    "ModelError",
    "NoAttentionError",
    "RunError",
    "TapError",
]

_ROOMS = (
    "anatomy",
    "attention",
    "attribution",
    "behaviors",
    "callbacks",
    "circuits",
    "influence",
    "report",
)


def __getattr__(name: str) -> ModuleType:
    """Import a subpackage when it is first asked for: ``lightning_mi.circuits.head_scores``."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
