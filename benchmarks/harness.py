"""Measure cases side by side: fresh processes that take turns, CPU seconds, ratios in a round.

A benchmark is a script with cases, each a function that sets up (not measured) and returns the
work (measured). `compare` starts the script again for each case, once a round, with one thread;
the order of the cases turns from round to round, so that a busy machine slows all of them alike.
A ratio is formed within a round, then the median over rounds is taken, with an interval for it.

Not measured in a case: the first call, which warms caches up, except in ``megabytes``, the most
memory that any call needed beyond what was there after the set-up.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SURE = 0.9
"""How sure an interval has to be to hold the median, where there are rounds enough (five)."""

LEAST = 0.5
"""CPU seconds that warm calls take together at least: three of a few milliseconds tell nothing."""

Case = Callable[[], Callable[[], Any]]
Round = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Ratio:
    """A median of ratios and the interval that holds the true one."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the three numbers."""
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Promise:
    """A case needs at most so many times what another one needs."""

    case: str
    other: str
    at_most: float
    what: str = "seconds"


def ratio_of(values: Sequence[float]) -> Ratio:
    """Return the median of ratios, between order statistics that hold it with 90 % or more.

    Whatever the distribution, the k-th smallest and the k-th largest of n enclose the true median
    but for twice the chance of fewer than k heads in n throws. Below five rounds: their range.
    """
    ordered, n = sorted(values), len(values)
    cut = 0
    while sum(math.comb(n, i) for i in range(cut + 2)) / 2 ** (n - 1) <= 1 - SURE:
        cut += 1
    return Ratio(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def compared(rounds: Iterable[Round], case: str, other: str, what: str = "seconds") -> Ratio:
    """Return how many times as much a case needs as another one."""
    return ratio_of([r[case][what] / max(r[other][what], 1e-9) for r in rounds])


def fresh(command: Sequence[str]) -> tuple[float, str]:
    """Return the CPU seconds of a fresh process with one thread, and what it printed."""
    # One arena: memory of a thread of its own can be slower by some percent.
    one = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **one}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def in_turns(names: Sequence[str], rounds: int, run: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Return what each name gave in each round, the first name of a round being the next one."""
    found = []
    for i in range(rounds):
        first = i % len(names)
        found.append({name: run(name) for name in [*names[first:], *names[:first]]})
    return found


def compare(
    cases: Mapping[str, Case],
    *,
    beside: str,
    promises: Sequence[Promise] = (),
    facts: Callable[[Any], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure all cases as the command line says and print how they compare.

    Args:
        cases: By name: a function that sets up and returns the work.
        beside: Name of the case that the others are compared with in the table.
        promises: What is to be kept.
        facts: Turns what the work returned into more facts about the case, as plain JSON.

    Returns:
        For each round and case ``seconds`` (median warm call), ``megabytes`` and the facts.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each case")
    parser.add_argument("--calls", type=int, default=3, help="fewest warm calls in a process")
    parser.add_argument("--case", choices=cases, help="run one case in this process, and stop")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(cases[options.case], options.calls, facts)))
        raise SystemExit
    command = [sys.argv[0], "--calls", str(options.calls), "--case"]
    rounds = in_turns(list(cases), options.rounds, functools.partial(_told, command))
    show(rounds, beside)
    judge(rounds, promises)
    return rounds


def _told(command: list[str], name: str) -> dict[str, Any]:
    """Return what a fresh process says about a case on its last line."""
    found: dict[str, Any] = json.loads(fresh([*command, name])[1].splitlines()[-1])
    return found


def measured(
    case: Case, calls: int, facts: Callable[[Any], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return CPU seconds of a warm call and the memory that a call needs, in this process."""
    import torch

    torch.set_num_threads(1)
    work = case()
    gc.collect()
    before = mark_memory()
    result, times = work(), []
    while len(times) < calls or sum(times) < LEAST:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    extra = {} if facts is None else facts(result)
    return {"seconds": statistics.median(times), "megabytes": peak_memory() - before, **extra}


def mark_memory() -> float:
    """Return the resident megabytes, and count the peak anew from here where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak_memory()


def peak_memory() -> float:
    """Return the most megabytes that were resident since they were marked."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def show(rounds: Sequence[Round], beside: str) -> None:
    """Print a table of all cases: seconds, memory, and the ratio to one of them."""
    width = max(len(name) for name in rounds[0])
    for name in rounds[0]:
        seconds = statistics.median(r[name]["seconds"] for r in rounds)
        extra = statistics.median(r[name]["megabytes"] for r in rounds)
        print(
            f"{name:{width}} {seconds:8.3f} CPU s {extra:7.0f} MB more   "
            f"{compared(rounds, name, beside)} x {beside}"
        )


def judge(rounds: Sequence[Round], promises: Iterable[Promise]) -> None:
    """Print for each promise whether it is kept."""
    for p in promises:
        found = compared(rounds, p.case, p.other, p.what)
        print(f"{p.case} / {p.other}, {p.what}: {found}, {verdict(found.median, p.at_most)}")


def verdict(found: float, at_most: float) -> str:
    """Return in words whether a promise is kept."""
    return f"promised {at_most:g}: {'kept' if found <= at_most else 'NOT kept'}"
