"""Names of the parts of a model."""

from __future__ import annotations

import pytest

from lightning_mi import MLP, ArgumentError, Embedding, Head, Logits, Neuron, Reader, parse
from lightning_mi.nodes import Node

PRINTED = {
    "embed": Embedding(),
    "logits": Logits(),
    "L0H0": Head(0, 0),
    "L11H12": Head(11, 12),
    "L1H3.q": Reader(Head(1, 3), "q"),
    "L1H3.k": Reader(Head(1, 3), "k"),
    "L1H3.v": Reader(Head(1, 3), "v"),
    "MLP2": MLP(2),
    "L2N17": Neuron(2, 17),
}


@pytest.mark.parametrize(("text", "node"), PRINTED.items())
def test_print_and_parse_are_inverse(text: str, node: Node) -> None:
    assert str(node) == text
    assert parse(text) == node


@pytest.mark.parametrize(
    "text",
    ["", "L1", "L1H", "H3", "l1h3", "L1H3.z", "L1H3.", "MLP", "MLP2.q", "L-1H3", "L1H3\n", "L١H3"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="node: expected a name such as L1H3"):
        parse(text)


def test_nodes_sort_and_serve_as_keys() -> None:
    heads = [Head(1, 0), Head(0, 10), Head(0, 2)]
    assert sorted(heads) == [Head(0, 2), Head(0, 10), Head(1, 0)]
    assert len({*heads, Head(0, 2), Reader(Head(0, 2), "q"), Reader(Head(0, 2), "q")}) == 4
