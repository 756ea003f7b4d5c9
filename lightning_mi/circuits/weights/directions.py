"""Singular directions of a head: which tokens each of them reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import ArgumentError
from ...measurement import Context
from ...nodes import Head, parse
from ...record import Panel, Reading
from .factors import check_count, head_of, reads, writes
from .panels import doubts
from .tokens import Vocabulary, vocabulary

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["HeadDirections", "SingularDirections", "singular_directions"]

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
    head: Head | str,
    which: str = "OV",
    *,
    count: int | None = None,
    tokens: Vocabulary | None = None,
) -> SingularDirections:
    """Return the singular directions of what a head moves (OV) or matches (QK).

    Args:
        anatomy: The model's anatomy.
        head: The head, or its name, such as ``"L1H3"``.
        which: ``"OV"``: W_V·W_O, from what is read to what is written; ``"QK"``: W_Q·W_Kᵀ, from
            queries to keys. Gains of norms are folded in.
        count: Number of directions; None takes all, min(d_head, d_model).
        tokens: The tokens; None takes all with W_E.

    Returns:
        The directions.

    Raises:
        ArgumentError: If there is no such head, which is neither, or count not positive.
    """
    _check_which(which)
    head = head_of(anatomy, head, "head")
    layer = head.layer
    if count is not None:
        check_count(count, "count")
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


@dataclass(frozen=True)
class HeadDirections:
    """Singular directions of chosen heads, with the tokens that each reads and writes.

    Panels for ``OV`` and ``QK`` (see `singular_directions`): named by it over (head, feature), the
    singular values, largest first; ``OV_read`` and ``OV_written`` over (head, feature, token), the
    values of the tokens at both ends of each direction, most positive first, whose texts stand in
    the labels. What stands in ``arbitrary`` of the convention shares its value with a neighbour:
    only the space that both span means anything.

    Args:
        name: First part of the records' names.
        heads: Names of heads, such as ``L1H3``; at least one.
        which: ``OV``, ``QK`` or both.
        count: Number of directions.
        tokens: Number of tokens at each end.
        vocabulary: Number of tokens that are drawn to choose from; None takes all.
        seed: Seed of the generator that draws tokens.

    Raises:
        ArgumentError: If no head is named, a name is no head's, which is neither, or a number is
            not positive.

    Example:
        >>> HeadDirections(heads=("L0H1",)).which
        ('OV', 'QK')
    """

    name: str = "head_directions"
    heads: tuple[str, ...] = ()
    which: tuple[str, ...] = ("OV", "QK")
    count: int = 4
    tokens: int = 5
    vocabulary: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers."""
        given = _several(self.heads)
        object.__setattr__(self, "heads", given)
        object.__setattr__(self, "which", _several(self.which))
        for kind in self.which:
            _check_which(kind)
        for argument in ("count", "tokens"):
            check_count(getattr(self, argument), argument)
        if self.vocabulary is not None:
            check_count(self.vocabulary, "vocabulary")
        wrong = [h for h in given if not isinstance(parse(h), Head)]
        if wrong or not given:
            raise ArgumentError.of(
                "heads", expected='names such as "L1H3"', got=wrong or "none", do="Name heads."
            )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        anatomy = shared_anatomy(model, context)
        task = context.task if context.has_batch else context.known_task
        panels: dict[str, Panel] = {}
        with torch.no_grad():
            asked = vocabulary(
                anatomy, model=model, task=task, size=self.vocabulary, seed=self.seed
            )
            for which in self.which:
                found = [
                    singular_directions(anatomy, h, which, count=self.count, tokens=asked)
                    for h in self.heads
                ]
                panels |= self._panels(anatomy, which, found, asked, context)
        return panels

    def _panels(
        self,
        anatomy: Anatomy,
        which: str,
        found: Sequence[SingularDirections],
        asked: Vocabulary,
        context: Context,
    ) -> dict[str, Panel]:
        about: dict[str, Any] = {
            "matrix": "W_V W_O" if which == "OV" else "W_Q W_K^T",
            "embedding": asked.embedding,
            "tokens": len(asked.ids),
            "arbitrary": [f.arbitrary[: self.count].tolist() for f in found],
            "display": {},
        }
        about |= doubts(anatomy, "OV" if which == "OV" else "QK")
        coords: dict[str, Any] = {"head": list(self.heads)}
        values = nn.utils.rnn.pad_sequence([f.values for f in found], True, torch.nan)
        if values.isnan().any():
            about["reason"] = "NaN: the head has fewer directions"
        coords["feature"] = range(values.shape[1])
        panels = {which: Panel(values, ("head", "feature"), coords, "1", {**about, "what": SIGMA})}
        for side, what in SIDES[which].items():
            ends = [self._ends(getattr(f, side)) for f in found]
            size = max(len(v) for v, _ in ends)
            rows = torch.stack([_grown(v, size) for v, _ in ends])
            texts = [
                [context.texts([int(i) for i in asked.ids[row]]) for row in _grown(order, size)]
                for _, order in ends
            ]
            labels = {**coords, "head,feature,token": texts}
            axes = ("head", "feature", "token")
            panels[f"{which}_{side}"] = Panel(rows, axes, labels, "1", {**about, "what": what})
        return panels

    def _ends(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and indices of the tokens at both ends, most positive first."""
        size = min(self.tokens, scores.shape[1] // 2 or 1)
        order = scores.argsort(dim=1, descending=True)
        order = torch.cat([order[:, :size], order[:, -size:]], 1) if size < len(order[0]) else order
        return scores.gather(1, order), order


SIGMA = "singular values of what the head moves or matches, gains of norms folded in"
SIDES = {
    "OV": {
        "read": "value of each token along what the direction reads",
        "written": "logit of each token along what the direction writes",
    },
    "QK": {
        "read": "value of each token along the query side of the direction",
        "written": "value of each token along its key side",
    },
}


def _several(names: Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _grown(rows: Tensor, size: int) -> Tensor:
    """Return as many rows, NaN (or 0 for indices) after those that there are."""
    value = torch.nan if rows.is_floating_point() else 0
    return nn.functional.pad(rows, (0, 0, 0, size - len(rows)), value=value)


def _check_which(which: str) -> None:
    if which not in ("OV", "QK"):
        raise ArgumentError.of("which", expected="'OV' or 'QK'", got=repr(which), do="Choose.")


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
