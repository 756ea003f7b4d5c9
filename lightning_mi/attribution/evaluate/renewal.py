"""The layers of a model in order from its output, and making one of them random."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...task import Task

__all__ = ["layers_from_the_output", "renewed"]


def layers_from_the_output(model: nn.Module, task: Task, batch: Any) -> list[str]:
    """Return the names of the modules with parameters of their own, the last to be called first.

    Args:
        model: The plain module, in evaluation mode.
        task: Runs it.
        batch: What it is run on.

    Returns:
        Names; a module that is not called itself takes the place of the one that holds it.
    """
    called: dict[str, int] = {}
    handles = [
        module.register_forward_hook(_noting(name, called))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    owners = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    order = {name: place for place, name in enumerate(dict(model.named_modules()))}
    return sorted(owners, key=lambda n: (-_place(n, called), -order[n]))


def renewed(module: nn.Module, seed: int) -> None:
    """Make the parameters of one module random, in place.

    Its own ``reset_parameters`` draws them, where it has one; else the entries of each parameter
    are put in random order, which keeps their distribution.

    Args:
        module: A module of a copy, never of the user's model.
        seed: Of what is drawn. The global generators are used: call inside `untouched`.
    """
    _seed(module, seed)
    reset = getattr(module, "reset_parameters", None)
    with torch.no_grad():
        if callable(reset):
            reset()
            return
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _noting(name: str, called: dict[str, int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        called.pop(name, None)
        called[name] = max(called.values(), default=-1) + 1

    return hook


def _place(name: str, called: dict[str, int]) -> int:
    while name and name not in called:
        name = name.rpartition(".")[0]
    return called.get(name, -1)


def _seed(module: nn.Module, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for index in {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}:
        torch.cuda.default_generators[index].manual_seed(seed)
