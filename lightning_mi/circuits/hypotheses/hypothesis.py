"""`CircuitHypothesis`: a circuit stated in advance, step by step, and tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...behavior import BehaviorLike, as_behavior
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...nodes import MLP, Head
from ...task import Task
from .connections import Carries, Composes, Overlaps
from .cuts import Removes
from .evidence import Evidence, Line
from .expectations import Attends, Copies, Looks, Prior, Scored, Writes
from .features import feature_lines
from .subject import Part, Subject, index_of

__all__ = ["CircuitHypothesis", "Step"]

Before: TypeAlias = Looks | Copies | Attends | Writes | Prior
Between: TypeAlias = Composes | Overlaps | Carries


@dataclass(frozen=True)
class Step:
    """One step of a circuit: what does it, what that looks like, and what its loss does.

    Args:
        name: What the step does, in a few words.
        kind: ``"head"`` or ``"mlp"``.
        prior: What each of its parts looks like: `Looks`, `Copies`, `Attends`, `Writes`. A part
            fits if it meets them all. Without any, every part of the kind fits.
        posterior: What happens when they are cut: `Removes`.
        connection: How it hangs together with earlier steps: `Composes`, `Overlaps`, `Carries`.
        at_most: Only so many parts, the best fitting ones; None takes all that fit.

    Raises:
        ArgumentError: If the kind has another name, or a step of MLPs has connections.
    """

    name: str
    kind: Literal["head", "mlp"] = "head"
    prior: tuple[Before, ...] = ()
    posterior: tuple[Removes, ...] = ()
    connection: tuple[Between, ...] = ()
    at_most: int | None = None

    def __post_init__(self) -> None:
        """Check the kind."""
        for name in ("prior", "posterior", "connection"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in ("head", "mlp"):
            raise ArgumentError.of(
                "kind", expected='"head" or "mlp"', got=repr(self.kind), do="Choose one."
            )
        if self.kind == "mlp" and self.connection:
            raise ArgumentError.of(
                "connection",
                expected="none for a step of MLPs, which have no weights to compose",
                got=f"{len(self.connection)}",
                do="State them for steps of heads.",
            )
        if self.at_most is not None and self.at_most < 1:
            raise ArgumentError.of(
                "at_most", expected="1 or more", got=self.at_most, do="Or pass None for all."
            )


@dataclass(frozen=True)
class CircuitHypothesis:
    """A circuit, stated before it is looked for.

    Each step says what its parts look like and what should happen without them. `test` finds the
    parts that fit, gathers evidence under four headings and ends in a verdict: *existence (prior)*,
    *existence (posterior)*, *connection*, *characterisation*.

    Args:
        name: How it is called.
        steps: The steps, in the order in which they run.
        tokens: The protocol of head scores; None takes the default one.
        characteristics: Whether the characteristics that the behavior names are asked of the model
            and of the model with these heads alone, all other heads cut. They are part of the
            verdict for the model, and told without a claim for its heads alone.

    Raises:
        ArgumentError: If there are no steps, two have one name, or one leans on a step that does
            not come before it.

    Example:
        >>> from lightning_mi.circuits import CircuitHypothesis, Looks, Removes, Step
        >>> look = Step("look back", prior=(Looks("previous_token"),), posterior=(Removes(0.5),))
        >>> CircuitHypothesis("look back", (look,)).steps[0].kind
        'head'
    """

    name: str
    steps: tuple[Step, ...] = ()
    tokens: RepeatedTokens | None = None
    characteristics: bool = True

    def __post_init__(self) -> None:
        """Check that steps lean on earlier ones alone."""
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise ArgumentError.of(
                "steps", expected="one or more", got="none", do="Say what the circuit does."
            )
        names: list[str] = []
        for step in self.steps:
            missing = [c.step for c in step.connection if c.step not in names]
            if step.name in names or missing:
                raise ArgumentError.of(
                    f"step {step.name!r}",
                    expected=f"a name of its own, and connections with earlier steps {names}",
                    got=f"connections with {missing}" if missing else "the name of another one",
                    do="Put steps in the order in which they run.",
                )
            names.append(step.name)

    def test(
        self,
        model: nn.Module,
        behavior: BehaviorLike,
        *,
        task: Task | None = None,
    ) -> Evidence:
        """Test it on a model.

        Args:
            model: The user's model; it is left as it was.
            behavior: Prompts and metric.
            task: How the model is called; None calls it with the batch.

        Returns:
            The evidence. Where the metric is the same on clean and corrupted prompts, what is cut
            has NaN with the reason, and the verdict is ``"not"``.
        """
        with untouched(model) as plain, frozen(plain):
            return self.gather(plain, behavior, Context(plain, task=task))

    def gather(self, model: nn.Module, behavior: BehaviorLike, context: Context) -> Evidence:
        """Gather evidence inside a measurement.

        Args:
            model: The module inside any wrapper, in evaluation mode.
            behavior: Prompts and metric.
            context: Task and shared results.

        Returns:
            The evidence.
        """
        prompts = as_behavior(behavior).to(context.device)
        subject = Subject(model, prompts, context, self.tokens or RepeatedTokens())
        lines: list[Line] = []
        parts: dict[str, tuple[Part, ...]] = {}
        fits: dict[str, Tensor] = {}
        for step in self.steps:
            parts[step.name], fits[step.name], found = _found(subject, step)
            lines += found
        every = tuple(p for own in parts.values() for p in own)
        for step in self.steps:
            own = parts[step.name]
            lines += [p.line(subject, step.name, own, every) for p in step.posterior]
        for step in self.steps:
            later = [h for h in parts[step.name] if isinstance(h, Head)]
            for link in step.connection:
                earlier = [h for h in parts[link.step] if isinstance(h, Head)]
                lines.append(link.line(subject, step.name, earlier, later))
        if self.characteristics:
            lines += feature_lines(subject, every)
        about = {"examples": len(prompts), "direction": "noise"}
        return Evidence(
            self.name,
            prompts.name,
            tuple(lines),
            parts,
            fits,
            subject.reason,
            convention=about,
        )


def _found(subject: Subject, step: Step) -> tuple[tuple[Part, ...], Tensor, list[Line]]:
    """Return the parts that fit a step, how well each fits, and a line for each expectation."""
    every: tuple[Part, ...] = subject.heads if step.kind == "head" else subject.mlps
    if not step.prior:
        return every, torch.zeros(0), []
    scores = [(prior, prior.score(subject, step.kind)) for prior in step.prior]
    fit = torch.stack([s.excess - p.margin for p, s in scores]).amin(0)
    fits = {p: float(fit[index_of(p)]) for p in every}
    order = sorted((p for p in every if fits[p] >= 0), key=fits.__getitem__, reverse=True)
    parts = tuple(order[: step.at_most])
    return parts, fit, [_line(step, parts, fit, p, s) for p, s in scores]


def _line(step: Step, parts: Sequence[Part], fit: Tensor, prior: Before, scores: Scored) -> Line:
    """Tell of the best fitting part: where none fits, of the one that comes nearest."""
    reason = scores.reason
    known = not bool(fit.isnan().all())
    if known:
        at = tuple(
            int(i) for i in (fit.nan_to_num(-math.inf) == fit[~fit.isnan()].max()).nonzero()[0]
        )
        value, null = float(scores.values[at]), float(scores.null[at])
        holds = float(scores.excess[at]) >= prior.margin
        nearest = str(Head(at[0], at[1]) if len(at) > 1 else MLP(at[0]))
    else:
        value, null, holds, nearest = math.nan, math.nan, False, ""
        reason = reason or "it cannot be measured in this model"
    names = tuple(map(str, parts)) or ((f"nearest: {nearest}",) if nearest else ())
    return Line(
        "existence (prior)",
        step.name,
        prior.key,
        prior.claim(),
        value,
        null + prior.margin * (1 - null) if known else prior.margin,
        null=null,
        holds=holds,
        components=names,
        reason=reason if not known else None,
    )
