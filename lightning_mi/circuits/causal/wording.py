"""A scorecard in words and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scorecard import Scorecard

__all__ = ["html", "lines", "rows"]


def rows(card: Scorecard) -> Iterator[tuple[str, str]]:
    """Yield a scorecard as demands and answers.

    Args:
        card: The scorecard.

    Yields:
        What is asked, and the answer.
    """
    if card.reason is not None:
        yield "undefined", card.reason
        return
    yield "sufficient", f"faithfulness {card.faithfulness}"
    yield "necessary", f"{card.rest} left without it"
    yield "complete", f"misses at most {card.incompleteness} of the effect"
    yield (
        "minimal",
        f"redundant {', '.join(_redundant(card)) or 'none'}; idle {', '.join(card.idle) or 'none'}",
    )
    yield "lawful", f"all {card.edges:,} edges run forward"
    yield (
        "simple",
        f"{card.edges:,} of {card.all_edges:,} edges, {card.nodes:,} of {card.all_nodes:,} nodes, "
        f"{card.bits:,.0f} of {card.all_edges:,} bits",
    )
    if card.curve is not None:
        yield "over sizes", f"CPR {card.curve.cpr:.3f}, CMD {card.curve.cmd:.3f}"
    yield from _controls(card)
    yield "prompts", _prompts(card)
    for name, why in card.notes.items():
        yield f"no {name}", why


def _redundant(card: Scorecard) -> list[str]:
    return [f"{n} (with {card.marginals[n].beside})" for n in card.redundant]


def _controls(card: Scorecard) -> Iterator[tuple[str, str]]:
    controls = card.controls
    if controls.random:
        low, high = (round(v, 2) + 0.0 for v in (min(controls.random), max(controls.random)))
        yield "random connected circuits", f"{low:.2f} to {high:.2f}"
    if controls.shuffled is not None:
        low, high = (round(v, 2) + 0.0 for v in (min(controls.searches), max(controls.searches)))
        between = f", {low:.2f} to {high:.2f}" if len(controls.searches) > 1 else ""
        yield "found for shuffled answers", f"{controls.shuffled}{between}"
    if controls.untrained is not None:
        yield "in the untrained model", str(controls.untrained)
    for name, margin in controls.margins.items():
        yield f"better than {name} by", str(margin)


def _prompts(card: Scorecard) -> str:
    said, found_by = card.convention, card.convention.get("found_by")
    shared = said.get("shared_prompts")
    method = found_by.get("method", "by hand") if isinstance(found_by, dict) else "by hand"
    how = (
        "it is not known on which prompts it was found"
        if shared is None
        else f"{shared} of them it was found on, too"
        if shared
        else "it was found on others"
    )
    return f"{said.get('examples')}; {how}; ablation {said.get('ablation')}; found {method}"


def lines(card: Scorecard) -> list[str]:
    """Return a scorecard as lines of text.

    Args:
        card: The scorecard.

    Returns:
        A line for each demand and control, then a sentence for each node.
    """
    return [f"{asked}: {answer}" for asked, answer in rows(card)] + list(card.sentences.values())


def html(card: Scorecard) -> str:
    """Return a scorecard as HTML.

    Args:
        card: The scorecard.

    Returns:
        Drawing, table and sentences; no scripts, all names escaped.
    """
    table = "".join(
        f'<tr><th scope="row">{escape(asked)}</th><td>{escape(answer)}</td></tr>'
        for asked, answer in rows(card)
    )
    said = "".join(f"<li>{escape(text)}</li>" for text in card.sentences.values())
    return (
        f'<section class="scorecard">{card.drawing}<table>{table}</table>'
        f"{f'<ul>{said}</ul>' if said else ''}</section>"
    )
