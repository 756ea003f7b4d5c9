"""What influence returns: `InfluenceScores`, and `TokenShares` of the examples that are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..record import Panel, Reading, scalar

__all__ = ["ORIENTATION", "InfluenceScores", "TokenShares"]

ORIENTATION = "positive = proponent: removing the example would raise the query's loss"
TURNED = "positive = proponent: removing the example would lower the query, of which more is better"

CERTIFICATE = (
    "orientation", "n", "scale", "solver", "damping", "damping_unit", "residual", "residual_from",
    "gradient_norm", "parameters_covered",
)  # fmt: skip
"""What every convention either says or gives a reason for not saying."""

UNKNOWN = "not known: it was not computed here"
_NOTHING_INVERTED = "gradients are multiplied and nothing is inverted"
_NO_MINIMUM = "no minimum is assumed"

REASONS: Mapping[str, Mapping[str, str]] = {
    "tracin": {
        **dict.fromkeys(
            ("solver", "damping", "damping_unit", "residual", "residual_from"), _NOTHING_INVERTED
        ),
        "gradient_norm": _NO_MINIMUM,
    },
    "SOURCE": {
        **dict.fromkeys(("damping", "damping_unit"), "the formula needs none"),
        **dict.fromkeys(("residual", "residual_from"), "nothing is solved: a function of H̄"),
        "gradient_norm": _NO_MINIMUM,
    },
    "pbrf": {
        **dict.fromkeys(("residual", "residual_from"), "minima are sought; see converged"),
        "gradient_norm": _NO_MINIMUM,
    },
}
"""Why scores of some methods lack parts of the certificate."""


@dataclass(frozen=True, eq=False)
class TokenShares:
    """The scores of some training examples, split over their tokens.

    The score is linear in the example's loss, and that is a sum over predicted tokens: the share
    of a token is what its own prediction contributes. The first token of a text is predicted by
    nothing, so its share is 0.

    Args:
        indices: Dataset indices of the examples.
        values: Shares ``[train_example, position]``; each row adds up to the example's score.
        ids: The tokens ``[train_example, position]``; -1 is padding.
    """

    indices: tuple[int, ...]
    values: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class InfluenceScores:
    """Scores of training examples for queries.

    Args:
        values: Shape ``[query, train_example]``, double precision.
        indices: Dataset index of each column.
        n: Number of examples in the training data.
        method: ``"influence function"`` or ``"tracin"``.
        tokens: For language models, the shown examples' scores split over tokens, for each query.
        residual: Relative residual of the solver for each query; None where nothing was solved.
        stopped: Why the solver stopped, for each query.
        gradient_norm: ‖∇J(θ)‖; influence functions assume that it is 0.
        query_norm: Mean of ‖∇L_q(θ)‖ over the queries, to compare it with.
        damping: λ, added to the mean curvature.
        damping_unit: What λ is added to.
        details: Plain JSON: curvature, solver, learning rates.
        orientation: What a positive score says.
    """

    values: Tensor
    indices: tuple[int, ...]
    n: int
    method: str
    tokens: tuple[TokenShares, ...] | None = None
    residual: Tensor | None = None
    stopped: tuple[str, ...] = ()
    gradient_norm: float | None = None
    query_norm: float | None = None
    damping: float | None = None
    damping_unit: str = "mean curvature"
    details: Mapping[str, Any] = field(default_factory=dict)
    orientation: str = ORIENTATION

    @property
    def convention(self) -> dict[str, Any]:
        """What is needed to read the scores, as plain JSON.

        Each part of `CERTIFICATE` stands in it; where it cannot be known, ``absent`` says why.
        """
        optional = {"damping": self.damping, "gradient_norm": self.gradient_norm}
        known: dict[str, Any] = {k: v for k, v in optional.items() if v is not None}
        if self.damping is not None:
            known["damping_unit"] = self.damping_unit
        if self.residual is not None:
            known |= {"residual": self.residual.tolist(), "stopped": list(self.stopped)}
        if self.method in REASONS:
            known["parameters_covered"] = 1.0
        found = {
            "method": self.method,
            "orientation": self.orientation,
            "n": self.n,
            **known,
            **self.details,
        }
        reasons = {**dict.fromkeys(CERTIFICATE, UNKNOWN), **REASONS.get(self.method, {})}
        reasons |= self.details.get("absent", {})
        absent = {key: reasons[key] for key in CERTIFICATE if key not in found}
        return {**found, "absent": absent} if absent else found

    def top(self, query: int = 0, k: int = 5) -> tuple[list[int], list[int]]:
        """Return the strongest proponents and opponents of a query.

        Args:
            query: Row of `values`.
            k: How many of each.

        Returns:
            Dataset indices of the highest scores, highest first, and of the lowest, lowest first.
            Ties go to the smaller column; where there are fewer than 2k examples none is in both.
        """
        high, low = extremes(self.values[query], k)
        return [self.indices[c] for c in high], [self.indices[c] for c in low]

    def reading(self) -> Reading:
        """Return the scores as panels.

        Returns:
            ``scores``, and where they are known ``residual`` and ``gradient_norm``.
        """
        coords = {"train_example": self.indices}
        axes = ("query", "train_example")
        panels = {"scores": Panel(self.values, axes, coords, "1", self.convention)}
        if self.residual is not None:
            panels["residual"] = Panel(
                self.residual, ("query",), {}, "1", {"relative": True, "stopped": self.stopped}
            )
        if self.gradient_norm is not None:
            panels["gradient_norm"] = scalar(
                self.gradient_norm, of="mean loss + regularizer", query_norm=self.query_norm
            )
        return panels


def columns_of(indices: Sequence[int], wanted: Iterable[int]) -> list[int]:
    """Return where some dataset indices stand.

    Args:
        indices: Dataset index of each column.
        wanted: Some of them.

    Returns:
        The column of each.
    """
    place = {index: column for column, index in enumerate(indices)}
    return [place[i] for i in wanted]


def extremes(scores: Tensor, k: int) -> tuple[list[int], list[int]]:
    """Return the columns of the highest and of the lowest scores.

    Args:
        scores: Shape ``[train_example]``.
        k: How many of each at most.

    Returns:
        Columns of the highest, highest first, and of the lowest, lowest first, with none in both.
        Non-finite scores are left out.
    """
    finite = torch.isfinite(scores).nonzero()[:, 0]
    order = finite[scores[finite].argsort(descending=True, stable=True)].tolist()
    high = min(k, (len(order) + 1) // 2)
    low = min(k, len(order) - high)
    return order[:high], order[len(order) - low :][::-1]
