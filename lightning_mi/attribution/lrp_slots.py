"""Arguments of a torch function as a flat list of tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Call", "depends", "tensors"]

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a torch function.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    func: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Return what the function returns."""
        return self.func(*self.args, **self.kwargs)

    @property
    def slots(self) -> list[Tensor]:
        """Its tensors, in the order of the arguments."""
        return list(tensors((self.args, self.kwargs)))

    def filled(self, slots: Sequence[Tensor]) -> Call:
        """Return the call with other tensors.

        Args:
            slots: As many as `slots`.

        Returns:
            The call.
        """
        rest = iter(slots)
        args, kwargs = _filled((self.args, self.kwargs), rest)
        return Call(self.func, args, kwargs)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or by name.

        Args:
            place: Its place among the positional ones.
            name: Its name.
            default: What it is where it was not given.

        Returns:
            The argument.
        """
        if len(self.args) > place:
            return self.args[place]
        return self.kwargs.get(name, default)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers.

    Args:
        value: Anything.

    Yields:
        Tensors, in order.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))


def depends(value: Any) -> bool:
    """Say whether any tensor in nested containers depends on the inputs.

    Parameters are frozen meanwhile, so whatever needs a gradient comes from the inputs.

    Args:
        value: Anything.

    Returns:
        Whether one does.
    """
    return any(t.requires_grad for t in tensors(value))


def _filled(value: Any, rest: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(rest)
    if isinstance(value, list):
        return [_filled(v, rest) for v in value]
    if isinstance(value, tuple):
        entries = [_filled(v, rest) for v in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if isinstance(value, dict):
        return {k: _filled(v, rest) for k, v in value.items()}
    return value
