"""Several runs side by side: `compared`, and what they have in common, `common_headline`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..emergence import HeadOnset
from ..runs import Run
from .headline import line
from .heads import AXES, behaviour, curve, head_label
from .inputs import agreement
from .pack import pack, thin
from .phrases import highest_first, in_state, joined
from .shelf import Shelf, stack

__all__ = ["common_answers", "common_headline", "compared", "labels_of", "name_of"]

ROLES = 3
"""So many heads of each role are compared."""

MAPS = 4
"""Up to so many runs keep their whole maps."""

Found = dict[str, list[HeadOnset]]


def compared(
    shelves: Sequence[Shelf],
    found: Sequence[Found],
    labels: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """Return what is compared of each run.

    Heads are matched by role, not by place: the strongest induction head of one run stands beside
    the strongest of another, since between seeds the heads of a layer are interchangeable.

    Args:
        shelves: The records of each run.
        found: Onsets of each run.
        labels: A name for each run.
        groups: What no chart knows, as `panels` found it in the first run.

    Returns:
        ``letter``, ``label``, ``last``, ``behaviour``, ``agreement``, ``panels``, ``roles`` and
        ``maps``.
    """
    names = [f"{group['measurement']}/{one['what']}" for group in groups for one in group["curves"]]
    maps = len(shelves) <= MAPS
    return [
        {
            "letter": chr(ord("A") + k) if k < 26 else f"run {k + 1}",
            "label": labels[k],
            "last": max(shelf.times[0], default=0),
            "behaviour": _second_copy(shelf),
            "agreement": _agreement(shelf),
            "panels": {name: one for name in names if (one := curve(shelf, name, name))},
            "roles": {name: _roles(shelf, name, heads) for name, heads in found[k].items()},
            "maps": _maps(shelf, found[k], shelves[0]) if maps else None,
        }
        for k, shelf in enumerate(shelves)
    ]


def name_of(run: Run) -> str:
    """Return what a run is called: its title, its name, or the folder that it lies in."""
    return str(run.info.get("title") or run.info.get("name") or run.path.resolve().parent.name)


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return names that tell runs apart: their titles, and their seeds or folders where needed."""
    titles = [name_of(run) for run in runs]
    seeds = [run.info.get("seed") for run in runs]
    if len({(t, s) for t, s in zip(titles, seeds, strict=True)}) == len(runs):
        alike = len(set(titles)) < len(runs)
        return [f"{t}, seed {s}" if alike else t for t, s in zip(titles, seeds, strict=True)]
    return [f"{t} ({_folder(run)})" for t, run in zip(titles, runs, strict=True)]


def _folder(run: Run) -> str:
    path = run.path.resolve()
    return path.parent.name if path.name == "mi" else path.name


def _second_copy(shelf: Shelf) -> Any:
    found = behaviour(shelf)
    return found["series"][-1] if found else None


def _agreement(shelf: Shelf) -> dict[str, Any]:
    found = agreement(shelf)
    return {one["key"]: one for one in found["series"]} if found else {}


def _roles(shelf: Shelf, name: str, heads: Sequence[HeadOnset]) -> list[dict[str, Any]]:
    """Curves of the strongest heads of a score: those that rose, or the best where none did."""
    records = shelf.get(f"head_scores/{name}", AXES)
    rose = in_state(heads, "formed", "forming")
    order = highest_first(rose or heads)
    values = stack(records)
    return [
        {
            "head": head_label(h.layer * values.shape[2] + h.head, values.shape[2]),
            "at": [r.step for r in records],
            "values": pack(values[:, h.layer, h.head]),
        }
        for h in order[: ROLES if rose else 1]
    ]


def _maps(shelf: Shelf, found: Found, first: Shelf) -> dict[str, Any]:
    """Whole maps of a run with heads like those of the first, for colours only."""
    made = {}
    for name in found:
        records = shelf.get(f"head_scores/{name}", AXES)
        like = first.peek(f"head_scores/{name}", AXES)
        shape = records[-1].panel.values.shape
        if like and like[-1].panel.values.shape == shape:
            kept = records[thin(len(records), shape.numel(), 200_000)]
            made[name] = {"at": [r.step for r in kept], "values": pack(stack(kept), bits=8)}
    return made


# ---------------------------------------------------------------- in words


def common_headline(found: Sequence[Found], running: bool) -> dict[str, Any] | None:
    """Return the headline of several runs, or None where none of them scored heads.

    Args:
        found: Onsets of each run.
        running: Whether one of them goes on.

    Returns:
        The same as `headline`, and ``interval``: the first and the last onset.
    """
    firsts = [heads["induction"][0].onset for heads in found if heads.get("induction")]
    if not firsts:
        return None
    steps = [o.step for o in firsts if o.state == "formed" and o.step is not None]
    formed = f"{len(steps)} of {len(firsts)} runs"
    states = [o.state for o in firsts]
    if steps:
        low, high = min(steps), max(steps)
        mark = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        title = f"Induction formed in {formed}, {'at step' if low == high else 'steps'}"
        return line("formed", title, mark, _spans(found) + _order(found), [low, high])
    for state, title in (
        ("forming", f"Induction is forming in {states.count('forming')} of {len(firsts)} runs"),
        ("none", "No induction head yet" if running else "No induction head formed in any run"),
    ):
        if state in states:
            return line(state, title, None, _spans(found))
    return line("too early", "Too early to tell", None, _spans(found))


def _spans(found: Sequence[Found]) -> str:
    """From what to what the best head of the runs went, and the chance."""
    bests = [highest_first(f["induction"])[0].onset for f in found if f.get("induction")]
    finals = [b.final for b in bests if np.isfinite(b.final)]
    nulls = [b.null for b in bests if b.null is not None]
    if not finals:
        return "No score is defined."
    low, high = min(finals), max(finals)
    ends = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    chance = f" (chance {max(nulls):.2g})" if nulls else ""
    return f"The strongest head of each run ends at {ends}{chance}."


def _order(found: Sequence[Found]) -> str:
    """In how many runs a previous-token head began to rise before induction did."""
    pairs = [
        (f["previous_token"][0].onset.step, f["induction"][0].onset.step)
        for f in found
        if f.get("induction") and f.get("previous_token")
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return ""
    earlier = sum(a < b for a, b in known)
    return f" A previous-token head began to rise earlier in {earlier} of {len(known)} runs."


def common_answers(short: Sequence[dict[str, str]], found: Sequence[Found]) -> list[dict[str, str]]:
    """Return the short answers of the first run, with the heads of all.

    Args:
        short: Answers of the first run.
        found: Onsets of each run.

    Returns:
        The same form.
    """
    return [_of_all(one, found) if one["at"] == "heads" else _of_first(one) for one in short]


def _of_all(one: dict[str, str], found: Sequence[Found]) -> dict[str, str]:
    names = [_first_to_rise(f.get("induction", [])) for f in found]
    kept = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return {**one, "answer": joined(kept), "note": "the first to rise in each run"}


def _first_to_rise(heads: Sequence[HeadOnset]) -> str:
    """The head, or in the words of the headline why there is none."""
    if not heads:
        return "not measured"
    rose = in_state(heads, "formed", "forming")
    return rose[0].label if rose else heads[0].onset.state


def _of_first(one: dict[str, str]) -> dict[str, str]:
    return one if one["at"] == "trust" else {**one, "note": f"{one['note']} (run A)".strip()}
