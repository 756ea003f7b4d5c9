"""Agreement between methods: do they name the same units?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...measurement import Context, Measurement
from ...record import Panel, Reading
from ...target import TargetLike, TargetOption
from ...task import Task
from ..drifting import Drift, chance_floor
from ..gradients import Saliency
from ..paths import IntegratedGradients
from ..result import Attribution
from ..spread import NO_SPREAD, mean_of
from .methods import Explanation, explained, matching, measured, method_name, task_for
from .ranking import alike, recency
from .stage import staged

__all__ = ["Agreement", "MethodAgreement", "agreement"]

STATISTICS = ("absolute", "spearman", "jaccard", "cosine")


@dataclass(frozen=True, eq=False)
class Agreement:
    """How similar the scores of several methods are; one entry for each pair and example.

    Args:
        pairs: Names of the two methods.
        found: Their `Drift`.
        recency: For tokens, the same of each method with the order by position alone, by name.
        floor: 95 % quantile of |Spearman| under random order.
        convention: What is needed to read the values.
    """

    pairs: tuple[tuple[str, str], ...]
    found: tuple[Drift, ...]
    recency: Mapping[str, Drift]
    floor: float
    convention: Mapping[str, Any] = field(default_factory=dict)

    def reading(self) -> Reading:
        """Return the panels that are recorded.

        Returns:
            ``pairs_absolute``, ``pairs_spearman``, ``pairs_jaccard`` and ``pairs_cosine``
            ``[edge, example]``, an edge being a pair of methods; their means ``absolute``,
            ``spearman``, ``jaccard`` and ``cosine``; for tokens ``recency``, the mean of
            ``absolute`` with the order by position alone.
        """
        first = self.found[0]
        chance = first.k / (2 * first.units - first.k)
        nulls = {"absolute": 0.0, "spearman": 0.0, "jaccard": chance, "cosine": None}
        panels: dict[str, Panel] = {}
        for what in STATISTICS:
            values = torch.stack([getattr(each, what) for each in self.found])
            said = {**self.convention, "k": first.k, "null": nulls[what], "floor": self.floor}
            panels[what] = mean_of(values.nanmean(0), what, sign="higher agrees more", **said)
            panels[f"pairs_{what}"] = self._of_pairs(values, {**said, "display": {}})
        if self.recency:
            alone = torch.stack([each.absolute for each in self.recency.values()]).nanmean(0)
            said = {"null": 0.0, "floor": self.floor, "methods": list(self.recency)}
            panels["recency"] = mean_of(alone, "recency", **self.convention, **said)
        return panels

    def _of_pairs(self, values: Tensor, said: Mapping[str, Any]) -> Panel:
        reason = {"reason": NO_SPREAD} if bool(values.isnan().any()) else {}
        labels = {"edge": [" – ".join(pair) for pair in self.pairs]}
        return Panel(values, ("edge", "example"), labels, "1", {**said, **reason})


def agreement(
    model: nn.Module,
    inputs: Any,
    methods: Mapping[str, Explanation] | Sequence[Explanation],
    target: TargetLike = None,
    *,
    k: int | None = None,
    task: Task | None = None,
) -> Agreement:
    """Compare the scores of every pair of methods over the units of each example.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        methods: At least two measurements, functions, or scores: by name, or with their own names.
        target: What all are asked; None leaves each its own.
        k: Number of units for the Jaccard index; None takes a tenth of them, rounded up.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Rank correlations (signed, and of absolute scores for methods whose sign means nothing),
        Jaccard index of the top k, and cosine. Where methods explain different numbers of
        examples, the first ones that all explain.

    Raises:
        ArgumentError: If there are fewer than two methods, or their shapes do not fit.

    Example:
        >>> from lightning_mi.attribution import integrated_gradients, saliency
        >>> both = {"saliency": saliency, "integrated_gradients": integrated_gradients}
        >>> model = nn.Linear(4, 2)
        >>> found = agreement(model, torch.ones(1, 4), both, target=1)
        >>> round(found.reading()["absolute"].item(), 6)
        1.0
    """
    named = (
        methods.items() if isinstance(methods, Mapping) else [(method_name(m), m) for m in methods]
    )
    _check([name for name, _ in named])
    scores = {n: explained(m, model, inputs, target, task) for n, m in named}
    size = min(len(_values(each)) for each in scores.values())
    batch = matching(inputs, torch.empty(size, 1))
    with staged(model, batch, _values(next(iter(scores.values())))[:size], target, task=task) as (
        stage,
        _,
    ):
        units = {n: stage.units(_values(each)[:size]) for n, each in scores.items()}
        alone = {n: alike(stage, u, recency(stage), k) for n, u in units.items()}
        pairs = tuple(itertools.combinations(units, 2))
        return Agreement(
            pairs=pairs,
            found=tuple(alike(stage, units[a], units[b], k) for a, b in pairs),
            recency=alone if stage.entry.is_tokens else {},
            floor=chance_floor(int(stage.free.sum(1).min())),
            convention={"statistics_over": "units of an example"},
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodAgreement:
    """`agreement` of attribution measurements on the measured batch.

    Records ``pairs_…`` ``[edge, example]`` and the means ``absolute``, ``spearman``, ``jaccard``,
    ``cosine`` and, for tokens, ``recency``.

    Args:
        methods: At least two attribution measurements of distinct names.
        name: First part of the records' names.
        target: What all are asked; None leaves each its own.
        k: Number of units for the Jaccard index.

    Raises:
        ArgumentError: If there are fewer than two methods, or two of one name.
    """

    methods: Sequence[Measurement] = (Saliency(), IntegratedGradients())
    name: str = "method_agreement"
    target: TargetOption | TargetLike = None
    k: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        _check([method.name for method in self.methods])

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            The agreement of all pairs.
        """
        scores = {m.name: measured(m, model, context, self.target) for m in self.methods}
        task = task_for(self.methods[0], context, model, self.target)
        found = agreement(model, context.batch, scores, self.target, k=self.k, task=task)
        return found.reading()


def _values(scores: Attribution | Tensor) -> Tensor:
    return scores.values if isinstance(scores, Attribution) else scores


def _check(names: Sequence[str]) -> None:
    if len(names) < 2 or len(set(names)) < len(names):
        raise ArgumentError.of(
            "methods",
            expected="at least two methods of distinct names",
            got=names,
            do="Pass for example [Saliency(), IntegratedGradients()].",
        )
