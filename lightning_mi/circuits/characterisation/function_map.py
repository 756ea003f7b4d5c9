"""Where each function sits, over how many layers it spreads, and what heads do beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...behavior import BehaviorLike, as_behavior
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...nodes import Head
from ...record import Panel, Reading
from ...task import Task
from ..causal import activation_patching
from ..causal.edges import Direction
from ..readout.roles import shared_roles

__all__ = ["FUNCTIONS", "FunctionMap", "Functions", "effective_number", "function_map"]

FUNCTIONS = ("induction", "previous_token", "duplicate_token", "copying")
"""Functions that are read off head scores unless others are asked for."""

FLOOR = 0.05
"""Intensity below which a head is taken not to have a function: the luck of the best of many."""


def effective_number(shares: Tensor, dim: int = -1) -> Tensor:
    """Return exp(−Σ p log p) of shares p = x / Σx: how many there are, weighed by size.

    n equal ones give n, a single one 1 (Hill's number of order 1).

    Args:
        shares: Non-negative numbers, any shape.
        dim: The dimension they are shares along.

    Returns:
        The shape without that dimension; NaN where all are 0.

    Example:
        >>> effective_number(torch.tensor([2.0, 2.0, 0.0]))
        tensor(2.)
    """
    total = shares.sum(dim, keepdim=True)
    p = shares / total
    entropy = -torch.xlogy(p, p).sum(dim)
    return torch.where(total.squeeze(dim) > 0, entropy.exp(), math.nan)


@dataclass(frozen=True, eq=False)
class FunctionMap:
    """How strongly each head has each function.

    Args:
        intensity: By function ``[layer, head]``, 0 or more; NaN where a layer has fewer heads.
        floor: What is below it counts as 0 in the numbers.
        convention: How the intensities were found, by function.
        reasons: By function why there is nothing to say.
    """

    intensity: Mapping[str, Tensor]
    floor: float = FLOOR
    convention: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions."""
        return tuple(self.intensity)

    @property
    def values(self) -> Tensor:
        """All intensities above the floor, ``[function, layer, head]``; 0 below it."""
        every = torch.stack([v.float() for v in self.intensity.values()])
        return torch.where(every >= self.floor, every, 0.0).nan_to_num(0.0)

    @property
    def by_layer(self) -> Tensor:
        """Sum over the heads of a layer, ``[function, layer]``; NaN if a function is undefined."""
        unknown = torch.tensor([bool(v.isnan().all()) for v in self.intensity.values()])
        return self.values.sum(2).masked_fill(unknown[:, None], math.nan)

    @property
    def layers(self) -> Tensor:
        """Effective number of layers that a function spreads over ``[function]``: non-locality."""
        return effective_number(self.by_layer)

    @property
    def heads(self) -> Tensor:
        """Effective number of heads that a function spreads over ``[function]``."""
        return effective_number(self.values.flatten(1))

    @property
    def multiplexing(self) -> Tensor:
        """Effective number of functions that a head carries ``[layer, head]``; NaN without any."""
        return effective_number(self.values, 0)

    @property
    def layer_functions(self) -> Tensor:
        """Effective number of functions in a layer ``[layer]``; NaN without any."""
        return effective_number(self.values.sum(2), 0)

    def strongest(self, function: str) -> Head | None:
        """Return the head that has a function most.

        Args:
            function: Its name.

        Returns:
            The head; None where no head reaches the floor.

        Raises:
            ArgumentError: If there is no such function.
        """
        if function not in self.intensity:
            raise ArgumentError.of(
                "function",
                expected=f"one of {self.functions}",
                got=repr(function),
                do="Choose one.",
            )
        values = self.values[self.functions.index(function)]
        if not bool((values > 0).any()):
            return None
        at = int(values.argmax())
        return Head(at // values.shape[1], at % values.shape[1])

    def __str__(self) -> str:
        """Return a line for each function."""
        rows = []
        for name, layers, heads in zip(
            self.functions, self.layers.tolist(), self.heads.tolist(), strict=True
        ):
            best = self.strongest(name)
            if best is None:
                rows.append(
                    f"{name}: nowhere ({self.reasons.get(name, 'no head above the floor')})"
                )
            else:
                rows.append(f"{name}: {layers:.2f} layers, {heads:.2f} heads, most in {best}")
        return "\n".join(rows)

    def reading(self) -> dict[str, Panel]:
        """Return it as panels.

        Returns:
            One over (layer, head) for each function, ``by_layer`` over (feature, layer), ``layers``
            and ``heads`` over ``feature``, ``multiplexing`` over (layer, head) and
            ``layer_functions`` over ``layer``.
        """
        made = {}
        for name, values in self.intensity.items():
            about = {**self.convention.get(name, {}), "null": 0.0, "sign": "larger: more of it"}
            about |= {"what": about.get("what", f"intensity of {name}"), "floor": self.floor}
            if name in self.reasons:
                about["reason"] = self.reasons[name]
            elif bool(values.isnan().any()):
                about["reason"] = "NaN: there is no such head, or what it computes is not finite"
            made[name] = Panel(values, ("layer", "head"), unit="1", convention=about)
        names = {"feature": list(self.functions)}
        every = {"floor": self.floor, "null": None, "sign": "larger: spread wider"}
        why = "; ".join(
            f"{name}: {self.reasons[name]}" for name in names["feature"] if name in self.reasons
        )
        about = {**every, "what": "intensity summed over the heads of a layer", "display": {}}
        about |= {"reason": why} if why else {}
        made["by_layer"] = Panel(self.by_layer, ("feature", "layer"), names, "1", about)
        nothing = {"reason": why or "NaN: no head has the function at all"}
        for name, values in (("layers", self.layers), ("heads", self.heads)):
            about = {**every, "what": f"effective number of {name} that a function spreads over"}
            about |= {"formula": "exp of the entropy of its shares", "display": {"picture": "bars"}}
            about |= nothing if bool(values.isnan().any()) else {}
            made[name] = Panel(values, ("feature",), names, name, about)
        about = {**every, "what": "effective number of functions that a head carries"}
        about |= {"display": {"picture": "map"}, "reason": "NaN: the head has none of them"}
        made["multiplexing"] = Panel(
            self.multiplexing, ("layer", "head"), {}, "functions", {**about, "null": 1.0}
        )
        about |= {"what": "effective number of functions in a layer", "display": {}}
        made["layer_functions"] = Panel(self.layer_functions, ("layer",), {}, "functions", about)
        return made


def function_map(
    model: nn.Module,
    functions: Sequence[str] = FUNCTIONS,
    behaviors: Mapping[str, BehaviorLike] | None = None,
    *,
    direction: Direction = "noise",
    floor: float = FLOOR,
    tokens: RepeatedTokens | None = None,
    task: Task | None = None,
) -> FunctionMap:
    """Say where functions sit.

    The intensity of a function that is read off head scores is the excess over its nulls
    (`lightning_mi.circuits.head_roles`), cut at 0. That of a behavior is the share of its effect
    that patching the head's z carries (`lightning_mi.circuits.activation_patching`), its size.

    Args:
        model: Any transformer; it is left as it was.
        functions: Roles that head scores know.
        behaviors: Further functions by name: behaviors.
        direction: Of the patching.
        floor: Intensity below which a head is taken not to have the function.
        tokens: The protocol of head scores.
        task: How the model is called; None calls it with the batch.

    Returns:
        The map.

    Raises:
        ArgumentError: If a function is unknown, or there are none.
    """
    with untouched(model) as plain, frozen(plain):
        context = Context(plain, task=task)
        return _mapped(plain, context, functions, behaviors or {}, direction, floor, tokens)


def _mapped(
    model: nn.Module,
    context: Context,
    functions: Sequence[str],
    behaviors: Mapping[str, BehaviorLike],
    direction: Direction,
    floor: float,
    tokens: RepeatedTokens | None,
) -> FunctionMap:
    if not functions and not behaviors:
        raise ArgumentError.of(
            "functions", expected="one or more", got="none", do=f"For example {FUNCTIONS}."
        )
    intensity: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if functions:
        _add_roles(model, context, functions, tokens, intensity, about, reasons)
    for name, behavior in behaviors.items():
        panel = activation_patching(
            model,
            as_behavior(behavior).to(context.device),
            direction=direction,
            task=context.known_task,
        )
        intensity[name] = panel.values.abs()
        what = f"size of the share of {name} that the head's z carries"
        about[name] = {**panel.convention, "what": what}
        if "reason" in panel.convention:
            reasons[name] = str(panel.convention["reason"])
    return FunctionMap(intensity, floor, about, reasons)


def _add_roles(
    model: nn.Module,
    context: Context,
    functions: Sequence[str],
    tokens: RepeatedTokens | None,
    intensity: dict[str, Tensor],
    about: dict[str, Any],
    reasons: dict[str, str],
) -> None:
    with torch.no_grad():
        found, roles = shared_roles(model, context, tokens or RepeatedTokens())
    for name in functions:
        if name not in roles.excess:
            raise ArgumentError.of(
                "functions",
                expected=f"some of {list(roles.excess)}",
                got=repr(name),
                do="Pass behaviors={name: behavior} for others.",
            )
        intensity[name] = roles.excess[name].cpu().clamp(min=0)
        about[name] = {"what": f"excess of {name} over its nulls, cut at 0", **found.convention}
        if name in roles.reasons:
            reasons[name] = roles.reasons[name]


@dataclass(frozen=True)
class Functions:
    """Where functions sit, over how many layers they spread, how many a head carries.

    Panels: for each function its intensity over (layer, head); ``by_layer`` over (feature, layer);
    ``layers`` and ``heads`` over ``feature``, the effective number of layers (non-locality) and of
    heads that a function spreads over; ``multiplexing`` over (layer, head), the effective number of
    functions that a head carries, and ``layer_functions`` over ``layer``. See `function_map`.

    Args:
        name: First part of the records' names.
        functions: Roles that head scores know.
        behaviors: Further functions by name: behaviors.
        floor: Intensity below which a head is taken not to have the function.
        tokens: The protocol of head scores.
    """

    name: str = "functions"
    functions: Sequence[str] = FUNCTIONS
    behaviors: Mapping[str, BehaviorLike] = field(default_factory=dict)
    floor: float = FLOOR
    tokens: RepeatedTokens = field(default_factory=RepeatedTokens)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        with frozen(model):
            found = _mapped(
                model, context, self.functions, self.behaviors, "noise", self.floor, self.tokens
            )
        return found.reading()
