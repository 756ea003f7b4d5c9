"""Kronecker factors of the curvature, gathered from the backward passes of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, dense, grouped, in_parts, starts_of
from .during_pieces import known_parameters, pieces_of_call
from .factors import LONGEST_SIDE, LONGEST_VECTOR, Eigen, Eigens
from .pieces import Factor, Piece, Vector, counted
from .point import wide
from .solvers import Inverse, Product, Solution

__all__ = ["TrainingFactors"]


class TrainingFactors:
    """K-FAC or EK-FAC of the training loss, without a pass of its own.

    Hooks on the layers read inputs and output gradients of the steps that are taken anyway;
    nothing that training computes is changed. For a layer with inputs a and gradients s of the
    examples' own losses, A = E[a aᵀ] and S = E[Σ s sᵀ] are means over the latest batches, each
    weighted ``decay`` times less than the one after it. These are factors of the *empirical*
    Fisher matrix (true labels), which equals Gauss-Newton's only where the model's own labels
    would be the true ones. The loss has to be a mean over the batch's examples.

    With ``corrected`` the eigenvalues are E[(Q_Sᵀ ∇W Q_A)²], measured since the last `refresh` in
    the eigenbases found at it (EK-FAC; George et al. 2018 amortise it in the same way).

    Covered are Linear, Conv1d and Conv2d without groups, ``Conv1D`` of transformers, Embedding,
    LayerNorm and RMSNorm; other parameters count as fixed, and their share is said.

    Args:
        model: The model that is trained.
        damping: λ, added to every eigenvalue; the same at every step, so that scores compare.
        decay: Weight of the past, 0 to 1.
        corrected: EK-FAC rather than K-FAC.
    """

    def __init__(
        self, model: nn.Module, *, damping: float, decay: float = 0.95, corrected: bool = False
    ) -> None:
        self.damping, self.decay, self.corrected = damping, decay, corrected
        self.names = known_parameters(model)
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        self.examples = 0.0
        self.batches = 0
        self._sums: dict[str, _Sums] = {}
        self._bases: dict[str, Eigen] = {}
        self._squares: dict[str, Tensor] = {}
        self._squared = 0.0
        self._fresh: list[Piece] = []

    @contextmanager
    def watching(self, model: nn.Module, examples: int, scale: float) -> Iterator[None]:
        """Gather what one forward and backward pass of training shows.

        Args:
            model: The model.
            examples: Number of examples in the batch.
            scale: What the loss was multiplied by before the backward pass (a gradient scaler),
                over what it was divided by (accumulation).

        Yields:
            Nothing. What was seen counts once `take` is called.
        """
        with ExitStack() as stack:
            self.attach(stack, model, examples, scale)
            yield
        self.take(examples)

    def attach(self, stack: ExitStack, model: nn.Module, examples: int, scale: float) -> None:
        """Put the hooks in place.

        Args:
            stack: Closing it takes them off again.
            model: The model.
            examples: Number of examples in the batch.
            scale: See `watching`.
        """
        self._fresh = []
        for module in self.names:
            hook = self._hook(examples, examples / scale)
            stack.callback(module.register_forward_hook(hook).remove)

    def _hook(self, examples: int, factor: float) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            usable = args and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            if usable and output.requires_grad and module.training:
                x = args[0].detach()
                output.register_hook(lambda g: self._note(module, x, g, examples, factor))

        return hook

    @torch.no_grad()
    def _note(self, module: nn.Module, x: Tensor, g: Tensor, examples: int, factor: float) -> None:
        """Keep a layer's inputs and output gradients; returns nothing, so that none is changed."""
        self._fresh += pieces_of_call(module, self.names[module], x, g * factor, examples)

    @torch.no_grad()
    def take(self, examples: int) -> None:
        """Count what was seen; a batch with a gradient that is not finite is left out.

        Args:
            examples: Number of examples in the batch.
        """
        fresh, self._fresh = self._fresh, []
        finite = [bool(t.isfinite().all()) for p in fresh for t in p.tensors if _is_float(t)]
        if not fresh or not all(finite):
            return
        self.examples = self.decay * self.examples + examples
        self.batches += 1
        pieces = grouped(fresh)
        for name, parts in pieces.items():
            sums = self._sums.setdefault(name, _Sums())
            sums.fade(self.decay)
            for part in parts:
                sums.add(part)
        if self.corrected and self._bases:
            self._measure(pieces, examples)

    def _measure(self, pieces: Mapping[str, list[Piece]], examples: int) -> None:
        """Add the squares of whole examples' gradients in the eigenbases."""
        self._squared = self.decay * self._squared + examples
        for name, parts in pieces.items():
            basis = self._bases.get(name)
            if basis is None:
                continue
            block = Block(name, tuple(basis.values.shape), 0, basis.values.device)
            total = self.decay * self._squares.get(name, torch.zeros_like(basis.values))
            for some in in_parts(block, parts):
                turned = basis.turned(dense(block, some)[0])
                total += turned.square().sum(0).to(total.dtype)
            self._squares[name] = total

    # ---------------------------------------------------------------- what they are for

    def refresh(self) -> None:
        """Find eigenbases anew; corrected eigenvalues are measured in them from now on."""
        self._bases = self._eigen()
        self._squares, self._squared = {}, 0.0

    def prepare(self, product: Product) -> Inverse:
        """Return what applies the inverse, as a solver of `influence_scores`.

        Args:
            product: Not used: the factors are known.

        Returns:
            A function of right-hand sides ``[query, P]``.
        """
        return self.inverse()

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the inverse applied to each right-hand side.

        Args:
            product: Not used.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution; its residual is not known.
        """
        return self.inverse()(right)

    def inverse(self) -> Inverse:
        """Return what applies (F̂ + λI)⁻¹ to rows ``[query, P]``, block by block."""
        eigen = self._eigen()
        lagged = self.corrected and bool(self._squares)
        if lagged:
            for name, total in self._squares.items():
                if name in self._bases:
                    eigen[name] = replace(self._bases[name], values=total / self._squared)
        blocks = self._blocks(eigen)
        dampings = {b.name: self.damping for b in blocks}
        applied = Eigens(
            blocks=blocks, eigen=eigen, dampings=dampings, labels="true", kind=torch.float32
        )
        covered = sum(b.size for b in blocks) / max(1, sum(s.numel() for s in self.shapes.values()))
        facts = {
            "factors": "empirical Fisher matrix of training batches, "
            + ("EK-FAC in lagged eigenbases" if lagged else "K-FAC"),
            "gathered_batches": self.batches,
            "effective_examples": self.examples,
            "decay": self.decay,
        }

        def apply(right: Tensor) -> Solution:
            solution = applied(right)
            return replace(solution, details={**solution.details, **facts}, covered=covered)

        return apply

    def _eigen(self) -> dict[str, Eigen]:
        return {name: sums.eigen(self.examples) for name, sums in self._sums.items()}

    def _blocks(self, eigen: Mapping[str, Eigen]) -> list[Block]:
        starts = starts_of(self.shapes)
        found = []
        for name, own in eigen.items():
            sums, shape = self._sums[name], tuple(own.values.shape)
            last, turned = starts.get(sums.bias or "", 0), not sums.pulled[0]
            device = own.values.device
            found.append(Block(name, shape, starts[name], device, sums.bias, last, turned))
        return found


@dataclass(eq=False)
class _Sums:
    """Sums of outer products of both sides of a block (or of the one side of a vector)."""

    wholes: list[Tensor] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    pulled: list[bool] = field(default_factory=list)
    bias: str | None = None

    def fade(self, decay: float) -> None:
        """Let the past count less."""
        for whole in self.wholes:
            whole *= decay
        self.rows = [decay * r for r in self.rows]

    def add(self, piece: Piece) -> None:
        """Add a piece; sides beyond a size keep their diagonal alone."""
        if isinstance(piece, Vector):
            sides = [Factor(piece.values[:, :, None], piece.values.shape[-1], True)]
            limit = LONGEST_VECTOR
        else:
            sides, limit, self.bias = [*counted(piece)], LONGEST_SIDE, piece.bias
        for place, side in enumerate(sides):
            if len(self.wholes) <= place:
                diagonal = side.size > limit or side.is_ids
                shape = (side.size,) if diagonal else (side.size, side.size)
                self.wholes.append(torch.zeros(shape, device=side.rows.device))
                self.rows.append(0.0)
                self.pulled.append(True)
            self._add(place, side)

    def _add(self, place: int, side: Factor) -> None:
        whole = self.wholes[place]
        if side.is_ids:
            counts = torch.bincount(side.rows.flatten(), minlength=side.size).to(whole.dtype)
            whole += counts if whole.ndim == 1 else torch.diag(counts)
        else:
            flat = side.rows.reshape(-1, side.size)
            whole += flat.square().sum(0) if whole.ndim == 1 else flat.T @ flat
        if not side.pulled:
            self.pulled[place] = False
            self.rows[place] += side.rows.shape[1] * side.rows.shape[2]

    def eigen(self, examples: float) -> Eigen:
        """Return eigenvectors, and the products of the eigenvalues."""
        values: list[Tensor] = []
        bases: list[Tensor | None] = []
        for whole, rows, pulled in zip(self.wholes, self.rows, self.pulled, strict=True):
            mean = whole.to(wide(whole.device)) / max(examples if pulled else rows, 1e-30)
            if mean.ndim == 1:
                values.append(mean)
                bases.append(None)
            else:
                found, vectors = torch.linalg.eigh(mean)
                values.append(found.clamp(min=0))
                bases.append(vectors)
        product = values[0] if len(values) == 1 else values[0][:, None] * values[1]
        return Eigen(tuple(bases), product)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
