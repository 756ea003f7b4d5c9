"""Circuits whose edges carry positions: identities, and a forward pass written out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import hand_built as built
import pytest
import torch
from test_edges import model_of, prompts
from torch import Tensor

import lightning_mi as mi
from lightning_mi.circuits import Circuit, Edge, Graph, edge_attribution
from lightning_mi.circuits.causal.bench import on_bench
from lightning_mi.circuits.causal.where import cells, coded, complement, reach


def graph_of(model: Any, behavior: mi.Behavior) -> Graph:
    with on_bench(model, behavior) as bench:
        return bench.graph


def everywhere(edge: Edge, length: int) -> list[Edge]:
    """Return an edge once for each position, or pair of positions."""
    steps = range(length)
    if edge.reader.endswith((".k", ".v")):
        return [Edge(edge.writer, edge.reader, s, t) for t in steps for s in range(t + 1)]
    return [Edge(edge.writer, edge.reader, s, s) for s in steps]


class Twin:
    """The hand-built models, position by position: each input adds up what live edges carry."""

    def __init__(self, model: built.Built, clean: Tensor, corrupted: Tensor) -> None:
        self.model, self.length = model, clean.shape[1]
        self.ids = {"clean": clean, "corrupted": corrupted}

    def logits(self, live: set[Edge]) -> Tensor:
        """Return the logits when only some edges carry what is written in this very run."""
        model, own = self.model, {"clean": {}, "corrupted": {}}
        for run, written in own.items():
            written["embed"] = model.embed(self.ids[run])
            written["pos"] = model.pos(torch.arange(self.length)).expand_as(written["embed"])
        self.live, self.own = live, own
        for layer, block in self.layers():
            made = {run: self.block(run, layer, block) for run in own}
            for run, parts in made.items():
                own[run].update(parts)
        rows = [self.read("clean", "logits", t, t) for t in range(self.length)]
        return model.unembed(torch.stack(rows, 1))

    def layers(self) -> list[tuple[int, Any]]:
        """Return blocks with their layers: a gate belongs to the attention before it."""
        found, layer = [], -1
        for block in self.model.blocks:
            layer += isinstance(block, built.Heads)
            found.append((layer, block))
        return found

    def read(self, run: str, reader: str, source: int, target: int) -> Tensor:
        total = torch.zeros(())
        for writer, corrupted in self.own["corrupted"].items():
            alive = run == "clean" and Edge(writer, reader, source, target) in self.live
            total = total + (self.own["clean"][writer] if alive else corrupted)[:, source]
        return total

    def block(self, run: str, layer: int, block: Any) -> dict[str, Tensor]:
        steps = range(self.length)
        if isinstance(block, built.Gate):
            rows = [block(self.read(run, f"MLP{layer}", t, t)) for t in steps]
            return {f"MLP{layer}": torch.stack(rows, 1)}
        return {
            f"L{layer}H{h}": torch.stack([self.head(run, layer, h, block, t) for t in steps], 1)
            for h in range(len(block.W_Q))
        }

    def head(self, run: str, layer: int, h: int, block: Any, target: int) -> Tensor:
        name = f"L{layer}H{h}"
        q = self.read(run, f"{name}.q", target, target) @ block.W_Q[h]
        sources = range(target + 1)
        k, v = (
            torch.stack([self.read(run, f"{name}.{r}", s, target) @ W for s in sources], 1)
            for r, W in (("k", block.W_K[h]), ("v", block.W_V[h]))
        )
        pattern = torch.einsum("bk,bsk->bs", q, k).softmax(-1)
        return torch.einsum("bs,bsk->bk", pattern, v) @ block.W_O[h]


@pytest.fixture(scope="module")
def drawn() -> tuple[built.Built, mi.Behavior, Graph]:
    """Two layers of two heads and an MLP with random weights, in which every edge counts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 10**-0.5

    def heads() -> built.Heads:
        made = [built.HeadWeights(*(random(10, 4) for _ in range(3)), random(4, 10)) for _ in "ab"]
        return built.Heads(made, torch.eye(10))

    gate = built.Gate(random(10, 12), random(12), random(12, 10), torch.eye(10))
    blocks = [heads(), gate, heads()]
    model = built.Built(random(31, 10), random(7, 10), blocks, 5 * random(10, 31), torch.eye(10))
    model, behavior = model.double(), prompts()
    return model, behavior, graph_of(model, behavior)


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_run_is_what_is_written_out_by_hand(
    drawn: tuple[built.Built, mi.Behavior, Graph], share: float
) -> None:
    model, behavior, graph = drawn
    single = [e for edge in graph.edges(graph.lawful) for e in everywhere(edge, 7)]
    lucky = torch.rand(len(single), generator=torch.Generator().manual_seed(1)) < share
    chosen = [e for e, there in zip(single, lucky.tolist(), strict=True) if there]
    twin = Twin(model, behavior.clean, behavior.corrupted)
    circuit = Circuit(graph, tuple(chosen))
    with torch.no_grad():
        wanted = behavior.metric(twin.logits(set(chosen)))
        rest = behavior.metric(twin.logits(set(single) - set(chosen)))
    outcome = circuit.run(model, behavior)
    assert torch.allclose(outcome.metric, wanted, atol=1e-6)
    assert torch.allclose(circuit.ablate(model, behavior).metric, rest, atol=1e-6)
    assert not torch.allclose(wanted, outcome.clean, atol=1e-2)
    assert not torch.allclose(wanted, outcome.ablated, atol=1e-2)


@pytest.mark.parametrize("kind", ["and", "or"])
def test_gates_between_positions_are_what_is_written_out_by_hand(kind: Any) -> None:
    model, behavior = built.gate(kind, hop=True).double(), built.bits(hop=True)
    graph = graph_of(model, behavior)
    wires = {
        Edge("embed", "L0H0.v", 0, 1),
        Edge("L0H0", "MLP0", 1, 1),
        Edge("MLP0", "L1H0.v", 1, 3),
        Edge("L1H0", "logits", 3, 3),
    }
    twin = Twin(model, behavior.clean, behavior.corrupted)
    for chosen in (wires, wires | {Edge("embed", "L0H1.v", 0, 1), Edge("L0H1", "MLP0", 1, 1)}):
        outcome = Circuit(graph, tuple(chosen)).run(model, behavior)
        with torch.no_grad():
            wanted = behavior.metric(twin.logits(chosen))
        assert torch.allclose(outcome.metric, wanted, atol=1e-6)
    assert outcome.faithfulness == pytest.approx(1.0, abs=1e-6)
    late = [e if e.reader != "L1H0.v" else Edge("MLP0", "L1H0.v", 1, 2) for e in wires]
    assert Circuit(graph, tuple(late)).run(model, behavior).faithfulness == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
def test_all_edges_at_all_positions_are_the_model(name: str) -> None:
    model, behavior = model_of(name), prompts(2, length=5)
    graph = graph_of(model, behavior)
    whole = [e for edge in graph.edges(graph.lawful) for e in everywhere(edge, 5)]
    outcome = Circuit(graph, tuple(whole)).run(model, behavior)
    assert torch.allclose(outcome.metric, outcome.clean, atol=1e-4)
    assert not torch.allclose(outcome.clean, outcome.ablated, atol=1e-2)


@pytest.mark.parametrize("ablation", ["corrupted", "mean", "zero"])
def test_edges_at_all_positions_are_edges_without_positions(ablation: Any) -> None:
    model, behavior = model_of("llama"), prompts()
    graph = graph_of(model, behavior)
    chosen = torch.rand(graph.lawful.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = Circuit(graph, graph.edges(chosen & graph.lawful))
    # Some of them everywhere, some with one end free, some spelled out.
    ways = [
        lambda e: [e],
        lambda e: [dataclasses.replace(e, source=s) for s in range(7)],
        lambda e: [dataclasses.replace(e, target=t) for t in range(7)],
        lambda e: everywhere(e, 7),
    ]
    spelled = [s for i, e in enumerate(plain.edges) for s in ways[i % 4](e)]
    same = Circuit(graph, tuple(spelled))
    for act in ("run", "ablate"):
        wanted = getattr(plain, act)(model, behavior, ablation=ablation)
        found = getattr(same, act)(model, behavior, ablation=ablation)
        assert torch.allclose(found.metric, wanted.metric, atol=1e-4)
        assert not torch.allclose(found.metric, found.clean, atol=1e-2)


def test_positions_are_counted_and_their_complement_is_the_rest() -> None:
    model, behavior = built.induction(), built.repeats()
    graph = graph_of(model, behavior)
    edges = [
        Edge("embed", "L0H0.v"),  # 36 pairs that look back
        Edge("embed", "L0H0.k", source=2),  # 6 targets
        Edge("embed", "L0H1.v", target=2),  # 3 sources
        Edge("embed", "logits", source=1),  # 1
        Edge("L0H0", "logits"),  # 8
        Edge("L0H1", "L1H0.k", 1, 5),
        Edge("L0H1", "L1H0.k", 2, 5),
    ]
    codes, table = coded(graph, edges, 8)
    assert table is not None
    assert cells(graph, codes, table) == 36 + 6 + 3 + 1 + 8 + 2
    whole = int(reach(graph, 8).sum())
    assert cells(graph, complement(codes, graph.lawful), table) == whole - 56
    assert torch.equal(complement(complement(codes, graph.lawful), graph.lawful), codes)


def test_the_scorecard_of_a_circuit_with_positions() -> None:
    model, behavior = built.induction(), built.repeats(pairs=2)
    behavior = behavior.select([0, 0, 1, 1])  # The trigger stands at 1, its answer at 2.
    graph = graph_of(model, behavior)
    edges = [Edge("L1H0", "logits", 7, 7)]
    for at in (1, 2):
        edges += [Edge("embed", "L0H0.v", at, at + 1), Edge("L0H0", "L1H0.k", at + 1, 7)]
    circuit = Circuit(graph, tuple(edges))
    card = circuit.scorecard(model, behavior, untrained=built.induction(beta=0.0), controls=2)
    assert card.faithfulness.value == pytest.approx(1.0, abs=1e-3)
    assert card.rest.value == pytest.approx(0.0, abs=1e-3)
    assert card.incompleteness.value == pytest.approx(0.0, abs=1e-3)
    assert (card.edges, card.nodes) == (5, 4)
    assert card.all_edges == int(reach(graph, 8).sum())
    assert 0 < card.bits < card.all_edges
    assert "reads embed by its values" in card.sentences["L0H0"]
    assert card.reading()["circuit"].coords["edge"][0] == "embed@1->L0H0.v@2"
    assert card.html().count("<path") == 5
    # At other positions nothing of it is left.
    moved = [dataclasses.replace(e, source=5, target=6) for e in edges if e.reader == "L0H0.v"]
    off = Circuit(graph, (*moved, *(e for e in edges if e.reader != "L0H0.v")))
    assert off.run(model, behavior).faithfulness == pytest.approx(0.0, abs=1e-3)


def test_a_circuit_with_positions_grows_and_shrinks(
    drawn: tuple[built.Built, mi.Behavior, Graph],
) -> None:
    model, behavior, _ = drawn
    scores = edge_attribution(model, behavior, steps=5)
    edges = (Edge("embed", "logits", 6, 6), Edge("embed", "L1H0.v"), Edge("L1H0", "logits", 6, 6))
    circuit = Circuit(scores.graph, edges, scores=scores)
    assert set(circuit.grow(2).edges) > set(edges)
    assert len(circuit.grow(2)) == 5
    smaller = circuit.shrink()
    assert set(smaller.edges) < set(edges)
    assert all(e.source == 6 for e in smaller.edges if e.reader == "logits")


@pytest.mark.parametrize("edge", [Edge("embed", "L0H0.v", source=-1), Edge("embed", "MLP0", 9, 9)])
def test_positions_that_cannot_be_are_refused(edge: Edge) -> None:
    model, behavior = model_of("gpt2"), prompts()
    with pytest.raises(mi.errors.ArgumentError, match="edges"):
        Circuit(graph_of(model, behavior), (edge,)).run(model, behavior)


def test_whether_positions_look_back_only_is_seen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Both(GPT2LMHeadModel):
        """Every position sees every other one."""

        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            rows = input_ids.shape[1]
            mask = torch.zeros(len(input_ids), 1, rows, rows)
            return super().forward(input_ids, attention_mask=mask, **more)

    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    backwards = Edge("embed", "L0H0.v", source=3, target=1)
    assert graph_of(model_of("gpt2"), prompts()).causal
    model = Both(config).eval()
    graph = edge_attribution(model, prompts()).graph
    assert not graph.causal
    outcome = Circuit(graph, (backwards, Edge("L0H0", "logits"))).run(model, prompts())
    assert torch.isfinite(outcome.metric).all()
    with pytest.raises(mi.errors.ArgumentError, match="causal"):
        Circuit(graph_of(model_of("gpt2"), prompts()), (backwards,))
