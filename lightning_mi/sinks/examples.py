"""Training examples that support or oppose, each token coloured by its share of the score.

Training text is other people's: it is escaped, never taken for HTML or Markdown.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..record import Panel, Record
from .canvas import RGB, ink_on, signed
from .texts import labels, raw_rows, rows_of_texts, title, visible

__all__ = ["Example", "examples_html", "examples_markdown", "examples_of"]

TOKENS = 256
STYLE = "font:14px/1.7 system-ui,sans-serif;color:#191d26;background:#fff;max-width:60em"
TOKEN = "white-space:pre-wrap;margin-right:1px"


@dataclass(frozen=True)
class Example:
    """A training example as it is shown.

    Args:
        side: What it belongs to, for example ``"proponents"``.
        name: Which one it is.
        score: Positive where it helps.
        pieces: Its text; one piece for each token where ``shares`` are known.
        shares: The score split over the pieces; empty where it is not known.
    """

    side: str
    name: str
    score: float
    pieces: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


def examples_of(records: Sequence[Record]) -> list[Example]:
    """Collect the examples of one firing, each once.

    Args:
        records: Panels of scores over ``train_example`` (``descriptions``, ``texts`` and ``side``
            in the convention), panels of shares over (…, train_example, position), or both.

    Returns:
        The examples in order; where both are given, scores and names come from the first.
    """
    tables = [example for r in records if len(r.panel.axes) == 1 for example in _of_table(r)]
    split = [example for r in records if len(r.panel.axes) > 1 for example in _of_shares(r)]
    if not tables:
        return [example for _, example in split]
    shares = dict(split)
    return [_joined(example, shares.get(label)) for label, example in tables]


def examples_html(records: Sequence[Record], scale: float) -> str:
    """Return a page with every example of a firing.

    Args:
        records: See `examples_of`.
        scale: Share of full colour.

    Returns:
        HTML that loads nothing.
    """
    parts = [f'<div style="{STYLE}"><p>step {records[0].step}{_query(records, html.escape)}</p>']
    side = None
    for example in examples_of(records):
        if example.side != side:
            parts.append(f"<h4>{html.escape(example.side)}</h4>")
            side = example.side
        words = "".join(_tokens(example, scale))
        name = html.escape(example.name)
        parts.append(f"<p><b>{example.score:+.3g}</b> {name}<br>{words}</p>")
    return "".join([*parts, "</div>"])


def examples_markdown(records: Sequence[Record]) -> str:
    """Return the same as Markdown; the three tokens with the largest shares are bold.

    Args:
        records: See `examples_of`.

    Returns:
        Markdown.
    """
    lines = [f"step {records[0].step}{_query(records, _escaped)}\n"]
    side = None
    for example in examples_of(records):
        if example.side != side:
            lines.append(f"\n**{_escaped(example.side)}**\n")
            side = example.side
        words = " ".join(_bold(example))
        lines.append(f"* `{example.score:+.3g}` {_escaped(example.name)}: {words}")
    return "\n".join(lines)


def _of_table(record: Record) -> Iterator[tuple[str, Example]]:
    panel, convention = record.panel, record.panel.convention
    own = labels(panel, panel.axes[0])
    texts, names = convention.get("texts"), convention.get("descriptions")
    side = str(convention.get("side", title(record)))
    for i, (label, score) in enumerate(zip(own, panel.values.double().tolist(), strict=True)):
        name = names[i] if names else f"{panel.axes[0].replace('_', ' ')} {label}"
        pieces = (str(texts[i]),) if texts else ()
        yield label, Example(side, str(name), score, pieces)


def _of_shares(record: Record) -> Iterator[tuple[str, Example]]:
    panel = record.panel
    rows = raw_rows(panel)
    texts = rows_of_texts(panel) or [[str(i) for i in range(len(row))] for row in rows]
    own = labels(panel, panel.axes[-2])
    kind = panel.axes[-2].replace("_", " ")
    for i, (row, pieces) in enumerate(zip(rows, texts, strict=False)):
        label = own[i % len(own)]
        score = sum(share for share in row if math.isfinite(share))
        side = _side(panel, i) or title(record)
        yield label, Example(side, f"{kind} {label}", score, tuple(pieces), tuple(row))


def _side(panel: Panel, row: int) -> str | None:
    """Tell proponents from opponents, where the panel says how many of its rows are the first."""
    count: Any = panel.convention.get("proponents")
    if not isinstance(count, int):
        return None
    return "proponents" if row < count else "opponents"


def _joined(example: Example, split: Example | None) -> Example:
    if split is None:
        return example
    return Example(example.side, example.name, example.score, split.pieces, split.shares)


def _query(records: Sequence[Record], escape: Any) -> str:
    conventions: Iterator[Mapping[str, Any]] = (record.panel.convention for record in records)
    text = next((c["query_text"] for c in conventions if c.get("query_text")), "")
    return f" · query: {escape(visible(str(text)))}" if text else ""


def _tokens(example: Example, scale: float) -> Iterator[str]:
    if not example.shares:
        yield from (html.escape(piece) for piece in example.pieces)
    for share, piece in zip(example.shares[:TOKENS], example.pieces, strict=False):
        if piece:
            yield _token(share, html.escape(visible(piece)), scale)


def _token(share: float, text: str, scale: float) -> str:
    if not math.isfinite(share):
        return f'<span title="undefined">{text}</span>'
    colour = signed(share / scale)
    style = f"background:{_css(colour)};color:{_css(ink_on(colour))};{TOKEN}"
    return f'<span style="{style}" title="{share:+.3g}">{text}</span>'


def _bold(example: Example) -> Iterator[str]:
    sizes = [abs(share) if math.isfinite(share) else 0.0 for share in example.shares]
    largest = set(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:3])
    for i, piece in enumerate(example.pieces[:TOKENS]):
        words = _escaped(piece.strip() if i in largest else piece)
        yield f"**{words}**" if i in largest and piece.strip() else words


def _css(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _escaped(text: str) -> str:
    """Keep Markdown from reading anything into the text."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", visible(text)), quote=False)
