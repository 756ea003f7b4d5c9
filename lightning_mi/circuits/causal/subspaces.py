"""Interventions on a subspace, with the caution that they need: `subspace_patching`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...nodes import MLP, Head, Logits, Reader
from ...task import Task
from .edges import Direction, coinciding
from .patching import shares
from .places import Residual, as_place
from .ports import Change, Ports

__all__ = ["Exchange", "SubspaceEffect", "SubspacePart", "subspace_patching"]

SubspacePart: TypeAlias = Head | MLP | Residual

SHARED = 1e-6
"""Singular values below this share of the largest are no direction that a reader reads."""


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
        return (
            f"{self.part}, rank {self.rank}: inside {self.inside:.2f}, whole {self.whole:.2f}, "
            f"outside {self.outside:.2f}, row space {self.row:.2f}, null space {self.null:.2f}, "
            f"random at most {lucky:.2f}, held out {self.held_out:.2f}: {told}"
        )


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
            W_O; for other parts there is no split.
        held_out: Pairs that the basis was not found on.
        direction: Which run is patched.
        draws: Random subspaces of the same rank.
        seed: Seed of the draws.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The effects. NaN, with a reason, where the metric is the same on both prompts.

    Raises:
        ArgumentError: If basis or reader do not fit the part.
    """
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        made = Exchange(plain, own, part, direction, task, anatomy)
        if made.reason is not None:
            n = math.nan
            return SubspaceEffect(part, basis.shape[1], n, n, n, reason=made.reason)
        Q = made.orthonormal(basis)
        R = made.read_by(reader)
        parts = (math.nan, math.nan) if R is None else (made.share(R @ R.T @ Q), made.lost(R, Q))
        generator = torch.Generator().manual_seed(seed)
        random = tuple(
            made.share(torch.randn(Q.shape, generator=generator).to(Q)) for _ in range(draws)
        )
        other = math.nan
        if held_out is not None:
            fresh = as_behavior(held_out)
            other = Exchange(plain, fresh, part, direction, task, made.known).share(Q)
        return SubspaceEffect(
            part,
            Q.shape[1],
            made.share(torch.eye(len(Q)).to(Q)),
            made.share(Q),
            made.share(Q, outside=True),
            *parts,
            random,
            other,
            {"direction": direction, "reader": str(reader)[:40], "examples": len(own), "null": 0.0},
        )


class Exchange:
    """Two runs of a model, and what exchanging a subspace of one part does.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        behavior: The prompts.
        part: What is exchanged.
        direction: Which run is patched.
        task: How the model is called.
        anatomy: What it is made of, where that is known already.
    """

    def __init__(
        self,
        model: nn.Module,
        behavior: Behavior,
        part: SubspacePart,
        direction: Direction,
        task: Task | None,
        anatomy: Anatomy | None,
    ) -> None:
        self.model, self.behavior, self.task = model, behavior, task or Task()
        self.part, self.place, self.known = part, as_place(part), anatomy
        ends = (behavior.corrupted, behavior.clean)
        self.base, donor = ends if direction == "denoise" else ends[::-1]
        self.ports = Ports(model, self.task, self.anatomy)
        with torch.no_grad():
            if self.place.kind == "residual":
                self.ports.find_streams(self.base)
            self.old, self.base_metric = self._see(self.base)
            self.new, self.donor_metric = self._see(donor)

    def anatomy(self) -> Anatomy:
        """Return what the model is made of."""
        if self.known is None:
            with torch.no_grad():
                self.known = Anatomy.of(self.model, self.behavior.clean, task=self.task)
        return self.known

    @property
    def reason(self) -> str | None:
        """Why nothing can be said, or None."""
        return coinciding(float(self.base_metric.mean()), float(self.donor_metric.mean()))

    def _see(self, batch: Any) -> tuple[Tensor, Tensor]:
        seen: dict[Any, Tensor] = {}
        with self.ports.opened({}, seen, [self.place.port]):
            metric = self.behavior.metric(self.task.outputs(self.model, batch))
        return self.place.taken(seen[self.place.port]).clone(), metric.float()

    def outputs(self, Q: Tensor, *, outside: bool = False) -> Tensor:
        """Return what the model answers when a subspace carries the other run's value.

        Args:
            Q: Orthonormal columns ``[d, k]``; gradients flow to them.
            outside: Exchange all but the subspace.

        Returns:
            The model's outputs.
        """
        change = (self.new - self.old).to(Q)
        inside = change @ Q @ Q.T
        moved = change - inside if outside else inside

        def apply(value: Tensor) -> Tensor:
            old = self.place.taken(value)
            return self.place.put(value, (old.to(moved) + moved).to(old))

        index = None if self.place.index is None else (self.place.index,)
        with self.ports.opened({self.place.port: Change(apply, index)}):
            return self.task.outputs(self.model, self.base)

    def share(self, basis: Tensor, *, outside: bool = False) -> float:
        """Return the share of the metric's difference that a subspace carries.

        Args:
            basis: Directions; zero columns span nothing.
            outside: Exchange all but the subspace.

        Returns:
            The share, NaN where it is undefined.
        """
        if self.reason is not None:
            return math.nan
        Q = self.orthonormal(basis, strict=False)
        metric = self.behavior.metric(self.outputs(Q, outside=outside))
        return float(shares(metric[None], self.base_metric, self.donor_metric, "mean"))

    def lost(self, R: Tensor, Q: Tensor) -> float:
        """Return the share of the projection of a subspace onto what is not read."""
        return self.share(Q - R @ (R.T @ Q))

    def orthonormal(self, basis: Tensor, *, strict: bool = True) -> Tensor:
        """Return an orthonormal basis of the same subspace, in single precision at least.

        Args:
            basis: Directions ``[d, k]``.
            strict: Whether every column must count.

        Returns:
            Shape ``[d, k]``, or fewer columns where some add nothing.

        Raises:
            ArgumentError: If it does not fit the part.
        """
        width = self.old.shape[-1]
        wide = basis.detach().to(
            device=self.old.device, dtype=torch.promote_types(self.old.dtype, torch.float32)
        )
        if wide.ndim != 2 or len(wide) != width or not 0 < wide.shape[1] <= width:
            raise ArgumentError.of(
                "basis",
                expected=f"directions [{width}, k] with k from 1 to {width}",
                got=f"shape {tuple(basis.shape)}",
                do=f"{self.part} is {width} wide.",
            )
        U, s, _ = torch.linalg.svd(wide, full_matrices=False)
        kept: Tensor = U[:, s > 1e-5 * (s.max() if strict else s.max().clamp(min=1.0))]
        return kept

    def read_by(self, reader: Reader | Logits | Tensor | None) -> Tensor | None:
        """Return an orthonormal basis of what a reader reads of the part, or None.

        Args:
            reader: Who reads; None for whoever reads a head's z.

        Returns:
            Shape ``[d, k]``; None where nothing is known to read the part.

        Raises:
            ArgumentError: If the weights do not fit the part.
        """
        if reader is None and not isinstance(self.part, Head):
            return None
        W = self._weights(reader).to(self.old.device)
        W = W.to(torch.promote_types(self.old.dtype, torch.float32))
        if len(W) != self.old.shape[-1]:
            raise ArgumentError.of(
                "reader",
                expected=f"weights [{self.old.shape[-1]}, m]",
                got=f"shape {tuple(W.shape)}",
                do=f"{self.part} is {self.old.shape[-1]} wide.",
            )
        U, s, _ = torch.linalg.svd(W, full_matrices=False)
        read: Tensor = U[:, s > SHARED * s.max()]
        return read

    def _weights(self, reader: Reader | Logits | Tensor | None) -> Tensor:
        if isinstance(reader, Tensor):
            return reader.detach()
        anatomy = self.anatomy().folded()
        if reader is None:
            head = self.part
            return anatomy.W_O[head.layer][head.head]  # type: ignore[union-attr]
        if isinstance(reader, Reader):
            weights = {"q": anatomy.W_Q, "k": anatomy.W_K, "v": anatomy.W_V}[reader.role]
            return weights[reader.node.layer][reader.node.head]
        if anatomy.W_U is None:
            raise ArgumentError.of(
                "reader", expected="a known unembedding", got="none", do="Pass its matrix."
            )
        return anatomy.W_U
