"""Join data, style sheets and scripts into one HTML text: `page`."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from .join import joined_modules

__all__ = ["ASSETS", "embed", "page"]

STYLES = ("colours.css", "layout.css", "parts.css", "print.css")
"""In this order; they lie in ``page/``."""

ASSETS = files(__package__)
"""Where ``page/``, ``core/`` and ``charts/`` lie."""

ENTRY = "core/main.js"
"""The module that begins the drawing; charts come before it."""


def page(data: dict[str, Any]) -> str:
    """Return the whole page.

    Args:
        data: Plain JSON.

    Returns:
        HTML that refers to nothing outside itself.
    """
    slots = {
        "{{title}}": html.escape(f"{data['run']['name']} · lightning_mi"),
        "{{style}}": "".join(_read(f"page/{name}") for name in STYLES),
        "{{script}}": joined_modules(_scripts(), ENTRY),
        "{{data}}": embed(data),
    }
    text = _read("page/page.html")
    for slot, value in slots.items():
        # The data comes last, so a slot's name in a token is never filled.
        text = text.replace(slot, value, 1)
    return text


def embed(data: Any) -> str:
    r"""Return JSON that may stand in a script element whatever texts are in it.

    Args:
        data: Plain JSON; numbers that are not finite become null, which charts show as undefined.

    Returns:
        JSON in which ``</script>`` and ``<!--`` cannot occur; half a surrogate pair becomes U+FFFD.

    Example:
        >>> embed("</script><!--")
        '"\\u003c/script>\\u003c!--"'
    """
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # Half a surrogate pair is no text: UTF-8 cannot hold it, and a browser may crash on it.
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _scripts() -> dict[str, str]:
    """Every module by its path: ``core/dom.js``."""
    return {
        f"{folder}/{file.name}": file.read_text(encoding="utf-8")
        for folder in ("core", "charts")
        for file in (ASSETS / folder).iterdir()
        if file.name.endswith(".js")
    }


def _read(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
