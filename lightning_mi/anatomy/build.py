"""Finding an anatomy by asking the model: `anatomy_of`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Site, tap
from ..batch import cloned, cut, tree_map
from ..errors import ArgumentError, ModelError, NoAttentionError
from ..isolation import untouched
from ..nodes import MLP, Embedding
from ..task import Task
from .anatomy import Anatomy
from .flow import Flow
from .parts import Norm, Note, ReaderInput, Writer, WriterKind
from .probing import Plan, Weights, probed
from .reading import Reading, reading, unembedding
from .stream import ResidualStream, Term, streams
from .tape import Tape, is_equal, named, recorded

__all__ = ["anatomy_of"]

EXAMPLES, POSITIONS = 2, 12
"""The pass that is recorded is that short; longer sequences would tell nothing more."""

EXACT = 1e-3
"""Relative error up to which a map counts as affine, in single precision."""


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
    """
    chosen = task or Task()
    with untouched(model) as plain, torch.no_grad():
        batch = _short(_tokens(plain) if example is None else cloned(example), chosen)
        wide = _widened(plain)
        batch = tree_map(_as_wide, batch)
        with torch.autocast(next(wide.parameters()).device.type, enabled=False):
            return _Finder(wide, chosen, batch).found()


@dataclass
class Layer:
    """One self-attention."""

    site: int
    place: int
    seen: Site
    read: Reading | None = None
    term: Term | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    stream: ResidualStream | None = None
    weights: Weights | None = None


class _Finder:
    def __init__(self, model: nn.Module, task: Task, batch: Any) -> None:
        self.model, self.task, self.batch = model, task, batch
        self.modules = named(model)
        self.notes: list[Note] = []
        self.outputs, self.flow = self._recorded()
        self.layers = self._layers()
        self.streams = streams(self.flow)

    def _recorded(self) -> tuple[Tensor, Flow]:
        tape: list[Tape] = []

        def visit(index: int, site: Site) -> None:
            tape[0].saw(index, site)

        with tap(self.model, visit=visit, keep=False), recorded(self.model) as recording:
            tape.append(recording)
            outputs = self.task.outputs(self.model, self.batch)
        return outputs, Flow(tape[0], self.modules)

    def _layers(self) -> list[Layer]:
        found = []
        for index, (site, place) in enumerate(self.flow.tape.sites):
            if site.cross:
                self.notes.append(
                    Note(
                        "modules",
                        None,
                        "refused",
                        f"{site.module} attends to another sequence: cross-attention is left out",
                    )
                )
                continue
            found.append(Layer(index, place, site))
        if not found:
            raise NoAttentionError(
                f"model: expected {type(self.model).__name__} to have self-attention, got "
                "cross-attention alone. What attends to another sequence has no anatomy here."
            )
        return found

    def found(self) -> Anatomy:
        """Return what was found."""
        self._place_layers()
        main = self._main_stream()
        terms = main.terms() if main is not None else []
        self._find_norms()
        self._probe()
        width = self._width()
        readers = self._readers(main, terms)
        end = None if main is None else unembedding(self.flow, main, self.outputs, self.notes)
        if end is not None and end.reading.module is not None:
            at = end.reading
            after = self._after(terms, at.state)
            reader = ReaderInput(
                "logits", str(at.module), len(self.layers), "logits", at.norm, after
            )
            readers.append(reader)
        writers = self._writers(terms, readers)
        embedding = self._embeddings(terms)
        weights = [self._weights(i, layer, width) for i, layer in enumerate(self.layers)]
        sites = [layer.seen for layer in self.layers]
        mlps = {r.layer: r for r in readers if r.kind == "mlp"}
        own = {r.layer: r for r in readers if r.kind == "attention"}
        return Anatomy(
            n_layers=len(self.layers),
            n_heads=tuple(s.z.shape[1] for s in sites),
            n_kv_heads=tuple(s.k.shape[1] for s in sites),
            d_head=tuple(s.q.shape[-1] for s in sites),
            d_model=width,
            modules=tuple(s.module for s in sites),
            W_Q=tuple(w[0].W_Q for w in weights),
            W_K=tuple(w[0].W_K for w in weights),
            W_V=tuple(w[0].W_V for w in weights),
            W_O=tuple(_known(w[0].W_O, s, width) for w, s in zip(weights, sites, strict=True)),
            b_Q=tuple(w[0].b_Q for w in weights),
            b_K=tuple(w[0].b_K for w in weights),
            b_V=tuple(w[0].b_V for w in weights),
            b_O=tuple(_bias(w[0], width) for w in weights),
            scale=tuple(w[1] for w in weights),
            W_E=embedding[0],
            W_pos=embedding[1],
            W_U=None if end is None else end.weight,
            b_U=None if end is None else end.bias,
            attention_norms=tuple(
                None if layer.read is None else layer.read.norm for layer in self.layers
            ),
            mlp_norms=tuple(mlps[i].norm if i in mlps else None for i in range(len(self.layers))),
            final_norm=None if end is None else end.reading.norm,
            query_norms=tuple(layer.query_norm for layer in self.layers),
            key_norms=tuple(layer.key_norm for layer in self.layers),
            parallel=tuple(
                i in mlps and i in own and mlps[i].after == own[i].after
                for i in range(len(self.layers))
            ),
            logit_softcap=None if end is None else end.softcap,
            softcap=tuple(s.softcap for s in sites),
            writers=tuple(writers),
            readers=tuple(readers),
            notes=tuple(self.notes),
        )

    def _place_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            owner = next((s for s in self.streams if layer.site in s.sites), None)
            layer.stream = owner
            if owner is None:
                self._note("writers", index, "unknown", "what it computes is added to no stream")
                continue
            call = self.flow.tape.calls[layer.place]
            value = next((self.flow.root(v) for v in call.outputs), -1)
            layer.read = self._read_by(owner, layer, value)
            if layer.read is None:
                self._note("W_Q", index, "unknown", "it does not read one state of the stream")
            layer.term = self._written_by(owner, layer, value)

    def _read_by(self, stream: ResidualStream, layer: Layer, value: int) -> Reading | None:
        found = reading(self.flow, stream, value, layer.place)
        if found is None or found.norm is not None:
            return found
        inside = [
            m
            for m in self.flow.tape.modules
            if m.name == layer.seen.module and m.start <= layer.place < m.stop
        ]
        given = {self.flow.root(v) for m in inside for _, v in m.inputs}
        if found.value in given:
            return Reading(found.value, found.state, None, layer.seen.module)
        return found

    def _written_by(self, stream: ResidualStream, layer: Layer, value: int) -> Term | None:
        for term in stream.terms():
            fresh = set(self.flow.before(term.value, stream.states - {term.value}))
            if value not in fresh:
                continue
            others = [self.flow.tape.calls[o.place] for o in self.layers if o is not layer]
            mixed = any(self.flow.root(v) in fresh for call in others for v in call.outputs)
            return None if mixed else term
        return None

    def _main_stream(self) -> ResidualStream | None:
        if not self.streams:
            self.notes.append(
                Note("writers", None, "unknown", "no sum was found that attentions write to")
            )
            return None
        main = self.streams[-1]
        for stream in self.streams[:-1]:
            names = [self.flow.tape.sites[i][0].module for i in stream.sites]
            self.notes.append(
                Note(
                    "writers",
                    None,
                    "approximate",
                    f"{', '.join(names)} write to another stream, which is not among the writers",
                )
            )
        return main

    def _find_norms(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.read is None:
                continue
            call = self.flow.tape.calls[layer.place]
            q = self.flow.tape.find(layer.seen.q)
            value = next((self.flow.root(v) for v in call.outputs), -1)
            of_q = set() if q is None else set(self.flow.before(q, {layer.read.value}))
            for root in self.flow.before(value, {layer.read.value}):
                norm = None if root == layer.read.value else self.flow.norm(root)
                if norm is None or not norm[0].module.startswith(layer.seen.module):
                    continue
                if root in of_q:
                    layer.query_norm = norm[0]
                else:
                    layer.key_norm = norm[0]
            if layer.query_norm is not None or layer.key_norm is not None:
                self._note(
                    "W_Q", index, "approximate", "queries and keys are normalised after W_Q and W_K"
                )

    def _probe(self) -> None:
        by_length: dict[int, list[Layer]] = {}
        for layer in self.layers:
            by_length.setdefault(layer.seen.q.shape[2], []).append(layer)
        for length, layers in by_length.items():
            plans = [p for p in (self._plan(layer) for layer in layers) if p is not None]
            if not plans:
                continue
            weights = probed(
                self.model, self.task, self.batch, plans, self._width(), self.modules, length
            )
            for plan, found in zip(plans, weights, strict=True):
                next(o for o in layers if o.site == plan.site).weights = found

    def _plan(self, layer: Layer) -> Plan | None:
        read = layer.read
        if read is None or read.module is None:
            return None
        leaves = None
        if layer.term is not None:
            leaves = self.flow.module_returning(layer.term.value)
        z = layer.seen.z
        return Plan(
            layer.site,
            read.module,
            read.norm is not None,
            leaves,
            self._output(layer.term, leaves),
            None if layer.query_norm is None else layer.query_norm.module,
            None if layer.key_norm is None else layer.key_norm.module,
            z.shape[1],
            z.shape[-1],
        )

    def _output(self, term: Term | None, module: str | None) -> int:
        if term is None or module is None:
            return 0
        for call in self.flow.tape.modules:
            roots = [self.flow.root(v) for v in call.outputs]
            if call.name == module and term.value in roots:
                return roots.index(term.value)
        return 0

    def _weights(self, index: int, layer: Layer, width: int) -> tuple[Weights, float]:
        scale = layer.seen.scale
        found = layer.weights
        if found is None:
            self._note("W_Q", index, "unknown", "it could not be asked")
            return _unknown(layer.seen, width), scale
        for name, matrix in (("q", "W_Q"), ("k", "W_K"), ("v", "W_V"), ("o", "W_O")):
            if found.bent.get(name, 0.0) > EXACT:
                self._note(
                    matrix,
                    index,
                    "approximate",
                    f"the map is not affine: it misses by {found.bent[name]:.2g} of its size",
                )
        if found.W_O is None:
            self._note("W_O", index, "unknown", "no module returns what the heads write")
        if layer.term is not None and layer.term.norm is not None:
            self._note("W_O", index, "approximate", "a norm follows before the stream")
        return self._unscaled(layer, found, scale)

    def _unscaled(self, layer: Layer, found: Weights, scale: float) -> tuple[Weights, float]:
        """Take numbers by which queries and keys are multiplied out of the matrices."""
        if layer.query_norm is not None or layer.key_norm is not None or layer.read is None:
            return found, scale
        q, k = self._multiple(layer, layer.seen.q), self._multiple(layer, layer.seen.k)
        if q == 1.0 and k == 1.0:
            return found, scale
        return (
            Weights(
                found.W_Q / q,
                found.W_K / k,
                found.W_V,
                found.b_Q / q,
                found.b_K / k,
                found.b_V,
                found.W_O,
                found.b_O,
                found.bent,
            ),
            scale * q * k,
        )

    def _multiple(self, layer: Layer, seen: Tensor) -> float:
        """Return what a projection was multiplied by until it entered the kernel."""
        if layer.read is None:
            return 1.0
        batch, heads, _, width = seen.shape
        made = self.flow.tape.calls[layer.place].outputs[0]
        for root in self.flow.before(made, {layer.read.value}):
            call, value = self.flow.call(root), self.flow.tensor(root)
            if call is None or call.name not in ("linear", "addmm", "matmul", "__matmul__"):
                continue
            if value.numel() != seen.numel() or value.shape[-1] != heads * width:
                continue
            first = value.reshape(batch, -1, heads, width)[:, 0].flatten()
            own = seen[:, :, 0].flatten()
            ratio = float((first @ own) / (first @ first).clamp(min=1e-30))
            if ratio and is_equal(first * ratio, own, 1e-5):
                return 1.0 if abs(ratio - 1.0) < 1e-5 else ratio
        return 1.0

    def _width(self) -> int:
        for layer in self.layers:
            if layer.read is not None:
                return int(self.flow.tensor(layer.read.state).shape[-1])
        raise ModelError(
            f"model: expected the attentions of {type(self.model).__name__} to add to a residual "
            "stream and to read from it, got none that does. "
            f"{' '.join(str(n) for n in self.notes)}"
        )

    def _after(self, terms: list[Term], state: int) -> int:
        place = self.flow.place(state)
        return sum(self.flow.place(t.value) <= place for t in terms)

    def _readers(self, main: ResidualStream | None, terms: list[Term]) -> list[ReaderInput]:
        if main is None:
            return []
        readers: list[ReaderInput] = []
        current = 0
        for term in terms:
            layer = self._layer_of(term)
            if layer is not None:
                current = layer
                self._add_reader(readers, main, terms, self.layers[layer].read, layer, "attention")
            elif self._is_first(term) or self._is_cross(term):
                continue
            else:
                read = reading(self.flow, main, term.value, self.flow.place(term.value))
                self._add_reader(readers, main, terms, read, current, "mlp")
        return readers

    def _add_reader(
        self,
        readers: list[ReaderInput],
        main: ResidualStream,
        terms: list[Term],
        read: Reading | None,
        layer: int,
        kind: Any,
    ) -> None:
        label = f"attn{layer}" if kind == "attention" else f"MLP{layer}"
        if read is None or read.module is None:
            self._note("readers", layer, "unknown", f"{label} reads no one state of the stream")
            return
        after = self._after(terms, read.state)
        node = MLP(layer) if kind == "mlp" else None
        readers.append(ReaderInput(label, read.module, layer, kind, read.norm, after, node))

    def _layer_of(self, term: Term) -> int | None:
        for index, layer in enumerate(self.layers):
            if layer.term is not None and layer.term.value == term.value:
                return index
        return None

    def _writers(self, terms: list[Term], readers: list[ReaderInput]) -> list[Writer]:
        writers: list[Writer] = []
        current, seen = -1, set()
        for term in terms:
            module = self.flow.module_returning(term.value)
            output, layer = self._output(term, module), self._layer_of(term)
            kind: WriterKind
            node: Any = None
            if layer is not None:
                current, kind, label = layer, "heads", f"attn{layer}"
            elif self._is_first(term):
                kind = self._kind_of_first(term)
                label = "embed" if kind == "embed" else "pos" if kind == "position" else str(module)
                node = Embedding() if kind == "embed" else None
            elif current in seen or self._is_cross(term):
                kind, label = "other", str(module)
            else:
                kind, label, node = "mlp", f"MLP{current}", MLP(max(current, 0))
                seen.add(current)
            where = -1 if self._is_first(term) else current
            reads = _reads(readers, kind, where)
            writers.append(
                Writer(
                    label, module or "", where, kind, term.norm, term.factor, term.through,
                    node, output, reads,
                )
            )  # fmt: skip
        return writers

    def _is_cross(self, term: Term) -> bool:
        """Say whether a term was written by an attention to another sequence."""
        main = self.streams[-1]
        fresh = set(self.flow.before(term.value, main.states - {term.value}))
        cross = [place for site, place in self.flow.tape.sites if site.cross]
        calls = [self.flow.tape.calls[place] for place in cross]
        return any(self.flow.root(v) in fresh for call in calls for v in call.outputs)

    def _is_first(self, term: Term) -> bool:
        main = self.streams[-1]
        return self.flow.place(term.value) <= self.flow.place(main.base)

    def _kind_of_first(self, term: Term) -> WriterKind:
        if self.flow.call(term.value) is None:
            return "position"
        looked_up = self._looked_up(term)
        if looked_up is None:  # Patches of an image, or positions that are cut out of a table.
            return "position" if self._ids() else "embed"
        return "embed" if looked_up[0] in self._ids() else "position"

    def _ids(self) -> set[int]:
        """Return the roots of the ids that the main stream starts with."""
        main, own = self.streams[-1], self.flow.tape.find(self.task.inputs(self.batch))
        looked_up = [self._looked_up(term) for term in main.terms() if self._is_first(term)]
        rows = {found[0] for found in looked_up if found is not None}
        if own is not None and self.flow.root(own) in rows:
            return {self.flow.root(own)}
        # A decoder reads ids of its own: those of the batch that do not count positions.
        return {v for v in rows if self.flow.call(v) is None and not _counts(self.flow.tensor(v))}

    def _looked_up(self, term: Term) -> tuple[int, int, float] | None:
        """Return indices, table and factor, where a term is looked up in a table."""
        value, factor = term.value, term.factor
        for _ in range(4):
            call, parts = self.flow.call(value), self.flow.operands(value)
            if call is not None and call.name in ("embedding", "__getitem__"):
                ids, table = sorted(
                    (self.flow.root(v) for v in call.inputs[:2]), key=self._is_table
                )
                indexed = call.name == "embedding" or self._is_table(table)
                return (ids, table, factor) if indexed and ids != table else None
            if len(parts) != 1:
                return None
            value, factor = parts[0][0], factor * parts[0][1]
        return None

    def _is_table(self, value: int) -> bool:
        return self.flow.is_parameter(value) and self.flow.tensor(value).ndim == 2

    def _cut_out(self, term: Term) -> Tensor | None:
        """Return the table whose first rows a term is, where it is so."""
        written = self.flow.tensor(term.value)
        for value in self.flow.before(term.value):
            table = self.flow.tensor(value)
            if self._is_table(value) and table.shape[-1] == written.shape[-1]:
                rows = written.reshape(-1, *written.shape[-2:])[0]
                if len(rows) <= len(table) and is_equal(table[: len(rows)], rows, 1e-6):
                    return table
        return None

    def _embeddings(self, terms: list[Term]) -> tuple[Tensor | None, Tensor | None]:
        W_E = W_pos = None
        for term in terms:
            found = self._looked_up(term) if self._is_first(term) else None
            if found is None:
                if self._is_first(term) and W_pos is None:
                    W_pos = self._cut_out(term)
                continue
            rows, table = self.flow.tensor(found[0]), self.flow.tensor(found[1])
            table = table * found[2] if found[2] != 1.0 else table
            if self._kind_of_first(term) == "embed":
                W_E = table
            elif W_pos is None and _counts(rows):
                W_pos = table[int(rows.reshape(-1)[0]) :]
        return W_E, W_pos

    def _note(self, part: str, layer: int | None, kind: Any, reason: str) -> None:
        self.notes.append(Note(part, layer, kind, reason))


def _reads(readers: list[ReaderInput], kind: str, layer: int) -> int:
    wanted = {"heads": "attention", "mlp": "mlp"}.get(kind)
    found = [i for i, r in enumerate(readers) if r.kind == wanted and r.layer == layer]
    return found[0] if found else -1


def _counts(rows: Tensor) -> bool:
    """Say whether indices are those of consecutive positions."""
    flat = rows.reshape(-1, rows.shape[-1])[0]
    steps = torch.arange(len(flat), device=flat.device)
    return len(flat) > 1 and bool((flat - flat[0] == steps).all())


def _bias(weights: Weights, width: int) -> Tensor:
    return weights.b_V.new_full((width,), torch.nan) if weights.b_O is None else weights.b_O


def _known(W_O: Tensor | None, site: Site, width: int) -> Tensor:
    if W_O is not None:
        return W_O
    return site.z.new_full((site.z.shape[1], site.z.shape[-1], width), torch.nan)


def _unknown(site: Site, width: int) -> Weights:
    def matrix(values: Tensor) -> Tensor:
        return values.new_full((values.shape[1], width, values.shape[-1]), torch.nan)

    def bias(values: Tensor) -> Tensor:
        return values.new_full((values.shape[1], values.shape[-1]), torch.nan)

    q, k, v = site.q, site.k, site.v
    return Weights(matrix(q), matrix(k), matrix(v), bias(q), bias(k), bias(v), None, None, {})


def _tokens(model: nn.Module) -> Tensor:
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 1]
    if not tables:
        raise ArgumentError.of(
            "example",
            expected="a batch that the model can be run on",
            got="none, for a model that looks no token ids up",
            do="Pass one batch: Anatomy.of(model, batch).",
        )
    # Which table is looked up is not known yet: ids that every table has.
    most = min(t.num_embeddings for t in tables)
    device = tables[0].weight.device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, most, (EXAMPLES, 8), generator=generator).to(device)


def _short(batch: Any, task: Task) -> Any:
    """Return the first examples, sequences of ids cut to a few positions."""
    batch = cut(batch, EXAMPLES)
    inputs = task.inputs(batch)
    if inputs.ndim != 2 or inputs.is_floating_point() or inputs.shape[1] <= POSITIONS:
        return batch
    length, others = inputs.shape[1], []

    def shorten(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.ndim == 2 and value.shape[1] == length:
            return value[:, :POSITIONS].contiguous()
        others.append(value)
        return value

    shorter = tree_map(shorten, batch)
    return batch if others else shorter


def _widened(model: nn.Module) -> nn.Module:
    """Return the model, or a copy in single precision of one in half precision."""
    if all(p.element_size() >= 4 for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def _as_wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value
