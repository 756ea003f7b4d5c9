"""Weights read off a running model: basis vectors in, columns out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Site, tap
from ..batch import tree_map
from ..task import Task
from .tape import tensors

__all__ = ["Answers", "Plan", "Weights", "probed"]


@dataclass(frozen=True)
class Plan:
    """Where one attention is asked.

    Args:
        site: Its number among all attentions of a pass.
        enters: Module at which vectors are put in: a norm, in place of its output, or the attention
            itself, in place of its inputs; None asks for W_O alone.
        is_norm: Which of the two.
        leaves: Module whose output is what the heads write, or None.
        output: Which of its outputs.
        query_norm: Module of a norm of queries: what it is given is read in place of q.
        key_norm: Likewise for keys.
        heads: Number of query heads.
        d_head: Width of z.
    """

    site: int
    enters: str | None
    is_norm: bool
    leaves: str | None
    output: int
    query_norm: str | None
    key_norm: str | None
    heads: int
    d_head: int


@dataclass
class Answers:
    """What came out for each row that was put in, ``[row, head, width]`` and ``[row, d_model]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    written: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Matrices and biases of one attention, and how far from affine it is (relative error)."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    W_O: Tensor | None
    b_O: Tensor | None
    bent: dict[str, float]


def probed(
    model: nn.Module,
    task: Task,
    batch: Any,
    plans: Sequence[Plan],
    width: int,
    modules: dict[str, nn.Module],
    positions: int,
) -> list[Weights]:
    """Return the weights of attentions, all asked in one forward pass.

    Args:
        model: The plain module, in evaluation mode and in single precision at least.
        task: How it is called.
        batch: What it is run on.
        plans: Where attentions are asked; all of one pass.
        width: Width of the stream.
        modules: The model's modules by name.
        positions: Positions of an example at these attentions, as it is.

    Returns:
        For each plan its weights.
    """
    rows = _rows(width, next(model.parameters()))
    z_rows = {p.site: _rows(p.heads * p.d_head, rows) for p in plans}
    count = max(len(rows), *(len(z) for z in z_rows.values()))
    asked, cells = _asked(task, batch, count, positions)
    put = _Put(rows, z_rows, cells, {p.site: p.heads for p in plans})
    with ExitStack() as stack:
        for plan in plans:
            put.watch(stack, plan, modules)
        stack.enter_context(tap(model, put.edit, visit=put.visit, keep=False, check="none"))
        task.outputs(model, asked)
    return [_read(plan, put.answers(plan), width, len(rows)) for plan in plans]


class _Put:
    """Puts rows in, and keeps what comes out.

    Where a mask is given with a single token, transformers packs the query heads that share keys
    into the axis of positions.
    """

    def __init__(
        self, rows: Tensor, z_rows: dict[int, Tensor], cells: int, heads: dict[int, int]
    ) -> None:
        self.rows, self.z_rows, self.cells, self.heads = rows, z_rows, cells, heads
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.caught: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._turns: dict[tuple[str, int], int] = defaultdict(int)

    def watch(self, stack: ExitStack, plan: Plan, modules: dict[str, nn.Module]) -> None:
        """Add the hooks of one attention."""
        entry = None if plan.enters is None else modules[plan.enters]
        if entry is None:
            pass
        elif plan.is_norm:
            stack.callback(entry.register_forward_hook(self._instead).remove)
        else:
            hook = entry.register_forward_pre_hook(self._instead_of_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        if plan.leaves is not None and (plan.leaves, plan.output) not in self.caught:
            catch = self._catching(plan.leaves, plan.output)
            stack.callback(modules[plan.leaves].register_forward_hook(catch).remove)
        for name in (plan.query_norm, plan.key_norm):
            if name is not None and (name, -1) not in self.caught:
                before = self._catching_input(name)
                stack.callback(modules[name].register_forward_pre_hook(before).remove)

    def edit(self, index: int, z: Tensor) -> Tensor:
        """Put basis vectors in the place of z."""
        rows = self.z_rows.get(index)
        if rows is None:
            return z
        batch, heads, length, width = z.shape
        if heads != self.heads[index]:  # of one token, packed
            return _filled(rows, batch).reshape(z.shape).to(z)
        filled = _filled(rows, batch * length).reshape(batch, length, heads, width)
        return filled.transpose(1, 2).to(z)

    def visit(self, index: int, site: Site) -> None:
        """Keep q, k and v."""
        if index in self.z_rows:
            q = site.q.detach()
            if q.shape[1] != self.heads[index]:
                q = q.reshape(len(q), self.heads[index], 1, -1)
            self.seen[index] = (q, site.k.detach(), site.v.detach())

    def answers(self, plan: Plan) -> Answers:
        """Return what one attention answered."""
        q, k, v = (_by_row(t) for t in self.seen[plan.site])
        if plan.query_norm is not None:
            q = self._next(plan.query_norm, -1).reshape(len(q), q.shape[1], -1)
        if plan.key_norm is not None:
            k = self._next(plan.key_norm, -1).reshape(len(k), k.shape[1], -1)
        written = None if plan.leaves is None else self._next(plan.leaves, plan.output)
        if written is not None:
            written = written.reshape(-1, written.shape[-1])
        return Answers(q, k, v, written)

    def _next(self, name: str, output: int) -> Tensor:
        turn = self._turns[name, output]
        self._turns[name, output] = turn + 1
        return self.caught[name, output][turn]

    def _like(self, value: Tensor) -> Tensor:
        return _filled(self.rows, value.numel() // value.shape[-1]).reshape(value.shape).to(value)

    def _instead(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._like(output) if isinstance(output, Tensor) else output

    def _instead_of_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        width = self.rows.shape[1]

        def exchange(value: Any) -> Any:
            wide = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
            whole = wide and value.shape[-1] == width and value.numel() == self.cells * width
            return self._like(value) if whole else value

        # One object for equal ones: nn.MultiheadAttention looks at whether they are the same.
        made: dict[int, Any] = {}
        given = [*args, *kwargs.values()]
        for value in given:
            made.setdefault(id(value), exchange(value))
        changed = {k: made[id(v)] for k, v in kwargs.items()}
        return tuple(made[id(v)] for v in args), changed

    def _catching(self, name: str, output: int) -> Callable[..., None]:
        kept = self.caught[name, output]

        def hook(module: nn.Module, args: Any, made: Any) -> None:
            kept.append(list(tensors(made))[output].detach())

        return hook

    def _catching_input(self, name: str) -> Callable[..., None]:
        kept = self.caught[name, -1]

        def hook(module: nn.Module, args: Any) -> None:
            kept.append(args[0].detach())

        return hook


def _read(plan: Plan, said: Answers, width: int, count: int) -> Weights:
    bent: dict[str, float] = {}
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("q", "k", "v"):
        answer = getattr(said, name)[:count]
        matrix, bias, bent[name] = _affine(answer)
        matrices[name] = matrix.transpose(0, 1).contiguous(), bias
    W_O = b_O = None
    if said.written is not None:
        flat = plan.heads * plan.d_head
        matrix, b_O, bent["o"] = _affine(said.written[: flat + 2])
        W_O = matrix.reshape(plan.heads, plan.d_head, -1)
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (matrices[n] for n in "qkv")
    return Weights(W_Q, W_K, W_V, b_Q, b_K, b_V, W_O, b_O, bent)


def _affine(answer: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return matrix and bias out of the answers to 0, the basis and one more vector."""
    bias = answer[0]
    matrix = answer[1:-1] - bias
    size = len(matrix)
    # The last row is no basis vector: what is affine answers it with the matrix.
    foretold = bias + torch.tensordot(_last(size, matrix), matrix, 1)
    scale = max(float(answer[-1].abs().max()), 1e-20)
    return matrix, bias, float((foretold - answer[-1]).abs().max()) / scale


def _rows(width: int, like: Tensor) -> Tensor:
    rows = torch.zeros(width + 2, width, device=like.device, dtype=like.dtype)
    rows[1:-1].fill_diagonal_(1.0)
    rows[-1] = _last(width, like)
    return rows


def _last(width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, generator=generator).to(like)


def _filled(rows: Tensor, count: int) -> Tensor:
    """Return so many rows, zeros after those that there are."""
    if len(rows) >= count:
        return rows[:count]
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _by_row(values: Tensor) -> Tensor:
    batch, heads, length, width = values.shape
    return values.transpose(1, 2).reshape(batch * length, heads, width)


def _asked(task: Task, batch: Any, count: int, positions: int) -> tuple[Any, int]:
    """Return a batch with room for so many rows, and how many it has.

    Sequences of token ids are cut to one token, where rotary embeddings are the identity; other
    inputs are repeated until their positions are enough.

    Returns:
        Batch and number of rows.
    """
    inputs = task.inputs(batch)
    size = len(inputs)
    if inputs.ndim == 2 and not inputs.is_floating_point():
        length = inputs.shape[1]

        def first(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or len(value) != size:
                return value
            one = _first_token(value[:1], length)
            return one.expand(count, *one.shape[1:]).clone()

        return tree_map(first, batch), count

    examples = -(-count // positions)

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != size:
            return value
        return value[:1].expand(examples, *value.shape[1:]).clone()

    return tree_map(repeated, batch), examples * positions


def _first_token(one: Tensor, length: int) -> Tensor:
    """Return what belongs to the first token: of ids, of a mask of padding or of blocks."""
    if one.ndim == 2:
        return one[:, :1] if one.shape[1] == length else one
    return one[..., :1, :1] if one.ndim > 2 and one.shape[-2:] == (length, length) else one
