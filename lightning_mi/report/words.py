"""What the run shows in short answers, beside the headline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..emergence import HeadOnset
from .methods import title
from .pack import unpack
from .phrases import Heads, few, highest_first, in_state, joined, upper

__all__ = ["answers"]


def answers(data: dict[str, Any], found: dict[str, list[HeadOnset]]) -> list[dict[str, str]]:
    """Return the short answers that stand beside the headline: five, or without those on heads.

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
    if data["headline"]["state"] == "measured":
        without = {"heads"} if data["agreement"] else {"heads", "agree"}
        rows = [row for row in rows if row[1] not in without]
    return [{"question": q, "at": at, "answer": a, "note": note} for q, at, (a, note) in rows]


NOTHING = "not measured"


def _which(heads: Heads) -> tuple[str, str]:
    if not heads:
        return NOTHING, "HeadMonitor() measures it"
    formed, forming = in_state(heads, "formed"), in_state(heads, "forming")
    if heads[0].onset.state == "too early":
        return "too early", f"{len(heads)} heads watched"
    much = f"{len(formed)} of {len(heads)} heads formed"
    if formed:
        more = f", {len(forming)} forming" if forming else ""
        best = highest_first(formed)[:2]
        return ", ".join(h.label for h in best), much + more
    if forming:
        return ", ".join(h.label for h in forming[:2]), f"{much}, {len(forming)} forming"
    return "none", much


def _looked(data: dict[str, Any]) -> tuple[str, str]:
    prompt = data["prompt"]
    if prompt is None or not data["inputs"]:
        return _looked_elsewhere(data)
    tops = {name: _top(block) for name, block in data["inputs"].items()}
    known = {name: at for name, at in tops.items() if at is not None}
    if not known:
        return "undefined", "all attributions of the last step are undefined"
    first = next(iter(known))
    same = [_short(n) for n, at in known.items() if at == known[first]]
    other = [f"{_short(n)} “{_show(prompt['tokens'][at])}”" for n, at in known.items()][1:]
    at = known[first]
    what = f"“{_show(prompt['tokens'][at])}”" + _role(prompt, at)
    note = "say " + joined(same) if len(same) > 1 else f"says {same[0]}"
    return what, note + ("" if len(same) == len(known) else f"; {', '.join(other)}")


def _short(method: str) -> str:
    return "IG" if method == "integrated_gradients" else title(method)


def _looked_elsewhere(data: dict[str, Any]) -> tuple[str, str]:
    """Of images and tables; else name what was measured."""
    if data["tables"]:
        name, block = next(iter(data["tables"].items()))
        at = _top(block)
        top = "undefined" if at is None else _show(block["names"][at])
        return top, f"leads in {_short(name)}, mean of {block['n']}"
    drawn = [block["title"] for block in data["pictures"].values()]
    if drawn:
        return "Drawn below", f"{joined(few(drawn))}, over the images"
    kinds = [n.split("/")[0].replace("_", " ") for n in data["undrawn"] if n.endswith("/values")]
    if kinds:
        return "measured", f"{joined(kinds)}: see the loggers' pictures and the run folder"
    return NOTHING, "SaliencyMonitor() and IntegratedGradientsMonitor() measure it"


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
        return upper(kind), f"{count} of the top {len(top)} proponents"
    return str(top[0]["words"] or top[0]["name"]), note


def _kind(words: str) -> str:
    """An example's own words without numbers and place, so that like ones count together."""
    words = re.sub(r"\([^()]*\)", "", words)
    return re.sub(r"\s*\bof \d[\d,]* \w+|[\d,]*\d", "", words).strip()


def _agree(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return NOTHING, "HeadMonitor() with SaliencyMonitor() measures it"
    short = {"integrated_gradients": "IG", "saliency": "saliency"}
    late = {short[s["key"]]: _late(unpack(s["values"])) for s in found["series"]}
    count = max(len(_end(unpack(s["values"]))) for s in found["series"])
    best = max(late.values(), key=lambda v: np.nan_to_num(v, nan=-2.0))
    bound = found["floor"][1] if found["floor"] else 0.1
    word = "Undefined" if np.isnan(best) else _strength(best, bound)
    says = ", ".join(f"{name} {value:.2f}" for name, value in late.items()).replace("-", "−")
    taken = "at one step" if count == 1 else f"median of the last {count} steps"
    top = f", ceiling {found['ceiling']['value']:.2f}" if found["ceiling"] else ""
    return word, f"{says}, {taken}; random ±{bound:.2f}{top}"


def _strength(value: float, floor: float) -> str:
    if value <= floor:
        return "No more than chance"
    return "Strongly" if value >= 0.6 else "Partly" if value >= 0.35 else "Weakly"


def _late(values: Any) -> float:
    end = _end(values)
    return float(np.median(end)) if len(end) else float("nan")


def _end(values: Any) -> Any:
    """The last quarter of the defined values, but at least three."""
    defined = values[np.isfinite(values)]
    return defined[-max(3, len(defined) // 4) :]


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
