"""Attention × gradient: attention that the target would miss (Chefer et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Site, tap
from ..attention.site import grouped_product
from ..errors import ArgumentError
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe, slope
from .measured import Attributed
from .over_tokens import Query, check_query, follow, place, reader, self_attention
from .result import Attribution

__all__ = ["AttentionGradient", "attention_gradient"]


def attention_gradient(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    layer: int | None = None,
    query: Query = None,
    task: Task | None = None,
) -> Attribution:
    """Return attention weighted by the gradient of the target F with respect to it.

    For each layer Ā = mean over heads of (A ⊙ ∂F/∂A)⁺, shape ``[query, key]``. The layers are
    *rolled* as in Chefer et al. (ICCV 2021): R starts as I and becomes R + Ā·R from layer to
    layer; returned is the row R − I of the position that the target reads (the identity, that
    position's own residual stream, is left out). With ``layer`` it is that layer alone: Ā summed
    over its queries.

    ∂F/∂A is ∂F/∂z · vᵀ for the output z = A·v of each head, so a kernel that never writes the
    pattern down serves as well. One forward and one backward pass.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        target: As in `saliency`.
        layer: Number of one attention (negative: from the last); None rolls all of them.
        query: The position whose row is returned, as in `attention_rollout`.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One score for each token, not negative; for images one for each pixel, that of its patch.
        With ``layer`` in units of the target.

    Raises:
        ArgumentError: If an argument cannot be used.
        NoAttentionError: If the model has no attention.
        ModelError: If attention runs over more than one sequence, as in encoder–decoders.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
        >>> scores = attention_gradient(model, torch.randn(1, 5, 8), target=0).values
        >>> scores.shape, bool((scores >= 0).all())
        (torch.Size([1, 5]), True)
    """
    _check(layer, query)
    with tap(model) as seen, asking(model, inputs, target, task, graph=True) as (entry, question):
        value = question(entry.outputs, everything(entry))
        sites = self_attention(seen.sites, model, len(entry.inputs))
        chosen = range(len(sites)) if layer is None else [_index(layer, len(sites))]
        free = [i for i in chosen if sites[i].z.requires_grad]
        slopes = slope(entry, question, value, tuple(sites[i].z for i in free)) if free else ()
        by_site = dict(zip(free, slopes, strict=True))
        start = reader(entry, question, query, sites)
        with torch.no_grad():
            fused = {i: _weighted(sites[i], dz) for i, dz in by_site.items()}
            placed = place(entry, _row(fused, layer, start, sites))
        return Attribution(
            values=placed.values,
            method="attention_gradient",
            axes=placed.axes,
            target=value.detach(),
            unit="1" if layer is None else question.unit,
            ids=entry.inputs if entry.is_tokens else None,
            position=question.position,
            token=question.token,
            convention={
                "formula": "(A·∂F/∂A)⁺, mean over heads",
                "layers": "rolled" if layer is None else layer,
                "query": query,
                "sign": "none: only what raises the target",
                "of": "positions",
                **placed.convention,
                **recipe(target, question),
            },
        )


@dataclass(frozen=True, eq=False)
class AttentionGradient(Attributed):
    """`attention_gradient` of the first examples of the measured batch.

    Records ``attention_gradient/values`` (axes example, position; for images example, y, x), not
    negative, and ``attention_gradient/target`` (the target's value).

    Args:
        name: First part of the records' names.
        target: As in `attention_gradient`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        layer: Number of one attention; None rolls all of them.
        query: Whose row is returned.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "attention_gradient"
    layer: int | None = None
    query: Query = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check(self.layer, self.query)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Return the scores.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return attention_gradient(
            model, batch, self.target, layer=self.layer, query=self.query, task=task
        )


def _weighted(site: Site, slope_of_z: Tensor) -> Tensor:
    """Return the mean over heads of (A ⊙ ∂F/∂A)⁺, ``[example, query, key]``."""
    return (site.pattern() * grouped_product(slope_of_z, site.v.mT)).clamp(min=0).mean(1)


def _row(fused: dict[int, Tensor], layer: int | None, start: Tensor, sites: list[Site]) -> Tensor:
    if layer is not None:
        return next((f.sum(1) for f in fused.values()), torch.zeros_like(start))

    def step(index: int, row: Tensor) -> Tensor:
        if index not in fused:
            return row
        return row + (row.to(fused[index])[:, None] @ fused[index])[:, 0]

    return follow(start, sites, step) - start


def _index(layer: int, count: int) -> int:
    index = layer + count if layer < 0 else layer
    if not 0 <= index < count:
        raise ArgumentError.of(
            "layer",
            expected=f"a number from 0 to {count - 1}",
            got=layer,
            do="Attentions are counted in the order they run in; −1 is the last.",
        )
    return index


def _check(layer: int | None, query: Query) -> None:
    check_query(query)
    if layer is not None and type(layer) is not int:
        raise ArgumentError.of(
            "layer", expected="an int or None", got=repr(layer), do="None rolls all layers."
        )
