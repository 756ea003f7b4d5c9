"""What a step should look like, before anything is cut: `Looks`, `Copies`, `Attends`, `Writes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..readout import logit_attribution
from ..readout.roles import ROLES, above
from .cuts import check_share
from .subject import Subject, index_of

__all__ = ["Attends", "Copies", "Looks", "Prior", "Scored", "Writes"]


@dataclass(frozen=True, eq=False)
class Scored:
    """A score of every head, or of every MLP, and how far it lies above its nulls.

    Args:
        values: ``[layer, head]`` for heads, ``[layer]`` for MLPs.
        null: The larger of its nulls, the same shape.
        excess: How far it lies above all of them, in the units of the margin.
        reason: Why there is none.
    """

    values: Tensor
    null: Tensor
    excess: Tensor
    reason: str | None = None


@runtime_checkable
class Prior(Protocol):
    """What a part should look like in the weights or in a forward pass."""

    @property
    def margin(self) -> float:
        """Smallest excess above the nulls."""

    @property
    def key(self) -> str:
        """Short name."""

    def claim(self) -> str:
        """Return it in words."""

    def score(self, subject: Subject, kind: str) -> Scored:
        """Return the score of every part of a kind.

        Args:
            subject: Model and prompts.
            kind: ``"head"`` or ``"mlp"``.
        """


@dataclass(frozen=True)
class Looks:
    """A head's pattern on repeated random tokens: see `lightning_mi.circuits.head_scores`.

    The excess is the smaller of (score − null) / (1 − null) over uniform attention and the matched
    null, as for `lightning_mi.circuits.head_roles`.

    Args:
        role: ``"induction"``, ``"previous_token"``, ``"duplicate_token"``, ``"current_token"`` or
            ``"sink"``.
        margin: Smallest excess.

    Raises:
        ArgumentError: If there is no such role, or the margin is not in (0, 1].
    """

    role: str
    margin: float = 0.3

    def __post_init__(self) -> None:
        """Check role and margin."""
        if self.role not in ROLES:
            raise ArgumentError.of(
                "role", expected=f"one of {sorted(ROLES)}", got=repr(self.role), do="Choose one."
            )
        _check(self.margin)

    @property
    def key(self) -> str:
        """Short name."""
        return f"looks_{self.role}"

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return f"{self.role.replace('_', ' ')} pattern above its nulls by {self.margin:g}"

    def score(self, subject: Subject, kind: str) -> Scored:
        """Return the score of every head.

        Args:
            subject: Model and prompts.
            kind: ``"head"``.

        Returns:
            The scores.
        """
        return _of_role(subject, self.role, kind)


@dataclass(frozen=True)
class Copies:
    """A head raises the logits of the tokens it looks at: eigenvalues of W_E·W_OV·W_U.

    The null is the largest absolute score under three shuffles of the tokens that W_U stands for.

    Args:
        margin: Smallest excess.
        anti: It lowers them instead.

    Raises:
        ArgumentError: If the margin is not in (0, 1].
    """

    margin: float = 0.3
    anti: bool = False

    def __post_init__(self) -> None:
        """Check the margin."""
        _check(self.margin)

    @property
    def key(self) -> str:
        """Short name."""
        return "anti_copies" if self.anti else "copies"

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return f"{'anti-copies' if self.anti else 'copies'}, above its nulls by {self.margin:g}"

    def score(self, subject: Subject, kind: str) -> Scored:
        """Return the score of every head.

        Args:
            subject: Model and prompts.
            kind: ``"head"``.

        Returns:
            The scores.
        """
        return _of_role(subject, "anti_copying" if self.anti else "copying", kind)


@dataclass(frozen=True)
class Attends:
    """A head looks from one position of the prompts to another one.

    The mean of A[source, target] over clean prompts. Nulls: the same attention to all reachable
    keys; and, matched, the attention from the same source to another position: ``against``, or the
    position before the target. The excess is (score − null) / (1 − null), the smaller of both.

    Args:
        source: A position that the behavior names, or ``"last"``.
        target: Likewise; also ``"answer"`` or ``"wrong"``, where the prompt first holds it.
        against: The matched null's position.
        margin: Smallest excess.

    Raises:
        ArgumentError: If the margin is not in (0, 1].
    """

    source: str
    target: str
    against: str | None = None
    margin: float = 0.1

    def __post_init__(self) -> None:
        """Check the margin."""
        _check(self.margin)

    @property
    def key(self) -> str:
        """Short name."""
        return f"attends_{self.source}_{self.target}"

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        than = f" than to {self.against}" if self.against else " than chance"
        return f"attends from {self.source} to {self.target} more{than} by {self.margin:g}"

    def score(self, subject: Subject, kind: str) -> Scored:
        """Return the score of every head.

        Args:
            subject: Model and prompts.
            kind: ``"head"``.

        Returns:
            The scores.
        """
        _need_heads(kind, "Attends")
        source, target = subject.place(self.source), subject.place(self.target)
        if self.against is None:
            other = torch.where(target > 0, target - 1, target + 1)
        else:
            other = subject.place(self.against)
        values, uniform = subject.attention(source, target)
        matched, _ = subject.attention(source, other)
        null = torch.maximum(uniform, matched)
        reason = None
        if bool(values.isnan().all()):
            reason = f"no prompt has positions {self.source} and {self.target}"
        return Scored(values, null, above(values, null), reason)


@dataclass(frozen=True)
class Writes:
    """A part writes the answer itself: direct logit attribution at the last position.

    Its part of (answer − wrong) on clean prompts less that on corrupted ones, as a share of the
    metric's difference in logits. The null is 0.

    Args:
        margin: Smallest share.

    Raises:
        ArgumentError: If the margin is not in (0, 1].
    """

    margin: float = 0.1

    def __post_init__(self) -> None:
        """Check the margin."""
        _check(self.margin)

    @property
    def key(self) -> str:
        """Short name."""
        return "writes"

    def claim(self) -> str:
        """Return it in words.

        Returns:
            One clause.
        """
        return f"writes {self.margin:g} or more of the answer's logit itself"

    def score(self, subject: Subject, kind: str) -> Scored:
        """Return the share of every part.

        Args:
            subject: Model and prompts.
            kind: ``"head"`` or ``"mlp"``.

        Returns:
            The scores.
        """
        behavior, anatomy = subject.behavior, subject.anatomy
        if behavior.answers is None or behavior.wrong is None:
            return _none(subject, kind, "the behavior names no answer and no wrong answer")
        found, logits = [], []
        for batch in (behavior.clean, behavior.corrupted):
            with torch.no_grad():
                parts = logit_attribution(
                    subject.model,
                    batch,
                    behavior.answers,
                    behavior.wrong,
                    anatomy=anatomy,
                    task=subject.task,
                )
            found.append(parts.at(-1).float().cpu())
            logits.append(float(found[-1].sum(-1).mean()))
        whole = logits[0] - logits[1]
        if abs(whole) <= 1e-6 * max(map(abs, logits)):
            return _none(subject, kind, "the logits are the same on clean and corrupted prompts")
        share = dict(
            zip(parts.labels, ((found[0] - found[1]).mean(0) / whole).tolist(), strict=True)
        )
        values = _blank(subject, kind)
        for part in subject.heads if kind == "head" else subject.mlps:
            values[index_of(part)] = share.get(str(part), math.nan)
        return Scored(values, torch.zeros_like(values), values)


def _of_role(subject: Subject, role: str, kind: str) -> Scored:
    _need_heads(kind, role)
    roles = subject.roles
    if isinstance(roles, str):
        return _none(subject, kind, roles)
    null = torch.maximum(roles.uniform[role], roles.matched[role])
    reason = roles.reasons.get(role) or None
    return Scored(roles.scores[role].cpu(), null.cpu(), roles.excess[role].cpu(), reason)


def _blank(subject: Subject, kind: str) -> Tensor:
    anatomy = subject.anatomy
    if kind == "head":
        return torch.full((anatomy.n_layers, max(anatomy.n_heads)), math.nan)
    return torch.full((1 + max((m.layer for m in subject.mlps), default=-1),), math.nan)


def _none(subject: Subject, kind: str, reason: str) -> Scored:
    nothing = _blank(subject, kind)
    return Scored(nothing, nothing, nothing, reason)


def _need_heads(kind: str, what: str) -> None:
    if kind != "head":
        raise ArgumentError.of(
            "prior",
            expected="Writes(…) for a step of MLPs",
            got=what,
            do="Only heads have a pattern.",
        )


def _check(margin: float) -> None:
    check_share(margin, "margin", "0.3")
