"""Two runs of a model, and what exchanging a subspace of one part between them does: `Exchange`."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...batch import attention_mask_of
from ...behavior import Behavior
from ...errors import ArgumentError, ModelError
from ...nodes import MLP, Head, Logits, Reader
from ...task import Task
from .edges import Direction, coinciding
from .estimates import Draws, Estimate
from .places import Residual, as_place
from .ports import Change, Ports

__all__ = ["Exchange", "SubspacePart"]

SubspacePart: TypeAlias = Head | MLP | Residual

SHARED = 1e-6
"""Singular values below this share of the largest are no direction that a reader reads."""


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
        self.direction = direction
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

    @property
    def whole(self) -> Tensor:
        """What there is to carry: the donor's metric less the base's ``[example]``."""
        return (self.donor_metric - self.base_metric).double().cpu()

    def gain(self, basis: Tensor, *, outside: bool = False) -> Tensor:
        """Return by how much exchanging a subspace moves the metric.

        Args:
            basis: Directions; zero columns span nothing.
            outside: Exchange all but the subspace.

        Returns:
            Shape ``[example]``, in double precision.
        """
        Q = self.orthonormal(basis, strict=False)
        metric = self.behavior.metric(self.outputs(Q, outside=outside)).float()
        return (metric - self.base_metric).double().cpu()

    def share(self, gain: Tensor, seed: int = 0) -> Estimate:
        """Return which share of the metric's difference a change of it is.

        Args:
            gain: See `gain`.
            seed: Seed of the bootstrap.

        Returns:
            The share and its interval over pairs; NaN where there is no difference.
        """
        if self.reason is not None:
            return Estimate(math.nan)
        return Draws(len(gain), seed).share(gain, self.whole)

    def differences(self) -> Tensor:
        """Return what the part computes in one run less what in the other ``[row, d]``.

        Returns:
            A row for each example and position that is no padding, in single precision at least.
        """
        rows = (self.new - self.old).to(torch.promote_types(self.old.dtype, torch.float32))
        mask = attention_mask_of(self.base)
        if mask is None or mask.shape != rows.shape[:2]:
            return rows.flatten(0, -2)
        return rows[mask.bool().to(rows.device)]

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
        try:
            W = self._weights(reader).to(self.old.device)
        except ModelError:
            if reader is not None:
                raise
            return None  # A head in a model whose output projections are unknown.
        W = W.to(torch.promote_types(self.old.dtype, torch.float32))
        if len(W) != self.old.shape[-1]:
            raise ArgumentError.of(
                "reader",
                expected=f"weights [{self.old.shape[-1]}, m]",
                got=f"shape {tuple(W.shape)}",
                do=f"{self.part} is {self.old.shape[-1]} wide.",
            )
        W = W.nan_to_num(0.0, 0.0, 0.0)  # Where weights are not finite, effects are NaN anyway.
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
