"""What the parts of a circuit are, in words: roles, composition, one sentence for each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...anatomy import Anatomy
from ...batch import main_input
from ...behavior import Behavior
from ...errors import LightningMIError
from ...nodes import Head, Reader, parse
from ...task import Task
from ..readout import head_roles
from ..weights import composition, subspace_overlap
from .completeness import Marginal
from .graph import Edge

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["Link", "links_of", "roles_of", "sentences_of"]

NAMED = 4
"""Most neighbours that a sentence names."""

HOW = {"q": "by its queries", "k": "by its keys", "v": "by its values"}
ROLE_WORDS = {"sink": "attends to the first position"}


@dataclass(frozen=True)
class Link:
    """How the weights of two heads fit.

    Args:
        kind: ``"Q"``, ``"K"`` or ``"V"``: what the second head makes of what the first one writes.
        composition: Composition score above chance.
        overlap: Overlap of what is written and what is read, above chance.

    Example:
        >>> print(Link("K", 0.31, 0.2))
        K-composition +0.310, overlap +0.200 above chance
    """

    kind: str
    composition: float
    overlap: float

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{self.kind}-composition {self.composition:+.3f}, overlap {self.overlap:+.3f} "
            "above chance"
        )


def roles_of(
    circuit: Circuit, model: nn.Module, behavior: Behavior, task: Task | None, anatomy: Anatomy
) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """Return the roles of a circuit's heads by their scores, and why there are none.

    Args:
        circuit: The circuit.
        model: The user's model.
        behavior: The prompts.
        task: How the model is called.
        anatomy: What it is made of.

    Returns:
        By head the roles for which it beats both nulls, and the reason where they are unknown.
    """
    heads = [n for n in map(_node, circuit.nodes) if isinstance(n, Head)]
    if not heads:
        return {}, None
    if main_input(behavior.clean).is_floating_point():
        return {}, "head scores need token ids"
    try:
        roles = head_roles(model, task=task, anatomy=anatomy)
    except LightningMIError as error:
        # Head scores ask more of a model than circuits do, for example room for repetitions.
        return {}, str(error)
    return {str(h): roles.of(h) for h in heads}, None


def links_of(circuit: Circuit, anatomy: Anatomy) -> dict[str, Link]:
    """Return composition and overlap of each edge between two heads.

    Args:
        circuit: The circuit.
        anatomy: What the model is made of.

    Returns:
        By edge; none where one end is no head, as there is no pair of matrices to compare.
    """
    pairs: dict[str, list[tuple[Edge, Head, Reader]]] = {}
    for edge in circuit.edges:
        writer, reader = _node(edge.writer), _node(edge.reader)
        if isinstance(writer, Head) and isinstance(reader, Reader):
            pairs.setdefault(reader.role.upper(), []).append((edge, writer, reader))
    found = {}
    for kind, own in pairs.items():
        strength, overlap = composition(anatomy, kind), subspace_overlap(anatomy, kind)
        for edge, w, reader in own:
            at = (w.layer, w.head, reader.node.layer, _query_head(anatomy, reader))
            found[str(edge)] = Link(kind, float(strength[at]), float(overlap[at]))
    return found


def sentences_of(
    circuit: Circuit,
    roles: Mapping[str, Sequence[str]],
    links: Mapping[str, Link],
    marginals: Mapping[str, Marginal],
) -> dict[str, str]:
    """Return one sentence for each node of a circuit.

    Args:
        circuit: The circuit.
        roles: By head, what it is.
        links: By edge, how its ends compose.
        marginals: By node, what is lost without it.

    Returns:
        By node: role, what it reads and from whom, who reads it, what is lost without it.
    """
    return {
        node: _sentence(node, circuit, roles, links, marginals)
        for node in circuit.nodes
        if node != "logits"
    }


def _sentence(
    node: str,
    circuit: Circuit,
    roles: Mapping[str, Sequence[str]],
    links: Mapping[str, Link],
    marginals: Mapping[str, Marginal],
) -> str:
    graph = circuit.graph
    own = {graph.readers[i] for i in graph.inputs[graph.writers.index(node)]}
    into = _strongest(circuit, [e for e in circuit.edges if e.reader in own])
    out = _strongest(circuit, [e for e in circuit.edges if e.writer == node])
    role = ", ".join(ROLE_WORDS.get(r, r.replace("_", "-")) for r in roles.get(node, ()))
    reads = _listed([_read(e, links) for e in into])
    writes = _listed([_written(e) for e in out])
    parts = [f"{node}{f' ({role})' if role else ''}"]
    parts += [f"reads {reads}"] if into else []
    parts += [f"{'and ' if into else ''}is read by {writes}"] if out else []
    return " ".join(parts) + _loss(marginals.get(node)) + "."


def _read(edge: Edge, links: Mapping[str, Link]) -> str:
    link = links.get(str(edge))
    how = HOW.get(edge.reader.rsplit(".", 1)[-1]) if "." in edge.reader else None
    return " ".join([edge.writer, *([how] if how else []), *([f"({link})"] if link else [])])


def _written(edge: Edge) -> str:
    name, _, role = edge.reader.partition(".")
    if name == "logits":
        return "the logits"
    return f"{name} {HOW[role]}" if role in HOW else name


def _loss(lost: Marginal | None) -> str:
    if lost is None:
        return ""
    if lost.redundant:
        return f"; not missed alone, but {lost.most.value:.2f} is lost once {lost.beside} is gone"
    if lost.idle:
        return "; nothing is lost without it"
    return f"; without it {lost.alone.value:.2f} of the effect is lost"


def _strongest(circuit: Circuit, edges: Sequence[Edge]) -> list[Edge]:
    return sorted(edges, key=lambda e: -abs(circuit.weights.get(e, 0.0)))


def _listed(words: Sequence[str]) -> str:
    unique = list(dict.fromkeys(words))
    shown, more = unique[:NAMED], len(unique) - NAMED
    if more > 0:
        shown.append(f"{more} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _node(name: str) -> object:
    try:
        return parse(name)
    except LightningMIError:  # A position embedding, or a module that has no name of its own.
        return name


def _query_head(anatomy: Anatomy, reader: Reader) -> int:
    """Return a query head that a stored head of keys or values serves."""
    layer, head = reader.node.layer, reader.node.head
    if reader.role == "q":
        return head
    return head * (anatomy.n_heads[layer] // anatomy.n_kv_heads[layer])
