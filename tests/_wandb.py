"""Read an offline W&B run back, with the reader that W&B itself brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 30.0


def entries(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every record of a run's log, once W&B has written that the run ended.

    ``run_dir`` is the folder of the run, or the ``files`` folder in it that ``run.dir`` names.
    """
    folder = Path(run_dir)
    folder = folder.parent if folder.name == "files" else folder
    # The console script of this very environment, wherever the environment lies.
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    end = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if any(entry["type"] == "exit" for entry in found):
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{folder}: no exit record; {done.stderr[-500:]}")
        time.sleep(0.1)


def rows(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every row of a run's history, in the order of logging."""
    return [e["history"]["item"] for e in entries(run_dir) if e["type"] == "history"]


def summary(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the run's summary as its updates left it."""
    found: dict[str, Any] = {}
    for entry in entries(run_dir):
        if entry["type"] == "summary":
            found.update(entry["summary"].get("update", {}))
    return found
