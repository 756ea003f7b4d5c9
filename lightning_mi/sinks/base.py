"""What all sinks have in common: `Sink`, the shared flow `LoggerSink`, and `Guarded`."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..record import Record
from ..runs import Run
from .grid import over_steps
from .keys import NONFINITE, STEP, Plan, Shown, plan
from .pictures import Scales

__all__ = ["Guarded", "LoggerSink", "Sink"]

RUN_SECTION = "mi_run"
"""Section of what belongs to the run as a whole: its final table, its report, its summary."""

RESUMED = f"{RUN_SECTION}/resumed_at"
"""Key of the step that training went on from; rows of later steps logged before it do not count."""


class Sink(Protocol):
    """Takes records to one place."""

    @property
    def place(self) -> str:
        """Tells the places of a run apart, also after a restart."""

    def is_empty(self) -> bool:
        """Say whether nothing of ours is there, where that can be told."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Prepare, and store what is constant during the run.

        Args:
            info: Plain JSON.
        """

    def replay(self, records: Sequence[Record]) -> None:
        """Write the scalars of what was measured before this place was there.

        Args:
            records: What was measured.
        """

    def resume(self, step: int) -> None:
        """Say that training goes on from an earlier step than was written here.

        Args:
            step: Optimizer steps taken in the checkpoint.
        """

    def write(self, record: Record) -> None:
        """Write one record.

        Args:
            record: What was measured.
        """

    def write_all(self, records: Sequence[Record]) -> None:
        """Write everything of one firing: scalars in one call, then pictures.

        Args:
            records: What was measured, usually at one step.
        """

    def finish(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Write what is known only at the end.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """


class LoggerSink:
    """The flow that all loggers share; subclasses say how their logger draws and keeps text.

    Args:
        logger: A Lightning logger.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.scales = Scales()
        self.last_step = 0
        self._nonfinite = 0.0
        self._finished = False
        self._source = "live"

    @property
    def kind(self) -> str:
        """Name of the logger's class."""
        return type(self.logger).__name__

    @property
    def place(self) -> str:
        """The kind of logger, its name and version: the same when a resumed run goes on there."""
        name, version = (getattr(self.logger, what, None) for what in ("name", "version"))
        return f"{self.kind} {name}/{version}"

    def is_empty(self) -> bool:
        """Say whether the log was started anew; most loggers go on where they were."""
        return False

    def start(self, info: Mapping[str, Any]) -> None:
        """Store what is constant during the run.

        Args:
            info: Plain JSON.
        """
        self._finished = False
        if info:
            self.log_constants(info)

    def replay(self, records: Sequence[Record]) -> None:
        """Write the scalars of what was measured before this logger was there, without pictures.

        Args:
            records: What was measured.
        """
        for step, group in _by_step(records):
            self._log_row(group, step)

    def resume(self, step: int) -> None:
        """Mark that training goes on from an earlier step than was logged here.

        A logger only appends: what it shows of later steps belongs to weights that no longer exist.

        Args:
            step: Optimizer steps taken in the checkpoint.
        """
        self.log_scalars(Plan({RESUMED: float(step), STEP: float(step)}), step)

    def write(self, record: Record) -> None:
        """Write one record.

        Args:
            record: What was measured.
        """
        self.write_all([record])

    def write_all(self, records: Sequence[Record]) -> None:
        """Write everything of one firing: scalars in one call, then pictures.

        Args:
            records: What was measured.
        """
        for step, group in _by_step(records):
            self._source = group[0].source
            planned = self._log_row(group, step)
            if planned.pictures:
                self.log_pictures(planned.pictures, step)

    def finish(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Write what is known only at the end; a second call does nothing.

        Args:
            run: All records, and the report if there is one.
            summary: Values by name.
        """
        if self._finished:
            return
        self._finished = True
        moved = over_steps(run.records(source=self._source))
        if moved:
            self.log_pictures(moved, self.last_step)
        self.log_end(run, summary)

    def _log_row(self, records: Sequence[Record], step: int) -> Plan:
        planned = self._counted(plan(records), step)
        self.last_step = step
        self.log_scalars(planned, step)
        return planned

    def _counted(self, planned: Plan, step: int) -> Plan:
        """Count undefined values over all firings of a step, as a chart shows its last row."""
        before = self._nonfinite if step == self.last_step else 0.0
        self._nonfinite = before + planned.scalars[NONFINITE]
        return Plan({**planned.scalars, NONFINITE: self._nonfinite}, planned.pictures)

    # ---------------------------------------------------------------- what subclasses replace

    def log_scalars(self, planned: Plan, step: int) -> None:
        """Log the scalars of one firing in one call.

        Args:
            planned: What to log.
            step: Optimizer steps taken.
        """
        self.logger.log_metrics(dict(planned.scalars), step=step)

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        """Say once that this kind of logger shows none.

        Args:
            pictures: What would be drawn.
            step: Optimizer steps taken.
        """
        kinds = {shown.kind == "examples" for shown in pictures}
        for examples in sorted(kinds):
            self.lacks("training examples" if examples else "pictures")

    def lacks(self, what: str) -> None:
        """Say that the logger has no place for something, once a process.

        Args:
            what: What it cannot show, in words.
        """
        _say_once(_channel(self.logger), self.kind, what)

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Say once that this kind of logger has no place for what is constant during the run.

        Args:
            info: Plain JSON.
        """
        self.lacks("constants")

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log what `log_files` does, and the numbers of the summary at the step logged last.

        Args:
            run: All records.
            summary: Values by name.
        """
        self.log_files(run)
        numbers = summary_scalars(summary)
        if numbers:
            self.logger.log_metrics(numbers, step=self.last_step)
        save = getattr(self.logger, "save", None)
        if callable(save):
            save()

    def log_files(self, run: Run) -> None:
        """Say once that this kind of logger keeps no files: neither table nor report.

        Args:
            run: All records, and the report if there is one.
        """
        self.lacks("table of all records and the report")


class Guarded:
    """A sink that never raises: after the first failure it warns once and is silent.

    Args:
        sink: The sink to guard.
    """

    def __init__(self, sink: LoggerSink) -> None:
        self.sink = sink
        self.failed = False

    @property
    def place(self) -> str:
        """Tells the places of a run apart; see `Sink.place`."""
        found: list[str] = []
        self._attempt(lambda: found.append(self.sink.place))
        return found[0] if found else self.sink.kind

    def is_empty(self) -> bool:
        """Say whether nothing of ours is there; see `Sink.is_empty`."""
        found: list[bool] = []
        self._attempt(lambda: found.append(self.sink.is_empty()))
        return bool(found and found[0])

    def start(self, info: Mapping[str, Any]) -> None:
        """Prepare; see `Sink.start`.

        Args:
            info: Plain JSON.
        """
        self._attempt(lambda: self.sink.start(info))

    def replay(self, records: Sequence[Record]) -> None:
        """Write the scalars of earlier records; see `Sink.replay`.

        Args:
            records: What was measured.
        """
        self._attempt(lambda: self.sink.replay(records))

    def resume(self, step: int) -> None:
        """Mark that training goes on from an earlier step; see `Sink.resume`.

        Args:
            step: Optimizer steps taken in the checkpoint.
        """
        self._attempt(lambda: self.sink.resume(step))

    def write(self, record: Record) -> None:
        """Write one record.

        Args:
            record: What was measured.
        """
        self._attempt(lambda: self.sink.write(record))

    def write_all(self, records: Sequence[Record]) -> None:
        """Write everything of one firing.

        Args:
            records: What was measured.
        """
        self._attempt(lambda: self.sink.write_all(records))

    def finish(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Write what is known only at the end; see `Sink.finish`.

        Args:
            run: All records.
            summary: Values by name.
        """
        self._attempt(lambda: self.sink.finish(run, summary))

    def _attempt(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # whatever a logger raises, training must go on
            self.failed = True
            warnings.warn(
                f"{self.sink.kind} failed ({type(error).__name__}: {error}). lightning_mi sends "
                "nothing more to it; training goes on, and the run folder keeps every record.",
                UserWarning,
                stacklevel=4,
            )


def summary_scalars(summary: Mapping[str, float | str]) -> dict[str, float]:
    """Return the finite numbers of a summary, named for loggers that have only scalars.

    Args:
        summary: Values by name.

    Returns:
        Numbers by key, all in the section of the run.

    Example:
        >>> summary_scalars({"mi_head_scores/onset": 40, "head": "L1H3"})
        {'mi_run/mi_head_scores.onset': 40.0}
    """
    return {
        f"{RUN_SECTION}/{name.replace('/', '.')}": float(value)
        for name, value in summary.items()
        if not isinstance(value, str) and math.isfinite(value)
    }


def summary_markdown(summary: Mapping[str, float | str]) -> str:
    """Return a summary as a Markdown table, for loggers that show text.

    Args:
        summary: Values by name.

    Returns:
        One line a value.

    Example:
        >>> print(summary_markdown({"head": "L1H3"}))
        | what | value |
        |---|---|
        | head | L1H3 |
    """
    rows = [f"| {name} | {value} |" for name, value in summary.items()]
    return "\n".join(["| what | value |", "|---|---|", *rows])


def _by_step(records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    ordered = sorted(records, key=lambda record: record.step)
    for step, group in itertools.groupby(ordered, key=lambda record: record.step):
        yield step, list(group)


@functools.cache
def _say_once(channel: str, kind: str, what: str) -> None:
    """Tell one limit of one kind of logger; the cache is what makes it once a process."""
    logging.getLogger(channel).info(
        "%s has no place for the %s of lightning_mi: see the run folder and its report.",
        kind,
        what,
    )


def _channel(logger: Any) -> str:
    """Speak where the logger's own Lightning speaks: its messages are shown, a new logger's not."""
    modules = [cls.__module__ for cls in type(logger).__mro__]
    for package in ("lightning.pytorch", "pytorch_lightning"):
        if any(module.startswith(package) for module in modules):
            return package
    return "lightning_mi"
