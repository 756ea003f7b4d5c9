"""Left padding that moves positions: what a padded example says must be what it says alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import attention_mask_of, tree_map
from ..errors import ModelError
from ..task import Task

__all__ = ["check_left_padding"]


@torch.no_grad()
def check_left_padding(model: nn.Module, batch: Any, task: Task) -> None:
    """Refuse a batch whose padding on the left changes what the model says.

    Position ids are built where the model takes them. Where it does not, or where wrong ones were
    given, every position of a padded example is shifted, without an error. So the first example
    that is padded on the left runs once as it is and once without its padding.

    Args:
        model: The plain module, in evaluation mode.
        batch: The user's batch.
        task: Runs the model.

    Raises:
        ModelError: If the answers differ.
    """
    ids = task.inputs(batch)
    found = _first_padded(ids, attention_mask_of(batch))
    if found is None:
        return
    row, begin = found
    try:
        padded = _last(task.outputs(model, _alone(batch, ids, row, 0)))
        short = _without_positions(_alone(batch, ids, row, begin))
        bare = _last(task.outputs(model, short))
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return  # The model wants its whole batch, or one length: there is nothing to compare.
    if padded.shape != bare.shape:
        return
    slack = 3e-2 if padded.element_size() < 4 else 1e-3
    if bool((padded - bare).abs().max() > slack * bare.abs().max()):
        raise ModelError(
            f"inputs: expected padding on the left to change nothing, got other outputs for "
            f"example {row} with its {begin} padding tokens than without them: positions are "
            "shifted. Let forward take position_ids (they are then built), pass right ones in the "
            "batch, or pad on the right."
        )


def _first_padded(ids: Tensor, mask: Tensor | None) -> tuple[int, int] | None:
    if ids.is_floating_point() or mask is None or mask.shape != ids.shape:
        return None
    real = mask.bool()
    rows = (~real[:, 0] & real.any(1)).nonzero().flatten()
    if not len(rows):
        return None
    row = int(rows[0])
    return row, int(real[row].int().argmax())


def _alone(batch: Any, ids: Tensor, row: int, begin: int) -> Any:
    """Return one example, its first positions left out."""
    size, length = ids.shape

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != size:
            return value
        one = value[row : row + 1]
        return one[:, begin:] if one.ndim > 1 and one.shape[1] == length else one

    return tree_map(cut, batch)


def _without_positions(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "position_ids"}
    return batch


def _last(outputs: Tensor) -> Tensor:
    """Return what is said at the last position, where there are several."""
    return outputs[:, -1] if outputs.ndim == 3 else outputs
