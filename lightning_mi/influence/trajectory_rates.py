"""How far a step goes along a gradient: learning rates, and what Adam makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

__all__ = ["RATES", "Rates", "saved_rates", "step_rates"]

Rates: TypeAlias = Mapping[str, "float | Tensor"]
"""By parameter name a learning rate, or one for each of its numbers."""

RATES = ("influence", "step rates")
"""Where a monitor leaves what `step_rates` found in the context."""


def step_rates(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, Any]:
    """Return how far the next step goes along each gradient entry.

    For Adam and its kin η / (√v̂ + ε), with v̂ the bias-corrected mean of squared gradients of which
    the optimizer keeps count: to first order a gradient moves the parameters by that, spread over
    the steps that its momentum lasts. For every other optimizer the learning rate alone.

    Args:
        optimizers: Of the training.
        model: The model.

    Returns:
        By name of the parameter a float or a tensor shaped like it; parameters that no optimizer
        holds are left out.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> step_rates([torch.optim.SGD(model.parameters(), lr=0.5)], model)
        {'weight': 0.5, 'bias': 0.5}
    """
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in names:
                    found[names[id(p)]] = _rate(group, optimizer.state.get(p, {}))
    return found


def saved_rates(
    states: Sequence[Mapping[str, Any]], parameters: Mapping[str, Tensor], *, adam: bool
) -> dict[str, Any]:
    """Return the same from optimizer states that a checkpoint holds.

    Args:
        states: What ``optimizer.state_dict()`` gave, of each optimizer.
        parameters: Trainable parameters by name, in the model's order.
        adam: Whether to divide by √v̂ + ε; else learning rates alone.

    Returns:
        By name of the parameter.

    Raises:
        ArgumentError: If it cannot be told which state belongs to which parameter.
    """
    rows = [
        (place, group, state["state"].get(place, {}))
        for state in states
        for group in state["param_groups"]
        for place in group["params"]
    ]
    named = [n for s in states for g in s["param_groups"] for n in g.get("param_names", ())]
    names = named if len(named) == len(rows) else list(parameters)
    fits = len(names) == len(rows) and all(
        n in parameters and _shape(kept) in (None, parameters[n].shape)
        for n, (_, _, kept) in zip(names, rows, strict=True)
    )
    if not fits:
        raise ArgumentError.of(
            "checkpoints",
            expected="optimizer states of all trainable parameters, in the model's order",
            got=f"{len(rows)} states for {len(parameters)} parameters, or of other shapes",
            do="Give the optimizer named_parameters(), or pass learning_rates= yourself.",
        )
    return {
        n: _rate(group, kept if adam else {})
        for n, (_, group, kept) in zip(names, rows, strict=True)
    }


def _rate(group: Mapping[str, Any], kept: Mapping[str, Any]) -> float | Tensor:
    rate = float(group["lr"])
    squares = kept.get("max_exp_avg_sq") if group.get("amsgrad") else kept.get("exp_avg_sq")
    if not isinstance(squares, Tensor):
        return rate
    correction = 1 - float(group["betas"][1]) ** float(kept["step"])
    rates: Tensor = rate / ((squares.detach() / correction).sqrt() + float(group["eps"]))
    return rates


def _shape(kept: Mapping[str, Any]) -> torch.Size | None:
    squares = kept.get("exp_avg_sq")
    return squares.shape if isinstance(squares, Tensor) else None
