"""`MeasurementMonitor`: measure on a schedule while a model trains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ArgumentError, LightningMIError
from ..measurement import IndexedData, Measurement, as_list, check_names, measure
from ..progress import quiet
from ..record import Record
from ..schedule import Schedule
from ..task import Task
from ._base import Callback, LightningModule, Trainer
from ._facts import (
    averages_weights,
    check_writable,
    is_last,
    piecewise,
    refuse_sharded,
    training_data,
)
from ._session import Session

__all__ = ["MeasurementMonitor"]


class MeasurementMonitor(Callback):
    """Take any measurements on a schedule; the monitors with other names only choose defaults.

    Training is bit-identical with and without it. Every record goes to the run folder
    ``<trainer.log_dir>/mi`` and to every logger of the Trainer.

    Logged keys: ``mi/step`` (optimizer steps), ``mi/overhead`` (share of training time, 0 to 1),
    ``mi/nonfinite`` (count), and the keys of the measurements: ``mi_<measurement>/<what>``.

    Args:
        measurements: What to measure.
        batch: What to measure on. None takes the first validation batch that the Trainer delivers
            (sanity check included), else the first training batch; up to 8 examples of it.
        task: How a batch becomes outputs and losses; None is inferred.
        tokenizer: Anything with ``decode(list of ids) -> str``, to show text. None looks for an
            attribute ``tokenizer`` of the model and of the datamodule.
        dirpath: The run folder; None takes ``<trainer.log_dir>/mi``. One for all monitors: the
            first that gives one decides.
        report: Keep ``report.html`` in the run folder fresh while training.
        precision: ``"full"`` measures in the parameters' own precision, ``"trainer"`` inside the
            Trainer's autocast.
        every_n_train_steps: See `lightning_mi.schedule.Schedule`; 100 when nothing is given.
        every_n_epochs: See there.
        train_time_interval: See there.
        at_steps: See there.
        on_validation: See there.
        at_start: See there.
        at_end: See there.
        max_overhead: See there.

    Raises:
        ArgumentError: If a value is impossible.
    """

    def __init__(
        self,
        *,
        measurements: Sequence[Measurement],
        batch: Any = None,
        task: Task | None = None,
        tokenizer: Any = None,
        dirpath: str | Path | None = None,
        report: bool = False,
        precision: Literal["full", "trainer"] = "full",
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        at_steps: list[int] | Literal["log"] | None = None,
        on_validation: bool = False,
        at_start: bool | None = None,
        at_end: bool | None = None,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__()
        self.schedule = Schedule(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            at_steps=at_steps,
            on_validation=on_validation,
            at_start=at_start,
            at_end=at_end,
            max_overhead=max_overhead,
        )
        if precision not in ("full", "trainer"):
            raise ArgumentError.of(
                "precision", expected='"full" or "trainer"', got=repr(precision), do="Choose one."
            )
        self.measurements = tuple(as_list(measurements))
        check_names(self.measurements)
        self.batch, self.task, self.tokenizer = batch, task, tokenizer
        self.dirpath, self.report, self.precision = dirpath, report, precision
        self.skipped = self.failed = 0
        # Lightning asks for it at every hook of every step.
        names = ",".join(m.name for m in self.measurements)
        self._state_key = f"{type(self).__qualname__}[{names}]"
        self._session: Session | None = None
        self._begun = False
        self._last_step = 0
        self._fired_at: int | None = None
        self._fired_time = 0.0
        self._cost = 0.0
        self._restored: Mapping[str, Any] = {}
        self._trainer: Trainer | None = None
        self._model: LightningModule | None = None
        self._listeners: list[Callable[[Sequence[Record]], None]] = []

    def listen(self, hear: Callable[[Sequence[Record]], None]) -> None:
        """Call a function with the records of each firing, until this fit ends.

        Args:
            hear: Called in the process that writes, after run folder and loggers have the records.
        """
        self._listeners.append(hear)

    @property
    def run_path(self) -> Path | None:
        """The run folder, once training has started."""
        run = self._session.run if self._session is not None else None
        return run.path if run is not None else None

    @property
    def decode(self) -> Callable[[Sequence[int]], list[str]] | None:
        """Token ids to one piece of text each, as found in tokenizer, model or datamodule."""
        return self._session.decode if self._session is not None else None

    @property
    def state_key(self) -> str:
        """Tells two instances of one class apart in a checkpoint."""
        return self._state_key

    # ---------------------------------------------------------------- life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what only the Trainer knows, and join the other monitors.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …

        Raises:
            LightningMIError: If the strategy shards the model.
            ArgumentError: If the schedule never fires, or two measurements have one name.
        """
        monitors = monitors_of(trainer)
        self._listeners.clear()  # an earlier fit may have ended in an error, without teardown
        refuse_sharded(
            trainer,
            "Train with ddp, or measure the checkpoints with lightning_mi.sweep afterwards.",
        )
        if stage == "fit" and self.schedule.only_validation and not trainer.enable_validation:
            raise ArgumentError.of(
                "on_validation",
                expected="a Trainer that validates",
                got="no validation (no loader, no validation_step, or limit_val_batches=0)",
                do="Pass every_n_train_steps=100, or give the Trainer a validation loader.",
            )
        check_names(m for c in monitors for m in c.measurements)
        base = trainer.log_dir or trainer.default_root_dir  # on every rank: it is broadcast
        if monitors[0] is self:
            self._open(trainer, monitors, Path(base), stage)
        self._session = monitors[0]._session
        self._trainer, self._model = trainer, pl_module

    def _open(
        self, trainer: Trainer, monitors: Sequence[MeasurementMonitor], base: Path, stage: str
    ) -> None:
        """Make the session that the other monitors find here."""
        given = next((c.dirpath for c in monitors if c.dirpath is not None), None)
        folder = Path(given) if given is not None else base / "mi"
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and (stage == "fit" or self.schedule.on_validation):
            check_writable(folder)
        earlier = self._session
        self._session = Session(folder, writes=bool(writes))
        if earlier is not None and earlier.run is not None:
            # A second fit or a validate of the same Trainer goes on in the same run.
            self._session.restored = earlier.state(trainer, None)
            self._session.batch = earlier.batch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run folder.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        self._ready(trainer, pl_module)

    def _ready(self, trainer: Trainer, model: LightningModule) -> Session:
        session = self._shared
        if self._restored:  # a checkpoint knows better than an earlier fit of this Trainer
            session.restored, self._restored = self._restored, {}
        datamodule = getattr(trainer, "datamodule", None)
        owners = (getattr(model, "tokenizer", None), getattr(datamodule, "tokenizer", None))
        tokenizer = next((t for t in (self.tokenizer, *owners) if t is not None), None)
        session.decode = session.decode or piecewise(tokenizer)
        session.start(trainer, model)
        return session

    @property
    def _shared(self) -> Session:
        if self._session is None:
            raise LightningMIError(
                f"{type(self).__name__}: expected to be a callback of a Trainer, got none. "
                "Pass it in Trainer(callbacks=[…])."
            )
        return self._session

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        session = self._shared
        self._begun = False
        self._last_step = trainer.global_step
        self._fired_time = time.monotonic()
        session.begin_clock(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete folder and loggers.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        self._shared.finish("finished", report=_wants_report(trainer))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Flush what there is: after an error or Ctrl-C no other hook runs.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            exception: What happened.
        """
        if self._session is not None:
            self._session.finish("interrupted", report=_wants_report(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of model and Trainer.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …
        """
        self._trainer = self._model = None
        self._listeners.clear()
        if self._session is not None:
            self._session.forget()

    # ---------------------------------------------------------------- moments

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch to measure on, where the user gave none.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: The validation batch.
            batch_idx: Its index.
            dataloader_idx: Index of its loader.
        """
        if batch_idx == 0 and dataloader_idx == 0:
            self._shared.take_batch(batch)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch to measure on, where the user gave none.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: The test batch.
            batch_idx: Its index.
            dataloader_idx: Index of its loader.
        """
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure before the first step; count examples and tokens.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: The training batch.
            batch_idx: Its index in the epoch.
        """
        session = self._shared
        if not self._begun:
            self._begun = True
            session.take_batch(batch)
            self.before_first_step(trainer, batch)
            if self.schedule.start and trainer.global_step == 0:
                self.fire(trainer, pl_module)
        session.progress.count(trainer, batch, batch_idx)

    def before_first_step(self, trainer: Trainer, batch: Any) -> None:
        """Adapt to the training data, also when training resumes; a place for subclasses.

        Args:
            trainer: The Trainer.
            batch: The first training batch of this fit.
        """

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember the learning rates of this step.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            optimizer: The optimizer that is about to step.
        """
        self._shared.progress.take_rates(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure if a scheduled step or time has come.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        step, last = trainer.global_step, self._last_step
        if step == last:
            return
        self._last_step = step
        if self.schedule.crossed(step, last) or self._time_has_come():
            self.fire(trainer, pl_module)

    def _time_has_come(self) -> bool:
        interval = self.schedule.train_time_interval
        if interval is None:
            return False
        return time.monotonic() - self._fired_time >= interval.total_seconds()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after validation, if asked to; never after the sanity check.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        if self.schedule.on_validation and not trainer.sanity_checking:
            self._ready(trainer, pl_module)
            self.fire(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after a test, if asked to measure after validation.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        self.on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of an epoch, and at the last step.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        every = self.schedule.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self.fire(trainer, pl_module)
        # Here and not in on_train_end, where a callback may have put averaged weights in place.
        if self.schedule.end and is_last(trainer):
            self.fire(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the last step, if training ended outside an epoch's end.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        if self.schedule.end and not averages_weights(trainer):
            self.fire(trainer, pl_module)

    # ---------------------------------------------------------------- measuring

    def fire(self, trainer: Trainer, model: LightningModule) -> None:
        """Measure now, unless this step was measured already or the budget is spent.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Raises:
            LightningMIError: If the first firing fails. A later failure is a warning, because by
                then the run is worth more than the measurement; what other measurements found at
                that step is kept.
        """
        session = self._shared
        step = trainer.global_step
        if self._fired_at == step or not trainer.is_global_zero:
            self._fired_at = step
            return
        if self._over_budget(session):
            self.skipped += 1
            return
        began = time.perf_counter()
        try:
            records = self._measure(trainer, model, session)
        except Exception as error:
            if self._fired_at is None:
                raise
            self._excuse(f"step {step}", error)
            records = []
        self._fired_at, self._fired_time = step, time.monotonic()
        if records:
            so_far = time.perf_counter() - began
            session.emit([*records, session.overhead(records, so_far)])
            for hear in self._listeners:
                hear(records)
            if self.report:
                session.refresh_report()
        self._cost = time.perf_counter() - began
        session.progress.spent(self._cost)

    def _excuse(self, what: str, error: Exception) -> None:
        self.failed += 1
        if self.failed == 1:
            warnings.warn(
                f"{type(self).__name__}: {what} was not measured "
                f"({type(error).__name__}: {error}); training goes on, "
                "and further failures are only counted.",
                stacklevel=3,
            )

    def _measure(self, trainer: Trainer, model: LightningModule, session: Session) -> list[Record]:
        context = session.context(trainer, model, self.batch, self.task, self.dataset(trainer))
        inside = trainer.precision_plugin.forward_context if self.precision == "trainer" else None

        def excuse(name: str, error: Exception) -> None:
            self._excuse(f"{name!r} of step {context.step}", error)

        with quiet():
            return measure(
                model,
                self.measurements,
                context=context,
                inside=inside,
                excuse=None if self._fired_at is None else excuse,
            )

    def dataset(self, trainer: Trainer) -> IndexedData | None:
        """Return the training examples by index; only influence needs them.

        Args:
            trainer: The Trainer.

        Returns:
            The examples, or None where the training data has no index.
        """
        try:
            return training_data(trainer)
        except ArgumentError:
            return None

    def _over_budget(self, session: Session) -> bool:
        allowed = self.schedule.max_overhead
        if allowed is None or self._fired_at is None:
            return False
        return session.progress.share(self._cost) > allowed

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return counts and learning rates for a checkpoint, as built-in types.

        Returns:
            What a later sweep cannot know otherwise.
        """
        if self._session is None:
            return {}
        state = self._session.state(self._trainer, self._model)
        return {**state, "fired_at": self._fired_at, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` kept.

        Args:
            state_dict: What it returned.
        """
        self._restored = state_dict
        self._fired_at = state_dict.get("fired_at")
        self.skipped = int(state_dict.get("skipped") or 0)


def monitors_of(trainer: Trainer) -> list[MeasurementMonitor]:
    """Return the monitors among a Trainer's callbacks.

    Args:
        trainer: The Trainer.

    Returns:
        In the order in which they were given.
    """
    return [c for c in trainer.callbacks if isinstance(c, MeasurementMonitor)]  # type: ignore[attr-defined]


def _wants_report(trainer: Trainer) -> bool:
    return any(monitor.report for monitor in monitors_of(trainer))
