"""`Edit`: a change of a model that can be taken back, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, TapError
from ...isolation import untouched, unwrapped
from ...task import Task

__all__ = ["Edit", "swapped"]

SCALED = 0.01
"""Outputs that lie so near a multiple of the head's, relative to the largest, are one."""


@dataclass(eq=False)
class Edit:
    """A change of a model that can be taken back.

    In a ``with`` block it lasts as long as the block; with `apply` until `revert`. Afterwards the
    model is bit for bit what it was: its own parameters are put aside, not written to.
    `edit_table` shows what it does.

    Args:
        model: The user's model.
        name: What it does, in words.
        opens: Makes the context in which it is in force.
        tokens: Tokens that it is about, if it is about any.

    Example:
        >>> from lightning_mi.circuits import scale_heads
        >>> from lightning_mi.nodes import Head
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> x = torch.randn(1, 5, 8)
        >>> before = layer(x)
        >>> with scale_heads(layer, {Head(0, 1): 0.0}):
        ...     changed = not torch.equal(layer(x), before)
        >>> changed, torch.equal(layer(x), before)
        (True, True)
    """

    model: nn.Module
    name: str
    opens: Callable[[], AbstractContextManager[Any]] = field(repr=False)
    tokens: tuple[int, ...] = ()
    _open: ExitStack | None = field(default=None, repr=False)

    @property
    def active(self) -> bool:
        """Whether it is in force."""
        return self._open is not None

    def apply(self) -> Edit:
        """Put it in force, until `revert`.

        Returns:
            Itself.

        Raises:
            ArgumentError: If it is in force already.
        """
        if self._open is not None:
            raise ArgumentError.of(
                "edit", expected="one that is not in force", got=self.name, do="Call revert first."
            )
        with ExitStack() as stack:
            stack.enter_context(self.opens())
            self._open = stack.pop_all()
        return self

    def revert(self) -> None:
        """Take it back; nothing happens where it is not in force."""
        opened, self._open = self._open, None
        if opened is not None:
            # To take back what was never run is no mistake.
            with suppress(TapError):
                opened.close()

    def __enter__(self) -> Edit:
        """Put it in force."""
        return self.apply()

    def __exit__(self, *error: object) -> None:
        """Take it back."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(*error)  # type: ignore[arg-type]


@contextmanager
def swapped(module: nn.Module, name: str, new: Tensor) -> Iterator[None]:
    """Let a module have another parameter of its own for a while.

    A parameter that is shared (tied) stays what it is for the others.

    Args:
        module: The module.
        name: Name of its parameter.
        new: The other values.

    Yields:
        Nothing.
    """
    old: nn.Parameter | None = getattr(module, name)
    flag = old is not None and old.requires_grad
    setattr(module, name, nn.Parameter(new.detach().clone(), requires_grad=flag))
    try:
        yield
    finally:
        setattr(module, name, old)


def output_head(model: nn.Module, batch: Any, task: Task) -> tuple[nn.Module, float]:
    """Return the module whose output is what the model answers, and by what that is multiplied.

    Args:
        model: The user's model.
        batch: A batch to run it on.
        task: How it is called.

    Returns:
        The last module without children that returned the model's logits, and the factor by which
        the model scales them afterwards; 1 where it does not, or does something else (soft-cap).

    Raises:
        ArgumentError: If no module returns them.
    """
    made: list[tuple[nn.Module, Tensor]] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((module, output))

    plain = unwrapped(model)
    with untouched(model), torch.no_grad(), ExitStack() as stack:
        for module in plain.modules():
            if next(module.children(), None) is None and list(module.parameters()):
                stack.callback(module.register_forward_hook(hook).remove)
        outputs = task.outputs(plain, batch)
    found = [(module, value) for module, value in made if value.shape == outputs.shape]
    if not found:
        raise ArgumentError.of(
            "model",
            expected="a module of its own that returns the logits",
            got=f"none in {type(plain).__name__}",
            do="Make the unembedding a module.",
        )
    head, value = found[-1]
    return head, _factor(value, outputs)


def _factor(value: Tensor, outputs: Tensor) -> float:
    """Return the number by which one tensor is the other, or 1 where there is none."""
    if torch.equal(value, outputs):
        return 1.0
    a, b = value.double(), outputs.double()
    factor = float((a * b).sum() / a.square().sum())
    close = float((b - factor * a).abs().max()) <= SCALED * float(b.abs().max())
    return factor if factor > 0 and close else 1.0


def as_ids(tokens: int | Sequence[int] | Tensor, count: int) -> list[int]:
    """Return tokens as a list, checked.

    Args:
        tokens: One or several.
        count: Size of the vocabulary.

    Returns:
        The list.

    Raises:
        ArgumentError: If one is none.
    """
    found = [int(t) for t in torch.as_tensor(tokens).reshape(-1)]
    if not found or min(found) < 0 or max(found) >= count:
        raise ArgumentError.of(
            "tokens", expected=f"token ids from 0 to {count - 1}", got=found[:5], do="Encode first."
        )
    return found
