"""One attention that was computed inside a model: `Site`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Site"]

MASKED = 9000.0
"""A key whose logit lies this far below the row's best is masked: no head has such logits by its
own means, and every masking constant in use (-1e4, -1e9, the least float, -inf) does."""


@dataclass(eq=False)
class Site:
    """One attention, in one forward pass.

    Heads are written out: ``q`` and ``z`` are ``[batch, head, position, d_head]``; ``k`` and ``v``
    are ``[batch, kv_head, position, d_head]``, each serving ``head // kv_head`` query heads.
    Tensors are those of the model's own graph, so gradients can be taken with respect to ``z``
    (and, where the model hands them over unchanged, ``q``, ``k`` and ``v``).

    Args:
        module: Dotted name of the module it ran in.
        q: Queries as they enter the kernel, hence after rotary embedding.
        k: Keys, likewise.
        v: Values.
        z: Output of each head, before the output projection; after `tap`'s own edit.
        scale: What q·k is multiplied by.
        mask: Boolean (True = may attend) or additive, broadcastable to
            ``[batch, head, query, key]``; None if there is none.
        causal: Whether the kernel itself keeps queries from later keys (besides ``mask``).
        softcap: c where logits are passed through c·tanh(·/c), else None.
        cross: Whether keys come from another sequence than queries.
        probabilities: The pattern, where the model itself computed one.
        normalizers: Row log-sum-exp of the logits ``[batch, head, query]``, where a kernel gave it.
        replay: Computes the model's pattern from other q and k, with all that the model does in
            between; kept for the full check and where a tap rewrites.
    """

    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    cross: bool = False
    probabilities: Tensor | None = None
    normalizers: Tensor | None = None
    replay: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.z.shape[1]

    def logits(self, examples: slice = slice(None), queries: slice = slice(None)) -> Tensor:
        """Return scale·q·k plus the mask, in single precision at least.

        Only for attention whose pattern the model does not compute itself.

        Args:
            examples: Which examples.
            queries: Which query positions; ``slice`` with a start and a stop.

        Returns:
            Shape ``[example, head, query, key]``, −inf where masked.
        """
        rows = range(*queries.indices(self.q.shape[2]))
        scores = grouped_product(self.q[examples, :, queries], self.k[examples].mT) * self.scale
        if self.causal:
            columns = torch.arange(self.k.shape[2], device=scores.device)
            later = columns > torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
            scores = scores.masked_fill(later, -math.inf)
        mask = self._mask(examples, queries)
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -math.inf)
        return scores + mask

    def pattern(self, examples: slice = slice(None), queries: slice = slice(None)) -> Tensor:
        """Return the attention pattern: who looks where.

        It is the model's own where the model computes one, else recomputed from q, k, mask and
        scale in single precision at least. A row that may look nowhere is zero.

        Args:
            examples: Which examples.
            queries: Which query positions.

        Returns:
            Shape ``[example, head, query, key]``; rows add up to 1 (less where the model keeps a
            sink logit of its own).
        """
        if self.probabilities is not None:
            return widened(self.probabilities[examples, :, queries])
        logits = self.logits(examples, queries)
        return safe_softmax(logits)

    def pattern_of(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the pattern that other queries and keys would give here.

        Mask, scale, soft-cap and whatever else the model puts between stay.

        Args:
            q: Queries ``[batch, head, position, d_head]``.
            k: Keys ``[batch, kv_head, position, d_head]``.

        Returns:
            Shape ``[batch, head, query, key]``, in single precision at least.
        """
        if self.replay is not None:
            made = self.replay(q.to(self.q.dtype), k.to(self.k.dtype))
            return widened(made.reshape(q.shape[:3] + k.shape[2:3]))
        other = dataclasses.replace(self, q=q, k=k, probabilities=None)
        if self.softcap is None:
            return safe_softmax(other.logits())
        # 0 where a key is open, else what the mask says.
        masked = dataclasses.replace(other, scale=0.0).logits()
        free = grouped_product(q, k.mT) * self.scale
        return safe_softmax(self.softcap * (free / self.softcap).tanh() + masked)

    def attend(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        pattern: Tensor | None = None,
    ) -> Tensor:
        """Return what the heads would write with other queries, keys, values, or pattern.

        Args:
            q: Queries; None keeps the model's own.
            k: Keys, likewise.
            v: Values, likewise.
            pattern: The pattern; None computes it from queries and keys.

        Returns:
            z ``[batch, head, position, d_head]``, in the model's precision.
        """
        if pattern is None:
            own = q is None and k is None
            pattern = (
                self.pattern()
                if own
                else self.pattern_of(self.q if q is None else q, self.k if k is None else k)
            )
        made = grouped_product(pattern, self.v if v is None else v)
        return made.to(self.z.dtype)

    def reachable(
        self, examples: slice = slice(None), queries: slice = slice(None)
    ) -> Tensor | None:
        """Return which keys a query may look at at all.

        Args:
            examples: Which examples.
            queries: Which query positions.

        Returns:
            Boolean ``[1 or example, 1 or head, query, key]``, or None where every key is reachable.
        """
        rows = range(*queries.indices(self.q.shape[2]))
        mask = self._mask(examples, queries)
        if mask is not None and mask.dtype != torch.bool:
            mask = within(mask)
        if self.causal:
            keys = torch.arange(self.k.shape[2], device=self.q.device)
            own = torch.arange(rows.start, rows.stop, device=self.q.device)
            lower = (keys <= own[:, None])[None, None]
            mask = lower if mask is None else mask & lower
        if mask is None:
            return None
        return mask.expand(*mask.shape[:2], len(rows), self.k.shape[2])

    def bias(self, example: Tensor, query: Tensor, key: Tensor) -> Tensor | float:
        """Return what an additive mask adds to single logits.

        Args:
            example: Long ``[entry]``.
            query: Query positions ``[entry]``.
            key: Key positions ``[entry]``.

        Returns:
            Shape ``[entry, 1 or head]``; 0 without an additive mask.
        """
        mask = self._mask(slice(None), slice(None))
        if mask is None or mask.dtype == torch.bool:
            return 0.0
        mask = mask.expand(*mask.shape[:2], self.q.shape[2], self.k.shape[2])
        return mask[example if len(mask) > 1 else torch.zeros_like(example), :, query, key]

    def _mask(self, examples: slice, queries: slice) -> Tensor | None:
        if self.mask is None:
            return None
        mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))
        mask = mask if mask.shape[0] == 1 else mask[examples]
        return mask if mask.shape[2] == 1 else mask[:, :, queries]


def grouped_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right where each head of ``right`` serves several of ``left``.

    Args:
        left: Shape ``[batch, head, n, m]``.
        right: Shape ``[batch, kv_head, m, p]``.

    Returns:
        Shape ``[batch, head, n, p]``, in single precision at least. Nothing is copied.
    """
    left, right = widened(left), widened(right)
    batch, heads, rows, inner = left.shape
    groups = right.shape[1]
    # Inside a Trainer's autocast the product would come out in half precision again.
    with torch.autocast(left.device.type, enabled=False):
        if groups == heads:
            return left @ right
        product = left.reshape(batch, groups, heads // groups * rows, inner) @ right
    return product.reshape(batch, heads, rows, right.shape[-1])


def widened(values: Tensor) -> Tensor:
    """Return half-precision values in single precision, others as they are.

    Args:
        values: Any tensor.

    Returns:
        The tensor.
    """
    return values.float() if values.element_size() < 4 else values


def safe_softmax(logits: Tensor) -> Tensor:
    """Return softmax over the last axis, and zero for a row of −inf only.

    Args:
        logits: Any shape.

    Returns:
        The same shape.
    """
    nowhere = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)


def within(logits: Tensor) -> Tensor:
    """Return which entries are not masked, judged by their distance from the row's best.

    Args:
        logits: Masked logits, or an additive mask.

    Returns:
        Boolean, the same shape.
    """
    best = logits.amax(-1, keepdim=True)
    return (best - logits < MASKED) & (best > -math.inf)
