"""What an example does to itself, and scores relative to it: `self_influence`, `relatif`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..isolation import untouched
from .asking import loss_gradients
from .choosing import as_solver, damping_of, named_solvers
from .data import as_indexed, chosen
from .objective import Objective, as_objective
from .per_example import mean_gradient
from .point import Point
from .products import CurvatureKind
from .result import InfluenceScores, columns_of
from .scores import Job, doubts, regularizer_gradient
from .solvers import Solver, prepared

__all__ = ["relatif", "self_influence"]


def self_influence(
    model: nn.Module,
    objective: Objective,
    train: Any,
    *,
    solver: str | Solver = "ekfac",
    curvature: CurvatureKind = "gauss-newton",
    damping: float = 0.01,
    candidates: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory_budget: int = 2**30,
) -> InfluenceScores:
    """Return (1/n) gᵢᵀ (H̄ + λI)⁻¹ gᵢ with gᵢ = ∇ℓᵢ, of each training example.

    How much its own loss would rise if it were removed; never negative where the curvature is
    positive. Wrong labels and odd examples have much of it. The regulariser is in H̄ and not in gᵢ.

    Args:
        model: The trained model; it is left exactly as it was.
        objective: What training minimised; a Task is enough where there was no regulariser.
        train: Map-style dataset of n training examples.
        solver: As for `influence_scores`.
        curvature: ``"gauss-newton"`` or ``"hessian"``.
        damping: λ ≥ 0, added to the mean curvature.
        candidates: Dataset indices; None takes all.
        seed: Of what the solver draws.
        batch_size: Examples run at once; the result does not depend on it.
        memory_budget: As for `influence_scores`.

    Returns:
        Scores with one row; each example was its own query. ``gradient_norm`` is ‖∇J‖ over all
        examples, and ``residual`` in the convention the largest of any example.

    Raises:
        ArgumentError: If an argument cannot be used, or the dataset has no indices.
        ModelError: If no parameter is trainable.

    Warns:
        UserWarning: Where the model is far from stationary or a solve did not converge.
    """
    data = as_indexed(train, "train")
    job = Job(
        as_objective(objective),
        data,
        data,
        solver=solver,
        curvature=curvature,
        damping=damping,
        candidates=candidates,
        seed=seed,
        batch_size=batch_size,
        memory_budget=memory_budget,
    )
    result = own_scores(model, job)
    for message in doubts(result):
        warnings.warn(message, UserWarning, stacklevel=2)
    return result


def own_scores(model: nn.Module, job: Job) -> InfluenceScores:
    """Return `self_influence` without its warnings, for what looks at the order alone.

    Args:
        model: The trained model.
        job: Its training data are also what is asked about.

    Returns:
        The scores.
    """
    data, how = job.train, as_solver(job.solver)
    indices = chosen(job.candidates, len(data), job.seed)
    with untouched(model) as plain:
        point = Point(plain)
        matrix = job.curvature_at(point, range(len(data)))
        inverse = prepared(how, matrix)
        own, lengths, solutions = [], [], []
        total = torch.zeros(point.size, dtype=torch.float64)
        for gradients in loss_gradients(point, job.objective, data, indices, job.batch_size):
            solution = inverse(gradients)
            own.append((solution.vectors * gradients).sum(1) / len(data))
            lengths.append(gradients.norm(dim=1))
            total = total.to(gradients) + gradients.sum(0)
            solutions.append(dataclasses.replace(solution, vectors=gradients[:0]))
        if job.candidates is not None:
            batches = matrix.batches()
            total = mean_gradient(point, job.objective.example_losses, batches, 1.0)
        slope = total / len(data) + regularizer_gradient(point, job.objective)
    details = {
        **solutions[-1].details,
        "query": "the loss of the example itself",
        "curvature": job.curvature,
        "solver": job.solver if isinstance(job.solver, str) else repr(job.solver),
        "scale": "1/n",
        "parameters_covered": solutions[-1].covered,
        "residual": float(torch.cat([s.residual for s in solutions]).max()),
        "residual_from": solutions[-1].residual_from,
    }
    number, unit = damping_of(how, job.damping)
    return InfluenceScores(
        torch.cat(own)[None].cpu(),
        tuple(indices),
        len(data),
        "self-influence",
        gradient_norm=float(slope.norm()),
        query_norm=float(torch.cat(lengths).mean()),
        damping=number,
        damping_unit=unit,
        details=details,
        stopped=tuple(reason for s in solutions for reason in s.stopped),
        orientation="positive = removing the example would raise its own loss",
    )


def relatif(scores: InfluenceScores, own: InfluenceScores) -> InfluenceScores:
    """Return scores relative to what examples do to themselves (Barshan et al. 2020).

    ℓ-RelatIF: score[q, i] / √self-influence(i), the influence at a fixed change of the example's
    own prediction, so that odd examples, which move everything, no longer head every list.

    Args:
        scores: Scores of queries.
        own: `self_influence` of the same model, objective, damping and solver.

    Returns:
        The quotients; NaN where an example does nothing to itself.

    Raises:
        ArgumentError: If the second holds another kind of scores, lacks an example, or was made
            with another solver, curvature or damping.

    Example:
        >>> scores = InfluenceScores(torch.tensor([[2.0, 3.0]]), (0, 1), 2, "influence function")
        >>> own = InfluenceScores(torch.tensor([[4.0, 9.0]]), (0, 1), 2, "self-influence")
        >>> relatif(scores, own).values
        tensor([[1., 1.]])
    """
    missing = set(scores.indices) - set(own.indices)
    if own.method != "self-influence" or missing:
        raise ArgumentError.of(
            "own",
            expected="self_influence(…) of the same training examples",
            got=own.method if not missing else f"no score of example {min(missing)}",
            do="Call self_influence with the same candidates.",
        )
    ours, theirs = (_how(s.convention) for s in (scores, own))
    differs = [key for key in ours if ours[key] != theirs[key]]
    if differs:
        key = differs[0]
        raise ArgumentError.of(
            "own",
            expected=f"self_influence(…) with {key} {ours[key]}, as the scores have",
            got=theirs[key],
            do="Call both with the same solver, curvature and damping.",
        )
    lengths = own.values[0, columns_of(own.indices, scores.indices)].clamp(min=0).sqrt()
    values = torch.where(lengths > 0, scores.values / lengths, _nan(scores.values))
    details = {**scores.details, "scale": "1/n, over the root of self-influence"}
    return dataclasses.replace(scores, values=values, details=details, tokens=None)


def _how(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return which inverse was applied; solvers that have a name by what it stands for."""
    solver = said.get("solver")
    found = {key: said.get(key) for key in ("curvature", "damping", "damping_unit")}
    return {"solver": str(named_solvers().get(str(solver), solver)), **found}


def _nan(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))
