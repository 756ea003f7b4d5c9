"""The one progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["quiet", "track"]

T = TypeVar("T")

_quiet: ContextVar[bool] = ContextVar("lightning_mi_quiet", default=False)


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on the terminal.

    Silent where there is no terminal (a file, a pipe, a batch job) and inside `quiet`, because two
    live displays garble each other.

    Args:
        items: What to iterate over.
        description: What is going on, in a few words.
        total: How many there are, where ``items`` does not know.

    Yields:
        The items.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    if _quiet.get() or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = len(items) if total is None and isinstance(items, Sized) else total
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar, quiet():
        yield from bar.track(items, total=count, description=description)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no bars inside, as within a Trainer that shows its own.

    Yields:
        Nothing.
    """
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)
