"""Influence functions (Koh & Liang 2017) at a trained model: `influence_scores`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..isolation import untouched
from ..measurement import IndexedData
from ..target import Loss
from .choosing import as_solver, damping_of
from .data import as_indexed, chosen, chunks, passes
from .factors import Eigens
from .objective import Objective, as_objective
from .paired import queries_in_factors
from .per_example import gradient_dots, mean_gradient
from .point import Point, wide
from .products import Curvature, CurvatureKind
from .queries import (
    QueryLike,
    asked_data,
    described,
    orientation_of,
    question_gradients,
    required_data,
)
from .result import InfluenceScores, TokenShares, extremes
from .solvers import APPROXIMATE, CONVERGED, Inverse, Solution, Solver, prepared
from .tokens import token_shares

__all__ = ["influence_scores"]

LOSS = Loss()
FINE = (CONVERGED, APPROXIMATE)
FAR = 0.1
"""‖∇J‖ beyond this part of the queries' mean gradient norm is called far from stationary."""


def influence_scores(
    model: nn.Module,
    objective: Objective,
    train: Any,
    queries: Any,
    *,
    query: QueryLike = LOSS,
    solver: str | Solver | Any = "cg",
    curvature: CurvatureKind = "gauss-newton",
    damping: float = 0.01,
    candidates: Sequence[int] | None = None,
    sample: int | None = None,
    seed: int = 0,
    shown: int = 5,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int = 2**30,
) -> InfluenceScores:
    """Estimate how much each query's loss would rise if a training example were removed.

    ``score[q, i] = +(1/n) (∇ℓᵢ + ∇R)ᵀ (H̄ + λI)⁻¹ ∇L_q ≈ L_q(without i) − L_q(with i)``, the number
    that torch-influence gives; H̄ is the curvature of the mean loss plus the regulariser. Positive
    = proponent. A query of which more is better is negated first, so that the sign always means
    the same. Query losses carry no regulariser. The formula assumes a minimum of J; how far the
    model is from one is in ``gradient_norm``.

    Args:
        model: The trained model; it is left exactly as it was.
        objective: What training minimised; a Task is enough where there was no regulariser.
        train: Map-style dataset of n training examples (or `IndexedData`, or a DataLoader whose
            dataset is then read in its own order).
        queries: Dataset of examples to ask about, each by itself; None where the question needs
            none.
        query: The scalar asked about, or a `Question`, for example
            ``Score(HeadScores(), "induction", layer=1, head=0)``; or several.
        solver: A name (``"exact"``, ``"cg"``, ``"ekfac"``, ``"kfac"``), a `Solver`, or an object
            with torch-influence's ``influences(train_idxs, test_idxs)``, which is then asked for
            the scores.
        curvature: ``"gauss-newton"`` or ``"hessian"``.
        damping: λ ≥ 0, added to the mean curvature.
        candidates: Dataset indices to score; None scores all.
        sample: Training examples that the curvature and ‖∇J‖ are averaged over, drawn with
            ``seed``; None takes all.
        seed: Of that draw.
        shown: Proponents and opponents of each query whose scores are split over tokens.
        batch_size: Examples run at once; the result does not depend on it.
        dtype: Compute in this type, for example ``torch.float64``; None keeps the model's own.
        memory_budget: Bytes of gradients that are kept in memory between passes over the data;
            what does not fit is kept in a folder for temporary files. Beside it one batch, the
            solver's matrices and the gradients of queries take memory.

    Returns:
        The scores.

    Raises:
        ArgumentError: If an argument cannot be used, or a dataset has no indices.
        ModelError: If no parameter is trainable.

    Warns:
        UserWarning: Where the model is far from stationary or a solve did not converge.

    Example:
        >>> from lightning_mi import Regression
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> data = torch.utils.data.TensorDataset(x, 3 * x)
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> influence_scores(model, Objective(Regression()), data, data).values.shape
        torch.Size([2, 2])
    """
    job = Job(
        as_objective(objective),
        as_indexed(train, "train"),
        asked_data(queries, query),
        query=query,
        solver=solver,
        curvature=curvature,
        damping=damping,
        candidates=candidates,
        sample=sample,
        seed=seed,
        shown=shown,
        batch_size=batch_size,
        dtype=dtype,
        memory_budget=memory_budget,
    )
    with untouched(model) as plain:
        result = job.run(plain)
    for message in doubts(result):
        warnings.warn(message, UserWarning, stacklevel=2)
    return result


@dataclass(frozen=True)
class Job:
    """The arguments of `influence_scores`, checked, and the steps of the computation."""

    objective: Objective
    train: IndexedData
    queries: IndexedData | None
    query: QueryLike = LOSS
    solver: Any = "cg"
    curvature: CurvatureKind = "gauss-newton"
    damping: float = 0.01
    candidates: Sequence[int] | int | None = None
    sample: int | None = None
    seed: int = 0
    shown: int = 5
    batch_size: int | None = None
    dtype: torch.dtype | None = None
    memory_budget: int = 2**30

    def __post_init__(self) -> None:
        """Refuse what cannot be used."""
        if self.curvature not in ("gauss-newton", "hessian"):
            raise ArgumentError.of(
                "curvature",
                expected='"gauss-newton" or "hessian"',
                got=repr(self.curvature),
                do="Gauss-Newton is positive semi-definite for the usual losses.",
            )
        if not self.damping >= 0:
            raise ArgumentError.of(
                "damping", expected="0 or more", got=self.damping, do="For example damping=0.01."
            )
        if not hasattr(self.solver, "influences"):
            as_solver(self.solver)

    def run(self, model: nn.Module) -> InfluenceScores:
        """Compute the scores.

        Args:
            model: The model, inside `untouched`.

        Returns:
            The scores.
        """
        indices = chosen(self.candidates, len(self.train), self.seed)
        if hasattr(self.solver, "influences"):
            return self._asked(indices)
        point = Point(model, self.dtype)
        sample = chosen(self.sample, len(self.train), self.seed)
        own = regularizer_gradient(point, self.objective)
        curvature = self.curvature_at(point, sample)
        solver = as_solver(self.solver)
        inverse = prepared(solver, curvature)
        solution, norms, facts = self._solved(point, inverse)
        scale = 1 / len(self.train)
        constants = (solution.vectors @ own.to(solution.vectors)).to(own) * scale
        dots, mean = self._dots(point, curvature, indices, sample, solution.vectors)
        values = dots.mul_(scale).T.add_(constants[:, None])
        return InfluenceScores(
            values.cpu(),
            tuple(indices),
            len(self.train),
            "influence function",
            shares_of_queries(
                point,
                self.objective,
                self.train,
                indices,
                values,
                (v * scale for v in solution.vectors),
                self.shown,
                constants.tolist(),
            ),
            solution.residual.cpu(),
            solution.stopped,
            float((mean + own).norm()),
            float(norms.mean()),
            *damping_of(solver, self.damping),
            details={
                **self._details(len(sample), solution),
                **facts,
            },
            orientation=orientation_of(self.query),
        )

    def _solved(self, point: Point, inverse: Inverse) -> tuple[Solution, Tensor, dict[str, Any]]:
        """Return the solution, the norms of the queries' gradients, and facts about the queries."""
        question = (point, self.objective, self.query, self.queries, self.batch_size)
        queries = queries_in_factors(*question) if isinstance(inverse, Eigens) else None
        if queries is not None and isinstance(inverse, Eigens):
            return *inverse.of(queries.pieces, queries.count, point.size), {}
        asked = question_gradients(*question)
        return inverse(asked.gradients), asked.gradients.norm(dim=1), asked.known

    def _dots(
        self,
        point: Point,
        curvature: Curvature,
        indices: list[int],
        sample: list[int],
        vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ∇ℓᵢ · v of the candidates, and the mean of ∇ℓᵢ over the sample."""
        known = curvature.known
        if indices == sample:
            if known is not None:
                dots, total = known.dots(vectors)
            else:  # What is not kept is not gathered for the one and again for the other.
                dots, total = curvature.gathered().stream(self._chunks(point, indices), vectors)
            return dots, total / len(sample)
        losses = self.objective.example_losses
        dots = gradient_dots(point, losses, self._chunks(point, indices), vectors)
        if known is not None:
            return dots, known.mean()
        batches = curvature.batches()
        return dots, mean_gradient(point, losses, batches, 1 / len(sample))

    def curvature_at(self, point: Point, sample: Sequence[int]) -> Curvature:
        """Return the curvature of the mean loss of some training examples.

        Args:
            point: The model.
            sample: Their dataset indices.

        Returns:
            The curvature.
        """
        return Curvature(
            point,
            self.objective,
            passes(self.train, sample, self.batch_size, point),
            len(sample),
            kind=self.curvature,
            damping=self.damping,
            seed=self.seed,
            budget=self.memory_budget,
            subset=lambda places: self._chunks(point, [sample[i] for i in places]),
        )

    def _chunks(self, point: Point, indices: Sequence[int]) -> Iterator[Any]:
        return chunks(self.train, indices, self.batch_size, point)

    def _asked(self, indices: list[int]) -> InfluenceScores:
        rows = [
            torch.as_tensor(self.solver.influences(indices, [q])).detach().reshape(-1)
            for q in range(len(required_data(self.queries, self.query)))
        ]
        values = torch.stack(rows).cpu().to(torch.float64)
        details = {"solver": type(self.solver).__name__}
        return InfluenceScores(
            values, tuple(indices), len(self.train), "influence function", details=details
        )

    def _details(self, sample: int, solution: Solution) -> dict[str, Any]:
        return {
            **solution.details,
            "residual_from": solution.residual_from,
            "parameters_covered": solution.covered,
            "query": described(self.objective, self.query),
            "curvature": self.curvature,
            "curvature_examples": sample,
            "solver": self.solver if isinstance(self.solver, str) else repr(self.solver),
            "scale": "1/n",
        }


def regularizer_gradient(point: Point, objective: Objective) -> Tensor:
    """Return ∇R.

    Args:
        point: The model.
        objective: The objective.

    Returns:
        A vector ``[P]``, zeros where there is no regulariser.
    """
    value = point.call(objective.regularization)
    if value is None:
        return torch.zeros(point.size, dtype=wide(point.device), device=point.device)
    return point.flat(point.gradient(value))


def shares_of_queries(
    point: Point,
    objective: Objective,
    data: IndexedData,
    indices: Sequence[int],
    values: Tensor,
    directions: Iterable[Tensor],
    k: int,
    constants: Sequence[float] | None = None,
) -> tuple[TokenShares, ...] | None:
    """Split the k highest and the k lowest scores of each query over tokens.

    Args:
        point: The model.
        objective: Losses.
        data: The training examples.
        indices: Dataset index of each score.
        values: The scores ``[query, train_example]``.
        directions: Their directions in parameter space, a vector ``[P]`` for each query.
        k: How many of each.
        constants: What the scores of each query contain beside it; None is nothing.

    Returns:
        One for each query; None where the task predicts no tokens or none are wanted.
    """
    if objective.next_token is None or k < 1:
        return None
    beside = [0.0] * len(values) if constants is None else constants
    return tuple(
        shares_of_extremes(point, objective, data, indices, *row, k)
        for row in zip(values, directions, beside, strict=True)
    )


def shares_of_extremes(
    point: Point,
    objective: Objective,
    data: IndexedData,
    indices: Sequence[int],
    values: Tensor,
    direction: Tensor,
    constant: float,
    k: int,
) -> TokenShares:
    """Split the k highest and the k lowest scores over tokens.

    Args:
        point: The model.
        objective: Its task predicts tokens.
        data: The training examples.
        indices: Dataset index of each score.
        values: The scores of one query.
        direction: Their direction in parameter space.
        constant: What the scores contain beside it.
        k: How many of each.

    Returns:
        Proponents, highest first, then opponents, lowest first.
    """
    task = objective.next_token
    high, low = extremes(values, k)
    found = [indices[c] for c in [*high, *low]]
    if task is None or not found:
        return TokenShares((), torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.long))
    (batch,) = chunks(data, found, len(found), point)
    return token_shares(point, task, batch, found, direction, constant)


def doubts(result: InfluenceScores) -> list[str]:
    """Return what speaks against relying on the scores.

    Args:
        result: The scores.

    Returns:
        Sentences; none where all is well.
    """
    found = []
    norm, scale = result.gradient_norm, result.query_norm
    if norm is not None and scale is not None and norm > FAR * scale:
        found.append(
            f"The model is far from a minimum of its objective: the gradient norm is {norm:.3g}, "
            f"the queries' {scale:.3g}. Train on, or name the regulariser that training used; "
            "until then the scores estimate no retraining."
        )
    bad = [(q, reason) for q, reason in enumerate(result.stopped) if reason not in FINE]
    if bad:
        residual = float(result.residual.max()) if result.residual is not None else float("nan")
        found.append(
            f"The solver stopped early ({bad[0][1]}) for {len(bad)} of {len(result.stopped)} "
            f"queries, relative residual up to {residual:.2g}. Raise damping or max_iterations, "
            'or use curvature="gauss-newton".'
        )
    return found
