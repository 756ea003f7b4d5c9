"""When to measure: `Schedule`, a predicate on the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral
from typing import Any, Literal

from .errors import ArgumentError

__all__ = ["DEFAULT_STEPS", "Schedule"]

DEFAULT_STEPS = 100
"""Steps between two firings when nothing is said: 1 % of training then equals one training step."""


@dataclass(frozen=True)
class Schedule:
    """When to measure. Names follow Lightning's ``ModelCheckpoint``.

    Args:
        every_n_train_steps: Fire whenever a multiple of n optimizer steps was *crossed* since the
            last firing (steps may repeat under accumulation, or jump with several optimizers).
        every_n_epochs: Fire at the end of every n-th training epoch.
        train_time_interval: Fire when so much time has passed since the last firing.
        at_steps: Fire when one of these steps was crossed; ``"log"`` means 1, 2, 4, 8, … and,
            together with ``every_n_train_steps=n``, powers of two below n and then every n.
        on_validation: Fire after every validation.
        at_start: Fire before the first step; None: yes, if the schedule goes by steps.
        at_end: Fire at the last step; None: yes, if the schedule goes by steps.
        max_overhead: Largest share of training time to spend on measuring (0.01 = 1 %); a firing
            that would pass it is skipped and counted.

    Raises:
        ArgumentError: If a value is impossible, or two options exclude each other.

    Example:
        >>> every = Schedule(every_n_train_steps=100)
        >>> every.crossed(step=201, last=199), every.crossed(step=201, last=200)
        (True, False)
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    at_steps: Sequence[int] | Literal["log"] | None = None
    on_validation: bool = False
    at_start: bool | None = None
    at_end: bool | None = None
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        """Check the values; where no moment is named, take every 100 steps."""
        self._check_exclusive()
        for name in ("every_n_train_steps", "every_n_epochs"):
            _check_positive(name, getattr(self, name))
        self._check_steps()
        if self.max_overhead is not None and not 0 < self.max_overhead < 1:
            raise ArgumentError.of(
                "max_overhead",
                expected="a share between 0 and 1",
                got=self.max_overhead,
                do="For example max_overhead=0.01 for one percent.",
            )
        interval = self.train_time_interval
        if interval is not None and not (
            isinstance(interval, timedelta) and interval > timedelta()
        ):
            raise ArgumentError.of(
                "train_time_interval",
                expected="a positive timedelta",
                got=repr(interval),
                do="For example timedelta(minutes=5).",
            )
        if not self._named:
            object.__setattr__(self, "every_n_train_steps", DEFAULT_STEPS)

    def _check_exclusive(self) -> None:
        names = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError.of(
                given[0],
                expected="only one of " + ", ".join(names),
                got=" and ".join(given),
                do="For a second schedule add MeasurementMonitor(measurements=[…(name='second')]).",
            )

    def _check_steps(self) -> None:
        steps: Any = self.at_steps
        if steps is None or (isinstance(steps, str) and steps == "log"):
            return
        listed = isinstance(steps, Iterable) and not isinstance(steps, str)
        if not listed or any(not isinstance(s, Integral) or s < 0 for s in steps):
            raise ArgumentError.of(
                "at_steps",
                expected='a list of steps or "log"',
                got=repr(steps),
                do="For example at_steps=[0, 100, 1000].",
            )
        object.__setattr__(self, "at_steps", tuple(sorted({int(s) for s in steps})))

    @property
    def _named(self) -> bool:
        moments = (self.every_n_train_steps, self.every_n_epochs, self.train_time_interval)
        named = any(m is not None for m in (*moments, self.at_steps))
        return named or self.on_validation or bool(self.at_start) or bool(self.at_end)

    @property
    def by_steps(self) -> bool:
        """Whether firings are regular in steps."""
        return self.every_n_train_steps is not None or self.at_steps == "log"

    @property
    def start(self) -> bool:
        """Whether to fire before the first step."""
        if isinstance(self.at_steps, tuple) and 0 in self.at_steps:
            return True
        return self.by_steps if self.at_start is None else self.at_start

    @property
    def end(self) -> bool:
        """Whether to fire at the last step."""
        return self.by_steps if self.at_end is None else self.at_end

    @property
    def only_validation(self) -> bool:
        """Whether nothing but a validation ever fires."""
        others = (self.every_n_train_steps, self.every_n_epochs, self.train_time_interval)
        quiet = all(m is None for m in (*others, self.at_steps))
        return self.on_validation and quiet and not self.start and not self.end

    def crossed(self, step: int, last: int) -> bool:
        """Say whether a scheduled step lies after ``last`` and not after ``step``.

        Args:
            step: Optimizer steps taken now.
            last: Optimizer steps taken when this was last asked or fired.

        Returns:
            Whether to fire.
        """
        if step <= last:
            return False
        every = self.every_n_train_steps
        if every is not None and step // every > last // every:
            return True
        if self.at_steps is None:
            return False
        if self.at_steps != "log":
            return any(last < s <= step for s in self.at_steps)
        power = 1 << (step.bit_length() - 1)  # the largest power of two up to step
        return power > last and (every is None or power < every)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ArgumentError.of(
            name,
            expected="a positive int",
            got=repr(value),
            do=f"Pass {name}=100, or leave it out.",
        )
