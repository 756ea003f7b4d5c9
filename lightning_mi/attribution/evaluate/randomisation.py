"""Sanity checks (Adebayo et al. 2018): do the scores depend on what the model has learned?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...checkpoints import Checkpoint, load_weights
from ...errors import ArgumentError, ModelError
from ...isolation import unwrapped
from ...measurement import Context, Measurement
from ...record import Panel, Reading
from ...target import TargetLike, TargetOption
from ...task import Task
from ..drifting import chance_floor
from ..result import Attribution
from ..spread import NO_SPREAD
from .judged import METHOD
from .methods import Method, explained, method_name, task_for
from .ranking import alike, beside_chance, check_counts, recency
from .renewal import layers_from_the_output, renewed
from .result import interval
from .stability import fixed
from .stage import Stage, staged

__all__ = [
    "ParameterRandomisation",
    "RandomLabelControl",
    "Randomisation",
    "parameter_randomisation",
    "random_label_control",
]

How: TypeAlias = Literal["cascade", "independent"]
"""Whether layers stay random while the next one becomes so."""


@dataclass(frozen=True, eq=False)
class Randomisation:
    """How similar the scores of a model and of a model that knows less are.

    Args:
        layers: What had been made random, in order; one entry for a model that was given.
        signed: Spearman correlation over the units of an example, ``[layer, example]``.
        absolute: The same of absolute scores.
        random: What ``absolute`` is for the scores in random order, mean over draws, ``[example]``.
        recency: For tokens, the correlation of absolute scores with the order by position alone,
            ``[layer, example]``: where it is high, scores that stay alike show position, no reason.
        recency_trained: The same of the trained model's scores, ``[example]``.
        floor: 95 % quantile of |Spearman| under random order: what is left by chance.
        convention: What is needed to read the values.
    """

    layers: tuple[str, ...]
    signed: Tensor
    absolute: Tensor
    random: Tensor | None
    recency: Tensor | None
    recency_trained: Tensor | None
    floor: float
    convention: Mapping[str, Any]

    def reading(self) -> Reading:
        """Return the panels that are recorded.

        Returns:
            ``signed`` and ``absolute`` ``[layer, example]``; the scalars ``final`` (mean absolute
            correlation with everything random), ``final_signed``, ``random`` and ``floor``; for
            tokens ``recency`` (of everything random) and ``recency_trained``.
        """
        said = {**self.convention, "sign": "lower is better", "null": 0.0, "floor": self.floor}
        axes, coords = ("layer", "example"), {"layer": self.layers}
        hidden = {**said, "display": {}, "statistic": "Spearman over units"}
        panels = {
            "signed": Panel(self.signed, axes, coords, "1", _explained(self.signed, hidden)),
            "absolute": Panel(
                self.absolute,
                axes,
                coords,
                "1",
                _explained(self.absolute, {**hidden, "of": "absolute scores"}),
            ),
        }
        scalars = {"final": self.absolute[-1], "final_signed": self.signed[-1]}
        if self.random is not None:
            scalars["random"] = self.random
        if self.recency is not None and self.recency_trained is not None:
            scalars |= {"recency": self.recency[-1], "recency_trained": self.recency_trained}
        for what, values in scalars.items():
            found = interval(values)
            shown = {
                **said,
                "n": found.n,
                "interval": [found.low, found.high],
                "display": {"scalar": what},
            }
            mean = torch.tensor(found.mean, dtype=torch.float64)
            panels[what] = Panel(mean, (), {}, "1", _explained(mean, shown))
        level = torch.tensor(self.floor, dtype=torch.float64)
        panels["floor"] = Panel(level, (), {}, "1", {**said, "display": {"scalar": "floor"}})
        return panels


def parameter_randomisation(
    model: nn.Module,
    inputs: Any,
    method: Method,
    target: TargetLike = None,
    *,
    how: How = "cascade",
    depth: int | None = None,
    draws: int = 20,
    seed: int = 0,
    task: Task | None = None,
) -> Randomisation:
    """Make a copy of the model random, layer by layer from the output down, and compare scores.

    A layer is a module with parameters of its own; their order is that of a forward pass. Each is
    drawn anew with its ``reset_parameters``; where it has none, the entries of each of its
    parameters are put in random order. The question stays that of the trained model. Scores that
    do not change do not depend on what was learned: they show edges, not reasons.

    Args:
        model: The model; left exactly as it was: a deep copy is changed.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        method: A method such as ``Saliency()`` or ``saliency``.
        target: What is asked; None takes the method's target.
        how: ``"cascade"`` keeps the layers above random, ``"independent"`` makes one layer at a
            time random.
        depth: Compare only after so many equal portions of the layers; None after every layer.
        draws: Number of random orders that the scores are compared with as well.
        seed: Of what is drawn.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Spearman correlations with the scores of the trained model, signed and absolute; of a
        method that passes they fall to about 0. Beside them those of random scores and, for tokens,
        of the order by position alone.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model cannot be copied, or has no parameters.
    """
    _check(how, depth)
    check_counts(seed=seed, draws=draws)
    with staged(model, inputs, method, target, follow="target", task=task) as (stage, scores):
        task, batch = stage.entry.task, stage.entry.batch
        original = stage.entry.model
        layers = layers_from_the_output(original, task, batch)
        if not layers:
            raise ModelError("model: expected parameters to make random, got none. Pass a model.")
        asked = _asked(stage, method, target)
        ends = _ends(len(layers), depth)
        changed, begin, found = _copied(original), 0, []
        for end in ends:
            if how == "independent":
                changed = _copied(original)
            for place in range(begin, end):
                renewed(changed.get_submodule(layers[place]), seed + place)
            begin = end
            found.append(_units(stage, explained(method, changed, batch, asked, task)))
        said = {"method": method_name(method), "how": how, "seed": seed, "draws": draws}
        names = [layers[end - 1] or "(model)" for end in ends]
        return _result(stage, _units(stage, scores), dict(zip(names, found, strict=True)), said)


def random_label_control(
    model: nn.Module,
    control: nn.Module,
    inputs: Any,
    method: Method,
    target: TargetLike = None,
    *,
    draws: int = 20,
    seed: int = 0,
    task: Task | None = None,
) -> Randomisation:
    """Compare the scores of a model with those of one that was trained on random labels.

    Training the second model is up to the user: the same architecture and data, labels shuffled,
    until it knows them by heart. Scores that are alike for both do not show what was learned about
    the labels.

    Args:
        model: The model; left exactly as it was.
        control: The model trained on random labels; left exactly as it was.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        method: A method such as ``Saliency()`` or ``saliency``.
        target: What both are asked; None takes the method's target.
        draws: Number of random orders that the scores are compared with as well.
        seed: Of their generator.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Spearman correlations, with one layer named ``"random labels"``, beside those of random
        scores and, for tokens, of the order by position alone.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    check_counts(seed=seed, draws=draws)
    with staged(model, inputs, method, target, follow="target", task=task) as (stage, scores):
        asked = _asked(stage, method, target)
        again = explained(method, control, stage.entry.batch, asked, stage.entry.task)
        said = {"method": method_name(method), "how": "random labels", "seed": seed, "draws": draws}
        found = {"random labels": _units(stage, again)}
        return _result(stage, _units(stage, scores), found, said)


@dataclass(frozen=True, eq=False, kw_only=True)
class ParameterRandomisation:
    """`parameter_randomisation` of a method on the measured batch.

    Records ``signed`` and ``absolute`` ``[layer, example]`` and the scalars ``final`` (mean
    absolute correlation with everything random), ``final_signed``, ``random``, ``floor`` and, for
    tokens, ``recency`` and ``recency_trained``.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        how: ``"cascade"`` or ``"independent"``.
        depth: Compare after so many equal portions of the layers.
        draws: Number of random orders that the scores are compared with as well.
        seed: Of what is drawn.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    method: Measurement | None = None
    name: str = "parameter_randomisation"
    target: TargetOption | TargetLike = None
    how: How = "cascade"
    depth: int | None = 4
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        _check(self.how, self.depth)
        check_counts(seed=self.seed, draws=self.draws)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            Correlations, and what chance leaves.
        """
        method = self.method or METHOD
        return parameter_randomisation(
            model,
            context.batch,
            method,
            self.target,
            how=self.how,
            depth=self.depth,
            draws=self.draws,
            seed=self.seed,
            task=task_for(method, context, model, self.target),
        ).reading()


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomLabelControl:
    """`random_label_control` of a method against weights that were trained on random labels.

    Records as for `ParameterRandomisation`.

    Args:
        checkpoint: File of the weights, of the same architecture.
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        draws: Number of random orders that the scores are compared with as well.
        seed: Of their generator.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    checkpoint: str
    method: Measurement | None = None
    name: str = "random_label_control"
    target: TargetOption | TargetLike = None
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        check_counts(seed=self.seed, draws=self.draws)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            Correlations, and what chance leaves.
        """
        control = _copied(unwrapped(model))
        state = Checkpoint.load(self.checkpoint)
        load_weights(control, state.weights, Path(self.checkpoint))
        method = self.method or METHOD
        task = task_for(method, context, model, self.target)
        return random_label_control(
            model,
            control,
            context.batch,
            method,
            self.target,
            draws=self.draws,
            seed=self.seed,
            task=task,
        ).reading()


def _asked(stage: Stage, method: Method, target: TargetLike) -> TargetLike:
    return fixed(stage.question, target if target is not None else getattr(method, "target", None))


def _units(stage: Stage, scores: Attribution | Tensor) -> Tensor:
    return stage.units(scores.values if isinstance(scores, Attribution) else scores)


def _result(
    stage: Stage, trained: Tensor, found: Mapping[str, Tensor], said: Mapping[str, Any]
) -> Randomisation:
    """Compare the scores of the trained model with those of others, with chance and position."""
    drifts = [alike(stage, trained, scores) for scores in found.values()]

    def like(scores: Tensor) -> Tensor:
        return alike(stage, trained, scores).absolute

    chance = beside_chance(stage, trained, said["draws"], said["seed"], like)
    position = None
    if stage.entry.is_tokens:
        order = recency(stage)
        position = torch.stack([alike(stage, each, order).absolute for each in found.values()])
    return Randomisation(
        layers=tuple(found),
        signed=torch.stack([each.spearman for each in drifts]),
        absolute=torch.stack([each.absolute for each in drifts]),
        random=torch.stack(chance["random"]).mean(0) if chance["random"] else None,
        recency=position,
        recency_trained=chance.get("recency"),
        floor=chance_floor(int(stage.free.sum(1).min())),
        convention=said,
    )


def _explained(values: Tensor, convention: Mapping[str, Any]) -> dict[str, Any]:
    undefined = {"reason": NO_SPREAD} if bool(values.isnan().any()) else {}
    return {**convention, **undefined}


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"model: expected a model that can be copied, got {str(error)[:200]}. Detach tensors "
            "that the model keeps as attributes."
        ) from error


def _ends(count: int, depth: int | None) -> list[int]:
    """Return after how many layers scores are compared, the last after all of them.

    Example:
        >>> _ends(10, 4)
        [3, 5, 8, 10]
    """
    depth = count if depth is None else min(depth, count)
    return [-(-count * k // depth) for k in range(1, depth + 1)]


def _check(how: str, depth: int | None) -> None:
    if how not in get_args(How):
        raise ArgumentError.of(
            "how", expected=f"one of {list(get_args(How))}", got=repr(how), do="Choose one."
        )
    if depth is not None:
        check_counts(depth=depth)
