"""One forward pass, taken apart: what each writer wrote, what entered each layer, and the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, Norm, ReaderInput
from ...anatomy.shared import check_anatomy
from ...anatomy.tape import named, tensors
from ...attention import Site, tap
from ...batch import tree_map
from ...errors import ModelError
from ...task import Task
from ..heads.layout import layout_of, require_harmless_padding

__all__ = ["Passed", "final_logits", "passed", "wide"]


@dataclass(frozen=True, eq=False)
class Passed:
    """What was seen of a forward pass, in the model's own graph.

    Args:
        anatomy: What the model is made of.
        outputs: The model's outputs ``[example, position, token]``.
        written: For each writer of the anatomy its module's output ``[example, position, d]``, or
            None where no module returns it.
        z: For each layer ``[example, head, position, d_head]``.
        entering: For each reader of the anatomy the stream ``[example, position, d]``.
        norms: What entered each norm that the whole stream passes.
        turned: Whether the model itself has positions before examples.
    """

    anatomy: Anatomy
    outputs: Tensor
    written: tuple[Tensor | None, ...]
    z: tuple[Tensor, ...]
    entering: tuple[Tensor, ...]
    norms: dict[str, Tensor]
    turned: bool = False

    @property
    def final(self) -> Tensor:
        """The stream that the logits are read from, before the final norm."""
        return self.entering[-1]

    def scale_in(self, norm: Norm) -> Tensor:
        """Return what a norm that the whole stream passes divided it by, ``[…, 1]``."""
        return norm.scale(self.norms[norm.module])


def passed(model: nn.Module, anatomy: Anatomy, task: Task, batch: Any) -> Passed:
    """Run a model and keep what its writers wrote and its readers read.

    Args:
        model: The user's model, in evaluation mode.
        anatomy: Its anatomy.
        task: How it is called.
        batch: What it is run on.

    Returns:
        What was seen.

    Raises:
        ModelError: If the anatomy does not say where logits are read, or they are no logits of
            positions.
    """
    check_anatomy(anatomy)
    logits = _logits_reader(model, anatomy)
    inputs = task.inputs(batch)
    require_harmless_padding(model, task, inputs, layout_of(batch, inputs))
    readers = [r for r in anatomy.readers if r is not logits] + [logits]
    through = {n.module for w in anatomy.writers for n in w.through}
    outs = _Calls(w.module for w in anatomy.writers if w.module)
    ins = _Calls([*(r.module for r in readers), *through])
    z: list[Tensor] = []

    def visit(index: int, site: Site) -> None:
        if not site.cross:
            z.append(site.z)

    modules = named(model)
    with ExitStack() as stack:
        for name in outs.found:
            stack.callback(modules[name].register_forward_hook(outs.leaving(name)).remove)
        for name in ins.found:
            hook = modules[name].register_forward_pre_hook(ins.entering(name), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(tap(model, visit=visit, keep=False))
        outputs = task.outputs(model, batch)
    if outputs.ndim != 3:
        raise ModelError(
            f"model: expected {type(model).__name__} to return logits [example, position, token], "
            f"got outputs {tuple(outputs.shape)}. What parts write into the answer is defined at "
            "positions; pass a Task whose outputs are the logits of all positions."
        )
    shape = outputs.shape[:2]
    written = [
        _shaped(outs.next(w.module, w.output), shape) if w.module else None for w in anatomy.writers
    ]
    entering = [_first(ins.next(r.module), r.module, shape) for r in readers]
    norms = {name: _first(ins.next(name), name, shape) for name in through}
    turned = _is_turned(entering[-1], anatomy, outputs)
    if turned and shape[0] == shape[1]:
        return _of_all_but_one(passed(model, anatomy, task, _with_one_more(batch, shape[0])))
    if turned:
        written = [None if w is None else _turned(w, shape) for w in written]
        entering = [_turned(e, shape) for e in entering]
        norms = {name: _turned(n, shape) for name, n in norms.items()}
    return Passed(anatomy, outputs, tuple(written), tuple(z), tuple(entering), norms, turned)


def final_logits(stream: Tensor, anatomy: Anatomy) -> Tensor:
    """Return the logits that a stream gives: through the final norm, with its own statistics.

    Args:
        stream: Shape ``[…, d_model]``.
        anatomy: The model's anatomy; its unembedding is known.

    Returns:
        Shape ``[…, token]``, soft-capped where the model's logits are, in single precision at
        least.
    """
    x = wide(stream)
    x = x if anatomy.final_norm is None else anatomy.final_norm(x)
    logits = x @ unembedding(anatomy).to(x)
    logits = logits if anatomy.b_U is None else logits + anatomy.b_U.to(logits)
    cap = anatomy.logit_softcap
    return logits if cap is None else cap * (logits / cap).tanh()


def unembedding(anatomy: Anatomy) -> Tensor:
    """Return W_U, or say that it is unknown.

    Args:
        anatomy: The model's anatomy.

    Returns:
        Shape ``[d_model, token]``.

    Raises:
        ModelError: If it is unknown.
    """
    if anatomy.W_U is None:
        why = [str(n) for n in anatomy.notes if n.part in ("W_U", "readers", "final_norm")]
        raise ModelError(
            "model: expected logits that are read linearly from the final stream, got an anatomy "
            f"without W_U. {' '.join(why) or 'The reader of the logits was not found.'} State it: "
            "dataclasses.replace(Anatomy.of(model, batch), W_U=…, readers=…)."
        )
    return anatomy.W_U


def wide(values: Tensor) -> Tensor:
    """Return half-precision values in single precision, others as they are.

    Args:
        values: Any tensor.

    Returns:
        The tensor.
    """
    return values.float() if values.element_size() < 4 else values


class _Calls:
    """Tensors that modules were given or returned, call by call."""

    def __init__(self, names: Iterable[str]) -> None:
        self.found: dict[str, list[list[Tensor]]] = {name: [] for name in names}
        self._taken: dict[tuple[str, int], int] = {}

    def leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A clone, because a model may add to it in place (Falcon does).
            self.found[name].append([t.clone() for t in tensors(output)])

        return hook

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            floats = [t for t in tensors(given) if t.is_floating_point()]
            self.found[name].append(floats)

        return hook

    def next(self, name: str, output: int = 0) -> Tensor | None:
        """Return what the next call of a module gave: one that is called twice writes twice."""
        turn = self._taken.get((name, output), 0)
        self._taken[name, output] = turn + 1
        calls = self.found[name]
        if not calls:
            return None
        entries = calls[min(turn, len(calls) - 1)]
        return entries[output] if output < len(entries) else None


def _is_turned(final: Tensor, anatomy: Anatomy, outputs: Tensor) -> bool:
    """Say whether a stream has positions first, as torch's own layers do by default."""
    count, length = outputs.shape[:2]
    if final.shape[:2] != (length, count):
        return False
    if count != length:
        return True
    # A square batch: only the logits tell.
    with torch.no_grad():
        own, read = wide(outputs.detach()), final_logits(final.detach(), anatomy)
        return bool((read.transpose(0, 1) - own).abs().max() < (read - own).abs().max())


def _with_one_more(batch: Any, count: int) -> Any:
    """Return the batch with its first example again at the end.

    In a square batch the axes of a tensor cannot be told apart, and embeddings may well be made
    before a model puts positions first.
    """

    def grown(value: Any) -> Any:
        many = isinstance(value, Tensor) and value.ndim and len(value) == count
        return torch.cat([value, value[:1]]) if many else value

    return tree_map(grown, batch)


def _of_all_but_one(seen: Passed) -> Passed:
    count = len(seen.outputs)

    def less(value: Tensor) -> Tensor:
        return value[:-1] if value.ndim > 2 and len(value) == count else value

    return dataclasses.replace(
        seen,
        outputs=less(seen.outputs),
        written=tuple(None if w is None else less(w) for w in seen.written),
        z=tuple(less(z) for z in seen.z),
        entering=tuple(less(e) for e in seen.entering),
        norms={name: less(n) for name, n in seen.norms.items()},
    )


def _turned(value: Tensor, shape: torch.Size) -> Tensor:
    """Return ``[example, position, d]`` of a value with positions first."""
    return value.transpose(0, 1) if value.shape[:2] == shape[::-1] else value


def _shaped(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return ``[example, position, d]`` where a module holds all positions in one axis."""
    if value is None or value.ndim == 3:
        return value
    return value.reshape(*shape, -1) if value.ndim == 2 and len(value) == shape.numel() else value


def _first(value: Tensor | None, name: str, shape: torch.Size) -> Tensor:
    value = _shaped(value, shape)
    if value is None:
        raise ModelError(
            f"model: expected {name!r} to be run with the stream as its input, got no call of it. "
            "The anatomy belongs to another model, or this batch takes another path through it."
        )
    return value


def _logits_reader(model: nn.Module, anatomy: Anatomy) -> ReaderInput:
    unembedding(anatomy)
    found = [r for r in anatomy.readers if r.kind == "logits"]
    if not found:
        raise ModelError(
            f"model: expected the anatomy of {type(model).__name__} to say which module reads the "
            f"logits from the stream, got readers {[r.label for r in anatomy.readers]}. "
            f"{' '.join(str(n) for n in anatomy.notes)}"
        )
    return found[-1]
