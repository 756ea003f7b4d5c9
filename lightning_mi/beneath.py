"""What attributions are shown with: the images they lie over, names of features and of classes.

`measure` adds it to every reading of attributions, so that a picture needs nothing but its records:
the user's own measurements are drawn like those that come with the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import LightningMIError
from .record import Panel, Reading, Record

if TYPE_CHECKING:
    from .measurement import Context

__all__ = ["grey", "inputs_of", "part_of", "with_inputs"]

VALUES, INPUTS = "values", "inputs"

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""How bright red, green and blue look (ITU-R BT.709)."""


def with_inputs(reading: Reading, model: nn.Module, context: Context) -> Reading:
    """Add the inputs that attributions belong to, and the names of features and classes.

    Args:
        reading: What a measurement returned. Only its panel ``values`` is looked at, and, where
            several inputs were explained, ``values_<key>`` of each; only if their first axis is
            ``example``. Any other reading is returned as it is.
        model: The model. ``feature_names`` and ``class_names``, attributes of the task, of the
            model or of a network in it, name the features of a table and the classes asked about.
        context: Holds the batch and the task.

    Returns:
        The reading, with ``inputs`` (or ``inputs_<key>``) where they fit: images in grey (`grey`),
        or the numbers of the table. They are recorded, and no chart of their own is drawn.
    """
    values = reading.get(VALUES)
    if values is None or values.axes[:1] != ("example",) or not context.has_batch:
        return reading
    shown: dict[str, Panel] = dict(reading)
    for name, panel in reading.items():
        if name == VALUES or ("input" in panel.convention and part_of(name)):
            shown |= _shown(name, panel, reading, model, context)
    return shown


def _shown(
    name: str, values: Panel, reading: Reading, model: nn.Module, context: Context
) -> dict[str, Panel]:
    """Attributions with names, and what lies beneath them."""
    named = _with_features(values, _names("feature_names", model, context))
    named = _with_classes(named, _names("class_names", model, context))
    place = INPUTS + name.removeprefix(VALUES)
    if place in reading or values.axes[-1] not in ("x", "feature"):
        return {name: named}
    inputs = _inputs(context, named)
    beneath = None if inputs is None else _beneath(named, inputs)
    return {name: named} if beneath is None else {name: named, place: beneath}


def grey(images: Tensor) -> Tensor:
    """Return images as one byte a pixel, each stretched so that its own range is 0 to 255.

    Args:
        images: ``[example, channel, y, x]``. Three channels are weighed as red, green and blue;
            of any other number the mean is taken.

    Returns:
        uint8 ``[example, y, x]``; 0 where an image is constant, and where it is not finite.

    Example:
        >>> grey(torch.tensor([[[[-1.0, 0.0, 3.0]]]]))
        tensor([[[  0,  64, 255]]], dtype=torch.uint8)
    """
    wide = images.detach().float().cpu()
    weights = torch.tensor(LUMINANCE) if wide.shape[1] == 3 else torch.ones(1)
    flat = (wide * (weights / weights.sum())[None, :, None, None]).nan_to_num(0.0, 0.0, 0.0)
    level = flat.sum(1) if wide.shape[1] == 3 else flat.mean(1)
    low, high = level.amin((1, 2), keepdim=True), level.amax((1, 2), keepdim=True)
    span = torch.where(high > low, high - low, torch.ones_like(high))
    return (255 * (level - low) / span).round().to(torch.uint8)


def part_of(what: str) -> str:
    """Return which of several inputs a panel of attributions is about.

    Args:
        what: Name of the panel.

    Returns:
        The key of the input, or nothing.

    Example:
        >>> part_of("values_left"), part_of("values")
        ('left', '')
    """
    return what.removeprefix(f"{VALUES}_") if what.startswith(f"{VALUES}_") else ""


def inputs_of(record: Record) -> str:
    """Return the name of the record that holds the inputs which attributions belong to.

    Args:
        record: Attributions: ``values``, or ``values_<key>`` of one of several inputs.

    Returns:
        A full name.

    Example:
        >>> inputs_of(Record("saliency/values_left", Panel([[1.0]], ("example", "feature"))))
        'saliency/inputs_left'
    """
    key = part_of(record.what)
    return f"{record.measurement}/{INPUTS}_{key}" if key else f"{record.measurement}/{INPUTS}"


def _beneath(values: Panel, inputs: Tensor) -> Panel | None:
    shown: dict[str, Any] = {"display": {}}
    if values.axes[-2:] == ("y", "x"):
        if inputs.ndim != 4 or inputs.shape[-2:] != values.values.shape[-2:]:
            return None
        shown["of"] = "inputs in grey, each image stretched to 0 … 255"
        return Panel(grey(inputs), ("example", "y", "x"), {}, "1", shown)
    if values.axes != ("example", "feature") or inputs.shape != values.values.shape:
        return None
    return Panel(inputs, values.axes, values.coords, "1", {**shown, "of": "inputs"})


def _inputs(context: Context, values: Panel) -> Tensor | None:
    """The first inputs, if they are numbers; a task that cannot say is no reason to fail."""
    count, key = len(values.values), values.convention.get("input")
    try:
        inputs = context.task.inputs(context.batch) if key is None else context.batch[key]
    except (LightningMIError, LookupError, TypeError):
        return None
    if not isinstance(inputs, Tensor):
        return None
    fits = inputs.is_floating_point() and inputs.ndim and len(inputs) >= count
    return inputs[:count] if fits else None


def _names(attribute: str, model: nn.Module, context: Context) -> list[str]:
    owners: Sequence[Any] = (context.known_task, model, *model.children())
    found = next((n for o in owners if (n := getattr(o, attribute, None)) is not None), None)
    return [] if found is None or isinstance(found, Tensor) else [str(name) for name in found]


def _with_features(values: Panel, names: list[str]) -> Panel:
    if values.axes[-1] != "feature" or len(names) != values.size["feature"]:
        return values
    return dataclasses.replace(values, coords={**values.coords, "feature": names})


def _with_classes(values: Panel, names: list[str]) -> Panel:
    """Say the name of the class that was asked about; tokens have texts of their own."""
    asked = values.convention.get("target_token")
    fits = isinstance(asked, list) and all(0 <= i < len(names) for i in asked)
    if not asked or not fits or "target_position" in values.convention:
        return values
    said = {**values.convention, "target_text": [names[i] for i in asked]}
    return dataclasses.replace(values, convention=said)
