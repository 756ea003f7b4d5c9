"""Finding an anatomy by asking the model: `anatomy_of`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ModelError
from ..task import Task
from .anatomy import Anatomy

__all__ = ["anatomy_of"]


def anatomy_of(model: nn.Module, example: Any, task: Task | None) -> Anatomy:
    """Return the anatomy of a model.

    Args:
        model: The user's model.
        example: A batch it can be run on.
        task: How a batch becomes outputs.

    Raises:
        ModelError: Always, until models can be asked.
    """
    raise ModelError(
        f"model: the anatomy of {type(model).__name__} has to be stated for now. Pass anatomy=… "
        "with its weights and its residual graph."
    )
