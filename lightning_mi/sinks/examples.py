"""Training examples that support or oppose, each token coloured by its share of the score.

Training text is other people's: it is escaped, never taken for HTML or Markdown.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from ..record import Panel, Record
from .canvas import RGB, ink_on, signed
from .texts import labels, raw_rows, rows_of_texts, title, visible

__all__ = ["examples_html", "examples_markdown"]

TOKENS = 256
STYLE = "font:14px/1.7 system-ui,sans-serif;color:#191d26;background:#fff;max-width:60em"


def examples_html(records: Sequence[Record], scale: float) -> str:
    """Return a page with every example of one or more panels.

    Args:
        records: Panels of axes (…, train_example, position).
        scale: Share of full colour.

    Returns:
        HTML that loads nothing.
    """
    parts = [f'<div style="{STYLE}">']
    for record in records:
        parts.append(f"<h4>{html.escape(title(record))}, step {record.step}</h4>")
        for name, shares, pieces in _rows(record.panel):
            tokens = "".join(
                _token(share, piece, scale) for share, piece in zip(shares, pieces, strict=False)
            )
            parts.append(f"<p><b>{_total(shares)}</b> {html.escape(name)}<br>{tokens}</p>")
    return "".join([*parts, "</div>"])


def examples_markdown(records: Sequence[Record]) -> str:
    """Return the same as Markdown; the three tokens with the largest shares are bold.

    Args:
        records: Panels of axes (…, train_example, position).

    Returns:
        Markdown.
    """
    lines = []
    for record in records:
        lines.append(f"**{title(record)}, step {record.step}**\n")
        for name, shares, pieces in _rows(record.panel):
            order = sorted(range(len(shares)), key=lambda i: -abs(_finite(shares[i])))
            words = [
                f"**{_escaped(piece.strip())}**"
                if i in order[:3] and piece.strip()
                else _escaped(piece)
                for i, piece in enumerate(pieces)
            ]
            lines.append(f"* `{_total(shares)}` {_escaped(name)}: {' '.join(words)}")
    return "\n".join(lines)


def _rows(panel: Panel) -> list[tuple[str, list[float], list[str]]]:
    values = raw_rows(panel)
    texts = rows_of_texts(panel) or [[str(i) for i in range(len(row))] for row in values]
    names = labels(panel, panel.axes[-2]) if len(panel.axes) > 1 else [""]
    kind = panel.axes[-2].replace("_", " ") if len(panel.axes) > 1 else ""
    titles = [name if not name.isdigit() else f"{kind} {name}" for name in names]
    repeated = titles * (len(values) // max(len(titles), 1))
    return [
        (title, row[:TOKENS], pieces[:TOKENS])
        for title, row, pieces in zip(repeated, values, texts, strict=False)
    ]


def _token(share: float, piece: str, scale: float) -> str:
    if not piece:
        return ""
    text = html.escape(visible(piece))
    if not math.isfinite(share):
        return f'<span title="undefined">{text}</span>'
    colour = signed(share / scale)
    style = f"background:{_css(colour)};color:{_css(ink_on(colour))};white-space:pre-wrap"
    return f'<span style="{style}" title="{share:+.3g}">{text}</span>'


def _total(shares: Sequence[float]) -> str:
    return f"{sum(_finite(share) for share in shares):+.3g}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _css(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _escaped(text: str) -> str:
    """Keep Markdown from reading anything into the text."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", visible(text)), quote=False)
