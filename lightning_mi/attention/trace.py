"""Follows a tensor from q·k through scale, mask and softmax to the product with the values."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError
from .layout import Einsum, four, heads_of
from .site import Site, grouped_product, within

__all__ = ["PRODUCTS", "Traces"]

Function = Callable[..., Any]

PRODUCTS: frozenset[Function] = frozenset(
    {
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.bmm,
        Tensor.bmm,
        torch.baddbmm,
        Tensor.baddbmm,
        torch.einsum,
    }
)
_ADDED = frozenset({torch.baddbmm, Tensor.baddbmm})
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_DROPOUT = frozenset({F.dropout, torch.dropout, F.dropout2d})
_TANH = frozenset({torch.tanh, Tensor.tanh, F.tanh, Tensor.tanh_, torch.tanh_})
_TIMES = frozenset(
    {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}
)
_OVER = frozenset({torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__})
_RESHAPING = frozenset(
    {
        Tensor.__getitem__,
        Tensor.view,
        Tensor.reshape,
        torch.reshape,
        Tensor.flatten,
        torch.flatten,
        Tensor.unflatten,
        Tensor.transpose,
        torch.transpose,
        Tensor.permute,
        Tensor.contiguous,
        Tensor.narrow,
        Tensor.squeeze,
        Tensor.unsqueeze,
    }
)
_REPEATING = frozenset({Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten})
_INTERLEAVING = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})


@dataclass(frozen=True)
class Trace:
    """What is known of a tensor that began as a product of queries and keys."""

    q: Tensor
    k: Tensor
    heads: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    squashed: bool = False
    dropout: float = 0.0
    logits: Tensor | None = None
    keep: bool = False
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    reshapes: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(frozen=True)
class Weighted:
    """The product of a pattern with values: an attention, as the model wrote it."""

    trace: Trace
    probabilities: Tensor
    v: Tensor
    z: Tensor
    restore: Callable[[Tensor], Tensor]

    def site(self, traces: Traces, module: str, batch: int, *, strict: bool = True) -> Site:
        """Return it with heads written out.

        Args:
            traces: Where repeated keys and values are known.
            module: Name of the module it ran in.
            batch: Number of examples that the model was given.
            strict: Whether dropped out attention weights are refused.

        Returns:
            The site.

        Raises:
            ModelError: If attention weights were dropped out, or heads cannot be told apart.
        """
        trace, heads = self.trace, self.trace.heads
        if trace.dropout > 0.0 and strict:
            raise ModelError(
                f"attention in {module!r}: expected no dropout of attention weights, got "
                f"p={trace.dropout}. Call model.eval() first."
            )
        if self.probabilities.ndim == 3 and heads is None:
            heads = heads_of(self.probabilities, batch, module)
        wide = functools.partial(four, heads=heads, module=module)
        site = Site(
            module=module,
            q=wide(trace.q),
            k=wide(traces.shared_heads(trace.k)),
            v=wide(traces.shared_heads(self.v)),
            z=wide(self.z),
            scale=trace.scale,
            softcap=trace.softcap,
            mask=wide(self._reachable()),
            probabilities=wide(self.probabilities),
        )
        site.replay = functools.partial(_replay, trace) if trace.keep else None
        _check_layout(site)
        traces.forget_shared()
        return site

    def native(self, edited: Tensor) -> Tensor:
        """Return a canonical z in the model's own layout."""
        if edited is self.z:
            return self.restore(self.z)
        wide = self.z.ndim
        return self.restore(edited if wide == 4 else edited.reshape(self.z.shape))

    def _reachable(self) -> Tensor:
        if self.trace.logits is None:
            return torch.ones_like(self.probabilities, dtype=torch.bool)
        with torch.no_grad():
            seen = within(self.trace.logits)
            for reshape in self.trace.reshapes:
                seen = reshape(seen)
        return seen


class Traces:
    """All tensors on their way from q·k to the values, while they are alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Trace]] = {}
        self._shared: dict[int, Tensor] = {}

    def begin(
        self,
        func: Function,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        heads: int | None,
        keep: bool,
    ) -> None:
        """Start a trace where a product may be one of queries and keys."""
        given = _operands(func, args, kwargs)
        if given is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return
        left, right, equation = given
        steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        if equation is not None:
            pair = equation.queries_and_keys(left, right)
            if pair is None:
                return
            left, right = pair
        elif left.ndim < 3 or right.ndim < 3:
            return
        else:
            right = right.mT
        if func in _ADDED:
            left_over = kwargs.get("input", args[0] if args else None)
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            steps = (lambda s: alpha * s + (beta * left_over if beta else 0.0),)
        scale = float(kwargs.get("alpha", 1.0)) if func in _ADDED else 1.0
        heads = result.shape[1] if result.ndim == 4 else heads
        steps = (functools.partial(_shaped, result.shape), *steps) if keep else ()
        self._know(result, Trace(left, right, heads, scale, keep=keep, steps=steps))

    def follow(
        self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Go on where a traced tensor was scaled, masked, squashed, normalised or reshaped."""
        if not isinstance(result, Tensor) or not args:
            return
        self._note_repeated(func, args, kwargs, result)
        if not self._known or not result.is_floating_point():
            return
        for value in _tensors(args, kwargs):
            trace = self._of(value)
            if trace is not None:
                self._know(result, _next(trace, value, func, args, kwargs, result))
                return

    def weighted_values(
        self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> Weighted | None:
        """Return the attention that a product completes, or None if it completes none."""
        if not self._known or func in _ADDED:
            return None
        given = _operands(func, args, kwargs)
        if given is None:
            return None
        left, right, equation = given
        if equation is None:
            trace = self._normalised(left)
            same = None if trace is None else Weighted(trace, left, right, result, _as_is)
            return same
        for pattern, values, swapped in ((left, right, False), (right, left, True)):
            trace = self._normalised(pattern)
            ordered = None if trace is None else equation.values(values, result, swapped)
            if trace is not None and ordered is not None:
                return Weighted(trace, pattern, *ordered)
        return None

    def shared_heads(self, tensor: Tensor) -> Tensor:
        """Return keys or values before they were repeated for grouped queries, if they were."""
        if not self._shared:
            return tensor
        source = self._shared.get(tensor.data_ptr())
        if source is None or tensor.ndim != 4 or tensor.numel() % source.numel():
            return tensor
        return source if source.shape[2:] == tensor.shape[2:] else tensor

    def forget_shared(self) -> None:
        """Let go of what `shared_heads` would return."""
        self._shared.clear()

    def _normalised(self, tensor: Any) -> Trace | None:
        trace = self._of(tensor)
        return trace if trace is not None and trace.logits is not None else None

    def _of(self, tensor: Any) -> Trace | None:
        reference, trace = self._known.get(id(tensor), (None, None))
        return trace if reference is not None and reference() is tensor else None

    def _know(self, tensor: Tensor, trace: Trace) -> None:
        key = id(tensor)
        # Weak, so that the model's intermediate results are freed when the model lets them go.
        reference = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = (reference, trace)

    def _note_repeated(
        self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        first = args[0]
        if not isinstance(first, Tensor) or result.ndim != 4:
            return
        if func in _REPEATING and first.ndim == 5 and first.stride(2) == 0 and first.shape[2] > 1:
            self._shared[result.data_ptr()] = first[:, :, 0]
        elif func in _INTERLEAVING and first.ndim == 4 and _dimension(args, kwargs, 2) == 1:
            self._shared[result.data_ptr()] = first


def _next(
    trace: Trace,
    value: Tensor,
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
) -> Trace:
    changes: dict[str, Any] = {}
    if result.ndim == 4:
        changes["heads"] = result.shape[1]
    if trace.keep:
        step = functools.partial(_again, func, args, kwargs, value)
        changes["steps"] = (*trace.steps, step)
    if func in _DROPOUT:
        changes["dropout"] = max(trace.dropout, _dropout(args, kwargs))
    if trace.logits is not None:
        if func in _RESHAPING:
            step = functools.partial(_again, func, args, kwargs, value)
            changes["reshapes"] = (*trace.reshapes, step)
    elif func in _SOFTMAX and _dimension(args, kwargs, 1) in (-1, value.ndim - 1):
        changes["logits"] = value.detach()
    else:
        changes.update(_scaled(trace, func, args))
    return dataclasses.replace(trace, **changes)


def _scaled(trace: Trace, func: Function, args: Sequence[Any]) -> dict[str, Any]:
    """Return what a multiplication by a number or a tanh tells about scale and soft-cap."""
    if func in _TANH:
        return {"squashed": True}
    number = next((a for a in args if isinstance(a, int | float)), None)
    if number is None or func not in _TIMES | _OVER:
        return {}
    factor = float(number) if func in _TIMES else 1.0 / number
    if trace.squashed:  # c·tanh(s·q·k / c): what was collected so far was s / c.
        return {"softcap": factor, "scale": trace.scale * factor}
    return {"scale": trace.scale * factor}


def _again(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], old: Tensor, new: Tensor
) -> Any:
    """Call a function once more with another tensor in one place."""

    def swap(value: Any) -> Any:
        if value is old:
            return new
        if isinstance(value, list | tuple):
            return type(value)(swap(v) for v in value)
        return value

    return func(*swap(tuple(args)), **{k: swap(v) for k, v in kwargs.items()})


def _replay(trace: Trace, q: Tensor, k: Tensor) -> Tensor:
    """Compute a pattern from q and k as the model did, with all that it did in between."""
    scores = grouped_product(q, k.mT).to(trace.q.dtype)
    for step in trace.steps:
        scores = step(scores)
    return scores


def _operands(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Einsum | None] | None:
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        equation = Einsum.read(args[0]) if len(operands) == 2 else None
        return None if equation is None else (operands[0], operands[1], equation)
    given = [*args, *(v for k, v in kwargs.items() if k not in ("alpha", "beta", "out"))]
    pair = given[1:3] if func in _ADDED else given[:2]
    if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        return None
    return pair[0], pair[1], None


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))


def _dimension(args: Sequence[Any], kwargs: Mapping[str, Any], place: int) -> Any:
    return kwargs.get("dim", args[place] if len(args) > place else None)


def _dropout(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(p) if training else 0.0


def _shaped(shape: torch.Size, scores: Tensor) -> Tensor:
    return scores.reshape(shape)


def _as_is(z: Tensor) -> Tensor:
    return z


def _check_layout(site: Site) -> None:
    pattern = site.probabilities
    if pattern is None:
        return
    batch, heads, queries, keys = pattern.shape
    fits = (
        site.q.shape[:3] == (batch, heads, queries)
        and site.k.shape[2] == keys
        and site.v.shape[2] == keys
        and site.z.shape[:3] == (batch, heads, queries)
        and not heads % site.k.shape[1]
        and not heads % site.v.shape[1]
    )
    if not fits:
        raise ModelError(
            f"attention in {site.module!r}: expected queries, keys and values of one batch and "
            f"{heads} heads, got q {tuple(site.q.shape)}, k {tuple(site.k.shape)}, v "
            f"{tuple(site.v.shape)} beside a pattern {tuple(pattern.shape)}. Heads cannot "
            "be told apart in this layout; load the model with attn_implementation='sdpa' if it "
            "has one."
        )
