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
from ...checks import counts, share_of, within
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...nodes import Logits, Reader
from ...record import Panel, scalar
from ...task import Task
from .along import require_gradient
from .edges import Direction
from .estimates import Estimate
from .exchange import Exchange, SubspacePart
from .proportions import accuracy, accuracy_difference
from .subspaces import SubspaceEffect, judged

__all__ = ["Alignment", "align", "check_search"]

ACCURACIES = {
    "accuracy": ("accuracy", "interchange accuracy of the learned subspace"),
    "whole": ("accuracy_whole", "interchange accuracy of the whole part"),
    "nothing": ("accuracy_nothing", "interchange accuracy when nothing is exchanged"),
    "beyond_random": (
        "accuracy_beyond_random",
        "interchange accuracy less the largest of a random rotation",
    ),
}
SHOWN = ("accuracy", "beyond_random")


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
        intervals: ``accuracy``, ``whole``, ``nothing`` (Wilson's) and ``beyond_random``, accuracy
            less the best of ``random`` (Newcombe's, paired), with 95 % intervals over held-out
            pairs.
        effect: What `subspace_patching` says of the subspace, on held-out pairs.
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
    intervals: Mapping[str, Estimate] = field(default_factory=dict)
    effect: SubspaceEffect | None = None
    convention: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __str__(self) -> str:
        """Return it in words."""
        if self.reason is not None:
            return f"{self.part}: undefined: {self.reason}"
        lucky = max(self.random, default=math.nan)
        accuracy = self.intervals.get("accuracy", f"{self.accuracy:.2f}")
        return (
            f"{self.part}, rank {self.basis.shape[1]}: interchange accuracy {accuracy} on "
            f"held-out pairs (whole part {self.whole:.2f}, nothing {self.nothing:.2f}, random "
            f"rotations at most {lucky:.2f}, untrained model {self.untrained:.2f}); share "
            f"{self.share:.2f}, {self.trained_on:.2f} where it was learned"
        )

    def reading(self) -> dict[str, Panel]:
        """Return it as panels.

        Returns:
            Interchange accuracies ``accuracy``, ``accuracy_whole``, ``accuracy_nothing``,
            ``accuracy_random`` (the largest) and ``accuracy_beyond_random``; shares ``trained_on``
            and those of `SubspaceEffect.reading`, ``inside`` being that of the subspace found; and
            ``loss``, the last one. All scalars.
        """
        about: dict[str, Any] = {**self.convention, "part": str(self.part)}
        if self.reason is not None:
            about["reason"] = self.reason
        chance = {**about, "sign": "larger: the answer follows the subspace more often"}
        made = {}
        for name, e in self.intervals.items():
            label, what = ACCURACIES[name]
            low, high = (None if math.isnan(v) else v for v in (e.low, e.high))
            shown = {"scalar": label} if name in SHOWN else {"ranks": 0}
            made[label] = scalar(
                e.value, "share right", **chance, what=what, low=low, high=high, display=shown
            )
        if self.random:
            more: dict[str, Any] = {"what": "largest interchange accuracy of a random rotation"}
            more |= {"all": list(self.random), "display": {"ranks": 0}}
            made["accuracy_random"] = scalar(max(self.random), "share right", **chance, **more)
        what = "share of the metric's difference on the pairs that the subspace was learned on"
        made["trained_on"] = scalar(self.trained_on, "share", **about, what=what, display={})
        last = self.losses[-1] if self.losses else math.nan
        made["loss"] = scalar(last, "1", **about, what="the last loss", display={})
        return made | ({} if self.effect is None else self.effect.reading())


def align(
    model: nn.Module,
    behavior: BehaviorLike,
    part: SubspacePart,
    rank: int = 1,
    *,
    reader: Reader | Logits | Tensor | None = None,
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
    judged on the other half, where `subspace_patching` also says whether it is to be trusted.

    Args:
        model: The user's model; it is left as it was.
        behavior: Pairs of prompts, the metric (with a gradient), and answers or a margin, by which
            an answer is right.
        part: A head (its z), an MLP or the stream that enters a layer.
        rank: Dimensions, fixed in advance.
        reader: Who reads the part next; see `subspace_patching`.
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
        ArgumentError: If a number is impossible, the metric has no gradient, or the behavior
            does not say what is right.
    """
    check_search(rank, steps, learning_rate, held_out, draws, seed)
    own = as_behavior(behavior)
    _ = own.rightness  # Refused before the search, not after it.
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
            return _undefined(found, rank, reader, draws)
        Q, losses = _learned(found, rank, steps, learning_rate, seed)
        with torch.no_grad():
            kept = Exchange(plain, test, part, direction, task, found.known)
            effect = judged(kept, Q, reader, draws, seed)
            generator = torch.Generator().manual_seed(seed + 1)
            drawn = [torch.randn(Q.shape, generator=generator).to(Q) for _ in range(draws)]
            lucky = [_right(kept, kept.orthonormal(b)) for b in drawn]
            right = {"accuracy": Q, "whole": torch.eye(len(Q)).to(Q), "nothing": Q[:, :0]}
            rows = {name: _right(kept, basis) for name, basis in right.items()}
            intervals = {name: accuracy(row) for name, row in rows.items()}
            if lucky:
                best = max(lucky, key=lambda row: float(row.mean()))
                intervals["beyond_random"] = accuracy_difference(
                    rows["accuracy"], best, paired=True
                )
            made = Alignment(
                part,
                Q.cpu(),
                intervals["accuracy"].value,
                effect.inside,
                found.share(found.gain(Q)).value,
                tuple(float(row.mean()) for row in lucky),
                intervals["whole"].value,
                intervals["nothing"].value,
                losses=tuple(losses),
                intervals=intervals,
                effect=effect,
                convention=_told(rank, steps, seed, direction, train, test),
            )
    if untrained is None:
        return made
    again = align(
        untrained, own, part, rank, steps=steps, learning_rate=learning_rate, held_out=held_out,
        direction=direction, draws=0, seed=seed, task=task,
    )  # fmt: skip
    return replace(made, untrained=again.accuracy)


def check_search(
    rank: object,
    steps: object,
    learning_rate: object,
    held_out: object,
    draws: object,
    seed: object,
) -> None:
    """Refuse numbers with which no subspace can be searched for.

    Args:
        rank: See `align`.
        steps: See there.
        learning_rate: See there.
        held_out: See there.
        draws: See there.
        seed: See there.
    """
    counts({"rank": rank, "steps": steps}, 1)
    counts({"draws": draws, "seed": seed})
    within("learning_rate", learning_rate, 0.0, inside=True, do="Take 0.05.")
    share_of("held_out", held_out)


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


def _right(exchange: Exchange, Q: Tensor) -> Tensor:
    """Return where the patched run answers as the donor: rightly, or wrongly under noising."""
    right = exchange.behavior.correct(exchange.outputs(Q)).float().cpu()
    return right if exchange.direction == "denoise" else 1 - right


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
        "interval": "95 %, over held-out pairs",
        "null": "accuracy of random rotations, and of the untrained model",
    }


def _undefined(
    exchange: Exchange, rank: int, reader: Reader | Logits | Tensor | None, draws: int
) -> Alignment:
    n = math.nan
    names = [name for name in ACCURACIES if draws or name != "beyond_random"]
    return Alignment(
        exchange.part,
        torch.full((0, rank), n),
        n,
        n,
        n,
        (n,) * draws,
        n,
        n,
        intervals=dict.fromkeys(names, Estimate(n)),
        effect=judged(exchange, torch.empty(0, rank), reader, draws, 0),
        reason=exchange.reason,
    )
