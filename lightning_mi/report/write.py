"""Write the report of a run, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError, RunError
from ..runs import Run, write_whole
from .data import payload
from .page import page

__all__ = ["write_report"]


def write_report(run: Run | Sequence[Run], path: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML file that needs nothing else: no network, no library, no server.

    The file is written beside its place and renamed, so a browser that has the old one open never
    reads half of the new one.

    Args:
        run: The run; it may still be going on. Of several runs the first is shown in full and the
            others are compared with it.
        path: Where to; None: ``report.html`` in the folder of the run, the first of several.

    Returns:
        Where it lies.

    Raises:
        ArgumentError: If there is no run.
        RunError: If the file cannot be written.
    """
    runs = [run] if isinstance(run, Run) else list(run)
    if not runs:
        raise ArgumentError.of("run", expected="one run or more", got="none", do="Pass a Run.")
    target = runs[0].report if path is None else Path(path)
    html = page(payload(*runs)).encode()
    try:
        write_whole(target, lambda file: file.write(html))
    except OSError as error:
        raise RunError(
            f"path: expected a file that can be written, got {os.fspath(target)!r} "
            f"({error.strerror or error}). Choose another with --out or path=…."
        ) from error
    return target
