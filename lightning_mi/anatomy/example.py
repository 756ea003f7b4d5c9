"""What the model is run on when it is asked: a short batch, in single precision at least."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import cut, tree_map
from ..errors import ArgumentError
from ..task import Task

__all__ = ["made_up", "shortened", "unpadded", "widened", "widened_batch"]

EXAMPLES, POSITIONS = 2, 12
"""The pass that is recorded is that short; longer sequences would tell nothing more."""


def made_up(model: nn.Module) -> Tensor:
    """Return token ids for a model, where the user gives no example.

    Args:
        model: A model that looks token ids up.

    Returns:
        Ids ``[example, position]`` on its device.

    Raises:
        ArgumentError: If the model looks no ids up.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 1]
    if not tables:
        raise ArgumentError.of(
            "example",
            expected="a batch that the model can be run on",
            got="none, for a model that looks no token ids up",
            do="Pass one batch: Anatomy.of(model, batch).",
        )
    # Which table is looked up is not known yet: ids that every table has.
    most = min(t.num_embeddings for t in tables)
    device = tables[0].weight.device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, most, (EXAMPLES, 8), generator=generator).to(device)


def shortened(batch: Any, task: Task) -> Any:
    """Return the first examples, sequences of ids cut to a few positions.

    Args:
        batch: The user's batch.
        task: Says what its inputs are.

    Returns:
        A batch of the same structure.
    """
    batch = cut(batch, EXAMPLES)
    inputs = task.inputs(batch)
    if inputs.ndim != 2 or inputs.is_floating_point() or inputs.shape[1] <= POSITIONS:
        return batch
    length, others = inputs.shape[1], []

    def shorten(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.ndim == 2 and value.shape[1] == length:
            return value[:, :POSITIONS].contiguous()
        if value.ndim > 2 and value.shape[-2:] == (length, length):  # a mask of blocks
            return value[..., :POSITIONS, :POSITIONS].contiguous()
        others.append(value)
        return value

    shorter = tree_map(shorten, batch)
    return batch if others else shorter


def unpadded(batch: Any) -> Any:
    """Return a batch of token ids whose tokens all count, at positions from 0 on.

    Weights depend neither on padding nor on where a sequence begins, but they are read at position
    0, where rotary embeddings are the identity; a batch may put padding there, or call it 1.

    Args:
        batch: A batch whose inputs are token ids.

    Returns:
        A batch of the same structure.
    """
    if not isinstance(batch, Mapping):
        return batch
    plain = dict(batch)
    mask, places = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        plain["attention_mask"] = torch.ones_like(mask)
    if isinstance(places, Tensor) and places.ndim in (1, 2):
        counted = torch.arange(places.shape[-1], device=places.device, dtype=places.dtype)
        plain["position_ids"] = counted.expand_as(places).clone()
    return plain


def widened(model: nn.Module) -> nn.Module:
    """Return the model, or a copy in single precision of one in half precision.

    Args:
        model: The user's model.

    Returns:
        A model whose differences are not lost to rounding.
    """
    if all(p.element_size() >= 4 for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def widened_batch(batch: Any) -> Any:
    """Return a batch with its half-precision values in single precision.

    Args:
        batch: Any batch.

    Returns:
        The batch.
    """

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
        return value.float() if half else value

    return tree_map(widen, batch)
