"""Where gradients are taken: at the inputs themselves, or at the vectors that token ids look up.

Ids have no derivative. For them the real forward pass runs with a hook on every ``nn.Embedding``
that looks the ids up; its output is exchanged for the vectors that are differentiated. Position
embeddings, and every lookup of other ids in the same table, keep their values. The model is not
changed, and no architecture is known by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import tree_map
from ..errors import ArgumentError, ModelError, TapError
from ..measurement import check_device
from ..task import Task

__all__ = ["Entry", "Lookup", "enter"]

Exchange = Callable[[nn.Embedding, Tensor, Tensor], "Tensor | None"]
"""Table, ids that were looked up, what came out -> what shall come out instead."""


@dataclass
class Lookup:
    """The calls of one embedding table that looked up the input ids."""

    table: nn.Embedding
    width: int
    calls: dict[int, bool] = field(default_factory=dict)
    """Number of the call within one forward pass -> whether it saw the ids transposed."""


@dataclass(eq=False)
class Entry:
    """A model as a differentiable function of floating-point points.

    Args:
        model: The plain module, in evaluation mode, its parameters frozen.
        task: Runs it.
        batch: The user's batch, cloned.
        inputs: Its main input, floats or ids.
        leaves: The points at which the model was run first: the inputs, or the vectors of the ids,
            one tensor for each embedding table that they are looked up in.
        outputs: What the model said there.
        lookups: Where the vectors go; empty for floats.
    """

    model: nn.Module
    task: Task
    batch: Any
    inputs: Tensor
    leaves: tuple[Tensor, ...]
    outputs: Tensor
    lookups: tuple[Lookup, ...] = ()
    head: nn.Linear | None = None
    """Where outputs ``[example, position, token]`` come from a linear map of each position: it."""
    reads: Tensor | None = None
    """The only position of each example that the head shall answer at in `run`; None: all."""

    @property
    def is_tokens(self) -> bool:
        """Whether the inputs are ids."""
        return bool(self.lookups)

    @property
    def tables(self) -> tuple[nn.Embedding, ...]:
        """The tables whose vectors are the point."""
        return tuple(lookup.table for lookup in self.lookups)

    @property
    def point(self) -> Tensor:
        """Where the model was run first: ``[example, …]``, for ids ``[example, …, channel]``."""
        return self.joined(self.leaves).detach()

    def joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return one tensor for the parts that belong to several tables.

        Args:
            parts: One tensor for each leaf.

        Returns:
            The parts side by side along the last axis.
        """
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the vectors of other ids.

        Args:
            ids: Any shape.

        Returns:
            The ids' shape and one more axis, as long as that of `point`.
        """
        with torch.no_grad():
            return self.joined(tuple(lookup.table(ids) for lookup in self.lookups))

    def run(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the model's outputs at other points.

        Args:
            points: Any number of stacked copies of the chosen examples, in any precision.
            rows: Which examples of the batch these are, ``[row]``.

        Returns:
            Outputs, as many as points, at the position that is read or at all of them.
        """
        chosen = rows.repeat(len(points) // len(rows))
        batch = self._batch(chosen)
        with self.narrowed(chosen):
            if not self.is_tokens:
                points = points.to(self.inputs.dtype)
                return self.task.outputs(self.model, self.task.with_inputs(batch, points))
            with self.exchanged(self.task.inputs(batch), points):
                return self.task.outputs(self.model, batch)

    @contextmanager
    def narrowed(self, chosen: Tensor) -> Iterator[None]:
        """Hand the head one position of each example only, where only that one is read.

        Args:
            chosen: The example of each row.

        Yields:
            Nothing.
        """
        if self.head is None or self.reads is None:
            yield
            return
        at = self.reads.to(chosen.device)[chosen]

        def hook(module: nn.Module, args: Any) -> Any:
            hidden = args[0] if args else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != len(at):
                return None
            here = torch.arange(len(at), device=hidden.device)
            return (hidden[here, at.to(hidden.device)][:, None], *args[1:])

        handle = self.head.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _batch(self, rows: Tensor) -> Any:
        size = len(self.inputs)
        if len(rows) == size and bool((rows == torch.arange(size, device=rows.device)).all()):
            return self.batch

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == size:
                return value[rows.to(value.device)]
            return value

        return tree_map(pick, self.batch)

    @contextmanager
    def exchanged(self, ids: Tensor, points: Tensor) -> Iterator[None]:
        """Hand out other vectors where the ids are looked up.

        Args:
            ids: The ids that the model will look up.
            points: Their vectors, ``[point, …, channel]``.

        Yields:
            Nothing.

        Raises:
            TapError: If the model looks up other ids than in its first run.
        """
        parts = torch.split(points, [lookup.width for lookup in self.lookups], -1)
        by_table = {id(k.table): (k, part) for k, part in zip(self.lookups, parts, strict=True)}
        seen: Counter[int] = Counter()

        def exchange(table: nn.Embedding, called: Tensor, output: Tensor) -> Tensor | None:
            lookup, part = by_table[id(table)]
            turned = lookup.calls.get(seen[id(table)])
            seen[id(table)] += 1
            if turned is None:
                return None
            if called.numel() != ids.numel() or not _same(called, ids, turned):
                raise TapError(_moved(lookup))
            return _laid_out(part, output, turned)

        with _hooked([lookup.table for lookup in self.lookups], exchange):
            yield
        for lookup in self.lookups:
            if seen[id(lookup.table)] <= max(lookup.calls):
                raise TapError(_moved(lookup))


def enter(model: nn.Module, batch: Any, task: Task, *, graph: bool) -> Entry:
    """Run a model once and find where its gradient is to be taken.

    Args:
        model: The plain module, in evaluation mode, its parameters frozen.
        batch: The user's batch, cloned.
        task: Runs the model.
        graph: Whether `Entry.outputs` can be differentiated with respect to `Entry.leaves`.

    Returns:
        The entry.

    Raises:
        ArgumentError: If the inputs are ids that no embedding looks up, on another device than
            the model, or empty.
        ModelError: If there is not one output for each example.
    """
    inputs = task.inputs(batch)
    _check_inputs(model, inputs)
    # A single gradient runs the model once: no later run could leave other positions out.
    maps: list[tuple[nn.Linear, int, torch.Size]] = []
    with torch.set_grad_enabled(graph), nullcontext() if graph else _linear_maps(model, maps):
        if inputs.is_floating_point():
            leaf = inputs.as_subclass(Tensor).detach().requires_grad_(graph)
            outputs = task.outputs(model, task.with_inputs(batch, leaf))
            entry = Entry(model, task, batch, inputs, (leaf,), outputs)
        else:
            entry = _enter_tokens(model, batch, task, graph)
    if not entry.outputs.ndim or len(entry.outputs) != len(inputs):
        raise ModelError(
            f"model: expected one output for each of the {len(inputs)} examples, got outputs of "
            f"shape {tuple(entry.outputs.shape)}. Pass a Task whose outputs(model, batch) returns "
            "examples first, or inputs of which one row is one example."
        )
    entry.head = _head(maps, entry.outputs)
    return entry


@contextmanager
def _linear_maps(
    model: nn.Module, noted: list[tuple[nn.Linear, int, torch.Size]]
) -> Iterator[None]:
    """Note what linear maps put out: where it lies and its form, so that nothing is kept alive."""

    def hook(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 3:
            noted.append((module, output.data_ptr(), output.shape))

    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(hook) for m in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(maps: list[tuple[nn.Linear, int, torch.Size]], outputs: Tensor) -> nn.Linear | None:
    ends = (outputs.data_ptr(), outputs.shape)
    return next((m for m, place, shape in reversed(maps) if (place, shape) == ends), None)


def _enter_tokens(model: nn.Module, batch: Any, task: Task, graph: bool) -> Entry:
    ids = task.inputs(batch)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    # A lookup of the very same memory is surely the input's. A copy is recognised by its values,
    # and only if there is no such lookup: positions 0, 1, 2 … may equal the ids by chance.
    for by_memory in (True, False) if tables else ():
        lookups: dict[int, tuple[Lookup, Tensor]] = {}
        seen: Counter[int] = Counter()
        exchange = _finding(ids, by_memory, graph, lookups, seen)
        with _hooked(tables, exchange):
            outputs = task.outputs(model, batch)
        if lookups:
            found, leaves = zip(*lookups.values(), strict=True)
            return Entry(model, task, batch, ids, leaves, outputs, found)
    raise ArgumentError.of(
        "inputs",
        expected="floats, or token ids that the model looks up unchanged in an nn.Embedding",
        got=f"{str(ids.dtype)[6:]} of shape {tuple(ids.shape)} and {len(tables)} nn.Embedding",
        do="Pass floats (inputs.float(), or the embedded vectors): only they have a gradient.",
    )


def _finding(
    ids: Tensor,
    by_memory: bool,
    graph: bool,
    lookups: dict[int, tuple[Lookup, Tensor]],
    seen: Counter[int],
) -> Exchange:
    def exchange(table: nn.Embedding, called: Tensor, output: Tensor) -> Tensor | None:
        number = seen[id(table)]
        seen[id(table)] += 1
        turned = _is_turned(called, ids)
        if turned is None or (by_memory and not _shares(called, ids)):
            return None
        if id(table) not in lookups:
            straight = output.transpose(0, 1) if turned else output
            leaf = straight.detach().reshape(*ids.shape, -1).contiguous().clone()
            leaf.requires_grad_(graph)
            lookups[id(table)] = (Lookup(table, leaf.shape[-1]), leaf)
        lookup, leaf = lookups[id(table)]
        lookup.calls[number] = turned
        return _laid_out(leaf, output, turned)

    return exchange


@contextmanager
def _hooked(tables: list[nn.Embedding], exchange: Exchange) -> Iterator[None]:
    def hook(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        called = args[0] if args else kwargs.get("input")
        return exchange(module, called, output) if isinstance(called, Tensor) else None

    handles = [t.register_forward_hook(hook, with_kwargs=True) for t in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_turned(called: Tensor, ids: Tensor) -> bool | None:
    """Say whether these are the ids (False), the ids transposed (True), or others (None)."""
    if called.numel() != ids.numel():
        return None
    straight, turned = _same(called, ids, False), _same(called, ids, True)
    if straight and turned:  # Equal values on both sides: the form tells, or else the memory.
        if called.shape == ids.shape and _shares(called, ids):
            return called.stride() != ids.stride()
        return called.shape != ids.shape
    return False if straight else (True if turned else None)


def _same(called: Tensor, ids: Tensor, turned: bool) -> bool:
    if turned and (ids.ndim != 2 or called.shape != ids.shape[::-1]):
        return False
    return bool(((called.t() if turned else called.reshape(ids.shape)) == ids).all())


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _laid_out(part: Tensor, output: Tensor, turned: bool) -> Tensor:
    part = part.transpose(0, 1) if turned else part
    return part.reshape(output.shape).to(output.dtype)


def _moved(lookup: Lookup) -> str:
    return (
        f"inputs: expected the model to look up the same ids at every pass, got others in its "
        f"{lookup.table}. A forward pass whose control flow depends on the embedded values cannot "
        "be attributed through its embedding; pass the embedded vectors as float inputs."
    )


def _check_inputs(model: nn.Module, inputs: Tensor) -> None:
    check_device(model, inputs, "inputs", "Move them with .to(device).")
    if inputs.ndim == 0 or inputs.numel() == 0:
        raise ArgumentError.of(
            "inputs",
            expected="at least one example along the first axis",
            got=f"shape {tuple(inputs.shape)}",
            do="Add the axis with inputs[None].",
        )
