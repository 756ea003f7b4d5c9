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
        late = [r for r in live if empty or sink.place not in _places_at(sessions, r.step)]
        if late:
            sink.replay(late)
        if went_back and not empty and any(sink.place in s["places"] for s in sessions):
            sink.resume(step)
    session = {"from": step, "places": [sink.place for sink in sinks]}
    run.update_info(sessions=[*sessions, session])


def send_swept(run: Run, sinks: Sequence[Sink], written: Collection[tuple[str, int]]) -> None:
    """Send the records of a sweep to loggers, except those that a logger holds already.

    What training logged is the same number: a logger of the session that measured it has it.

    Args:
        run: The run that was swept into.
        sinks: Sinks of the loggers; they are started here, and finished if they got anything.
        written: Name and step of each record that the sweep has written.
    """
    swept = [r for r in run.records(source="sweep") if (r.name, r.step) in written]
    live = {(r.name, r.step) for r in run.records(source="live")}
    sessions = run.info.get("sessions", [])
    for sink in sinks:
        sent: dict[str, list[int]] = dict(run.info.get("swept_to", {}).get(sink.place, {}))
        fresh = [
            r
            for r in swept
            if r.step not in sent.get(r.name, ())
            and not ((r.name, r.step) in live and sink.place in _places_at(sessions, r.step))
        ]
        if not fresh:
            continue
        sink.start({})
        sink.write_all(fresh)
        sink.finish(run, {})
        for record in fresh:
            sent[record.name] = [*sent.get(record.name, ()), record.step]
        run.update_info(swept_to={**run.info.get("swept_to", {}), sink.place: sent})


def _places_at(sessions: Sequence[dict[str, Any]], step: int) -> Sequence[str]:
    """Return where the session logged that took this step: the last that started before it."""
    owners = [s for s in sessions if s["from"] < step or s["from"] == step == 0]
    places: Sequence[str] = owners[-1]["places"] if owners else ()
    return places
