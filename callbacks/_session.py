"""What all monitors of one Trainer share: the run folder, the loggers, the batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attribution.drifting import drift_series, is_attribution
from ..attribution.drifting import moved as moved_on
from ..batch import batch_size, cloned, cut, moved
from ..checkpoints import STATE_MARK
from ..comparison import agreement
from ..influence import tracin_sum
from ..measurement import Context, IndexedData, at_home
from ..record import Record, scalar
from ..runs import Run
from ..sinks import NOTES, Sink, join, sinks_for
from ..task import Task
from ._base import LightningModule, Trainer
from ._facts import facts, outcome, planned_steps, say
from ._progress import Progress

__all__ = ["Session"]

PATIENCE = 50
"""Between two reports pass so many times what one takes, so that they cost 2 % at most."""

MOVING = ("state", "summary", *NOTES)
"""Facts about a run that change, and so are no constants for a logger."""

BATCH = 8
"""Examples of the measured batch that are kept, where the user gives none."""


class Session:
    """One for each Trainer, made by the first monitor and found by the others.

    Args:
        folder: Where the run folder goes.
        writes: Whether this process writes (rank zero, and no ``fast_dev_run``).
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.run: Run | None = None
        self.sinks: list[Sink] = []
        self.batch: Any = None
        self.decode: Callable[[Sequence[int]], list[str]] | None = None
        self.progress = Progress()
        self.restored: Mapping[str, Any] = {}
        self._context: tuple[tuple[int, int], Context] | None = None
        self._tasks: dict[int, Task] = {}
        self._moment: dict[str, Record] = {}
        self._latest: dict[str, Record] = {}
        self._written: set[str] = set()
        self._begun = self._finished = False
        self._report_due = 0.0

    # ---------------------------------------------------------------- life

    def start(self, trainer: Trainer, model: LightningModule) -> None:
        """Open the run folder and the loggers, once.

        Args:
            trainer: The Trainer.
            model: The user's model.
        """
        if self.run is not None or not self.writes:
            return
        self.progress.resume(self.restored)
        self.run = Run.create(self._own_folder(), facts(trainer, model))
        step = int(self.restored.get("step") or 0)  # a resuming Trainer does not know it yet
        went_back = self._continue(step)
        if self.batch is None:
            self.batch = self.run.batch()  # a resumed run goes on with the batch it had
        self.sinks = sinks_for(trainer.loggers)
        say(trainer, f"lightning_mi: records go to {self.run.path}")
        for sink in self.sinks:
            sink.start({k: v for k, v in self.run.info.items() if k not in MOVING})
        join(self.run, self.sinks, step, went_back=went_back)

    def _own_folder(self) -> Path:
        """Return a folder that holds no other run, unless this one continues it."""
        folder, version = self.folder, 0
        continued = self.restored.get("run")
        while _is_used(folder) and not _is_same(folder, continued):
            version += 1
            folder = self.folder.with_name(f"{self.folder.name}-v{version}")
        return folder

    def _continue(self, step: int) -> bool:
        """Bring the records of the interrupted run along; say if it had gone further than this."""
        before = self.restored.get("run")
        if before is None or self.run is None or not _is_used(Path(before)):
            return False
        old = Run(before)
        records = old.records()
        if _is_same(self.run.path, before):
            self.run.resume(step)
        else:
            self.run.write_all(r for r in records if r.step <= step)
            self.run.update_info(**{k: v for k, v in old.info.items() if k in NOTES})
            if (batch := old.batch()) is not None:
                self.run.save_batch(batch)
        return any(r.source == "live" and r.step > step for r in records)

    def finish(self, state: str, *, report: bool = False) -> None:
        """Complete folder and loggers, once.

        Args:
            state: ``"finished"`` or ``"interrupted"``.
            report: Whether to write the HTML report first, so that loggers can show it.
        """
        if self._finished or self.run is None:
            return
        self._finished = True
        try:
            self._conclude(state)
        except OSError as error:
            self._warn("run folder", error)
        if report:
            self.write_report()
        if state == "finished":
            for sink in self.sinks:
                sink.finish(self.run, self.run.info.get("summary", {}))

    def _conclude(self, state: str) -> None:
        """Write what follows from all records together."""
        if self.run is not None:
            live = self.run.records(source="live")
            self.run.write_all(tracin_sum(live))
            self.run.write_all(r for r in drift_series(live) if r.what.endswith("_final"))
            self.run.update_info(state=state, summary=outcome(live))

    def write_report(self) -> None:
        """Write the HTML report; a fault in it never stops training."""
        from ..report import write_report

        if self.run is None:
            return
        began = time.perf_counter()
        try:
            write_report(self.run)
        except Exception as error:
            self._warn("report", error)
        ended = time.perf_counter()
        self._report_due = ended + PATIENCE * (ended - began)

    def refresh_report(self) -> None:
        """Write the report again, if that was not done a moment ago: it reads the whole run."""
        if time.perf_counter() >= self._report_due:
            self.write_report()

    # ---------------------------------------------------------------- what is known

    def take_batch(self, batch: Any) -> None:
        """Keep the first batch that comes, cut and copied.

        Args:
            batch: A batch that the Trainer delivered, on the model's device.
        """
        if self.batch is None:
            self.batch = cloned(cut(batch, min(BATCH, batch_size(batch))))

    def keep_batch(self, batch: Any) -> None:
        """Store the measured batch in the run folder, for later sweeps.

        Args:
            batch: The batch.
        """
        if self.run is not None and "batch" not in self._written:
            self._written.add("batch")
            self.run.save_batch(moved(_builtin(batch), torch.device("cpu")))

    def state(self, trainer: Trainer | None, model: nn.Module | None) -> dict[str, Any]:
        """Return what a checkpoint does not hold by itself, as built-in types.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Returns:
            Counts, learning rates and the run folder.
        """
        return {
            STATE_MARK: 1,
            **self.progress.state(trainer, model),
            "run": str((self.run.path if self.run is not None else self.folder).resolve()),
        }

    # ---------------------------------------------------------------- measuring

    def context(
        self,
        trainer: Trainer,
        model: LightningModule,
        batch: Any,
        task: Task | None,
        dataset: IndexedData | None,
    ) -> Context:
        """Return what measurements are handed; monitors that fire together share it.

        Args:
            trainer: The Trainer.
            model: The user's model.
            batch: The batch of the monitor, or None for the shared one.
            task: The task of the monitor, or None.
            dataset: Training examples by index, or None.

        Returns:
            The context of this step.
        """
        step = trainer.global_step
        batch = self.batch if batch is None else batch
        key = (step, id(batch))
        if self._context is not None and self._context[0] == key and task is None:
            context = self._context[1]
            context.dataset = context.dataset or dataset
            return context
        known = self._inferred(batch) if task is None else task
        if batch is not None:
            self.keep_batch(batch)
        context = Context(
            model,
            at_home(model, batch),
            known,
            step=step,
            epoch=trainer.current_epoch,
            samples=self.progress.samples if step else 0,
            tokens=self.progress.tokens if step else 0,
            dataset=dataset,
            learning_rates=self.progress.learning_rates(trainer, model),
            decode=self.decode,
        )
        self._context = (key, context) if task is None else None
        return context

    def _inferred(self, batch: Any) -> Task | None:
        """Return what an earlier firing found out about a batch: it took a forward pass."""
        if self._context is not None:
            (_, name), context = self._context
            if context.known_task is not None:
                self._tasks[name] = context.known_task
        return self._tasks.get(id(batch))

    def emit(self, records: Sequence[Record]) -> None:
        """Write the records of a firing, and what follows from all records of this step.

        Args:
            records: Records of one step.
        """
        if not records:
            return
        if any(r.step != records[0].step for r in self._moment.values()):
            self._moment.clear()
        fresh = {r.name: r for r in records}
        self._moment.update(fresh)
        derived = agreement(list(self._moment.values()))
        derived += [d for r in records if is_attribution(r) for d in self._drift(r)]
        new = [r for r in derived if r.name not in self._moment]
        self._moment.update({r.name: r for r in new})
        self._deliver([*records, *new])

    def _drift(self, record: Record) -> list[Record]:
        """Return how an attribution has moved since it was measured before, if it was."""
        before = self._latest.get(record.name)
        if before is None and self.run is not None and record.step:  # training was resumed
            earlier = self.run.records(record.name, source="live")
            before = next((r for r in reversed(earlier) if r.step < record.step), None)
        self._latest[record.name] = record
        return moved_on(before, record)

    def overhead(self, records: Sequence[Record], so_far: float) -> Record:
        """Return the share of training time that measuring has taken so far.

        Args:
            records: Records of the firing, for their moment.
            so_far: Seconds that this firing has taken, its writing not yet included.

        Returns:
            The record ``monitor/overhead``.
        """
        panel = scalar(self.progress.share(so_far), "1", display={"headline": "overhead"})
        made_by = {"class_path": "lightning_mi.callbacks.MeasurementMonitor"}
        return records[0].replace(name="monitor/overhead", panel=panel, made_by=made_by)

    def begin_clock(self, trainer: Trainer) -> None:
        """Start counting training time, at the first step rather than at set-up.

        Args:
            trainer: A Trainer whose loaders are set up, so that it knows how long it will train.
        """
        self.progress.begin()
        if self.run is not None and not self._begun:
            self._begun = True
            self.run.update_info(max_steps=planned_steps(trainer), state="running")

    def forget(self) -> None:
        """Drop everything that refers to the model or its tensors."""
        self._context = None
        self._tasks.clear()
        self._moment.clear()
        self._latest.clear()
        self.progress.forget()
        self.sinks = []

    def _deliver(self, records: list[Record]) -> None:
        if self.run is not None:
            try:
                self.run.write_all(records)
            except OSError as error:
                self._warn("run folder", error)
        for sink in self.sinks:
            sink.write_all(records)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._written:
            self._written.add(what)
            warnings.warn(
                f"lightning_mi: the {what} could not be written ({error}); training goes on.",
                stacklevel=3,
            )


def _is_used(folder: Path) -> bool:
    records = folder / "records.jsonl"
    return records.exists() and records.stat().st_size > 0


def _is_same(folder: Path, other: str | None) -> bool:
    return other is not None and folder.resolve() == Path(other).resolve()


def _builtin(batch: Any) -> Any:
    """Keep only what can be loaded again without running code."""
    if isinstance(batch, Mapping):
        return {str(k): _builtin(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return [_builtin(v) for v in batch]
    if isinstance(batch, Tensor):
        return batch.detach().as_subclass(Tensor)
    return batch if isinstance(batch, str | int | float | bool) else None
