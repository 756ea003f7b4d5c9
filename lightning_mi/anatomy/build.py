"""Finding an anatomy by asking the model: `anatomy_of`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import cloned
from ..errors import ArgumentError, LightningMIError, ModelError
from ..isolation import untouched
from ..task import Task
from .anatomy import Anatomy
from .embeddings import Beginning
from .example import made_up, shortened, unpadded, widened, widened_batch
from .graph import after, readers_of, writers_of
from .layers import Layer, Pass, layers_of, recorded_pass
from .parts import Norm, ReaderInput
from .reading import Unembedding, unembedding
from .weights import weights_of

__all__ = ["anatomy_of"]


def anatomy_of(model: nn.Module, example: Any, task: Task | None) -> Anatomy:
    """Return the anatomy of a model.

    Args:
        model: The user's model.
        example: A batch it can be run on, or None.
        task: How a batch becomes outputs, or None.

    Returns:
        The anatomy.

    Raises:
        NoAttentionError: If there is no self-attention that can be observed.
        ArgumentError: If an example is needed and none was given.
        ModelError: If no attention reads from a residual stream and writes to it.
    """
    chosen = task or Task()
    if not isinstance(model, nn.Module):
        raise ArgumentError.of(
            "model", expected="a torch module", got=f"a {type(model).__name__}", do="Pass a model."
        )
    with untouched(model) as plain, torch.no_grad():
        batch = made_up(plain) if example is None else _usable(example, chosen)
        batch = unpadded(shortened(batch, chosen))
        wide = widened(plain)
        device = next(wide.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return _found(_recorded(wide, chosen, widened_batch(batch)))


def _usable(example: Any, task: Task) -> Any:
    """Return a copy of the user's batch; one sequence of ids alone becomes a batch of one."""
    single = isinstance(example, Tensor) and example.ndim == 1 and not example.is_floating_point()
    batch = cloned(example[None] if single else example)
    inputs = task.inputs(batch)
    if not inputs.numel() or not inputs.ndim:
        raise ArgumentError.of(
            "example",
            expected="a batch with at least one example",
            got=f"inputs of shape {tuple(inputs.shape)}",
            do="Pass one batch: Anatomy.of(model, batch).",
        )
    return batch


def _recorded(model: nn.Module, task: Task, batch: Any) -> Pass:
    try:
        return recorded_pass(model, task, batch)
    except LightningMIError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ArgumentError.of(
            "example",
            expected=f"a batch that {type(model).__name__} can be run on",
            got=f"one on which it fails: {type(error).__name__}: {str(error)[:200]}",
            do="Pass a batch as the model is called with, or a Task that says how it is called.",
        ) from error


def _found(run: Pass) -> Anatomy:
    layers = layers_of(run)
    width = _width(run, layers)
    terms = [] if run.main is None else run.main.terms()
    beginning = Beginning(run, terms)
    readers = readers_of(run, layers, terms, beginning)
    end = None if run.main is None else unembedding(run.flow, run.main, run.outputs, run.notes)
    if end is not None and end.reading.module is not None:
        at = end.reading
        count = after(run, terms, at.state)
        module = str(at.module)
        readers.append(ReaderInput("logits", module, len(layers), "logits", at.norm, count))
    writers = writers_of(run, layers, terms, beginning, readers)
    weights = weights_of(run, layers, width)
    W_E, W_pos = beginning.tables()
    if W_E is None and not run.task.inputs(run.batch).is_floating_point():
        reason = "the stream does not start with a row of a table for each token, or a sum with one"
        run.note("W_E", None, "unknown", reason)
    sites, found = [layer.seen for layer in layers], [w for w, _ in weights]
    return Anatomy(
        n_layers=len(layers),
        n_heads=tuple(s.z.shape[1] for s in sites),
        n_kv_heads=tuple(s.k.shape[1] for s in sites),
        d_head=tuple(s.q.shape[-1] for s in sites),
        d_model=width,
        modules=tuple(s.module for s in sites),
        W_Q=tuple(w.W_Q for w in found),
        W_K=tuple(w.W_K for w in found),
        W_V=tuple(w.W_V for w in found),
        W_O=tuple(w.W_O for w in found if w.W_O is not None),
        b_Q=tuple(w.b_Q for w in found),
        b_K=tuple(w.b_K for w in found),
        b_V=tuple(w.b_V for w in found),
        b_O=tuple(w.b_O for w in found if w.b_O is not None),
        scale=tuple(scale for _, scale in weights),
        W_E=W_E,
        W_pos=W_pos,
        W_U=None if end is None else end.weight,
        b_U=None if end is None else end.bias,
        attention_norms=tuple(None if o.read is None else o.read.norm for o in layers),
        mlp_norms=_mlp_norms(readers, layers),
        final_norm=_final_norm(end),
        query_norms=tuple(layer.query_norm for layer in layers),
        key_norms=tuple(layer.key_norm for layer in layers),
        parallel=_parallel(readers, layers),
        logit_softcap=None if end is None else end.softcap,
        softcap=tuple(s.softcap for s in sites),
        writers=tuple(writers),
        readers=tuple(readers),
        notes=tuple(run.notes),
    )


def _width(run: Pass, layers: Sequence[Layer]) -> int:
    for layer in layers:
        if layer.read is not None:
            return int(run.flow.tensor(layer.read.state).shape[-1])
    for stream in run.streams:
        return int(run.flow.tensor(stream.base).shape[-1])
    raise ModelError(
        f"model: expected the attentions of {type(run.model).__name__} to add to a residual "
        "stream and to read from it, got none that does. "
        f"{' '.join(str(n) for n in run.notes)}"
    )


def _final_norm(end: Unembedding | None) -> Norm | None:
    return None if end is None else end.reading.norm


def _mlp_norms(readers: Sequence[ReaderInput], layers: Sequence[Layer]) -> tuple[Norm | None, ...]:
    mlps = {r.layer: r.norm for r in readers if r.kind == "mlp"}
    return tuple(mlps.get(layer.index) for layer in layers)


def _parallel(readers: Sequence[ReaderInput], layers: Sequence[Layer]) -> tuple[bool, ...]:
    read = {(r.kind, r.layer): r.after for r in readers}
    return tuple(
        ("mlp", o.index) in read and read["mlp", o.index] == read.get(("attention", o.index))
        for o in layers
    )
