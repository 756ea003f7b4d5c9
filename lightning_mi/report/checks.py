"""What supports the report: which check, what was compared, the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..record import Record
from .phrases import plural
from .shelf import Shelf

__all__ = ["checks"]

GAP = 0.05
"""Largest completeness gap that passes, as a share of what the attributions should add up to."""

OVERHEAD = 0.05
"""Largest share of training time that passes."""

Check = dict[str, str]


def checks(shelf: Shelf) -> list[Check]:
    """Return the checks that callers recorded in the run, then those that records allow.

    Returns:
        ``check``, ``compared``, ``result`` and ``status``: ``"pass"``, ``"open"`` or ``"fail"``.
    """
    given = [_given(c) for c in shelf.info.get("checks", [])]
    own: list[Callable[[Shelf], Check | None]] = [_swept, _tap, _gap, _nonfinite, _overhead]
    taken = {c["check"] for c in given}
    made = [check for check in (rule(shelf) for rule in own) if check is not None]
    return given + [check for check in made if check["check"] not in taken]


def _check(check: str, compared: str, result: str, status: str) -> Check:
    return {"check": check, "compared": compared, "result": result, "status": status}


def _given(found: Any) -> Check:
    status = str(found.get("status", "open"))
    return _check(
        str(found.get("check", "")),
        str(found.get("compared", "")),
        str(found.get("result", "")),
        status if status in ("pass", "open", "fail") else "open",
    )


def _swept(shelf: Shelf) -> Check | None:
    title, compared = "Live equals swept", "the same measurement taken again from checkpoints"
    live = {(r.name, r.step): r for r in shelf.all if r.source == "live"}
    pairs = [
        (live[r.name, r.step], r)
        for r in shelf.all
        if r.source == "sweep" and (r.name, r.step) in live and r.measurement != "monitor"
    ]
    pairs = [(a, b) for a, b in pairs if _comparable(a, b)]
    if not pairs:
        return None
    equal = sum(a.panel.equal(b.panel) for a, b in pairs)
    steps = len({a.step for a, _ in pairs})
    result = f"{equal:,} of {len(pairs):,} records bit-equal, at {steps} {plural('step', steps)}"
    return _check(title, compared, result, "pass" if equal == len(pairs) else "fail")


def _comparable(a: Record, b: Record) -> bool:
    """Whether two records should be equal: running sums only over the same number of steps."""
    counts = [r.panel.convention.get("sum_over_steps") for r in (a, b)]
    return None in counts or counts[0] == counts[1]


def _tap(shelf: Shelf) -> Check | None:
    """The largest recorded difference between pattern times values and the head's output."""
    found = [r for r in shelf.all if r.what in ("pattern_error", "tap_error", "z_error")]
    noted = [
        r.panel.convention["tap_error"] for r in shelf.all if "tap_error" in r.panel.convention
    ]
    errors = [float(r.panel.values.max()) for r in found] + [float(e) for e in noted]
    if not errors:
        return None
    worst = float(np.max(errors))
    status = "pass" if worst < 1e-3 else "fail"
    return _check("Pattern reproduces the output", "largest |A·v − z|", f"{worst:.1g}", status)


def _gap(shelf: Shelf) -> Check | None:
    gaps = shelf.get("integrated_gradients/gap")
    if not gaps:
        return None
    sizes = np.abs(np.concatenate([np.ravel(np.asarray(r.panel.values, float)) for r in gaps]))
    worst = float(np.max(sizes[np.isfinite(sizes)], initial=0.0))
    ended = shelf.get("integrated_gradients/converged")
    missed = sum(int((~r.panel.values.bool()).sum()) for r in ended)
    unit = gaps[-1].panel.unit
    largest = f"{100 * worst:.2g} %" if unit == "1" else f"{worst:.2g} {unit}"
    compared = "the sum of attributions against the difference of outputs, largest over steps"
    ok = not missed if ended else worst <= GAP
    noun = plural("explanation", missed)
    result = largest if ok else f"{largest}; {missed} {noun} had not converged"
    return _check("IG completeness gap", compared, result, "pass" if ok else "open")


def _nonfinite(shelf: Shelf) -> Check | None:
    if not shelf.all:
        return None
    counted = {r.name: 0 for r in shelf.all}
    for r in shelf.all:
        counted[r.name] += 0 if _undefined_by_nature(r) else r.panel.nonfinite
    total = sum(counted.values())
    worst = max(counted, key=lambda name: counted[name])
    result = "0" if not total else f"{total:,}, most in {worst}"
    compared = f"over {len(shelf.all):,} {plural('record', len(shelf.all))}"
    return _check("Undefined values", compared, result, "open" if total else "pass")


def _undefined_by_nature(record: Record) -> bool:
    """A matrix of edges has no value where there can be no edge; else it gives a reason."""
    pair = record.panel.axes == ("writer", "reader")
    return pair and not record.panel.convention.get("reason")


def _overhead(shelf: Shelf) -> Check | None:
    last = shelf.last("monitor/overhead", ())
    if last is None:
        return None
    share = last.panel.item()
    much = f"{100 * share:.2g} %" if share < 1 else f"{100 * share:,.0f} %"
    compared = "time spent measuring against time spent training"
    if share <= OVERHEAD:
        return _check("Overhead", compared, f"{much} of training time", "pass")
    advice = "measure less often (every_n_train_steps) or set max_overhead"
    return _check("Overhead", compared, f"{much} of training time; {advice}", "open")
