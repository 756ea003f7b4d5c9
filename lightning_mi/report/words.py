"""What the run shows, in sentences: the headline and the five short answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..emergence import ENOUGH, HeadOnset
from .pack import unpack

__all__ = ["answers", "headline", "tokens_in_words"]

Heads = Sequence[HeadOnset]


def tokens_in_words(count: int | None) -> str:
    """Return a number of tokens as a person says it.

    Example:
        >>> tokens_in_words(2_826_240), tokens_in_words(512)
        ('2.8 M', '512')
    """
    if count is None:
        return "?"
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def headline(found: dict[str, list[HeadOnset]], running: bool) -> dict[str, Any]:
    """Return the sentence at the top and its state.

    Args:
        found: Onsets of every head by score.
        running: Whether training goes on.

    Returns:
        ``state``, ``title``, ``mark`` (the number set off in the title) and ``text``.
    """
    heads = found.get("induction", [])
    if not heads:
        text = "Add HeadMonitor() to the Trainer to see when attention heads form."
        return _line("not measured", "No head scores were recorded", None, text)
    state = heads[0].onset.state
    best = max(heads, key=lambda h: np.nan_to_num(h.onset.final, nan=-1.0))
    if state == "formed":
        first = heads[0].onset
        return _line(state, "Induction formed at step", f"{first.step:,}", _formed(found))
    if state == "forming":
        return _line(state, "Induction is forming", None, f"{best.label} is {_plain(best)}.")
    if state == "none":
        title = "No induction head yet" if running else "No induction head formed"
        text = (
            f"The highest, {best.label}, went {_span(best)}. A claim needs 0.1 above both chance "
            "and the first measurement."
        )
        return _line(state, title, None, text)
    count = max(h.onset.measurements for h in heads)
    text = f"{count} {_plural('measurement', count)} so far; an onset needs {ENOUGH}."
    return _line(state, "Too early to tell", None, text)


def _line(state: str, title: str, mark: str | None, text: str) -> dict[str, Any]:
    return {"state": state, "title": title, "mark": mark, "text": text}


def _plain(head: HeadOnset) -> str:
    return head.onset.describe().removeprefix("forming: ")


def _span(head: HeadOnset) -> str:
    o = head.onset
    chance = "" if o.null is None else f" (chance {o.null:.2g})"
    return f"from {o.start:.2f} to {o.final:.2f}{chance}"


def _formed(found: dict[str, list[HeadOnset]]) -> str:
    heads = _in_state(found["induction"], "formed")
    first = heads[0].onset
    best = max(heads, key=lambda h: h.onset.final)
    after = "" if first.tokens is None else f", after {tokens_in_words(first.tokens)} tokens"
    low, high = first.interval or (0, 0)
    of = "" if len(heads) == 1 else f"{best.label} "
    text = f"{_list(heads)}: {of}{_span(best)}{after}. It rose between steps {low:,} and {high:,}."
    return text + _before(found, heads[0])


def _before(found: dict[str, list[HeadOnset]], induction: HeadOnset) -> str:
    """The head that an induction head is thought to need, and that one seed proves nothing."""
    other = _in_state(found.get("previous_token", []), "formed")
    if not other or other[0].onset.step is None or induction.onset.step is None:
        return ""
    gap = other[0].onset.step - induction.onset.step
    order = "together with it" if gap == 0 else "earlier" if gap < 0 else "later"
    return (
        f" The previous-token head {other[0].label} began to rise {order}, at step "
        f"{other[0].onset.step:,}; one seed cannot decide the order."
    )


def _in_state(heads: Heads, *states: str) -> list[HeadOnset]:
    return [h for h in heads if h.onset.state in states]


def _list(heads: Heads, most: int = 2) -> str:
    names = [h.label for h in heads]
    if len(names) <= most:
        return " and ".join(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more"


def answers(data: dict[str, Any], found: dict[str, list[HeadOnset]]) -> list[dict[str, str]]:
    """Return the five short answers that stand beside the headline.

    Args:
        data: What the charts show.
        found: Onsets of every head by score.

    Returns:
        ``question``, ``answer``, ``note`` and ``at``, the chart that shows it.
    """
    rows = [
        ("Which heads?", "heads", _which(found.get("induction", []))),
        ("What did it look at?", "looked", _looked(data)),
        ("Which examples?", "examples", _examples(data["examples"])),
        ("Do the explanations agree?", "agree", _agree(data["agreement"])),
        ("Can I trust it?", "trust", _trust(data["checks"])),
    ]
    return [{"question": q, "at": at, "answer": a, "note": note} for q, at, (a, note) in rows]


NOTHING = "not measured"


def _which(heads: Heads) -> tuple[str, str]:
    if not heads:
        return NOTHING, "HeadMonitor() measures it"
    formed, forming = _in_state(heads, "formed"), _in_state(heads, "forming")
    if heads[0].onset.state == "too early":
        return "too early", f"{len(heads)} heads watched"
    much = f"{len(formed)} of {len(heads)} heads formed"
    if formed:
        more = f", {len(forming)} forming" if forming else ""
        best = sorted(formed, key=lambda h: -h.onset.final)[:2]
        return ", ".join(h.label for h in best), much + more
    if forming:
        return ", ".join(h.label for h in forming[:2]), f"{much}, {len(forming)} forming"
    return "none", much


def _looked(data: dict[str, Any]) -> tuple[str, str]:
    prompt = data["prompt"]
    if prompt is None or not data["inputs"]:
        return NOTHING, "SaliencyMonitor() and IntegratedGradientsMonitor() measure it"
    tops = {name: _top(block) for name, block in data["inputs"].items()}
    known = {name: at for name, at in tops.items() if at is not None}
    if not known:
        return "undefined", "all attributions of the last step are undefined"
    names = {"integrated_gradients": "IG", "saliency": "saliency"}
    first = next(iter(known))
    same = [names[n] for n, at in known.items() if at == known[first]]
    other = [f"{names[n]} “{_show(prompt['tokens'][at])}”" for n, at in known.items()][1:]
    at = known[first]
    what = f"“{_show(prompt['tokens'][at])}”" + _role(prompt, at)
    note = "say " + " and ".join(same) if len(same) > 1 else f"says {same[0]}"
    return what, note + ("" if len(same) == len(known) else f"; {', '.join(other)}")


def _role(prompt: dict[str, Any], position: int) -> str:
    if position == prompt["source"]:
        return ", the one to copy"
    return ", the last token" if position == prompt["ends"] else ""


def _top(block: dict[str, Any]) -> int | None:
    """The position with the largest absolute value at the last step."""
    last = np.abs(unpack(block["values"]).reshape(-1, block["width"])[-1])
    return int(np.nanargmax(last)) if np.isfinite(last).any() else None


def _show(token: str) -> str:
    text = token.strip() or token.replace("\n", "⏎").replace(" ", "·")
    return text if len(text) <= 16 else text[:15] + "…"


def _examples(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return NOTHING, "InfluenceMonitor() measures it"
    top = found["proponents"]
    if not top:
        return "none helps", f"of {found['candidates']:,} candidates"
    kinds = [_kind(e["words"]) for e in top]
    kind, count = Counter(kinds).most_common(1)[0]
    note = f"strongest of {found['candidates']:,} candidates"
    if kind and count > 1:
        return _upper(kind), f"{count} of the top {len(top)} proponents"
    return str(top[0]["words"] or top[0]["name"]), note


def _kind(words: str) -> str:
    """An example's own words without numbers and place, so that like ones count together."""
    words = re.sub(r"\([^()]*\)", "", words)
    return re.sub(r"\s*\bof \d[\d,]* \w+|[\d,]*\d", "", words).strip()


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _agree(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return NOTHING, "HeadMonitor() with SaliencyMonitor() measures it"
    short = {"integrated_gradients": "IG", "saliency": "saliency"}
    late = {short[s["key"]]: _late(unpack(s["values"])) for s in found["series"]}
    best = max(late.values(), key=lambda v: np.nan_to_num(v, nan=-2.0))
    bound = found["floor"][1] if found["floor"] else 0.1
    word = "Undefined" if np.isnan(best) else _strength(best, bound)
    says = ", ".join(f"{name} {value:.2f}" for name, value in late.items()).replace("-", "−")
    return word, f"{says}; random ±{bound:.2f}"


def _strength(value: float, floor: float) -> str:
    if value <= floor:
        return "No more than chance"
    return "Strongly" if value >= 0.6 else "Partly" if value >= 0.35 else "Weakly"


def _late(values: Any) -> float:
    defined = values[np.isfinite(values)]
    return float(np.median(defined[-max(3, len(defined) // 4) :])) if len(defined) else float("nan")


def _trust(checks: Sequence[dict[str, str]]) -> tuple[str, str]:
    if not checks:
        return "no checks", "none were recorded"
    passed = [c for c in checks if c["status"] == "pass"]
    rest = [
        f"{c['status']}: {c['check'][:1].lower()}{c['check'][1:]}"
        for c in checks
        if c not in passed
    ]
    word = "passes" if len(passed) == 1 else "pass"
    return f"{len(passed)} of {len(checks)} checks {word}", "; ".join(rest[:2]) or "none is open"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
