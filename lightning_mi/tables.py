"""Records as labelled arrays (xarray)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .record import Panel, Record

if TYPE_CHECKING:
    import xarray

__all__ = ["to_dataarray", "to_dataset"]


def to_dataarray(panel: Panel) -> xarray.DataArray:
    """Return a panel as a labelled array.

    Args:
        panel: The panel.

    Returns:
        Dimensions are the panel's axes; an axis without labels, or whose labels repeat, gets
        0, 1, …
    """
    import xarray

    coords: dict[str, Any] = {axis: np.arange(n) for axis, n in panel.size.items()}
    for key, labels in panel.coords.items():
        # Labels that repeat (the tokens of a text) name no entry, and cannot be aligned by.
        if "," not in key and len({repr(label) for label in labels}) == len(labels):
            coords[key] = _labels(labels)
    attributes = {"unit": panel.unit, **panel.convention}
    return xarray.DataArray(panel.values.numpy(), coords, panel.axes, attrs=attributes)


def to_dataset(records: Sequence[Record]) -> xarray.Dataset:
    """Stack records of one measurement along ``step``.

    Args:
        records: Any records; of two with one name and step the later one counts.

    Returns:
        One variable for each panel name.
    """
    import xarray

    by_name: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        by_name[record.what][record.step] = record
    moments = {r.step: r for r in records}
    variables = {what: _stack(what, list(found.values())) for what, found in by_name.items()}
    dataset = xarray.merge(
        list(variables.values()), join="outer", compat="no_conflicts", combine_attrs="drop"
    )
    steps = [int(step) for step in dataset["step"].values]
    for moment in ("epoch", "samples", "tokens"):
        values = [getattr(moments[step], moment) for step in steps]
        dataset = dataset.assign_coords({moment: ("step", [_number(v) for v in values])})
    return dataset


def _stack(what: str, records: list[Record]) -> xarray.DataArray:
    import xarray

    arrays = [to_dataarray(r.panel) for r in records]
    # Attributes may differ from step to step (the gap, the best head): keep the latest.
    latest = dict(arrays[-1].attrs)
    for array in arrays:
        array.attrs = {}
    steps = xarray.DataArray([r.step for r in records], dims="step", name="step")
    joined: xarray.DataArray = xarray.concat(
        arrays,
        dim=steps,
        join="outer",
        coords="minimal",
        compat="override",
    )
    return joined.rename(what).assign_attrs(latest)


def _labels(labels: Any) -> Any:
    return np.array(labels) if len({type(v) for v in labels}) == 1 else np.array(labels, object)


def _number(value: int | None) -> float:
    return float("nan") if value is None else float(value)
