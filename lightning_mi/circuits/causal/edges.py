"""Edge attribution: what each edge of the residual graph carries, from few passes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...attention.site import widened
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...checks import counted
from ...errors import ArgumentError, ModelError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Reading, scalar
from ...target import Rank
from ...task import Task
from .along import add_edges, add_own_edges, path_of
from .graph import Graph
from .scores import COINCIDE, Direction, EdgeScores, blank, coinciding
from .streams import Wiring
from .trimming import compared, trimmed

__all__ = [
    "COINCIDE",
    "Direction",
    "EdgeAttribution",
    "EdgeScores",
    "Variant",
    "blank",
    "check_edge_arguments",
    "coinciding",
    "edge_attribution",
    "refuse_rank",
    "wired",
]

Variant: TypeAlias = Literal["inputs", "activations"]


def wired(
    model: nn.Module, behavior: Behavior, task: Task | None, anatomy: Anatomy | None
) -> Wiring:
    """Return a model as a graph, ready to be run.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        behavior: What it is run on.
        task: How it is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The wiring.

    Raises:
        ModelError: If the model has no stream that is a sum of what its parts write, or diverged.
    """
    own = task or Task()
    with torch.no_grad():
        found = anatomy or Anatomy.of(model, behavior.clean, task=own)
        try:
            graph = Graph.of(found)
        except ModelError:
            if not bool(own.outputs(model, behavior.clean).isfinite().any()):
                raise ModelError(
                    "model: expected outputs that are numbers, got none that is finite: it has "
                    "diverged, and its parts cannot be told apart. Measure an earlier state."
                ) from None
            raise
    return Wiring(model, found, graph, own)


def edge_attribution(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    steps: int = 0,
    variant: Variant = "inputs",
    direction: Direction = "noise",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> EdgeScores:
    r"""Estimate what each edge of the residual graph does to a behaviour.

    For the edge from writer u to the input v, summed over positions and the stream's entries and
    averaged over examples,

    .. math:: (a_u^{corrupted} - a_u^{clean}) \cdot \partial m / \partial (\text{input of } v)

    with the gradient of the clean run (EAP, Syed et al. 2023), or its mean over ``steps`` points
    on the line between both (EAP-IG, Hanna et al. 2024; midpoint rule): *inputs* moves the
    embeddings and lets everything follow, *activations* moves the writer's own output and nothing
    else, one set of passes for each writer. Inputs lie before norms; queries, keys and values of a
    head are inputs of their own. The edges that leave a node add up to the node's own attribution;
    those that leave the embeddings add up, with many steps of *inputs*, to the whole change.

    Args:
        model: The user's model; it is left as it was.
        behavior: What is explained.
        steps: Points of the path; 0 takes the gradient of one run.
        variant: What is moved along the path.
        direction: ``"noise"`` as above; ``"denoise"`` exchanges the two runs.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The scores. NaN with a reason if the metric is the same on clean and corrupted prompts.

    Raises:
        ArgumentError: If an argument is out of range, or the target has no gradient.
        ModelError: If the model has no stream that is a sum of what its parts write.
    """
    own = as_behavior(behavior)
    check_edge_arguments(own, steps, variant, direction)
    with untouched(model) as plain, frozen(plain):
        wiring = wired(plain, own, task, anatomy)
        ends = (own.clean, own.corrupted)
        here, there = ends if direction == "noise" else ends[::-1]
        with torch.no_grad():
            base = wiring.see(here, reading=(own, 1))
            wiring.learn(base)
            base.sites.clear()  # Queries, keys and values of all layers: no more needed.
            other, delta, trim = compared(wiring, own, base, (here, there))
            first, second = (float(widened(own.metric(s.outputs)).mean()) for s in (base, other))
        clean, corrupted = (first, second) if direction == "noise" else (second, first)
        method = f"EAP-IG {variant}" if steps else "EAP"
        found = blank(wiring.graph, clean, corrupted, direction, method, steps, len(own))
        if found.reason is not None:
            return found
        if steps and variant == "activations":
            add_own_edges(found.values, wiring, own, here, base, other, delta, steps)
        else:
            path = path_of(wiring, own, base.returned, other.returned, steps) if steps else {}
            del base, other  # Streams of each part that reads or writes.
            late = delta[:, :, trim.start :].flatten(1)
            del delta
            inside = partial(trimmed, wiring, trim, max(steps, 1))
            add_edges(
                found.values, wiring, own, here, late, max(steps, 1), path, inside, trim.start
            )
    found.values.masked_fill_(~found.graph.lawful.to(found.values.device), math.nan)
    return dataclasses.replace(found, values=found.values.cpu(), found_on=own)


def check_edge_arguments(
    behavior: Behavior, steps: int, variant: str, direction: str, least: int = 0
) -> None:
    """Refuse arguments that are out of range.

    Args:
        behavior: What is explained.
        steps: Points of the path.
        variant: What is moved along it.
        direction: Which value is exchanged for which.
        least: Fewest points; 0 allows plain EAP.

    Raises:
        ArgumentError: If one is, or the target has no gradient.
    """
    check_path(steps, variant, direction, least)
    refuse_rank(behavior.question)


def check_path(steps: object, variant: str, direction: str, least: int = 0) -> None:
    """Refuse a path that there is not, which needs no prompts.

    Args:
        steps: Points of the path.
        variant: What is moved along it.
        direction: Which value is exchanged for which.
        least: Fewest points; 0 allows plain EAP.

    Raises:
        ArgumentError: If an argument is out of range.
    """
    counted("steps", steps, least, "A path needs a point." if least else "0 is plain EAP.")
    for name, value, allowed in (
        ("variant", variant, ("inputs", "activations")),
        ("direction", direction, ("noise", "denoise")),
    ):
        if value not in allowed:
            raise ArgumentError.of(
                name, expected=f"one of {allowed}", got=repr(value), do="Choose one."
            )
    if steps == 0 and variant == "activations":
        raise ArgumentError.of(
            "steps",
            expected="at least 1 for variant='activations', which moves along a path",
            got="0",
            do="Pass steps=5, or leave variant out: without a path there is one EAP.",
        )


def refuse_rank(question: object, do: str = "Choose LogitDifference.") -> None:
    """Refuse a target that moves in steps, before anything is run.

    Args:
        question: The target.
        do: What to do instead.

    Raises:
        ArgumentError: If it is a rank.
    """
    if isinstance(question, Rank):
        raise ArgumentError.of(
            "behavior",
            expected="a target with a gradient",
            got="Rank, which moves in steps",
            do=do,
        )


@dataclass(frozen=True)
class EdgeAttribution:
    """What each edge does to a behaviour; see `edge_attribution`.

    Panels: ``edges`` over (writer, reader) and ``nodes`` over (writer), in the metric's unit;
    scalars ``clean`` and ``corrupted``, the metric itself.

    Args:
        behavior: What is explained.
        name: First part of the records' names.
        steps: Points of the path; 0 is plain EAP.
        variant: ``"inputs"`` or ``"activations"``.
        direction: ``"noise"`` or ``"denoise"``.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from lightning_mi import Behavior
        >>> pair = Behavior(torch.tensor([[1, 2]]), torch.tensor([[3, 2]]))
        >>> EdgeAttribution(pair, steps=5).name
        'edge_attribution'
    """

    behavior: BehaviorLike
    name: str = "edge_attribution"
    steps: int = 0
    variant: Variant = "inputs"
    direction: Direction = "noise"

    def __post_init__(self) -> None:
        """Check the path, before a training begins."""
        check_path(self.steps, self.variant, self.direction)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            Names to panels.
        """
        own = as_behavior(self.behavior).to(context.device)
        found = edge_attribution(
            model,
            own,
            steps=self.steps,
            variant=self.variant,
            direction=self.direction,
            task=context.known_task,
            anatomy=shared_anatomy(model, context, own.clean),
        )
        return {
            **found.reading(),
            "clean": scalar(found.clean, "metric", what="the metric on clean prompts"),
            "corrupted": scalar(found.corrupted, "metric", what="the metric on corrupted prompts"),
        }
