"""`HeadMonitor`: watch attention heads take up their roles."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..behaviors import RepeatedTokens
from ..circuits import HeadScores, PromptAttention
from ..task import Task
from .monitor import MeasurementMonitor

__all__ = ["HeadMonitor"]


class HeadMonitor(MeasurementMonitor):
    """Score every attention head as induction, previous-token, … head, on repeated random tokens.

    Logged keys (all attention probabilities from 0 to 1 unless noted): ``mi/induction`` and
    ``mi/prev_token`` (best head), ``mi/copy_gain`` (nats; loss on the first copy minus loss on the
    second), ``mi/icl_score`` (nats; negative: context helps), ``mi_head_scores/induction_1``,
    ``_2`` and ``mi_head_scores/previous_token_1``, ``_2`` (heads by rank) and
    ``mi_head_scores/map`` (image, layers × heads). The run folder also holds duplicate-token,
    current-token and first-position scores, standard errors, nulls, and for the shown prompt the
    attention of the top heads and the model's three best answers.

    Args:
        tokens: What the heads are scored on; None takes repeated random tokens that fit the model.
        batch: See `MeasurementMonitor`; its first example is the shown prompt.
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
        tokens: RepeatedTokens | None = None,
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
        chosen = RepeatedTokens() if tokens is None else tokens
        super().__init__(
            measurements=[HeadScores(tokens=chosen), PromptAttention(tokens=chosen)],
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
