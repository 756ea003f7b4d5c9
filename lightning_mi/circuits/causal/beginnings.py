"""What two prompts begin with alike: computed in one run, and taken over into the other one.

In a causal model two runs are the same up to the first position at which their prompts differ.
Linear maps, which see one position at a time, need not run there again, nor be part of a graph:
what differs between the runs is zero there, and no gradient at later positions comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .readings import unembedding
from .unchanged import by_position

__all__ = ["Beginning"]


class Beginning:
    """The first positions of a run: what linear maps were given there, and returned.

    Nothing is assumed about the model. A map of which something was taken over must have been
    given there what it was given in the first run, which is compared; all else is computed.

    Args:
        model: The module inside any wrapper.
        shape: Number of examples and of positions.
        start: The first position at which prompts differ; 0 takes nothing over.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], start: int) -> None:
        self.model, self.shape, self.start = model, shape, start
        self._calls: dict[nn.Module, int] = {}
        self._given: dict[nn.Module, Tensor] = {}
        self._made: dict[nn.Module, Tensor] = {}
        self._moved: list[Tensor] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what maps are given and return while the first run is made.

        Yields:
            Nothing.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._calls[module] = self._calls.get(module, 0) + 1
            x = args[0] if args else None
            if isinstance(x, Tensor) and self._fits(x) and self._fits(output):
                # Copies, as a model may write into either.
                self._given[module] = x[:, : self.start].clone()
                self._made[module] = output[:, : self.start].clone()

        with ExitStack() as stack:
            for module in self._maps():
                # Before hooks of others, which change what is taken over as they changed this.
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            yield

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Run maps from the position on, and let them return what is kept before it.

        It must stay open until gradients were taken: checkpointed layers run again there. Enter it
        after all other hooks are set, so that they see whole tensors.

        Yields:
            Nothing.
        """
        self._moved.clear()
        with ExitStack() as stack:
            for module in self._alone():
                before, after = self._hooks(module)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after, prepend=True).remove)
            yield

    def same(self) -> bool:
        """Return whether maps were given the same in both runs where something was taken over."""
        return not self._moved or bool((torch.stack(self._moved) <= 1e-5).all())

    def _fits(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.ndim == 3
            and x.is_floating_point()
            and tuple(x.shape[:2]) == self.shape
        )

    def _maps(self) -> list[nn.Module]:
        """Return the modules that may be linear maps."""
        if not self.start:
            return []
        head = unembedding(self.model)
        found = []
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            leaf = next(module.children(), None) is None
            matrix = isinstance(weight, Tensor) and weight.ndim == 2
            if leaf and matrix and module is not head and not isinstance(module, nn.Embedding):
                found.append(module)
        return found

    def _alone(self) -> list[nn.Module]:
        """Return the maps that ran once and map each position by itself, tried once a class."""
        fits: dict[type, bool] = {nn.Linear: True}
        # The smallest one is tried: a large one would cost a share of a pass.
        for module, made in sorted(self._made.items(), key=lambda item: item[1].numel()):
            if type(module) not in fits:
                width = self._given[module].shape[-1]
                fits[type(module)] = by_position(module, made, width)
        return [m for m in self._made if fits[type(m)] and self._calls[m] == 1]

    def _hooks(self, module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
        given, made, start = self._given[module], self._made[module], self.start
        size = given.abs().amax(-1) + 1e-30
        was_cut = [False]

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0] if args else None
            was_cut[0] = self._fits(x)
            if not isinstance(x, Tensor) or not was_cut[0]:
                return None
            moved = (x.detach()[:, :start] - given).abs().amax(-1)
            self._moved.append((moved / size).max())
            return (x[:, start:].contiguous(), *args[1:])

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return torch.cat([made, output], 1) if was_cut[0] else None

        return before, after
