"""Everything the page shows, as plain JSON: `payload`."""

from __future__ import annotations

import time
from typing import Any

from ..runs import Run
from . import words
from .checks import checks
from .examples import examples
from .heads import behaviour, onsets, scores
from .inputs import METHODS, agreement, answers, attention, attribution, prompt
from .shelf import Shelf

__all__ = ["payload"]


def payload(run: Run) -> dict[str, Any]:
    """Return what the page shows of a run.

    Args:
        run: The run.

    Returns:
        Plain JSON; what was not measured is None.
    """
    shelf = Shelf(run)
    found = onsets(shelf)
    shown = prompt(shelf)
    tokens = shown["tokens"] if shown else []
    steps, seen = shelf.times
    made: dict[str, Any] = {
        "steps": steps or [0],
        "measured": len(steps),
        "tokens": seen if seen and all(t is not None for t in seen) else None,
        "scores": scores(shelf, found),
        "behaviour": behaviour(shelf),
        "prompt": shown,
        "attention": attention(shelf, tokens),
        "answers": answers(shelf),
        "inputs": _inputs(shelf, tokens),
        "agreement": agreement(shelf),
        "examples": examples(shelf),
        "checks": checks(shelf),
    }
    made["run"] = _run(shelf, run, made)
    made["headline"] = words.headline(found, made["run"]["state"] == "running")
    made["short"] = words.answers(made, found)
    made["undrawn"] = shelf.undrawn
    return made


def _inputs(shelf: Shelf, tokens: list[str]) -> dict[str, Any]:
    found = {method: attribution(shelf, method, tokens) for method in METHODS}
    return {method: block for method, block in found.items() if block is not None}


def _run(shelf: Shelf, run: Run, made: dict[str, Any]) -> dict[str, Any]:
    info = shelf.info
    last = made["steps"][-1]
    known = {n: v for n, v in info.get("versions", {}).items() if v and v != "not installed"}
    versions = [f"{name} {number}" for name, number in known.items()]
    seed = [] if info.get("seed") is None else [f"seed {info['seed']}"]
    written = [f"written {time.strftime('%Y-%m-%d %H:%M')}"]
    return {
        "name": str(info.get("title") or info.get("name") or run.path.resolve().parent.name),
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
        facts.append(f"{scored['layers']} layers × {scored['heads']} heads")
    if info.get("model"):
        facts.append(str(info["model"]))
    if info.get("parameters"):
        facts.append(f"{int(info['parameters']):,} parameters")
    if info.get("text"):
        facts.append(str(info["text"]))
    count, last = made["measured"], made["steps"][-1]
    seen = f", {words.tokens_in_words(made['tokens'][-1])} tokens" if made["tokens"] else ""
    facts.append(f"{last:,} steps{seen}, {count} measurement{'' if count == 1 else 's'}")
    return facts
