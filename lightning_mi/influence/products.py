"""Curvature of the training objective, as products with vectors over the full data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..batch import cut
from ..errors import ArgumentError
from .gathered import Gathered
from .objective import Objective
from .outputs import Labels
from .pieces import Matrix
from .point import Point, math_attention, wide

__all__ = ["Curvature", "CurvatureKind"]

CurvatureKind: TypeAlias = Literal["gauss-newton", "hessian"]


class Curvature:
    """v ↦ (H̄ + λI) v, with H̄ the mean over all examples, whatever the batches.

    ``"hessian"``: H̄ = (1/n) Σᵢ ∇²ℓᵢ + ∇²R.
    ``"gauss-newton"``: H̄ = (1/n) Σᵢ Jᵢᵀ (∇²_out ℓᵢ) Jᵢ + ∇²R
    with J the Jacobian of the outputs; positive semi-definite where the loss is convex in the
    outputs, and equal to the Hessian where the outputs are linear in θ. The regulariser's exact
    Hessian is in both (as in torch-influence).

    Args:
        point: The model.
        objective: Losses and regulariser.
        batches: Called for a fresh pass over the data.
        examples: Number of examples in a pass.
        kind: Which matrix.
        damping: λ, added to the *mean* curvature.
        seed: Of what a solver draws.
        budget: Bytes of gradients that are kept between passes over the data.
        subset: Batches of some of the examples, by their place; None where they cannot be had.
    """

    def __init__(
        self,
        point: Point,
        objective: Objective,
        batches: Callable[[], Iterable[Any]],
        examples: int,
        *,
        kind: CurvatureKind = "gauss-newton",
        damping: float = 0.0,
        seed: int = 0,
        budget: int = 2**30,
        subset: Callable[[Sequence[int]], Iterable[Any]] | None = None,
    ) -> None:
        self.point, self.objective = point, objective
        self.batches, self.examples = batches, examples
        self.kind, self.damping = kind, damping
        self.seed, self.budget, self.subset = seed, budget, subset
        self._gathered: dict[str, Gathered] = {}
        self._drawn: dict[str, Gathered] = {}

    def gathered(self, labels: Labels = "auto") -> Gathered:
        """Return the gradients of all examples, in factors, gathered once.

        Args:
            labels: Which output gradients make the curvature.

        Returns:
            The gradients.
        """
        if labels not in self._gathered:
            self._gathered[labels] = Gathered(
                self.point, self.objective, self.batches, labels, self.seed, self.budget
            )
        return self._gathered[labels]

    def drawn(self, labels: Labels, rows: int | None, shared: bool = False) -> Gathered:
        """Return the gradients of as many examples as have so many rows, drawn at random.

        Args:
            labels: Which output gradients make the curvature.
            rows: Positions of texts, places of filters; one of any other example. None takes all.
            shared: Of these examples, those that fall to this process.

        Returns:
            The gradients, without those of the examples' own losses; all of `gathered` where there
            are no more rows than that.

        Raises:
            ArgumentError: If examples are to be shared between processes that there are not.
        """
        if shared and not torch.distributed.is_initialized():
            raise ArgumentError.of(
                "all_reduce",
                expected="processes that torch.distributed knows",
                got="none",
                do="Call torch.distributed.init_process_group first, or leave it out.",
            )
        subset = self.subset
        count = self.examples
        if subset is not None and rows is not None:
            count = min(count, -(-rows // self._rows))
        if subset is None or (count == self.examples and not shared):
            return self.gathered(labels)
        key = f"{labels}, {rows} rows, shared: {shared}"
        if key not in self._drawn:
            places = list(range(count))
            if count < self.examples:
                generator = torch.Generator().manual_seed(self.seed)
                places = torch.randperm(self.examples, generator=generator)[:count].tolist()
            processes = torch.distributed.get_world_size() if shared else 1
            if shared:
                places = places[torch.distributed.get_rank() :: processes]
            self._drawn[key] = Gathered(
                self.point,
                self.objective,
                lambda: subset(places),
                labels,
                self.seed,
                self.budget,
                places=places,
                processes=processes,
                drawn=count < self.examples,
                own=False,
            )
        return self._drawn[key]

    @property
    def _rows(self) -> int:
        """Rows of the gradient of the first example's longest layer."""
        # By itself where it can be had: in a batch longer ones would pad it.
        batches = self.batches() if self.subset is None else self.subset([0])
        single = cut(next(iter(batches)), 1)
        pieces = Gathered(self.point, self.objective, lambda: ()).own(single)
        return max((p.pulled.rows.shape[2] for p in pieces if isinstance(p, Matrix)), default=1)

    @property
    def outputs(self) -> int:
        """Numbers that the model puts out for one example."""
        batch = cut(next(iter(self.batches())), 1)
        with torch.no_grad():
            return self.point.call(lambda m: self.objective.outputs(m, batch)).numel()

    @property
    def known(self) -> Gathered | None:
        """The gradients of all examples, where a solver gathered them; else None."""
        return next((g for g in self._gathered.values() if g.complete), None)

    def on(self, places: Sequence[int]) -> Curvature:
        """Return the same for some of the examples.

        Args:
            places: Their places in a pass over the data.

        Returns:
            The curvature of their mean loss, or this one where examples cannot be had by place.
        """
        subset = self.subset
        if subset is None:
            return self
        return Curvature(
            self.point,
            self.objective,
            lambda: subset(places),
            len(places),
            kind=self.kind,
            damping=self.damping,
        )

    def ridge(self) -> Tensor | None:
        """Return the Hessian of the regulariser where it is diagonal, ``[P]``; else None."""
        ones = torch.ones(1, self.point.size, dtype=wide(self.point.device))
        ones = ones.to(self.point.device)
        found = self._regularizer(ones)
        if not bool(found.any()):
            return found[0]
        signs = torch.arange(ones.shape[1], device=ones.device) * 0.6180339887
        signs = torch.where(signs.frac() < 0.5, 1.0, -1.0).to(ones)
        turned = self._regularizer(signs[None])
        return found[0] if torch.allclose(turned, found * signs, rtol=1e-5, atol=0) else None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return (H̄ + λI) v for each vector; they share the forward passes.

        Args:
            vectors: Shape ``[vector, P]``.

        Returns:
            Shape ``[vector, P]``, in double precision.
        """
        product = self._gauss_newton if self.kind == "gauss-newton" else self._hessian
        total = torch.zeros(vectors.shape, dtype=wide(self.point.device), device=vectors.device)
        with math_attention():
            for batch in self.batches():
                total += product(batch, vectors)
            return total / self.examples + self._regularizer(vectors) + self.damping * vectors

    def _hessian(self, batch: Any, vectors: Tensor) -> Tensor:
        losses = self.point.call(lambda m: self.objective.example_losses(m, batch))
        return self._second(losses.sum(), vectors)

    def _gauss_newton(self, batch: Any, vectors: Tensor) -> Tensor:
        outputs = self.point.call(lambda m: self.objective.outputs(m, batch))
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = self.point.gradient(outputs, grad_outputs=dummy, create_graph=True)
        free = outputs.detach().requires_grad_()
        slope = _grad(self.objective.losses(free, batch).sum(), free, create_graph=True)
        rows = []
        for tangents in zip(*self.point.shaped(vectors), strict=True):
            pushed = _along(pulled, tangents, dummy)  # J v
            curved = _grad(slope, free, grad_outputs=pushed, retain_graph=True)  # ∇²ℓ J v
            back = self.point.gradient(outputs, grad_outputs=curved, retain_graph=True)
            rows.append(self.point.flat(back))
        return torch.stack(rows)

    def _regularizer(self, vectors: Tensor) -> Tensor:
        value = self.point.call(self.objective.regularization)
        if value is None or not value.requires_grad:
            return torch.zeros_like(vectors, dtype=wide(self.point.device))
        return self._second(value, vectors)

    def _second(self, value: Tensor, vectors: Tensor) -> Tensor:
        gradient = self.point.gradient(value, create_graph=True)
        rows = []
        for tangents in zip(*self.point.shaped(vectors), strict=True):
            total = torch.stack([(g * t).sum() for g, t in zip(gradient, tangents, strict=True)])
            rows.append(self.point.flat(self.point.gradient(total.sum(), retain_graph=True)))
        return torch.stack(rows)


def _grad(value: Tensor, at: Tensor, **options: Any) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(value, at, allow_unused=True, **options)
    return torch.zeros_like(at) if found is None else found


def _along(pulled: list[Tensor], tangents: tuple[Tensor, ...], dummy: Tensor) -> Tensor:
    total = torch.stack([(g * t).sum() for g, t in zip(pulled, tangents, strict=True)]).sum()
    return _grad(total, dummy, retain_graph=True)
