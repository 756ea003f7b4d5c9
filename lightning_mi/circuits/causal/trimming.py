"""Passes that leave out what is known already: MLPs at positions where nothing changes.

Prompts are often alike up to the place where one is corrupted. In a causal model nothing before
that place differs on any path between the two runs, so MLPs, which see one position at a time,
need not run there; nor need the last one run where no metric reads what it writes. What is left
out is exactly what would be computed again: scores are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import main_input
from ...behavior import Behavior
from ...target import Logit, positions
from .streams import Inside, Seen, Wiring
from .unchanged import by_position, whole_mlp

__all__ = ["Trim", "alike", "compared", "first_change", "trim_of", "trimmed"]

NODES = 32
"""Nodes whose differences are looked at together."""


@dataclass(frozen=True, eq=False)
class Trim:
    """What need not be computed in passes on a path that starts at a run.

    Args:
        start: First position at which anything changes.
        outputs: Of each MLP that is trimmed, by index of the anatomy's writers, the module that
            is its whole, and what its last part returned in that run ``[example, position, …]``.
        last: Index of the writer that logits alone read, and where they read ``[example]``.
    """

    start: int
    outputs: dict[int, tuple[nn.Module, Tensor]]
    last: tuple[int, Tensor] | None = None


def compared(
    wiring: Wiring, behavior: Behavior, base: Seen, ends: tuple[Any, Any]
) -> tuple[Seen, Tensor, Trim]:
    """Run the other prompts, and compare.

    Args:
        wiring: The model.
        behavior: What is explained.
        base: The run on the first prompts.
        ends: First and other prompts.

    Returns:
        The other run, what each node writes in it less what it writes in ``base``, and what a path
        between both can leave out.
    """
    sources = wiring.graph.sources

    def run(inside: Inside = nullcontext) -> tuple[Seen, Tensor, int]:
        other = wiring.see(ends[1], reading=(behavior, 1), inside=inside)
        other.sites.clear()  # Queries, keys and values of all layers: they are not compared.
        delta = wiring.difference(other, base)
        return other, delta, first_change(delta, sources)

    trim = trim_of(wiring, base, alike(*ends), behavior)
    if trim.start:
        other, delta, start = run(partial(trimmed, wiring, trim, 1))
        if start >= trim.start:
            return other, delta, trim
        del other, delta
    other, delta, start = run()
    return other, delta, replace(trim, start=start)


def alike(one: Any, other: Any) -> int:
    """Return how many positions two batches of token ids begin with that are the same in both.

    Args:
        one: A batch.
        other: Another one.

    Returns:
        Their number; 0 where the inputs are no ids.
    """
    a, b = main_input(one), main_input(other)
    if a.ndim != 2 or a.is_floating_point():
        return 0
    moved = (a != b).any(0).nonzero()
    return int(moved[0]) if len(moved) else 0


def first_change(delta: Tensor, sources: list[int]) -> int:
    """Return the first position at which anything changes between two runs.

    Args:
        delta: What each node writes in one run less what it writes in the other one
            ``[writer, example, position, d_model]``.
        sources: Which of them are embeddings.

    Returns:
        The position; 0 where later nodes change before the embeddings do, as without a causal mask.
    """
    length = delta.shape[2]
    moved = (delta[sources] != 0).any(3).any(1).any(0).nonzero()
    start = int(moved[0]) if len(moved) else length - 1
    if not start:
        return 0
    # A few nodes at a time: the sizes of all would be as many numbers as there are differences.
    parts = torch.split(delta, NODES)
    whole = max(float(p.abs().max()) for p in parts)
    before = max(float(p[:, :, :start].abs().max()) for p in parts)
    return 0 if before > 1e-5 * whole else start


def trim_of(wiring: Wiring, base: Seen, start: int, behavior: Behavior) -> Trim:
    """Return what need not be computed again.

    Args:
        wiring: The model.
        base: The run that the path starts at.
        start: First position at which anything changes.
        behavior: What the outputs are read for.

    Returns:
        What can be left out. A module is trimmed only if it takes and returns one tensor and does
        the same at one position whatever is at others, tried once for each class of module.
    """
    fits: dict[type, bool] = {}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    for index, writer in enumerate(wiring.anatomy.writers):
        made = base.returned[index]
        if writer.kind != "mlp" or writer.layer < 0 or made is None or made.ndim != 3:
            continue
        module = wiring.modules[whole_mlp(wiring.anatomy, index)]
        if type(module) not in fits:
            fits[type(module)] = by_position(module, made)
        if fits[type(module)]:
            outputs[index] = module, made
    return Trim(start, outputs, _last(wiring, base, behavior, outputs))


def _last(
    wiring: Wiring,
    base: Seen,
    behavior: Behavior,
    outputs: Mapping[int, tuple[nn.Module, Tensor]],
) -> tuple[int, Tensor] | None:
    """Return the MLP that logits alone read, at one position, and where."""
    readers = wiring.anatomy.readers
    read = max((r.after for r in readers if r.kind != "logits"), default=0)
    own = [i for i in outputs if i >= read]
    question = behavior.question
    if len(own) != 1 or wiring.head() is None or not isinstance(question, Logit):
        return None
    hidden = base.entering[-1]
    if hidden.ndim != 3 or len(hidden) != len(behavior):
        return None
    return own[0], positions(hidden, behavior.clean, question).to(hidden.device)


@contextmanager
def trimmed(wiring: Wiring, trim: Trim, copies: int) -> Iterator[None]:
    """Run MLPs only where something changes; enter it before the passes' own hooks are set.

    Args:
        wiring: The model.
        trim: What can be left out.
        copies: How many copies of the prompts a pass runs.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for index, (module, kept) in trim.outputs.items():
            end = wiring.modules[wiring.anatomy.writers[index].module]
            at = trim.last[1] if trim.last is not None and trim.last[0] == index else None
            before, after = _hooks(kept, trim.start, copies, at)
            # Inputs are cut after all others have seen them, and outputs made whole before.
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(end.register_forward_hook(after, prepend=True).remove)
        yield


def _hooks(
    kept: Tensor, start: int, copies: int, at: Tensor | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return hooks that cut what enters a module and make whole what leaves it."""
    rows = copies * len(kept)
    where = None if at is None else (torch.arange(rows, device=at.device), at.repeat(copies))

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        x = args[0]
        return ((x[where][:, None] if where is not None else x[:, start:].contiguous()), *args[1:])

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] == kept.shape[1]:  # Nothing was cut.
            return output
        if where is not None:
            whole = kept.repeat(copies, 1, 1)
            return whole.index_put(where, output[:, 0])
        return torch.cat([kept[:, :start].repeat(copies, 1, 1), output], 1)

    return before, after
