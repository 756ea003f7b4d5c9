"""Runs a model once with gradients modified by the rules, and again as the affine map they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.observer import _with_globals
from ..errors import ModelError, TapError
from .lrp_composed import opened
from .lrp_rules import (
    Replay,
    Step,
    detached,
    divided,
    gated,
    normed,
    picked,
    product,
    ratio,
    taylor,
)
from .lrp_slots import Call, depends, tensors
from .lrp_tables import (
    ADDENDS,
    DETACHED,
    DIVIDED,
    ELEMENTWISE,
    LINEAR,
    NORMED,
    PICKING,
    POWERS,
    PRODUCTS,
    RATIO,
    REFLECTED,
    SCALING,
    TAYLOR,
    TIMES,
)

__all__ = ["Rules"]

Source = tuple[Tensor, bool]
"""The tensor that another is an elementwise function of, and whether it is a multiple of it."""

Noted = tuple[Tensor, bool, int, int]
"""A source, and how often it and what was made of it had been changed in place."""


class Rules(TorchFunctionMode):
    """Applies a rule to every function whose arguments depend on the inputs.

    The first run writes down what it did, call by call; runs inside `replaying` follow that.

    Args:
        epsilon: Of the ε rule, in products with weights and with one another.
    """

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self._epsilon = epsilon
        self._steps: list[Step] = []
        self._place: int | None = None
        self._sources: MutableMapping[Tensor, Noted] = WeakTensorKeyDictionary()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Run the model as the affine map that the first run made of it.

        Yields:
            Nothing.
        """
        self._place, self._sources = 0, WeakTensorKeyDictionary()
        try:
            with self:
                yield
        finally:
            self._place = None

    def gradient(self, outputs: Tensor, start: Tensor, point: Tensor) -> Tensor:
        """Differentiate what the first run made, by its rules.

        The backward pass runs inside the mode, because activation checkpointing computes functions
        of the first run once more there.

        Args:
            outputs: Of the first run.
            start: What they are weighted with.
            point: Its inputs.

        Returns:
            Shaped like the inputs.
        """
        written = len(self._steps)
        plain = _with_globals(torch.autograd.grad)  # Else the mode is asked to differentiate.
        try:
            with self:
                found: tuple[Tensor] = plain(
                    outputs, point, start, allow_unused=True, materialize_grads=True
                )
        finally:
            del self._steps[written:]
        return found[0]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function by its rule."""
        call = Call(func, tuple(args), kwargs or {})
        inside = opened(func)
        if inside is not None:
            with self:  # What it is made of has rules of its own.
                return inside(*call.args, **call.kwargs)
        return self._first(call) if self._place is None else self._again(call, self._place)

    def _first(self, call: Call) -> Any:
        if not depends((call.args, call.kwargs)):
            self._steps.append(Step(call.func))
            return call()
        result, step = self._ruled(call)
        self._steps.append(step)
        self._follow(call, step, result)
        return result

    def _again(self, call: Call, place: int) -> Any:
        step = self._steps[place] if place < len(self._steps) else None
        if step is None or step.func != call.func:
            raise TapError(
                "attn_lrp: expected the model to call the same functions whatever its inputs are, "
                f"got {_name(call.func)} where there was "
                f"{_name(step.func) if step else 'nothing'} before. A forward pass whose control "
                "flow depends on values cannot be checked, so it is not attributed."
            )
        self._place = place + 1
        if step.gated:
            call = Call(call.func, (self._source(call.slots[0])[0],), {})
        result = call() if step.replay is None else step.replay(call)
        self._follow(call, step, result)
        return result

    def _ruled(self, call: Call) -> tuple[Any, Step]:
        func = call.func
        source = None if func not in TIMES else self._common(call)
        if source is not None:
            value, factor = gated(call, source)
            return value, Step(func, lambda again: again.args[0] * factor, 0, gated=True)
        if func in LINEAR:
            if func is F.batch_norm and call.argument(5, "training", False):
                raise _refused(func)
            result, replay = call(), None
            floats = (t for t in tensors(result) if t.is_floating_point())
            if isinstance(result, Tensor) and next(floats, None) is None:
                replay = _fixed(result)
        else:
            result, replay = self._by_rule(call)
        slot, scaled = self._lineage(call)
        return result, Step(func, replay, slot, scaled)

    def _by_rule(self, call: Call) -> tuple[Any, Replay | None]:
        func, slots = call.func, call.slots
        if func in PRODUCTS:
            addend = ADDENDS.get(func)
            factors = [i for i, t in enumerate(slots) if t.requires_grad and i != addend]
            if len(factors) > 1 and func.__name__.endswith("_") and func not in IN_PLACE:
                raise _refused(func)
            return product(call, factors, 0.0 if func in TIMES else self._epsilon)
        if func in POWERS:
            exponent = call.argument(1, "exponent", 2)
            steady = isinstance(exponent, int | float) and exponent >= 1
            return ratio(call, slots[0]) if steady else detached(call)
        if func in DIVIDED and slots[0].requires_grad:
            return divided(call) if len(slots) > 1 else (call(), None)
        if func in DIVIDED | REFLECTED | DETACHED:
            return detached(call)
        if func in RATIO:
            return ratio(call, slots[0])
        if func in TAYLOR or func in PICKING:
            if sum(t.requires_grad for t in slots) > 1 or not slots[0].requires_grad:
                raise _refused(func)
            return taylor(call) if func in TAYLOR else picked(call)
        if func in NORMED:
            return normed(call)
        result = call()
        if depends(result):
            raise _refused(func)
        return result, _fixed(result)

    def _common(self, call: Call) -> Tensor | None:
        """Return x where a product is x, or a multiple of it, times a function of x."""
        free = [t for t in call.slots if t.requires_grad]
        if len(free) != 2 or free[0].shape != free[1].shape:
            return None
        (first, first_scaled), (second, second_scaled) = map(self._source, free)
        return first if first is second and (first_scaled or second_scaled) else None

    def _lineage(self, call: Call) -> tuple[int | None, bool]:
        """Return the slot whose source the result is an elementwise function of, if there is one.

        The other operand is a number, or a function of the same source.

        Returns:
            The slot, and whether the result is a multiple of it.
        """
        slots = call.slots
        if call.func not in ELEMENTWISE:
            return None, False
        if len(slots) == 1:
            return 0, call.func in SCALING
        sources = [self._source(t)[0] for t in slots if t.requires_grad]
        same = len(sources) == len(slots) and all(s is sources[0] for s in sources)
        return 0 if same else None, False

    def _source(self, tensor: Tensor) -> Source:
        found = self._sources.get(tensor)
        if found is None:
            return tensor, True
        source, scaled, *changes = found
        # After a change in place it is no longer known what is a function of what.
        return (source, scaled) if changes == _changes(source, tensor) else (tensor, True)

    def _follow(self, call: Call, step: Step, result: Any) -> None:
        if step.source is None or not isinstance(result, Tensor):
            return
        own = call.slots[step.source]
        source, scaled = self._source(own)
        if result is not own and result.shape == source.shape:
            before, after = _changes(source, result)
            self._sources[result] = (source, scaled and step.scaled, before, after)


IN_PLACE = frozenset({Tensor.__imul__, Tensor.__itruediv__})
"""Operators that rebind the name on their left, so that a new tensor does as well."""


def _changes(*values: Tensor) -> list[int]:
    return [value._version for value in values]


def _fixed(result: Any) -> Replay:
    kept = result.clone() if isinstance(result, Tensor) else result
    return lambda again: kept


def _name(func: Callable[..., Any]) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", repr(func)))


def _refused(func: Callable[..., Any]) -> ModelError:
    return ModelError(
        "attn_lrp: expected a model made of linear layers, products, softmax, norms and "
        f"elementwise activations, got {_name(func)}, for which there is no rule of relevance. "
        "Explain this model by integrated_gradients, which needs no rules."
    )
