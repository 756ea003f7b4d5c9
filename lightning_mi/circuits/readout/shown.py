"""`Patterns`: entropy and sinks of all heads, and whole patterns of those that are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import cut
from ...errors import ArgumentError
from ...measurement import Context
from ...nodes import Head
from ...record import Panel, Reading
from .patterns import Attending, attention_patterns, heads_named, summary_of, top_attended

__all__ = ["Patterns"]


@dataclass(frozen=True)
class Patterns:
    """Attention on the measured batch: entropy, evenness, sink mass, and patterns on demand.

    Panels over (layer, head), means over queries from the third token of a document on, then over
    sequences: ``entropy`` of a row in nats; ``evenness``, the entropy over ln n with n keys within
    reach (0: one key, 1: all alike); ``sink_mass``, attention to the first token. For named heads,
    of the first example: ``attention`` over (head, query_position, key_position), and ``top`` over
    (head, query_position, token), the attention to the keys attended to most, whose texts and
    positions stand in the labels and the convention.

    Args:
        name: First part of the records' names.
        heads: Names of heads, such as ``L1H3``, whose whole patterns are kept.
        top: Number of keys kept for each query.

    Raises:
        ArgumentError: If a name is no head's, or ``top`` no positive number.

    Example:
        >>> Patterns(heads=("L0H1",)).top
        3
    """

    name: str = "patterns"
    heads: tuple[str, ...] = ()
    top: int = 3

    def __post_init__(self) -> None:
        """Check names and number."""
        # A lone name is one head, not a head for each of its letters.
        object.__setattr__(self, "heads", tuple(str(h) for h in heads_named(self.heads)))
        if isinstance(self.top, bool) or self.top < 1:
            raise ArgumentError.of(
                "top", expected="a positive int", got=repr(self.top), do="The default is 3."
            )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        with torch.no_grad():
            found = context.shared(
                "circuits.readout.summary",
                lambda: summary_of(model, context.task, context.batch),
            )
            panels = _summary_panels(found)
            if self.heads:
                one = cut(context.batch, 1)
                kept = attention_patterns(model, one, self.heads, task=context.task)
                texts = _texts(context, next(iter(kept.values())).shape[-1])
                panels |= _pattern_panels({h: p[0] for h, p in kept.items()}, self.top, texts)
        return panels


WHAT = {
    "entropy": ("nats", "entropy of a query's attention; 0: all on one key"),
    "evenness": ("1", "entropy / ln(keys within reach); 0: all on one key, 1: uniform"),
    "sink_mass": ("1", "attention to the first token of the document"),
}


def _summary_panels(found: Attending) -> dict[str, Panel]:
    panels = {}
    for name, (unit, what) in WHAT.items():
        values: Tensor = getattr(found, name).nanmean(0)
        about: dict[str, Any] = {"what": what, "modules": found.modules}
        about["mean_over"] = "queries from the third token of a document on, then sequences"
        about["display"] = {"ranks": 1} if name == "sink_mass" else {}
        if bool(values.isnan().all()):
            about["reason"] = "no sequence has three tokens"
        coords = {"layer": range(values.shape[0]), "head": range(values.shape[1])}
        panels[name] = Panel(values, ("layer", "head"), coords, unit, about)
    return panels


def _texts(context: Context, length: int) -> list[str]:
    """Return the text of each position of the first example, or its number."""
    inputs = context.task.inputs(context.batch)
    if inputs.is_floating_point() or inputs.ndim != 2 or inputs.shape[1] != length:
        return [str(i) for i in range(length)]
    return context.texts(inputs[0].tolist())


def _pattern_panels(kept: dict[Head, Tensor], top: int, texts: list[str]) -> dict[str, Panel]:
    whole = torch.stack(list(kept.values()))
    values, keys = top_attended(whole, top)
    names = [str(head) for head in kept]
    rows = texts if whole.shape[1] == len(texts) else [str(i) for i in range(whole.shape[1])]
    labels = [[[texts[k] for k in row] for row in head] for head in keys.tolist()]
    about = {"what": "attention from each query to each key", "example": 0, "display": {}}
    best = {"what": "attention to the keys attended to most", "key_positions": keys.tolist()}
    return {
        "attention": Panel(
            whole,
            ("head", "query_position", "key_position"),
            {"head": names, "query_position": rows, "key_position": texts},
            "1",
            about,
        ),
        "top": Panel(
            values,
            ("head", "query_position", "token"),
            {"head": names, "query_position": rows, "head,query_position,token": labels},
            "1",
            {**about, **best},
        ),
    }
