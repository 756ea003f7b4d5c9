"""A model as a function of what one of its layers puts out; what lies below runs only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .asking import everything
from .entry import Entry
from .layers import observed
from .question import Question

__all__ = ["Inner", "inside"]


@dataclass(eq=False, kw_only=True)
class Inner(Entry):
    """A model as a differentiable function of the output of a layer, everything else as it was.

    Where the layer puts out a tuple, its first tensor is meant.

    Args:
        layer: The layer, which is called once in a forward pass.
        below: Outputs of modules that are done before the layer begins, ``[example, …]``: they are
            handed out again instead of being computed at every pass.
    """

    layer: nn.Module
    below: dict[nn.Module, Tensor] = field(default_factory=dict)

    def run(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the model's outputs where the layer puts out other points.

        Args:
            points: Any number of stacked copies of the chosen examples, in any precision.
            rows: Which examples of the batch these are, ``[row]``.

        Returns:
            Outputs, as many as points.
        """
        chosen = rows.repeat(len(points) // len(rows))

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            # A copy, as the model may go on in place.
            moved = points.to(self.leaves[0].dtype).clone()
            if isinstance(output, Tensor):
                return moved
            return [moved, *output[1:]] if isinstance(output, list) else (moved, *output[1:])

        handle = self.layer.register_forward_hook(hook)
        try:
            with _handed_out(self.below, chosen), self.narrowed(chosen):
                return self.task.outputs(self.model, self._batch(chosen))
        finally:
            handle.remove()


def inside(
    entry: Entry, question: Question, layer: nn.Module, name: str, start: Tensor
) -> tuple[Inner, Tensor]:
    """Move from the inputs to the output of a layer.

    Args:
        entry: The model and its inputs x.
        question: The target.
        layer: The layer.
        name: Its name, for messages.
        start: The baseline x′, as a point of the entry.

    Returns:
        The model as a function of the layer's output, and what the layer puts out at x′.

    Raises:
        ModelError: If the layer is not called once, or does not keep examples on axis 0.
    """
    with torch.no_grad():
        with _noted(entry.model, layer) as below:
            here = _output(entry, layer, name, entry.point)
        there = _output(entry, layer, name, start).to(here)
        inner = Inner(
            *(entry.model, entry.task, entry.batch, entry.inputs, (here,), entry.outputs),
            head=None if entry.head is layer else entry.head,
            layer=layer,
        )
        inner.below = dict(below)
        if not _agrees(inner, question, here, there):
            inner.below = {}
    return inner, there


def _output(entry: Entry, layer: nn.Module, name: str, point: Tensor) -> Tensor:
    with observed(layer, name) as seen:
        entry.run(point, everything(entry))
    if len(seen) != 1:
        raise ModelError(
            f"layer: expected {name!r} to be called once on the way from the inputs to the "
            f"outputs, got {len(seen)} calls. Choose a layer that the inputs pass once."
        )
    if seen[0].ndim == 0 or len(seen[0]) != len(entry.inputs):
        raise ModelError(
            f"layer: expected {name!r} to put out examples first, {len(entry.inputs)} of them, got "
            f"shape {tuple(seen[0].shape)}. Choose a layer that keeps examples on axis 0."
        )
    looked_up = _looked_up(entry, layer, point)
    return seen[0].detach().clone() if looked_up is None else looked_up.to(seen[0])


def _looked_up(entry: Entry, layer: nn.Module, point: Tensor) -> Tensor | None:
    """Return the part of a point that a table puts out: exchanged vectors pass no other hook."""
    parts = torch.split(point, [k.width for k in entry.lookups], -1) if entry.is_tokens else ()
    for lookup, part in zip(entry.lookups, parts, strict=True):
        if lookup.table is layer:
            turned = next(iter(lookup.calls.values()))
            return part.detach().transpose(0, 1) if turned else part.detach().clone()
    return None


def _agrees(inner: Inner, question: Question, here: Tensor, there: Tensor) -> bool:
    """Whether what was kept may be handed out: in another order and twice it gives the same."""
    if not inner.below:
        return True
    rows = everything(inner).flip(0)
    points = torch.cat([here, there]).flip(0)
    kept = inner.below
    try:
        quick = question(inner.run(points, rows), rows)
        inner.below = {}
        slow = question(inner.run(points, rows), rows)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return False  # Stacked examples are not for this model, or it wants more than a tensor.
    finally:
        inner.below = kept
    slack = 1e-2 if here.element_size() < 4 else 1e-5
    return bool((quick - slow).abs().max() <= slack * slow.abs().max())


@contextmanager
def _noted(model: nn.Module, layer: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Note what the outermost modules put out that are called once and done before the layer."""
    below: dict[nn.Module, Tensor] = {}
    calls: Counter[nn.Module] = Counter()
    begun: list[bool] = []

    def begin(module: nn.Module, args: Any) -> None:
        begun.append(True)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] += 1
        if not begun and isinstance(output, Tensor) and output.ndim:
            below[module] = output.detach().clone()
            for within in module.modules():
                if within is not module:
                    below.pop(within, None)

    handles = [m.register_forward_hook(note) for m in model.modules() if m is not layer]
    handles.append(layer.register_forward_pre_hook(begin))
    try:
        yield below
    finally:
        for handle in handles:
            handle.remove()
        for module in [m for m in below if calls[m] > 1]:
            del below[module]


@contextmanager
def _handed_out(below: dict[nn.Module, Tensor], rows: Tensor) -> Iterator[None]:
    own = {module: vars(module).get("forward") for module in below}
    try:
        for module, output in below.items():
            module.forward = _giving(output, rows)
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _giving(output: Tensor, rows: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: output[rows.to(output.device)]
