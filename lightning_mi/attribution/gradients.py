"""Gradients at the inputs: saliency (Simonyan et al. 2013) and input × gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe, slope
from .entry import Entry
from .joint import parted, units
from .measured import Attributed, check_examples, shareable, shortened
from .question import Question, widened
from .result import Attribution, axes_of, channel_axis

__all__ = [
    "InputXGradient",
    "Kind",
    "Saliency",
    "attributed",
    "check_examples",
    "check_kind",
    "input_x_gradient",
    "kept",
    "saliency",
    "shareable",
    "shortened",
]

Kind: TypeAlias = Literal["absolute", "signed", "l2", "max"]
"""What is kept of a gradient."""


def saliency(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    kind: Kind = "absolute",
    task: Task | None = None,
) -> Attribution:
    """Return the gradient g = ∂F/∂x of a target F with respect to the inputs.

    Token ids are differentiated through the word embedding alone; position embeddings keep their
    value. One score comes out for each token.

    ============  ======================================  ===============================
    kind          float inputs: shaped like the inputs    ids: one score for each token
    ============  ======================================  ===============================
    ``absolute``  |g|                                     ‖g_t‖₂, as for ``l2``
    ``signed``    g                                       Σ_d g_td
    ``l2``        ‖g‖₂ over channels, without that axis   ‖g_t‖₂
    ``max``       max over channels of |g|                max_d |g_td|
    ============  ======================================  ===============================

    Channels are axis 1 of images and the last axis of ``[example, position, channel]``; inputs
    without channels keep |g|.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        target: An int or a tensor of ints (the logit of that class or token, for language models
            at the last position that is not padding), a function ``(outputs, batch) -> [example]``
            or a `Target`. None: the true next token, the label, or the model's own answer.
        kind: What is kept of the gradient.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        The scores: change of the target for a unit change of an input, to first order.

    Raises:
        ArgumentError: If an argument cannot be used: ids that no embedding looks up, a target out
            of range, an unknown kind.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = saliency(model, torch.ones(1, 2), target=1, kind="signed")
        >>> torch.equal(scores.values[0], model.weight[1].detach())
        True
    """
    check_kind(kind)
    with asking(model, inputs, target, task, graph=True) as (entry, question):
        value = question(entry.outputs, everything(entry))
        gradient = entry.joined(slope(entry, question, value, entry.leaves))
        return attributed(
            entry,
            question,
            kept(gradient, kind, tokens=entry.is_tokens),
            "saliency",
            reduced=kind in ("l2", "max"),
            value=value,
            unit=f"{question.unit} per unit",
            convention=said(entry, kind) | recipe(target, question),
        )


def input_x_gradient(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    kind: Literal["signed", "absolute"] = "signed",
    task: Task | None = None,
) -> Attribution:
    """Return x · ∂F/∂x: what each input adds to a target F, were F linear (Shrikumar et al. 2016).

    For token ids Σ_d e_td · g_td, with e the word embedding and g the gradient with respect to it.
    Of a linear model without bias the scores add up to F; of a ReLU network without biases too.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        kind: ``"signed"``, or ``"absolute"``: the size of each score.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores in units of the target, shaped like the inputs; one for each token.

    Raises:
        ArgumentError: If an argument cannot be used, as in `saliency`.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)
        >>> scores = input_x_gradient(model, torch.tensor([[1.0, -2.0]]), target=1)
        >>> torch.allclose(scores.values.sum(1), scores.target)
        True
    """
    check_kind(kind, ("signed", "absolute"))
    with asking(model, inputs, target, task, graph=True, joint=True) as (entry, question):
        value = question(entry.outputs, everything(entry))
        gradient = entry.joined(slope(entry, question, value, entry.leaves))
        scores = widened(gradient) * widened(entry.point)
        scores = units(entry, scores)
        scores = scores.abs() if kind == "absolute" else scores
        return attributed(
            entry,
            question,
            scores.to(gradient.dtype),
            "input_x_gradient",
            value=value,
            unit=question.unit,
            convention={**said(entry, kind), "kind": kind, **recipe(target, question)},
        )


@dataclass(frozen=True, eq=False)
class Saliency(Attributed):
    """`saliency` of the measured batch.

    Records ``saliency/values`` (axes example, position for tokens; example, channel, y, x for
    images; example, feature for tables) and ``saliency/target`` (the target's value).

    Args:
        name: First part of the records' names.
        target: As in `saliency`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        kind: As in `saliency`.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "saliency"
    kind: Kind = "absolute"

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_kind(self.kind)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `saliency`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return saliency(model, batch, self.target, kind=self.kind, task=task)


@dataclass(frozen=True, eq=False)
class InputXGradient(Attributed):
    """`input_x_gradient` of the measured batch.

    Records ``input_x_gradient/values`` (axes as for `Saliency`) and ``input_x_gradient/target``.

    Args:
        name: First part of the records' names.
        target: As in `saliency`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        kind: As in `input_x_gradient`.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "input_x_gradient"
    kind: Literal["signed", "absolute"] = "signed"
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_kind(self.kind, ("signed", "absolute"))

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `input_x_gradient`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return input_x_gradient(model, batch, self.target, kind=self.kind, task=task)


def attributed(
    entry: Entry,
    question: Question,
    scores: Tensor,
    method: str,
    *,
    unit: str,
    convention: Mapping[str, Any],
    reduced: bool = False,
    value: Tensor | None = None,
    axes: tuple[str, ...] | None = None,
) -> Attribution:
    """Return scores together with what was asked.

    Args:
        entry: Where the model was run.
        question: What was asked.
        scores: The scores.
        method: Name of the method.
        unit: Unit of the scores.
        convention: What is needed to read them.
        reduced: Whether the channel axis of float inputs is gone.
        value: The target's value at the inputs; None computes it.
        axes: Names of the axes; None takes those of the inputs.

    Returns:
        The attribution.
    """
    tokens = entry.is_tokens
    if value is None:
        value = question(entry.outputs, everything(entry))
    shape = entry.inputs.shape
    whole = Attribution(
        values=scores.detach(),
        method=method,
        axes=axes or axes_of(shape, tokens=tokens, reduced=reduced and not tokens),
        target=value.detach(),
        unit=unit,
        ids=entry.inputs if tokens else None,
        position=question.position,
        token=question.token,
        convention=convention,
    )
    return parted(whole, entry)


def said(entry: Entry, kind: Kind) -> dict[str, Any]:
    """Return what a reader needs to know of a kind.

    Args:
        entry: Where the model was run.
        kind: What was kept of a gradient.

    Returns:
        Plain JSON.
    """
    return {
        "kind": "l2" if kind == "absolute" and entry.is_tokens else kind,
        "sign": "positive raises the target" if kind == "signed" else "none",
        "of": "word embedding" if entry.is_tokens else "inputs",
    }


def kept(gradient: Tensor, kind: Kind, *, tokens: bool) -> Tensor:
    """Return what a kind keeps of a gradient, in its precision.

    Args:
        gradient: Shaped like the inputs; for ids one vector for each.
        kind: What is kept.
        tokens: Whether the inputs are ids.

    Returns:
        The scores.
    """
    wide = widened(gradient.detach())
    axis = gradient.ndim - 1 if tokens else channel_axis(gradient.ndim)
    if kind == "signed":
        found = wide.sum(-1) if tokens else wide
    elif axis is None or (kind == "absolute" and not tokens):
        found = wide.abs()
    elif kind == "max":
        found = wide.abs().amax(axis)
    else:
        found = torch.linalg.vector_norm(wide, dim=axis)
    return found.to(gradient.dtype)


def check_kind(kind: str, known: tuple[str, ...] = get_args(Kind)) -> None:
    """Refuse an unknown kind.

    Args:
        kind: What the user gave.
        known: What there is.

    Raises:
        ArgumentError: If it is unknown.
    """
    if kind not in known:
        raise ArgumentError.of(
            "kind", expected=f"one of {list(known)}", got=repr(kind), do="Choose a kind."
        )
