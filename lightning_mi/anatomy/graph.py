"""The residual graph: who writes to the stream and who reads from it, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..nodes import MLP, Embedding, Node
from .embeddings import Beginning
from .layers import Layer, Pass
from .parts import ReaderInput, Writer, WriterKind
from .reading import Reading, reading
from .stream import ResidualStream, Term

__all__ = ["after", "readers_of", "writers_of"]


def after(run: Pass, terms: Sequence[Term], state: int) -> int:
    """Return how many terms a state of the stream consists of.

    Args:
        run: The recorded pass.
        terms: All terms of the stream, in order.
        state: Root of the state.

    Returns:
        Their number.
    """
    place = run.flow.place(state)
    return sum(run.flow.place(t.value) <= place for t in terms)


def readers_of(
    run: Pass, layers: Sequence[Layer], terms: Sequence[Term], beginning: Beginning
) -> list[ReaderInput]:
    """Return the attentions and MLPs that read the main stream, and note those that cannot be told.

    Args:
        run: The recorded pass.
        layers: Self-attentions.
        terms: All terms of the main stream, in order.
        beginning: Those before any attention.

    Returns:
        Readers in order.
    """
    main = run.main
    if main is None:
        return []
    readers: list[ReaderInput] = []
    current = 0
    for term in terms:
        layer = _layer_of(layers, term)
        if layer is not None:
            current = layer.index
            _add(run, readers, terms, layer.read, current, "attention")
        elif not beginning.holds(term) and not _is_cross(run, main, term):
            read = reading(run.flow, main, term.value, run.flow.place(term.value))
            _add(run, readers, terms, read, current, "mlp")
    return readers


def writers_of(
    run: Pass,
    layers: Sequence[Layer],
    terms: Sequence[Term],
    beginning: Beginning,
    readers: Sequence[ReaderInput],
) -> list[Writer]:
    """Return what writes to the main stream.

    Args:
        run: The recorded pass.
        layers: Self-attentions.
        terms: All terms of the main stream, in order.
        beginning: Those before any attention.
        readers: What reads from it.

    Returns:
        Writers in order.
    """
    main = run.main
    writers: list[Writer] = []
    current, seen = -1, set()
    for term in terms:
        module = run.flow.module_returning(term.value)
        layer = _layer_of(layers, term)
        kind: WriterKind = "other"
        label, node = str(module), None
        if layer is not None:
            current, kind, label = layer.index, "heads", f"attn{layer.index}"
        elif beginning.holds(term):
            kind = beginning.kind(term)
            label = "embed" if kind == "embed" else "pos"
            node = _embedding(kind)
        elif current not in seen and main is not None and not _is_cross(run, main, term):
            kind, label, node = "mlp", f"MLP{current}", MLP(max(current, 0))
            seen.add(current)
        where = -1 if beginning.holds(term) else current
        writers.append(
            Writer(
                label=label,
                module=module or "",
                layer=where,
                kind=kind,
                norm=term.norm,
                factor=term.factor,
                through=term.through,
                node=node,
                output=0 if module is None else run.output(term, module),
                reads=_reads(readers, kind, where),
            )
        )
    return writers


def _embedding(kind: WriterKind) -> Node | None:
    return Embedding() if kind == "embed" else None


def _add(
    run: Pass,
    readers: list[ReaderInput],
    terms: Sequence[Term],
    read: Reading | None,
    layer: int,
    kind: Literal["attention", "mlp"],
) -> None:
    label = f"attn{layer}" if kind == "attention" else f"MLP{layer}"
    if read is None or read.module is None:
        run.note("readers", layer, "unknown", f"{label} reads no one state of the stream")
        return
    node = MLP(layer) if kind == "mlp" else None
    count = after(run, terms, read.state)
    readers.append(ReaderInput(label, read.module, layer, kind, read.norm, count, node))


def _layer_of(layers: Sequence[Layer], term: Term) -> Layer | None:
    own = (o for o in layers if o.term is not None and o.term.value == term.value)
    return next(own, None)


def _is_cross(run: Pass, main: ResidualStream, term: Term) -> bool:
    """Say whether a term was written by an attention to another sequence."""
    flow = run.flow
    fresh = set(flow.before(term.value, main.states - {term.value}))
    cross = [flow.tape.calls[place] for site, place in flow.tape.sites if site.cross]
    return any(flow.root(v) in fresh for call in cross for v in call.outputs)


def _reads(readers: Sequence[ReaderInput], kind: str, layer: int) -> int:
    wanted = {"heads": "attention", "mlp": "mlp"}.get(kind)
    found = [i for i, r in enumerate(readers) if r.kind == wanted and r.layer == layer]
    return found[0] if found else -1
