"""Which attributions a run recorded, and what they are of."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..beneath import part_of
from ..record import Panel, Record
from ..sinks.names import spelled
from .shelf import Numbers, Shelf

__all__ = ["cap", "methods", "recipe", "record_of", "signed", "target", "targets", "title", "unit"]

FIRST = ("integrated_gradients", "saliency")
"""These two stand first wherever methods are listed."""


def methods(shelf: Shelf) -> list[str]:
    """Return the names of all measurements that recorded attributions of examples.

    Where several inputs were explained together, each is a method of its own: its name is followed
    by a slash and the key of the input.
    """
    last = [shelf.peek(name)[-1] for name in shelf.names if "/values" in name]
    named = [
        (r.measurement, part_of(r.what))
        for r in last
        if r.panel.axes[:1] == ("example",)
        and (r.measurement in FIRST or "method" in r.panel.convention)
        and (r.what == "values" or "input" in r.panel.convention)
    ]
    parted = {measurement for measurement, key in named if key}
    # The scores of all inputs in one row are drawn as those of each input.
    kept = [(name, key) for name, key in named if key or name not in parted]
    kept.sort(key=lambda pair: FIRST.index(pair[0]) if pair[0] in FIRST else len(FIRST))
    return [f"{name}/{key}" if key else name for name, key in kept]


def record_of(method: str) -> str:
    """Return the name of a method's attributions.

    Args:
        method: One of `methods`.

    Example:
        >>> record_of("saliency"), record_of("saliency/scan")
        ('saliency/values', 'saliency/values_scan')
    """
    name, _, key = method.partition("/")
    return f"{name}/values_{key}" if key else f"{name}/values"


def title(method: str) -> str:
    """Return the name of a method as people write it.

    Example:
        >>> title("integrated_gradients"), title("saliency/scan")
        ('integrated gradients', 'saliency of scan')
    """
    name, _, key = method.partition("/")
    return f"{spelled(name)} of {key}" if key else spelled(name)


def signed(panel: Panel) -> bool:
    """Whether values support and oppose: what the panel says, else whether one is negative."""
    sign = panel.convention.get("sign")
    return bool((panel.values < 0).any()) if sign is None else not str(sign).startswith("none")


def unit(panel: Panel) -> str:
    """Return the unit as it is written beside a number: nothing for a pure one."""
    return "" if panel.unit == "1" else panel.unit


def targets(panel: Panel) -> list[str]:
    """Return the text of each example's target, or nothing where there is none."""
    said = (panel.convention.get(key) for key in ("target_text", "target"))
    found = next((one for one in said if one is not None), None)
    if isinstance(found, list):
        return [str(text) for text in found]
    return [str(found)] * panel.values.shape[0] if isinstance(found, str | int) else []


def target(panel: Panel) -> str | None:
    """Return the text of the first example's target, or None where it has none."""
    return next(iter(targets(panel)), None)


def cap(values: Numbers, floor: float = 0.0) -> float:
    """Return the value of full colour: nearly the largest size of the run, and at least a floor.

    One extreme value does not pale the rest; what is zero almost everywhere is still seen.
    """
    sizes = np.abs(values[np.isfinite(values)])
    largest = float(np.quantile(sizes, 0.995) or sizes.max()) if sizes.size else 0.0
    return float(f"{max(largest, floor) or 1.0:.3g}")


def recipe(record: Record) -> str:
    """Return the arguments of the measurement that are plain, in one line."""
    arguments: dict[str, Any] = record.made_by.get("init_args", {}) if record.made_by else {}
    plain = {k: v for k, v in arguments.items() if isinstance(v, str | int | float) and k != "name"}
    return ", ".join(f"{k} {v}" for k, v in plain.items())
