"""Per-example gradients in factors, as one pass over a batch gives them: `Piece`.

The gradient of a weight matrix is Σᵣ leftᵣ ⊗ rightᵣ over the rows r of an example (positions of a
text, places of a filter): for a linear layer left is the output's gradient and right the input, a
bias being one more entry of the input that is always 1. It is never formed where a contraction of
the factors will do. Every other parameter has its gradient in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F

from .point import Point, at_least_single
from .reader import Layout, Read
from .recording import MATMULS, SUMS, Call, Made, Use

__all__ = ["Factor", "Matrix", "Piece", "Vector", "counted", "pieces_of"]

_T: Any = torch.Tensor

TIMES = frozenset({_T.mul, _T.__mul__, _T.__rmul__, torch.mul})
OVER = frozenset({_T.div, _T.__truediv__, torch.div})

NORMS: dict[Any, tuple[int, bool]] = {
    F.layer_norm: (2, True),
    F.rms_norm: (2, True),
    F.group_norm: (2, False),
    F.instance_norm: (3, False),
    F.batch_norm: (3, False),
}
"""Where a normalisation's gain stands, and whether it lies along the last dimensions or along the
second one (channels)."""


@dataclass(frozen=True, eq=False)
class Factor:
    """One side of the gradient of a matrix.

    Args:
        rows: ``[cotangent, example, row, size]``, with one cotangent where all share it; or ids
            ``[1, example, row]``, each for a vector that is 1 there and 0 elsewhere.
        size: Length of a row.
        pulled: Whether it is a gradient, one for each cotangent, rather than an input.
    """

    rows: Tensor
    size: int
    pulled: bool

    @property
    def is_ids(self) -> bool:
        """Whether ids stand for the rows."""
        return self.rows.ndim == 3

    def part(self, which: slice) -> Factor:
        """Return it for some of the cotangents."""
        return replace(self, rows=self.rows[which]) if self.pulled else self


@dataclass(frozen=True, eq=False)
class Matrix:
    """The gradient of a weight ``[left, right]`` (and of a bias, the last entry of one side)."""

    name: str
    bias: str | None
    left: Factor
    right: Factor

    @property
    def inputs(self) -> Factor:
        """The side that no cotangent changes."""
        return self.right if self.left.pulled else self.left

    @property
    def pulled(self) -> Factor:
        """The side that holds gradients."""
        return self.left if self.left.pulled else self.right

    def part(self, which: slice) -> Matrix:
        """Return it for some of the cotangents."""
        return replace(self, left=self.left.part(which), right=self.right.part(which))

    def examples(self, which: slice) -> Matrix:
        """Return it for some of the examples."""
        left = replace(self.left, rows=self.left.rows[:, which])
        return replace(self, left=left, right=replace(self.right, rows=self.right.rows[:, which]))

    @property
    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [self.left.rows, self.right.rows]


@dataclass(frozen=True, eq=False)
class Vector:
    """The gradient of any other parameter in full, ``[cotangent, example, number]``."""

    name: str
    values: Tensor

    def part(self, which: slice) -> Vector:
        """Return it for some of the cotangents."""
        return replace(self, values=self.values[which])

    def examples(self, which: slice) -> Vector:
        """Return it for some of the examples."""
        return replace(self, values=self.values[:, which])

    @property
    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [self.values]


Piece: TypeAlias = Matrix | Vector


def counted(piece: Matrix) -> tuple[Factor, Factor]:
    """Return both sides of a piece, the inputs without rows that have no gradient.

    Such rows, of padding for example, are no part of any example's gradient; in a mean of the
    inputs they would make it depend on how long the neighbours in a batch are.

    Args:
        piece: The gradients of some examples.

    Returns:
        Left and right; where rows are left out the others follow one another, as if of one example.
    """
    pulled = piece.pulled.rows
    if pulled.shape[2] == 1:  # Nothing pads an example's only row.
        return piece.left, piece.right
    live = torch.linalg.vector_norm(pulled, dim=-1).any(0)  # A tenth of the time of any(-1).
    if bool(live.all()):
        return piece.left, piece.right
    inputs = replace(piece.inputs, rows=piece.inputs.rows[:, live][:, None])
    return (piece.left, inputs) if piece.left.pulled else (inputs, piece.right)


@torch.no_grad()
def pieces_of(read: Read, point: Point) -> tuple[list[Piece], frozenset[str]]:
    """Return the gradients that a pass gave.

    Args:
        read: The pass.
        point: The parameters.

    Returns:
        One piece for each use and parameter (those of one parameter add up), and the parameters
        whose gradients have to be found in another way.
    """
    apart = set(read.lost)
    pairs = _pairs(read.uses)
    found: list[Piece] = []
    for index, (use, layout) in enumerate(zip(read.uses, read.layouts, strict=True)):
        of_use = [g[index] for g in read.gradients]
        known = next((g for g in of_use if g is not None), None)
        if known is None:
            continue
        pulled = [at_least_single(torch.zeros_like(known) if g is None else g) for g in of_use]
        pieces = _Reading(use, layout, pulled, read.examples, point, pairs).pieces()
        if pieces is None:
            apart |= use.roots
        else:
            found += pieces
    # What is read in factors at one place and in full at another has no one shape.
    in_full = {p.name for p in found if isinstance(p, Vector)}
    apart |= {p.name for p in found if isinstance(p, Matrix) and p.name in in_full}
    kept = (_without(p) if p.name in apart else p for p in found)
    return _merged(p for p in kept if p is not None and p.name not in apart), frozenset(apart)


def _without(piece: Piece) -> Vector | None:
    """Return what remains of a piece whose weight is found in another way: the joined bias."""
    if isinstance(piece, Vector) or piece.bias is None:
        return None
    return Vector(piece.bias, piece.pulled.rows.sum(2))


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Add up what one parameter has in full."""
    found: list[Piece] = []
    vectors: dict[str, Vector] = {}
    for piece in pieces:
        if isinstance(piece, Matrix):
            found.append(piece)
            continue
        before = vectors.get(piece.name)
        values = piece.values if before is None else before.values + piece.values
        vectors[piece.name] = Vector(piece.name, values)
    return [*found, *vectors.values()]


@dataclass(frozen=True, eq=False)
class _Reading:
    """One use and its output's gradients, on the way to pieces."""

    use: Use
    layout: Layout
    pulled: list[Tensor]
    examples: int
    point: Point
    pairs: dict[str, str]

    def pieces(self) -> list[Piece] | None:
        """Return the pieces, or None where no rule is known."""
        places = _places(self.use.call)
        if places is not None:
            x, weight, bias, turned = places
            return self._affine(x, weight, bias, turned)
        function = self.use.call.function
        if function in (F.conv1d, F.conv2d):
            return self._convolution()
        if function is F.embedding:
            return self._embedding()
        return self._elementwise()

    # -------------------------------------------------------------- matrices

    def _affine(
        self, x: Tensor, weight: Made | None, bias: Made | None, turned: bool
    ) -> list[Piece] | None:
        if x.ndim < 2:
            return None
        inputs = self.layout.rows(at_least_single(x), self.examples)
        pulled = _stacked([self.layout.rows(g, self.examples) for g in self.pulled])
        return self._matrix(inputs, pulled, weight, bias, turned)

    def _convolution(self) -> list[Piece] | None:
        call, dims = self.use.call, 1 if self.use.call.function is F.conv1d else 2
        weight, bias = call.made_at(1, "weight"), call.made_at(2, "bias")
        x, shape = call.at(0, "input"), call.at(1, "weight").shape
        steps = [_each(call.at(3 + i, n, d), dims) for i, (n, d) in enumerate(_WINDOW)]
        known = [s for s in steps if s is not None]
        if self.layout.second or call.at(6, "groups", 1) != 1 or x.ndim != dims + 2:
            return None
        if len(known) < len(steps):
            return None
        if dims == 1:  # One row of an image.
            known = [(d, *s) for s, (_, d) in zip(known, _WINDOW, strict=True)]
        stride, padding, dilation = known
        kernel = (1, *shape[2:]) if dims == 1 else tuple(shape[2:])
        x = at_least_single(x)[:, :, None] if dims == 1 else at_least_single(x)
        patches = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
        inputs = patches.reshape(self.examples, -1, patches.shape[-1])
        each = [g.flatten(2).transpose(1, 2) for g in self.pulled]
        pulled = _stacked([g.reshape(self.examples, -1, shape[0]) for g in each])
        if weight is not None and weight.key not in self.point.parameters:
            return None
        return self._matrix(inputs, pulled, weight, bias, turned=False)

    def _matrix(
        self, x: Tensor, g: Tensor, weight: Made | None, bias: Made | None, turned: bool
    ) -> list[Piece]:
        """Return the pieces of out = x Wᵀ + b, W ``[out, in]`` (turned: ``[in, out]``)."""
        found: list[Piece] = []
        joined = None
        if weight is not None and (weight.turned or weight.key in self.point.parameters):
            (name,) = weight.roots
            if bias is not None and self.pairs.get(name) == bias.key:
                joined = bias.key
                x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
            inputs, pulled = Factor(x[None], x.shape[-1], False), Factor(g, g.shape[-1], True)
            sides = (inputs, pulled) if turned != weight.turned else (pulled, inputs)
            found.append(Matrix(name, joined, *sides))
        elif weight is not None:
            whole = g.transpose(-1, -2) @ x
            found += self._rooted(weight, whole.transpose(-1, -2) if turned else whole)
        if bias is not None and joined is None:
            found += self._rooted(bias, g.sum(2))
        return found

    def _embedding(self) -> list[Piece] | None:
        call = self.use.call
        made, ids = call.made_at(1, "weight"), call.at(0, "input")
        if made is None or made.key not in self.point.parameters:
            return None
        padding = call.at(2, "padding_idx")
        rows = self.layout.split(ids, self.examples) if ids.ndim else None
        if rows is None or ids.shape != self.use.shape[:-1]:
            return None
        pulled = _stacked([self.layout.rows(g, self.examples) for g in self.pulled])
        if padding is not None:  # The row of the padding token is looked up, but not learned.
            pulled = pulled * (rows != padding % len(made.value))[..., None]
        left = Factor(rows[None], len(made.value), False)
        return [Matrix(made.key, None, left, Factor(pulled, pulled.shape[-1], True))]

    # -------------------------------------------------------------- everything else

    def _elementwise(self) -> list[Piece] | None:
        """Return the pieces of a gain or a shift: each number meets its own part of the output."""
        found: list[Piece] = []
        for made, factor, trailing in _gains(self.use.call):
            each = [self._reduced(g * factor, made.value.shape, trailing) for g in self.pulled]
            whole = [t for t in each if t is not None]
            if len(whole) < len(each):
                return None
            found += self._rooted(made, _stacked(whole))
        return found or None

    def _reduced(self, terms: Tensor, shape: torch.Size, trailing: bool) -> Tensor | None:
        """Sum over everything but the examples and the places of a parameter of this shape."""
        ahead = terms.ndim - len(shape) if trailing else 1
        if ahead < 0:
            return None
        padded = (*[1] * ahead, *shape, *[1] * (terms.ndim - ahead - len(shape)))
        if padded[1 if self.layout.second else 0] != 1:
            return None
        first = self.layout.first(terms)
        rest = padded[:1] + padded[2:] if self.layout.second else (1, *padded[1:])
        if not self.layout.second:
            first = first.reshape(self.examples, -1, *first.shape[1:])
        dims = [i + 1 for i, size in enumerate(rest) if size == 1]
        summed = first.sum(dims, keepdim=True) if dims else first
        return summed.reshape(self.examples, *shape)

    def _rooted(self, made: Made, gradient: Tensor) -> list[Piece]:
        """Return ``[cotangent, example, …]`` for what was made as it is for the parameters."""
        if made.key in self.point.parameters:
            return [Vector(made.key, gradient.reshape(*gradient.shape[:2], -1))]
        names = sorted(made.roots)
        leaves = [self.point.parameters[n].detach() for n in names]
        _, pull, *_ = vjp(lambda *p: made.push(dict(zip(names, p, strict=True))), *leaves)
        flat = gradient.flatten(0, 1).to(made.value.dtype)
        pulled = vmap(pull)(flat.reshape(len(flat), *made.value.shape))
        shape = (*gradient.shape[:2], -1)
        return [
            Vector(n, at_least_single(g).reshape(shape)) for n, g in zip(names, pulled, strict=True)
        ]


_WINDOW = (("stride", 1), ("padding", 0), ("dilation", 1))


def _places(call: Call) -> tuple[Tensor, Made | None, Made | None, bool] | None:
    """Return input, weight, bias and whether the weight is ``[in, out]``, of a matrix product."""
    if call.function is F.linear:
        return call.at(0, "input"), call.made_at(1, "weight"), call.made_at(2, "bias"), False
    if call.function is torch.addmm and not call.options:
        return call.args[1], call.made_at(2, "mat2"), call.made_at(0, "input"), True
    made = call.made.get((1,))
    if call.function in MATMULS and made is not None and made.value.ndim == 2:
        return call.args[0], made, None, True
    return None


def _gains(call: Call) -> Iterable[tuple[Made, Any, bool]]:
    """Yield what was made of parameters, the factor of each of its numbers, and how it lies.

    True: along the last dimensions of the output; False: along the second.
    """
    function = call.function
    if function in NORMS:
        yield from _gains_of_norm(call)
    elif function in SUMS and len(call.args) == 2 and not call.options:
        reverse = function is _T.__rsub__
        minus = reverse or function in (_T.sub, _T.__sub__, torch.sub)
        for slot, made in call.made.items():
            yield made, -1.0 if minus and (slot == (1,)) != reverse else 1.0, True
    elif len(call.made) == 1 and len(call.args) == 2 and not call.options:
        slot, made = next(iter(call.made.items()))
        if function in TIMES and slot in ((0,), (1,)):
            yield made, _detached(call.args[1 if slot == (0,) else 0]), True
        elif function in OVER and slot == (0,):
            yield made, 1 / _detached(call.args[1]), True


def _gains_of_norm(call: Call) -> Iterable[tuple[Made, Any, bool]]:
    place, trailing = NORMS[call.function]
    gain, shift = call.made_at(place, "weight"), call.made_at(place + 1, "bias")
    if gain is not None:
        yield gain, _normalised(call, place, torch.ones_like(gain.value.detach())), trailing
    if shift is not None:
        yield shift, 1.0, trailing


def _normalised(call: Call, place: int, ones: Tensor) -> Tensor:
    """Return the call with a gain of one and no shift."""
    args, options = list(call.args), dict(call.options)
    changes: list[tuple[int, str, Tensor | None]] = [(place, "weight", ones)]
    if call.function is not F.rms_norm:
        changes.append((place + 1, "bias", None))
    for index, name, value in changes:
        if name in options:
            options[name] = value
        elif index < len(args):
            args[index] = value
    found: Tensor = call.function(*args, **options)
    return at_least_single(found)


def _pairs(uses: Sequence[Use]) -> dict[str, str]:
    """Return by weight the bias that is always, and only, used together with it."""
    seen: dict[str, set[str | None]] = {}
    owners: dict[str, set[str]] = {}
    for use in uses:
        weight, bias = _weight_and_bias(use.call)
        for root in use.roots:
            owner = weight if bias == root and weight is not None else use.key
            if root != weight:
                owners.setdefault(root, set()).add(owner)
        if weight is not None:
            seen.setdefault(weight, set()).add(bias)
    single = {w: next(iter(b)) for w, b in seen.items() if len(b) == 1}
    return {w: b for w, b in single.items() if b is not None and owners.get(b) == {w}}


def _weight_and_bias(call: Call) -> tuple[str | None, str | None]:
    """Return the names of the parameters that are weight and bias of a call, whole or turned."""
    if call.function in (F.conv1d, F.conv2d):
        weight, bias = call.made_at(1, "weight"), call.made_at(2, "bias")
    else:
        places = _places(call)
        if places is None:
            return None, None
        _, weight, bias, _ = places
    if weight is None or not (weight.turned or weight.key in weight.roots):
        return None, None
    name = next(iter(weight.roots))
    return name, bias.key if bias is not None and bias.key in bias.roots else None


def _each(value: Any, dims: int) -> tuple[int, ...] | None:
    """Return a stride, padding or dilation for each dimension, or None if it is a word."""
    if isinstance(value, str):
        return None
    many = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    return many * dims if len(many) < dims else many


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Return tensors with a first dimension that counts them; one is not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _detached(value: Any) -> Any:
    return at_least_single(value.detach()) if isinstance(value, Tensor) else value
