"""Evaluations of influence at one state of the model, for sweeps over checkpoints and monitors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ArgumentError
from ...measurement import Context, Measurement
from ...record import Panel, Reading
from ..after_training import InfluenceFunction
from ..data import as_indexed
from ..objective import Objective
from ..queries import as_question, queries_of
from ..result import InfluenceScores
from ..solvers import Solver
from .lds import Subsets, lds
from .mislabel import mislabel_auc
from .tail_patch import tail_patch

__all__ = ["LinearDatamodelingScore", "MislabelDetection", "TailPatching"]


METHOD = InfluenceFunction(solver="ekfac", queries=32)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Judged(ABC):
    """Base of measurements that judge the scores of another.

    Args:
        method: `InfluenceFunction`, `TracIn`, or another measurement with ``scores`` over queries
            and training examples; None takes ``InfluenceFunction(solver="ekfac", queries=32)``.
    """

    method: Measurement | None = None

    @property
    def judged(self) -> Measurement:
        """The method."""
        return self.method or METHOD

    @abstractmethod
    def judge(self, model: nn.Module, context: Context, scores: InfluenceScores) -> Reading:
        """Judge the scores.

        Args:
            model: The user's model.
            context: Where they were made.
            scores: The scores.

        Returns:
            Panels.
        """

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch of queries, training data by index.

        Returns:
            The panels of the evaluation; each says which measurement made the scores, and how.
        """
        method = self.judged
        scores = scores_in(method, method(model, context))
        said = {"scores": method.name, "solver": scores.details.get("solver")}
        found = self.judge(model, context, scores)
        return {
            what: dataclasses.replace(panel, convention={**said, **panel.convention})
            for what, panel in found.items()
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearDatamodelingScore(_Judged):
    """`lds` of the scores of another measurement, against models that were trained again before.

    Over a sweep it shows when in training scores begin to foretell what other data would have
    given at the end. Records ``lds``, with its interval and ceiling, and ``values`` ``[query]``.

    Args:
        retrained: What `retrain_subsets` returned, or the file in which `Subsets.save` kept it. Its
            queries have to be the first examples of the measured batch.
        method: Gives the scores, of as many queries.
        name: First part of the records' names.
    """

    retrained: str | Path | Subsets
    name: str = "influence_lds"

    def judge(self, model: nn.Module, context: Context, scores: InfluenceScores) -> Reading:
        """Judge the scores.

        Args:
            model: The user's model.
            context: Where they were made.
            scores: The scores.

        Returns:
            The panels named above.
        """
        given = self.retrained
        known = given if isinstance(given, Subsets) else _read(Path(given))
        return lds(scores, known).reading()


@dataclass(frozen=True, eq=False, kw_only=True)
class TailPatching(_Judged):
    """`tail_patch` of the scores of another measurement: one step on each query's top proponents.

    Records ``fall`` and ``random`` ``[query]`` and ``margin``, with its interval.

    Args:
        method: Gives the scores; what it asks has to be a target, no question beyond one example.
        name: First part of the records' names.
        k: Examples in the step.
        learning_rate: Of the step; None takes the mean of those in force.
        seed: Of the random examples.
        batch_size: Examples run at once.
    """

    name: str = "tail_patch"
    k: int = 10
    learning_rate: float | None = None
    seed: int = 0
    batch_size: int | None = None

    def judge(self, model: nn.Module, context: Context, scores: InfluenceScores) -> Reading:
        """Judge the scores.

        Args:
            model: The user's model.
            context: Where they were made.
            scores: The scores.

        Returns:
            The panels named above.

        Raises:
            ArgumentError: If the method asks a question, or no learning rate is known.
        """
        asked = getattr(self.judged, "query", None)
        if as_question(asked) is not None:
            raise ArgumentError.of(
                "method",
                expected="one that asks a target of each example, such as Loss() or Margin()",
                got=repr(asked)[:60],
                do="What belongs to no example has no loss to patch.",
            )
        return tail_patch(
            model,
            Objective(context.task),
            context.dataset,
            queries_of(context, None, len(scores.values)),
            scores,
            k=self.k,
            learning_rate=self._rate(context),
            query=asked,
            seed=self.seed,
            batch_size=self.batch_size,
        ).reading()

    def _rate(self, context: Context) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        if not context.learning_rates:
            raise ArgumentError.of(
                "learning_rate",
                expected="a number where no learning rate is in force",
                got="none",
                do="For example TailPatching(learning_rate=0.1).",
            )
        return sum(context.learning_rates.values()) / len(context.learning_rates)


@dataclass(frozen=True, eq=False, kw_only=True)
class MislabelDetection:
    """`mislabel_auc` at one state: do wrong labels stand out by what examples do to themselves?

    Records the areas ``self_influence``, ``loss`` and ``gradient_norm``, with intervals, and the
    ``scores`` of self-influence.

    Args:
        wrong: Dataset indices of training examples whose label is known to be wrong.
        name: First part of the records' names.
        solver: See `self_influence`.
        damping: See there.
        regularizer: R(model), a function; None where training had none.
        batch_size: Examples run at once.
    """

    wrong: Sequence[int]
    name: str = "mislabel_auc"
    solver: str | Solver = "ekfac"
    damping: float = 0.01
    regularizer: Any = None
    batch_size: int | None = None

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task, and training data by index.

        Returns:
            The panels named above.
        """
        return mislabel_auc(
            model,
            Objective(context.task, regularizer=self.regularizer),
            as_indexed(context.dataset, "dataset"),
            self.wrong,
            solver=self.solver,
            damping=self.damping,
            batch_size=self.batch_size,
        ).reading()


def _read(path: Path) -> Subsets:
    """Return what a file holds, which a sweep asks for at every checkpoint."""
    try:
        found = path.stat()
    except OSError:
        return Subsets.load(path)  # It says what is wrong.
    return _loaded(path.absolute(), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _loaded(path: Path, changed: int, size: int) -> Subsets:
    return Subsets.load(path)


def scores_in(method: Measurement, reading: Reading) -> InfluenceScores:
    """Return the scores in what a measurement of influence recorded.

    Args:
        method: The measurement.
        reading: Its panels.

    Returns:
        The scores, without their shares of tokens.

    Raises:
        ArgumentError: If there are none.
    """
    panel = reading.get("scores")
    if not isinstance(panel, Panel) or panel.axes != ("query", "train_example"):
        raise ArgumentError.of(
            "method",
            expected="a measurement that records scores over query and train_example",
            got=f"{type(method).__name__} with {sorted(reading)}",
            do='For example InfluenceFunction(solver="ekfac", queries=32).',
        )
    said = panel.convention
    return InfluenceScores(
        panel.values.double(),
        tuple(int(i) for i in panel.coords["train_example"]),
        int(said["n"]),
        str(said["method"]),
        details=said,
        orientation=str(said["orientation"]),
    )
