"""One recorded pass over a batch, and which part of every layer's output is whose: `Reader`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch import batch_size, cut, doubled
from .point import Point, repeatable_attention
from .recording import Recorder, Use

__all__ = ["Layout", "Plan", "Read", "Reader", "ValueFunction"]

PROBE = 2
"""Examples in the pass that finds out which part of each layer's output is whose."""


class ValueFunction(Protocol):
    """What is differentiated: outputs or losses of the examples of a batch."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return shape ``[example, …]``."""


Cotangents = Callable[[Tensor], Sequence[Tensor]]
"""Values ``[example, …]`` to the vectors, of that shape, that they are pulled back along."""


@dataclass(frozen=True)
class Layout:
    """Which part of a tensor belongs to which example.

    Args:
        second: Examples are counted by the second dimension. Otherwise by the first, which may
            count the positions of each as well.
        tail: Shape of one example's part.
        verified: An example's gradient was seen in its own part and nowhere else. Where all
            gradients were zero this cannot be known.
    """

    second: bool
    tail: tuple[int, ...]
    verified: bool

    def first(self, tensor: Tensor) -> Tensor:
        """Return the tensor with examples, or examples and their positions, counted first."""
        return tensor.transpose(0, 1) if self.second else tensor

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the tensor as ``[example, everything else]``."""
        return self.first(tensor).reshape(examples, -1)

    def rows(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the tensor as ``[example, row, last dimension]``."""
        return self.split(tensor, examples).reshape(examples, -1, tensor.shape[-1])


@dataclass(frozen=True)
class Plan:
    """What a probing pass found out: how to read each use, and which parameters to do apart."""

    layouts: dict[str, Layout]
    through: frozenset[str]
    lost: frozenset[str]


@dataclass(frozen=True, eq=False)
class Read:
    """What one recorded pass over a batch gave.

    Args:
        values: What was differentiated, detached; None where every parameter is done apart.
        uses: Every use of parameters that is not done apart.
        layouts: Which part of each use's output is whose.
        gradients: For each cotangent, one gradient for each use, None where it is zero.
        lost: Parameters that have to be done apart.
        examples: Examples in the batch.
    """

    values: Tensor | None
    uses: Sequence[Use]
    layouts: Sequence[Layout]
    gradients: Sequence[Sequence[Tensor | None]]
    lost: frozenset[str]
    examples: int


class Reader:
    """Reads layer inputs and output gradients of batches, example by example.

    A pass over the first two examples of a batch (of one, over that twice) finds out how each layer
    lays its examples out (batch first or second, merged with positions or not) by seeing where one
    example's gradient goes. Parameters for which this cannot be found out, or that enter in a way
    that is not known to be linear, are named in `Read.lost`.

    Args:
        point: The model.
        values: What is differentiated; examples must not depend on each other.
        plans: The plan that other readers of the same values share, empty until one found it.
    """

    def __init__(
        self, point: Point, values: ValueFunction, plans: list[Plan] | None = None
    ) -> None:
        self.point, self.values = point, values
        self._plans: list[Plan] = [] if plans is None else plans

    @property
    def plan(self) -> Plan | None:
        """How batches are read, once one was."""
        return self._plans[0] if self._plans else None

    def read(self, batch: Any, cotangents: Cotangents) -> Read:
        """Run a batch forward once, and backward once for each cotangent.

        Args:
            batch: The examples.
            cotangents: Called with the detached values.

        Returns:
            Inputs, gradients and whose they are.
        """
        examples = batch_size(batch)
        for attempt in range(2):
            if attempt or not self._plans:
                # Laid out otherwise than before, for example padded to another length.
                self._plans[:] = [self._probe(batch)]
            found = self._read(batch, examples, self._plans[0], cotangents)
            if found is not None:
                return found
        nothing = Plan({}, frozenset(), frozenset(self.point.parameters))
        self._plans[:] = [nothing]
        return Read(None, (), (), (), nothing.lost, examples)

    def _record(self, batch: Any, plan: Plan) -> tuple[Tensor, Recorder]:
        wanted = {n: p for n, p in self.point.parameters.items() if n not in plan.lost}
        recorder = Recorder(wanted, plan.through)
        with recorder:
            values = self.point.call(partial(self.values, batch=batch))
        return values, recorder

    def _read(self, batch: Any, examples: int, plan: Plan, cotangents: Cotangents) -> Read | None:
        """Return what was read, or None if the plan does not fit."""
        if len(plan.lost) == len(self.point.parameters):
            return Read(None, (), (), (), plan.lost, examples)
        with repeatable_attention(self.point.device), torch.enable_grad():
            values, recorder = self._record(batch, plan)
            if recorder.lost:
                return None
            vectors = list(cotangents(values.detach()))
            gradients = [
                _gradients(values, recorder.uses, v, retain_graph=i < len(vectors) - 1)
                for i, v in enumerate(vectors)
            ]
        layouts = []
        for index, use in enumerate(recorder.uses):
            of_use = [g[index] for g in gradients]
            layout = _usable(use, plan.layouts.get(use.key), of_use, examples)
            if layout is None:
                return None
            layouts.append(layout)
        return Read(values.detach(), recorder.uses, layouts, gradients, plan.lost, examples)

    # -------------------------------------------------------------- finding the way

    def _probe(self, batch: Any) -> Plan:
        """Find a plan by passes over two examples, usually one or two of them."""
        # One example alone would have every part, also what a whole batch shares.
        small = cut(batch, PROBE) if batch_size(batch) > 1 else doubled(batch)
        plan, unplaced = self._look(small, Plan({}, frozenset(), frozenset()))
        for _ in range(2):  # Look through what could not be placed: it may be made of parameters.
            if unplaced:
                through = plan.through | {use.key for use in unplaced}
                plan, unplaced = self._look(small, Plan({}, through, plan.lost))
        while unplaced:
            lost = plan.lost.union(*(use.roots for use in unplaced))
            plan, unplaced = self._look(small, Plan({}, plan.through, lost))
        return plan

    def _look(self, small: Any, plan: Plan) -> tuple[Plan, list[Use]]:
        """Return the plan with the layouts of one pass, and the uses that have none."""
        examples = batch_size(small)
        if len(plan.lost) == len(self.point.parameters):
            return plan, []
        with repeatable_attention(self.point.device):
            values, recorder = self._record(small, plan)
            last = _last_example(values)
            gradients = _gradients(values, recorder.uses, last, retain_graph=True)
        lost = recorder.lost | _unseen(values, recorder, self.point)
        if lost:  # Start again without them: their other uses would be read in vain.
            return self._look(small, Plan({}, plan.through, plan.lost | lost))
        pairs = zip(recorder.uses, gradients, strict=True)
        found = [(use, _layout(use, gradient, examples)) for use, gradient in pairs]
        layouts = {use.key: layout for use, layout in found if layout is not None}
        return Plan(layouts, plan.through, plan.lost), [u for u, layout in found if layout is None]


def _last_example(values: Tensor) -> Tensor:
    """Return a cotangent of the last example alone, one that no softmax or norm makes vanish."""
    vector = torch.zeros_like(values)
    size = values[-1].numel()
    steps = torch.arange(size, device=values.device) * 0.7548776662
    vector[-1] = (0.5 + steps.frac()).to(values.dtype).reshape(values[-1].shape)
    return vector


def _usable(
    use: Use, layout: Layout | None, gradients: Sequence[Tensor | None], examples: int
) -> Layout | None:
    """Return the layout if it holds for this pass."""
    known = [g for g in gradients if g is not None]
    if not known:
        return layout or Layout(False, (), False)
    if layout is None or _tail(use.shape, layout.second, examples) != layout.tail:
        return None
    if not use.intact or (not layout.verified and any(bool(g.any()) for g in known)):
        return None
    return layout


def _gradients(
    values: Tensor, uses: list[Use], cotangent: Tensor, **options: Any
) -> list[Tensor | None]:
    if not uses or not values.requires_grad:
        return [None] * len(uses)
    edges = [use.edge for use in uses]
    return list(torch.autograd.grad(values, edges, cotangent, allow_unused=True, **options))


def _layout(use: Use, gradient: Tensor | None, examples: int) -> Layout | None:
    """Return where the last example's gradient is alone, or None if nowhere."""
    for second in (False, True):
        tail = _tail(use.shape, second, examples)
        if tail is None:
            continue
        if gradient is None:
            return Layout(second, tail, False)
        layout = Layout(second, tail, bool(gradient.any()))
        if not bool(layout.split(gradient, examples)[:-1].any()):
            return layout
    return None


def _tail(shape: torch.Size, second: bool, examples: int) -> tuple[int, ...] | None:
    if not second:
        whole = len(shape) > 0 and shape[0] % examples == 0
        return (shape[0] // examples, *shape[1:]) if whole else None
    if len(shape) > 1 and shape[1] == examples:
        return (shape[0], *shape[2:])
    return None


def _unseen(values: Tensor, recorder: Recorder, point: Point) -> set[str]:
    """Return parameters that enter the graph more often than the recorder saw.

    Custom autograd functions and compiled modules are not torch functions.
    """
    names = {id(p): n for n, p in point.parameters.items() if n in recorder.names}
    edges: Counter[str] = Counter()
    seen: set[Any] = set()
    ahead = [values.grad_fn]
    while ahead:
        node = ahead.pop()
        for following, _ in () if node is None else node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None:
                edges[name] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)
    return {name for name, count in edges.items() if count > recorder.reads[name]}
