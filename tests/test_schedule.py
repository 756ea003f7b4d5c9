"""When to measure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from lightning_mi import ArgumentError, Schedule
from lightning_mi.schedule import DEFAULT_STEPS


def fired(schedule: Schedule, steps: Iterable[int]) -> list[int]:
    """Ask as a callback does, after every batch."""
    last, found = 0, []
    for step in steps:
        if schedule.crossed(step, last):
            found.append(step)
        last = step
    return found


def slow_log(step: int, last: int, every: int | None) -> bool:
    powers = {1 << k for k in range(20) if every is None or 1 << k < every}
    multiples = set(range(every, 2000, every)) if every else set()
    return any(last < s <= step for s in powers | multiples)


def test_multiples_are_crossed_not_met() -> None:
    every = Schedule(every_n_train_steps=4)
    assert fired(every, range(1, 13)) == [4, 8, 12]
    assert fired(every, [1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5]) == [4], "steps repeat in accumulation"
    assert fired(every, range(0, 25, 2)) == [4, 8, 12, 16, 20, 24], "two optimizers"
    assert fired(every, range(1, 25, 3)) == [4, 10, 13, 16, 22]
    assert fired(every, [30]) == [30], "once, however many were jumped over"
    assert not every.crossed(8, 8)
    assert not every.crossed(4, 9)


def test_every_step() -> None:
    assert fired(Schedule(every_n_train_steps=1), range(1, 5)) == [1, 2, 3, 4]


def test_given_steps() -> None:
    schedule = Schedule(at_steps=[7, 0, 3, 7])
    assert schedule.at_steps == (0, 3, 7)
    assert schedule.start
    assert not schedule.end
    assert fired(schedule, range(1, 10)) == [3, 7]
    assert fired(schedule, range(0, 12, 2)) == [4, 8]
    assert not Schedule(at_steps=[3]).start


@pytest.mark.parametrize("steps", [np.logspace(0, 2, 3).astype(int), range(5), {3}, (1, 2)])
def test_steps_of_any_kind(steps: Any) -> None:
    found = Schedule(at_steps=steps).at_steps
    assert found == tuple(sorted(int(s) for s in steps))
    assert all(type(s) is int for s in found)


def test_powers_of_two() -> None:
    log = Schedule(at_steps="log")
    assert log.start
    assert log.end
    assert fired(log, range(1, 40)) == [1, 2, 4, 8, 16, 32]
    both = Schedule(at_steps="log", every_n_train_steps=10)
    assert fired(both, range(1, 41)) == [1, 2, 4, 8, 10, 20, 30, 40]


@pytest.mark.parametrize("every", [None, 1, 2, 3, 8, 10, 100])
def test_powers_of_two_against_the_plain_definition(every: int | None) -> None:
    schedule = Schedule(at_steps="log", every_n_train_steps=every)
    for last in range(0, 140, 3):
        for step in range(last, 260, 5):
            assert schedule.crossed(step, last) == slow_log(step, last, every), (step, last)


def test_given_steps_together_with_multiples() -> None:
    both = Schedule(every_n_train_steps=10, at_steps=[3])
    assert fired(both, range(1, 21)) == [3, 10, 20]


def test_defaults() -> None:
    nothing = Schedule()
    assert nothing.every_n_train_steps == DEFAULT_STEPS == 100
    assert nothing.start
    assert nothing.end
    for named in (
        Schedule(every_n_epochs=1),
        Schedule(train_time_interval=timedelta(seconds=1)),
        Schedule(on_validation=True),
        Schedule(at_steps=[500]),
        Schedule(at_end=True),
    ):
        assert named.every_n_train_steps is None
        assert not named.start
        assert not named.crossed(100, 0)
    assert Schedule(at_end=True).end
    assert not Schedule(at_end=False).end
    assert Schedule(every_n_epochs=2, at_start=True).start
    assert not Schedule(every_n_train_steps=2, at_start=False, at_end=False).end


def test_only_validation() -> None:
    assert Schedule(on_validation=True).only_validation
    for other in (
        Schedule(),
        Schedule(on_validation=True, at_start=True),
        Schedule(on_validation=True, every_n_epochs=1),
        Schedule(on_validation=True, at_steps=[1]),
    ):
        assert not other.only_validation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"every_n_train_steps": 2, "every_n_epochs": 1},
            "every_n_train_steps: expected only one .*got every_n_train_steps and every_n_epochs",
        ),
        (
            {"every_n_epochs": 1, "train_time_interval": timedelta(1)},
            "got every_n_epochs and train_time_interval. For a second schedule add",
        ),
        ({"every_n_train_steps": 0}, "every_n_train_steps: expected a positive int, got 0"),
        ({"every_n_epochs": -1}, "every_n_epochs: expected a positive int, got -1"),
        ({"every_n_train_steps": 2.5}, "positive int, got 2.5"),
        ({"at_steps": "lin"}, "at_steps: expected a list of steps or \"log\", got 'lin'"),
        ({"at_steps": 5}, "at_steps: expected a list of steps"),
        ({"at_steps": [1, -2]}, r"at_steps: .*got \[1, -2\]"),
        ({"at_steps": [1.5]}, r"at_steps: .*got \[1.5\]"),
        (
            {"train_time_interval": timedelta()},
            "train_time_interval: expected a positive timedelta",
        ),
        ({"train_time_interval": 5}, "train_time_interval: expected a positive timedelta, got 5"),
        ({"max_overhead": 2}, "max_overhead: expected a share between 0 and 1, got 2. For example"),
        ({"max_overhead": 0}, "max_overhead"),
    ],
)
def test_impossible_values_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Schedule(**arguments)
