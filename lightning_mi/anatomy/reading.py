"""Who reads the stream, and how: attentions, MLPs and the logits of a recorded pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .flow import Flow
from .parts import Norm, Note
from .stream import ResidualStream
from .tape import ADDING, is_equal

__all__ = ["Reading", "Unembedding", "reading", "unembedding"]


@dataclass(frozen=True)
class Reading:
    """What a part reads.

    Args:
        value: Root of what it is handed.
        state: Root of the stream before the norm.
        norm: The norm in between, or None.
        module: Module whose first input is the stream.
    """

    value: int
    state: int
    norm: Norm | None
    module: str | None


@dataclass(frozen=True)
class Unembedding:
    """How logits are read off the stream."""

    reading: Reading
    weight: Tensor
    bias: Tensor | None
    softcap: float | None


def reading(flow: Flow, stream: ResidualStream, value: int, place: int) -> Reading | None:
    """Return what was read to make a value, or None if it is not one state of the stream.

    Args:
        flow: The recorded pass.
        stream: The stream.
        value: A root that was made from what was read.
        place: When it was read: a place on the tape inside the part.

    Returns:
        The reading.
    """
    states = stream.states
    normed: dict[int, tuple[Norm, int]] = {}
    for state in states:
        for norm, made in flow.norms_of(state):
            if made not in states:
                normed[made] = norm, state
    hits = [v for v in flow.before(value, {*states, *normed}) if v in normed or v in states]
    # One norm of one state may run again for queries, keys and values (TransformerLens does so).
    origins = {(normed[v][0].module, normed[v][1]) if v in normed else ("", v) for v in hits}
    if len(origins) != 1:
        return None
    hit = min(hits)
    if hit in normed:
        norm, state = normed[hit]
        return Reading(hit, state, norm, norm.module)
    later = [s for s in stream.sums if flow.place(s) > place]
    outside = flow.place(later[0]) if later else -2
    between = set(flow.before(value, {hit}))
    return Reading(hit, hit, None, flow.module_reading(hit, place, outside, between))


def unembedding(
    flow: Flow, stream: ResidualStream, outputs: Tensor, notes: list[Note]
) -> Unembedding | None:
    """Return how logits come out of the stream, or note why it is unknown.

    Args:
        flow: The recorded pass.
        stream: The stream.
        outputs: What the model returned.
        notes: What could not be established is added here.

    Returns:
        The unembedding.
    """
    number = flow.tape.find(outputs)
    root = None if number is None else flow.root(number)
    found = None if root is None else _logits(flow, root)
    if found is None:
        notes.append(Note("W_U", None, "unknown", "the outputs are no linear map of the stream"))
        return None
    made = _product(flow, found.product)
    read = None if made is None else reading(flow, stream, made.given, flow.place(found.product))
    times = None if made is None or read is None else _slice_of(flow, made.given, read)
    if made is None or read is None or times is None:
        notes.append(
            Note("W_U", None, "unknown", "more than a norm lies between the stream and the outputs")
        )
        return None
    factor = found.factor * times
    bias = None if made.bias is None else made.bias * found.factor
    for more, share in found.biases:
        bias = more * share if bias is None else bias + more * share
    weight = made.weight * factor if factor != 1.0 else made.weight
    return Unembedding(read, weight, bias, found.softcap)


@dataclass(frozen=True)
class _Logits:
    """The product that gave the logits, what they were multiplied by, and what was added."""

    product: int
    factor: float
    softcap: float | None
    biases: tuple[tuple[Tensor, float], ...]


@dataclass(frozen=True)
class _Product:
    """given · weight + bias, checked against what the model computed."""

    given: int
    weight: Tensor
    bias: Tensor | None


def _product(flow: Flow, value: int) -> _Product | None:
    """Return the matrix of a product with a parameter, however it is laid out."""
    call = flow.call(value)
    inputs = () if call is None else call.inputs
    own = [v for v in inputs if flow.is_parameter(flow.root(v))]
    matrices = [flow.tensor(v) for v in own if flow.tensor(v).ndim == 2]
    biases = [flow.tensor(v) for v in own if flow.tensor(v).ndim == 1]
    given = next((v for v in inputs if not flow.is_parameter(flow.root(v))), None)
    if len(matrices) != 1 or given is None:
        return None
    x, made = flow.tensor(given), flow.tensor(value)
    bias = biases[0] if biases else None
    for weight in (matrices[0].T, matrices[0]):
        if weight.shape != (x.shape[-1], made.shape[-1]):
            continue
        again = x @ weight if bias is None else x @ weight + bias
        if is_equal(again.reshape(made.shape), made):
            return _Product(flow.root(given), weight, bias)
    return None


def _logits(flow: Flow, value: int) -> _Logits | None:
    """Return where logits come from, behind biases, multiples and a soft-cap."""
    softcap: float | None = None
    factor, tanh = 1.0, False
    biases: list[tuple[Tensor, float]] = []
    for _ in range(8):
        call = flow.call(value)
        if call is None:
            return None
        if call.name in ("linear", "matmul", "__matmul__", "addmm", "mm", "bmm", "einsum"):
            cap = softcap or 1.0  # c·tanh(x / c)
            return _Logits(value, factor * cap, softcap, tuple((b, s * cap) for b, s in biases))
        if call.name in ADDING and len(call.inputs) == 2:
            rows = [v for v in call.inputs if flow.tensor(v).ndim == 1]
            if len(rows) == 1 and flow.is_parameter(flow.root(rows[0])):
                place = call.inputs.index(rows[0])
                second = 1.0 if call.number is None or place == 0 else call.number
                biases.append((flow.tensor(rows[0]), factor * second))
                value = flow.root(call.inputs[1 - place])
                continue
        terms = flow.operands(value)
        if call.name == "tanh" and not tanh:
            tanh, softcap, factor = True, factor, 1.0
            value = flow.root(call.inputs[0])
        elif len(terms) == 1:
            factor *= terms[0][1]
            value = terms[0][0]
        elif call.name in ("__getitem__", "squeeze", "select", "unsqueeze"):
            value = flow.root(call.inputs[0])
        else:
            return None
    return None


def _slice_of(flow: Flow, given: int, read: Reading) -> float | None:
    """Return what logits are read from as a multiple of what was read, or of some positions of it.

    Returns:
        The factor, or None if it is something else.
    """
    here, factor = given, 1.0
    for _ in range(6):
        if here == read.value:
            return factor
        call, terms = flow.call(here), flow.operands(here)
        if len(terms) == 1:
            here, factor = terms[0][0], factor * terms[0][1]
        elif call is not None and call.name in ("__getitem__", "select", "squeeze", "unsqueeze"):
            here = flow.root(call.inputs[0])
        else:
            break
    whole, part = flow.tensor(read.value), flow.tensor(given)
    return 1.0 if whole.shape == part.shape and is_equal(whole, part, 1e-6) else None
