"""What all sinks have in common: `Sink`, the shared flow `LoggerSink`, and `Guarded`."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..record import Record
from ..runs import Run
from .grid import over_steps
from .keys import NONFINITE, Plan, Shown, plan
from .pictures import Scales

__all__ = ["Guarded", "LoggerSink", "Sink"]

RUN_SECTION = "mi_run"
"""Section of what belongs to the run as a whole: its final table, its report, its summary."""


class Sink(Protocol):
    """Takes records to one place."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Prepare, and store what is constant during the run.

        Args:
            info: Plain JSON.
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
        told: Kinds of loggers whose limits the user was told of, shared by the sinks of a Trainer.
    """

    def __init__(self, logger: Any, told: set[str] | None = None) -> None:
        self.logger = logger
        self.told = set() if told is None else told
        self.scales = Scales()
        self.last_step = 0
        self._nonfinite = 0.0
        self._finished = False

    @property
    def kind(self) -> str:
        """Name of the logger's class."""
        return type(self.logger).__name__

    def start(self, info: Mapping[str, Any]) -> None:
        """Store what is constant during the run.

        Args:
            info: Plain JSON.
        """
        self._finished = False
        if info:
            self.log_constants(info)

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
            planned = self._counted(plan(group), step)
            self.last_step = step
            self.log_scalars(planned, step)
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
        moved = over_steps(run.records(source="live"))
        if moved:
            self.log_pictures(moved, self.last_step)
        self.log_end(run, summary)

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
        """Say once for each kind of logger that it shows none.

        Args:
            pictures: What would be drawn.
            step: Optimizer steps taken.
        """
        if self.kind not in self.told:
            self.told.add(self.kind)
            keys = ", ".join(shown.key for shown in pictures)
            _channel(self.logger).info(
                "%s gets the scalars of lightning_mi: it has no way to show pictures (%s). "
                "They are in the report and in the run folder.",
                self.kind,
                keys,
            )

    def log_constants(self, info: Mapping[str, Any]) -> None:
        """Keep what is constant during the run; most loggers have no place for it.

        Args:
            info: Plain JSON.
        """

    def log_end(self, run: Run, summary: Mapping[str, float | str]) -> None:
        """Log the numbers of the summary, at the step that was logged last.

        Args:
            run: All records.
            summary: Values by name.
        """
        numbers = summary_scalars(summary)
        if numbers:
            self.logger.log_metrics(numbers, step=self.last_step)
        save = getattr(self.logger, "save", None)
        if callable(save):
            save()


class Guarded:
    """A sink that never raises: after the first failure it warns once and is silent.

    Args:
        sink: The sink to guard.
    """

    def __init__(self, sink: LoggerSink) -> None:
        self.sink = sink
        self.failed = False

    def start(self, info: Mapping[str, Any]) -> None:
        """Prepare; see `Sink.start`.

        Args:
            info: Plain JSON.
        """
        self._attempt(lambda: self.sink.start(info))

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


def _by_step(records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    ordered = sorted(records, key=lambda record: record.step)
    for step, group in itertools.groupby(ordered, key=lambda record: record.step):
        yield step, list(group)


def _channel(logger: Any) -> logging.Logger:
    """Speak where the logger's own Lightning speaks: its messages are shown, a new logger's not."""
    modules = [cls.__module__ for cls in type(logger).__mro__]
    for package in ("lightning.pytorch", "pytorch_lightning"):
        if any(module.startswith(package) for module in modules):
            return logging.getLogger(package)
    return logging.getLogger("lightning_mi")
