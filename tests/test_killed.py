"""A run that dies at any moment keeps what was flushed, and goes on without a duplicate."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from typing import Any

import pytest
from cases import Norm, language_model, loaders, trainer

from lightning_mi import Run
from lightning_mi.callbacks import MeasurementMonitor, ScheduledCheckpoint


class Acknowledging(MeasurementMonitor):
    """Says on a pipe which steps are safe on disk."""

    pipe = -1

    def fire(self, trainer: Any, model: Any) -> None:
        super().fire(trainer, model)
        os.write(self.pipe, f"{trainer.global_step}\n".encode())


def train(folder: Any, pipe: int, steps: int, checkpoint: Any = None) -> None:
    monitor = Acknowledging(measurements=[Norm()], every_n_train_steps=1)
    monitor.pipe = pipe
    saver = ScheduledCheckpoint(folder / "saved", every_n_train_steps=4)
    fitted = trainer(callbacks=[monitor, saver], default_root_dir=folder, max_steps=steps)
    fitted.fit(language_model(), *loaders(), ckpt_path=checkpoint)


def killed(folder: Any, after: float) -> list[int]:
    """Train in a child process, kill it, return the steps it said were safe."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        os.close(read)
        warnings.simplefilter("ignore")
        try:
            train(folder, write, 10_000)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        first = pipe.readline()
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = [first, *pipe.read().splitlines(keepends=True)]
    return [int(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_twenty_random_moments(tmp_path: Any) -> None:
    moments = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        safe = killed(folder, moments.uniform(0, 0.25))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a torn last line is reported by a warning
            found = {r.step for r in Run.open(folder).records("norm")}
        assert set(safe) <= found

    last = sorted((folder / "saved").glob("step=*.ckpt"), key=lambda p: int(p.stem[5:]))[-2:]
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed_from = int(last[0].stem[5:])
        train(folder, write, resumed_from + 6, last[0])
        steps = [r.step for r in Run.open(folder).records("norm")]
    os.close(read)
    os.close(write)
    assert len(steps) == len(set(steps))
    assert set(range(resumed_from + 7)) <= set(steps)
