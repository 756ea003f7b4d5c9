"""What all monitors of one Trainer share: the run folder, the loggers, the batch, the counts."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..batch import attention_mask_of, batch_size, cloned, cut, main_input, moved
from ..checkpoints import STATE_MARK
from ..comparison import agreement
from ..emergence import head_onsets
from ..errors import RunError
from ..influence import tracin_sum
from ..measurement import Context, IndexedData
from ..record import Record, scalar
from ..runs import Run
from ..sinks import Sink, sinks_for
from ..task import Task
from ._base import LightningModule, Trainer, class_names

__all__ = ["Session"]

PATIENCE = 50
"""Between two reports pass so many times what one takes, so that they cost 2 % at most."""

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
        self.samples = self.tokens = 0
        self.restored: Mapping[str, Any] = {}
        self.measuring = 0.0
        self._started = time.perf_counter()
        self._counted: tuple[int, int] | None = None
        self._rates: dict[int, list[Any]] = {}
        self._context: tuple[tuple[int, int], Context] | None = None
        self._tasks: dict[int, Task] = {}
        self._moment: dict[str, Record] = {}
        self._written: set[str] = set()
        self._finished = False
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
        self._resume()
        self.run = Run.create(self._own_folder(), facts(trainer, model))
        self._continue()
        if self.batch is None:
            self.batch = self.run.batch()  # a resumed run goes on with the batch it had
        self.sinks = sinks_for(trainer.loggers)
        for sink in self.sinks:
            sink.start(self.run.info)

    def _resume(self) -> None:
        self.samples = int(self.restored.get("samples") or 0)
        self.tokens = int(self.restored.get("tokens") or 0)

    def _own_folder(self) -> Path:
        """Return a folder that holds no other run, unless this one continues it."""
        folder, version = self.folder, 0
        continued = self.restored.get("run")
        while _is_used(folder) and not _is_same(folder, continued):
            version += 1
            folder = self.folder.with_name(f"{self.folder.name}-v{version}")
        return folder

    def _continue(self) -> None:
        """Bring the records of the interrupted run along, where it lies in another folder."""
        step = int(self.restored.get("step") or 0)  # the Trainer does not know it yet
        before = self.restored.get("run")
        if before is None or self.run is None:
            return
        if _is_same(self.run.path, before):
            self.run.resume(step)
        elif _is_used(Path(before)):
            old = Run(before)
            self.run.write_all(r for r in old.records() if r.step <= step)
            if (batch := old.batch()) is not None:
                self.run.save_batch(batch)

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
            self.run.update_info(state=state, summary=onsets(live))

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

    def count(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Count examples and tokens of a training batch, once however many monitors call.

        Args:
            trainer: The Trainer.
            batch: The training batch.
            batch_idx: Its index in the epoch.
        """
        moment = (trainer.current_epoch, batch_idx)
        if moment == self._counted:
            return
        self._counted = moment
        try:
            inputs = main_input(batch)
        except ValueError:
            return
        self.samples += batch_size(batch) * trainer.world_size
        if not inputs.is_floating_point() and inputs.ndim == 2:
            mask = attention_mask_of(batch)
            count = inputs.numel() if mask is None else int(mask.sum())
            self.tokens += count * trainer.world_size

    def take_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rates of a step that is about to be taken.

        Args:
            optimizer: The optimizer. Rates are read here because the scheduler steps afterwards.
        """
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]

    def learning_rates(self, trainer: Trainer, model: nn.Module) -> dict[str, float]:
        """Return the learning rate in force at the last step, by parameter name.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Returns:
            Rates of the parameters that an optimizer holds; before the first step those to come.
        """
        by_id: dict[int, float] = {}
        for optimizer in trainer.optimizers:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            taken = self._rates.get(id(optimizer))
            rates = taken or [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                by_id.update((id(p), float(rate)) for p in group["params"])
        if not self._rates and self.restored.get("learning_rates"):
            return dict(self.restored["learning_rates"])
        return {n: by_id[id(p)] for n, p in model.named_parameters() if id(p) in by_id}

    def state(self, trainer: Trainer | None, model: nn.Module | None) -> dict[str, Any]:
        """Return what a checkpoint does not hold by itself, as built-in types.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Returns:
            Counts, learning rates and the run folder.
        """
        rates = {} if trainer is None or model is None else self.learning_rates(trainer, model)
        return {
            STATE_MARK: 1,
            "step": 0 if trainer is None else trainer.global_step,
            "samples": self.samples,
            "tokens": self.tokens,
            "learning_rates": rates,
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
        own = batch is not None
        batch = self.batch if batch is None else batch
        key = (step, id(batch))
        if self._context is not None and self._context[0] == key and task is None:
            context = self._context[1]
            context.dataset = context.dataset or dataset
            return context
        known = self._inferred(batch) if task is None else task
        home = next(model.parameters(), torch.empty(0))
        if batch is not None:
            self.keep_batch(batch)
            batch = moved(batch, home.device, home.dtype)
            batch = cloned(batch) if not own and _is_inference(batch) else batch
        context = Context(
            model,
            batch,
            known,
            step=step,
            epoch=trainer.current_epoch,
            samples=self.samples if step else 0,
            tokens=self.tokens if step else 0,
            dataset=dataset,
            learning_rates=self.learning_rates(trainer, model),
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
        new = [r for r in derived if r.name not in self._moment]
        self._moment.update({r.name: r for r in new})
        self._deliver([*records, *new])

    def overhead(self, records: Sequence[Record], so_far: float) -> Record:
        """Return the share of training time that measuring has taken so far.

        Args:
            records: Records of the firing, for their moment.
            so_far: Seconds that this firing has taken, its writing not yet included.

        Returns:
            The record ``monitor/overhead``.
        """
        panel = scalar(self.share(so_far), "1", display={"headline": "overhead"})
        made_by = {"class_path": "lightning_mi.callbacks.MeasurementMonitor"}
        return records[0].replace(name="monitor/overhead", panel=panel, made_by=made_by)

    def share(self, more: float = 0.0) -> float:
        """Return the share of the time since the start that went into measuring.

        Args:
            more: Seconds that are not counted yet.

        Returns:
            From 0 to 1.
        """
        elapsed = time.perf_counter() - self._started
        return (self.measuring + more) / max(elapsed, self.measuring + more, 1e-9)

    def spent(self, seconds: float) -> None:
        """Count time that went into measuring.

        Args:
            seconds: Of a firing, its writing included.
        """
        self.measuring += seconds

    def begin_clock(self, trainer: Trainer) -> None:
        """Start counting training time, at the first step rather than at set-up.

        Args:
            trainer: A Trainer whose loaders are set up, so that it knows how long it will train.
        """
        self._started, self.measuring = time.perf_counter(), 0.0
        if self.run is not None and "length" not in self._written:
            self._written.add("length")
            self.run.update_info(max_steps=planned_steps(trainer))

    def forget(self) -> None:
        """Drop everything that refers to the model or its tensors."""
        self._context = None
        self._tasks.clear()
        self._moment.clear()
        self._rates.clear()
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


def facts(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """Return what the report says about a run as a whole.

    Args:
        trainer: The Trainer.
        model: The user's model.

    Returns:
        Plain JSON.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "name": _name(trainer, model),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": str(getattr(datamodule, "description", "")),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "versions": {
            "lightning_mi": __version__,
            "torch": torch.__version__,
            "lightning": _version(type(trainer)),
        },
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "state": "running",
    }


def onsets(records: Sequence[Record]) -> dict[str, int]:
    """Return the step at which the first head of each role formed, for the loggers' summary.

    Args:
        records: Records of one run and one source.

    Returns:
        ``induction_onset`` and ``prev_token_onset``, each only where one may be claimed.
    """
    found = {}
    for score, key in (("induction", "induction"), ("previous_token", "prev_token")):
        steps = [h.onset.step for h in head_onsets(records, score) if h.onset.step is not None]
        if steps:
            found[f"{key}_onset"] = min(steps)
    return found


def planned_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps training will take, or None where that is open.

    ``trainer.estimated_stepping_batches`` would set the loaders up a second time.

    Args:
        trainer: A Trainer whose loaders are set up.

    Returns:
        The smaller of what ``max_steps`` and ``max_epochs`` allow.
    """
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and math.isfinite(batches):
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        limits.append(steps * int(trainer.max_epochs or 0))
    return min(limits) if limits else None


def piecewise(tokenizer: Any) -> Callable[[Sequence[int]], list[str]] | None:
    """Return a function from token ids to one piece of text each.

    Args:
        tokenizer: Anything with ``decode(list of ids) -> str``, a function like that, or None.

    Returns:
        The function, or None.
    """
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        return None
    known: dict[int, str] = {}

    def pieces(ids: Sequence[int]) -> list[str]:
        for i in ids:
            if i not in known:
                known[i] = str(decode([i]))
        return [known[i] for i in ids]

    return pieces


def training_data(trainer: Trainer) -> IndexedData | None:
    """Return the training examples by index, without touching the loader's iterator.

    Args:
        trainer: A Trainer whose loaders are set up.

    Returns:
        The examples of the first training loader, or None if there is none.
    """
    loader: Any = trainer.train_dataloader
    while isinstance(loader, Mapping | list | tuple) and len(loader):
        loader = next(iter(loader.values())) if isinstance(loader, Mapping) else loader[0]
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    return IndexedData(dataset, getattr(loader, "collate_fn", None))


def averages_weights(trainer: Trainer) -> bool:
    """Say whether a callback averages weights.

    Args:
        trainer: The Trainer.

    Returns:
        Whether, at the very end of training, the model may hold averaged weights.
    """
    names = {"WeightAveraging", "StochasticWeightAveraging"}
    return any(names & class_names(c) for c in trainer.callbacks)  # type: ignore[attr-defined]


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before training starts.

    Args:
        folder: The run folder to be.

    Raises:
        RunError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"dirpath: expected a folder that can be written, got {str(folder)!r} "
            f"({error.strerror or error}). Choose another with dirpath=… or the Trainer's "
            "default_root_dir."
        ) from error


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


def _is_inference(batch: Any) -> bool:
    return main_input(batch).is_inference()


def _name(trainer: Trainer, model: nn.Module) -> str:
    names = (getattr(logger, "name", None) for logger in trainer.loggers)
    return next((str(n) for n in names if n), type(model).__name__)


def _version(cls: type) -> str:
    """Return the version of the package that a class comes from."""
    package = sys.modules[cls.__module__.split(".")[0]]
    return f"{package.__name__} {getattr(package, '__version__', '')}"
