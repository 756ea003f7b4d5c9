"""Any attribution method of captum by its name: `CaptumAttribution`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe
from .baselines import Baseline, baseline_point
from .captum_methods import COMPLETE, Chosen, choose
from .captum_run import run
from .entry import Entry
from .gradients import attributed
from .joint import Joint
from .layers import Layer, find_layer
from .measured import Attributed
from .paths import relative_gap
from .question import Question, widened
from .result import Attribution, axes_of

__all__ = ["CaptumAttribution", "captum_attribution"]


def captum_attribution(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    layer: Layer | None = None,
    baseline: Baseline = None,
    seed: int = 0,
    task: Task | None = None,
) -> Attribution:
    """Return what an attribution method of captum says, under the terms of this package.

    captum sees a model whose output is the target's value, one number for each example. Inputs
    of any kind therefore work with every method: token ids enter as word embeddings (a perturbing
    method replaces whole tokens; scores of the embedding's components are added up), outputs may
    be tuples or objects, targets may be functions. Hooks, weights, modes, gradients and random
    generators are put back, also after an error within captum.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        method: Name of the class in ``captum.attr``: ``"DeepLift"``, ``"KernelShap"``, …
        options: Arguments of that class and of its ``attribute`` by name; lists stand for tuples.
            Arguments that this function has itself are not among them.
        noise: Arguments of captum's ``NoiseTunnel`` (``nt_type``, ``nt_samples``, ``stdevs``) to
            put it around the method; captum's ``stdevs`` are absolute.
        layer: A module or its name, for the methods that need one.
        baseline: Baseline or reference, as in `integrated_gradients`, where the method takes one.
        seed: Of python's, numpy's and torch's generators while captum runs.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        captum's scores, shaped like the inputs (one for each token) or like what the layer puts
        out; for DeepLift and IntegratedGradients with ``gap``, ``delta`` and ``output_change``.

    Raises:
        ArgumentError: If there is no such method, an option is unknown or one is missing.
        ModelError: If captum cannot do this with this model; the message says what.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = captum_attribution(model, torch.ones(1, 2), target=1, method="DeepLift")
        >>> torch.allclose(scores.values[0], model.weight[1].detach())
        True
    """
    chosen = choose(method, options or {}, noise)
    with asking(model, inputs, target, task, graph=False, joint=True) as (entry, question):
        _check_several(chosen, entry)
        module = _layer(chosen, entry, layer)
        start = baseline_point(entry, baseline) if chosen.wants_baseline else None
        raw, delta = run(chosen, entry, question, module, start, seed)
        scores = raw if module and not chosen.on_inputs else _of_inputs(chosen, entry, raw)
        several = isinstance(entry, Joint)
        own = several or scores.shape == entry.inputs.shape
        shown = {} if start is None else {"baseline": "zero" if baseline is None else baseline}
        found = attributed(
            entry,
            question,
            scores.to(entry.point.dtype),
            f"captum.{method}",
            unit=_unit(chosen, question.unit),
            axes=None if own else axes_of(scores.shape, tokens=False, reduced=False),
            convention={
                "options": describe(dict(options or {})),
                **({} if noise is None else {"noise": describe(dict(noise))}),
                **({} if module is None else {"layer": module[0]}),
                **describe(shown),
                "seed": seed,
                "sign": "as captum defines it",
                "of": "word embedding" if entry.is_tokens and own else "inputs",
                **recipe(target, question),
            },
        )
        return _added_up(chosen, entry, question, found.stating(delta=delta), raw, start)


@dataclass(frozen=True, eq=False)
class CaptumAttribution(Attributed):
    """`captum_attribution` of the first examples of the measured batch.

    Records ``captum_<method>/values`` (axes as for `Saliency`, or of the layer) and
    ``captum_<method>/target``, of DeepLift and IntegratedGradients also ``gap``, ``delta`` and
    ``output_change``.

    Args:
        method: Name of the class in ``captum.attr``.
        options: Its options by name.
        noise: Options of captum's NoiseTunnel around it.
        layer: Name of the layer, for methods that need one.
        baseline: As in `captum_attribution`.
        seed: Of the random generators while captum runs.
        name: First part of the records' names; empty takes ``captum_`` and the method.
        target: As in `saliency`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> CaptumAttribution("KernelShap", {"n_samples": 50}).name
        'captum_kernel_shap'
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] | None = None
    layer: str | None = None
    baseline: Baseline = None
    seed: int = 0
    name: str = field(default="", kw_only=True)
    examples: int | None = field(default=4, kw_only=True)
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        chosen = choose(self.method, self.options, self.noise)
        _check_layer(chosen, self.layer)
        if not self.name:
            snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.method).lower()
            object.__setattr__(self, "name", f"captum_{snake}")

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `captum_attribution`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return captum_attribution(
            model,
            batch,
            self.target,
            method=self.method,
            options=self.options,
            noise=self.noise,
            layer=self.layer,
            baseline=self.baseline,
            seed=self.seed,
            task=task,
        )


def _layer(chosen: Chosen, entry: Entry, layer: Layer | None) -> tuple[str, nn.Module] | None:
    _check_layer(chosen, layer)
    if layer is None:
        return None
    name, module = find_layer(entry.model, layer)
    if any(table is module for table in entry.tables):
        raise ArgumentError.of(
            "layer",
            expected="a layer behind the word embedding, whose vectors are the inputs here",
            got=repr(name),
            do=f"Pass method={chosen.name.removeprefix('Layer')!r} without a layer.",
        )
    return name, module


def _check_layer(chosen: Chosen, layer: Layer | None) -> None:
    if chosen.needs_layer != (layer is not None):
        raise ArgumentError.of(
            "layer",
            expected="the name of a layer" if chosen.needs_layer else "None",
            got=repr(layer)[:40],
            do=f"captum's {chosen.name} {'needs one' if chosen.needs_layer else 'takes none'}.",
        )


def _check_several(chosen: Chosen, entry: Entry) -> None:
    """Refuse what is not defined for several inputs side by side."""
    if isinstance(entry, Joint) and (not chosen.on_inputs or chosen.name == "Occlusion"):
        raise ArgumentError.of(
            "method",
            expected="a method whose scores are of the inputs, without windows",
            got=chosen.name,
            do="Use each_input; for windows over several inputs FeatureAblation with feature_mask.",
        )


def _of_inputs(chosen: Chosen, entry: Entry, scores: Tensor) -> Tensor:
    """Return one score for each token where the inputs are ids."""
    if isinstance(entry, Joint):
        return entry.units(scores, whole=chosen.perturbs)
    if not entry.is_tokens or scores.shape != entry.point.shape:
        return scores
    # A perturbed token has the score of the whole token in each of its components.
    return scores[..., 0] if chosen.perturbs else scores.sum(-1)


def _added_up(
    chosen: Chosen,
    entry: Entry,
    question: Question,
    found: Attribution,
    scores: Tensor,
    start: Tensor | None,
) -> Attribution:
    """Add how well scores that promise it add up to F(x) − F(x′)."""
    whole = chosen.made_with.get("multiply_by_inputs", True)
    if chosen.name not in COMPLETE or start is None or chosen.noise is not None or not whole:
        return found
    rows = everything(entry)
    with torch.no_grad():
        begin = question(entry.run(start, rows), rows)
    change, total = found.target - begin, widened(scores)
    size = torch.maximum(found.target.abs(), begin.abs())
    return found.stating(
        gap=relative_gap(total, change, size),
        delta=total.flatten(1).sum(1) - change,
        output_change=change,
    )


def _unit(chosen: Chosen, unit: str) -> str:
    if chosen.name == "LayerActivation":
        return "1"
    return f"{unit} per unit" if chosen.per_unit else unit
