"""The states of a run, from its checkpoints, for TracInCP and SOURCE."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints import Checkpoint, content_of, find_checkpoints, load_weights, step_of
from ..errors import ArgumentError
from ..isolation import unwrapped
from ..progress import track
from .trajectory_rates import Rates, saved_rates

__all__ = ["State", "states_of"]


@dataclass(frozen=True, eq=False)
class State:
    """A model as it was at one step.

    Args:
        step: Optimizer steps taken.
        model: A copy of the model, with the weights of that step.
        rates: Learning rate of each parameter at that step, by name.
        momentum: Of SGD; 0 where there is none.
        adaptive: Whether the optimizer scales its steps as Adam does.
    """

    step: int
    model: nn.Module
    rates: Rates
    momentum: float = 0.0
    adaptive: bool = False


def states_of(
    checkpoints: Any,
    like: nn.Module | None,
    *,
    learning_rates: float | Rates | None = None,
    adam: bool = False,
) -> Iterator[State]:
    """Load checkpoints one after the other, the earliest first.

    Args:
        checkpoints: A folder, a file, or a list of files.
        like: A model of that architecture; it is copied.
        learning_rates: Of all checkpoints; None takes those that were really used: what our
            callbacks kept in the checkpoint, else what its optimizer states say.
        adam: Divide by Adam's √v̂ + ε, entry by entry.

    Yields:
        The states; each model is its own copy.

    Raises:
        ArgumentError: If there is no model, or no learning rate is known.
    """
    if not isinstance(like, nn.Module):
        raise ArgumentError.of(
            "like",
            expected="a model of the architecture that was saved",
            got=type(like).__name__,
            do="Pass like=MyModel(…), with the arguments that it was trained with.",
        )
    plain = unwrapped(like)
    # Of each file the step comes first, and the rest when its turn has come: a run's weights may
    # not fit into memory all at once.
    files = sorted(find_checkpoints(checkpoints), key=step_of)
    for path in track(files, "influence along checkpoints"):
        content, model = content_of(path), copy.deepcopy(plain)
        state = Checkpoint.of(content, path)
        load_weights(model, state.weights, path)
        yield _state(state, path, model, learning_rates, adam, _optimizer_states(content))


def _state(
    state: Checkpoint,
    path: Path,
    model: nn.Module,
    given: float | Rates | None,
    adam: bool,
    optimizers: Sequence[Mapping[str, Any]],
) -> State:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [g for o in optimizers for g in o["param_groups"]]
    momentum = max((float(g.get("momentum") or 0.0) for g in groups), default=0.0)
    adaptive = any("exp_avg_sq" in kept for o in optimizers for kept in o["state"].values())
    rates: Rates
    if isinstance(given, Mapping):
        rates = given
    elif given is not None:
        rates = {n: float(given) for n in parameters}
    elif adam and optimizers:
        rates = saved_rates(optimizers, parameters, adam=True)
    elif state.learning_rates and not adam:
        rates = _fitting(state.learning_rates, parameters)
    elif optimizers and not adam:
        rates = saved_rates(optimizers, parameters, adam=False)
    else:
        raise ArgumentError.of(
            "learning_rates",
            expected="checkpoints that hold optimizer states"
            + ("" if adam else ", or that were saved beside one of our callbacks"),
            got=f"neither in {path.name!r}" if not adam else f"none in {path.name!r}",
            do="Pass learning_rates=0.1, or by name of the parameter.",
        )
    return State(state.step, model, rates, momentum, adaptive)


def _optimizer_states(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found = content.get("optimizer_states", ())
    return tuple(s for s in found if isinstance(s, Mapping) and "param_groups" in s)


def _fitting(rates: Mapping[str, float], parameters: Mapping[str, Tensor]) -> Mapping[str, float]:
    """Return rates by the model's own names, where a LightningModule saved them behind a prefix."""
    if set(parameters) <= set(rates):
        return rates
    found = {
        n: next((r for k, r in rates.items() if k.endswith(f".{n}")), None) for n in parameters
    }
    return {n: r for n, r in found.items() if r is not None}
