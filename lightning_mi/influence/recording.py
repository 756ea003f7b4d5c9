"""Where parameters enter a forward pass: the record from which per-example gradients are read.

A mode sees every torch function that runs inside the model. Where one takes a parameter (or what
was made of parameters alone, such as a slice of a position table) and is linear in it,
out = f(x, θ), the product of an example's gradient with a direction d is Σ g · f(x, d) over the
example's part of the output, with g the gradient of the losses at out. So one backward pass to the
outputs serves all examples and all directions, tied and reused modules add up by themselves, and no
per-example gradient is stored. What cannot be read in this way is named in `Recorder.lost`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Recorder", "Use"]

Direction: TypeAlias = Mapping[str, Tensor]
"""One tensor for each parameter name."""

Push: TypeAlias = Callable[[Direction], Any]
"""Derivative of something made of parameters along a direction."""

Slot: TypeAlias = tuple[int | str, ...]
"""Path of an argument: position or keyword, then position inside a list."""

_T: Any = torch.Tensor

VIEWS = frozenset(
    {
        _T.t, torch.t, _T.T.__get__, _T.mT.__get__, _T.transpose, torch.transpose, _T.permute,
        torch.permute, _T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.expand,
        _T.expand_as, _T.unsqueeze, torch.unsqueeze, _T.squeeze, torch.squeeze, _T.__getitem__,
        _T.narrow, torch.narrow, _T.contiguous, _T.clone, torch.clone, _T.to, _T.type, _T.float,
        _T.double, _T.type_as, _T.repeat, _T.neg, _T.__neg__, torch.neg, _T.split, torch.split,
        _T.chunk, torch.chunk, _T.unbind, torch.unbind, _T.index_select, torch.index_select,
        torch.broadcast_to, _T.broadcast_to, _T.unflatten,
    }
)  # fmt: skip
"""Linear in their one tensor of parameters; the result is again made of parameters alone."""

PRODUCTS = frozenset(
    {
        _T.mul, _T.__mul__, _T.__rmul__, torch.mul, _T.matmul, _T.__matmul__, _T.__rmatmul__,
        torch.matmul, _T.mm, torch.mm, _T.bmm, torch.bmm, torch.einsum,
    }
)  # fmt: skip
"""Linear in each tensor, the others kept."""

SUMS: dict[Any, Any] = {
    _T.add: torch.add,
    _T.__add__: torch.add,
    _T.__radd__: torch.add,
    _T.__iadd__: torch.add,
    _T.add_: torch.add,
    torch.add: torch.add,
    _T.sub: torch.sub,
    _T.__sub__: torch.sub,
    torch.sub: torch.sub,
    _T.__rsub__: _T.__rsub__,
}
"""Sums of two terms, and what repeats them on other terms."""

MATMULS = frozenset({torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm})
"""x · W, where W comes second."""

TRANSPOSES = frozenset({_T.t, torch.t, _T.T.__get__, _T.mT.__get__, _T.transpose, torch.transpose})
"""Transposing a matrix; its two dimensions leave no choice."""

QUOTIENTS = frozenset({_T.div, _T.__truediv__, torch.div})
"""Linear in the first of their arguments."""

LISTS = frozenset({torch.cat, torch.concat, torch.stack})
"""Linear in all entries of the list that is their first argument."""

AFFINE: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((1, "weight"), (2, "bias")),
    F.conv1d: ((1, "weight"), (2, "bias")),
    F.conv2d: ((1, "weight"), (2, "bias")),
    F.conv3d: ((1, "weight"), (2, "bias")),
    F.conv_transpose1d: ((1, "weight"), (2, "bias")),
    F.conv_transpose2d: ((1, "weight"), (2, "bias")),
    F.conv_transpose3d: ((1, "weight"), (2, "bias")),
    F.layer_norm: ((2, "weight"), (3, "bias")),
    F.group_norm: ((2, "weight"), (3, "bias")),
    F.instance_norm: ((3, "weight"), (4, "bias")),
    F.batch_norm: ((3, "weight"), (4, "bias")),
    F.rms_norm: ((2, "weight"), (3, "")),
    torch.addmm: ((2, "mat2"), (0, "input")),
}
"""Linear in weight and bias together, the input kept: where these two arguments stand."""


@dataclass(frozen=True, eq=False)
class Made:
    """A parameter, or a tensor made of parameters alone.

    Args:
        value: The tensor; holding it keeps its identity from being given to another.
        key: Tells it apart from every other in this pass, and finds it again in the next.
        roots: Names of the parameters it is made of.
        push: Its derivative along a direction.
        turned: Whether it is a parameter's transpose.
    """

    value: Tensor
    key: str
    roots: frozenset[str]
    push: Push
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A torch function that ran, and which of its arguments were made of parameters."""

    function: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    made: Mapping[Slot, Made]

    def made_at(self, index: int, name: str) -> Made | None:
        """Return what was made of parameters at one argument, or None."""
        return self.made.get((name,)) or self.made.get((index,))

    def at(self, index: int, name: str, default: Any = None) -> Any:
        """Return one argument."""
        if name in self.options:
            return self.options[name]
        return self.args[index] if index < len(self.args) else default


@dataclass(frozen=True, eq=False)
class Matrix:
    """What a matrix product multiplies: ``out = x · Wᵀ + b``, W ``[out, in]``."""

    x: Tensor
    weight: Push
    bias: Push | None


@dataclass(frozen=True, eq=False)
class Use:
    """One call that takes parameters and mixes them with the data.

    Args:
        key: Finds the same call in another pass.
        roots: Names of the parameters in it.
        push: Its derivative along a direction, all inputs kept; broadcasts to the output.
        edge: Where in the graph the output's gradient is.
        shape: Shape of the output.
        matrix: Set where it is a matrix product.
        kept: Inputs that `push` needs, with their version then.
        call: The call itself.
    """

    key: str
    roots: frozenset[str]
    push: Push
    edge: GradientEdge
    shape: torch.Size
    matrix: Matrix | None
    kept: tuple[tuple[Tensor, int], ...]
    call: Call

    @property
    def intact(self) -> bool:
        """Whether no input was overwritten since the call."""
        return all(t._version == version for t, version in self.kept)


class Recorder(TorchFunctionMode):
    """Records every use of some parameters while it is active.

    Args:
        parameters: By name; the tensors that the model really computes with.
        through: Keys of uses that are to count as made of parameters alone, because their result
            belongs to no example (an embedding of positions that the whole batch shares).
    """

    def __init__(self, parameters: Mapping[str, Tensor], through: frozenset[str]) -> None:
        super().__init__()
        self.through = through
        self.names = frozenset(parameters)
        self.uses: list[Use] = []
        self.lost: set[str] = set()
        self.reads: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._made = {
            id(p): Made(p, name, frozenset([name]), _pick(name)) for name, p in parameters.items()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function and note what parameters it took."""
        options = kwargs or {}
        before = {s: m for s, t in _tensors(args, options) if (m := self._made.get(id(t)))}
        out = func(*args, **options)
        if before:
            self._note(func, args, options, before, out)
        return out

    def _note(self, func: Any, args: Any, options: Any, made: dict[Slot, Made], out: Any) -> None:
        results = [out] if isinstance(out, Tensor) else list(out) if _is_list(out) else []
        if not any(isinstance(r, Tensor) and r.requires_grad for r in results):
            return
        if any(r is m.value for r in results for m in made.values()):
            return  # Nothing was done, for example by p.float() in float32.
        self.reads.update(m.key for m in made.values())
        roots = frozenset[str]().union(*(m.roots for m in made.values()))
        push = _derivative(func, args, options, made)
        if push is None:
            self.lost |= roots
            return
        name = f"{'+'.join(m.key for m in made.values())}>{func.__name__}"
        self._calls[name] += 1
        key = f"{name}#{self._calls[name]}"
        if _alone(func, args, options, made) or key in self.through:
            turned = _turns(func, made) and isinstance(out, Tensor)
            for index, result in enumerate(results):
                part = push if isinstance(out, Tensor) else _entry(push, index)
                self._made[id(result)] = Made(result, f"{key}.{index}", roots, part, turned)
        elif isinstance(out, Tensor):
            others = [t for s, t in _tensors(args, options) if s not in made]
            kept = () if func in SUMS else tuple((t, t._version) for t in others)
            matrix = _matrix(func, args, options, made)
            edge, call = get_gradient_edge(out), Call(func, args, options, made)
            self.uses.append(Use(key, roots, push, edge, out.shape, matrix, kept, call))
        else:
            self.lost |= roots


def _turns(func: Any, made: Mapping[Slot, Made]) -> bool:
    """Say whether the call transposes a parameter that is a matrix."""
    (first, *others) = made.values()
    whole = first.key in first.roots and first.value.ndim == 2 and not others
    return func in TRANSPOSES and whole


def _derivative(func: Any, args: Any, options: Any, made: dict[Slot, Made]) -> Push | None:
    """Return d ↦ the derivative of the call along d, or None where no rule is known."""
    if func in AFFINE:
        return _affine(func, args, options, made)
    if func in LISTS:
        others = {s: torch.zeros_like(t) for s, t in _tensors(args, options) if s not in made}
        return _replay(func, args, options, made, others)
    if func in SUMS:
        terms = {(i,): 0.0 for i in (0, 1) if i < len(args) and (i,) not in made}
        fixed: dict[Slot, Any] = {s: _zero(args[s[0]], made) for s in terms}
        return _replay(SUMS[func], args, options, made, fixed) if len(args) == 2 else None
    if len(made) != 1:
        return None
    (slot,) = made
    if func in VIEWS and slot == (0,):
        return _replay(func, args, options, made, {})
    if func is F.embedding:
        return _embedding(args, options, made) if slot == (1,) else None
    if func in PRODUCTS or (func in QUOTIENTS and slot == (0,)):
        return _replay(func, args, options, made, {})
    return None


def _affine(func: Any, args: Any, options: Any, made: dict[Slot, Made]) -> Push | None:
    places = [(_slot(place, args, options), place) for place in AFFINE[func]]
    slots = [slot for slot, _ in places if slot is not None]
    if any(slot not in slots for slot in made) or (func is torch.addmm and len(options)):
        return None
    fixed: dict[Slot, Any] = {}
    for slot in slots:
        value = _at(args, options, slot)
        if slot not in made and isinstance(value, Tensor):
            fixed[slot] = torch.zeros_like(value)
    return _replay(func, args, options, made, fixed)


def _replay(
    func: Any, args: Any, options: Any, made: Mapping[Slot, Made], fixed: Mapping[Slot, Any]
) -> Push:
    def push(direction: Direction) -> Any:
        values = {**fixed, **{slot: m.push(direction) for slot, m in made.items()}}
        return func(*_with(args, values), **_with_names(options, values))

    return push


def _alone(func: Any, args: Any, options: Any, made: dict[Slot, Made]) -> bool:
    """Say whether the result depends on no other tensor than those made of parameters."""
    if func in VIEWS:
        return True
    return func is not F.embedding and all(s in made for s, _ in _tensors(args, options))


def _matrix(func: Any, args: Any, options: Any, made: dict[Slot, Made]) -> Matrix | None:
    pushes = {slot: m.push for slot, m in made.items()}
    if func is F.linear:
        weight, bias = (_slot(place, args, options) for place in AFFINE[func])
        if weight in made:
            return Matrix(args[0].detach(), pushes[weight], pushes.get(bias) if bias else None)
    elif func is torch.addmm and (2,) in made:
        return Matrix(args[1].detach(), _turned(pushes[(2,)]), pushes.get((0,)))
    elif func in MATMULS and (1,) in made and made[(1,)].value.ndim == 2 and args[0].ndim >= 2:
        return Matrix(args[0].detach(), _turned(pushes[(1,)]), None)
    return None


def _turned(push: Push) -> Push:
    return lambda direction: push(direction).T


def _pick(name: str) -> Push:
    return lambda direction: direction[name]


def _entry(push: Push, index: int) -> Push:
    return lambda direction: push(direction)[index]


def _zero(term: Any, made: dict[Slot, Made]) -> Any:
    like = term if isinstance(term, Tensor) else next(iter(made.values())).value
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _embedding(args: Any, options: Any, made: dict[Slot, Made]) -> Push | None:
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, args[2:], strict=False)), **options}
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    ids, table, padding = args[0], made[(1,)], given.get("padding_idx")
    if padding is None:
        return lambda direction: F.embedding(ids, table.push(direction))
    # The row of the padding token is looked up, but gets no gradient.
    learned = (ids != padding % len(table.value))[..., None]
    return lambda direction: F.embedding(ids, table.push(direction)) * learned


def _tensors(args: Sequence[Any], options: Mapping[str, Any]) -> Iterator[tuple[Slot, Tensor]]:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *options.items()]
    for key, value in named:
        if isinstance(value, Tensor):
            yield (key,), value
        elif _is_list(value):
            for index, entry in enumerate(value):
                if isinstance(entry, Tensor):
                    yield (key, index), entry


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _slot(place: tuple[int, str], args: Sequence[Any], options: Mapping[str, Any]) -> Slot | None:
    index, name = place
    if name in options:
        return (name,)
    return (index,) if index < len(args) else None


def _at(args: Sequence[Any], options: Mapping[str, Any], slot: Slot) -> Any:
    return options[slot[0]] if isinstance(slot[0], str) else args[slot[0]]


def _with(args: Sequence[Any], values: Mapping[Slot, Any]) -> list[Any]:
    return [_swapped(v, i, values) for i, v in enumerate(args)]


def _with_names(options: Mapping[str, Any], values: Mapping[Slot, Any]) -> dict[str, Any]:
    return {k: _swapped(v, k, values) for k, v in options.items()}


def _swapped(value: Any, key: int | str, values: Mapping[Slot, Any]) -> Any:
    if _is_list(value):
        entries = [values.get((key, j), entry) for j, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    return values.get((key,), value)
