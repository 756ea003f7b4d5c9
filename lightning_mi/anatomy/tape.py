"""A tape of one forward pass: which function made which tensor from which, in which module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.site import Site

__all__ = ["Call", "ModuleCall", "Tape", "named", "recorded"]

ADDING = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
SCALING = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
DIVIDING = frozenset({"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"})
STORING = frozenset({"__setitem__"})


@dataclass(frozen=True)
class Call:
    """One torch function; tensors are numbers of values."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    number: float | None = None


@dataclass
class ModuleCall:
    """One call of a module; ``start`` and ``stop`` count the functions before its two ends."""

    name: str
    inputs: tuple[tuple[object, int], ...]
    start: int
    outputs: tuple[int, ...] = ()
    stop: int = -1


@dataclass
class Tape:
    """What happened in a forward pass.

    Values are numbered in the order in which they were made. A tensor that is changed in place
    gets a new number; its old value is kept as a copy.
    """

    values: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    sites: list[tuple[Site, int]] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    producer: dict[int, int] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _open: list[ModuleCall] = field(default_factory=list)

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's present value, a new one if it is unknown.

        Args:
            tensor: Any tensor.

        Returns:
            The number.
        """
        found = self._numbers.get(id(tensor))
        return self._new(tensor) if found is None else found

    def find(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's present value, or None if it was never seen.

        Args:
            tensor: Any tensor.

        Returns:
            The number or None.
        """
        return self._numbers.get(id(tensor))

    def saw(self, index: int, site: Site) -> None:
        """Note that an attention belongs to the function that is running."""
        self.sites.append((site, len(self.calls)))

    def module(self) -> str:
        """Return the name of the module that is running."""
        return self._open[-1].name if self._open else ""

    def _new(self, tensor: Tensor) -> int:
        self.values.append(tensor)
        self._numbers[id(tensor)] = len(self.values) - 1
        return len(self.values) - 1

    def _save(self, tensor: Tensor) -> None:
        """Keep what is about to be overwritten."""
        old = self.number(tensor)
        self.values[old] = tensor.detach().clone()

    def _record(
        self, name: str, inputs: tuple[int, ...], made: Sequence[Tensor], **more: Any
    ) -> None:
        outputs = tuple(self._new(t) for t in made)
        self.producer.update(dict.fromkeys(outputs, len(self.calls)))
        self.calls.append(Call(name, inputs, outputs, self.module(), **more))

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*enumerate(args), *kwargs.items()]
        inputs = tuple((key, self.number(v)) for key, v in given if isinstance(v, Tensor))
        call = ModuleCall(name, inputs, len(self.calls))
        self.modules.append(call)
        self._open.append(call)

    def _leave(self, output: Any) -> None:
        call = self._open.pop()
        made = list(tensors(output))
        # What a function of the user's own made (an autograd.Function) was not seen being made.
        unseen = [t for t in made if self.find(t) is None]
        if unseen:
            self._record("module", tuple(v for _, v in call.inputs), unseen)
        call.outputs = tuple(self.number(t) for t in made)
        call.stop = len(self.calls)


class _Recorder(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(tensors((*args, *kwargs.values())))
        tape = self.tape
        inputs = tuple(tape.number(t) for t in given)
        changed = given[0] if given and _is_in_place(name) else None
        if changed is not None:
            tape._save(changed)
        result = func(*args, **kwargs)
        made = [t for t in tensors(result) if t is changed or not any(t is g for g in given)]
        if name in STORING and changed is not None:
            made = [changed]
        # A function that an attention ran in is kept, whatever it returns.
        if made or (tape.sites and tape.sites[-1][1] == len(tape.calls)):
            tape._record(name, inputs, made, number=_number(name, args, kwargs))
        return result


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in STORING or (
            name.startswith("__i") and name not in ("__invert__", "__index__")
        )
    return name.endswith("_")


def _number(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """Return the factor of a multiplication by a number, or of the second term of a sum."""
    if name in ADDING:
        return float(kwargs.get("alpha", 1.0))
    plain = next((a for a in args if isinstance(a, int | float) and not isinstance(a, bool)), None)
    if plain is None or name not in SCALING | DIVIDING:
        # A scalar tensor is a number, too (Gemma's normaliser).
        scalars = [a for a in args if isinstance(a, Tensor) and a.ndim == 0]
        if len(scalars) != 1 or name not in SCALING | DIVIDING:
            return None
        plain = float(scalars[0])
    return float(plain) if name in SCALING else 1.0 / float(plain)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of lists, tuples, dictionaries and output objects.

    Args:
        value: Anything.

    Yields:
        Each tensor.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, those inside compilation wrappers under the wrapper's name.

    Args:
        model: The module inside any wrapper of its own.

    Returns:
        Modules by dotted name.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
        found[plain] = module
    return found


@contextmanager
def recorded(model: nn.Module) -> Iterator[Tape]:
    """Record every function and module call of a model.

    To be entered inside a tap, whose sites are handed to `Tape.saw`.

    Args:
        model: The module inside any wrapper.

    Yields:
        The tape.
    """
    tape = Tape()
    for name, parameter in model.named_parameters():
        tape.parameters[tape.number(parameter)] = name
    with ExitStack() as stack:
        for name, module in named(model).items():

            def enter(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                tape._enter(name, args, kwargs)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                tape._leave(output)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_Recorder(tape))
        yield tape


def is_float(tensor: Tensor) -> bool:
    """Say whether a tensor holds numbers that can be added to a stream.

    Args:
        tensor: Any tensor.

    Returns:
        True for floating-point tensors with at least one axis.
    """
    return tensor.is_floating_point() and tensor.ndim > 0 and not tensor.is_nested


def is_equal(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Say whether two tensors agree up to rounding, relative to the largest value.

    Args:
        a: Any tensor.
        b: One that can be broadcast to it.
        tolerance: Relative.

    Returns:
        True if they agree everywhere.
    """
    size = max(float(a.abs().max()), float(b.abs().max()), 1e-30) if a.numel() else 1.0
    return bool(((a - b).abs().max() <= tolerance * size) if a.numel() else True) and bool(
        torch.isfinite(a).all()
    )
