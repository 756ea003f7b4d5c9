"""What a measurement returns and what is kept of it: `Panel`, `Reading`, `Record`.

A `Panel` is an array with named axes; the *names* of its axes choose the picture that loggers and
the report draw. A `Reading` maps short names to panels. A `Record` is one panel together with the
moment it was taken and the recipe that made it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError

__all__ = ["AXES", "Panel", "Reading", "Record", "Source", "Weights", "scalar"]

AXES = frozenset(
    {
        "layer",
        "head",
        "kv_head",
        "neuron",
        "position",
        "query_position",
        "key_position",
        "token",
        "query",
        "example",
        "train_example",
        "channel",
        "y",
        "x",
        "feature",
        "writer",
        "reader",
        "edge",
        "step",
        "class",
    }
)
"""The closed vocabulary of axis names: a picture is chosen by them, others would draw nothing."""

Source = str
"""Where a record came from: ``"live"`` (during training) or ``"sweep"`` (from a checkpoint)."""

Weights = str
"""Which weights were measured: ``"current"``, or ``"average"`` under weight averaging."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Detached CPU values with named axes.

    Args:
        values: Any tensor, array or number. It is detached and copied to the CPU; half precision
            is widened to float32, which every file format can hold.
        axes: One name of `AXES` for each dimension of ``values``.
        coords: Labels. A key is an axis (then one label for each entry along it) or several axes
            joined by commas, ``"example,position"`` (then nested lists of that shape).
        unit: ``"1"`` for a pure number, else for example ``"nats"`` or ``"logits"``.
        convention: Plain JSON: sign, offset, null, damping, whatever is needed to read the values.

    Raises:
        ArgumentError: If axes, coords or convention do not fit the values.

    Example:
        >>> Panel([[0.1, 0.9]], ("layer", "head")).axes
        ('layer', 'head')
    """

    values: Tensor
    axes: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    unit: str = "1"
    convention: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalise the values and check that names, labels and shapes fit."""
        values = _detached(self.values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "coords", plain(self.coords, "coords"))
        object.__setattr__(self, "convention", plain(self.convention))
        self._check_axes()
        for key, labels in self.coords.items():
            self._check_labels(key, labels)

    def _check_axes(self) -> None:
        if len(self.axes) != self.values.ndim:
            raise ArgumentError.of(
                "axes",
                expected=f"{self.values.ndim} names for values of shape {tuple(self.values.shape)}",
                got=repr(self.axes),
                do="Name every dimension once.",
            )
        unknown = [axis for axis in self.axes if axis not in AXES]
        if unknown or len(set(self.axes)) != len(self.axes):
            raise ArgumentError.of(
                "axes",
                expected=f"distinct names out of {sorted(AXES)}",
                got=repr(self.axes),
                do="A picture is chosen by these names, so no others can be used.",
            )

    def _check_labels(self, key: str, labels: Any) -> None:
        axes = key.split(",")
        if any(axis not in self.axes for axis in axes):
            raise ArgumentError.of(
                "coords", expected=f"keys out of {self.axes}", got=repr(key), do="Rename the key."
            )
        sizes = tuple(self.values.shape[self.axes.index(axis)] for axis in axes)
        if not _has_shape(labels, sizes):
            raise ArgumentError.of(
                f"coords[{key!r}]",
                expected=f"labels of shape {sizes}",
                got=f"{len(labels)} labels" if isinstance(labels, list) else repr(labels),
                do="Give one label for each entry.",
            )

    @property
    def size(self) -> dict[str, int]:
        """Length of every axis."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    @property
    def nonfinite(self) -> int:
        """Number of values that are NaN or infinite."""
        if not self.values.is_floating_point():
            return 0
        return int((~torch.isfinite(self.values)).sum())

    def item(self) -> float:
        """Return the value of a panel without axes."""
        return float(self.values)

    def equal(self, other: Panel) -> bool:
        """Say whether values are bit-equal (NaN equals NaN) and axes and labels are the same."""
        same = self.axes == other.axes and self.coords == other.coords
        a, b = self.values, other.values
        if not same or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())


Reading = Mapping[str, Panel]
"""What a measurement returns: short names to panels."""


def scalar(value: float | Tensor, unit: str = "1", **convention: Any) -> Panel:
    """Return a panel without axes.

    Args:
        value: The number.
        unit: Its unit.
        **convention: What is needed to read it.

    Returns:
        The panel.

    Example:
        >>> scalar(0.5, "nats").item()
        0.5
    """
    return Panel(torch.as_tensor(value), (), {}, unit, convention)


@dataclass(frozen=True, eq=False)
class Record:
    """One panel, the moment it was taken, and the recipe that made it.

    Args:
        name: Full name, ``"<measurement>/<panel>"``.
        panel: The values.
        step: ``trainer.global_step``, the number of optimizer steps taken.
        epoch: ``trainer.current_epoch``.
        samples: Training examples seen so far on all ranks, or None where unknown.
        tokens: Training tokens seen so far on all ranks, or None where unknown.
        weights: ``"current"`` or ``"average"``.
        source: ``"live"`` or ``"sweep"``.
        made_by: Class path and arguments of the measurement as JSON.
    """

    name: str
    panel: Panel
    step: int = 0
    epoch: int = 0
    samples: int | None = None
    tokens: int | None = None
    weights: Weights = "current"
    source: Source = "live"
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies a record in a run: of two with one key the later one counts."""
        return (self.name, self.step, self.source)

    @property
    def measurement(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/", 1)[0]

    @property
    def what(self) -> str:
        """The part of the name after the slash."""
        return self.name.split("/", 1)[-1]

    def replace(self, **changes: Any) -> Record:
        """Return a copy with some fields changed.

        Args:
            **changes: New values of fields.

        Returns:
            The copy.
        """
        return dataclasses.replace(self, **changes)


PLAIN = frozenset({str, int, float, bool, type(None)})
"""Types that JSON has."""


def plain(value: Any, argument: str = "convention") -> Any:
    """Return ``value`` as plain JSON types: dict, list, str, int, float, bool, None.

    Args:
        value: Built-in containers, numbers, numpy or torch scalars and small arrays.
        argument: What it is, for the message.

    Returns:
        The same, made of built-in types only.

    Raises:
        ArgumentError: If something in it has no plain form.

    Example:
        >>> plain({"n": np.int64(3), "w": (1, 2)})
        {'n': 3, 'w': [1, 2]}
    """
    if type(value) in PLAIN:
        return value
    if type(value) in (list, tuple) and PLAIN.issuperset(map(type, value)):
        return list(value)  # Labels of tokens, by the thousand: not one by one.
    if isinstance(value, str | bool | int | float):
        return _builtin(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v, argument) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        # Their order differs from process to process.
        value = sorted(value, key=repr)
    if isinstance(value, Sequence):
        return [plain(v, argument) for v in value]
    raise ArgumentError.of(
        argument,
        expected="plain JSON (numbers, text, lists, dicts)",
        got=f"a {type(value).__name__}",
        do="Store a description of the object, not the object.",
    )


def _builtin(value: Any) -> Any:
    """Strip subclasses (a numpy float64 is a float, a StrEnum is a str)."""
    if isinstance(value, Enum):
        value = value.value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _detached(values: Any) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
    if tensor.is_complex():
        raise ArgumentError.of(
            "values",
            expected="real numbers",
            got=str(tensor.dtype)[6:],
            do="Pass absolute values, or real and imaginary parts as two panels.",
        )
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    with torch.inference_mode(False):
        return tensor.as_subclass(Tensor).cpu().clone()


def _has_shape(labels: Any, sizes: tuple[int, ...]) -> bool:
    if not sizes:
        return True
    if isinstance(labels, str) or not isinstance(labels, Sequence) or len(labels) != sizes[0]:
        return False
    return len(sizes) == 1 or all(_has_shape(entry, sizes[1:]) for entry in labels)


def number_to_json(value: float) -> float | str:
    """Return a float as JSON can hold it: non-finite values become text.

    Args:
        value: Any float.

    Returns:
        The float, or ``"nan"``, ``"inf"``, ``"-inf"``, which ``float`` reads back.

    Example:
        >>> number_to_json(float("nan")), float(number_to_json(float("-inf")))
        ('nan', -inf)
    """
    return value if math.isfinite(value) else str(value)
