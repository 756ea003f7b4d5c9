"""Positions that no patch can reach: what modules return there is kept, and not computed again.

Prompts are often alike up to the place where one is corrupted. In a causal model both runs are the
same before that place, and so is every run in which parts of one are put into the other. Modules
that see one position at a time need not run there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy

__all__ = ["by_position", "local_modules", "same_before", "unchanged", "whole_mlp"]


def same_before(start: int, one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    """Return whether nothing before a position differs in two runs.

    Args:
        start: The position.
        one: What was seen in one run, by layer ``[…, position, d]``.
        other: The same of the other run.

    Returns:
        True where the model is causal.
    """
    for layer, value in one.items() if start else ():
        moved = (value - other[layer])[..., :start, :].abs().max()
        if not bool(moved <= 1e-5 * value.abs().max()):
            return False
    return True


def local_modules(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that may be run at some positions only: MLPs, and maps of attentions.

    Args:
        anatomy: What the model is made of.
        modules: Its modules by name.

    Returns:
        Names; whether a module maps each position by itself is for `by_position` to say.
    """
    found = [
        whole_mlp(anatomy, index)
        for index, w in enumerate(anatomy.writers)
        if w.kind == "mlp" and w.layer >= 0 and w.module
    ]
    for name in anatomy.modules:
        for inner, module in modules[name].named_modules():
            weight = getattr(module, "weight", None)
            leaf = next(module.children(), None) is None
            if inner and leaf and isinstance(weight, Tensor) and weight.ndim == 2:
                found.append(f"{name}.{inner}")
    return [name for name in dict.fromkeys(found) if name in modules]


def whole_mlp(anatomy: Anatomy, index: int) -> str:
    """Return the largest module around a writer that holds no other writer and no reader.

    Args:
        anatomy: What the model is made of.
        index: Which of its writers.

    Returns:
        The module's name.
    """
    writers, readers = anatomy.writers, anatomy.readers
    others = [w.module for i, w in enumerate(writers) if i != index] + [r.module for r in readers]
    name = writers[index].module
    while "." in name:
        parent = name.rsplit(".", 1)[0]
        if any(other.startswith(f"{parent}.") or other == parent for other in others):
            break
        name = parent
    return name


def by_position(module: nn.Module, like: Tensor, width: int | None = None) -> bool:
    """Return whether a module maps every position by itself, whatever is at others.

    Args:
        module: The module.
        like: What it returned ``[example, position, width]``.
        width: That of what it is given; None for the same.

    Returns:
        The answer, tried on three positions.
    """
    given = like.shape[-1] if width is None else width
    x = torch.arange(3 * given, device=like.device).view(1, 3, given)
    x = (0.7 * x).sin().to(like.dtype)
    try:
        with torch.no_grad():
            whole, part = module(x), module(x[:, 1:])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
        return False
    if whole.shape != (1, 3, like.shape[-1]) or part.shape != (1, 2, like.shape[-1]):
        return False
    tolerance = 1e-4 if like.element_size() >= 4 else 2e-2
    return bool((whole[:, 1:] - part).abs().max() <= tolerance * whole.abs().max())


@contextmanager
def unchanged(kept: Mapping[nn.Module, Tensor], start: int, copies: int) -> Iterator[None]:
    """Run modules from a position on, and let them return what is kept before it.

    Args:
        kept: For each module what it returned ``[example, position, …]``.
        start: The first position at which anything changes.
        copies: How many copies of the prompts a pass runs.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for module, value in kept.items():
            before, after = _hooks(value, start, copies)
            # Inputs are cut after all others have seen them, and outputs made whole before.
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield


def _hooks(kept: Tensor, start: int, copies: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    size, length = kept.shape[:2]
    was_cut = [False]

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0] if args else None
        was_cut[0] = False
        if not isinstance(x, Tensor) or x.shape[:2] != (copies * size, length):
            return None
        was_cut[0] = True
        return (x[:, start:].contiguous(), *args[1:])

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not was_cut[0] or output.shape[1] == length:
            return None
        whole = output.new_empty(len(output), length, *output.shape[2:])
        whole[:, start:] = output
        whole.unflatten(0, (copies, size))[:, :, :start] = kept[:, :start]
        return whole

    return before, after
