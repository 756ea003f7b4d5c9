"""Everything the page shows, as plain JSON: `payload`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..emergence import HeadOnset
from ..runs import Run
from .checks import checks
from .compared import common_answers, common_headline, compared, labels_of, name_of
from .examples import examples
from .headline import headline, measured
from .heads import behaviour, onsets, scores
from .inputs import agreement, answers, attention, attribution, prompt
from .methods import methods
from .moved import moved
from .panels import panels
from .phrases import few, joined, plural, tokens_in_words
from .pictures import pictures
from .shelf import Shelf
from .tables import tables
from .words import answers as short_answers

__all__ = ["payload"]


def payload(run: Run, *others: Run) -> dict[str, Any]:
    """Return what the page shows of a run, or of several side by side.

    Args:
        run: The run that is shown in full.
        *others: Runs that are compared with it.

    Returns:
        Plain JSON; what was not measured is None.
    """
    shelf = Shelf(run)
    found = onsets(shelf)
    made = _payload(shelf, run, found)
    if others:
        _compare(made, (shelf, *map(Shelf, others)), found, labels_of((run, *others)))
    return made


def _compare(
    made: dict[str, Any],
    shelves: Sequence[Shelf],
    first: dict[str, list[HeadOnset]],
    labels: Sequence[str],
) -> None:
    """Put what several runs have in common in place of what one says."""
    found = [first, *map(onsets, shelves[1:])]
    made["runs"] = compared(shelves, found, labels, made["panels"])
    made["run"]["name"] = f"{len(shelves)} runs: {joined(few(labels))}"
    running = any(shelf.info.get("state") == "running" for shelf in shelves)
    made["headline"] = common_headline(found, running) or made["headline"]
    letters = [one["letter"] for one in made["runs"]]
    every = [made["checks"], *map(checks, shelves[1:])]
    made["checks"] = [
        {**check, "run": letter}
        for letter, own in zip(letters, every, strict=True)
        for check in own
    ]
    made["short"] = common_answers(short_answers(made, first), found)


def _payload(shelf: Shelf, run: Run, found: dict[str, list[HeadOnset]]) -> dict[str, Any]:
    """What is shown of one run."""
    shown = prompt(shelf)
    tokens = shown["tokens"] if shown else []
    steps, seen = shelf.times
    made: dict[str, Any] = {
        "steps": steps or [0],
        "measured": len(steps),
        "tokens": seen if seen and seen[-1] and all(t is not None for t in seen) else None,
        "scores": scores(shelf, found),
        "behaviour": behaviour(shelf),
        "prompt": shown,
        "attention": attention(shelf, tokens),
        "answers": answers(shelf),
        "inputs": _inputs(shelf, tokens),
        "pictures": pictures(shelf),
        "tables": tables(shelf),
        "moved": moved(shelf),
        "agreement": agreement(shelf, found.get("induction", [])),
        "examples": examples(shelf),
        "checks": checks(shelf),
    }
    made["run"] = _run(shelf, run, made)
    made["runs"] = None
    made["panels"] = panels(shelf)
    made["undrawn"] = shelf.undrawn
    running = made["run"]["state"] == "running"
    scored = bool(found.get("induction"))
    other = None if scored else measured(shelf.names, len(steps), bool(tokens))
    made["headline"] = other or headline(found, running)
    made["short"] = short_answers(made, found)
    return made


def _inputs(shelf: Shelf, tokens: list[str]) -> dict[str, Any]:
    if not tokens:
        return {}  # without tokens there are no rows to name
    found = {method: attribution(shelf, method, tokens) for method in methods(shelf)}
    return {method: block for method, block in found.items() if block is not None}


def _run(shelf: Shelf, run: Run, made: dict[str, Any]) -> dict[str, Any]:
    info = shelf.info
    last = made["steps"][-1]
    known = {n: v for n, v in info.get("versions", {}).items() if v and v != "not installed"}
    versions = [f"{name} {number}" for name, number in known.items()]
    seed = [] if info.get("seed") is None else [f"seed {info['seed']}"]
    written = [f"written {time.strftime('%Y-%m-%d %H:%M')}"]
    return {
        "name": name_of(run),
        "facts": " · ".join(_facts(info, made)),
        "state": str(info.get("state", "finished")),
        "last": last,
        "max_steps": max(int(info.get("max_steps") or 0), last),
        "foot": " · ".join(versions + written + seed),
    }


def _facts(info: dict[str, Any], made: dict[str, Any]) -> list[str]:
    scored = made["scores"]
    facts = []
    if scored:
        sizes = [(scored[f"{kind}s"], kind) for kind in ("layer", "head")]
        facts.append(" × ".join(f"{count} {plural(kind, count)}" for count, kind in sizes))
    if info.get("model"):
        facts.append(str(info["model"]))
    if info.get("parameters"):
        facts.append(f"{int(info['parameters']):,} parameters")
    if info.get("text"):
        facts.append(str(info["text"]))
    count, last = made["measured"], made["steps"][-1]
    seen = f", {tokens_in_words(made['tokens'][-1])} tokens" if made["tokens"] else ""
    facts.append(f"{last:,} {plural('step', last)}{seen}, {count} {plural('measurement', count)}")
    return facts
