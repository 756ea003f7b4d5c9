"""Passes through a model in which each input reads its own sum of what others wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, Writer
from ...anatomy.tape import named, tensors
from ...attention import Site, Tap, tap
from ...attention.site import widened
from ...batch import attention_mask_of, tree_map
from ...behavior import Behavior
from ...errors import ModelError
from ...target import Logit, positions
from ...task import Task
from .graph import Graph
from .heads import HeadInputs, attend, head_inputs, require_same
from .readings import asks_alone

__all__ = ["Seen", "Wiring", "repeated"]

Enter = Callable[[list[int], Tensor], Tensor]
Leave = Callable[[int, Tensor], Tensor]
Rewrite = Callable[[int, int, Tensor], Tensor]
Inside = Callable[[], AbstractContextManager[None]]


@dataclass(eq=False)
class Seen:
    """What was seen of one pass, by index of the anatomy's readers and writers.

    Args:
        outputs: The model's outputs.
        entering: For each reader the stream that it was handed ``[example, position, d_model]``.
        returned: For each writer what its module returned, or z of its heads.
        sites: The attention of each layer.
        real: Positions that are no padding ``[example, position]``; None for all.
    """

    outputs: Tensor
    entering: list[Tensor]
    returned: list[Tensor | None]
    sites: list[Site]
    real: Tensor | None = None


@dataclass(eq=False)
class Wiring:
    """A model whose inputs can be handed sums of their own.

    Args:
        model: The module inside any wrapper.
        anatomy: What it is made of.
        graph: Its edges.
        task: How it is called.
    """

    model: nn.Module
    anatomy: Anatomy
    graph: Graph
    task: Task

    def __post_init__(self) -> None:
        """Find modules once."""
        self.modules = named(self.model)
        self.heads: list[HeadInputs | None] = []
        owners = [
            [i for i, w in enumerate(self.anatomy.writers) if w.kind == "heads" and w.layer == at]
            for at in range(self.anatomy.n_layers)
        ]
        reading = {r.layer: i for i, r in enumerate(self.anatomy.readers) if r.kind == "attention"}
        whole = all(owners) and all(at in reading for at in range(self.anatomy.n_layers))
        if not whole or any(bool(W.isnan().any()) for W in self.anatomy.W_O):
            raise ModelError(
                f"model: expected every attention of {type(self.model).__name__} to read the "
                "stream and to write to it by a known matrix, got one that does not. "
                f"{' '.join(str(n) for n in self.anatomy.notes)}"
            )
        self.writer_of = [own[0] for own in owners]
        self.reader_of = [reading[at] for at in range(self.anatomy.n_layers)]
        counts = [self.count(w) for w in self.anatomy.writers]
        self.starts = [sum(counts[:i]) for i in range(len(counts) + 1)]

    def count(self, writer: Writer) -> int:
        """Return how many nodes a writer of the anatomy is: a heads' writer is one for each."""
        return self.anatomy.n_heads[writer.layer] if writer.kind == "heads" else 1

    def inputs_of(self, reader: int) -> list[int]:
        """Return the graph's inputs that belong to a reader of the anatomy."""
        found, at = 0, []
        for index, r in enumerate(self.anatomy.readers):
            size = 1
            if r.kind == "attention":
                size = self.anatomy.n_heads[r.layer] + 2 * self.anatomy.n_kv_heads[r.layer]
            if index == reader:
                at = list(range(found, found + size))
            found += size
        return at

    def written(self, index: int, returned: Tensor) -> Tensor:
        """Return what a writer adds to the stream, apart from biases.

        Args:
            index: Which writer of the anatomy.
            returned: What its module returned, or z of its heads.

        Returns:
            Shape ``[node, example, position, d_model]``: one node, or one for each head.
        """
        w = self.anatomy.writers[index]
        value = widened(returned)
        if w.kind == "heads":
            W_O = self.anatomy.W_O[w.layer].to(value)
            flat = value.transpose(0, 1).flatten(1, 2) @ W_O
            parts = torch.unflatten(flat, 1, (value.shape[0], value.shape[2]))
            whole = parts.sum(0) + self.anatomy.b_O[w.layer].to(value) if w.norm else None
        else:
            parts, whole = value[None], value
        if w.norm is not None and whole is not None:
            parts = w.norm.linear(parts, w.norm.scale(whole))
        return parts * w.factor if w.factor != 1.0 else parts

    def see(
        self,
        batch: Any,
        *,
        branch: bool = False,
        rewrite: Rewrite | None = None,
        reading: tuple[Behavior, int] | None = None,
        inside: Inside = nullcontext,
    ) -> Seen:
        """Run the model and keep what was read and written.

        Args:
            batch: What it is run on.
            branch: Hand each reader a tensor of its own, at which a gradient can be taken.
            rewrite: ``rewrite(writer, layer, value)`` returns what a writer returns instead
                (z of a layer's heads, or the module's output); layer −1 where there is none.
            reading: A behavior and how often it is repeated, where logits are only read there.
            inside: Makes a context that the pass is run in, once all hooks are set.

        Returns:
            What was seen, in the model's own graph.

        Raises:
            ModelError: If the batch takes another path through the model than its anatomy.
        """
        entering: dict[int, Tensor] = {}
        returned: dict[int, Tensor] = {}
        sites: list[Site] = []

        def enter(readers: list[int], x: Tensor) -> Tensor:
            if branch:
                x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            entering.update(dict.fromkeys(readers, x))
            return x

        def leave(writer: int, value: Tensor) -> Tensor:
            if rewrite is not None:
                value = rewrite(writer, -1, value)
            # A model may add to it in place (Falcon does).
            returned[writer] = value.detach().clone() if branch else value.clone()
            return value

        def edit(layer: int, site: Site) -> Tensor:
            z = site.z if rewrite is None else rewrite(self.writer_of[layer], layer, site.z)
            returned[self.writer_of[layer]] = z
            sites.append(site)
            return z

        outputs = self.play(batch, enter, leave, edit, reading, inside)
        whole = [entering.get(i) for i in range(len(self.anatomy.readers))]
        lost = [r.label for r, x in zip(self.anatomy.readers, whole, strict=True) if x is None]
        if lost or len(sites) != self.anatomy.n_layers:
            raise ModelError(
                f"model: expected {lost or 'every layer'} to be run, got a pass without it. The "
                "anatomy belongs to another model, or this batch takes another path through it."
            )
        return Seen(
            outputs,
            [x for x in whole if x is not None],
            [returned.get(i) for i in range(len(self.anatomy.writers))],
            sites,
            _real(batch, entering[0]),
        )

    def learn(self, seen: Seen) -> None:
        """Find out how heads read, and whether positions look back only, from a pass.

        Args:
            seen: The pass.
        """
        causal = not any(_looks_ahead(site, seen.real) for site in seen.sites)
        if causal != self.graph.causal:
            self.graph = replace(self.graph, causal=causal)
        self.heads = [
            head_inputs(self.anatomy, at, seen.sites[at], seen.entering[self.reader_of[at]])
            for at in range(self.anatomy.n_layers)
        ]

    def require_heads(self, seen: Seen) -> None:
        """Refuse a model whose heads cannot be given inputs of their own.

        Args:
            seen: A pass that nothing was changed in.

        Raises:
            ModelError: If queries, keys, values or z of a layer were not reproduced.
        """
        for at, (own, site) in enumerate(zip(self.heads, seen.sites, strict=True)):
            if own is None:
                raise ModelError(
                    f"model: expected queries, keys and values of layer {at} ({site.module!r}) to "
                    "follow from the stream by a matrix, a norm and a rotation, got others. Its "
                    "heads cannot be given inputs of their own. "
                    f"{' '.join(self.anatomy.approximate(at))}".rstrip()
                )
            z = seen.returned[self.writer_of[at]]
            made = attend(site, site.q, site.k, site.v)
            require_same(site, site.z if z is None else z, made, at, seen.real)

    def difference(self, one: Seen, other: Seen) -> Tensor:
        """Return what each node writes in one pass less what it writes in another one.

        Args:
            one: A pass.
            other: Another one, on as many examples.

        Returns:
            Shape ``[writer, example, position, d_model]``.

        Raises:
            ModelError: If the differences do not add up to those of the streams.
        """
        like = widened(one.entering[-1])
        made = like.new_zeros(self.starts[-1], *like.shape)
        lost = []
        for index, (a, b) in enumerate(zip(one.returned, other.returned, strict=True)):
            if a is None or b is None:
                lost.append(index)
                continue
            here = slice(self.starts[index], self.starts[index + 1])
            if self.anatomy.writers[index].norm is None:  # Then it is linear.
                made[here] = self.written(index, widened(a) - widened(b))
            else:
                made[here] = self.written(index, a) - self.written(index, b)
        if lost:
            self._fill(made, lost, one, other)
        self._require_sum(made, one, other)
        return made

    def _fill(self, made: Tensor, lost: list[int], one: Seen, other: Seen) -> None:
        """Find by subtraction what no module returns: an embedding made of functions."""
        first = self.anatomy.readers[0]
        if lost[0] >= first.after or self.anatomy.writers[lost[0]].layer >= 0:
            label = self.anatomy.writers[lost[0]].label
            raise ModelError(
                f"model: expected a module that returns what {label} writes, got none. "
                "Make it a module of its own."
            )
        stop = self.starts[first.after]
        whole = widened(one.entering[0]) - widened(other.entering[0])
        made[self.starts[lost[0]]] = whole - made[:stop].sum(0)

    def _require_sum(self, made: Tensor, one: Seen, other: Seen) -> None:
        tolerance = 1e-3 if one.entering[0].element_size() >= 4 else 5e-2
        total, done = torch.zeros_like(made[0]), 0
        for index, reader in enumerate(self.anatomy.readers):
            stop = self.starts[reader.after]
            total, done = total + made[done:stop].sum(0), stop
            a, b = widened(one.entering[index]), widened(other.entering[index])
            size = torch.maximum(a.abs().max(), b.abs().max())
            if not bool((a - b - total).abs().max() <= tolerance * size):
                raise ModelError(
                    f"model: expected the stream that {reader.label} reads to be the sum of what "
                    "was written, got another one. Edges are defined for such a sum only. "
                    f"{' '.join(str(n) for n in self.anatomy.notes)}".rstrip()
                )

    @contextmanager
    def _hooks(self, enter: Enter, leave: Leave) -> Iterator[None]:
        """Call ``enter`` and ``leave`` with the index of each reader and writer, in turn."""
        reading: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, r in enumerate(self.anatomy.readers):
            # Parallel blocks may share one norm: then one call serves two readers.
            reading[r.module][r.after].append(i)
        writing: dict[str, list[int]] = defaultdict(list)
        for i, w in enumerate(self.anatomy.writers):
            if w.module and w.kind != "heads":
                writing[w.module].append(i)
        with ExitStack() as stack:
            for name, groups in reading.items():
                hook = _entering(list(groups.values()), enter)
                handle = self.modules[name].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for name, turns in writing.items():
                left = _leaving(turns, self.anatomy.writers, leave)
                stack.callback(self.modules[name].register_forward_hook(left).remove)
            yield

    def play(
        self,
        batch: Any,
        enter: Enter,
        leave: Leave,
        edit: Callable[[int, Site], Tensor],
        reading: tuple[Behavior, int] | None,
        inside: Inside = nullcontext,
        *,
        alone: bool = False,
    ) -> Tensor:
        """Run the model and let others say what is read and written.

        Args:
            batch: What it is run on.
            enter: Returns what readers read instead of the stream.
            leave: Returns what a writer's module returns instead.
            edit: Returns what the heads of a layer write instead.
            reading: A behavior and how often it is repeated, where logits are only read there.
            inside: Makes a context that the pass is run in, once all hooks are set.
            alone: Logits that are read at one position come without the others, where the metric
                can be asked of ``[example, token]``.

        Returns:
            The model's outputs.
        """
        layers = iter(range(self.anatomy.n_layers))

        def each(site: Site) -> Tensor:
            return edit(next(layers), site)

        with self.opened(enter, leave, each, reading, inside, alone=alone) as run:
            return run(batch)

    @contextmanager
    def opened(
        self,
        enter: Enter,
        leave: Leave,
        edit: Callable[[Site], Tensor],
        reading: tuple[Behavior, int] | None,
        inside: Inside = nullcontext,
        *,
        alone: bool = False,
    ) -> Iterator[Callable[[Any], Tensor]]:
        """Let others say what is read and written while the model, or a part of it, runs.

        Args:
            enter: See `play`.
            leave: See `play`.
            edit: Returns what the heads of an attention write instead.
            reading: See `play`.
            inside: See `play`.
            alone: See `play`.

        Yields:
            A function that runs the model on a batch and returns its outputs.
        """
        taps: list[Tap] = []

        def change(index: int, z: Tensor) -> Tensor:
            site = taps[0].sites.pop()
            return z if site.cross else edit(site)

        with (
            tap(self.model, change, check="none") as seen,
            self._hooks(enter, leave),
            self._narrowed(reading, alone) as widen,
            inside(),
        ):
            taps.append(seen)
            try:
                yield lambda batch: widen(self.task.outputs(self.model, batch))
            finally:
                taps.clear()  # It holds `change`: all that was seen would wait for the collector.

    @contextmanager
    def _narrowed(
        self, reading: tuple[Behavior, int] | None, alone: bool
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Unembed only the position that the metric reads: logits of all others would be waste."""
        head = self.head()
        question = None if reading is None else reading[0].question
        if reading is None or head is None or not isinstance(question, Logit):
            yield lambda outputs: outputs
            return
        behavior, copies = reading
        asked: Logit = question
        length = 0

        def hook(module: nn.Module, args: Any) -> Any:
            nonlocal length
            hidden = args[0] if args else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                return None
            if len(hidden) != copies * len(behavior):
                return None
            at = positions(hidden[: len(behavior)], behavior.clean, asked)
            at = at.repeat(copies).to(hidden.device)
            length = hidden.shape[1]
            rows = torch.arange(len(hidden), device=hidden.device)
            return (hidden[rows, at][:, None], *args[1:])

        def widen(outputs: Tensor) -> Tensor:
            if not length or outputs.ndim != 3 or outputs.shape[1] != 1:
                return outputs
            if alone and asks_alone(asked):
                return outputs[:, 0]
            # All positions show the logits of the one that is read.
            return outputs.expand(-1, length, -1)

        handle = head.register_forward_pre_hook(hook)
        try:
            yield widen
        finally:
            handle.remove()

    def head(self) -> nn.Linear | None:
        """Return the module that unembeds, or None if it is not known."""
        W_U = self.anatomy.W_U
        if W_U is None:
            return None
        found = [
            m
            for m in self.modules.values()
            if isinstance(m, nn.Linear) and tuple(m.weight.shape) == (W_U.shape[1], W_U.shape[0])
        ]
        return found[0] if len(found) == 1 else None


def repeated(batch: Any, size: int, times: int) -> Any:
    """Return a batch several times over, one copy after the other.

    Args:
        batch: The batch.
        size: Its number of examples.
        times: How often.

    Returns:
        A batch of ``times * size`` examples.
    """
    if times == 1:
        return batch

    def again(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != size:
            return value
        return value.repeat(times, *([1] * (value.ndim - 1)))

    return tree_map(again, batch)


def _looks_ahead(site: Site, real: Tensor | None) -> bool:
    open_ = site.reachable()
    if open_ is None:
        return site.q.shape[2] > 1
    ahead = open_.triu(1)
    return bool((ahead if real is None else ahead & real[:, None, :, None]).any())


def _real(batch: Any, stream: Tensor) -> Tensor | None:
    """Return which positions of a batch are no padding, where it says so position by position."""
    mask = attention_mask_of(batch)
    fits = mask is not None and mask.shape == stream.shape[:2]
    return None if mask is None or not fits else mask.bool().to(stream.device)


def _entering(turns: list[list[int]], enter: Enter) -> Callable[..., Any]:
    calls = [0]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = turns[min(calls[0], len(turns) - 1)]
        calls[0] += 1
        for place, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:place], enter(own, value), *args[place + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, key: enter(own, value)}
        return None

    return hook


def _leaving(
    turns: list[int], writers: tuple[Writer, ...], leave: Leave
) -> Callable[[nn.Module, Any, Any], Any]:
    calls = [0]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        index = turns[min(calls[0], len(turns) - 1)]
        calls[0] += 1
        if isinstance(output, Tensor):
            return leave(index, output)
        found = list(tensors(output))
        place = writers[index].output
        if place >= len(found):
            return None
        changed = leave(index, found[place])
        if not isinstance(output, tuple) or changed is found[place]:
            return None
        return tuple(changed if v is found[place] else v for v in output)

    return hook
