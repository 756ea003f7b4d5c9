"""Padding and packing: which positions are real, which document each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import Site, tap
from ...attention.check import tolerance
from ...attention.site import MASKED
from ...errors import ArgumentError, ModelError
from ...task import Task
from .survey import run_tokens

__all__ = ["Layout", "documents_of", "layout_of", "require_harmless_padding"]


@dataclass(frozen=True)
class Layout:
    """How sequences lie in a batch of token ids.

    Args:
        mask: What the model is given beside the ids: 1 at real tokens ``[sequence, position]``, or
            a block mask ``[sequence, 1, query, key]`` (boolean, or added to the logits).
        positions: Position ids ``[sequence, position]``; where they start anew a document begins.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None

    def documents(self, tokens: Tensor) -> Tensor | None:
        """Return the number of the document that each position belongs to.

        Args:
            tokens: Ids ``[sequence, position]``.

        Returns:
            Long, the same shape, 0 at padding; None where each row is one whole document.
        """
        if self.mask is None and self.positions is None:
            return None
        return documents_of(tokens, self.mask, self.positions)


def layout_of(batch: Any, tokens: Tensor) -> Layout:
    """Return the layout that travels with a batch.

    Args:
        batch: The user's batch; a mapping may hold ``attention_mask`` (two-dimensional, or a block
            mask) and ``position_ids``.
        tokens: The ids that the model reads; what is longer is cut to their length.

    Returns:
        The layout.
    """
    if not isinstance(batch, Mapping):
        return Layout()
    length = tokens.shape[1]
    mask, positions = (batch.get(name) for name in ("attention_mask", "position_ids"))
    mask = mask if isinstance(mask, Tensor) and mask.ndim in (2, 3, 4) else None
    if mask is not None:
        mask = mask[:, :length] if mask.ndim == 2 else mask[..., :length, :length]
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return Layout(mask)
    return Layout(mask, positions[:, :length])


def documents_of(
    tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Return which document each position belongs to.

    A document begins at the first real token of a row, where position ids start anew, and where a
    block mask keeps a query from the position before it.

    Args:
        tokens: Ids ``[sequence, position]``.
        mask: 1 at real tokens, the same shape; or a block mask ``[sequence, 1, query, key]``.
        positions: Position ids, the shape of the tokens.

    Returns:
        Long ``[sequence, position]``: 0 at padding, else 1, 2, … from left to right.

    Raises:
        ArgumentError: If mask or position ids do not fit the tokens.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
        >>> documents_of(ids, positions=torch.tensor([[0, 1, 2, 0, 1]]))
        tensor([[1, 1, 1, 2, 2]])
    """
    _check(tokens, mask, positions)
    real = torch.ones_like(tokens, dtype=torch.bool)
    begins = torch.zeros_like(real)
    if mask is not None and mask.ndim == 2:
        real = mask.bool()
    elif mask is not None:
        reach = _reach(mask).expand(len(tokens), -1, -1)
        real = reach.any(-1)
        begins[:, 1:] = ~reach.diagonal(-1, -2, -1)
    if positions is not None:
        places = positions.expand_as(tokens)
        again = (places[:, 1:] <= places[:, :-1]) & real[:, :-1]
        begins[:, 1:] |= again | (places[:, 1:] == 0)
    first = real & (real.cumsum(1) == 1)
    return ((begins | first) & real).cumsum(1) * real


def _reach(mask: Tensor) -> Tensor:
    """Return a block mask as boolean ``[sequence, query, key]``, True where one may look."""
    wide = mask[:, 0] if mask.ndim == 4 else mask
    if wide.is_floating_point():
        return wide > -MASKED if bool((wide < 0).any()) else wide > 0
    return wide.bool()


def _check(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
    batch, length = tokens.shape
    if mask is not None:
        flat = mask.ndim == 2 and mask.shape == tokens.shape
        block = mask.ndim in (3, 4) and mask.shape[-2:] == (length, length)
        if not (flat or (block and len(mask) in (1, batch))):
            raise ArgumentError.of(
                "attention_mask",
                expected=f"shape ({batch}, {length}), or ({batch}, 1, {length}, {length}) for "
                "packed sequences",
                got=tuple(mask.shape),
                do="Give 1 at real tokens, or a block mask.",
            )
    if positions is not None and positions.shape not in ((batch, length), (1, length)):
        raise ArgumentError.of(
            "position_ids",
            expected=f"shape ({batch}, {length})",
            got=tuple(positions.shape),
            do="Give one for each token.",
        )


def require_harmless_padding(
    model: nn.Module, task: Task, tokens: Tensor, layout: Layout | None
) -> None:
    """Refuse a model for which padding shifts what is measured.

    The sequence with most padding is run as it is and without its padding; every head must write
    the same. A model that ignores the mask, or that counts positions from the first pad, does not
    pass, and would be measured wrongly without an error.

    Args:
        model: The user's model, in evaluation mode.
        task: How it is called.
        tokens: Ids ``[sequence, position]``.
        layout: Mask and position ids.

    Raises:
        ModelError: If heads write something else.
    """
    mask = None if layout is None else layout.mask
    if layout is None or mask is None or mask.ndim != 2 or bool(mask.all()):
        return
    counts = mask.bool().sum(1)
    candidates = torch.where((counts < mask.shape[1]) & (counts > 0), counts, mask.shape[1] + 1)
    row = int(candidates.argmin())
    real = mask[row].bool()
    if not bool(real.any()) or bool(real.all()):
        return
    positions = None if layout.positions is None else layout.positions.expand_as(tokens)[row][None]
    padded = _written(model, task, tokens[row][None], mask[row][None], positions)
    own = None if positions is None else positions[:, real]
    plain = _written(model, task, tokens[row][real][None], None, own)
    for (module, with_pads), (_, without) in zip(padded, plain, strict=True):
        found = with_pads[:, :, real] if with_pads.shape[2] == len(real) else with_pads
        if found.shape != without.shape:
            continue  # attention over something other than the tokens
        size = float(without.abs().max())
        apart = float((found - without).abs().max())
        if not apart <= 10 * tolerance(without) * size + 1e-30:
            raise ModelError(
                f"attention_mask: expected {type(model).__name__} to compute the same with padding "
                f"as without, got heads in {module!r} that differ by {apart:.3g}. Positions are "
                "counted from the first pad, or the mask is not heeded: pass position_ids beside "
                "the mask if the model takes them, pad on the other side, or measure sequences of "
                "one length."
            )


def _written(
    model: nn.Module, task: Task, ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    def visit(index: int, site: Site) -> None:
        found.append((site.module, site.z))

    with torch.no_grad(), tap(model, visit=visit, keep=False):
        run_tokens(model, task, ids, mask, positions)
    return found
