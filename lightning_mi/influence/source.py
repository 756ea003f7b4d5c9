"""SOURCE: influence along a run, unrolled in segments (Bae et al. 2024)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import IndexedData
from .blocks import Block
from .data import Candidates, as_indexed, chosen, chunks, passes
from .factors import Eigen, eigen_of
from .gathered import Chunk, Gathered
from .objective import Objective, as_objective
from .outputs import Labels
from .per_example import gradient_dots
from .point import Point
from .products import Curvature
from .queries import QueryLike, asked_data, orientation_of, question_gradients
from .result import InfluenceScores
from .trajectory_checkpoints import State, states_of
from .trajectory_rates import Rates

__all__ = ["source"]


def source(
    checkpoints: Any,
    objective: Objective,
    train: Any,
    queries: Any,
    *,
    like: nn.Module,
    segments: int = 3,
    learning_rates: float | Rates | None = None,
    momentum: float | None = None,
    query: QueryLike = None,
    candidates: Candidates = None,
    sample: int | None = None,
    seed: int = 0,
    labels: Labels = "auto",
    batch_size: int | None = None,
) -> InfluenceScores:
    r"""Return what each training example did to a query over the whole run.

    The run is cut into L segments of checkpoints. In each, with its mean curvature H̄ (EK-FAC over
    its checkpoints), mean gradients ḡᵢ and c = (its steps) · η / (1 − momentum),

    .. math:: score[q, i] = \frac1n \sum_l g_q^\top \Big(\prod_{k>l} e^{-c_k \bar H_k}\Big)
              (1 - e^{-c_l \bar H_l}) \bar H_l^{-1} \bar g_{i,l}

    with the query's gradient at the last checkpoint. Positive = proponent: never having had the
    example would have raised the query's loss, an estimate of L_q(without i) − L_q(with i) that
    assumes no minimum and needs no damping. Long training of one segment gives the influence
    function. The formula is that of SGD; of an adaptive optimizer it takes the learning rates
    alone, and a warning says so.

    Args:
        checkpoints: A folder or a list of the run's checkpoints, at least one beyond step 0.
        objective: Losses and regulariser; a Task is enough.
        train: Map-style dataset of n training examples.
        queries: Dataset of examples to ask about, each by itself; None for a question without.
        like: A model of the architecture that was saved; it is not changed.
        segments: L; fewer where there are fewer checkpoints.
        learning_rates: Of all checkpoints; None takes those that were really used.
        momentum: Of SGD; None takes what the optimizer states say.
        query: The scalar asked about, or a `Question`.
        candidates: None for all, a number to draw, or dataset indices.
        sample: Training examples that the curvature is averaged over; None takes all.
        seed: Of the draws.
        labels: Of the curvature; see `KFAC`.
        batch_size: Examples run at once; the result does not depend on it.

    Returns:
        The scores; details name segments, steps and learning rates.

    Raises:
        ArgumentError: If an argument cannot be used, or no checkpoint is beyond step 0.

    Warns:
        UserWarning: Where the run was trained with an adaptive optimizer.
    """
    data, queried = as_indexed(train, "train"), asked_data(queries, query)
    indices = chosen(candidates, len(data), seed)
    states = [s for s in states_of(checkpoints, like, learning_rates=learning_rates) if s.step]
    _check(states, segments, momentum)
    goal = as_objective(objective)
    drawn = chosen(sample, len(data), seed)
    parts = _cut(states, segments)
    last = _point(states[-1])
    asked = question_gradients(last, goal, query, queried, batch_size)
    vectors, total, facts = asked.gradients, None, []
    for part, start in reversed(list(zip(parts, _starts(parts), strict=True))):
        points = [_point(state) for state in part]
        steps = part[-1].step - start
        spans = _spans(part, steps, momentum)
        segment = _Segment.of(points, goal, data, drawn, spans, labels, seed, batch_size)
        moved, vectors = segment.pulled(vectors)
        each = [_dots(p, goal, data, indices, moved / len(data), batch_size) for p in points]
        mean = torch.stack(each).mean(0)
        total = mean if total is None else total + mean
        facts.append({"steps": [start, part[-1].step], "checkpoints": [s.step for s in part]})
    details = {
        **asked.known,
        "segments": facts[::-1],
        "curvature": "gauss-newton",
        "solver": f"EK-FAC of each segment, {segment.labels} labels",
        "momentum": momentum if momentum is not None else states[-1].momentum,
        "learning_rate": [_mean_rate(s.rates) for s in states],
        "curvature_examples": len(drawn),
        "scale": "1/n",
    }
    if any(s.adaptive for s in states):
        details["doubt"] = "trained with an adaptive optimizer; the formula is that of SGD"
        warnings.warn(
            "source: the run was trained with an adaptive optimizer, whose steps are no learning "
            "rate times a gradient. Ranks may still be of use; sizes are not.",
            UserWarning,
            stacklevel=2,
        )
    values = torch.zeros(0) if total is None else total
    return InfluenceScores(
        values.cpu(),
        tuple(indices),
        len(data),
        "SOURCE",
        details=details,
        orientation=orientation_of(query),
    )


def _check(states: Sequence[State], segments: int, momentum: float | None) -> None:
    if not states:
        raise ArgumentError.of(
            "checkpoints",
            expected="at least one checkpoint after training began",
            got="none beyond step 0",
            do="ScheduledCheckpoint saves them during training.",
        )
    if not isinstance(segments, int) or segments < 1:
        raise ArgumentError.of("segments", expected="an int of 1 or more", got=segments, do="3.")
    if momentum is not None and not 0 <= momentum < 1:
        raise ArgumentError.of(
            "momentum", expected="at least 0 and less than 1", got=momentum, do="SGD's own."
        )


def _cut(states: Sequence[State], segments: int) -> list[list[State]]:
    """Return runs of checkpoints of about the same number."""
    count = min(segments, len(states))
    ends = [round(i * len(states) / count) for i in range(count + 1)]
    return [list(states[a:b]) for a, b in itertools.pairwise(ends)]


def _starts(parts: Sequence[Sequence[State]]) -> list[int]:
    return [0, *(part[-1].step for part in parts[:-1])]


def _point(state: State) -> Point:
    return Point(state.model.eval())


def _spans(part: Sequence[State], steps: int, momentum: float | None) -> dict[str, float]:
    """Return c = Σ η / (1 − momentum) over a segment, by name of the parameter."""
    own = part[-1].momentum if momentum is None else momentum
    names = part[-1].rates
    means = {n: sum(_rate(s.rates, n) for s in part) / len(part) for n in names}
    return {n: steps * mean / (1 - own) for n, mean in means.items()}


def _rate(rates: Rates, name: str) -> float:
    return float(torch.as_tensor(rates.get(name, 0.0)).double().mean())


def _mean_rate(rates: Rates) -> float:
    return sum(_rate(rates, n) for n in rates) / max(1, len(rates))


def _dots(
    point: Point,
    objective: Objective,
    data: IndexedData,
    indices: Sequence[int],
    vectors: Tensor,
    size: int | None,
) -> Tensor:
    batches = chunks(data, indices, size, point)
    return gradient_dots(point, objective.example_losses, batches, vectors).T


class _Joined(Gathered):
    """The gradients at several checkpoints, one after the other."""

    def __init__(self, parts: Sequence[Gathered]) -> None:
        first = parts[0]
        super().__init__(first.point, first.objective, first.batches, first.labels, first.seed)
        self._parts = parts

    @property
    def blocks(self) -> list[Block]:
        """Those of the first checkpoint: all have one architecture."""
        return self._parts[0].blocks

    def __iter__(self) -> Iterator[Chunk]:
        """Yield all batches of all checkpoints."""
        for part in self._parts:
            yield from part


@dataclass(frozen=True, eq=False)
class _Segment:
    """The curvature of a segment and how far it was trained.

    Args:
        blocks: The parameters in blocks.
        eigen: Eigenbases and eigenvalues of each, the regulariser's included.
        spans: c of each block.
        labels: Which labels the curvature was taken with.
    """

    blocks: Sequence[Block]
    eigen: Mapping[str, Eigen]
    spans: Mapping[str, float]
    labels: str

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        objective: Objective,
        data: IndexedData,
        drawn: Sequence[int],
        spans: Mapping[str, float],
        labels: Labels,
        seed: int,
        size: int | None,
    ) -> _Segment:
        """Gather the curvature of a segment's checkpoints."""
        each = [Gathered(p, objective, passes(data, drawn, size, p), labels, seed) for p in points]
        joined = _Joined(each)
        found = dict(eigen_of(joined))
        first = points[0]
        curvature = Curvature(first, objective, passes(data, drawn, size, first), len(drawn))
        ridge = curvature.ridge()
        if ridge is not None:
            for block in joined.blocks:
                own = found[block.name]
                added = own.values + float(ridge[block.index].mean())
                found[block.name] = Eigen(own.bases, added)
        own_spans = {b.name: spans.get(b.name, 0.0) for b in joined.blocks}
        return cls(joined.blocks, found, own_spans, each[0].used)

    def pulled(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 − e^{−cH}) H⁻¹ v, and e^{−cH} v, for each vector ``[query, P]``."""
        moved, rest = torch.zeros_like(vectors), vectors.clone()
        for block in self.blocks:
            own, c = self.eigen[block.name], self.spans[block.name]
            turned = own.turned(block.take(vectors))
            exponent = c * own.values.to(turned)
            # (1 − e^{−cσ}) / σ, which is c where σ is 0.
            gained = c * torch.where(
                exponent > 1e-8, -torch.expm1(-exponent) / exponent.clamp(min=1e-300), 1.0
            )
            block.put(moved, own.back(turned * gained))
            block.put(rest, own.back(turned * torch.exp(-exponent)))
        return moved, rest
