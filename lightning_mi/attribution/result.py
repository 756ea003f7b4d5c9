"""What every attribution method returns: `Attribution`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..record import Panel, Reading

__all__ = ["Attribution"]

Texts = Callable[[Sequence[int]], list[str]]
"""Token ids -> one piece of text each."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each input matters to a target, example by example.

    Args:
        values: Scores, shaped like the inputs; one for each token where the inputs are ids.
        method: Name of the method.
        axes: Names of the axes of ``values``.
        target: The target's value at the inputs, ``[example]``.
        unit: Unit of the scores.
        ids: The token ids, where the inputs are ids.
        position: Position whose logits the target reads, ``[example]``, where there is one.
        token: Token or class that the target asks about, ``[example]``, where there is one.
        convention: What is needed to read the scores: kind, sign, rule, baseline, …
        gap: (Σ values − output_change) / output_change, signed, its denominator guarded:
            `paths.relative_gap`. ``[example]``, only from path methods, as are all below.
        delta: Σ values − output_change, signed, in units of the target.
        output_change: F(x) − F(x′): what the scores should add up to.
        steps: Nodes of the rule that gave the values.
        converged: Whether |gap| is at most the tolerance.
        parts: Where several inputs were explained at once, for each key its own scores; ``values``
            then holds those of all inputs side by side, ``[example, unit]``.
    """

    values: Tensor
    method: str
    axes: tuple[str, ...]
    target: Tensor
    unit: str = "1"
    ids: Tensor | None = None
    position: Tensor | None = None
    token: Tensor | None = None
    convention: Mapping[str, Any] = field(default_factory=dict)
    gap: Tensor | None = None
    delta: Tensor | None = None
    output_change: Tensor | None = None
    steps: Tensor | None = None
    converged: Tensor | None = None
    parts: Mapping[str | int, Attribution] = field(default_factory=dict)

    def stating(self, **facts: Any) -> Attribution:
        """Return the same scores with facts that hold for all inputs together.

        Args:
            **facts: Fields and their values.

        Returns:
            A new attribution; its parts state the same.
        """
        parts = {key: part.stating(**facts) for key, part in self.parts.items()}
        return dataclasses.replace(self, **facts, parts=parts)

    def reading(self, texts: Texts | None = None) -> Reading:
        """Return the panels that are recorded.

        Args:
            texts: Token ids to texts, for labels; None writes the ids.

        Returns:
            ``values`` and ``target``, from path methods also ``gap``, ``delta``,
            ``output_change``, ``steps`` and ``converged``, each ``[example]``; of several inputs
            also ``values_<key>`` of each, which are shown in the place of ``values``.
        """
        texts = texts or _as_numbers
        panels = self._own_panels(texts)
        for key, part in self.parts.items():
            panels[f"values_{key}"] = part.reading(texts)["values"]
        return panels

    def _own_panels(self, texts: Texts) -> dict[str, Panel]:
        convention = {"method": self.method, **self.convention, **self._asked(texts)}
        shown = {"display": {} if self.parts else {"picture": _picture(self.axes)}}
        coords = self._coords(texts)
        values = self.values
        if values.ndim > len(self.axes):  # More axes than there are names: one long last one.
            values = values.flatten(len(self.axes) - 1)
        panels = {"values": Panel(values, self.axes, coords, self.unit, convention | shown)}
        unit = self.convention.get("target_unit", "1")
        for name, each in (
            ("target", unit),
            ("gap", "1"),
            ("delta", unit),
            ("output_change", unit),
            ("steps", "1"),
            ("converged", "1"),
        ):
            value = getattr(self, name)
            if value is not None:
                display = {"display": {"scalar": "gap"}} if name == "gap" else {}
                panels[name] = Panel(value, ("example",), {}, each, convention | display)
        return panels

    def _asked(self, texts: Texts) -> dict[str, Any]:
        asked: dict[str, Any] = {}
        if self.position is not None:
            asked["target_position"] = self.position
        if self.token is not None:
            asked["target_token"] = self.token
            words = self.ids is not None and self.position is not None
            asked["target_text"] = (texts if words else _as_numbers)(self.token.tolist())
        return asked

    def _coords(self, texts: Texts) -> dict[str, Any]:
        if self.ids is None or self.axes != ("example", "position"):
            return {}
        rows = self.ids.reshape(len(self.ids), -1).tolist()
        return {"position": range(len(rows[0])), "example,position": [texts(row) for row in rows]}


def axes_of(shape: Sequence[int], *, tokens: bool, reduced: bool) -> tuple[str, ...]:
    """Return axis names for scores of inputs of some shape.

    Args:
        shape: Shape of the inputs.
        tokens: Whether they are ids.
        reduced: Whether the channel axis was summed over.

    Returns:
        Names out of the closed vocabulary.

    Example:
        >>> axes_of((8, 3, 32, 32), tokens=False, reduced=True)
        ('example', 'y', 'x')
    """
    if tokens:
        return ("example", "position")[: max(1, min(len(shape), 2))]
    names: dict[int, tuple[str, ...]] = {
        1: ("example",),
        2: ("example", "feature"),
        3: ("example", "position", "channel"),
        4: ("example", "channel", "y", "x"),
        5: ("example", "channel", "position", "y", "x"),
    }
    axes = names.get(len(shape), ("example", "feature"))
    return tuple(axis for axis in axes if not (reduced and axis == "channel"))


def channel_axis(ndim: int) -> int | None:
    """Return the axis that holds the parts of one position or pixel.

    Args:
        ndim: Number of axes of float inputs.

    Returns:
        The last for ``[example, position, channel]``, 1 for images and films, else None.
    """
    return {3: 2, 4: 1, 5: 1}.get(ndim)


def _as_numbers(ids: Sequence[int]) -> list[str]:
    return [str(i) for i in ids]


def _picture(axes: tuple[str, ...]) -> str:
    if "x" in axes or "channel" in axes:
        return "image"
    return "strip" if "position" in axes else "bars"
