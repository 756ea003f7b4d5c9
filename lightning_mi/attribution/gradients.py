"""Saliency: the gradient of a target with respect to the inputs (Simonyan et al. 2013)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..batch import cut
from ..errors import ArgumentError
from ..measurement import Context
from ..record import Reading
from ..target import TargetLike, TargetOption
from ..task import Task
from .asking import asking, everything, recipe, slope
from .question import widened
from .result import Attribution, axes_of, channel_axis

__all__ = ["Kind", "Saliency", "saliency"]

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
    _check_kind(kind)
    with asking(model, inputs, target, task, graph=True) as (entry, question):
        value = question(entry.outputs, everything(entry))
        gradient = entry.joined(slope(entry, question, value, entry.leaves))
        reduced = kind in ("l2", "max") and not entry.is_tokens
        return Attribution(
            values=_kept(gradient, kind, tokens=entry.is_tokens),
            method="saliency",
            axes=axes_of(entry.inputs.shape, tokens=entry.is_tokens, reduced=reduced),
            target=value.detach(),
            unit=f"{question.unit} per unit",
            ids=entry.inputs if entry.is_tokens else None,
            position=question.position,
            token=question.token,
            convention={
                "kind": "l2" if kind == "absolute" and entry.is_tokens else kind,
                "sign": "positive raises the target" if kind == "signed" else "none",
                "of": "word embedding" if entry.is_tokens else "inputs",
                **recipe(target, question),
            },
        )


@dataclass(frozen=True, eq=False)
class Saliency:
    """`saliency` of the measured batch.

    Records ``saliency/values`` (axes example, position for tokens; example, channel, y, x for
    images; example, feature for tables) and ``saliency/target`` (the target's value).

    Args:
        name: First part of the records' names.
        target: As in `saliency`.
        kind: As in `saliency`.
        examples: Number of examples, from the first; None takes the whole batch.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "saliency"
    target: TargetOption | TargetLike = None
    kind: Kind = "absolute"
    examples: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        _check_kind(self.kind)
        check_examples(self.examples)

    def attribution(self, model: nn.Module, context: Context) -> Attribution:
        """Return the scores, computed once in a firing.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            The scores.
        """

        def compute() -> Attribution:
            batch = shortened(context.batch, self.examples)
            return saliency(model, batch, self.target, kind=self.kind, task=context.task)

        asked = shareable(self.target)
        return context.shared(("attribution.saliency", asked, self.kind, self.examples), compute)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            ``values`` and ``target``.
        """
        return self.attribution(model, context).reading(context.texts)


def check_examples(examples: int | None) -> None:
    """Refuse impossible numbers of examples.

    Args:
        examples: A number or None.

    Raises:
        ArgumentError: If it is less than 1.
    """
    if examples is not None and (not isinstance(examples, int) or examples < 1):
        raise ArgumentError.of(
            "examples", expected="a positive int or None", got=repr(examples), do="Pass None: all."
        )


def shortened(batch: Any, examples: int | None) -> Any:
    """Return the first examples of a batch.

    Args:
        batch: Any batch.
        examples: How many; None takes all.

    Returns:
        The batch.
    """
    return batch if examples is None else cut(batch, examples)


def shareable(target: Any) -> Any:
    """Return what stands for an argument in the key of a shared result.

    Args:
        target: A target or a baseline.

    Returns:
        The value itself if it is a plain one, else its identity.
    """
    return target if target is None or isinstance(target, int | float) else ("id", id(target))


def _kept(gradient: Tensor, kind: Kind, *, tokens: bool) -> Tensor:
    wide = widened(gradient.detach())
    axis = gradient.ndim - 1 if tokens else channel_axis(gradient.ndim)
    if kind == "signed":
        kept = wide.sum(-1) if tokens else wide
    elif axis is None or (kind == "absolute" and not tokens):
        kept = wide.abs()
    elif kind == "max":
        kept = wide.abs().amax(axis)
    else:
        kept = torch.linalg.vector_norm(wide, dim=axis)
    return kept.to(gradient.dtype)


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ArgumentError.of(
            "kind", expected=f"one of {list(get_args(Kind))}", got=repr(kind), do="Choose a kind."
        )
