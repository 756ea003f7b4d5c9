"""Characteristics of a behavior, asked of the model and of a circuit alone: `characterise`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...characteristic import Characteristic, Expectation
from ...errors import ArgumentError, LightningMIError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, Reading, scalar
from ...task import Task
from ..causal import Circuit, Estimate
from ..causal.bench import Ablation, on_bench
from ..causal.proportions import accuracy, accuracy_difference, difference
from .intervals import mean_of

__all__ = [
    "Asked",
    "Characterisation",
    "Characteristics",
    "Characterised",
    "Claim",
    "asked_of",
    "characterise",
    "characterise_as",
]

ROWS = 8
"""Prompts in one pass: memory does not grow with their number."""

Asked: TypeAlias = Callable[[Behavior], Tensor]
"""Returns the metric of a behavior's clean prompts ``[example]``."""


@dataclass(frozen=True)
class Claim:
    """One expectation, and what was found.

    Args:
        text: The expectation in words.
        difference: Left − right, with its 95 % interval.
        holds: Whether it came out as stated.
        certain: Whether it holds anywhere in the interval.
        refuted: Whether it holds nowhere in the interval.
    """

    text: str
    difference: Estimate
    holds: bool
    certain: bool
    refuted: bool

    def __str__(self) -> str:
        """Return it as a row."""
        sure = "for certain" if self.certain or self.refuted else "not for certain"
        verdict = "holds" if self.holds else "does not hold"
        return f"{self.text}: difference {self.difference}, {verdict}, {sure}"


@dataclass(frozen=True, eq=False)
class Characterised:
    """What came out of one characteristic.

    Args:
        name: Its name.
        statement: What it says.
        whose: ``"model"``, or who else was asked.
        values: By variant, with 95 % intervals: Wilson's for accuracies, the bootstrap's for
            metrics.
        claims: Its expectations.
        compares: ``"accuracy"`` or ``"metric"``.
        examples: By variant the number of prompts.
        reason: Why values are NaN.
    """

    name: str
    statement: str
    whose: str
    values: Mapping[str, Estimate]
    claims: tuple[Claim, ...]
    compares: str
    examples: Mapping[str, int]
    reason: str | None = None

    @property
    def holds(self) -> bool:
        """Whether all of it came out as stated; False where values are NaN."""
        return self.reason is None and all(claim.holds for claim in self.claims)

    def __str__(self) -> str:
        """Return it in words."""
        found = ", ".join(f"{name} {value}" for name, value in self.values.items())
        rows = [f"{self.name} ({self.whose}): {self.statement}", f"  {self.compares}: {found}"]
        if self.reason is not None:
            return "\n".join([rows[0], f"  undefined: {self.reason}"])
        return "\n".join([*rows, *(f"  {claim}" for claim in self.claims)])


@dataclass(frozen=True, eq=False)
class Characterisation:
    """Characteristics of a behavior, of the model and of what else was asked.

    Args:
        behavior: Name of the behavior.
        found: What came out, in order.
        convention: How it was measured, as plain JSON.
    """

    behavior: str
    found: tuple[Characterised, ...]
    convention: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str, whose: str = "model") -> Characterised:
        """Return one of them.

        Args:
            name: Name of a characteristic.
            whose: ``"model"`` or ``"circuit"``.

        Returns:
            What came out.

        Raises:
            ArgumentError: If it was not asked.
        """
        for one in self.found:
            if (one.name, one.whose) == (name, whose):
                return one
        raise ArgumentError.of(
            "name",
            expected=f"one of {[(one.name, one.whose) for one in self.found]}",
            got=repr((name, whose)),
            do="Choose one.",
        )

    def __str__(self) -> str:
        """Return all of them in words."""
        return "\n".join(map(str, self.found)) or f"{self.behavior} names no characteristics"

    def reading(self) -> dict[str, Panel]:
        """Return them as panels.

        Returns:
            For each characteristic ``<name>`` over ``feature`` (its variants) and ``<name>_holds``
            (1 or 0; NaN where undefined); for a circuit with ``circuit_`` in front.
        """
        made = {}
        for one in self.found:
            name = one.name if one.whose == "model" else f"{one.whose}_{one.name}"
            about = self._about(one)
            values = torch.tensor([value.value for value in one.values.values()])
            made[name] = Panel(
                values,
                ("feature",),
                {"feature": list(one.values)},
                "share right" if one.compares == "accuracy" else "metric",
                {**about, "display": {"picture": "bars"} if one.whose == "model" else {}},
            )
            holds = math.nan if one.reason else float(one.holds)
            about["what"] = f"whether it holds: {one.statement}"
            made[f"{name}_holds"] = scalar(holds, "1", **about, display={"scalar": f"{name}_holds"})
        return made

    def _about(self, one: Characterised) -> dict[str, Any]:
        about: dict[str, Any] = {
            **self.convention,
            "what": one.statement,
            "whose": one.whose,
            "behavior": self.behavior,
            "compares": one.compares,
            "low": _plain([value.low for value in one.values.values()]),
            "high": _plain([value.high for value in one.values.values()]),
            "examples": dict(one.examples),
            "claims": [str(claim) for claim in one.claims],
            "sign": "larger: right more often" if one.compares == "accuracy" else "as the metric",
            "null": None,
        }
        if one.reason is not None:
            about["reason"] = one.reason
        return about


def characterise(
    model: nn.Module,
    behavior: BehaviorLike,
    circuit: Circuit | None = None,
    *,
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    seed: int = 0,
) -> Characterisation:
    """Ask whether what a behavior is known for holds of the model, and of a circuit alone.

    A circuit can be faithful on the prompts it was found on and do another thing than the model: a
    characteristic (`lightning_mi.characteristic.Characteristic`) is a fact that was stated before.
    Each variant is run on its clean prompts.

    Args:
        model: The user's model; it is left as it was.
        behavior: A behavior that names characteristics, as those of `lightning_mi.behaviors` do.
        circuit: A circuit, run alone: all other edges are ablated.
        ablation: What these carry; see `lightning_mi.circuits.Circuit.run`. A mean is that over the
            prompts which are run at once, eight of a variant.
        task: How the model is called; None calls it with the batch.
        seed: Seed of the bootstrap.

    Returns:
        The characteristics. NaN with the reason where a circuit cannot be run on a variant.
    """
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        found = characterise_as(own, "model", asked_of(plain, task), seed=seed)
        if circuit is not None:
            found += characterise_as(own, "circuit", _of(circuit, plain, ablation, task), seed=seed)
    about: dict[str, Any] = {"interval": "95 %", "seed": seed}
    if circuit is not None:
        about |= {"ablation": ablation, "edges": len(circuit)}
    return Characterisation(own.name, found, about)


def characterise_as(
    behavior: Behavior, whose: str, ask: Asked, *, seed: int = 0
) -> tuple[Characterised, ...]:
    """Ask somebody about all characteristics of a behavior.

    Args:
        behavior: A behavior that names characteristics.
        whose: Who is asked.
        ask: Returns the metric of clean prompts.
        seed: Seed of the bootstrap.

    Returns:
        What came out, in order.
    """
    answered: dict[int, tuple[Tensor, str | None]] = {}
    return tuple(
        _characterised(one, whose, ask, answered, seed) for one in behavior.characteristics
    )


def _characterised(
    one: Characteristic,
    whose: str,
    ask: Asked,
    answered: dict[int, tuple[Tensor, str | None]],
    seed: int,
) -> Characterised:
    rows: dict[str, Tensor] = {}
    reason: str | None = None
    for name, variant in one.variants.items():
        if id(variant) not in answered:
            answered[id(variant)] = _answers(variant, one.compares, ask)
        rows[name], why = answered[id(variant)]
        reason = reason or why
    values = {name: _estimate(row, one.compares, seed) for name, row in rows.items()}
    claims = tuple(_claim(e, rows, values, one, seed) for e in one.expected)
    sizes = {name: len(row) for name, row in rows.items()}
    return Characterised(
        one.name, one.statement, whose, values, claims, one.compares, sizes, reason
    )


def _answers(variant: BehaviorLike, compares: str, ask: Asked) -> tuple[Tensor, str | None]:
    """Return 1 and 0 for right and wrong answers, or the metric, ``[example]``."""
    behavior = as_behavior(variant)
    by_answers = compares == "accuracy"
    asked = dataclasses.replace(behavior, target=behavior.rightness) if by_answers else behavior
    parts = []
    try:
        for start in range(0, len(asked), ROWS):
            chosen = range(start, min(start + ROWS, len(asked)))
            parts.append(ask(asked.select(chosen)).detach().float().cpu())
    except LightningMIError as error:
        return torch.full((len(asked),), math.nan), str(error)
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        return torch.full_like(found, math.nan), "what the model returns is not finite"
    return ((found > 0).float() if by_answers else found), None


def _estimate(values: Tensor, compares: str, seed: int) -> Estimate:
    if bool(values.isnan().any()):
        return Estimate(math.nan)
    return accuracy(values) if compares == "accuracy" else mean_of(values, seed=seed)


def _claim(
    expected: Expectation,
    rows: Mapping[str, Tensor],
    values: Mapping[str, Estimate],
    one: Characteristic,
    seed: int,
) -> Claim:
    found = _difference(expected, rows, values, one, seed)
    holds = expected.holds({name: value.value for name, value in values.items()})
    low, high, by = found.low, found.high, expected.by
    if expected.relation == "near":
        certain, refuted = -by <= low and high <= by, low > by or high < -by
    elif expected.relation == "above":
        certain, refuted = low > by, high <= by
    else:
        certain, refuted = -high > by, -low <= by
    return Claim(str(expected), found, holds, certain, refuted)


def _difference(
    expected: Expectation,
    rows: Mapping[str, Tensor],
    values: Mapping[str, Estimate],
    one: Characteristic,
    seed: int,
) -> Estimate:
    left, right = values[expected.left], expected.right
    if not isinstance(right, str):
        return Estimate(left.value - right, left.low - right, left.high - right)
    a, b = rows[expected.left], rows[right]
    if bool(a.isnan().any() or b.isnan().any()):
        return Estimate(math.nan)
    paired = one.paired and len(a) == len(b)
    if one.compares == "accuracy":
        return accuracy_difference(a, b, paired=paired)
    if paired:
        return mean_of(a - b, seed=seed)
    return difference(left, values[right])


def asked_of(model: nn.Module, task: Task | None) -> Asked:
    """Return the metric of a model, to be asked for characteristics.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        task: How it is called; None calls it with the batch.

    Returns:
        A function of a behavior, wherever its prompts are; without gradients.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))

    def ask(behavior: Behavior) -> Tensor:
        here = behavior.to(home)
        with torch.no_grad():
            return here.metric((task or Task()).outputs(model, here.clean))

    return ask


def _of(circuit: Circuit, model: nn.Module, ablation: Ablation, task: Task | None) -> Asked:
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    known: Anatomy | None = None

    def ask(behavior: Behavior) -> Tensor:
        nonlocal known
        here = behavior.to(home)
        with on_bench(model, here, ablation=ablation, task=task, anatomy=known) as bench:
            known = bench.wiring.anatomy  # That of all prompts: it is found once.
            live, where = circuit.laid(bench)
            return bench.metric(live[None], where)[0]

    return ask


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


@dataclass(frozen=True)
class Characteristics:
    """What a behavior is known for, of the model and of a circuit alone; see `characterise`.

    Panels, for each characteristic: ``<name>`` over ``feature``, the accuracy (or metric) of each
    variant, with 95 % intervals in the convention; ``<name>_holds``, 1 if all comparisons came out
    as stated. ``circuit_<name>`` and ``circuit_<name>_holds`` for the circuit alone.

    Args:
        behavior: A behavior that names characteristics.
        name: First part of the records' names.
        circuit: A circuit, or the file it was saved in.
        ablation: What edges outside the circuit carry.
    """

    behavior: BehaviorLike
    name: str = "characteristics"
    circuit: Circuit | str | None = None
    ablation: Ablation = "corrupted"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        circuit = Circuit.load(self.circuit) if isinstance(self.circuit, str) else self.circuit
        found = characterise(
            model, self.behavior, circuit, ablation=self.ablation, task=context.known_task
        )
        return found.reading()
