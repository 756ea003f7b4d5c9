"""How attributions moved: their likeness to the last ones, or to the ones before."""

from __future__ import annotations

from typing import Any

from .heads import curve
from .methods import methods, title
from .shelf import Shelf

__all__ = ["moved"]

AGAINST = {"spearman_final": "the last measurement", "spearman": "the measurement before"}
"""What was recorded, best first: what follows the end is known only when a run has ended."""


def moved(shelf: Shelf) -> dict[str, Any] | None:
    """Return rank correlations over steps by method, or None where none were recorded."""
    for what, against in AGAINST.items():
        found = {m: curve(shelf, f"{m}_drift/{what}", title(m)) for m in methods(shelf)}
        series = [{**one, "key": m} for m, one in found.items() if one is not None]
        if series:
            return {"series": series, "against": against}
    return None
