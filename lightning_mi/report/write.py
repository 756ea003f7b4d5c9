"""Write the report of a run, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RunError
from ..runs import Run
from .data import payload
from .page import page

__all__ = ["write_report"]


def write_report(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML file that needs nothing else: no network, no library, no server.

    The file is written beside its place and renamed, so a browser that has the old one open never
    reads half of the new one.

    Args:
        run: The run; it may still be going on.
        path: Where to; None: ``report.html`` in the run folder.

    Returns:
        Where it lies.

    Raises:
        RunError: If the file cannot be written.
    """
    target = run.report if path is None else Path(path)
    html = page(payload(run))
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise RunError(
            f"path: expected a file that can be written, got {os.fspath(target)!r} "
            f"({error.strerror or error}). Choose another with --out or path=…."
        ) from error
    finally:
        if partial.exists():
            partial.unlink()
    return target
