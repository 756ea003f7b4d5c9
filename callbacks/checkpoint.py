"""`ScheduledCheckpoint`: checkpoints at chosen or log-spaced steps, for sweeps over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ..schedule import Schedule
from ._base import Callback, LightningModule, Trainer
from ._facts import is_last
from ._progress import Progress

__all__ = ["ScheduledCheckpoint"]


class ScheduledCheckpoint(Callback):
    """Save a checkpoint at given steps, step 0 included, beside any ``ModelCheckpoint``.

    It is a plain callback, so Lightning's default ``ModelCheckpoint`` stays; nothing is ever
    deleted. Files are called ``step=<n>.ckpt``. It logs nothing.

    Args:
        dirpath: Folder of the files; None takes ``<trainer.log_dir>/scheduled_checkpoints``.
        at_steps: Steps to save at, or ``"log"`` for 1, 2, 4, 8, … (with ``every_n_train_steps=n``
            powers of two below n, then every n).
        every_n_train_steps: Save whenever a multiple of n steps is crossed; 100 when nothing is
            given.
        at_start: Save before the first step; None: yes, if the schedule goes by steps.
        at_end: Save at the last step; None: yes, if the schedule goes by steps.
        save_weights_only: Leave optimizer and callbacks out. Sweeps then lack learning rates and
            counts of examples, and training cannot resume.

    Raises:
        ArgumentError: If a value is impossible.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        at_steps: list[int] | Literal["log"] | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool | None = None,
        at_end: bool | None = None,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__()
        self.schedule = Schedule(
            every_n_train_steps=every_n_train_steps,
            at_steps=at_steps,
            at_start=at_start,
            at_end=at_end,
        )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.save_weights_only = save_weights_only
        self.paths: list[Path] = []
        self._last_step = 0
        self._saved_at: int | None = None
        self._progress = Progress()
        self._fitting: tuple[Trainer, LightningModule] | None = None

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return f"{type(self).__qualname__}[{self.schedule}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide the folder, on all ranks together.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …
        """
        base = trainer.log_dir or trainer.default_root_dir
        if self.dirpath is None:
            self.dirpath = Path(base) / "scheduled_checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the first step.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        self._last_step = trainer.global_step
        self._fitting = trainer, pl_module
        if self.schedule.start and trainer.global_step == 0:
            self.save(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember the learning rates of this step: the scheduler moves on before it is saved.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            optimizer: The optimizer that is about to step.
        """
        self._progress.take_rates(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if a scheduled step has come.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        step, last = trainer.global_step, self._last_step
        self._last_step = step
        if self.schedule.crossed(step, last) or (self.schedule.end and step == trainer.max_steps):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the last step.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        if self.schedule.end and is_last(trainer):
            self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model and its optimizers.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …
        """
        self._fitting = None
        self._progress.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates of the last step, by parameter name.

        Returns:
            Built-in types, for whoever adds up over checkpoints; empty outside of training.
        """
        if self._fitting is None:
            return {}
        return {"learning_rates": self._progress.learning_rates(*self._fitting)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rates of the step that training goes on from.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._progress.resume(state_dict)

    def save(self, trainer: Trainer) -> None:
        """Save now, on all ranks, unless this step was saved already.

        Args:
            trainer: The Trainer.
        """
        step = trainer.global_step
        if self.dirpath is None or step == self._saved_at or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_at = step
        path = self.dirpath / f"step={step}.ckpt"
        trainer.save_checkpoint(path, self.save_weights_only)
        self.paths.append(path)
