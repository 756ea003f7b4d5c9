"""A circuit as a picture: nodes by layer, edges by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .graph import Edge, Graph

__all__ = ["drawn"]

STEP_X, STEP_Y, MARGIN = 84, 64, 40


def drawn(graph: Graph, edges: Sequence[Edge], weights: Mapping[Edge, float]) -> str:
    """Return a drawing of edges, embeddings at the bottom and the logits on top.

    Args:
        graph: The graph.
        edges: What is drawn.
        weights: What each edge counts; width follows the size, and what works against the rest is
            dashed.

    Returns:
        A self-contained SVG.
    """
    pairs = [(edge, edge.writer, _owner(edge.reader)) for edge in edges]
    places = _places(graph, {name for _, a, b in pairs for name in (a, b)})
    width = max((x for x, _ in places.values()), default=0) + 2 * MARGIN
    height = max((y for _, y in places.values()), default=0) + 2 * MARGIN
    largest = max((abs(w) for w in weights.values()), default=0.0) or 1.0
    side = sum(weights.get(e, 0.0) for e in edges)
    lines = [
        _line(edge, places[a], places[b], height, weights.get(edge, largest) / largest, side)
        for edge, a, b in pairs
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="circuit of {len(edges)} edges" '
            'font-family="system-ui, sans-serif" font-size="11">',
            *lines,
            *(_box(name, place, height) for name, place in places.items()),
            "</svg>",
        ]
    )


def _owner(reader: str) -> str:
    return reader.rsplit(".", 1)[0] if reader[-2:] in (".q", ".k", ".v") else reader


def _places(graph: Graph, names: set[str]) -> dict[str, tuple[int, int]]:
    """Return x and height of each node; what is in one layer stands side by side."""
    layers: dict[float, list[str]] = {}
    for name, layer in zip(graph.writers, graph.writer_layers, strict=True):
        # An MLP works after the heads of its layer, so it stands above them.
        level = layer + 0.5 if name.startswith("MLP") else float(layer)
        layers.setdefault(level, []).append(name)
    for reader in graph.readers:
        owner = _owner(reader)
        if owner not in graph.writers and owner != "logits":
            layers.setdefault(-1.0, []).append(owner)
    layers[float(max(graph.reader_layers) + 1)] = ["logits"]
    rows = [[n for n in own if n in names] for _, own in sorted(layers.items())]
    rows = [row for row in rows if row]
    return {
        name: (MARGIN // 2 + i * STEP_X, level * STEP_Y)
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }


def _line(
    edge: Edge,
    start: tuple[int, int],
    end: tuple[int, int],
    height: int,
    weight: float,
    side: float,
) -> str:
    (x1, y1), (x2, y2) = ((x + MARGIN // 2 + 4, height - MARGIN - y) for x, y in (start, end))
    dash = ' stroke-dasharray="4 3"' if weight * side < 0 else ""
    return (
        f'<path d="M{x1},{y1 - 9} C{x1},{y1 - 32} {x2},{y2 + 32} {x2},{y2 + 9}" fill="none" '
        f'stroke="#4878a8" stroke-opacity="0.75" stroke-width="{0.5 + 3.5 * abs(weight):.2f}"'
        f"{dash}><title>{escape(str(edge))}</title></path>"
    )


def _box(name: str, place: tuple[int, int], height: int) -> str:
    x, y = place[0] + MARGIN // 2 + 4, height - MARGIN - place[1]
    return (
        f'<g><rect x="{x - 26}" y="{y - 9}" width="52" height="18" rx="4" fill="#fff" '
        f'stroke="#888"/><text x="{x}" y="{y + 4}" text-anchor="middle" fill="#222">'
        f"{escape(name)}</text></g>"
    )
