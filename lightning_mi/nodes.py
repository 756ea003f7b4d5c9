"""Names of the parts of a model. These are the only ones used anywhere.

A node prints as it is written in papers: ``L1H3``, ``L1H3.q``, ``MLP2``, ``L2N17``, ``embed``,
``logits``; `parse` reads the printed form back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .errors import ArgumentError

__all__ = ["MLP", "Embedding", "Head", "Logits", "Neuron", "Node", "Reader", "parse"]


@dataclass(frozen=True, order=True)
class Embedding:
    """What the embeddings write into the residual stream."""

    def __str__(self) -> str:
        """Return ``embed``."""
        return "embed"


@dataclass(frozen=True, order=True)
class Head:
    """One attention head; layers and heads count from 0."""

    layer: int
    head: int

    def __str__(self) -> str:
        """Return for example ``L1H3``."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, order=True)
class MLP:
    """The feed-forward part of one layer."""

    layer: int

    def __str__(self) -> str:
        """Return for example ``MLP2``."""
        return f"MLP{self.layer}"


@dataclass(frozen=True, order=True)
class Neuron:
    """One hidden unit of a feed-forward part."""

    layer: int
    index: int

    def __str__(self) -> str:
        """Return for example ``L2N17``."""
        return f"L{self.layer}N{self.index}"


@dataclass(frozen=True, order=True)
class Logits:
    """What reads the final residual stream."""

    def __str__(self) -> str:
        """Return ``logits``."""
        return "logits"


@dataclass(frozen=True)
class Reader:
    """One input of a node: the query, key or value input of a head."""

    node: Head
    role: Literal["q", "k", "v"]

    def __str__(self) -> str:
        """Return for example ``L1H3.q``."""
        return f"{self.node}.{self.role}"


Node: TypeAlias = Embedding | Head | MLP | Neuron | Logits | Reader

_FORMS = re.compile(
    r"L(?P<hl>\d+)H(?P<hh>\d+)(?:\.(?P<role>[qkv]))?|MLP(?P<ml>\d+)|L(?P<nl>\d+)N(?P<ni>\d+)",
    re.ASCII,
)


def parse(text: str) -> Node:
    """Return the node that prints as ``text``.

    Args:
        text: A printed name.

    Returns:
        The node.

    Raises:
        ArgumentError: If no node prints like that.

    Example:
        >>> parse("L1H3.q")
        Reader(node=Head(layer=1, head=3), role='q')
        >>> str(parse("MLP2"))
        'MLP2'
    """
    if text in ("embed", "logits"):
        return Embedding() if text == "embed" else Logits()
    found = _FORMS.fullmatch(text)
    if found is None:
        raise ArgumentError.of(
            "node",
            expected="a name such as L1H3, L1H3.q, MLP2, L2N17, embed or logits",
            got=repr(text),
            do="Layers and heads count from 0.",
        )
    part = found.groupdict()
    if part["ml"] is not None:
        return MLP(int(part["ml"]))
    if part["nl"] is not None:
        return Neuron(int(part["nl"]), int(part["ni"]))
    head = Head(int(part["hl"]), int(part["hh"]))
    return head if part["role"] is None else Reader(head, part["role"])  # type: ignore[arg-type]
