"""One `Anatomy` for all measurements of a firing: `shared_anatomy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..measurement import Context
from .anatomy import Anatomy

__all__ = ["check_anatomy", "shared_anatomy"]


def check_anatomy(anatomy: object) -> None:
    """Refuse what is no anatomy.

    Args:
        anatomy: What was given.

    Raises:
        ArgumentError: If it is anything else.
    """
    if not isinstance(anatomy, Anatomy):
        raise ArgumentError.of(
            "anatomy",
            expected="an Anatomy",
            got=f"a {type(anatomy).__name__}",
            do="Find it with Anatomy.of(model, batch).",
        )


def shared_anatomy(model: nn.Module, context: Context, example: Any = None) -> Anatomy:
    """Return the anatomy of the measured model, found once a firing.

    Args:
        model: The user's model.
        context: Batch, task and memo.
        example: What the model is run on; None takes the measured batch, where there is one.

    Returns:
        The anatomy. Do not change its tensors: others read them too.

    Raises:
        NoAttentionError: If the model has no self-attention that can be observed.
    """

    def find() -> Anatomy:
        measured = example is None and context.has_batch
        batch = context.batch if measured else example
        task = context.task if measured else context.known_task
        with torch.no_grad():
            return Anatomy.of(model, batch, task=task)

    return context.shared("anatomy", find)
