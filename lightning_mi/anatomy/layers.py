"""The self-attentions of a recorded pass: what each reads, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..attention import Site, tap
from ..errors import NoAttentionError
from ..task import Task
from .flow import Flow
from .parts import Norm, Note
from .reading import Reading, reading
from .stream import ResidualStream, Term, streams
from .tape import Tape, named, recorded

__all__ = ["Layer", "Pass", "called_norm", "layers_of", "recorded_pass"]


@dataclass(eq=False)
class Pass:
    """A recorded pass, and what could not be established from it.

    Args:
        model: The plain module.
        task: How it is called.
        batch: What it was run on.
        modules: Its modules by name.
        outputs: What it returned.
        flow: How values flow through it.
        streams: Its residual streams; the outputs are read from the last.
        notes: What is approximate or unknown.
    """

    model: nn.Module
    task: Task
    batch: Any
    modules: dict[str, nn.Module]
    outputs: Tensor
    flow: Flow
    streams: list[ResidualStream]
    notes: list[Note] = field(default_factory=list)

    @property
    def main(self) -> ResidualStream | None:
        """The stream that the outputs are read from."""
        return self.streams[-1] if self.streams else None

    def note(
        self,
        part: str,
        layer: int | None,
        kind: Literal["approximate", "unknown", "refused"],
        reason: str,
    ) -> None:
        """Note what is approximate or unknown."""
        self.notes.append(Note(part, layer, kind, reason))

    def output(self, term: Term, module: str) -> int:
        """Return which of a module's outputs a term is."""
        for call in self.flow.tape.modules:
            roots = [self.flow.root(v) for v in call.outputs]
            if call.name == module and term.value in roots:
                return roots.index(term.value)
        return 0


@dataclass
class Layer:
    """One self-attention.

    Args:
        index: Its number among self-attentions.
        site: Its number among all attentions.
        place: When it ran: the number of a function on the tape.
        seen: What the tap saw.
        read: What it reads, if that is one state of the stream.
        term: What it writes, if that is a term of its own.
        query_norm: A norm of queries, or None.
        key_norm: A norm of keys, or None.
    """

    index: int
    site: int
    place: int
    seen: Site
    read: Reading | None = None
    term: Term | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def has_norms(self) -> bool:
        """Whether queries or keys are normalised."""
        return self.query_norm is not None or self.key_norm is not None


def recorded_pass(model: nn.Module, task: Task, batch: Any) -> Pass:
    """Run a model once and record what it does.

    Args:
        model: The plain module, in evaluation mode.
        task: How it is called.
        batch: What it is run on.

    Returns:
        The pass.

    Raises:
        NoAttentionError: If the model computes no attention that can be observed.
    """
    tape: list[Tape] = []

    def visit(index: int, site: Site) -> None:
        tape[0].saw(index, site)

    with tap(model, visit=visit, keep=False), recorded(model) as recording:
        tape.append(recording)
        outputs = task.outputs(model, batch)
    modules = named(model)
    flow = Flow(tape[0], modules)
    return Pass(model, task, batch, modules, outputs, flow, streams(flow))


def layers_of(run: Pass) -> list[Layer]:
    """Return the self-attentions of a pass, and note what is left out or unknown.

    Args:
        run: The pass.

    Returns:
        Layers in the order of execution.

    Raises:
        NoAttentionError: If there is cross-attention alone.
    """
    found: list[Layer] = []
    for site_index, (site, place) in enumerate(run.flow.tape.sites):
        if site.cross:
            reason = f"{site.module} attends to another sequence: cross-attention is left out"
            run.note("modules", None, "refused", reason)
        else:
            found.append(Layer(len(found), site_index, place, site))
    if not found:
        raise NoAttentionError(
            f"model: expected {type(run.model).__name__} to have self-attention, got "
            "cross-attention alone. What attends to another sequence has no anatomy here."
        )
    for layer in found:
        _place(run, layer, found)
        _find_norms(run, layer)
    _note_streams(run)
    return found


def _place(run: Pass, layer: Layer, layers: list[Layer]) -> None:
    owner = next((s for s in run.streams if layer.site in s.sites), None)
    if owner is None:
        run.note("writers", layer.index, "unknown", "what it computes is added to no stream")
        return
    value = _computed(run, layer)
    layer.term = _written_by(run, owner, layer, layers)
    layer.read = _read_by(run, owner, layer, value)
    if layer.read is None:
        reason = "it does not read one state of the stream through a norm that a module computes"
        run.note("W_Q", layer.index, "unknown", f"{reason}{called_norm(run, layer)}")


def called_norm(run: Pass, layer: Layer) -> str:
    """Name a norm that is called as a function, where what an attention reads depends on one.

    Args:
        run: The pass.
        layer: The attention.

    Returns:
        The end of a sentence, or nothing.
    """
    flow = run.flow
    made = (flow.call(v) for v in flow.before(_computed(run, layer)) if flow.norm(v) is None)
    names = {call.name for call in made if call is not None}
    found = sorted(names & {"layer_norm", "rms_norm"})
    if not found:
        return ""
    return f" ({found[0]} is called as a function there; give it a module, or state the weights)"


def _computed(run: Pass, layer: Layer) -> int:
    outputs = run.flow.tape.calls[layer.place].outputs
    return next((run.flow.root(v) for v in outputs), -1)


def _read_by(run: Pass, stream: ResidualStream, layer: Layer, value: int) -> Reading | None:
    found = reading(run.flow, stream, value, layer.place)
    if found is None or found.norm is not None:
        return found
    inside = [
        m
        for m in run.flow.tape.modules
        if m.name == layer.seen.module and m.start <= layer.place < m.stop
    ]
    given = {run.flow.root(v) for m in inside for _, v in m.inputs}
    if found.value in given:
        return Reading(found.value, found.state, None, layer.seen.module)
    return found


def _written_by(
    run: Pass, stream: ResidualStream, layer: Layer, layers: list[Layer]
) -> Term | None:
    flow, value = run.flow, _computed(run, layer)
    for term in stream.terms():
        fresh = set(flow.before(term.value, stream.states - {term.value}))
        if value not in fresh:
            continue
        others = [flow.tape.calls[o.place] for o in layers if o is not layer]
        mixed = any(flow.root(v) in fresh for call in others for v in call.outputs)
        return None if mixed else term
    return None


def _find_norms(run: Pass, layer: Layer) -> None:
    """Find norms of queries and keys."""
    if layer.read is None:
        return
    flow = run.flow
    q, stop = flow.tape.find(layer.seen.q), {layer.read.value}
    of_q = set() if q is None else set(flow.before(q, stop))
    for root in flow.before(_computed(run, layer), stop):
        norm = None if root in stop else flow.norm(root)
        if norm is None or not norm[0].module.startswith(layer.seen.module):
            continue
        if root in of_q:
            layer.query_norm = norm[0]
        else:
            layer.key_norm = norm[0]
    if layer.has_norms:
        reason = "queries and keys are normalised after W_Q and W_K"
        run.note("W_Q", layer.index, "approximate", reason)


def _note_streams(run: Pass) -> None:
    if not run.streams:
        run.note("writers", None, "unknown", "no sum was found that attentions write to")
    for stream in run.streams[:-1]:
        names = [run.flow.tape.sites[i][0].module for i in stream.sites]
        verb = "writes" if len(names) == 1 else "write"
        reason = f"{', '.join(names)} {verb} to another stream, which is not among the writers"
        run.note("writers", None, "approximate", reason)
