"""Gradients of anything that a measurement returns: gradients stay on while it runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError
from ..isolation import followed
from ..measurement import Context, Measurement
from ..record import Panel
from ..task import Task
from .point import Point, math_attention

__all__ = ["gradient_of_panel", "measured", "slope_along"]

Index = Mapping[str, int | str]

FAITHFUL = 1e-3
"""How far the value measured with gradients may be from the one measured as always, relative."""

STRAIGHT = 0.05
"""How far a gradient may be from the measured slope along it, relative."""

STEPS = (1e-3, 1e-2, 1e-4)
"""Relative changes of the value, or of the weights if that is less, that the slope is measured
over, until one agrees."""


class _Following(TorchFunctionMode):
    """Keep every way from parameters to results open: ``no_grad`` and ``detach`` do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and not args[0]:
            return None
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.requires_grad:
            if func in (Tensor.detach, Tensor.requires_grad_):
                return first
            if func is Tensor.numpy:
                with torch._C.DisableTorchFunction():
                    return first.detach().numpy(*args[1:], **kwargs)
        if func is torch.autograd.grad:
            kwargs = {**kwargs, "create_graph": True, "retain_graph": True}
        return func(*args, **kwargs)


@contextmanager
def following() -> Iterator[None]:
    """Let gradients through everything that is computed inside.

    Yields:
        Nothing. Code that asks for a gradient gets one that can be differentiated again.
    """
    before = followed.set(True)
    try:
        with warnings.catch_warnings(), math_attention(), torch.enable_grad(), _Following():
            # A number read off a tensor, for a convention, is no part of the result.
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            yield
    finally:
        followed.reset(before)


def measured(
    point: Point, measurement: Measurement, panel: str, index: Index, batch: Any, task: Task | None
) -> Tensor:
    """Return one number of one panel of a measurement.

    Args:
        point: The model.
        measurement: What is measured.
        panel: Which of its panels.
        index: Which entry: by axis a label, or a place where the axis has no labels.
        batch: What it is measured on; None where it needs nothing.
        task: How the model is called; None is inferred.

    Returns:
        A scalar.

    Raises:
        ArgumentError: If there is no such panel or entry.
    """

    def run(model: Any) -> Tensor:
        context = Context(model, batch, task)
        reading = measurement(model, context)
        if panel not in reading:
            raise ArgumentError.of(
                "panel",
                expected=f"one of {sorted(reading)}",
                got=repr(panel),
                do=f"{type(measurement).__name__} returns no other panels.",
            )
        return entry_of(reading[panel], index)

    return point.call(run)


def entry_of(panel: Panel, index: Index) -> Tensor:
    """Return one entry of a panel.

    Args:
        panel: The panel.
        index: By axis a label, or a place where the axis has no labels.

    Returns:
        A scalar.

    Raises:
        ArgumentError: If an axis is missing, unknown, or has no such entry.
    """
    if set(index) != set(panel.axes):
        raise ArgumentError.of(
            "index",
            expected=f"one entry for each axis of {panel.axes or 'a panel without axes'}",
            got=dict(index) or "none",
            do='For example Score(HeadScores(), "induction", layer=1, head=0).',
        )
    values = panel.values
    for axis in panel.axes:
        values = values[_place(panel, axis, index[axis])]
    return values


def _place(panel: Panel, axis: str, wanted: int | str) -> int:
    labels = list(panel.coords.get(axis, range(panel.size[axis])))
    if wanted in labels:
        return labels.index(wanted)
    written = [str(label) for label in labels]
    if str(wanted) in written:
        return written.index(str(wanted))
    raise ArgumentError.of(
        axis,
        expected=f"one of {labels[:8]}{' …' if len(labels) > 8 else ''}",
        got=repr(wanted),
        do="Labels are those of the panel's coordinates.",
    )


def gradient_of_panel(
    point: Point, value: Callable[[Point], Tensor], name: str
) -> tuple[float, Tensor, float]:
    """Return a measured number, its gradient in the parameters, and how well that was checked.

    The measurement runs with gradients left on everywhere; the number must come out as it does
    without, and the gradient must be the slope that is measured along it, so that a measurement
    whose result does not follow from the parameters by differentiable steps is refused rather
    than differentiated wrongly.

    Args:
        point: The model.
        value: Measures the number.
        name: What it is called in messages.

    Returns:
        The number, ``[P]`` in double precision, and the relative error of the slope.

    Raises:
        ArgumentError: If the number is NaN or cannot be differentiated.
    """
    plain = float(value(point))
    if not math.isfinite(plain):
        raise _refused(name, f"{plain}", "There is nothing to differentiate: see its reason.")
    try:
        with following():
            traced = value(point)
            slopes = point.gradient(traced)
        found = point.flat(slopes)
        traced = traced.detach()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise _refused(name, f"{type(error).__name__}: {str(error)[:200]}", HOW) from error
    apart = abs(float(traced) - plain)
    if apart > FAITHFUL * max(abs(plain), 1e-6):
        seen = f"{float(traced):.6g} with gradients and {plain:.6g} without"
        raise _refused(name, seen, HOW)
    if not bool(found.any()):
        raise _refused(name, "a number that does not move with any parameter", HOW)
    off = _off(point, value, found, plain)
    if not off <= STRAIGHT:
        raise _refused(name, f"a gradient that is {off:.0%} off the measured slope", HOW)
    return plain, found, off


HOW = "Ask about a panel that follows from the weights by differentiable steps, or a Target."


def _refused(name: str, got: str, do: str) -> ArgumentError:
    return ArgumentError.of(
        "query", expected=f"{name} to be differentiable in the parameters", got=got, do=do
    )


def _off(point: Point, value: Callable[[Point], Tensor], gradient: Tensor, plain: float) -> float:
    """Return the smallest relative difference of slope and gradient over a few step lengths."""
    norm = gradient.norm()
    best = math.inf
    # Where the value hardly moves it is the weights that may not move far.
    weights = max(float(point.flat(point.leaves).norm()), 1e-3)
    whole = min(max(abs(plain), 1e-2) / float(norm), weights)
    for step in STEPS:
        length = step * whole
        slope = slope_along(point, value, gradient / norm, length)
        best = min(best, abs(slope / float(norm) - 1))
        if best < STRAIGHT / 5:
            break
    return best


def slope_along(
    point: Point, value: Callable[[Point], Tensor], direction: Tensor, length: float
) -> float:
    """Return (f(θ + length · d) − f(θ − length · d)) / (2 length), without changing the model.

    Args:
        point: θ.
        value: f.
        direction: d, ``[P]``.
        length: How far.

    Returns:
        The slope.
    """
    ends = []
    for sign in (1.0, -1.0):
        moved = point.moved(direction * (sign * length))
        ends.append(float(value(moved).detach().double()))
    return (ends[0] - ends[1]) / (2 * length)
