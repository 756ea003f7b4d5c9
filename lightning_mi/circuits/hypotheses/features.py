"""Characteristics of the behavior, asked of the model and of a hypothesis' heads alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...behavior import Behavior
from ...nodes import Head
from ...task import Task
from ..causal import At, Value, intervene, mean
from ..causal.places import Part as Place
from ..characterisation.characterising import Characterised, characterise_as
from .evidence import Line
from .subject import Part, Subject

__all__ = ["feature_lines"]


def feature_lines(subject: Subject, parts: Sequence[Part]) -> list[Line]:
    """Return a line for each characteristic, of the model and of some heads alone.

    Args:
        subject: Model and prompts.
        parts: The parts of the hypothesis. All heads that are not among them are cut (mean over
            corrupted prompts); MLPs and embeddings stay.

    Returns:
        The lines. Those of the model are claims; those of the heads alone are told without one.
    """
    found = characterise_as(subject.behavior, "model", _whole(subject))
    others = [head for head in subject.heads if head not in parts]
    kept = [part for part in parts if isinstance(part, Head)]
    lines = [_line(one, True) for one in found]
    if kept and others:
        alone = characterise_as(subject.behavior, "its heads alone", _alone(subject, others))
        lines += [_line(one, False) for one in alone]
    return lines


def _whole(subject: Subject) -> _Ask:
    return _Ask(subject, ())


def _alone(subject: Subject, others: Sequence[Head]) -> _Ask:
    return _Ask(subject, tuple(others))


class _Ask:
    """Returns the metric of clean prompts while some heads are cut."""

    def __init__(self, subject: Subject, cut: tuple[Head, ...]) -> None:
        self.subject, self.cut = subject, cut

    def __call__(self, behavior: Behavior) -> Tensor:
        """Ask."""
        subject = self.subject
        here = behavior.to(subject.context.device)
        task = subject.task or Task()
        with torch.no_grad():
            if not self.cut:
                return here.metric(task.outputs(subject.model, here.clean))
            gone: dict[Place | At, Value] = dict.fromkeys(self.cut, mean(here))
            with intervene(subject.model, gone, task=subject.task, anatomy=subject.anatomy):
                return here.metric(task.outputs(subject.model, here.clean))


def _line(one: Characterised, claimed: bool) -> Line:
    told = ", ".join(f"{name} {value}" for name, value in one.values.items())
    values = [abs(claim.difference.value) for claim in one.claims]
    return Line(
        "characterisation",
        one.whose,
        one.name if claimed else f"{one.name}_alone",
        f"{one.statement} ({told})",
        float(one.holds) if one.reason is None and values else math.nan,
        1.0 if claimed else math.nan,
        holds=one.holds if claimed else None,
        unit="holds",
        reason=one.reason,
    )
