"""Attention rollout: who looked at whom, multiplied through the layers (Abnar & Zuidema 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..attention import Site, tap
from ..errors import ArgumentError
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe
from .measured import Attributed
from .over_tokens import Query, check_query, follow, place, reader, self_attention
from .result import Attribution

__all__ = ["AttentionRollout", "Fusion", "attention_rollout"]

Fusion: TypeAlias = Literal["mean", "max", "min"]
"""What is taken over heads."""


def attention_rollout(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    fusion: Fusion = "mean",
    query: Query = None,
    task: Task | None = None,
) -> Attribution:
    """Return the row of Ã = A′_L · … · A′_1 that belongs to the position the target reads.

    A′_l is ½(A_l + I) with its rows normalised to 1: A_l is the attention pattern of layer l, fused
    over heads, I stands for the residual stream. Scores are not negative and add up to 1 for each
    example. They say where attention leads, not what it carries: values, MLPs and the target
    itself play no part, only the position that the target reads.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        target: As in `saliency`; settles the position.
        fusion: What is taken over heads: ``"mean"``, ``"max"`` or ``"min"``.
        query: The position whose row is returned (negative: counted from the last that is not
            padding), or ``"mean"`` over all rows. None takes the position whose logits the target
            reads; for models with one output for a whole sequence the first that is not padding
            (CLS), or the last where attention is causal; for images without CLS the mean.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One score for each token; for images one for each pixel, that of its patch.

    Raises:
        ArgumentError: If an argument cannot be used.
        NoAttentionError: If the model has no attention.
        ModelError: If attention runs over more than one sequence, as in encoder–decoders.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
        >>> scores = attention_rollout(model, torch.ones(1, 5, 8), target=0).values
        >>> [round(score, 2) for score in scores[0].tolist()]
        [0.6, 0.1, 0.1, 0.1, 0.1]
    """
    _check(fusion, query)
    with tap(model) as seen, asking(model, inputs, target, task, graph=False) as (entry, question):
        sites = self_attention(seen.sites, model, len(entry.inputs))
        start = reader(entry, question, query, sites)
        with torch.no_grad():
            row = follow(start, sites, lambda i, row: _step(sites[i], fusion, row))
            placed = place(entry, row)
            value = question(entry.outputs, everything(entry))
        return Attribution(
            values=placed.values,
            method="attention_rollout",
            axes=placed.axes,
            target=value.detach(),
            ids=entry.inputs if entry.is_tokens else None,
            position=question.position,
            token=question.token,
            convention={
                "fusion": fusion,
                "query": query,
                "residual": 0.5,
                "sign": "none: shares of attention, which add up to 1 over positions",
                "null": 1.0 / row.shape[1],
                "of": "positions",
                **placed.convention,
                **recipe(target, question),
            },
        )


@dataclass(frozen=True, eq=False)
class AttentionRollout(Attributed):
    """`attention_rollout` of the first examples of the measured batch.

    Records ``attention_rollout/values`` (axes example, position; for images example, y, x), shares
    that add up to 1 over positions, and ``attention_rollout/target`` (the target's value).

    Args:
        name: First part of the records' names.
        target: As in `attention_rollout`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        fusion: What is taken over heads.
        query: Whose row is returned.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "attention_rollout"
    fusion: Fusion = "mean"
    query: Query = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check(self.fusion, self.query)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Return the scores.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return attention_rollout(
            model, batch, self.target, fusion=self.fusion, query=self.query, task=task
        )


def _step(site: Site, fusion: Fusion, row: Tensor) -> Tensor:
    pattern = site.pattern()
    fused = pattern.mean(1) if fusion == "mean" else getattr(pattern, f"a{fusion}")(1)
    # Row t of ½(A + I), normalised: what looks nowhere keeps to itself.
    row = row.to(fused) / (fused.sum(-1) + 1.0)
    return row + (row[:, None] @ fused)[:, 0]


def _check(fusion: str, query: Query) -> None:
    check_query(query)
    if fusion not in get_args(Fusion):
        raise ArgumentError.of(
            "fusion", expected=f"one of {list(get_args(Fusion))}", got=repr(fusion), do="Choose."
        )
