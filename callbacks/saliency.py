"""`SaliencyMonitor`: watch which inputs the model is sensitive to."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..attribution import Saliency
from ..target import TargetOption
from ..task import Task
from .monitor import MeasurementMonitor

__all__ = ["SaliencyMonitor"]


class SaliencyMonitor(MeasurementMonitor):
    """Take the gradient of the target with respect to the inputs.

    Logged keys: ``mi_saliency/strip`` (picture, for tokens), ``mi_saliency/image`` (for images) or
    ``mi_saliency/bars`` (for tables), in units of the target for each unit of the input. The run
    folder holds the values.

    Args:
        target: The scalar whose gradient is taken; None takes the logit of the true next token or
            of the label.
        kind: ``"absolute"`` or ``"signed"``; for tokens the L2 norm or the sum over the embedding.
        examples: Examples of the batch that are explained; None takes all of it.
        batch: See `MeasurementMonitor`.
        task: See there.
        tokenizer: See there.
        dirpath: See there.
        report: See there.
        every_n_train_steps: See there.
        every_n_epochs: See there.
        train_time_interval: See there.
        at_steps: See there.
        on_validation: See there.
        at_start: See there.
        at_end: See there.
        max_overhead: See there.
    """

    def __init__(
        self,
        *,
        target: TargetOption = None,
        kind: Literal["absolute", "signed"] = "absolute",
        examples: int | None = 4,
        batch: Any = None,
        task: Task | None = None,
        tokenizer: Any = None,
        dirpath: str | Path | None = None,
        report: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        at_steps: list[int] | Literal["log"] | None = None,
        on_validation: bool = False,
        at_start: bool | None = None,
        at_end: bool | None = None,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__(
            measurements=[Saliency(target=target, kind=kind, examples=examples)],
            batch=batch,
            task=task,
            tokenizer=tokenizer,
            dirpath=dirpath,
            report=report,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            at_steps=at_steps,
            on_validation=on_validation,
            at_start=at_start,
            at_end=at_end,
            max_overhead=max_overhead,
        )
