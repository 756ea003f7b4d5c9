"""Grad-CAM: where a layer's channels speak for a target (Selvaraju et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import attention_mask_of
from ..errors import ArgumentError, ModelError
from ..isolation import unwrapped
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe, slope
from .entry import Entry
from .gradients import attributed
from .layers import Layer, find_layer, observed
from .measured import Attributed
from .question import Question, widened
from .result import Attribution

__all__ = ["GradCam", "LayerGradCam", "grad_cam", "layer_grad_cam"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AXES = {1: ("position",), 2: ("y", "x"), 3: ("position", "y", "x")}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def grad_cam(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    layer: Layer | None = None,
    relu: bool = True,
    task: Task | None = None,
) -> Attribution:
    """Return Grad-CAM at the resolution of the inputs: relu(Σ_c w_c A_c), interpolated linearly.

    A_c is channel c of what a layer puts out and w_c the mean of ∂F/∂A_c over its pixels or
    positions, so a score is what the channels add to the target there, to first order, up to the
    number of pixels. Convolutions have channels on axis 1; transformers ``[example, position,
    channel]``, of which a vision transformer's positions are laid out as the grid of its patches,
    without what stands before them (a class token). Padding is left out.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        layer: A module or its name; None takes the last convolution.
        relu: Keep only what speaks for the target, as in the paper.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores ``[example, y, x]`` for images, ``[example, position]`` for sequences.

    Raises:
        ArgumentError: If there is no such layer, or it puts out nothing that lies on a grid.
        ModelError: If the layer is not called exactly once, or the target does not depend on it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> grad_cam(model, torch.rand(5, 1, 4, 4), target=0).values.shape
        torch.Size([5, 4, 4])
    """
    return _grad_cam("grad_cam", (model, inputs, target, task), layer, relu)


def layer_grad_cam(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    layer: Layer | None = None,
    relu: bool = True,
    task: Task | None = None,
) -> Attribution:
    """Return Grad-CAM at the layer's own resolution; all else as in `grad_cam`.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        layer: A module or its name; None takes the last convolution.
        relu: Keep only what speaks for the target.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores ``[example, y, x]`` or ``[example, position]``, of the layer.

    Raises:
        ArgumentError: If there is no such layer, or it puts out nothing that lies on a grid.
        ModelError: If the layer is not called exactly once, or the target does not depend on it.
    """
    return _grad_cam("layer_grad_cam", (model, inputs, target, task), layer, relu)


@dataclass(frozen=True, eq=False)
class GradCam(Attributed):
    """`grad_cam` of the measured batch.

    Records ``grad_cam/values`` (axes example, y, x for images; example, position for sequences)
    and ``grad_cam/target``.

    Args:
        name: First part of the records' names.
        target: As in `grad_cam`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        layer: Name of the layer; None takes the last convolution.
        relu: As in `grad_cam`.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "grad_cam"
    layer: str | None = None
    relu: bool = True

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `grad_cam`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return grad_cam(model, batch, self.target, layer=self.layer, relu=self.relu, task=task)


@dataclass(frozen=True, eq=False)
class LayerGradCam(GradCam):
    """`layer_grad_cam` of the measured batch.

    Records ``layer_grad_cam/values`` (axes as for `GradCam`) and ``layer_grad_cam/target``.

    Args:
        name: First part of the records' names.
        target: As in `grad_cam`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        layer: Name of the layer; None takes the last convolution.
        relu: As in `grad_cam`.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "layer_grad_cam"

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `layer_grad_cam`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        found = self.layer
        return layer_grad_cam(model, batch, self.target, layer=found, relu=self.relu, task=task)


Asked = tuple[nn.Module, Any, TargetLike, Task | None]


def _grad_cam(method: str, asked: Asked, layer: Layer | None, relu: bool) -> Attribution:
    model, inputs, target, task = asked
    name, module = _last_convolution(model) if layer is None else find_layer(model, layer)
    with (
        observed(module, name) as seen,
        asking(model, inputs, target, task, graph=True) as (entry, question),
    ):
        activation = _one_call(seen, name, entry)
        value = question(entry.outputs, everything(entry))
        layout = _layout(activation, module, name, entry)
        gradient = _slope(entry, question, value, activation, name)
        scores = _weighted(layout(activation.detach()), layout(gradient), _mask(layout, entry))
        scores = scores.relu() if relu else scores
        if method == "grad_cam":
            scores = _resized(scores, entry, name)
        return attributed(
            entry,
            question,
            scores.to(activation.dtype),
            method,
            unit=question.unit,
            value=value,
            axes=("example", *AXES[scores.ndim - 1]),
            convention={
                "layer": name,
                "relu": relu,
                "sign": "positive raises the target",
                **recipe(target, question),
            },
        )


def _last_convolution(model: nn.Module) -> tuple[str, nn.Module]:
    named = list(unwrapped(model).named_modules())
    found = [(name, module) for name, module in named if isinstance(module, CONVOLUTIONS)]
    # One that only cuts an image into patches sees no more than its patch.
    if not found or (len(found) == 1 and _cuts_patches(found[0][1])):
        raise ArgumentError.of(
            "layer",
            expected="the name of a layer, as the model has no convolution to take by default",
            got="None",
            do=f"Choose out of {[n for n, m in named if n and '.' not in n][:6]} or within.",
        )
    return found[-1]


def _cuts_patches(module: nn.Module) -> bool:
    if not isinstance(module, CONVOLUTIONS):
        return False
    return module.kernel_size == module.stride and set(module.kernel_size) != {1}


def _one_call(seen: list[Tensor], name: str, entry: Entry) -> Tensor:
    # Finding the task and the lookups of ids takes passes of their own, without a graph.
    calls = [tensor for tensor in seen if tensor.requires_grad]
    if len(calls) != 1:
        raise ModelError(
            f"layer: expected {name!r} to be called once on the way from the inputs to the "
            f"outputs, got {len(calls)} calls. Choose a layer that the inputs pass once."
        )
    if len(calls[0]) != len(entry.inputs):
        raise ModelError(
            f"layer: expected {name!r} to put out examples first, {len(entry.inputs)} of them, got "
            f"shape {tuple(calls[0].shape)}. Choose a layer that keeps examples on axis 0."
        )
    return calls[0]


def _slope(
    entry: Entry, question: Question, value: Tensor, activation: Tensor, name: str
) -> Tensor:
    if value.requires_grad:
        (found,) = torch.autograd.grad(value.sum(), activation, allow_unused=True)
        if found is not None:
            return found
    slope(entry, question, value, ())  # Says so where the model cuts its gradient.
    raise ModelError(
        f"layer: expected the target to depend on {name!r}, got no gradient from one to the other. "
        "Choose a layer that the answer passes."
    )


@dataclass(frozen=True)
class Layout:
    """How what a layer puts out lies on a grid.

    Args:
        sizes: Of the grid.
        channels_last: Whether positions are axis 1 and channels axis 2.
        before: Positions before the grid, such as a class token.
    """

    sizes: tuple[int, ...]
    channels_last: bool = False
    before: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return ``[example, channel, …]``, in float32 at least."""
        wide = widened(tensor)
        if not self.channels_last:
            return wide
        grid = wide[:, self.before :].transpose(1, 2)
        return grid.reshape(*grid.shape[:2], *self.sizes)


def _layout(activation: Tensor, module: nn.Module, name: str, entry: Entry) -> Layout:
    shape, inputs = activation.shape, entry.inputs.shape
    if activation.ndim in (4, 5) or (activation.ndim == 3 and isinstance(module, nn.Conv1d)):
        return Layout(tuple(shape[2:]))
    if activation.ndim == 3 and len(inputs) == 4 and not entry.is_tokens:
        grid = _patches(inputs, shape[1], entry.model)
        if grid is not None:
            return Layout(grid, channels_last=True, before=shape[1] - grid[0] * grid[1])
    elif activation.ndim == 3 and len(inputs) in (2, 3):
        if shape[1] == inputs[1]:
            return Layout((shape[1],), channels_last=True)
        if shape[2] == inputs[1]:
            return Layout((shape[2],))
    raise ArgumentError.of(
        "layer",
        expected="a layer that puts out [example, channel, …] or [example, position, channel] on a "
        "grid that can be told from the inputs",
        got=f"{name!r} with {tuple(shape)} for inputs of shape {tuple(inputs)}",
        do="Choose a convolution, or a layer before positions are pooled or merged.",
    )


def _patches(inputs: torch.Size, positions: int, model: nn.Module) -> tuple[int, int] | None:
    """Return the grid of patches of an image that these positions can be, or None."""
    height, width = inputs[2:]
    cutters = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _cuts_patches(m)]
    for cutter in cutters:
        high, wide = height // cutter.kernel_size[0], width // cutter.kernel_size[1]
        if 0 < high * wide <= positions:
            return high, wide
    for before in () if cutters else (0, 1):  # Patches of another kind: of the image's own form.
        high = round(((positions - before) * height / width) ** 0.5)
        wide = (positions - before) // max(high, 1)
        if high * wide == positions - before > 0 and high * width == wide * height:
            return high, wide
    return None


def _mask(layout: Layout, entry: Entry) -> Tensor | None:
    """Return which positions are real, ``[example, 1, position]``, or None: all."""
    mask = attention_mask_of(entry.batch)
    length = layout.sizes[0]
    if mask is None or len(layout.sizes) != 1 or mask.shape != (len(entry.inputs), length):
        return None
    return mask[:, None].bool()


def _weighted(activation: Tensor, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """Return Σ_c w_c A_c with w_c the mean of the gradient over the grid."""
    if mask is not None:
        activation, gradient = activation * mask, gradient * mask
    size = activation[0, 0].numel() if mask is None else mask.sum(2).clamp(min=1)
    weights = gradient.flatten(2).sum(2) / size
    return (activation * weights.view(*weights.shape, *[1] * (activation.ndim - 2))).sum(1)


def _resized(scores: Tensor, entry: Entry, name: str) -> Tensor:
    shape = entry.inputs.shape
    sides = tuple(shape[1:2]) if len(shape) < 4 else tuple(shape[2:])
    if len(shape) == 3 and not entry.is_tokens and scores.shape[1] in (shape[1], shape[2]):
        sides = tuple(scores.shape[1:])
    if len(sides) != scores.ndim - 1:
        raise ArgumentError.of(
            "layer",
            expected=f"a grid of {len(sides)} axes, as the inputs {tuple(shape)} have",
            got=f"one of {scores.ndim - 1} axes in {name!r}",
            do="layer_grad_cam returns it as it is.",
        )
    if tuple(scores.shape[1:]) == sides:
        return scores
    mode = MODES[len(sides)]
    return F.interpolate(scores[:, None], size=sides, mode=mode, align_corners=False)[:, 0]
