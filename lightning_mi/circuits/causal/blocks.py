"""Passes whose graph exists for one block at a time: `differentiated`.

The model runs once without a graph, and of each block only the stream that it was handed is kept.
From the last block down, each is run again with a graph, what enters it gets its gradient, and the
graph is dropped (activation checkpointing, Chen et al. 2016). So memory grows with depth by one
stream a layer, not by all that a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy.tape import tensors
from ...attention import Site
from ...batch import tree_map
from ...behavior import Behavior
from ...isolation import followed
from .ports import block_names
from .streams import Inside, Rewrite, Wiring

__all__ = ["Part", "blocks_of", "differentiated", "separately"]


class InseparableError(Exception):
    """The blocks of a model cannot be run one by one; never leaves the package."""


@dataclass(eq=False)
class Part:
    """What was seen of a stretch of a pass, in its graph.

    Args:
        entering: The stream that each reader was handed, by index of the anatomy's readers.
        returned: What each writer returned, by index of its writers.
        sites: The attention of each layer.
    """

    entering: dict[int, Tensor] = field(default_factory=dict)
    returned: dict[int, Tensor] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)


Want = Callable[[Part], list[Tensor]]
Take = Callable[[Part, list[Tensor | None]], None]
Total = Callable[[Tensor], Tensor]
Pairs = Sequence[tuple[Tensor, Tensor | None]]
"""Ends of a graph, and the gradient that each was given; None for a number."""


def blocks_of(wiring: Wiring) -> dict[int, str]:
    """Return the module of each layer that can be run by itself.

    Args:
        wiring: The model.

    Returns:
        Names by layer; empty where layers share modules, where an attention reads outside of its
        block, where there is one layer only, or where the result is to be differentiated.
    """
    if followed.get():
        return {}
    anatomy = wiring.anatomy
    found = block_names(anatomy.modules)
    read = [r.module for r in anatomy.readers]
    written = [w.module for w in anatomy.writers if w.module and w.kind != "heads"]
    at = {r.module: r.after for r in anatomy.readers}
    once = all(at[r.module] == r.after for r in anatomy.readers)
    if len(found) < 2 or not once or len(set(written)) < len(written):
        return {}
    for layer, name in found.items():
        if not read[wiring.reader_of[layer]].startswith(f"{name}."):
            return {}
    return found


def separately(wiring: Wiring, once: Callable[[dict[int, str]], Tensor]) -> Tensor:
    """Return what is found block by block, or from the whole graph where blocks cannot be run.

    Args:
        wiring: The model.
        once: Finds it, by `differentiated`, with such blocks.

    Returns:
        What it found.
    """
    blocks = blocks_of(wiring)
    if blocks:
        try:
            return once(blocks)
        except InseparableError:
            pass
    return once({})


def differentiated(
    wiring: Wiring,
    batch: Any,
    reading: tuple[Behavior, int],
    total: Total,
    want: Want,
    take: Take,
    *,
    blocks: dict[int, str],
    rewrite: Rewrite | None = None,
    inside: Inside = nullcontext,
    keep: bool = False,
) -> None:
    """Run the model and hand over gradients, one block after the other, the last one first.

    Args:
        wiring: The model.
        batch: What it is run on.
        reading: See `Wiring.see`.
        total: Returns the number that is differentiated from the model's outputs.
        want: Returns the tensors of a part at which gradients are wanted.
        take: Called with a part and these gradients, None where no way leads to the number.
        blocks: Modules that are run one by one, by layer; empty runs the whole with one graph.
        rewrite: See `Wiring.see`.
        inside: See there.
        keep: Keep a part's graph until it has been taken.

    Raises:
        InseparableError: If a block gave something else when it was run again. Parts may have been
            taken by then.
    """
    own = _Pass(wiring, rewrite)
    opened = wiring.opened(own.enter, own.leave, own.edit, reading, inside, alone=True)
    with opened as run, own.intercepted(blocks), torch.enable_grad():
        try:
            number = total(run(batch))
            own.check(blocks)
            own.back(number, want, take, keep)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            # Whatever is wrong with the model itself shows again when it is run whole.
            if blocks:
                raise InseparableError(str(error)) from error
            raise


@dataclass(eq=False)
class _Call:
    """One call of a block: what it was handed, and what it returned, at which graphs begin."""

    layer: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)


class _Pass:
    """A pass, and the way back."""

    def __init__(self, wiring: Wiring, rewrite: Rewrite | None) -> None:
        self.wiring, self.rewrite = wiring, rewrite
        self.outer = Part()
        self.inner: Part | None = self.outer  # None: a block that is run without a graph.
        self.layer = -1
        self.calls: list[_Call] = []

    # ------------------------------------------------------------ what hooks do

    def enter(self, readers: list[int], x: Tensor) -> Tensor:
        if self.inner is None:
            return x
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.inner.entering.update(dict.fromkeys(readers, x))
        return x

    def leave(self, writer: int, value: Tensor) -> Tensor:
        if self.rewrite is not None:
            value = self.rewrite(writer, -1, value)
        if self.inner is not None:
            self.inner.returned[writer] = value
        return value

    def edit(self, site: Site) -> Tensor:
        if self.inner is self.outer:
            self.layer += 1
        writer = self.wiring.writer_of[self.layer]
        z = site.z if self.rewrite is None else self.rewrite(writer, self.layer, site.z)
        if self.inner is not None:
            self.inner.returned[writer] = z
            self.inner.sites[self.layer] = site
        return z

    # ------------------------------------------------------------ blocks

    @contextmanager
    def intercepted(self, blocks: dict[int, str]) -> Iterator[None]:
        """Run blocks without a graph, and keep what they were handed."""
        with ExitStack() as stack:
            for layer, name in blocks.items():
                module = self.wiring.modules[name]
                own = vars(module)
                if "forward" in own:
                    stack.callback(own.__setitem__, "forward", own["forward"])
                else:
                    stack.callback(own.pop, "forward", None)
                own["forward"] = self._forward(layer, module, module.forward)
            yield

    def _forward(
        self, layer: int, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inner is not self.outer:  # It is run again.
                return forward(*args, **kwargs)
            call = _Call(layer, module, args, kwargs)
            call.versions = [t._version for t in tensors([args, kwargs])]
            self.inner, self.layer = None, layer
            try:
                with torch.no_grad():
                    output = forward(*args, **kwargs)
            finally:
                self.inner = self.outer

            def leaf(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                call.returned.append(value.detach().requires_grad_())
                return call.returned[-1]

            made = tree_map(leaf, output) if isinstance(output, tuple | list) else leaf(output)
            self.calls.append(call)
            return made

        return run

    def check(self, blocks: dict[int, str]) -> None:
        """Refuse a pass in which a block was not run once, or changed what it was handed."""
        if not blocks:
            return
        if sorted(call.layer for call in self.calls) != sorted(blocks):
            raise InseparableError("blocks that are not run once each")
        for call in self.calls:
            if call.versions != [t._version for t in tensors([call.args, call.kwargs])]:
                raise InseparableError("a block that changes its input in place")

    # ------------------------------------------------------------ the way back

    def back(self, number: Tensor, want: Want, take: Take, keep: bool) -> None:
        """Take gradients from the number down."""
        wanted = want(self.outer)
        sums = _Sums([*wanted, *(t for call in self.calls for t in call.returned)])
        sums.add([(number, None)], keep or bool(self.calls))
        while self.calls:
            call = self.calls.pop()
            given = [sums.pop(t) for t in call.returned]
            if any(g is not None for g in given):
                sums.add(self._block(call, given, want, take, keep), True)
        take(self.outer, [sums.found.get(id(t)) for t in wanted])

    def _block(
        self, call: _Call, given: list[Tensor | None], want: Want, take: Take, keep: bool
    ) -> Pairs:
        """Run a block again, and return what it was handed and the gradients there."""
        ends: list[Tensor] = []
        roots: list[Tensor] = []

        def root(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            ends.append(value)
            roots.append(value.detach().requires_grad_())
            return roots[-1]

        def rooted(value: Any) -> Any:
            return tree_map(root, value) if any(t.requires_grad for t in tensors(value)) else value

        part = Part()
        args = tuple(rooted(_stateless(v)) for v in call.args)
        kwargs = {key: rooted(_stateless(v)) for key, v in call.kwargs.items()}
        self.inner, self.layer = part, call.layer
        try:
            made = call.module(*args, **kwargs)
        finally:
            self.inner = self.outer
        made = [t for t in tensors(made) if t.is_floating_point()]
        _require_same(call.returned, made)
        wanted = want(part)
        pairs = [(m, g) for m, g in zip(made, given, strict=True) if g is not None]
        found = _gradients(pairs, [*roots, *wanted], keep)
        take(part, found[len(roots) :])
        at_roots = zip(ends, found[: len(roots)], strict=True)
        return [(end, g) for end, g in at_roots if g is not None]


def _stateless(value: Any) -> Any:
    """Return what a block is handed when it is run again: None for an object with a state.

    A cache of keys and values already holds this block's own, from the run without a graph. With
    it the block would return the same, and lose the gradient that its keys and values pass on.
    """
    known = (Tensor, bool, int, float, str, tuple, list, dict, torch.dtype, torch.device)
    return value if isinstance(value, known) or callable(value) else None


class _Sums:
    """Gradients at tensors, added up over the ways that lead to them."""

    def __init__(self, at: list[Tensor]) -> None:
        self.at = {id(t): t for t in at if t.requires_grad}
        self.found: dict[int, Tensor] = {}

    def add(self, ends: Pairs, keep: bool) -> None:
        """Go on from the ends of a graph, each with the gradient that it was given."""
        at = list(self.at.values())
        for tensor, g in zip(at, _gradients(ends, at, keep), strict=True):
            if g is not None:
                before = self.found.get(id(tensor))
                self.found[id(tensor)] = g if before is None else before + g

    def pop(self, tensor: Tensor) -> Tensor | None:
        """Return the sum at a tensor, and forget about it."""
        self.at.pop(id(tensor), None)
        return self.found.pop(id(tensor), None)


def _gradients(pairs: Pairs, wanted: list[Tensor], keep: bool) -> list[Tensor | None]:
    """Return gradients of ends, None where there is no way to one of them."""
    usable = [t for t in wanted if t.requires_grad]
    ends = [(e, g) for e, g in pairs if e.requires_grad]
    if not usable or not ends:
        return [None] * len(wanted)
    made = iter(
        torch.autograd.grad(
            [e for e, _ in ends],
            usable,
            [g for _, g in ends],
            retain_graph=keep,
            allow_unused=True,
        )
    )
    return [next(made) if t.requires_grad else None for t in wanted]


def _require_same(kept: list[Tensor], made: list[Tensor]) -> None:
    """Refuse a block that returns something else when it is run again."""
    if [t.shape for t in kept] != [t.shape for t in made]:
        raise InseparableError("a block that returns other shapes when it is run again")
    for a, b in ((x.detach(), y.detach()) for x, y in zip(kept, made, strict=True)):
        tolerance = 1e-4 if a.element_size() >= 4 else 2e-2
        if not bool((a - b).abs().max() <= tolerance * a.abs().max()):
            raise InseparableError("a block that returns other values when it is run again")
