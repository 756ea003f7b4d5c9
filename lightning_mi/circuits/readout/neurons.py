"""The last map of an MLP, whose inputs are its neurons: found by what it returns."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.tape import is_equal, named, tensors
from ...errors import ArgumentError, ModelError
from ...task import Task

__all__ = ["neurons_of"]


def neurons_of(
    model: nn.Module, anatomy: Anatomy, task: Task, batch: Any, layer: int
) -> tuple[int, Tensor, Tensor]:
    """Return the activations of an MLP's neurons, and what each of them writes.

    The last map is the module inside the MLP that returns what the MLP returns and whose weight
    reproduces it from its input; that input are the neurons.

    Args:
        model: The user's model, in evaluation mode.
        anatomy: Its anatomy.
        task: How it is called.
        batch: What it is run on.
        layer: Whose MLP.

    Returns:
        The layer, activations ``[example, position, neuron]`` and weights ``[neuron, d_model]``.

    Raises:
        ArgumentError: If the layer has no MLP.
        ModelError: If no such map is found (a mixture of experts has several).
    """
    names = {w.layer: w.module for w in anatomy.writers if w.kind == "mlp" and w.module}
    if layer not in names:
        raise ArgumentError.of(
            "neurons",
            expected=f"a layer with an MLP, out of {sorted(names)}",
            got=layer,
            do="Choose.",
        )
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    returned: list[Tensor] = []

    def inner(module: nn.Module, args: Any, output: Any) -> None:
        given = next((t for t in tensors(args) if t.is_floating_point()), None)
        if given is not None and isinstance(output, Tensor):
            calls.append((module, given, output))

    def outer(module: nn.Module, args: Any, output: Any) -> None:
        returned.extend(list(tensors(output))[:1])

    modules = named(model)
    with ExitStack() as stack:
        for part in modules[names[layer]].modules():
            if next(part.children(), None) is None:
                stack.callback(part.register_forward_hook(inner).remove)
        stack.callback(modules[names[layer]].register_forward_hook(outer).remove)
        task.outputs(model, batch)
    for module, given, output in reversed(calls):
        if returned and is_equal(output.detach(), returned[0].detach(), 1e-6):
            weight = _weight(module, given, output)
            if weight is not None:
                return layer, given, weight
    raise ModelError(
        f"neurons: expected the MLP {names[layer]!r} to end in one linear map, got none that "
        "returns what it returns. A mixture of experts, or a map written by hand, cannot be split."
    )


def _weight(module: nn.Module, given: Tensor, output: Tensor) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    bias = getattr(module, "bias", None)
    with torch.no_grad():
        for rows in (weight.mT, weight):  # nn.Linear keeps [out, in], Conv1D [in, out]
            if rows.shape != (given.shape[-1], output.shape[-1]):
                continue
            made = given @ rows if bias is None else given @ rows + bias
            if is_equal(made, output, 1e-4 if output.element_size() > 2 else 3e-2):
                return rows.detach()
    return None
