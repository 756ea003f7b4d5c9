"""Attention patterns on demand, and what sums them up: entropy, sink mass, top attended keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import Site, tap
from ...errors import ArgumentError
from ...isolation import untouched
from ...nodes import Head, parse
from ...task import Task
from ..heads.entries import BLOCK, queries_of
from ..heads.layout import layout_of, require_harmless_padding
from ..weights.factors import check_count

__all__ = [
    "Attending",
    "attention_entropy",
    "attention_patterns",
    "attention_summary",
    "batched",
    "heads_named",
    "summary_of",
    "top_attended",
]


def attention_entropy(pattern: Tensor) -> Tensor:
    """Return the entropy of each row of an attention pattern, −Σ A ln A.

    Args:
        pattern: Rows of attention ``[…, query, key]``.

    Returns:
        Shape ``[…, query]``, nats; 0: all attention on one key, ln n: evenly over n keys.
        Differentiable, also where entries are masked.

    Example:
        >>> attention_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    some = torch.where(pattern > 0, pattern, 1.0)
    return (-some * some.log()).sum(-1).clamp(min=0)


def top_attended(pattern: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Return the keys that each query attends to most.

    Args:
        pattern: Rows of attention ``[…, query, key]``.
        count: How many keys.

    Returns:
        Attention and key positions, each ``[…, query, count]``, most attended first.

    Raises:
        ArgumentError: If count is not positive.

    Example:
        >>> top_attended(torch.tensor([[0.2, 0.7, 0.1]]), 2)[1]
        tensor([[1, 0]])
    """
    check_count(count, "count")
    best = pattern.topk(min(count, pattern.shape[-1]), -1)
    return best.values, best.indices


def attention_patterns(
    model: nn.Module,
    batch: Any,
    heads: Sequence[Head | str] | Head | str | None = None,
    *,
    task: Task | None = None,
) -> dict[Head, Tensor]:
    """Return whole attention patterns of chosen heads.

    Differentiable where grad is enabled. Every pattern takes position × position numbers for each
    example; name the heads that you want.

    Args:
        model: Any model with attention; its mode and state are left as they are.
        batch: What it is run on: token ids (one sequence alone as well), or any batch.
        heads: Heads such as ``Head(1, 3)`` or ``"L1H3"``, or one; None takes all of them.
        task: How the model is called; None calls it with the batch.

    Returns:
        By head ``[example, query, key]``, in single precision at least; rows add up to 1 (less
        where the model keeps a sink logit of its own; 0 where a query may look nowhere).

    Raises:
        ArgumentError: If a head does not exist.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> found = attention_patterns(layer, torch.ones(1, 5, 8), ["L0H1"])
        >>> {str(head): tuple(pattern.shape) for head, pattern in found.items()}
        {'L0H1': (1, 5, 5)}
    """
    wanted = None if heads is None else heads_named(heads)
    found: dict[Head, Tensor] = {}
    counts: list[int] = []

    def visit(index: int, site: Site) -> None:
        counts.append(site.heads)
        own = [h for h in wanted or () if h.layer == index and h.head < site.heads]
        if wanted is None:
            own = [Head(index, h) for h in range(site.heads)]
        if own:
            pattern = site.pattern()
            found.update({h: pattern[:, h.head] for h in own})

    wants_grad = torch.is_grad_enabled()
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        given = batched(batch)
        with tap(plain, visit=visit, keep=False):
            (task or Task()).outputs(plain, given)
    missing = [str(h) for h in wanted or () if h not in found]
    if missing:
        raise ArgumentError.of(
            "heads",
            expected=f"heads of {len(counts)} layers with {counts} heads",
            got=missing,
            do="Layers and heads count from 0.",
        )
    return found if wanted is None else {h: found[h] for h in wanted}


@dataclass(frozen=True, eq=False)
class Attending:
    """What sums up the attention of every head, ``[sequence, layer, head]``.

    Args:
        entropy: Mean entropy of a query's row, nats.
        evenness: Mean of the entropy over ln n, n the number of keys within reach: 0: one key, 1:
            all alike.
        sink_mass: Mean attention to the first token of the document.
        modules: Name of the module of each layer.
    """

    entropy: Tensor
    evenness: Tensor
    sink_mass: Tensor
    modules: tuple[str, ...]


def attention_summary(
    model: nn.Module, batch: Any, *, task: Task | None = None
) -> dict[str, Tensor]:
    """Return entropy, evenness and sink mass of every head, without keeping any pattern.

    Means over the queries of a sequence from its (document's) third token on, then over sequences;
    padding and rows that may look nowhere are left out. Differentiable where grad is enabled.

    Args:
        model: Any model with self-attention; its mode and state are left as they are.
        batch: Token ids (one sequence alone as well), or any batch; a mapping may hold
            ``attention_mask`` and ``position_ids``.
        task: How the model is called; None calls it with the batch.

    Returns:
        ``entropy`` (nats), ``evenness`` and ``sink_mass``, each ``[layer, head]``; NaN where a
        layer has fewer heads or nothing is to be seen.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> found = attention_summary(layer, torch.ones(1, 5, 8))
        >>> found["evenness"].round(decimals=3)
        tensor([[1., 1.]], grad_fn=<RoundBackward1>)
    """
    wants_grad = torch.is_grad_enabled()
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        found = summary_of(plain, task or Task(), batched(batch))
    names = ("entropy", "evenness", "sink_mass")
    return {name: getattr(found, name).nanmean(0) for name in names}


def summary_of(model: nn.Module, task: Task, batch: Any) -> Attending:
    """Return what `attention_summary` means over sequences.

    Args:
        model: The user's model, in evaluation mode.
        task: How it is called.
        batch: What it is run on.

    Returns:
        The summary.
    """
    rows: list[Tensor] = []
    modules: list[str] = []
    inputs = task.inputs(batch)
    if inputs.ndim == 2 and not inputs.is_floating_point():
        require_harmless_padding(model, task, inputs, layout_of(batch, inputs))

    def visit(index: int, site: Site) -> None:
        if not site.cross:
            modules.append(site.module)
            rows.append(_summary(site, _queries(site, task, batch)))

    with tap(model, visit=visit, keep=False):
        task.outputs(model, batch)
    widest = max((r.shape[2] for r in rows), default=0)
    whole = [nn.functional.pad(r, (0, widest - r.shape[2]), value=torch.nan) for r in rows]
    entropy, evenness, sink_mass = torch.stack(whole, 2)
    return Attending(entropy, evenness, sink_mass, tuple(modules))


def _queries(site: Site, task: Task, batch: Any) -> Tensor:
    """Return example, query and first position of each query, of the ids or of whatever is there.

    Where a model adds positions of its own (a class token), padding cannot be told.
    """
    inputs = task.inputs(batch)
    size = (site.q.shape[0], site.q.shape[2])
    ids = torch.zeros(size, dtype=torch.long, device=site.q.device)
    if tuple(inputs.shape[:2]) != size or inputs.is_floating_point():
        return queries_of(ids)
    return queries_of(ids, layout_of(batch, inputs).documents(inputs))


def _summary(site: Site, queries: Tensor) -> Tensor:
    """Return entropy, evenness and sink mass ``[3, sequence, head]``."""
    count, length = site.q.shape[0], site.q.shape[2]
    weight = site.q.new_zeros(count, length, dtype=torch.float32)
    weight[queries[:, 0], queries[:, 1]] = 1.0
    first = torch.zeros_like(weight, dtype=torch.long)
    first[queries[:, 0], queries[:, 1]] = queries[:, 2]
    sums = weight.new_zeros(4, count, site.heads)
    for examples, rows in _blocks(site):
        pattern = site.pattern(examples, rows)
        keys = _within_reach(site, examples, rows, pattern)
        w = weight[examples, None, rows].expand(pattern.shape[:3]) * (keys > 0)
        entropy = attention_entropy(pattern)
        sink = pattern.gather(-1, first[examples, None, rows, None].expand(*pattern.shape[:3], 1))
        # Where only one key is within reach the entropy is 0 as well as ln 1.
        even = entropy / keys.clamp(min=2).log()
        parts = torch.stack([entropy, even, sink[..., 0], torch.ones_like(entropy)])
        # Not in place: a gradient is to pass.
        block = torch.where(w > 0, parts, 0.0).sum(-1)
        sums = sums + nn.functional.pad(block, (0, 0, examples.start, count - examples.stop))
    return torch.where(sums[3] > 0, sums[:3] / sums[3].clamp(min=1), torch.nan)


def _within_reach(site: Site, examples: slice, rows: slice, pattern: Tensor) -> Tensor:
    """Return how many keys each query may look at."""
    mask = site.reachable(examples, rows)
    if mask is None:
        return pattern.new_full(pattern.shape[:3], float(pattern.shape[3]))
    return mask.sum(-1).to(pattern.dtype).expand(pattern.shape[:3])


def _blocks(site: Site) -> Iterator[tuple[slice, slice]]:
    width, length = site.heads * site.k.shape[2], site.q.shape[2]
    rows = max(1, min(length, BLOCK // width))
    many = max(1, BLOCK // (width * length))
    for first in range(0, site.q.shape[0], many):
        for top in range(0, length, rows):
            yield (
                slice(first, min(first + many, site.q.shape[0])),
                slice(top, min(top + rows, length)),
            )


def heads_named(heads: Sequence[Head | str] | Head | str) -> list[Head]:
    """Return heads of their names.

    Args:
        heads: Heads, or names such as ``"L1H3"``; one alone as well.

    Returns:
        The heads, in order.

    Raises:
        ArgumentError: If a name is no head's.
    """
    given = [heads] if isinstance(heads, str | Head) else heads
    found = [parse(h) if isinstance(h, str) else h for h in given]
    wrong = [str(h) for h in found if not isinstance(h, Head)]
    if wrong:
        raise ArgumentError.of(
            "heads", expected='names such as "L1H3"', got=wrong, do="Name heads."
        )
    return [h for h in found if isinstance(h, Head)]


def batched(batch: Any) -> Any:
    """Return one sequence of token ids as a batch of one, anything else as it is.

    Args:
        batch: Any batch.

    Returns:
        The batch.
    """
    single = isinstance(batch, Tensor) and batch.ndim == 1 and not batch.is_floating_point()
    return batch[None] if single else batch
