"""The model that captum sees: its output is the target's value. And what is put back afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .entry import Entry
from .question import Question

__all__ = ["Asked", "borrowed_weights", "same_hooks"]

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Asked(nn.Module):
    """A module from points to the target's value, so that captum needs no target of its own.

    Args:
        entry: The model and its inputs.
        question: The target F.
    """

    def __init__(self, entry: Entry, question: Question) -> None:
        super().__init__()
        self.model = entry.model  # A child, so that captum finds the layers to treat.
        self.entry, self.question = entry, question

    def forward(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the target at points.

        Args:
            points: Any points, ``[point, …]``.
            rows: To which example each belongs; captum repeats them as it repeats points.

        Returns:
            Shape ``[point]``.
        """
        outputs = self.entry.run(points, rows)
        if self.question.token is not None:
            return self.question(outputs, rows)
        # A user's function gets whole batches in their order, one copy after the other.
        order = _by_copies(rows)
        values = [self.question(outputs[index], rows[index]) for index in order]
        return torch.cat(values)[torch.cat(order).argsort()]


def _by_copies(rows: Tensor) -> list[Tensor]:
    """Return which points are the first, second, … copies of their examples, in their order."""
    seen: Counter[int] = Counter()
    copies: list[list[tuple[int, int]]] = []
    for i, row in enumerate(rows.tolist()):
        if seen[row] == len(copies):
            copies.append([])
        copies[seen[row]].append((row, i))
        seen[row] += 1
    return [torch.tensor([i for _, i in sorted(c)], device=rows.device) for c in copies]


@contextmanager
def same_hooks(model: nn.Module) -> Iterator[None]:
    """Put back the hooks of every module, whatever was added inside or left behind by an error.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    tables = [
        (table, dict(table))
        for module in model.modules()
        for name in HOOKS
        if (table := getattr(module, name, None)) is not None
    ]
    try:
        yield
    finally:
        for table, before in tables:
            if table.keys() != before.keys():
                table.clear()
                table.update(before)


@contextmanager
def borrowed_weights(model: nn.Module, *, if_needed: bool) -> Iterator[None]:
    """Let every module work on copies of its parameters, which may be written to.

    Args:
        model: Any module.
        if_needed: Whether to do it at all; copies take the memory of the weights.

    Yields:
        Nothing.
    """
    if not if_needed:
        yield
        return
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    copies: dict[int, nn.Parameter] = {}
    try:
        for module, parameters in kept:
            for name, p in parameters.items():
                if p is not None:
                    copy = copies.setdefault(id(p), nn.Parameter(p.detach().clone(), False))
                    module._parameters[name] = copy
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)
