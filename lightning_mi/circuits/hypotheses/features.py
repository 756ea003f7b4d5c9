"""Characteristics of the behavior, asked of the model and of a hypothesis' heads alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...behavior import Behavior
from ...nodes import Head
from ..causal import At, Value, intervene, mean
from ..causal.places import Part as Place
from ..characterisation.characterising import Characterised, asked_of, characterise_as
from .evidence import Line
from .subject import Part, Subject

__all__ = ["feature_line", "feature_lines"]


def feature_lines(subject: Subject, parts: Sequence[Part]) -> list[Line]:
    """Return a line for each characteristic, of the model and of some heads alone.

    Args:
        subject: Model and prompts.
        parts: The parts of the hypothesis. All heads that are not among them are cut (mean over
            corrupted prompts, of the eight that are run at once); MLPs and embeddings stay.

    Returns:
        The lines. Those of the model are claims; those of the heads alone are told without one.
    """
    ask = asked_of(subject.model, subject.task)
    found = characterise_as(subject.behavior, "model", ask)
    others = [head for head in subject.heads if head not in parts]
    kept = [part for part in parts if isinstance(part, Head)]
    lines = [feature_line(one, one.name, claimed=True) for one in found]
    if kept and others:

        def without(behavior: Behavior) -> Tensor:
            here = behavior.to(subject.context.device)
            gone: dict[Place | At, Value] = dict.fromkeys(others, mean(here))
            known, task = subject.anatomy, subject.task
            with torch.no_grad(), intervene(subject.model, gone, task=task, anatomy=known):
                return ask(here)

        alone = characterise_as(subject.behavior, "its heads alone", without)
        lines += [feature_line(one, f"{one.name}_alone", claimed=False) for one in alone]
    return lines


def feature_line(one: Characterised, key: str, *, claimed: bool) -> Line:
    """Return what came out of one characteristic as a line of evidence.

    Args:
        one: What came out.
        key: Short name of the line.
        claimed: Whether the hypothesis claims it; else it is told without a claim.

    Returns:
        The line.
    """
    told = ", ".join(f"{name} {value}" for name, value in one.values.items())
    return Line(
        "characterisation",
        one.whose,
        key,
        f"{one.statement} ({told})",
        float(one.holds) if one.reason is None else math.nan,
        1.0 if claimed else math.nan,
        holds=one.holds if claimed else None,
        unit="holds",
        reason=one.reason,
    )
