"""Losses as functions of the outputs alone: their slopes, and roots of their curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..target import Loss, Target
from ..task import IGNORED, Classification, NextToken, Task, one_class_each
from .objective import Objective, turned
from .point import at_least_single, wide

__all__ = ["FEW", "Labels", "curvature_columns", "slope", "slope_of_loss", "slope_of_query"]

Labels: TypeAlias = Literal["auto", "exact", "sampled", "true"]
"""Which output gradients make the curvature: see `Gathered`."""

FEW = 32
"""Outputs of an example up to which their curvature is taken exactly."""

LANES = 16
"""Single-precision numbers in the longest vector of a processor."""


def slope(outputs: Tensor, scalar: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradients of a function of the outputs ``[example, …] -> [example]`` in them.

    Args:
        outputs: Detached.
        scalar: The function.

    Returns:
        Shaped like the outputs.
    """
    with torch.enable_grad():
        free = outputs.detach().requires_grad_()
        value = scalar(free).sum()
        if not value.requires_grad:
            return torch.zeros_like(outputs)
        return torch.autograd.grad(value, free)[0]


def slope_of_loss(task: Task, outputs: Tensor, batch: Any) -> Tensor:
    """Return the gradients of the examples' losses in the outputs.

    For cross-entropies that is p − e_y, which takes a fraction of the time of autograd.

    Args:
        task: Defines the loss.
        outputs: Detached.
        batch: The batch.

    Returns:
        Shaped like the outputs.
    """
    if _is_classifier(task, outputs):
        labels = one_class_each(task.required_labels(batch), len(outputs)).long()
        return _beyond_labels(outputs, labels, labels != IGNORED)
    if isinstance(task, NextToken) and _own_loss(task) and outputs.ndim == 3:
        labels = task.labels(batch)
        return _beyond_labels(outputs, labels, _shares(labels, outputs))
    # By position: a user's loss may call its batch otherwise.
    return slope(outputs, lambda free: task.loss(free, batch))


def slope_of_query(query: Target, outputs: Tensor, batch: Any) -> Tensor:
    """Return the gradients of what is asked, turned so that less of it is better.

    Args:
        query: What is asked about.
        outputs: Detached.
        batch: The queries.

    Returns:
        Shaped like the outputs.
    """
    if type(query) is Loss and query.task is not None:
        return slope_of_loss(query.task, outputs, batch)
    return slope(outputs, partial(turned, query, batch=batch))


def _is_classifier(task: Task, outputs: Tensor) -> bool:
    own = _is(task.loss, Classification.loss)
    return own and outputs.ndim == 2 and outputs.shape[1] > 1


def _is(method: Any, function: Any) -> bool:
    """Say whether a task's method is ours, and no subclass nor the task itself has another."""
    return getattr(method, "__func__", None) is function


def _beyond_labels(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return weight · (p − e_y), with a weight of 0 where no label is known."""
    places = labels.masked_fill(labels == IGNORED, 0)[..., None]
    found = _probabilities(at_least_single(logits))
    found.scatter_add_(-1, places, found.new_full((1,), -1.0).expand(places.shape))
    return found.mul_(weight[..., None]).to(logits.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    """Return the softmax. Over a few classes it takes a fifth of the time with classes first."""
    classes = logits.shape[-1]
    if classes >= LANES:
        return logits.softmax(-1)
    first = logits.reshape(-1, classes).T.contiguous().softmax(0)
    return first.T.contiguous().reshape(logits.shape)


def _shares(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return what each position counts in the mean over those that have a label."""
    known = (labels != IGNORED).to(torch.promote_types(outputs.dtype, torch.float32))
    return known / known.sum(1, keepdim=True).clamp(min=1)


def curvature_columns(
    objective: Objective,
    outputs: Tensor,
    batch: Any,
    labels: Labels,
    places: Sequence[int],
    seed: int,
) -> tuple[str, list[Tensor]]:
    """Return columns whose outer products add up to the curvature of the losses in the outputs.

    Args:
        objective: The losses.
        outputs: Shape ``[example, …]``, detached.
        batch: The batch.
        labels: ``"auto"``, ``"exact"`` or ``"sampled"``.
        places: Place of each example in the data, which seeds its sample.
        seed: Seeds all of them.

    Returns:
        Which way was taken, and tensors shaped like the outputs.

    Raises:
        ArgumentError: If the curvature can be taken in neither way.
    """
    count = outputs[0].numel()
    task = objective.task
    # Texts are sampled however short: how many outputs they have depends on how they are padded.
    text = task if isinstance(task, NextToken) and _own_loss(task) else None
    few = count <= FEW and (text is None or outputs.ndim != 3)
    exact = labels == "exact" or (labels == "auto" and few)
    if exact:
        if _is_classifier(task, outputs):
            return "exact", _class_columns(outputs, _counted(task, outputs, batch))
        return "exact", _root_columns(objective, outputs, batch)
    if text is not None and outputs.ndim == 3:
        return "sampled", [_sampled_tokens(text, outputs, batch, places, seed)]
    if _is(task.loss, Classification.loss) and outputs.ndim == 2:
        u = _uniform(places, 1, seed, outputs)[:, 0]
        return "sampled", [_drawn(outputs, u) * _counted(task, outputs, batch)[:, None]]
    return "sampled", [_diagonal_column(objective, outputs, batch, places, seed)]


def _own_loss(task: NextToken) -> bool:
    return _is(task.loss, NextToken.loss) and _is(task.token_losses, NextToken.token_losses)


def _counted(task: Task, outputs: Tensor, batch: Any) -> Tensor:
    """Return 1 for each example, and 0 for one without a label, whose loss is always 0."""
    labels = task.labels(batch)
    if labels is None:
        return outputs.new_ones(len(outputs))
    return (one_class_each(labels, len(outputs)) != IGNORED).to(outputs.dtype)


def _class_columns(outputs: Tensor, counted: Tensor) -> list[Tensor]:
    """Return √p_c (p − e_c) for every class c, 0 for examples that do not count."""
    p = _probabilities(outputs.to(wide(outputs.device)))  # In single, 1 − p of a sure class is 0.
    root = p.sqrt() * counted[:, None]
    columns = root.T[..., None].to(outputs.dtype) * p.to(outputs.dtype)
    columns.diagonal(dim1=0, dim2=2).copy_(root * (p - 1))
    return list(columns)


def _root_columns(objective: Objective, outputs: Tensor, batch: Any) -> list[Tensor]:
    """Return the columns of a root of each example's whole curvature, found by autograd."""
    size = outputs[0].numel()
    with torch.enable_grad():
        free = outputs.detach().requires_grad_()
        value = objective.losses(free, batch).sum()
        if not value.requires_grad:
            return [torch.zeros_like(outputs)]
        (slope,) = torch.autograd.grad(value, free, create_graph=True)
        if not slope.requires_grad:
            return [torch.zeros_like(outputs)]
        flat = slope.reshape(len(outputs), size)
        rows = []
        for i in range(size):
            (bent,) = torch.autograd.grad(flat[:, i].sum(), free, retain_graph=True)
            rows.append(bent.reshape(len(outputs), size))
    curved = torch.stack(rows, 1)
    curved = (curved + curved.transpose(1, 2)) / 2
    values, vectors = torch.linalg.eigh(at_least_single(curved))
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    return [root[:, :, i].reshape(outputs.shape).to(outputs.dtype) for i in range(size)]


def _sampled_tokens(
    task: NextToken, outputs: Tensor, batch: Any, places: Sequence[int], seed: int
) -> Tensor:
    labels = task.labels(batch)
    weight = _shares(labels, outputs)
    # Counted from the text's own first label: where it stands depends on how it is padded.
    place = ((labels != IGNORED).cumsum(1) - 1).clamp(min=0)
    u = _uniform(places, outputs.shape[1], seed, outputs).gather(1, place)
    return _drawn(outputs, u) * weight.sqrt().to(outputs.dtype)[..., None]


def _drawn(outputs: Tensor, u: Tensor) -> Tensor:
    """Return p − e_y with y drawn from p by uniform numbers."""
    p = at_least_single(outputs).softmax(-1)
    y = (p.cumsum(-1) < u[..., None].to(p.dtype)).sum(-1, keepdim=True)
    return p.scatter_add(-1, y.clamp(max=p.shape[-1] - 1), -torch.ones_like(p[..., :1])).to(
        outputs.dtype
    )


def _uniform(places: Sequence[int], count: int, seed: int, like: Tensor) -> Tensor:
    """Return uniform numbers ``[example, count]`` that depend on places and seed alone."""
    generator = torch.Generator()
    rows = [
        torch.rand(count, generator=generator.manual_seed(seed * 1_000_003 + i + 1)) for i in places
    ]
    return torch.stack(rows).to(like.device)


def _diagonal_column(
    objective: Objective, outputs: Tensor, batch: Any, places: Sequence[int], seed: int
) -> Tensor:
    """Return √h ∘ signs where the curvature is a diagonal matrix h, as squared errors have."""
    size = outputs[0].numel()
    signs = (_uniform(places, size, seed, outputs) < 0.5).to(outputs.dtype) * 2 - 1
    signs = signs.reshape(outputs.shape)
    with torch.enable_grad():
        free = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(objective.losses(free, batch).sum(), free, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(outputs)
        (h,) = torch.autograd.grad(slope.sum(), free, retain_graph=True)
        (turned,) = torch.autograd.grad(slope, free, signs)
    if not torch.allclose(turned, h * signs, rtol=1e-3, atol=1e-6 * float(h.abs().max())):
        raise ArgumentError.of(
            "labels",
            expected="a loss whose curvature in the outputs can be sampled: cross-entropy, "
            "next-token or squared error",
            got=f"{type(objective.task).__name__} with {size} outputs for each example",
            do='Use labels="true" (the empirical Fisher matrix) or solver="cg".',
        )
    return h.clamp(min=0).sqrt() * signs
