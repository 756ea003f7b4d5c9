"""Interventions on a subspace, with the caution that they need: `subspace_patching`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import BehaviorLike, as_behavior
from ...checks import counts
from ...isolation import frozen, untouched
from ...nodes import Logits, Reader
from ...record import Panel, scalar
from ...task import Task
from .edges import Direction
from .estimates import Estimate
from .exchange import Exchange, SubspacePart

__all__ = ["SubspaceEffect", "judged", "subspace_patching"]

WHAT = {
    "inside": "share that the subspace alone carries",
    "whole": "share that the whole part carries",
    "outside": "share that all but the subspace carries",
    "row": "share that its projection onto what the reader reads carries",
    "null": "share that its projection onto what the reader does not read carries",
    "beyond_random": "inside less the largest share of a random subspace of the same rank",
    "held_out": "inside, on pairs that the subspace was not found on",
}
SHOWN = ("inside", "whole", "row", "null", "random", "beyond_random")


@dataclass(frozen=True, eq=False)
class SubspaceEffect:
    """What a subspace of a part carries, beside what would expose an illusion.

    A subspace can carry an effect although the model does not use it so: a direction that the
    reader reads, joined to a dormant one that it does not but in which prompts differ, moves the
    reader by what the other direction says (Makelov et al. 2023). Then ``row`` and ``null`` are
    both far from ``inside``.

    Args:
        part: The part.
        rank: Dimensions of the subspace.
        whole: Share of the metric's difference when the whole part is exchanged.
        inside: When the subspace alone is.
        outside: When all but the subspace is.
        row: When the subspace's projection onto what the reader reads is; NaN without a reader.
        null: When its projection onto what the reader does not read is; NaN likewise.
        random: Of random subspaces of the same rank.
        held_out: ``inside`` on pairs that the subspace was not found on; NaN where there were none.
        intervals: All of these but ``random`` by name, and ``beyond_random``, ``inside`` less the
            largest of ``random``, with 95 % bootstrap intervals over pairs.
        convention: Direction, reader, numbers.
        reason: Why all is NaN, or None.
    """

    part: SubspacePart
    rank: int
    whole: float
    inside: float
    outside: float
    row: float = math.nan
    null: float = math.nan
    random: tuple[float, ...] = ()
    held_out: float = math.nan
    intervals: Mapping[str, Estimate] = field(default_factory=dict)
    convention: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @property
    def cautions(self) -> tuple[str, ...]:
        """Why the effect may not be what it seems; empty where nothing speaks against it."""
        found = []
        size = abs(self.inside)
        if size > abs(self.whole) + 0.1:
            found.append("the subspace does more than the whole part")
        if self.random and size <= max(abs(r) for r in self.random):
            found.append("a random subspace of this rank does as much")
        if abs(self.row) < 0.5 * size:
            found.append("most of it is gone where only what the reader reads is exchanged")
        if abs(self.null) > 0.1 * size and size > 0.05:
            found.append("what the reader does not read has an effect of its own, by another path")
        if abs(self.held_out) < 0.5 * size:
            found.append("most of it is gone on held-out pairs")
        return tuple(found)

    def __str__(self) -> str:
        """Return it in words."""
        if self.reason is not None:
            return f"{self.part}: undefined: {self.reason}"
        lucky = max((abs(r) for r in self.random), default=math.nan)
        told = "; ".join(self.cautions) or "nothing speaks against it"
        inside = self.intervals.get("inside", f"{self.inside:.2f}")
        return (
            f"{self.part}, rank {self.rank}: inside {inside}, whole {self.whole:.2f}, "
            f"outside {self.outside:.2f}, row space {self.row:.2f}, null space {self.null:.2f}, "
            f"random at most {lucky:.2f}, held out {self.held_out:.2f}: {told}"
        )

    def reading(self) -> dict[str, Panel]:
        """Return it as panels.

        Returns:
            ``inside``, ``whole``, ``outside``, ``row``, ``null``, ``beyond_random`` and
            ``held_out``, where they were asked for, and ``random``, the largest: scalars with
            intervals in their conventions.
        """
        about: dict[str, Any] = {
            **self.convention,
            "part": str(self.part),
            "rank": self.rank,
            "cautions": list(self.cautions),
            "null": 0.0,
            "sign": "larger: more of the metric's difference",
            "interval": "95 %, bootstrap over pairs",
        }
        if self.reason is not None:
            about["reason"] = self.reason
        made = {
            name: scalar(
                e.value,
                "share",
                **{**about, "what": WHAT[name]},
                low=None if math.isnan(e.low) else e.low,
                high=None if math.isnan(e.high) else e.high,
                display=_shown(name),
            )
            for name, e in self.intervals.items()
        }
        if self.random:
            most = max(self.random, key=abs)
            what = "largest share of a random subspace of the same rank"
            about |= {"what": what, "all": list(self.random), "display": _shown("random")}
            made["random"] = scalar(most, "share", **about)
        return made


def _shown(name: str) -> dict[str, Any]:
    """Return how a number is shown: by loggers, or in the report alone."""
    return {"scalar": name} if name in SHOWN else {"ranks": 0}


def subspace_patching(
    model: nn.Module,
    behavior: BehaviorLike,
    part: SubspacePart,
    basis: Tensor,
    *,
    reader: Reader | Logits | Tensor | None = None,
    held_out: BehaviorLike | None = None,
    direction: Direction = "denoise",
    draws: int = 8,
    seed: int = 0,
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> SubspaceEffect:
    """Exchange a subspace of a part between two runs, beside all that it has to be compared with.

    All numbers are the share of `activation_patching`. The effect is split by what a reader reads:
    the row space is spanned by the directions that its weights do not map to zero.

    Args:
        model: The user's model; it is left as it was.
        behavior: Clean and corrupted prompts and the metric.
        part: A head (its z), an MLP (what it writes) or the stream that enters a layer.
        basis: Directions ``[d, k]``; they are made orthonormal.
        reader: A head's q, k or v, or the logits, for parts of the stream's width; or a matrix
            ``[d, m]`` that the part's values are multiplied by next. None for a head takes its own
            W_O, where that is known; for other parts there is no split.
        held_out: Pairs that the basis was not found on.
        direction: Which run is patched.
        draws: Random subspaces of the same rank.
        seed: Seed of the draws.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The effects. NaN, with a reason, where the metric is the same on both prompts.

    Raises:
        ArgumentError: If basis or reader do not fit the part, or draws or seed are no ints of at
            least 0.
    """
    counts({"draws": draws, "seed": seed})
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        made = Exchange(plain, own, part, direction, task, anatomy)
        other = None
        if held_out is not None:
            fresh = as_behavior(held_out)
            other = Exchange(plain, fresh, part, direction, task, made.known)
        return judged(made, basis, reader, draws, seed, other)


def judged(
    exchange: Exchange,
    basis: Tensor,
    reader: Reader | Logits | Tensor | None,
    draws: int,
    seed: int,
    held_out: Exchange | None = None,
) -> SubspaceEffect:
    """Return what a subspace carries, beside what it has to be compared with.

    Args:
        exchange: Two runs of the model.
        basis: See `subspace_patching`.
        reader: See there.
        draws: See there.
        seed: See there.
        held_out: Two runs on other pairs.

    Returns:
        The effects.
    """
    part, examples = exchange.part, len(exchange.behavior)
    about = {"direction": exchange.direction, "reader": str(reader)[:40], "examples": examples}
    R = exchange.read_by(reader)
    if exchange.reason is not None:
        names = ["whole", "inside", "outside", *([] if R is None else ["row", "null"])]
        names += ["beyond_random"] if draws else []
        names += ["held_out"] if held_out is not None else []
        n = math.nan
        unknown = dict.fromkeys(names, Estimate(n))
        lost = (n,) * draws
        return SubspaceEffect(
            part, basis.shape[1], n, n, n, random=lost, intervals=unknown, convention=about,
            reason=exchange.reason,
        )  # fmt: skip
    Q = exchange.orthonormal(basis)
    gains = {
        "whole": exchange.gain(torch.eye(len(Q)).to(Q)),
        "inside": exchange.gain(Q),
        "outside": exchange.gain(Q, outside=True),
    }
    if R is not None:
        gains |= {"row": exchange.gain(R @ R.T @ Q), "null": exchange.gain(Q - R @ (R.T @ Q))}
    generator = torch.Generator().manual_seed(seed)
    lucky = [exchange.gain(torch.randn(Q.shape, generator=generator).to(Q)) for _ in range(draws)]
    random = tuple(exchange.share(g, seed).value for g in lucky)
    if lucky:
        most = max(range(draws), key=lambda i: abs(random[i]))
        gains["beyond_random"] = gains["inside"] - lucky[most]
    found = {name: exchange.share(gain, seed) for name, gain in gains.items()}
    if held_out is not None:
        found["held_out"] = held_out.share(held_out.gain(Q), seed)
    nothing = Estimate(math.nan)
    whole, inside, outside, row, null, other = (
        found.get(name, nothing).value
        for name in ("whole", "inside", "outside", "row", "null", "held_out")
    )
    return SubspaceEffect(
        part, Q.shape[1], whole, inside, outside, row, null, random, other, found, about
    )
