"""Integrated gradients of what a layer puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Baseline, Keep, baseline_point
from .entry import Entry
from .inner import inside
from .joint import Joint
from .layers import Layer, find_layer
from .line import Line
from .measured import Attributed
from .paths import check_path, integrated, path_attribution
from .result import Attribution
from .rules import Rule

__all__ = ["Channels", "LayerIntegratedGradients", "layer_integrated_gradients"]

Channels: TypeAlias = Literal["each", "sum"]
"""Whether each channel of a layer keeps a score of its own."""


def layer_integrated_gradients(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    layer: Layer,
    channels: Channels = "each",
    baseline: Baseline = None,
    rule: Rule = "gauss-legendre",
    steps: int | None = None,
    tolerance: float = 0.01,
    max_steps: int = 256,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return (h − h′) · ∫₀¹ ∂F/∂h(h′ + α(h − h′)) dα of a layer's output h.

    h and h′ are what the layer puts out at the inputs and at the baseline. Everything that does not
    pass the layer keeps its value at the inputs, so the scores add up to F(h) − F(h′), which is
    F(x) − F(x′) where all of the inputs' effect passes the layer. Of a layer that puts out a tuple
    the first tensor is meant. What lies below the layer is computed once, not at every node.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `integrated_gradients`.
        target: As in `integrated_gradients`.
        layer: A module that is called once, or its name.
        channels: ``"each"`` keeps the layer's shape; ``"sum"`` adds the channels of a position or
            pixel up.
        baseline: x′, in the place of the inputs, as in `integrated_gradients`.
        rule: Quadrature rule.
        steps: Number of nodes; None adapts it.
        tolerance: Largest |gap| that counts as converged.
        max_steps: Most nodes of the adaptive form.
        keep: Tokens that keep their own embedding in x′.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores ``[example, …]`` of the layer's shape, and the same facts as from
        `integrated_gradients`.

    Raises:
        ArgumentError: If an argument cannot be used, or there is no such layer.
        ModelError: If the layer is not called once, or puts out no floats with examples first.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = layer_integrated_gradients(model, torch.ones(5, 2), 0, layer="1")
        >>> found.values.shape, found.axes
        (torch.Size([5, 4]), ('example', 'neuron'))
    """
    check_path(rule, steps, tolerance, max_steps)
    _check(channels)
    name, module = find_layer(model, layer)
    with asking(model, inputs, target, task, graph=False, joint=True) as (entry, question):
        _check_table(entry, module, name)
        start = baseline_point(entry, baseline, keep)
        inner, begin = inside(entry, question, module, name, start)
        line = Line(inner, question, begin.float() if begin.element_size() < 4 else begin)
        found = integrated(line, rule, steps, tolerance, max_steps)
        axes, channel = _axes(line.start, module)
        summed = channels == "sum" and channel is not None
        values = found[0].sum(channel) if summed else found[0]
        axes = tuple(a for a in axes if not (summed and a == "channel"))
        tokens = entry.is_tokens and values.shape == entry.inputs.shape
        convention = {
            "layer": name,
            "rule": rule,
            "tolerance": tolerance,
            "most_steps": max_steps if steps is None else steps,
            "baseline": "zero" if baseline is None else describe(baseline),
            "sign": "positive raises the target",
            "of": f"output of {name}",
            **recipe(target, question),
        }
        return path_attribution(
            "layer_integrated_gradients",
            line,
            (values, *found),
            tolerance,
            axes=axes,
            ids=entry.inputs if tokens else None,
            convention=convention,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerIntegratedGradients(Attributed):
    """`layer_integrated_gradients` of the first examples of the measured batch.

    Records ``layer_integrated_gradients/values`` (axes of the layer) and for each example ``gap``,
    ``delta``, ``output_change``, ``steps``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `layer_integrated_gradients`, as are all below but the last two.
        layer: Name of the layer.
        channels: Whether each channel keeps a score of its own.
        baseline: x′.
        rule: Quadrature rule.
        steps: Number of nodes; None adapts it.
        tolerance: Largest |gap| that counts as converged.
        max_steps: Most nodes of the adaptive form; fewer than in the function, as it runs often.
        keep: Ids of tokens that keep their own embedding in x′, such as special ones.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "layer_integrated_gradients"
    layer: str
    channels: Channels = "sum"
    baseline: Baseline = None
    rule: Rule = "gauss-legendre"
    steps: int | None = None
    tolerance: float = 0.01
    max_steps: int = 12
    keep: Keep = None
    examples: int | None = 2
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_path(self.rule, self.steps, self.tolerance, self.max_steps)
        _check(self.channels)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `layer_integrated_gradients`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return layer_integrated_gradients(
            model,
            batch,
            self.target,
            layer=self.layer,
            channels=self.channels,
            baseline=self.baseline,
            rule=self.rule,
            steps=self.steps,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            keep=self.keep,
            task=task,
        )


def _axes(output: Tensor, module: nn.Module) -> tuple[tuple[str, ...], int | None]:
    """Name the axes of what a layer puts out, and say which one holds channels."""
    if output.ndim == 3 and isinstance(module, nn.Conv1d):
        return ("example", "channel", "position"), 1
    named: dict[int, tuple[str, ...]] = {
        1: ("example",),
        2: ("example", "neuron"),
        3: ("example", "position", "channel"),
        4: ("example", "channel", "y", "x"),
    }
    axes = named.get(output.ndim, ("example", "neuron"))
    return axes, axes.index("channel") if "channel" in axes else None


def _check_table(entry: Entry, module: nn.Module, name: str) -> None:
    """Refuse a table of several inputs: other inputs move too, but not through it."""
    if isinstance(entry, Joint) and any(table is module for table in entry.tables):
        raise ArgumentError.of(
            "layer",
            expected="a layer behind the word embeddings",
            got=repr(name),
            do="Use together(integrated_gradients, …), which gives scores of the tokens.",
        )


def _check(channels: str) -> None:
    if channels not in get_args(Channels):
        raise ArgumentError.of(
            "channels",
            expected=f"one of {list(get_args(Channels))}",
            got=repr(channels),
            do="'sum' adds the channels of a position or pixel up.",
        )
