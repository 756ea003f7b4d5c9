"""Path patching beside exact patching of edges, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped import Grouped, prompts
from hand_built import bits, gate, induction, repeats

from lightning_mi import Behavior, measure
from lightning_mi.circuits import (
    Edge,
    PathPatching,
    activation_patching,
    edge_patching,
    path_patching,
)
from lightning_mi.errors import ArgumentError
from lightning_mi.nodes import MLP, Embedding, Head, Logits, Reader

EDGES = [
    (Head(0, 0), Reader(Head(1, 0), "k")),
    (Head(0, 0), Reader(Head(1, 0), "v")),
    (Head(0, 1), Reader(Head(1, 1), "q")),
    (Head(0, 0), Logits()),
    (Head(1, 0), Logits()),
]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_a_direct_path_is_an_edge(direction: Any) -> None:
    model, pair = induction(), repeats()
    edges = edge_patching(model, pair, direction=direction)
    for sender, receiver in EDGES:
        exact = float(edges.effects[edges.graph.index(Edge(str(sender), str(receiver)))])
        found = path_patching(model, pair, sender=sender, receivers=receiver, direction=direction)
        assert float(found.values) == pytest.approx(exact, abs=1e-4)
    if direction == "noise":
        told = path_patching(
            model, pair, sender=Head(0, 0), receivers=Reader(Head(1, 0), "k"), direction="noise"
        )
        assert float(told.values) == pytest.approx(1.0, abs=1e-3)
        assert told.convention["mlps"] == "frozen"
        assert told.convention["receivers"] == ["L1H0.k"]


def test_mlps_pass_on_what_reaches_them_only_if_they_are_recomputed() -> None:
    model, pair = gate("or"), bits()
    made: dict[str, Any] = {"sender": Head(0, 0), "receivers": Logits(), "direction": "denoise"}
    assert float(path_patching(model, pair, **made).values) == pytest.approx(0.0, abs=1e-4)
    through = path_patching(model, pair, mlps="recomputed", **made)
    assert float(through.values) == pytest.approx(1.0, abs=1e-4)
    direct = path_patching(model, pair, sender=Head(0, 0), receivers=MLP(0))
    assert float(direct.values) == pytest.approx(1.0, abs=1e-4)
    both = path_patching(model, pair, sender=Embedding(), receivers=MLP(0))
    assert float(both.values) == pytest.approx(0.0, abs=1e-4)  # The gate reads heads alone.


def test_all_heads_at_once_are_what_each_is_alone() -> None:
    model = Grouped().eval()
    clean, corrupted = prompts()
    pair = Behavior(clean, corrupted, target=2)
    receivers = [Reader(Head(1, 2), "q"), Reader(Head(1, 0), "v"), MLP(1)]
    whole = path_patching(model, pair, receivers=receivers, reduce=None)
    assert whole.axes == ("example", "layer", "head")
    for head in range(4):
        one = path_patching(model, pair, sender=Head(0, head), receivers=receivers, reduce=None)
        assert torch.allclose(one.values, whole.values[:, 0, head], atol=1e-5)
    assert float(whole.values[:, 0].abs().min()) > 0.0
    last = path_patching(model, pair, receivers=[Reader(Head(1, 2), "q")])
    assert bool((last.values[1] == 0).all())  # No path leads back.
    # Everything that reads, all heads of the last layer as senders: what patching them gives.
    direct = path_patching(model, pair, receivers=Logits(), mlps="recomputed").values[1]
    assert torch.allclose(direct, activation_patching(model, pair).values[1], atol=1e-4)


def test_a_sender_can_be_patched_at_one_position() -> None:
    model = induction()
    pair = repeats()
    where = Behavior(
        pair.clean, pair.corrupted, answers=pair.answers, wrong=pair.wrong,
        positions={"after": [2, 3, 4, 5], "end": -1},
    )  # fmt: skip
    made: dict[str, Any] = {"sender": Head(0, 0), "receivers": Reader(Head(1, 0), "k")}
    at = [
        float(path_patching(model, where, positions=p, direction="noise", **made).values)
        for p in ("all", "after", "end")
    ]
    spot = int((pair.clean != pair.corrupted).nonzero()[0, 1])
    assert at[0] == pytest.approx(1.0, abs=1e-3)
    assert spot == 1
    assert at[2] == pytest.approx(0.0, abs=1e-3)
    assert at[1] == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_said_where_the_metric_coincides_and_nonsense_is_refused() -> None:
    model, pair = induction(), repeats()
    same = Behavior(pair.clean, pair.clean.clone(), answers=pair.answers, wrong=pair.wrong)
    found = path_patching(model, same, receivers=Logits())
    assert bool(found.values.isnan().all())
    assert "no difference" in found.convention["reason"]
    one: Any
    for match, one in (
        ("receivers", {"receivers": []}),
        ("receivers", {"receivers": [Logits(), MLP(0)]}),
        ("sender", {"receivers": Reader(Head(0, 0), "q"), "sender": Head(1, 0)}),
        ("sender", {"receivers": Logits(), "sender": Logits()}),
        ("mlps", {"receivers": Logits(), "mlps": "melted"}),
        ("positions", {"receivers": Logits(), "positions": "each"}),
        ("position", {"receivers": Logits(), "positions": "nowhere"}),
        ("L0H9", {"receivers": Logits(), "sender": Head(0, 9)}),
        ("L1H7", {"receivers": Reader(Head(1, 7), "k")}),
    ):
        with pytest.raises(ArgumentError, match=match):
            path_patching(model, pair, **one)


def test_it_runs_as_a_measurement_from_names() -> None:
    model, pair = induction(), repeats()
    (record,) = measure(model, PathPatching(pair, ("L1H0.k",), direction="noise"))
    assert record.name == "path_patching/effect"
    assert float(record.panel.values[0, 0]) == pytest.approx(1.0, abs=1e-3)
    assert record.panel.convention["direction"] == "noise"
