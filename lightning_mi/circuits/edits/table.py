"""What an edit does to a behavior, to a control, to other text and to other spellings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...batch import attention_mask_of
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...behaviors.encoding import loaded
from ...isolation import untouched
from ...record import Panel, scalar
from ...target import Logit, LogProbability
from ...task import Task
from .edit import Edit
from .tokens import spellings

__all__ = ["EditRow", "EditTable", "edit_table"]


@dataclass(frozen=True)
class EditRow:
    """One number before and after.

    Args:
        what: What was measured.
        before: Without the edit.
        after: With it.
        unit: Of both.
    """

    what: str
    before: float
    after: float
    unit: str = "1"


@dataclass(frozen=True)
class EditTable:
    """An edit's effect.

    Args:
        edit: What the edit does, in words.
        rows: Behaviors before and after, then spellings.
        kl: KL(before ‖ after) on control text, nats a token, mean and largest; None without text.
    """

    edit: str
    rows: tuple[EditRow, ...]
    kl: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Return the table as text."""
        width = max(len(r.what) for r in self.rows)
        lines = [self.edit]
        lines += [f"{r.what:{width}}  {r.before:9.4f} → {r.after:9.4f} {r.unit}" for r in self.rows]
        if self.kl is not None:
            lines.append(
                f"KL on control text: {self.kl[0]:.4g} nats a token, {self.kl[1]:.4g} most"
            )
        return "\n".join(lines)

    def reading(self) -> dict[str, Panel]:
        """Return it as panels.

        Returns:
            ``before`` and ``after`` over ``feature``; ``kl`` where there was text.
        """
        names = [r.what for r in self.rows]
        made = {
            moment: Panel(
                torch.tensor([getattr(r, moment) for r in self.rows]),
                ("feature",),
                {"feature": names},
                convention={"what": f"{moment} the edit", "edit": self.edit, "null": None},
            )
            for moment in ("before", "after")
        }
        if self.kl is not None:
            made["kl"] = scalar(
                self.kl[0],
                "nats",
                what="KL(before || after) on control text, mean over tokens",
                sign="0: nothing changed there",
                null=0.0,
                edit=self.edit,
                most=self.kl[1],
            )
        return made


def edit_table(
    edit: Edit,
    behavior: BehaviorLike,
    control: BehaviorLike | None = None,
    *,
    text: Any = None,
    tokenizer: Any = None,
    variants: Sequence[int] = (),
    task: Task | None = None,
) -> EditTable:
    """Measure what an edit does, beside what it should leave alone.

    Args:
        edit: The edit, not in force; afterwards it is not in force either.
        behavior: What it is meant to change.
        control: What it should leave alone.
        text: A batch of other text: the KL divergence of all next-token distributions is taken.
        tokenizer: With it, other spellings of the edit's tokens (case, leading space) are found:
            whatever is suppressed or boosted may leak to them.
        variants: Further tokens to watch.
        task: How the model is called; None calls it with the batch.

    Returns:
        Metric and share correct on clean prompts, probabilities of the edit's tokens and of their
        spellings at the behavior's position, and the divergence.
    """
    chosen = [as_behavior(b) for b in (behavior, control) if b is not None]
    whose = ("", ", control")[: len(chosen)]
    how = task or Task()
    watched = _watched(edit, tokenizer, variants)
    sides: list[tuple[list[EditRow], Tensor | None]] = []
    for after in (False, True):
        if after:
            edit.apply()
        try:
            with untouched(edit.model) as plain, torch.no_grad():
                answered = [how.outputs(plain, b.clean) for b in chosen]
                told = zip(chosen, answered, whose, strict=True)
                rows = [row for b, outputs, w in told for row in _asked(b, outputs, w)]
                rows += _probabilities(chosen[0], answered[0], watched)
                logits = None if text is None else how.outputs(plain, text).float()
        finally:
            edit.revert()
        sides.append((rows, logits))
    (before, p), (later, q) = sides
    rows = [EditRow(a.what, a.before, b.before, a.unit) for a, b in zip(before, later, strict=True)]
    return EditTable(edit.name, tuple(rows), _divergence(p, q, text))


def _watched(edit: Edit, tokenizer: Any, variants: Sequence[int]) -> dict[int, str]:
    if tokenizer is not None:
        tokenizer = loaded(tokenizer)
    others = [] if tokenizer is None else [s for t in edit.tokens for s in spellings(tokenizer, t)]

    def shown(token: int) -> str:
        return str(token) if tokenizer is None else repr(tokenizer.decode([token]))

    found = {t: f"P({shown(t)}), edited" for t in edit.tokens}
    for token in (*others, *variants):
        found.setdefault(int(token), f"P({shown(int(token))}), spelled otherwise")
    return found


def _asked(behavior: Behavior, outputs: Tensor, whose: str) -> list[EditRow]:
    metric = float(behavior.metric(outputs).float().mean())
    name = f"{behavior.name}{whose}"
    rows = [EditRow(f"{name}: metric", metric, metric)]
    if behavior.margin is not None or behavior.answers is not None:
        right = float(behavior.correct(outputs).float().mean())
        rows.append(EditRow(f"{name}: correct", right, right, "share"))
    return rows


def _probabilities(behavior: Behavior, outputs: Tensor, watched: dict[int, str]) -> list[EditRow]:
    question = behavior.question
    position = question.position if isinstance(question, Logit) else -1
    found = []
    for token, name in watched.items():
        asked = LogProbability(token, position=position)
        p = float(asked(outputs, behavior.clean).float().exp().mean())
        found.append(EditRow(name, p, p, "probability"))
    return found


def _divergence(p: Tensor | None, q: Tensor | None, text: Any) -> tuple[float, float] | None:
    if p is None or q is None:
        return None
    a, b = p.log_softmax(-1), q.log_softmax(-1)
    gap = (a.exp() * (a - b)).sum(-1)
    mask = attention_mask_of(text)
    if mask is not None and mask.shape == gap.shape:
        gap = gap[mask.bool()]
    return float(gap.mean()), float(gap.max())
