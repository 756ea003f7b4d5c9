"""`WandbExtras`: alerts when a role of heads has formed, and the run folder as an artifact."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..emergence import HeadOnset, head_onsets
from ..errors import ArgumentError
from ..record import Record, plain
from ..runs import Run
from ._base import Callback, LightningModule, Trainer, class_names
from .monitor import monitors_of

__all__ = ["WandbExtras"]

SCORES = {"induction": "Induction", "previous_token": "Previous token"}
"""Scores whose rise is told, and how the role is called."""


class WandbExtras(Callback):
    """Tell Weights & Biases more than charts: emergence as it happens, and the run folder.

    It stands beside the monitors and logs no key. It never stops training: what W&B refuses is a
    warning.

    Args:
        alert: Send an alert (by mail or Slack, as set in W&B) when the first head of a role,
            induction or previous token, has formed; once for each role, also in a resumed run. It
            is claimed by the rule of `lightning_mi.emergence.onset`, at the firing at which that
            first holds; the summary judges again with all firings.
        artifact: When training has ended, keep the run folder, records, batch and report, as the
            artifact ``mi-<run id>`` of type ``lightning_mi``.

    Raises:
        ArgumentError: If neither is asked for.
    """

    def __init__(self, *, alert: bool = True, artifact: bool = True) -> None:
        super().__init__()
        if not alert and not artifact:
            raise ArgumentError.of(
                "alert, artifact", expected="at least one", got="neither", do="Pass one as True."
            )
        self.alert, self.artifact = alert, artifact
        self._kept: list[Record] = []
        self._told: set[str] = set()
        self._failed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what only the Trainer knows.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …

        Raises:
            ArgumentError: If there is no WandbLogger, or no monitor to tell of.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a fast_dev_run has dummies for loggers
        for argument, expected, found in (
            ("logger", "a WandbLogger", _loggers(trainer)),
            ("callbacks", "a monitor, such as HeadMonitor", monitors_of(trainer)),
        ):
            if not found:
                raise ArgumentError.of(
                    argument,
                    expected=f"{expected}, for WandbExtras",
                    got="none",
                    do="Give it to the Trainer, or leave WandbExtras out.",
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the monitors; what formed before a resumed run stopped was told then.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
        """
        run = _run(trainer)
        if not self.alert or run is None:
            return
        self._kept = run.records("head_scores", source="live")
        self._told = {score for score in SCORES if self._formed(score) is not None}
        for monitor in monitors_of(trainer):
            monitor.listen(functools.partial(self._hear, trainer))

    def _hear(self, trainer: Trainer, records: Sequence[Record]) -> None:
        fresh = [r for r in records if r.measurement == "head_scores"]
        self._kept += fresh
        for score in (s for s in SCORES if fresh and s not in self._told):
            formed = self._formed(score)
            if formed is not None:
                self._told.add(score)
                text = f"{formed.label} {formed.onset.describe()}"
                self._send(trainer, functools.partial(_alert, SCORES[score], text))

    def _formed(self, score: str) -> HeadOnset | None:
        first = next(iter(head_onsets(self._kept, score)), None)
        return first if first is not None and first.onset.state == "formed" else None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the run folder, which the monitors have completed by now.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            stage: ``"fit"``, ``"validate"``, …
        """
        run = _run(trainer)
        if self.artifact and stage == "fit" and run is not None:
            self._send(trainer, functools.partial(_keep, run))
        self._kept = []

    def _send(self, trainer: Trainer, send: Callable[[Any], None]) -> None:
        """Send to every W&B run; a failure is told once."""
        for logger in _loggers(trainer):
            try:
                send(logger.experiment)
            except Exception as error:  # whatever W&B raises, training must go on
                if not self._failed:
                    warnings.warn(
                        f"WandbExtras: W&B took no alert or artifact ({type(error).__name__}: "
                        f"{error}); training goes on, and the run folder keeps every record.",
                        stacklevel=3,
                    )
                self._failed = True


def _loggers(trainer: Trainer) -> list[Any]:
    return [logger for logger in trainer.loggers if "WandbLogger" in class_names(logger)]


def _run(trainer: Trainer) -> Run | None:
    """Return the folder of the run, or None in a process that writes none."""
    paths = [m.run_path for m in monitors_of(trainer) if m.run_path is not None]
    return Run(paths[0]) if paths else None


def _alert(role: str, text: str, experiment: Any) -> None:
    experiment.alert(title=f"{role} heads formed", text=text)


def _keep(run: Run, experiment: Any) -> None:
    import wandb

    name = re.sub(r"[^\w.-]", "_", f"mi-{experiment.id}")
    made = wandb.Artifact(name, type="lightning_mi", metadata=plain(run.info))
    made.add_dir(str(run.path))
    experiment.log_artifact(made)
