"""What can be asked beside the loss of an example: scores of measurements, groups, tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..batch import batch_size, cut
from ..errors import ArgumentError
from ..measurement import Context, IndexedData, Measurement
from ..target import Loss, Target, TargetLike, as_target
from ..task import IGNORED
from .data import Singles, as_indexed, chunks, row
from .objective import Objective
from .per_example import mean_gradient
from .point import Point
from .queries_following import gradient_of_panel, measured
from .result import ORIENTATION, TURNED

__all__ = [
    "Group",
    "PerModule",
    "PerToken",
    "QueryLike",
    "Question",
    "RandomDirections",
    "Score",
    "as_question",
    "asked_data",
    "described",
    "orientation_of",
    "queries_of",
    "question_gradients",
    "required_data",
]


@dataclass(frozen=True, eq=False)
class Asked:
    """Gradients of what was asked.

    Args:
        gradients: ∇L_q of each row, ``[query, P]``, where less of L_q is better.
        labels: What each row is.
        facts: Plain JSON to be kept with the scores.
    """

    gradients: Tensor
    labels: list[str]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def known(self) -> dict[str, Any]:
        """What is kept with the scores."""
        return {**self.facts, "rows": self.labels} if self.labels else self.facts


@runtime_checkable
class Question(Protocol):
    """A query that is more than a scalar of one example's outputs."""

    @property
    def orientation(self) -> str:
        """What a positive score says."""

    @property
    def needs_data(self) -> bool:
        """Whether queries have to be given."""

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return the gradients.

        Args:
            point: The model, inside `untouched`.
            objective: Outputs and losses.
            data: The queries; None where there are none.
            size: Examples run at once.

        Returns:
            One row for each query.
        """


QueryLike: TypeAlias = TargetLike | Question | Sequence[Question]
"""A target, a question, or several questions."""


@dataclass(frozen=True, init=False)
class Score:
    """One number of a measurement, to ask which training examples made this head form.

    Positive = proponent: removing the training example would lower the score, to first order. The
    gradient is exact: the measurement runs once with gradients left on, and what comes out is
    compared with the plain value and with the slope measured along the gradient (two more runs).

    Args:
        measurement: What is measured, on ``queries`` as one batch (None where it needs none).
        panel: Which of its panels.
        **index: Which entry, by axis: its label, or its place where the axis has no labels.

    Example:
        >>> from lightning_mi.circuits import HeadScores
        >>> Score(HeadScores(), "induction", layer=1, head=0)
        Score(head_scores/induction[layer=1, head=0])
    """

    measurement: Measurement
    panel: str
    index: dict[str, int | str]

    def __init__(self, measurement: Measurement, panel: str, **index: int | str) -> None:
        # The index may be given as it is described in a recipe, too.
        given: Any = index.get("index") if list(index) == ["index"] else None
        object.__setattr__(self, "measurement", measurement)
        object.__setattr__(self, "panel", panel)
        object.__setattr__(self, "index", dict(given) if isinstance(given, dict) else index)
        if isinstance(measurement, type) or not isinstance(measurement, Measurement):
            raise ArgumentError.of(
                "measurement",
                expected="a measurement, with a name and callable with (model, context)",
                got=repr(measurement)[:60],
                do='For example Score(HeadScores(), "induction", layer=1, head=0).',
            )

    def __repr__(self) -> str:
        """Return name, panel and entry."""
        return f"Score({self.label})"

    @property
    def label(self) -> str:
        """``"measurement/panel[axis=entry]"``."""
        where = ", ".join(f"{axis}={entry}" for axis, entry in self.index.items())
        return f"{self.measurement.name}/{self.panel}" + (f"[{where}]" if where else "")

    @property
    def orientation(self) -> str:
        """What a positive score says."""
        return f"positive = proponent: removing the example would lower {self.label}"

    @property
    def needs_data(self) -> bool:
        """Queries may be None."""
        return False

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return −∇ score.

        Args:
            point: The model, inside `untouched`.
            objective: Its task is the measurement's.
            data: What is measured on; None where the measurement needs nothing.
            size: Not used: it is one batch.

        Returns:
            One row.
        """
        batch = None
        if data is not None:
            (batch,) = chunks(data, range(len(data)), len(data), point)
        task = objective.own_task

        def value(at: Point) -> Tensor:
            return measured(at, self.measurement, self.panel, self.index, batch, task)

        number, gradient, error = gradient_of_panel(point, value, self.label)
        facts = {"measured": number, "slope_error": error}
        return Asked(-gradient[None], [self.label], facts)


@dataclass(frozen=True)
class Group:
    """The mean of a query over groups of examples: one row for each group.

    Args:
        query: The scalar of each example; None is the loss.
        groups: Places in the queries; None takes all of them as one group.

    Raises:
        ArgumentError: If a group is empty.
    """

    query: TargetLike = None
    groups: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        """Refuse empty groups."""
        if self.groups is not None and (not len(self.groups) or not all(map(len, self.groups))):
            raise ArgumentError.of(
                "groups",
                expected="at least one group, each with an example",
                got=repr(self.groups)[:60],
                do="Leave it out to take all queries as one group.",
            )

    @property
    def orientation(self) -> str:
        """What a positive score says."""
        return f"{orientation_of(self.query)} (mean over the group)"

    @property
    def needs_data(self) -> bool:
        """Queries have to be given."""
        return True

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return the mean gradient of each group.

        Args:
            point: The model, inside `untouched`.
            objective: Outputs and losses.
            data: The queries.
            size: Examples run at once.

        Returns:
            One row for each group.
        """
        own = _required(data)
        groups = self.groups or [range(len(own))]
        query = objective.query(self.query)
        losses, rows = partial(objective.query_losses, query=query), []
        together = 1 if objective.asks_by_itself(query) else size
        for group in groups:
            _check_places(group, len(own))
            batches = chunks(own, [int(i) for i in group], together, point)
            rows.append(mean_gradient(point, losses, batches, 1 / len(group)))
        labels = [f"group {i} of {len(g)}" for i, g in enumerate(groups)]
        return Asked(torch.stack(rows), labels, {"query": repr(query)})


@dataclass(frozen=True)
class PerToken:
    """The loss of every next token of one example: one row for each.

    Args:
        example: Which of the queries.
    """

    example: int = 0

    @property
    def orientation(self) -> str:
        """What a positive score says."""
        return "positive = proponent: removing the example would raise this token's loss"

    @property
    def needs_data(self) -> bool:
        """Queries have to be given."""
        return True

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return the gradient of each token's loss.

        Args:
            point: The model, inside `untouched`.
            objective: Its task predicts tokens.
            data: The queries.
            size: Not used: one text is run.

        Returns:
            One row for each token that has a loss.

        Raises:
            ArgumentError: If the task predicts no tokens.
        """
        task, own = objective.next_token, _required(data)
        if task is None:
            raise ArgumentError.of(
                "query",
                expected="a task that predicts tokens for PerToken",
                got=type(objective.task).__name__,
                do="Use Objective(NextToken()).",
            )
        _check_places([self.example], len(own))
        (batch,) = chunks(own, [self.example], 1, point)
        known = (task.labels(batch)[0] != IGNORED).nonzero()[:, 0].tolist()

        def losses(model: Any, batch: Any) -> Tensor:
            return task.token_losses(task.outputs(model, batch), batch)[0]

        with torch.enable_grad():
            each = point.call(partial(losses, batch=batch))
            rows = [point.flat(point.gradient(each[t], retain_graph=True)) for t in known]
        targets = task.labels(batch)[0, known].tolist()
        labels = [f"position {t + 1}: token {y}" for t, y in zip(known, targets, strict=True)]
        return Asked(torch.stack(rows), labels, {"positions": known, "tokens": targets})


@dataclass(frozen=True)
class PerModule:
    """A query, seen through one module's parameters at a time: one row for each.

    The rows of a query add up to its score: influence is linear in the query's gradient.

    Args:
        query: What is asked about, also a `Question`.
        modules: Dotted names; None takes every module that has parameters of its own. What lies
            in none of them is a row of its own, called *rest*.
    """

    query: Any = None
    modules: Sequence[str] | None = None

    @property
    def orientation(self) -> str:
        """What a positive score says."""
        return f"{orientation_of(self.query)}, through the module's parameters"

    @property
    def needs_data(self) -> bool:
        """As the query inside."""
        return not isinstance(self.query, Question) or self.query.needs_data

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return the query's gradients, cut into modules.

        Args:
            point: The model, inside `untouched`.
            objective: Outputs and losses.
            data: The queries.
            size: Examples run at once.

        Returns:
            For each query one row for each module.
        """
        whole = question_gradients(point, objective, self.query, data, size)
        parts = self._parts(point)
        rows, labels = [], []
        asked = whole.labels or [f"query {i}" for i in range(len(whole.gradients))]
        for gradient, label in zip(whole.gradients, asked, strict=True):
            for name, mask in parts.items():
                rows.append(gradient * mask)
                labels.append(f"{label} through {name}")
        facts = {**whole.facts, "modules": list(parts)}
        return Asked(torch.stack(rows), labels, facts)

    def _parts(self, point: Point) -> dict[str, Tensor]:
        names = list(point.parameters)
        owners = self.modules
        if owners is None:
            owners = list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
        chosen = {n: next((m for m in owners if _inside(n, m)), "rest") for n in names}
        unknown = [m for m in owners if m not in chosen.values()]
        if unknown:
            raise ArgumentError.of(
                "modules",
                expected=f"modules with trainable parameters, such as {names[0]!r}'s",
                got=repr(unknown[0]),
                do="Take names of model.named_modules(); each parameter counts in the first.",
            )
        sizes = [p.numel() for p in point.leaves]
        order = [*owners, *(["rest"] if "rest" in chosen.values() else [])]
        return {
            owner: torch.cat(
                [
                    torch.full((k,), float(chosen[n] == owner), device=point.device)
                    for n, k in zip(names, sizes, strict=True)
                ]
            )
            for owner in order
        }


@dataclass(frozen=True)
class RandomDirections:
    """Queries that ask about nothing: random directions in parameter space, for a null band.

    Args:
        count: How many.
        seed: Of the draw, which touches no global generator.
    """

    count: int = 20
    seed: int = 0

    @property
    def orientation(self) -> str:
        """What a positive score says."""
        return "positive and negative mean nothing: a control"

    @property
    def needs_data(self) -> bool:
        """Nothing is measured."""
        return False

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return unit vectors.

        Args:
            point: The model, inside `untouched`.
            objective: Not used.
            data: Not used.
            size: Not used.

        Returns:
            One row for each direction.
        """
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(self.count, point.size, generator=generator, dtype=torch.float64)
        like = point.flat(point.leaves)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(like)
        return Asked(rows, [f"random direction {i}" for i in range(self.count)])


@dataclass(frozen=True)
class Several:
    """Several questions at once: the rows of all of them."""

    questions: tuple[Question, ...]

    @property
    def orientation(self) -> str:
        """What a positive score says, of the first."""
        each = list(dict.fromkeys(q.orientation for q in self.questions))
        return each[0] if len(each) == 1 else "; ".join(each)

    @property
    def needs_data(self) -> bool:
        """Whether one of them needs queries."""
        return any(q.needs_data for q in self.questions)

    def ask(
        self, point: Point, objective: Objective, data: IndexedData | None, size: int | None
    ) -> Asked:
        """Return the gradients of all.

        Args:
            point: The model, inside `untouched`.
            objective: Outputs and losses.
            data: The queries.
            size: Examples run at once.

        Returns:
            All rows.
        """
        found = [q.ask(point, objective, data, size) for q in self.questions]
        facts: dict[str, Any] = {}
        for asked in found:
            for key, fact in asked.facts.items():
                facts.setdefault(key, []).append(fact)
        gradients = torch.cat([asked.gradients for asked in found])
        return Asked(gradients, [label for asked in found for label in asked.labels], facts)


def as_question(query: Any) -> Question | None:
    """Return a question, or None where the query is a target of each example.

    Args:
        query: Anything that may be asked.

    Returns:
        The question.

    Raises:
        ArgumentError: If it is a list of other things.
    """
    if isinstance(query, list | tuple):
        if query and all(isinstance(q, Question) for q in query):
            return query[0] if len(query) == 1 else Several(tuple(query))
        raise ArgumentError.of(
            "query",
            expected="one target, or a list of questions such as Score(…)",
            got=repr(query)[:60],
            do='For example [Score(HeadScores(), "induction", layer=1, head=0)].',
        )
    # A protocol is asked last, because that takes long, and targets come more often.
    asks = hasattr(query, "ask") and isinstance(query, Question) and not isinstance(query, type)
    return query if asks else None


def asked_data(queries: Any, query: Any) -> IndexedData | None:
    """Return the queries by index; None where none are given and none are needed.

    Args:
        queries: What the user gave.
        query: What is asked about.

    Returns:
        The queries.
    """
    question = as_question(query)
    if queries is None and question is not None and not question.needs_data:
        return None
    return as_indexed(queries, "queries")


def queries_of(context: Context, query: Any, count: int) -> IndexedData | None:
    """Return what a measurement asks about: examples of the measured batch.

    Args:
        context: Holds the batch, if there is one.
        query: What is asked about.
        count: How many examples at most, where each is a query.

    Returns:
        Single examples for a target, the whole batch for a question; None where there is no batch
        and none is needed.
    """
    question = as_question(query)
    if question is None:
        batch = cut(context.batch, count)
        return Singles([row(batch, i) for i in range(batch_size(batch))])
    if not context.has_batch and not question.needs_data:
        return None
    return _Rows(context.batch)


class _Rows(IndexedData):
    """The examples of one batch, which are put together again as they were."""

    def __init__(self, batch: Any) -> None:
        self._whole = batch
        super().__init__(range(batch_size(batch)), self._picked)

    def _picked(self, places: list[int]) -> Any:
        if places == list(range(len(self.dataset))):
            return self._whole
        rows = [row(self._whole, i) for i in places]
        return rows[0] if len(rows) == 1 else _joined(rows, batch_size(self._whole))


def _joined(rows: list[Any], whole: int) -> Any:
    """Put batches of one together; what was not as long as the batch is the same in all."""
    first = rows[0]
    if isinstance(first, Mapping):
        return {k: _joined([r[k] for r in rows], whole) for k in first}
    if isinstance(first, Tensor):
        return torch.cat(rows) if first.ndim and len(first) == 1 and whole > 1 else first
    if isinstance(first, list | tuple) and any(isinstance(v, Tensor | Mapping) for v in first):
        return [_joined([r[i] for r in rows], whole) for i in range(len(first))]
    return [v for r in rows for v in r] if isinstance(first, list | tuple) else first


def question_gradients(
    point: Point, objective: Objective, query: Any, data: IndexedData | None, size: int | None
) -> Asked:
    """Return gradients of anything that may be asked.

    Args:
        point: The model, inside `untouched`.
        objective: Outputs and losses.
        query: A target, a question or several.
        data: The queries.
        size: Examples run at once.

    Returns:
        The gradients.
    """
    from .asking import asked_gradients

    question = as_question(query)
    if question is not None:
        return question.ask(point, objective, data, size)
    own = _required(data)
    found = asked_gradients(point, objective, objective.query(query), own, size)
    return Asked(found, [])


def required_data(data: IndexedData | None, query: Any) -> IndexedData:
    """Return queries for a solver that knows only losses of examples.

    Args:
        data: The queries.
        query: What is asked about.

    Returns:
        The queries.

    Raises:
        ArgumentError: If the query is anything else, which such a solver cannot be asked.
    """
    if as_question(query) is not None or not isinstance(_target(query), Loss):
        raise ArgumentError.of(
            "query",
            expected="the loss of single examples: influences(train_idxs, test_idxs) knows no more",
            got=repr(query)[:60],
            do='Use a solver of this package, for example solver="ekfac".',
        )
    return _required(data)


def orientation_of(query: Any) -> str:
    """Return what a positive score of a query says.

    Args:
        query: Anything that may be asked.

    Returns:
        A sentence.
    """
    question = as_question(query)
    if question is not None:
        return question.orientation
    return TURNED if _target(query).higher_is_better else ORIENTATION


def described(objective: Objective, query: Any) -> str:
    """Return a query in words.

    Args:
        objective: Its task is the query's.
        query: Anything that may be asked.

    Returns:
        The call that makes it.
    """
    question = as_question(query)
    return repr(objective.query(query) if question is None else question)


def _required(data: IndexedData | None) -> IndexedData:
    return as_indexed(data, "queries")


def _target(query: TargetLike) -> Target:
    return as_target(Loss() if query is None else query)


def _check_places(places: Sequence[int], size: int) -> None:
    wrong = [i for i in places if not 0 <= int(i) < size]
    if wrong:
        raise ArgumentError.of(
            "groups", expected=f"places from 0 to {size - 1}", got=wrong[0], do="Count from 0."
        )


def _inside(parameter: str, module: str) -> bool:
    return parameter == module or parameter.startswith(f"{module}.")
