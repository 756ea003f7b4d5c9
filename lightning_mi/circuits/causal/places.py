"""Where an intervention acts: `Residual`, `At`, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...nodes import MLP, Head, Neuron, Reader, parse

__all__ = ["At", "HeadPart", "Kind", "Part", "Place", "Port", "Residual", "as_place", "named_part"]

HeadPart: TypeAlias = Literal["z", "q", "k", "v", "pattern"]
Kind: TypeAlias = Literal["z", "q", "k", "v", "pattern", "mlp", "neuron", "residual"]
Port: TypeAlias = tuple[Kind, int]
"""A tensor inside the model: its kind and its layer."""


@dataclass(frozen=True, order=True)
class Residual:
    """The residual stream as it enters a layer; with the number of layers, as the logits read it.

    Args:
        layer: The layer.
    """

    layer: int

    def __str__(self) -> str:
        """Return for example ``resid2``."""
        return f"resid{self.layer}"


Part: TypeAlias = Head | Reader | MLP | Neuron | Residual


@dataclass(frozen=True, eq=False)
class At:
    """A portion of a part: its pattern, some positions, or a subspace.

    Args:
        node: The part. A `Reader` with ``"k"`` or ``"v"`` counts key-value heads.
        what: For a head what is meant of it: ``"z"``, what it writes before the output projection
            (the default), ``"q"``, ``"k"``, ``"v"`` or ``"pattern"``.
        positions: Where: ints for all examples (negative: from the end), or a long tensor
            ``[example]`` with one for each. None is everywhere. For a pattern these are queries.
        basis: Directions ``[d, k]`` of a subspace; None is the whole space.
        outside: Replace what lies outside the subspace and keep what lies inside.

    Example:
        >>> str(At(Head(1, 3), "pattern", positions=[-1]).node)
        'L1H3'
    """

    node: Part
    what: HeadPart | None = None
    positions: int | Sequence[int] | Tensor | None = None
    basis: Tensor | None = None
    outside: bool = False


@dataclass(frozen=True, eq=False)
class Place:
    """What `At` comes to.

    Args:
        kind: The kind of tensor.
        layer: The layer.
        index: Head, key-value head or neuron; None for the whole.
        positions: See `At`.
        basis: Orthonormal columns, or None.
        outside: See `At`.
        name: As printed.
    """

    kind: Kind
    layer: int
    index: int | None
    positions: int | Sequence[int] | Tensor | None
    basis: Tensor | None
    outside: bool
    name: str

    @property
    def port(self) -> Port:
        """The tensor that it is a part of."""
        return (self.kind, self.layer)

    def taken(self, values: Tensor) -> Tensor:
        """Return this part of a tensor of its port.

        Args:
            values: ``[example, head, …]`` for heads, else ``[example, position, d]``.

        Returns:
            Without the axis of heads, or of neurons.

        Raises:
            ArgumentError: If there is no such head or neuron.
        """
        if self.index is None:
            return values
        count = values.shape[-1 if self.kind == "neuron" else 1]
        if self.index >= count:
            raise ArgumentError.of(
                self.name,
                expected=f"an index from 0 to {count - 1}",
                got=self.index,
                do="Under grouped queries k and v count key-value heads.",
            )
        return values[..., self.index] if self.kind == "neuron" else values[:, self.index]

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """Return a tensor of its port in which this part is another one.

        Args:
            values: ``[example, head, …]`` for heads, else ``[example, position, d]``.
            new: The part, broadcastable to it.

        Returns:
            A new tensor; gradients flow through what stays.
        """
        old = self.taken(values)
        new = new.to(old).expand_as(old)
        if self.basis is not None:
            basis = self.basis.to(
                device=old.device, dtype=torch.promote_types(old.dtype, torch.float32)
            )
            change = (new - old).to(basis)
            inside = change @ basis @ basis.T
            new = (old + (change - inside if self.outside else inside)).to(old)
        where = self._where(old)
        if where is not None:
            new = torch.where(where, new, old)
        if self.index is None:
            return new
        made = values.clone()
        if self.kind == "neuron":
            made[..., self.index] = new
        else:
            made[:, self.index] = new
        return made

    def _where(self, old: Tensor) -> Tensor | None:
        """Return which positions are meant, broadcastable to the part."""
        if self.positions is None:
            return None
        length = old.shape[1]
        steps = torch.arange(length, device=old.device)
        if isinstance(self.positions, Tensor) and self.positions.ndim:
            own = self.positions.to(old.device)
            if len(old) % len(own):
                raise ArgumentError.of(
                    "positions",
                    expected=f"one for each of the {len(old)} examples",
                    got=f"{len(own)}",
                    do="Pass a list of ints to mean the same positions in all examples.",
                )
            own = own.repeat(len(old) // len(own))
            found = steps == torch.where(own < 0, own + length, own)[:, None]
        else:
            given = self.positions
            chosen = [int(given)] if isinstance(given, int | Tensor) else [int(p) for p in given]
            _check_inside(chosen, length)
            wanted = torch.tensor([p % length for p in chosen], device=old.device)
            found = torch.isin(steps, wanted)[None]
        return found.reshape(*found.shape, *([1] * (old.ndim - 2)))


def _check_inside(chosen: list[int], length: int) -> None:
    outside = [p for p in chosen if not -length <= p < length]
    if outside:
        raise ArgumentError.of(
            "positions",
            expected=f"positions inside the {length} of the batch",
            got=outside,
            do="Negative positions count from the end.",
        )


def as_place(part: Part | At) -> Place:
    """Return what a key of an intervention means.

    Args:
        part: A node, or `At` a portion of one.

    Returns:
        The place.

    Raises:
        ArgumentError: If it cannot be intervened on.
    """
    at = part if isinstance(part, At) else At(part)
    node, what = at.node, at.what
    if what is not None and (not isinstance(node, Head) or what not in get_args(HeadPart)):
        raise ArgumentError.of(
            "what",
            expected=f"one of {get_args(HeadPart)}, for a Head",
            got=f"{what!r} for {node}",
            do='For example At(Head(1, 3), "pattern").',
        )
    kind, layer, index = _found(node, what)
    if layer < 0 or (index is not None and index < 0):
        raise ArgumentError.of(
            "node", expected="layers and indices from 0", got=str(node), do="Count from 0."
        )
    basis = None if at.basis is None else _orthonormal(at.basis)
    name = str(node) if what in (None, "z") else f"{node}.{what}"
    return Place(kind, layer, index, at.positions, basis, at.outside, name)


def named_part(text: str) -> Head | MLP | Residual:
    """Return a part by its printed name.

    Args:
        text: ``L1H3``, ``MLP2``, or ``resid4`` for the stream that enters a layer.

    Returns:
        The part.

    Raises:
        ArgumentError: If it is another name.
    """
    if text.startswith("resid") and text[5:].isdigit():
        return Residual(int(text[5:]))
    node = parse(text)
    if isinstance(node, Head | MLP):
        return node
    raise ArgumentError.of(
        "part", expected="a name such as L1H3, MLP2 or resid4", got=repr(text), do="Choose."
    )


def _found(node: object, what: HeadPart | None) -> tuple[Kind, int, int | None]:
    if isinstance(node, Head):
        return what or "z", node.layer, node.head
    if isinstance(node, Reader):
        return node.role, node.node.layer, node.node.head
    if isinstance(node, MLP):
        return "mlp", node.layer, None
    if isinstance(node, Neuron):
        return "neuron", node.layer, node.index
    if isinstance(node, Residual):
        return "residual", node.layer, None
    raise ArgumentError.of(
        "node",
        expected="a Head, Reader, MLP, Neuron or Residual, or At(…) one of them",
        got=repr(node)[:60],
        do='For example {Head(1, 3): zero(), At(Head(0, 1), "pattern"): mean(batch)}.',
    )


def _orthonormal(basis: Tensor) -> Tensor:
    wide = basis.detach().to(torch.promote_types(basis.dtype, torch.float32))
    if wide.ndim != 2 or not wide.shape[1] or wide.shape[1] > wide.shape[0]:
        raise ArgumentError.of(
            "basis",
            expected="columns that span a subspace, [d, k] with k at most d",
            got=f"shape {tuple(basis.shape)}",
            do="Pass one column for each direction.",
        )
    found: Tensor = torch.linalg.qr(wide).Q
    return found
