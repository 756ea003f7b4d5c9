"""Which records of a run a logger holds already, so that none is lost and none comes twice.

A run may be written in several sessions (training, then resumed), each with loggers of its own, and
swept afterwards. ``run.json`` keeps two notes: ``sessions``, the step that each session started
from and the places it logged to; and ``swept_to``, what sweeps have sent to each place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..runs import Run
from .base import Sink

__all__ = ["NOTES", "join", "send_swept"]

NOTES = ("sessions", "swept_to")
"""The facts of ``run.json`` that this module keeps."""


def join(run: Run, sinks: Sequence[Sink], step: int, *, went_back: bool = False) -> None:
    """Let loggers join a run: each gets the scalars of what was measured without it.

    Args:
        run: The run.
        sinks: Sinks that have started.
        step: Optimizer steps taken when this session starts.
        went_back: Whether records of later steps were there, which do not count any more.
    """
    sessions = run.info.get("sessions", [])
    live = run.records(source="live") if sessions else []
    for sink in sinks:
        empty = sink.is_empty()
        late = [r for r in live if empty or not _is_at(sink, sessions, r.step)]
        if late:
            sink.replay(late)
        if went_back and not empty and any(sink.place in s["places"] for s in sessions):
            sink.resume(step)
    session = {"from": step, "places": [sink.place for sink in sinks]}
    run.update_info(sessions=[*sessions, session])


def send_swept(run: Run, sinks: Sequence[Sink], written: Collection[tuple[str, int]]) -> None:
    """Send the records of a sweep to loggers, except those that a logger holds already.

    What training logged is the same number: a logger of the session that measured it has it. A
    logger that is new to the run gets what was measured before, too, without its pictures.

    Args:
        run: The run that was swept into.
        sinks: Sinks of the loggers; they are started here, and finished if they got anything.
        written: Name and step of each record that the sweep has written.
    """
    if not sinks:
        return
    sessions = run.info.get("sessions", [])
    live, swept = run.records(source="live"), run.records(source="sweep")
    for sink in sinks:
        sink.start({})
        empty = sink.is_empty()
        notes = {} if empty else run.info.get("swept_to", {}).get(sink.place, {})
        held = {(name, step) for name, steps in notes.items() for step in steps}
        held |= {(r.name, r.step) for r in live if not empty and _is_at(sink, sessions, r.step)}
        fresh = [r for r in swept if (r.name, r.step) in written and (r.name, r.step) not in held]
        held |= {(r.name, r.step) for r in fresh}
        earlier = [*live, *swept] if empty else live
        late = {(r.name, r.step): r for r in earlier if (r.name, r.step) not in held}
        for step in sorted({r.step for r in [*fresh, *late.values()]}):
            sink.replay([r for r in late.values() if r.step == step])
            sink.write_all([r for r in fresh if r.step == step])
        if fresh or late:
            sink.finish(run, {})
            sent = sorted({*held, *late})
            grouped = {name: [s for n, s in sent if n == name] for name, _ in sent}
            run.update_info(swept_to={**run.info.get("swept_to", {}), sink.place: grouped})


def _is_at(sink: Sink, sessions: Sequence[dict[str, Any]], step: int) -> bool:
    """Say whether a logger holds what was measured at a step."""
    # The session that measured it is the last that began before it. Its loggers hold it, and so do
    # those of later sessions, which got it when they joined.
    began = [i for i, s in enumerate(sessions) if s["from"] < step or s["from"] == step == 0]
    return bool(began) and any(sink.place in s["places"] for s in sessions[began[-1] :])
