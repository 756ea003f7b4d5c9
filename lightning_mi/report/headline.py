"""The sentence at the top of the report and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..emergence import ENOUGH, HeadOnset
from .methods import title as title_of
from .phrases import Heads, few, highest_first, in_state, joined, plural, tokens_in_words, upper

__all__ = ["ASIDE", "headline", "line", "measured"]


def measured(names: Sequence[str], steps: int, prompted: bool) -> dict[str, Any] | None:
    """Return the headline of a run without head scores, or None where nothing was measured.

    Args:
        names: Names of all records.
        steps: Number of measured steps.
        prompted: Whether tokens were recorded, so that `HeadMonitor` may fit.

    Returns:
        The same as `headline`.
    """
    kinds = dict.fromkeys(name.split("/")[0] for name in names)
    shown = [kind for kind in kinds if kind not in ASIDE and not kind.endswith("_drift")]
    titles = few([title_of(kind) for kind in shown])
    if not titles:
        return None
    title = f"{upper(joined(titles))} {'at 1 step' if steps == 1 else f'over {steps:,} steps'}"
    return line("measured", title, None, ADD_HEADS if prompted else "")


ASIDE = ("monitor", "prompt", "agreement")
"""What is recorded beside measurements."""

ADD_HEADS = "Add HeadMonitor() to the Trainer to see when attention heads form."


def headline(found: dict[str, list[HeadOnset]], running: bool) -> dict[str, Any]:
    """Return the sentence at the top and its state.

    Args:
        found: Onsets of every head by score.
        running: Whether training goes on.

    Returns:
        ``state``, ``title``, ``mark`` (the number set off in the title), ``text`` and ``interval``,
        the measured steps between which it rose.
    """
    heads = found.get("induction", [])
    if not heads:
        return line("not measured", "No head scores were recorded", None, ADD_HEADS)
    state = heads[0].onset.state
    if state == "formed":
        first = heads[0].onset
        interval = list(first.interval or (first.step, first.step))
        return line(state, "Induction formed at step", f"{first.step:,}", _formed(found), interval)
    if state == "forming":
        rising = highest_first(in_state(heads, "forming"))[0]  # A head that does not may be higher.
        return line(state, "Induction is forming", None, f"{rising.label} is {_plain(rising)}.")
    if state == "none":
        best = highest_first(heads)[0]
        title = "No induction head yet" if running else "No induction head formed"
        text = (
            f"The highest, {best.label}, went {_span(best)}. A claim needs 0.1 above both chance "
            "and the first measurement."
        )
        return line(state, title, None, text)
    count = max(h.onset.measurements for h in heads)
    text = f"{count} {plural('measurement', count)} so far; an onset needs {ENOUGH}."
    return line(state, "Too early to tell", None, text)


def line(
    state: str, title: str, mark: str | None, text: str, interval: Any = None
) -> dict[str, Any]:
    """Return a headline in the form that `headline` describes."""
    return {"state": state, "title": title, "mark": mark, "text": text, "interval": interval}


def _plain(head: HeadOnset) -> str:
    return head.onset.describe().removeprefix("forming: ")


def _span(head: HeadOnset) -> str:
    o = head.onset
    chance = "" if o.null is None else f" (chance {o.null:.2g})"
    return f"from {o.start:.2f} to {o.final:.2f}{chance}"


def _formed(found: dict[str, list[HeadOnset]]) -> str:
    heads = in_state(found["induction"], "formed")
    first = heads[0].onset
    best = highest_first(heads)[0]
    after = "" if first.tokens is None else f", after {tokens_in_words(first.tokens)} tokens"
    low, high = first.interval or (0, 0)
    of = "" if len(heads) == 1 else f"{best.label} "
    text = f"{_list(heads)}: {of}{_span(best)}{after}. It rose between steps {low:,} and {high:,}."
    return text + _before(found, heads[0])


def _before(found: dict[str, list[HeadOnset]], induction: HeadOnset) -> str:
    """The head that an induction head is thought to need, and that one seed proves nothing."""
    other = in_state(found.get("previous_token", []), "formed")
    if not other or other[0].onset.step is None or induction.onset.step is None:
        return ""
    gap = other[0].onset.step - induction.onset.step
    order = "together with it" if gap == 0 else "earlier" if gap < 0 else "later"
    return (
        f" The previous-token head {other[0].label} began to rise {order}, at step "
        f"{other[0].onset.step:,}; one seed cannot decide the order."
    )


def _list(heads: Heads, most: int = 2) -> str:
    names = [h.label for h in heads]
    if len(names) <= most:
        return " and ".join(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more"
