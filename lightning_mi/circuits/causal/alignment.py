"""Distributed alignment search: which rotated directions of a part carry a variable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...task import Task
from .along import require_gradient
from .edges import Direction
from .subspaces import Exchange, SubspacePart

__all__ = ["Alignment", "align"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """A subspace that was learned so that exchanging it exchanges what the model answers.

    Args:
        part: Where it lies.
        basis: Orthonormal columns ``[d, rank]``.
        accuracy: Interchange accuracy on held-out pairs: the share in which the patched run gives
            the answer of the run that the subspace was taken from.
        share: Share of the metric's difference, on held-out pairs.
        trained_on: ``share`` on the pairs that it was learned on.
        random: Interchange accuracy of random rotations.
        whole: Interchange accuracy when the whole part is exchanged: the most to be hoped for.
        nothing: When nothing is.
        untrained: Interchange accuracy of the same search on the untrained model; NaN where none
            was given. A search that succeeds there proves the search, not the model.
        losses: The loss of each step.
        convention: Rank, seed, steps, numbers of pairs.
        reason: Why all is NaN, or None.
    """

    part: SubspacePart
    basis: Tensor
    accuracy: float
    share: float
    trained_on: float
    random: tuple[float, ...]
    whole: float
    nothing: float
    untrained: float = math.nan
    losses: tuple[float, ...] = ()
    convention: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __str__(self) -> str:
        """Return it in words."""
        if self.reason is not None:
            return f"{self.part}: undefined: {self.reason}"
        lucky = max(self.random, default=math.nan)
        return (
            f"{self.part}, rank {self.basis.shape[1]}: interchange accuracy {self.accuracy:.2f} on "
            f"held-out pairs (whole part {self.whole:.2f}, nothing {self.nothing:.2f}, random "
            f"rotations at most {lucky:.2f}, untrained model {self.untrained:.2f}); share "
            f"{self.share:.2f}, {self.trained_on:.2f} where it was learned"
        )


def align(
    model: nn.Module,
    behavior: BehaviorLike,
    part: SubspacePart,
    rank: int = 1,
    *,
    steps: int = 100,
    learning_rate: float = 0.05,
    held_out: float = 0.5,
    direction: Direction = "denoise",
    draws: int = 8,
    seed: int = 0,
    untrained: nn.Module | None = None,
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Alignment:
    r"""Learn a subspace whose exchange exchanges the answer (Geiger et al. 2024).

    The basis is the first columns of a rotation, held orthonormal by a QR decomposition of free
    parameters, and learned with Adam on half of the pairs so that each patched run has the metric
    of the run that the subspace was taken from: the loss is the mean of
    :math:`((m_{patched} - m_{donor}) / (m_{donor} - m_{base}))^2`, denominators averaged. It is
    judged on the other half. `subspace_patching` says whether the found subspace is to be trusted.

    Args:
        model: The user's model; it is left as it was.
        behavior: Pairs of prompts, the metric (with a gradient), and answers or a margin, by which
            an answer is right.
        part: A head (its z), an MLP or the stream that enters a layer.
        rank: Dimensions, fixed in advance.
        steps: Steps of Adam.
        learning_rate: Of Adam.
        held_out: Share of the pairs that are kept for judging.
        direction: Which run is patched.
        draws: Random rotations to compare with.
        seed: Seed of the start, the split and the draws.
        untrained: The model before training: the same search is run on it.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The subspace and its judgement. NaN, with a reason, where the metric is the same on both
        prompts.

    Raises:
        ArgumentError: If rank or steps are impossible, or the metric has no gradient.
    """
    if rank < 1 or steps < 1 or not 0 < held_out < 1:
        raise ArgumentError.of(
            "rank, steps, held_out",
            expected="rank and steps from 1, a share between 0 and 1",
            got=f"{rank}, {steps}, {held_out}",
            do="For example rank=1, steps=100, held_out=0.5.",
        )
    own = as_behavior(behavior)
    train, test = own.split(1 - held_out, seed)
    with untouched(model) as plain, frozen(plain):
        found = Exchange(plain, train, part, direction, task, anatomy)
        if rank > found.old.shape[-1]:
            raise ArgumentError.of(
                "rank",
                expected=f"at most {found.old.shape[-1]}",
                got=rank,
                do=f"{part} is as wide.",
            )
        if found.reason is not None:
            return _undefined(part, rank, found.reason)
        Q, losses = _learned(found, rank, steps, learning_rate, seed)
        with torch.no_grad():
            judged = Exchange(plain, test, part, direction, task, found.known)
            generator = torch.Generator().manual_seed(seed + 1)
            drawn = [torch.randn(Q.shape, generator=generator).to(Q) for _ in range(draws)]
            right = [_right(judged, judged.orthonormal(b)) for b in drawn]
            width = len(Q)
            made = Alignment(
                part,
                Q.cpu(),
                _right(judged, Q),
                judged.share(Q),
                found.share(Q),
                tuple(right),
                _right(judged, torch.eye(width).to(Q)),
                _right(judged, Q[:, :0]),
                losses=tuple(losses),
                convention=_told(rank, steps, seed, direction, train, test),
            )
    if untrained is None:
        return made
    again = align(
        untrained, own, part, rank, steps=steps, learning_rate=learning_rate, held_out=held_out,
        direction=direction, draws=0, seed=seed, task=task,
    )  # fmt: skip
    return replace(made, untrained=again.accuracy)


def _learned(
    exchange: Exchange, rank: int, steps: int, learning_rate: float, seed: int
) -> tuple[Tensor, list[float]]:
    width = exchange.old.shape[-1]
    dtype = torch.promote_types(exchange.old.dtype, torch.float32)
    start = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    free = start.to(exchange.old.device).requires_grad_()
    adam = torch.optim.Adam([free], learning_rate)
    wanted = exchange.donor_metric
    scale = (wanted - exchange.base_metric).mean()
    losses = []
    for _ in range(steps):
        with torch.enable_grad():
            Q = torch.linalg.qr(free).Q
            metric = exchange.behavior.metric(exchange.outputs(Q)).float()
            loss = ((metric - wanted) / scale).square().mean()
        require_gradient(loss, exchange.behavior)
        (free.grad,) = torch.autograd.grad(loss, [free])
        adam.step()
        losses.append(float(loss.detach()))
    return torch.linalg.qr(free.detach()).Q, losses


def _right(exchange: Exchange, Q: Tensor) -> float:
    """Return how often the patched run answers as the donor: rightly, or wrongly under noising."""
    outputs = exchange.outputs(Q)
    right = exchange.behavior.correct(outputs).float().mean()
    toward = exchange.base is exchange.behavior.corrupted
    return float(right if toward else 1 - right)


def _told(
    rank: int, steps: int, seed: int, direction: str, train: Behavior, test: Behavior
) -> dict[str, Any]:
    return {
        "rank": rank,
        "steps": steps,
        "seed": seed,
        "direction": direction,
        "pairs": len(train),
        "held_out": len(test),
        "null": "accuracy of random rotations, and of the untrained model",
    }


def _undefined(part: SubspacePart, rank: int, reason: str) -> Alignment:
    n = math.nan
    return Alignment(part, torch.full((0, rank), n), n, n, n, (), n, n, reason=reason)
