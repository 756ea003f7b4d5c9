"""Singular directions of a head: which tokens each of them reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...nodes import Head
from .factors import reads, writes
from .tokens import Vocabulary, vocabulary

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["SingularDirections", "singular_directions"]

NEAR = 1e-3
"""Singular values nearer to each other than this share have no single vectors of their own."""


@dataclass(frozen=True, eq=False)
class SingularDirections:
    """W = Σ_i σ_i·u_iᵀ·v_i of W_OV or W_QK, with what the directions mean for tokens.

    The sign of a pair (u_i, v_i) is free; it is chosen so that the token with the largest absolute
    value in ``read`` is positive.

    Args:
        values: Singular values σ ``[direction]``, largest first.
        inputs: u, as rows ``[direction, d_model]``: what W_OV reads, or the query side of W_QK.
        outputs: v, the same shape: what W_OV writes, or the key side of W_QK.
        read: Value of each token along u, ``[direction, token]``.
        written: Logit of each token along v (OV), or value of each token as key (QK).
        arbitrary: Whether the value is so near to a neighbour's that only the space that both span
            means anything, ``[direction]``.
        ids: Token ids ``[token]``.
    """

    values: Tensor
    inputs: Tensor
    outputs: Tensor
    read: Tensor
    written: Tensor
    arbitrary: Tensor
    ids: Tensor

    def tokens(
        self,
        direction: int,
        count: int = 5,
        decode: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> dict[str, list[str]]:
        """Return the tokens at both ends of one direction.

        Args:
            direction: Which, from 0.
            count: How many tokens at each end.
            decode: Token ids to one piece of text each; None gives the ids as text.

        Returns:
            ``reads`` and ``writes``, most positive first; ``reads_against`` and ``writes_against``,
            most negative first.
        """
        found = {}
        for name, scores in (("reads", self.read), ("writes", self.written)):
            order = scores[direction].argsort(descending=True)
            count = min(count, len(order))
            for key, chosen in ((name, order[:count]), (f"{name}_against", order.flip(0)[:count])):
                ids = [int(i) for i in self.ids[chosen]]
                found[key] = [str(i) for i in ids] if decode is None else decode(ids)
        return found


def singular_directions(
    anatomy: Anatomy,
    head: Head,
    which: str = "OV",
    *,
    count: int | None = None,
    tokens: Vocabulary | None = None,
) -> SingularDirections:
    """Return the singular directions of what a head moves (OV) or matches (QK).

    Args:
        anatomy: The model's anatomy.
        head: The head.
        which: ``"OV"``: W_V·W_O, from what is read to what is written; ``"QK"``: W_Q·W_Kᵀ, from
            queries to keys. Gains of norms are folded in.
        count: Number of directions; None takes all, min(d_head, d_model).
        tokens: The tokens; None takes all with W_E.

    Returns:
        The directions.

    Raises:
        ArgumentError: If there is no such head, or which is neither.
    """
    if which not in ("OV", "QK"):
        raise ArgumentError.of("which", expected="'OV' or 'QK'", got=repr(which), do="Choose.")
    layer = head.layer
    if not (0 <= layer < anatomy.n_layers and 0 <= head.head < anatomy.n_heads[layer]):
        raise ArgumentError.of(
            "head",
            expected=f"a head of {anatomy.n_layers} layers of {anatomy.n_heads} heads",
            got=str(head),
            do="Layers and heads count from 0.",
        )
    asked = vocabulary(anatomy) if tokens is None else tokens
    left = reads(anatomy, layer, "V" if which == "OV" else "Q")[head.head]
    if which == "OV":
        right = writes(anatomy, layer)[head.head]
    else:
        right = reads(anatomy, layer, "K")[head.head].mT
    inputs, values, outputs = (part[:count] for part in _decomposed(left, right))
    read = inputs @ asked.read(layer).mT
    written = outputs @ (asked.unembedding if which == "OV" else asked.read(layer).mT)
    sign = read.gather(1, read.abs().argmax(1, keepdim=True)).sign()
    sign = sign.where(sign != 0, 1.0)
    return SingularDirections(
        values,
        inputs=sign * inputs,
        outputs=sign * outputs,
        read=sign * read,
        written=sign * written,
        arbitrary=_near(values),
        ids=asked.ids,
    )


def _decomposed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition of left · right, both thin, from that of a small matrix."""
    first, second = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    found = torch.linalg.svd(first.R @ second.R.mT)
    rank = len(found.S)
    inputs = (first.Q @ found.U[:, :rank]).mT
    outputs = found.Vh[:rank] @ second.Q.mT
    return inputs, found.S, outputs


def _near(values: Tensor) -> Tensor:
    gaps = (values[:-1] - values[1:]) < NEAR * values[:-1]
    edge = gaps.new_zeros(1)
    return torch.cat([gaps, edge]) | torch.cat([edge, gaps])
