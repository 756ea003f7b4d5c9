"""TracIn: which examples push the model towards a query, summed along training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import counted
from ..errors import ArgumentError
from ..isolation import untouched
from ..measurement import Context, IndexedData
from ..record import Panel, Reading, Record
from ..series import named
from ..target import Loss, TargetOption
from .data import Candidates, as_indexed, chosen, chunks
from .objective import Objective, as_objective
from .paired import queries_in_factors
from .per_example import gradient_dots
from .point import Point, wide
from .queries import QueryLike, asked_data, orientation_of, queries_of, question_gradients
from .result import InfluenceScores
from .scores import shares_of_queries
from .shown import shown_panels
from .trajectory_checkpoints import State, states_of
from .trajectory_rates import RATES, Rates

__all__ = ["TracIn", "tracin", "tracin_sum"]

LOSS = Loss()
FIXED = 16
"""Example passes that each firing takes beside its examples: small batches to find the layers'
layout in, and the isolation of the model (measured on a small transformer)."""


def tracin(
    model: nn.Module | Any,
    objective: Objective,
    train: Any,
    queries: Any,
    *,
    like: nn.Module | None = None,
    each: Literal["once", "steps"] = "once",
    optimizer_aware: bool = False,
    learning_rates: Rates | None = None,
    query: QueryLike = LOSS,
    candidates: Candidates = None,
    seed: int = 0,
    shown: int = 5,
    batch_size: int | None = None,
) -> InfluenceScores:
    """Return TracIn (Pruthi et al. 2020) at one state of the model, or TracInCP over checkpoints.

    ``score[q, i] = Σ_p η_p ∇_p ℓᵢ · ∇_p L_q``, the first-order fall of the query's loss when SGD
    takes one step on example i alone; η_p is the learning rate of parameter p. Positive =
    proponent. Not divided by n. TracInCP is the sum over checkpoints, with the learning rates
    that were really used at each, and the query's gradient at each; with ``each="steps"`` a
    checkpoint counts (steps since the one before) / n times, about as often as a step was taken on
    the example, so that the sum estimates what the example did to the query's loss.

    Args:
        model: The model, which is left exactly as it was; or a folder or a list of checkpoints.
        objective: Losses; a Task is enough. Its regulariser plays no part.
        train: Map-style dataset (or `IndexedData`, or a DataLoader whose dataset is read).
        queries: Dataset of examples to ask about, each by itself.
        like: For checkpoints, a model of their architecture.
        each: What each checkpoint counts: ``"once"``, or ``"steps"``.
        optimizer_aware: For checkpoints, divide by Adam's √v̂ + ε, entry by entry, as its steps do.
        learning_rates: By parameter name, a number or a tensor shaped like it (`step_rates` gives
            what Adam makes of it); 1 for a parameter that is not in it. None takes, for
            checkpoints, what they hold.
        query: The scalar asked about; one of which more is better is negated.
        candidates: None for all, a number to draw, or dataset indices.
        seed: Of the draw.
        shown: Proponents and opponents of each query whose scores are split over tokens.
        batch_size: Examples run at once; the result does not depend on it.

    Returns:
        The scores.

    Raises:
        ArgumentError: If an argument cannot be used, or a dataset has no indices.
        ModelError: If no parameter is trainable.

    Example:
        >>> from lightning_mi import Regression
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> data = torch.utils.data.TensorDataset(x, 0 * x)
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> tracin(model, Objective(Regression()), data, data).values
        tensor([[ 4., 16.],
                [16., 64.]], dtype=torch.float64)
    """
    data, queried = as_indexed(train, "train"), asked_data(queries, query)
    indices = chosen(candidates, len(data), seed)
    goal = as_objective(objective)
    if not isinstance(model, nn.Module):
        _check_each(each)
        states = states_of(model, like, learning_rates=learning_rates, adam=optimizer_aware)
        return _along(states, goal, data, queried, indices, query, each, batch_size)
    with untouched(model) as plain:
        point = Point(plain)
        job = _Job(point, goal, data, indices, queried, query, shown, batch_size)
        found = job.scores(learning_rates or {})
    return dataclasses.replace(found, orientation=orientation_of(query))


def tracin_sum(records: Sequence[Record], *, name: str = "influence") -> list[Record]:
    """Return TracInCP, the running sum of TracIn's scores over steps; a Series.

    Args:
        records: Records of one run. Those of ``<name>/scores`` are used.
        name: Name of the TracIn measurement.

    Returns:
        A record ``<name>/sum`` at each step. Where candidates changed, the sum is over those that
        every step so far has.
    """
    found: list[Record] = []
    total: dict[int, Tensor] = {}
    for count, record in enumerate(named(records, f"{name}/scores"), 1):
        columns = record.panel.coords["train_example"]
        new = dict(zip(columns, record.panel.values.unbind(1), strict=True))
        total = new if count == 1 else {i: total[i] + new[i] for i in new if i in total}
        values = torch.stack(list(total.values()), 1) if total else record.panel.values[:, :0]
        convention = {**record.panel.convention, "sum_over_steps": count}
        panel = Panel(
            values, ("query", "train_example"), {"train_example": list(total)}, "1", convention
        )
        found.append(record.replace(name=f"{name}/sum", panel=panel))
    return found


@dataclass(frozen=True)
class TracIn:
    """Scores of training examples at each firing, with the learning rates then in force.

    Needs ``context.dataset``. Reading: ``scores`` [query, train_example] labelled by dataset index;
    ``proponents`` and ``opponents`` of the first query, highest and lowest scores first; for
    language models ``tokens`` [train_example, position], their scores split over tokens. Positive
    = proponent; units of the query's loss.

    Args:
        name: First part of the records' names.
        candidates: Training examples that are scored: None for all, a number, drawn once by
            ``seed`` whatever the step, or dataset indices.
        queries: How many examples of the batch are asked about, from its first on.
        query: The scalar asked about; None is the task's loss.
        top: Proponents and opponents that are shown.
        seed: Of the draw.
        batch_size: Examples run at once; None follows from their shape.
        optimizer_aware: Divide by Adam's √v̂ + ε, entry by entry, as its steps do; needs
            `lightning_mi.callbacks.InfluenceMonitor`, which sees the optimizer.

    Raises:
        ArgumentError: If a number is out of range.
    """

    name: str = "influence"
    candidates: Candidates = None
    queries: int = 1
    query: TargetOption | QueryLike = None
    top: int = 5
    seed: int = 0
    batch_size: int | None = None
    optimizer_aware: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        counted("queries", self.queries, 1)
        counted("top", self.top)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The model.
            context: Batch of queries, training data by index, learning rates by parameter name.

        Returns:
            The panels named above.
        """
        data = as_indexed(context.dataset, "dataset")
        goal, point = Objective(context.task), Point(model)
        queried = queries_of(context, self.query, self.queries)
        indices = chosen(self.candidates, len(data), self.seed)
        rates: Rates = context.learning_rates
        if self.optimizer_aware:
            rates = context.shared(RATES, _no_optimizer)
        job = _Job(
            point, goal, data, indices, queried, self.query, self.top, self.batch_size, split=1
        )
        result = job.scores(rates)
        result = dataclasses.replace(result, orientation=orientation_of(self.query))
        return {**result.reading(), **shown_panels(result, context, data, self.top)}

    def cost(self, available: int = 0) -> int:
        """Return what a firing costs, in forward and backward passes of one example.

        Args:
            available: Length of the dataset, counted where ``candidates`` is None.

        Returns:
            Candidates, queries, the shown examples (twice: they are differentiated twice) and
            `FIXED`. A pass here takes about 1.1 to 1.4 times a pass of training.
        """
        return firing_cost(self.candidates, self.queries, self.top, available)


def firing_cost(candidates: Candidates, queries: int, top: int, available: int) -> int:
    """Return what a measurement of all candidates costs, in passes of one example.

    Args:
        candidates: Training examples that are scored.
        queries: Examples that are asked about.
        top: Proponents and opponents that are shown.
        available: Length of the dataset, counted where ``candidates`` is None.

    Returns:
        Forward and backward passes.
    """
    many = available if candidates is None else candidates
    scored = many if isinstance(many, int) else len(many)
    return scored + queries + 2 * min(2 * top, scored) + FIXED


def _check_each(each: str) -> None:
    if each not in ("once", "steps"):
        raise ArgumentError.of(
            "each", expected='"once" or "steps"', got=repr(each), do="Choose one."
        )


def _along(
    states: Iterable[State],
    goal: Objective,
    data: IndexedData,
    queried: IndexedData | None,
    indices: list[int],
    query: QueryLike,
    each: str,
    batch_size: int | None,
) -> InfluenceScores:
    """Add up scores over the states of a run."""
    total: Tensor | None = None
    last, kept = 0, []
    found: InfluenceScores | None = None
    for state in states:
        weight = 1.0 if each == "once" else (state.step - last) / len(data)
        last = state.step
        with untouched(state.model) as plain:
            job = _Job(Point(plain), goal, data, indices, queried, query, 0, batch_size)
            found = job.scores(state.rates)
        total = found.values * weight + (0 if total is None else total)
        kept.append(
            {"step": state.step, "weight": weight, "learning_rate": found.details["learning_rate"]}
        )
    if found is None or total is None:
        raise ArgumentError.of(
            "checkpoints", expected="at least one checkpoint", got="none", do="Save some."
        )
    facts = {**found.details, "checkpoints": kept, "each": each}
    facts.pop("learning_rate")
    if each == "steps":
        facts["scale"] = "steps on the example: (steps since the last checkpoint) / n"
    return dataclasses.replace(
        found, values=total, details=facts, orientation=orientation_of(query), method="tracin"
    )


def _no_optimizer() -> Rates:
    raise ArgumentError.of(
        "optimizer_aware",
        expected="an optimizer whose state is known",
        got="none: this model is not being trained",
        do="Use InfluenceMonitor, or tracin(checkpoints, …) where they hold optimizer states.",
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """Scores at one state of the model: what `tracin` was asked for."""

    point: Point
    objective: Objective
    data: IndexedData
    indices: list[int]
    queried: IndexedData | None
    query: QueryLike
    shown: int
    batch_size: int | None
    split: int | None = None

    def scores(self, rates: Rates) -> InfluenceScores:
        """Return them, with learning rates by parameter name."""
        scale = _rates(self.point, rates)
        dots, gradients, known = self._dots(scale)
        values, tokens = dots.T, None
        if self.objective.next_token is not None and self.shown:
            tokens = shares_of_queries(
                self.point,
                self.objective,
                self.data,
                self.indices,
                values[: self.split],
                gradients()[: self.split] * scale,
                self.shown,
            )
        return InfluenceScores(
            values.cpu(),
            tuple(self.indices),
            len(self.data),
            "tracin",
            tokens,
            details={**_details(self.point, rates), **known},
        )

    def _dots(self, scale: Tensor) -> tuple[Tensor, Callable[[], Tensor], dict[str, Any]]:
        """Return products ``[example, query]``, the queries' gradients, and facts about these."""
        question = (self.point, self.objective, self.query, self.queried, self.batch_size)
        queries = queries_in_factors(*question)
        dots = None if queries is None else queries.dots(self._batches(), scale)
        if queries is not None and dots is not None:
            return dots, lambda: queries.whole, {}
        asked = question_gradients(*question)
        directions, losses = asked.gradients * scale, self.objective.example_losses
        dots = gradient_dots(self.point, losses, self._batches(), directions)
        return dots, lambda: asked.gradients, asked.known

    def _batches(self) -> Iterator[Any]:
        return chunks(self.data, self.indices, self.batch_size, self.point)


def _rates(point: Point, rates: Rates) -> Tensor:
    """Return the rate of each parameter ``[P]``, or of all of them ``[1]`` where it is one."""
    used = [rates.get(n, 1.0) for n in point.parameters]
    device, kind = point.device, wide(point.device)
    plain = [float(r) for r in used if not isinstance(r, Tensor)]
    if len(plain) == len(used) and len(set(plain)) == 1:
        return torch.tensor(plain[:1], device=device, dtype=kind)
    each = [
        torch.as_tensor(r, dtype=torch.float64).cpu().expand(p.shape).flatten()
        for r, p in zip(used, point.leaves, strict=True)
    ]
    return torch.cat(each).to(device=device, dtype=kind)


def _details(point: Point, rates: Rates) -> dict[str, Any]:
    used = [rates.get(n, 1.0) for n in point.parameters]
    tensors = [r for r in used if isinstance(r, Tensor)]
    ends = [float(r) for r in used if not isinstance(r, Tensor)]
    ends += [float(end) for r in tensors for end in (r.min(), r.max())]
    return {
        "learning_rate": [min(ends), max(ends)],
        "learning_rate_assumed_1": sum(n not in rates for n in point.parameters),
        "optimizer_aware": any(r.ndim > 0 for r in tensors),
        "scale": "not divided by n",
    }
