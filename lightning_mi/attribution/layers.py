"""Finding a layer by the name that a user would write."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..isolation import unwrapped

__all__ = ["Layer", "find_layer", "observed"]

Layer: TypeAlias = str | nn.Module
"""A module, or its name: dotted from the model, or the end of such a name."""


def find_layer(model: nn.Module, layer: Layer) -> tuple[str, nn.Module]:
    """Return a layer and its full name.

    Args:
        model: The user's model, wrapped or not.
        layer: The module itself, its dotted name, or the end of that name where only one module
            has it: ``"layer4"`` finds ``model.net.layer4``.

    Returns:
        Name and module.

    Raises:
        ArgumentError: If no module, or more than one, is meant.

    Example:
        >>> find_layer(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "1")
        ('1', ReLU())
    """
    named = dict(unwrapped(model).named_modules())
    if isinstance(layer, nn.Module):
        inner = unwrapped(layer)
        found = [name for name, module in named.items() if module is inner]
    elif isinstance(layer, str) and layer in named:
        found = [layer]
    else:
        found = [name for name in named if isinstance(layer, str) and name.endswith(f".{layer}")]
    if len(found) == 1:
        return found[0], named[found[0]]
    if found:
        raise _unclear(layer, found)
    shown = layer if isinstance(layer, str) else f"a {type(layer).__name__}"
    likely = difflib.get_close_matches(str(layer), named, n=3, cutoff=0.4)
    raise ArgumentError.of(
        "layer",
        expected="a module of the model, or its name",
        got=repr(shown),
        do=f"Choose for example {likely or [n for n in named if n][:3]}; "
        "model.named_modules() lists all.",
    )


@contextmanager
def observed(layer: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collect what a layer puts out, as part of the model's own graph.

    What the layer hands on is a copy, so that a later change in place leaves it as it was.

    Args:
        layer: The layer.
        name: Its name, for messages.

    Yields:
        One tensor for each call of the layer.

    Raises:
        ModelError: If the layer puts out no tensor.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise ModelError(
                f"layer: expected {name!r} to put out a tensor (alone or first in a tuple), got a "
                f"{type(output).__name__}. Choose a layer inside or after it."
            )
        seen.append(first)
        copy = first.clone()
        if isinstance(output, Tensor):
            return copy
        return [copy, *output[1:]] if isinstance(output, list) else (copy, *output[1:])

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _unclear(layer: Layer, found: list[str]) -> ArgumentError:
    return ArgumentError.of(
        "layer",
        expected="the name of one module",
        got=f"{layer!r}, which is {len(found)} of them",
        do=f"Write one in full: {found[:4]}.",
    )
