"""`InfluenceMonitor`: watch which training examples teach the model what it says."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import batch_size
from ..checks import counted
from ..errors import ArgumentError
from ..influence import TracIn
from ..influence.during_factors import TrainingFactors
from ..influence.during_measured import FACTORS, TrainingInfluence
from ..influence.during_ranking import ranking_change
from ..influence.queries import Question
from ..influence.trajectory_rates import RATES, step_rates
from ..measurement import IndexedData, measure
from ..progress import quiet
from ..record import Record
from ..schedule import DEFAULT_STEPS
from ..target import TargetOption
from ..task import Task
from ._base import LightningModule, Trainer
from ._facts import say, training_data
from ._session import Session
from .monitor import MeasurementMonitor

__all__ = ["InfluenceMonitor"]

SHARE = 0.05
"""Share of training that the default number of candidates stays under."""

FEWEST = 8
"""Candidates of the default at least, even where they cost more than that."""

PASS = 1.6
"""What scoring one candidate costs at most, in training passes of one example; 1.0 to 1.6 were
measured."""


GATHER_EVERY = {"kfac": 20, "ekfac": 60}
"""A step whose factors are gathered takes 1.9 (K-FAC) to 4 (EK-FAC) times as long; both measured on
transformers of two layers."""


class InfluenceMonitor(MeasurementMonitor):
    """Score training examples while they train the model.

    ``"tracin"``: learning rate × gradient · gradient of the query's loss. ``"kfac"`` and
    ``"ekfac"``: the influence function, with the curvature of the training batches themselves,
    gathered from the backward passes that run anyway (`TrainingFactors`), and one damping for all
    steps. Positive scores are proponents. Candidates are addressed by dataset index, whatever the
    loader's order. The sum over steps (TracInCP) follows from the records, and beside each step
    stands how much the ranking has changed since the last one. The cost is logged before training
    starts.

    Logged keys: ``mi_influence/top`` (picture or table: top proponents and opponents with their
    text; scores in units of the query's loss), for ``"kfac"`` and ``"ekfac"``
    ``mi_influence_function/top`` and ``…/gradient_norm``. The run folder holds all scores.

    Args:
        candidates: Training examples that are scored: a number (drawn by ``seed``), a list of
            dataset indices, or None for as many as keep the cost under 5 % of training, 8 at
            least.
        queries: Examples of the batch that are asked about.
        query: The scalar asked about, or a `Question` such as
            ``Score(HeadScores(), "induction", layer=1, head=0)``; None takes the loss of the task.
        top: Proponents and opponents that are shown.
        seed: Of the choice of candidates.
        method: ``"tracin"``, ``"kfac"`` or ``"ekfac"``.
        damping: λ of ``"kfac"`` and ``"ekfac"``, added to every eigenvalue.
        optimizer_aware: Let ``"tracin"`` divide by Adam's √v̂ + ε as its steps do.
        gather_every: Factors are gathered from every so many training batches; None takes as many
            as cost about 5 % of training, 20 for ``"kfac"`` and 60 for ``"ekfac"``.
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
        query: TargetOption | Question = None,
        top: int = 5,
        seed: int = 0,
        method: Literal["tracin", "kfac", "ekfac"] = "tracin",
        damping: float = 0.01,
        optimizer_aware: bool = False,
        gather_every: int | None = None,
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
        every = GATHER_EVERY.get(method, 1) if gather_every is None else gather_every
        counted("gather_every", every, 1)
        self._gather_every = every
        self._factors: TrainingFactors | None = None
        self._watching: tuple[ExitStack, int] | None = None
        self._batches = 0
        self._norm: Tensor | None = None
        self._previous: Record | None = None
        measurement: Any
        if method == "tracin":
            measurement = TracIn(
                candidates=candidates,
                queries=queries,
                query=query,
                top=top,
                seed=seed,
                optimizer_aware=optimizer_aware,
            )
        else:
            measurement = TrainingInfluence(
                method=method,
                damping=damping,
                candidates=candidates,
                queries=queries,
                query=query,
                top=top,
                seed=seed,
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

    # ---------------------------------------------------------------- gathering factors

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to watch the layers, if this batch's factors are gathered.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: The training batch.
            batch_idx: Its index in the epoch.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._stop_watching()
        measurement: Any = self.measurements[0]
        if not isinstance(measurement, TrainingInfluence) or not trainer.is_global_zero:
            return
        if self._factors is None:
            self._factors = factors_for(pl_module, measurement)
        if self._batches % self._gather_every == 0:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            if pl_module.automatic_optimization:
                scale /= trainer.accumulate_grad_batches
            stack, size = ExitStack(), batch_size(batch)
            self._factors.attach(stack, pl_module, size, scale)
            self._watching = (stack, size)
        self._batches += 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what was seen.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        if self._watching is not None and self._factors is not None:
            size = self._watching[1]
            self._stop_watching()
            self._factors.take(size)
            self._norm = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the norm of the gradient, before anything clips it.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            optimizer: The optimizer that is about to step.
        """
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._factors is not None and self._norm is None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            known = [g.detach().norm() for g in grads if g is not None]
            self._norm = torch.stack(known).norm() if known else None

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching[0].close()
            self._watching = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off, and flush what there is.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            exception: What happened.
        """
        self._stop_watching()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model and its factors.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …
        """
        self._stop_watching()
        self._factors = self._norm = self._previous = None
        super().teardown(trainer, pl_module, stage)

    # ---------------------------------------------------------------- measuring

    def _measure(self, trainer: Trainer, model: LightningModule, session: Session) -> list[Record]:
        context = session.context(trainer, model, self.batch, self.task, self.dataset(trainer))
        measurement: Any = self.measurements[0]
        if isinstance(measurement, TrainingInfluence):
            self._factors = self._factors or factors_for(model, measurement)
            norm = None if self._norm is None else float(self._norm)
            context.shared(FACTORS, lambda: (self._factors, norm))
        elif measurement.optimizer_aware:
            context.shared(RATES, lambda: step_rates(plain_optimizers(trainer), model))
        inside = trainer.precision_plugin.forward_context if self.precision == "trainer" else None
        with quiet():
            records = measure(model, self.measurements, context=context, inside=inside)
        if self._factors is not None and self._factors.corrected:
            self._factors.refresh()
        return records + self._changes(records, measurement.name, session)

    def _changes(self, records: list[Record], name: str, session: Session) -> list[Record]:
        """Compare the ranking with that of the firing before, also of an interrupted run."""
        now = next((r for r in records if r.name == f"{name}/scores"), None)
        if now is None or "reason" in now.panel.convention:
            return []
        before = self._previous
        if before is None and session.run is not None and now.step:
            earlier = session.run.records(now.name, source="live")
            usable = (r for r in earlier if "reason" not in r.panel.convention)
            before = max((r for r in usable if r.step < now.step), key=_step, default=None)
        self._previous = now
        return ranking_change(before, now)

    def dataset(self, trainer: Trainer) -> IndexedData | None:
        """Return the training examples by index.

        Args:
            trainer: The Trainer.

        Returns:
            The examples.
        """
        return training_data(trainer)


def factors_for(model: LightningModule, measurement: TrainingInfluence) -> TrainingFactors:
    """Return factors that are yet to be gathered.

    Args:
        model: The user's model.
        measurement: Says how they are used.

    Returns:
        The factors.
    """
    compiled = ("_orig_mod", "_compiled_call_impl")
    if any(getattr(m, a, None) is not None for m in model.modules() for a in compiled):
        warnings.warn(
            "InfluenceMonitor: a compiled module calls no hooks, so no factors are gathered from "
            'it; use method="tracin", or InfluenceFunction at checkpoints.',
            stacklevel=3,
        )
    return TrainingFactors(
        model, damping=measurement.damping, corrected=measurement.method == "ekfac"
    )


def plain_optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """Return the optimizers without Lightning's wrappers.

    Args:
        trainer: The Trainer.

    Returns:
        The optimizers.
    """
    return [getattr(o, "optimizer", o) for o in trainer.optimizers]


def _step(record: Record) -> int:
    return record.step


def affordable(tracin: Any, passes: float, available: int) -> Any:
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


def _count(candidates: int | Sequence[int]) -> int:
    return candidates if isinstance(candidates, int) else len(candidates)
