"""K-FAC and EK-FAC: the curvature of each layer as a Kronecker product."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .blocks import Block, dense, grouped, in_parts
from .gathered import Gathered
from .outputs import Labels
from .pieces import Factor, Matrix, Piece, Vector, counted
from .point import wide
from .products import Curvature
from .solvers import APPROXIMATE, Inverse, Product, Solution

__all__ = ["EKFAC", "KFAC", "Eigen", "KeptBases", "eigen_of"]

LONGEST_SIDE = 4096
"""Longest side of a weight whose covariance is taken whole; beyond, only its diagonal."""

FEW_ROWS = 2**12
"""Rows that tell how far a basis has drifted."""

ROWS_FOR_EACH = 32
"""Rows for each number of a side that its eigenbasis is taken from, out of a random draw."""

TURNED = 2**17
"""Numbers that are turned into an eigenbasis at once; so many stay in a processor's cache."""

LONGEST_VECTOR = 1024
"""Most numbers of another parameter whose covariance is taken whole."""


@dataclass(frozen=True)
class KFAC:
    """Kronecker-factored curvature (Martens & Grosse 2015), inverted layer by layer.

    For a layer with inputs a (1 appended for a bias) and output gradients s, Jᵀ r of the columns r
    of the outputs' curvature: G ≈ S ⊗ A with A = E[a aᵀ] over rows (positions of a text, places of
    a filter) and S = E[Σ s sᵀ] over examples. Other parameters are blocks of their own, in full
    up to 1,024 numbers and diagonal beyond; so are the two sides of an embedding, whose inputs
    are one-hot. Different blocks are taken as independent.

    Args:
        labels: ``"auto"``, ``"exact"``, ``"sampled"`` or ``"true"``; see `Gathered`.
        relative_damping: None adds the one λ of the call to every eigenvalue. A number c adds c
            times the mean eigenvalue of each block instead (0.1 in Grosse et al. 2023); such
            scores are on no common scale over checkpoints.
        rows: Rows (positions of texts, places of filters) that factors and eigenvalues are means
            over: as many examples as have these are drawn at random, with the call's seed. The
            eigenbases of a side of d numbers take 32 d of them. None takes all.
        all_reduce: Share the examples out to the processes of `torch.distributed`'s default group,
            which all have to make the same call, and add the factors up. Share the scores out
            with ``candidates``.
        bases: Keeps the eigenbases from one call to the next; see `KeptBases`.
    """

    labels: Labels = "auto"
    relative_damping: float | None = None
    rows: int | None = 2**15
    all_reduce: bool = False
    bases: KeptBases | None = None

    @property
    def corrected(self) -> bool:
        """Whether eigenvalues are measured in the eigenbasis."""
        return False

    def prepare(self, product: Product) -> Inverse:
        """Gather the factors.

        Args:
            product: The curvature.

        Returns:
            What applies the inverse to right-hand sides.

        Raises:
            ArgumentError: If the product is no Gauss-Newton curvature of a model.
        """
        curvature = structured(product, type(self).__name__)
        gathered = curvature.drawn(self.labels, self.rows, self.all_reduce)
        eigen, known = self._eigen(gathered)
        ridge = curvature.ridge()
        dampings = {}
        for block in gathered.blocks:
            own = 0.0 if ridge is None else float(ridge[block.index].mean())
            scale = self.relative_damping
            mean = float(eigen[block.name].values.mean())
            dampings[block.name] = own + (curvature.damping if scale is None else scale * mean)
        known = {"factor_examples": gathered.count, **known}
        return Eigens(gathered.blocks, eigen, dampings, gathered.used, gathered.kind, known)

    def _eigen(self, gathered: Gathered) -> tuple[dict[str, Eigen], dict[str, Any]]:
        if self.bases is None:
            return eigen_of(gathered, corrected=self.corrected), {}
        return self.bases.eigen(gathered, corrected=self.corrected)

    def solve(self, product: Product, right: Tensor) -> Solution:
        """Return the approximate inverse applied to each right-hand side.

        Args:
            product: The curvature.
            right: Right-hand sides ``[query, P]``.

        Returns:
            The solution; its residual is not known.

        Raises:
            ArgumentError: If the product is no Gauss-Newton curvature of a model.
        """
        return self.prepare(product)(right)


class KeptBases:
    """Eigenbases that one call of `EKFAC` leaves for the next, at another checkpoint.

    Bases drift slowly, so that the next call measures the eigenvalues anew and no more. How far
    they drifted is looked at in the first batch: 1 − Σ (diagonal of Qᵀ C Q)² / ‖C‖² of each
    side's covariance C, less the same when they were made. Where the mean over sides exceeds
    ``most`` they are made anew.

    Args:
        most: Drift at which they are made anew.

    Example:
        >>> kept = KeptBases()
        >>> EKFAC(bases=kept).bases is kept
        True
    """

    def __init__(self, most: float = 0.2) -> None:
        self.most = most
        self._eigen: dict[str, Eigen] = {}
        self._first = 0.0

    def eigen(
        self, gathered: Gathered, *, corrected: bool = True
    ) -> tuple[dict[str, Eigen], dict[str, Any]]:
        """Return eigenvalues in kept bases, or in new ones where they drifted too far.

        Args:
            gathered: The gradients.
            corrected: Whether eigenvalues are measured in the bases.

        Returns:
            By name of the block; and the drift, to be told.

        Raises:
            ArgumentError: If the bases are of another model, or not measured in.
        """
        if not corrected:
            raise ArgumentError.of(
                "bases",
                expected="EKFAC, which measures eigenvalues in given bases",
                got="KFAC",
                do="Use EKFAC(bases=…).",
            )
        if not self._eigen:
            return self._anew(gathered), {"bases": "new"}
        shapes = {b.name: torch.Size(b.shape) for b in gathered.blocks}
        if shapes != {n: e.values.shape for n, e in self._eigen.items()}:
            raise ArgumentError.of(
                "bases", expected="those of the same parameters", got="others", do="KeptBases()."
            )
        drift = self._off(gathered) - self._first
        if drift > self.most:
            return self._anew(gathered), {"bases": "new", "basis_drift": drift}
        matrices = {b.name for b in gathered.blocks if len(b.shape) == 2}
        if len(matrices) < len(shapes):
            return self._anew(gathered, matrices), {"bases": "kept", "basis_drift": drift}
        return measured(gathered, self._eigen), {"bases": "kept", "basis_drift": drift}

    def _anew(self, gathered: Gathered, kept: Collection[str] = ()) -> dict[str, Eigen]:
        found = eigen_of(gathered, skipped={n: self._eigen[n] for n in kept})
        self._eigen = found
        if not kept:
            self._first = self._off(gathered)
        return found

    def _off(self, gathered: Gathered) -> float:
        """Return the part of covariances beside the diagonal, in the first batch."""
        chunk, shares = next(iter(gathered)), []
        for name, pieces in grouped(chunk.curvature).items():
            bases = self._eigen[name].bases
            for piece in pieces:
                if isinstance(piece, Matrix):
                    for factor, basis in zip((piece.left, piece.right), bases, strict=True):
                        if basis is not None and not factor.is_ids:
                            shares.append(_beside(factor.rows, basis))
        return sum(shares) / max(1, len(shares))


def _beside(rows: Tensor, basis: Tensor) -> float:
    flat = rows.reshape(-1, rows.shape[-1])[:FEW_ROWS] @ basis.to(rows.dtype)
    square = flat.T @ flat
    whole = float(square.square().sum())
    return 1 - float(square.diagonal().square().sum()) / whole if whole else 0.0


@dataclass(frozen=True)
class EKFAC(KFAC):
    """Eigenvalue-corrected K-FAC (George et al. 2018; Grosse et al. 2023 for influence).

    The eigenbases of `KFAC`, with the eigenvalues Λ = E[Σ (Q_Sᵀ (Jᵀ r) Q_A)²] measured in them over
    whole examples. Arguments as there.
    """

    @property
    def corrected(self) -> bool:
        """Whether eigenvalues are measured in the eigenbasis."""
        return True


def structured(product: Product, name: str) -> Curvature:
    """Return the curvature that a layer-wise solver needs.

    Args:
        product: What the solver was given.
        name: Of the solver.

    Returns:
        The curvature.

    Raises:
        ArgumentError: If it is no Gauss-Newton curvature of a model.
    """
    if not isinstance(product, Curvature) or product.kind != "gauss-newton":
        got = "the Hessian" if isinstance(product, Curvature) else "another product"
        raise ArgumentError.of(
            "curvature",
            expected=f'"gauss-newton" for {name}, which approximates that matrix',
            got=got,
            do='Use curvature="gauss-newton", or solver="cg".',
        )
    return product


@dataclass(frozen=True, eq=False)
class Eigen:
    """Eigenbases and eigenvalues of one block.

    Args:
        bases: One for each dimension of the block; None is the identity.
        values: Shaped like the block.
    """

    bases: tuple[Tensor | None, ...]
    values: Tensor

    def turned(self, part: Tensor) -> Tensor:
        """Return ``[vector, *shape]`` in the eigenbasis."""
        return _along(part, [None if b is None else b.to(part.dtype) for b in self.bases])

    def back(self, part: Tensor) -> Tensor:
        """Return what `turned` was given."""
        return _along(part, [None if b is None else b.T.to(part.dtype) for b in self.bases])

    def divided(self, turned: Tensor, damping: float) -> Tensor:
        """Return it over the damped eigenvalues; undamped, over those that are not zero alone."""
        lengths = self.values.to(turned) + damping
        if damping > 0:
            return turned / lengths
        rounding = max(lengths.shape) * torch.finfo(lengths.dtype).eps
        kept = lengths > rounding * lengths.max()
        return torch.where(kept, turned / lengths, 0.0)


def _along(part: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Return rows in other bases, the last dimension's first: it is one product for all rows."""
    if bases[-1] is not None:
        part = (part.reshape(-1, part.shape[-1]) @ bases[-1]).reshape(part.shape)
    if len(bases) == 2 and bases[0] is not None:
        part = bases[0].T @ part
    return part


@dataclass(frozen=True, eq=False)
class Eigens:
    """The inverse of a block-diagonal curvature with known eigenvalues."""

    blocks: Sequence[Block]
    eigen: dict[str, Eigen]
    dampings: dict[str, float]
    labels: str
    kind: torch.dtype
    known: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, right: Tensor) -> Solution:
        """Return the solution for each right-hand side ``[query, P]``."""
        found = torch.zeros_like(right)  # Blocks of a run need not cover all parameters.
        for block in self.blocks:
            own, damping = self.eigen[block.name], self.dampings[block.name]
            step = max(1, TURNED // block.size)
            for some, into in zip(torch.split(right, step), torch.split(found, step), strict=True):
                turned = own.turned(block.take(some, self.kind))
                block.put(into, own.back(own.divided(turned, damping)))
        return self._solution(found)

    def of(self, pieces: Iterable[Piece], count: int, size: int) -> tuple[Solution, Tensor]:
        """Return the solution for right-hand sides that are gradients in factors.

        The factors are turned rather than their products, and these exist for a few at a time.

        Args:
            pieces: Gradients, one cotangent; what has none of them counts as zero.
            count: How many right-hand sides.
            size: P.

        Returns:
            The solution, in the gradients' precision, and the norms of the right-hand sides.
        """
        device = self.blocks[0].device
        found = torch.zeros(count, size, dtype=self.kind, device=device)
        squares = torch.zeros(count, dtype=wide(device), device=device)
        by_name = grouped(pieces)
        for block in self.blocks:
            own, damping = self.eigen[block.name], self.dampings[block.name]
            start = 0
            for some in in_parts(block, by_name.get(block.name, []), TURNED):
                turned = _in_basis(block, some, own)
                where = slice(start, start + len(turned))
                squares[where] += turned.flatten(1).square().sum(1)
                block.put(found[where], own.back(own.divided(turned, damping)))
                start += len(turned)
        return self._solution(found), squares.sqrt()

    def _solution(self, found: Tensor) -> Solution:
        details = {"labels": self.labels, **self.known}
        if len(set(self.dampings.values())) > 1:
            details["damping_by_block"] = str(self.dampings)
        return Solution.approximate(found, APPROXIMATE, details)


def eigen_of(
    gathered: Gathered, *, corrected: bool = True, skipped: Mapping[str, Eigen] | None = None
) -> dict[str, Eigen]:
    """Return eigenbases and eigenvalues of every block.

    Args:
        gathered: The gradients.
        corrected: Measure the eigenvalues in the eigenbasis (EK-FAC) rather than multiply those
            of the factors (K-FAC).
        skipped: Blocks whose bases are known.

    Returns:
        By name of the block.
    """
    given = dict(skipped or {})
    sums = {b.name: _sums(b, gathered) for b in gathered.blocks if b.name not in given}
    for chunk in gathered:
        by_name = grouped(chunk.curvature)
        for name, own in sums.items():
            own.take(by_name.get(name, []), chunk.examples)
    if gathered.shared:
        for own in sums.values():
            own.reduce()
    made = {b.name: sums[b.name].eigen(b) for b in gathered.blocks if b.name in sums}
    eigen = {**made, **given}
    return measured(gathered, eigen) if corrected else eigen


def _sums(block: Block, gathered: Gathered) -> Sums:
    device = gathered.point.device
    limit = LONGEST_SIDE if len(block.shape) == 2 else LONGEST_VECTOR
    sides = [Side(size, size > limit, wide(device), device) for size in block.shape]
    known = [s.size for s in sides if not s.diagonal]
    if not gathered.drawn or len(sides) == 1 or not known:
        return Sums(sides)
    return Sums(sides, -(-ROWS_FOR_EACH * max(known) // gathered.processes))


class Side:
    """A sum of outer products, or of their diagonals where that is all that is needed."""

    def __init__(self, size: int, diagonal: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.diagonal, self.dtype, self.device = size, diagonal, dtype, device
        self.whole: Tensor | None = None
        self.line = torch.zeros(size, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows ``[…, size]``, or the vectors that ids stand for."""
        if not rows.is_floating_point():
            counts = torch.bincount(rows.flatten(), minlength=self.size)
            self.line += counts.to(self.dtype)
            return
        flat = rows.reshape(-1, self.size)
        if self.diagonal:
            self.line += flat.square().sum(0).to(self.dtype)
            return
        product = (flat.T @ flat).to(self.dtype)
        self.whole = product if self.whole is None else self.whole + product

    def reduce(self) -> None:
        """Add up what all processes have."""
        torch.distributed.all_reduce(self.line)
        made = torch.tensor(int(self.whole is not None), device=self.device)
        torch.distributed.all_reduce(made)
        if int(made):
            if self.whole is None:
                self.whole = torch.diag(torch.zeros_like(self.line))
            torch.distributed.all_reduce(self.whole)

    def eigen(self, scale: float) -> tuple[Tensor, Tensor | None]:
        """Return eigenvalues and eigenvectors; None for those of a diagonal matrix."""
        if self.whole is None:
            return self.line * scale, None
        matrix = (self.whole + torch.diag(self.line)) * scale
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return values.clamp(min=0), vectors


@dataclass(eq=False)
class Sums:
    """The covariances of a block's sides while they are gathered.

    Args:
        sides: One for each dimension.
        most: Rows after which no more are taken; None takes all.
    """

    sides: list[Side]
    most: int | None = None
    examples: int = 0
    seen: int = 0
    rows: list[int] = field(default_factory=lambda: [0, 0])
    pulled: list[bool] = field(default_factory=lambda: [True, True])

    def take(self, pieces: Sequence[Piece], examples: int) -> None:
        """Add the pieces of some examples, or of the first of them if that is enough."""
        if self.most is not None:
            rows = max((p.pulled.rows.shape[2] for p in pieces if isinstance(p, Matrix)), default=1)
            examples = min(examples, max(0, -(-(self.most - self.seen) // rows)))
            self.seen += examples * rows
        if examples:
            self.examples += examples
            for piece in pieces:
                self.add(piece.examples(slice(0, examples)))

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        if isinstance(piece, Vector):
            self.sides[0].add(piece.values)
            return
        for place, factor in enumerate(counted(piece)):
            self.sides[place].add(factor.rows)
            if not factor.pulled:
                self.pulled[place] = False
                self.rows[place] += factor.rows.shape[1] * factor.rows.shape[2]

    def reduce(self) -> None:
        """Add up what all processes have."""
        device = self.sides[0].line.device
        counts = torch.tensor([self.examples, *self.rows], device=device)
        torch.distributed.all_reduce(counts)
        self.examples, *self.rows = counts.tolist()
        self.pulled = [r == 0 for r in self.rows]
        for side in self.sides:
            side.reduce()

    def eigen(self, block: Block) -> Eigen:
        """Return the eigenvectors, and the products of the eigenvalues."""
        scales = [
            1 / max(1, self.examples if self.pulled[i] else self.rows[i])
            for i in range(len(block.shape))
        ]
        pairs = [side.eigen(scale) for side, scale in zip(self.sides, scales, strict=True)]
        values = pairs[0][0]
        if len(pairs) == 2:
            values = values[:, None] * pairs[1][0]
        return Eigen(tuple(vectors for _, vectors in pairs), values)


def measured(gathered: Gathered, eigen: dict[str, Eigen]) -> dict[str, Eigen]:
    """Return the bases with eigenvalues that are mean squares of gradients in them.

    Args:
        gathered: The gradients.
        eigen: Bases; the eigenvalues of blocks that are no matrix are kept.

    Returns:
        By name of the block.
    """
    blocks = {b.name: b for b in gathered.blocks if len(b.shape) == 2}
    totals = {n: torch.zeros_like(eigen[n].values) for n in blocks}
    examples = 0
    for chunk in gathered:
        examples += chunk.examples
        for name, pieces in grouped(chunk.curvature).items():
            if name in blocks:
                totals[name] += _squares(blocks[name], pieces, eigen[name])
    if gathered.shared:
        examples = _everywhere(examples, gathered.point.device)
        for total in totals.values():
            torch.distributed.all_reduce(total)
    new = {n: replace(eigen[n], values=t / max(1, examples)) for n, t in totals.items()}
    return {**eigen, **new}


def _everywhere(count: int, device: torch.device) -> int:
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def _in_basis(block: Block, pieces: Sequence[Piece], eigen: Eigen) -> Tensor:
    """Return gradients in full ``[example, *shape]`` in the eigenbasis, by the shorter way."""
    matrices = [p for p in pieces if isinstance(p, Matrix)]
    if len(block.shape) == 2 and len(matrices) == len(pieces):
        left, right = block.shape
        rows = sum(p.pulled.rows.shape[2] for p in matrices)
        if rows * (left * left + right * right) < left * right * (left + right):
            return dense(block, [_turned(p, eigen) for p in matrices])[0]
    return eigen.turned(dense(block, pieces)[0])


def _squares(block: Block, pieces: Sequence[Piece], eigen: Eigen) -> Tensor:
    """Return Σ (Q_Lᵀ gradient Q_R)² over cotangents and examples."""
    matrices = [p for p in pieces if isinstance(p, Matrix)]
    if len(matrices) == 1 and matrices[0].inputs.is_ids:
        return _squares_by_id(_turned(matrices[0], eigen), block)
    if len(matrices) == 1 and matrices[0].pulled.rows.shape[2] == 1:
        return _squares_of_rows(matrices[0], eigen)
    total, turned = torch.zeros_like(eigen.values), [_turned(p, eigen) for p in matrices]
    for part in in_parts(block, turned):
        whole = dense(block, part)
        total += whole.flatten(0, 1).square_().sum(0).to(total.dtype)
    return total


def _squares_of_rows(piece: Matrix, eigen: Eigen) -> Tensor:
    """Return the squares where a gradient is one row's: those of its factors, multiplied."""
    total = torch.zeros_like(eigen.values)
    cotangents, examples, _, size = piece.pulled.rows.shape
    step = max(1, TURNED // (cotangents * size))
    for start in range(0, examples, step):
        one = _turned(piece.examples(slice(start, start + step)), eigen)
        left, right = (f.rows[:, :, 0].square().sum(0) for f in (one.left, one.right))
        total += left.T @ right
    return total


def _turned(piece: Matrix, eigen: Eigen) -> Matrix:
    kind = piece.pulled.rows.dtype  # Ids have none of their own.
    left, right = (None if basis is None else basis.to(kind) for basis in eigen.bases)
    return replace(piece, left=_rotated(piece.left, left), right=_rotated(piece.right, right))


def _rotated(factor: Factor, basis: Tensor | None) -> Factor:
    if basis is None:
        return factor
    if factor.is_ids:
        return replace(factor, rows=basis[factor.rows])
    rows = factor.rows  # As one product: what is cut from a batch would be many small ones.
    turned = rows.reshape(-1, rows.shape[-1]) @ basis.to(rows.dtype)
    return replace(factor, rows=turned.reshape(rows.shape))


def _squares_by_id(piece: Matrix, block: Block) -> Tensor:
    """Return the squares where one side is one-hot, without a gradient of the whole table."""
    ids, rows = piece.inputs.rows[0], piece.pulled.rows
    size = piece.inputs.size
    keys = ids + size * torch.arange(len(ids), device=ids.device)[:, None]
    unique: Any = torch.unique
    pairs, places = unique(keys.flatten(), return_inverse=True)
    total = rows.new_zeros(size, rows.shape[-1])
    for each in rows:
        added = rows.new_zeros(len(pairs), rows.shape[-1])
        added.index_add_(0, places, each.flatten(0, 1))
        total.index_add_(0, pairs % size, added.square())
    found = total if piece.left.is_ids else total.T
    return found.reshape(block.shape).double() if found.device.type != "mps" else found
