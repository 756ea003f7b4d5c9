"""What a head may be called: a role is given only where its score beats both of its nulls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import check_anatomy
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...isolation import untouched
from ...measurement import Context
from ...nodes import Head
from ...record import Panel, Reading, scalar
from ...task import Task
from ..heads.scored import Scored, scored
from .copiers import Copied, copied

__all__ = ["ROLES", "HeadRoles", "Roles", "above", "head_roles", "shared_roles"]

ROLES = {
    "induction": "induction",
    "previous_token": "previous_token",
    "duplicate_token": "duplicate_token",
    "current_token": "current_token",
    "sink": "first_position",
}
"""Roles, and the head score that each rests on."""

MATCHED = {
    "induction": "the same entries on fresh tokens",
    "duplicate_token": "the same entries on fresh tokens",
    "previous_token": "attention one position further back, A[t, t - 2]",
    "current_token": "attention one position further back, A[t, t - 1]",
    "sink": "attention to the position after the first, A[t, 1]",
    "copying": "largest absolute score under three shuffles of the tokens that W_U stands for",
    "anti_copying": "largest absolute score under three shuffles of the tokens that W_U stands for",
}
COPYING = "eigenvalue copying score of the weights, its negative for anti_copying"
MARGIN = 0.3


@dataclass(frozen=True, eq=False)
class Roles:
    """By how much each head beats the nulls of each role, and which roles it has.

    Args:
        excess: By role ``[layer, head]``: the smaller of (score − null) / (1 − null) over the
            uniform and the matched null. 1: perfect; 0: no better than a null.
        scores: The scores themselves.
        uniform: Their values under uniform attention over the real mask.
        matched: Their values in the matched control.
        margin: The excess from which a head has a role.
        modules: Name of the module of each layer.
        reasons: By role, why there is nothing to say.
        approximate: Why copying and anti-copying, which rest on the weights, say less than they
            seem to; empty where they are exact.
    """

    excess: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    uniform: Mapping[str, Tensor]
    matched: Mapping[str, Tensor]
    margin: float
    modules: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()

    def heads(self, role: str) -> tuple[Head, ...]:
        """Return the heads that have a role, the clearest first.

        Args:
            role: One of ``excess``.

        Returns:
            The heads; none where no head beats its nulls by the margin.

        Raises:
            ArgumentError: If there is no such role.
        """
        if role not in self.excess:
            raise ArgumentError.of(
                "role", expected=f"one of {list(self.excess)}", got=repr(role), do="Choose one."
            )
        values = self.excess[role]
        found = (values >= self.margin).nonzero().tolist()
        found.sort(key=lambda place: -float(values[place[0], place[1]]))
        return tuple(Head(layer, head) for layer, head in found)

    def of(self, head: Head) -> tuple[str, ...]:
        """Return the roles of a head, the clearest first.

        Args:
            head: Which one.

        Returns:
            Names of roles.
        """
        own = {role: float(v[head.layer, head.head]) for role, v in self.excess.items()}
        return tuple(sorted((r for r, v in own.items() if v >= self.margin), key=lambda r: -own[r]))

    def __str__(self) -> str:
        """Return one line for each role that some head has."""
        named = {role: ", ".join(map(str, self.heads(role))) for role in self.excess}
        return "\n".join(f"{role}: {heads}" for role, heads in named.items() if heads)


def head_roles(
    model: nn.Module,
    tokens: RepeatedTokens | None = None,
    *,
    margin: float = MARGIN,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
) -> Roles:
    """Say what heads do: induction, previous token, duplicate, current token, sink, copying.

    All but copying are read off attention on repeated random tokens; *copying* and *anti-copying*
    off the weights, by the sign of the eigenvalues of W_E·W_OV·W_U.

    A head is called *induction* only if its score lies clearly above what uniform attention over
    the real mask gives **and** above the matched null, never because it ranks first: heads that
    attend at a fixed offset, or a model in which nothing happens, get no role.

    Args:
        model: Any language model with self-attention; it is left as it was.
        tokens: The protocol; None takes the default one, shortened to what the model takes.
        margin: Smallest excess over both nulls, (score − null) / (1 − null), in (0, 1].
        anatomy: The model's anatomy, if it is at hand or was corrected; None finds it. Copying has
            NaN with a reason where it knows no embedding and unembedding.
        task: How the model is called, if not with the ids alone.

    Returns:
        Excess, scores, nulls and roles of every head.

    Raises:
        ArgumentError: If the margin is out of range, or tokens are no protocol.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
        >>> head_roles(model).heads("induction")
        ()
    """
    _check_margin(margin)
    if anatomy is not None:
        check_anatomy(anatomy)
    with untouched(model) as plain, torch.no_grad():
        context = Context(plain, task=task)
        if anatomy is not None:
            known = anatomy
            context.shared("anatomy", lambda: known)
        given = RepeatedTokens() if tokens is None else tokens
        return shared_roles(plain, context, given, margin)[1]


def shared_roles(
    model: nn.Module, context: Context, tokens: RepeatedTokens, margin: float = MARGIN
) -> tuple[Scored, Roles]:
    """Return the roles of heads and the scores they rest on, both found once a firing.

    Args:
        model: The user's model, in evaluation mode.
        context: Task and memo.
        tokens: The protocol of head scores.
        margin: Smallest excess that makes a role.

    Returns:
        Scores and roles.
    """
    found = scored(model, context, tokens)
    shape = found.main.scores["induction"].shape[1:]
    return found, roles_of(found, copied(model, context, shape), margin)


def roles_of(found: Scored, copying: Copied, margin: float) -> Roles:
    """Return the roles that head scores give.

    Args:
        found: Head scores on repeated tokens, with their controls.
        copying: Copying scores, with their null.
        margin: Smallest excess.

    Returns:
        The roles.
    """
    control = {} if found.control is None else found.control.scores
    excess, scores, uniform, matched = {}, {}, {}, {}
    for role, name in ROLES.items():
        score, null = found.main.scores[name].nanmean(0), found.main.nulls[name].nanmean(0)
        other = control[f"{name}_matched_null"].nanmean(0)
        beaten = torch.stack([above(score, null), above(score, other)])
        # NaN where either is: a head without a null has no role.
        excess[role] = beaten.amin(0)
        scores[role], uniform[role], matched[role] = score, null, other
    for role, sign in (("copying", 1.0), ("anti_copying", -1.0)):
        score = sign * copying.scores.to(found.main.scores["induction"])
        null, other = torch.zeros_like(score), copying.matched.to(score)
        excess[role] = torch.stack([above(score, null), above(score, other)]).amin(0)
        scores[role], uniform[role], matched[role] = score, null, other
    reasons = {role: _reason(role, copying) for role, v in excess.items() if v.isnan().all()}
    modules = tuple(found.main.modules)
    return Roles(excess, scores, uniform, matched, margin, modules, reasons, copying.approximate)


def _reason(role: str, copying: Copied) -> str:
    if role in ROLES:
        return "no query has a target within reach of the mask"
    return copying.reason


def above(score: Tensor, null: Tensor) -> Tensor:
    """Return (score − null) / (1 − null).

    Args:
        score: A score of at most 1.
        null: Its null, the same shape.

    Returns:
        The excess; NaN where either is not finite.
    """
    # Where the null is 1 already nothing can be shown: the score cannot be above it.
    room = 1 - null
    return torch.where(room > 1e-6, (score - null) / room.clamp(min=1e-6), 0.0).where(
        null.isfinite() & score.isfinite(), torch.nan
    )


def _check_margin(margin: float) -> None:
    if isinstance(margin, bool) or not 0 < margin <= 1:
        raise ArgumentError.of(
            "margin", expected="a number in (0, 1]", got=repr(margin), do="The default is 0.3."
        )


@dataclass(frozen=True)
class HeadRoles:
    """Roles of heads, on repeated random tokens and by their weights; see `head_roles`.

    Panels over (layer, head), one for each role, of the excess over both nulls,
    min (score − null) / (1 − null); the heads that have the role stand in the convention. Scalars
    ``<role>_heads``: how many have it. Roles are ``induction``, ``previous_token``,
    ``duplicate_token``, ``current_token``, ``sink``, ``copying`` and ``anti_copying``.

    Args:
        name: First part of the records' names.
        tokens: The protocol; the default shares its forward passes with `HeadScores`.
        margin: Smallest excess that makes a role.

    Raises:
        ArgumentError: If the margin is out of range.

    Example:
        >>> HeadRoles().margin
        0.3
    """

    name: str = "head_roles"
    tokens: RepeatedTokens = field(default_factory=RepeatedTokens)
    margin: float = MARGIN

    def __post_init__(self) -> None:
        """Check the margin."""
        _check_margin(self.margin)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        found, roles = shared_roles(model, context, self.tokens, self.margin)
        panels: dict[str, Panel] = {}
        for role in roles.excess:
            panels[role] = _panel(role, roles, found)
            panels[f"{role}_heads"] = scalar(
                float(len(roles.heads(role))),
                what=f"heads called {role}",
                margin=self.margin,
                display={"scalar": f"{role}_heads"},
            )
        return panels


def _panel(role: str, roles: Roles, found: Scored) -> Panel:
    values = roles.excess[role]
    uniform = "uniform over the real mask" if role in ROLES else "0, a random head's"
    about = {
        **(found.convention if role in ROLES else {}),
        "what": "min over both nulls of (score - null) / (1 - null)",
        "score": ROLES.get(role, COPYING),
        "null": f"{uniform}, and matched: {MATCHED[role]}",
        "margin": roles.margin,
        "heads": [str(h) for h in roles.heads(role)],
        "modules": roles.modules,
        "display": {},
    }
    if role in roles.reasons:
        about["reason"] = roles.reasons[role]
    if role not in ROLES and roles.approximate:
        about["approximate"] = roles.approximate
    coords = {"layer": range(values.shape[0]), "head": range(values.shape[1])}
    return Panel(values, ("layer", "head"), coords, "1", about)
