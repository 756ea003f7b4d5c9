"""`InfluenceMonitor`: watch which training examples teach the model what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..batch import batch_size
from ..errors import ArgumentError
from ..influence import TracIn
from ..measurement import IndexedData
from ..schedule import DEFAULT_STEPS
from ..target import TargetOption
from ..task import Task
from ._base import LightningModule, Trainer
from ._facts import say, training_data
from .monitor import MeasurementMonitor

__all__ = ["InfluenceMonitor"]

SHARE = 0.05
"""Share of training that the default number of candidates stays under."""

FEWEST = 8
"""Candidates of the default at least, even where they cost more than that."""

PASS = 1.6
"""What scoring one candidate costs at most, in training passes of one example; 1.0 to 1.6 were
measured."""


class InfluenceMonitor(MeasurementMonitor):
    """Score training examples by TracIn: learning rate × gradient · gradient of the query's loss.

    Positive scores are proponents: a step on the example lowers the query's loss. Candidates are
    addressed by dataset index, whatever the loader's order. The sum over steps (TracInCP) follows
    from the records. The cost is logged before training starts.

    Logged keys: ``mi_influence/top`` (picture or table: top proponents and opponents with their
    text; scores in units of the query's loss). The run folder holds all scores.

    Args:
        candidates: Training examples that are scored: a number (drawn by ``seed``), a list of
            dataset indices, or None for as many as keep the cost under 5 % of training, 8 at
            least.
        queries: Examples of the batch that are asked about.
        query: The scalar asked about; None takes the loss of the task.
        top: Proponents and opponents that are shown.
        seed: Of the choice of candidates.
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
        candidates: int | list[int] | None = None,
        queries: int = 1,
        query: TargetOption = None,
        top: int = 5,
        seed: int = 0,
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
        self._sampled = candidates is None
        measurement = TracIn(
            candidates=candidates, queries=queries, query=query, top=top, seed=seed
        )
        super().__init__(
            measurements=[measurement],
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse training data that cannot be addressed by index.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.

        Raises:
            ArgumentError: If the training data has no index.
        """
        if training_data(trainer) is None:
            raise ArgumentError.of(
                "train_dataloaders",
                expected="a DataLoader with a map-style dataset",
                got="a loader without a dataset",
                do="Remove InfluenceMonitor, or train from a dataset that has an index.",
            )
        super().on_train_start(trainer, pl_module)

    def before_first_step(self, trainer: Trainer, batch: Any) -> None:
        """Choose how many candidates the budget allows, and say what a firing will cost.

        Args:
            trainer: The Trainer.
            batch: The first training batch.
        """
        data = training_data(trainer)
        tracin: Any = self.measurements[0]
        size = batch_size(batch)
        every = self.schedule.every_n_train_steps or DEFAULT_STEPS
        available = 0 if data is None else len(data)
        if self._sampled:
            tracin = affordable(tracin, every * size * SHARE / PASS, available)
        elif isinstance(tracin.candidates, int):
            tracin = dataclasses.replace(tracin, candidates=min(tracin.candidates, available))
        self.measurements = (tracin, *self.measurements[1:])
        share = tracin.cost() * PASS / (every * size)
        say(
            trainer,
            f"InfluenceMonitor: {_count(tracin.candidates)} candidates, "
            f"{tracin.cost():,} example passes a firing, up to {share:.1%} of training.",
        )

    def dataset(self, trainer: Trainer) -> IndexedData | None:
        """Return the training examples by index.

        Args:
            trainer: The Trainer.

        Returns:
            The examples.
        """
        return training_data(trainer)


def affordable(tracin: TracIn, passes: float, available: int) -> TracIn:
    """Return the measurement with as many candidates as a number of example passes pays for.

    Args:
        tracin: The measurement.
        passes: Forward and backward passes of one example that may be spent.
        available: Training examples that there are.

    Returns:
        With at least 8 candidates, where so many are available; where even these are too dear,
        fewer of them are shown.
    """
    least = min(FEWEST, available)
    top = tracin.top
    while top > 1 and dataclasses.replace(tracin, candidates=least, top=top).cost() > passes:
        top -= 1
    shown = 2 * top
    fixed = dataclasses.replace(tracin, candidates=shown, top=top).cost() - shown
    chosen = min(max(least, math.floor(passes - fixed)), available)
    return dataclasses.replace(tracin, candidates=chosen, top=top)


def _count(candidates: int | Sequence[int] | None) -> int:
    if candidates is None:
        return 0
    return candidates if isinstance(candidates, int) else len(candidates)
