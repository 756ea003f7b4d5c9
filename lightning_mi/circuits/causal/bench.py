"""Runs in which only chosen edges carry what the clean run writes; all others are ablated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...attention import Site
from ...attention.site import widened
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...task import Task
from .edges import Direction, EdgeScores, blank, wired
from .graph import Graph, moves
from .heads import attend
from .streams import Wiring, repeated

__all__ = ["Ablation", "Bench", "edge_patching", "on_bench"]

Ablation: TypeAlias = Literal["corrupted", "mean", "zero"]
ABLATIONS = ("corrupted", "mean", "zero")

NUMBERS = 2**25
"""Most numbers that what all writers wrote may take in one pass; circuits are batched up to it."""


@dataclass(eq=False)
class Bench:
    """A model on which circuits are run, many at once.

    Each input reads what it read in the reference run, plus, for each of its edges in the circuit,
    what that edge's writer writes now less what it wrote there. So with all edges the model runs
    as it is, with none everything is ablated, and biases stay.

    Args:
        wiring: The model.
        behavior: The prompts; those that run are the clean ones.
        clean: Metric of the live run ``[example]``.
        corrupted: Metric of the reference run ``[example]``.
        ablation: What an edge outside the circuit carries.
        reference: Stream at each reader when everything is ablated.
        written: For each node what it wrote in the reference run.
        floor: For each node what ablation puts there, less ``written``.
        first: What embeddings write in the live run, less ``written`` and ``floor``.
    """

    wiring: Wiring
    behavior: Behavior
    live: Any
    clean: Tensor
    corrupted: Tensor
    ablation: Ablation
    reference: list[Tensor]
    written: Tensor
    floor: Tensor | None
    first: Tensor

    @property
    def graph(self) -> Graph:
        """The edges that there are."""
        return self.wiring.graph

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.reference[-1].shape[1]

    def metric(self, masks: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the metric when only some edges are live.

        Args:
            masks: Edges in each circuit ``[circuit, writer, reader]``: boolean, or codes.
            where: What codes mean ``[code, source, target]``; see `where.coded`.

        Returns:
            Shape ``[circuit, example]``.
        """
        size = self.written.numel()
        per_pass = max(1, NUMBERS // max(1, size))
        if not len(masks):
            return self.clean.new_zeros(0, len(self.behavior))
        with torch.no_grad():
            return torch.cat([self._pass(chunk, where) for chunk in torch.split(masks, per_pass)])

    def _pass(self, masks: Tensor, where: Tensor | None) -> Tensor:
        state = _Pass(self, masks, where)
        rows = repeated(self.live, len(self.behavior), len(masks))
        outputs = self.wiring.play(
            rows, state.enter, state.leave, state.edit, (self.behavior, len(masks))
        )
        blocks = torch.split(outputs, len(self.behavior))
        return torch.stack([widened(self.behavior.metric(block)) for block in blocks])


class _Pass:
    """One pass: what each node has written so far, and what is read from it."""

    def __init__(self, bench: Bench, masks: Tensor, where: Tensor | None) -> None:
        self.bench, self.wiring = bench, bench.wiring
        home = bench.written.device
        self.codes = masks.to(home).transpose(1, 2)
        self.where = torch.zeros(0) if where is None else where.to(home)
        count, nodes = len(masks), len(bench.written)
        # [circuit, node, numbers]: what it writes now, less what ablation puts there.
        self.now = bench.written.new_zeros(count, nodes, bench.written[0].numel())
        self.now[:, : len(bench.first)] = bench.first.flatten(1)

    def read(self, reader: int, target: int = 0) -> Tensor:
        """Return what each input of a reader reads ``[input, row, position, d_model]``.

        Keys and values are those that the query at ``target`` sees.
        """
        wiring, whole = self.wiring, self.bench.reference[reader]
        stop = wiring.starts[wiring.anatomy.readers[reader].after]
        inputs = wiring.inputs_of(reader)
        chosen, now = self.codes[:, inputs, :stop], self.now[:, :stop]
        made = torch.unflatten((chosen == 1).to(now) @ now, -1, whole.shape)
        for code in _coded(chosen):
            pattern = self.where[code].to(now)
            rows = [pattern[:, target], pattern.diagonal()]
            there = torch.stack([rows[not moves(wiring.graph.readers[i])] for i in inputs])
            part = torch.unflatten((chosen == code).to(now) @ now, -1, whole.shape)
            made = made + part * there[None, :, None, :, None]
        stream = made + whole
        return stream.transpose(0, 1).flatten(1, 2)

    def _alike(self, layer: int) -> list[Tensor | None]:
        """Return groups of queries ``[position]`` that see the same keys and values."""
        reader = self.wiring.reader_of[layer]
        inputs = [i for i in self.wiring.inputs_of(reader) if moves(self.bench.graph.readers[i])]
        codes = _coded(self.codes[:, inputs])
        if not codes:
            return [None]
        seen = self.where[codes].flatten(0, 1).T
        kinds, group = torch.unique(seen, dim=0, return_inverse=True)
        return [group == kind for kind in range(len(kinds))]

    def enter(self, readers: list[int], x: Tensor) -> Tensor:
        own = [r for r in readers if self.wiring.anatomy.readers[r].kind != "attention"]
        return self.read(own[0])[0].to(x.dtype) if own else x

    def leave(self, writer: int, value: Tensor) -> Tensor:
        if self.wiring.anatomy.writers[writer].layer >= 0:
            self._note(writer, value)
        return value

    def edit(self, layer: int, site: Site) -> Tensor:
        known = self.wiring.heads[layer]
        if known is None:  # Refused before.
            return site.z
        heads, kv = site.q.shape[1], site.k.shape[1]
        z = site.z
        for group in self._alike(layer):
            target = 0 if group is None else int(group.nonzero()[0])
            x = self.read(self.wiring.reader_of[layer], target)
            q = known("q", x[:heads])
            k = known("k", x[heads : heads + kv])
            v = known("v", x[heads + kv :])
            made = attend(site, q, k, v).to(site.z.dtype)
            z = made if group is None else torch.where(group[:, None], made, z)
        self._note(self.wiring.writer_of[layer], z)
        return z

    def _note(self, writer: int, value: Tensor) -> None:
        bench, wiring = self.bench, self.wiring
        here = slice(wiring.starts[writer], wiring.starts[writer + 1])
        made = wiring.written(writer, value)
        rows = torch.unflatten(made, 1, (len(self.now), -1)) - bench.written[here, None]
        if bench.floor is not None:
            rows = rows - bench.floor[here, None]
        self.now[:, here] = rows.transpose(0, 1).flatten(2)


def _coded(codes: Tensor) -> list[int]:
    """Return the codes that stand for some positions only."""
    return [] if codes.dtype == torch.bool else sorted({*codes.flatten().tolist()} - {0, 1})


@contextmanager
def on_bench(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    direction: Direction = "noise",
    ablation: Ablation = "corrupted",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Iterator[Bench]:
    """Make a model ready for circuits to be run on it, and leave it as it was.

    Args:
        model: The user's model.
        behavior: The prompts.
        direction: ``"noise"`` runs the clean prompts and ablates towards the corrupted ones;
            ``"denoise"`` exchanges the two.
        ablation: What an edge outside carries: the reference run's value, the mean of it over
            examples, or zero.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Yields:
        The bench.

    Raises:
        ArgumentError: If the ablation is unknown.
        ModelError: If the model has no stream that is a sum of what its parts write, or heads that
            cannot be given inputs of their own.
    """
    own = as_behavior(behavior)
    if ablation not in ABLATIONS:
        raise ArgumentError.of(
            "ablation", expected=f"one of {ABLATIONS}", got=repr(ablation), do="Choose one."
        )
    ends = (own.clean, own.corrupted) if direction == "noise" else (own.corrupted, own.clean)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        yield _made(wired(plain, own, task, anatomy), own, ends, ablation)


def _made(wiring: Wiring, behavior: Behavior, ends: tuple[Any, Any], ablation: Ablation) -> Bench:
    here, there = (wiring.see(end, reading=(behavior, 1)) for end in ends)
    wiring.learn(here)
    wiring.require_heads(here)
    delta = wiring.difference(here, there)
    written = torch.zeros_like(delta)
    for index, value in enumerate(there.returned):
        if value is not None:
            written[wiring.starts[index] : wiring.starts[index + 1]] = wiring.written(index, value)
    floor = _floor(written, ablation)
    reference = [widened(x) for x in there.entering]
    if floor is not None:
        for i, r in enumerate(wiring.anatomy.readers):
            reference[i] = reference[i] + floor[: wiring.starts[r.after]].sum(0)
    firsts = sum(wiring.count(w) for w in wiring.anatomy.writers if w.layer < 0)
    first = delta[:firsts] if floor is None else delta[:firsts] - floor[:firsts]
    # Means over examples would be rounded as coarsely as a model in half precision rounds.
    metrics = [widened(behavior.metric(s.outputs)) for s in (here, there)]
    return Bench(
        wiring,
        behavior,
        ends[0],
        metrics[0],
        metrics[1],
        ablation,
        reference,
        written,
        floor,
        first,
    )


def _floor(written: Tensor, ablation: Ablation) -> Tensor | None:
    if ablation == "corrupted":
        return None
    if ablation == "zero":
        return -written
    return written.mean(1, keepdim=True) - written


def edge_patching(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    direction: Direction = "noise",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> EdgeScores:
    """Measure exactly what each edge does to a behaviour, one run for each, batched.

    For ``"noise"`` the clean run in which this edge alone carries what its writer wrote in the
    corrupted run; for ``"denoise"`` the other way round. What follows is computed anew; values
    are the stored ones, never re-read.

    Args:
        model: The user's model; it is left as it was.
        behavior: The prompts.
        direction: Which value is exchanged for which.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        The changes of the metric. NaN with a reason if it is the same on both prompts.
    """
    with on_bench(model, behavior, direction=direction, task=task, anatomy=anatomy) as bench:
        graph = bench.graph
        ends = [float(bench.clean.mean()), float(bench.corrupted.mean())]
        clean, corrupted = ends if direction == "noise" else ends[::-1]
        found = blank(graph, clean, corrupted, direction, "exact", 0, len(bench.behavior))
        if found.reason is not None:
            return found
        where = graph.lawful.nonzero()
        for chunk in torch.split(where, 64):
            masks = graph.lawful.repeat(len(chunk), 1, 1)
            masks[torch.arange(len(chunk)), chunk[:, 0], chunk[:, 1]] = False
            change = bench.metric(masks).mean(1) - bench.clean.mean()
            found.values[chunk[:, 0], chunk[:, 1]] = change.to(found.values)
    found.values.masked_fill_(~graph.lawful, float("nan"))
    return dataclasses.replace(found, found_on=bench.behavior)
