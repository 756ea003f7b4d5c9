"""Circuits: hand-built truths, identities, and scorecards that are known in advance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import hand_built as built
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_edges import MODELS, model_of, prompts
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi.circuits.causal import (
    Circuit,
    CircuitScorecard,
    Edge,
    EdgeScores,
    Graph,
    acdc,
    edge_attribution,
    edge_patching,
    faithfulness_curve,
    rank_biased_overlap,
    smallest_circuit,
)
from lightning_mi.circuits.causal.bench import on_bench
from lightning_mi.circuits.causal.controls import (
    controls_of,
    random_circuits,
    same_search,
    shuffled,
)
from lightning_mi.circuits.causal.curves import FRACTIONS, areas, share_of_edges
from lightning_mi.circuits.causal.estimates import Draws, Estimate
from lightning_mi.circuits.causal.extraction import strongest
from lightning_mi.circuits.causal.trial import Trial
from lightning_mi.sinks.keys import plan

INDUCTION = {"embed->L0H0.v", "L0H0->L1H0.k", "L1H0->logits"}


def names(circuit: Circuit) -> set[str]:
    return {str(edge) for edge in circuit.edges}


def truth_of(exact: EdgeScores) -> Tensor:
    """Return which edges have an effect, among those that there are."""
    lawful = exact.graph.lawful
    return exact.effects[lawful].abs() > 1e-3


def auroc(scores: EdgeScores, truth: Tensor) -> float:
    keys = scores.values[scores.graph.lawful].abs()
    return float(roc_auc_score(truth.numpy(), keys.numpy()))


@pytest.mark.parametrize("turned", [True, False])
def test_edges_of_the_induction_circuit_are_recovered_but_not_by_one_gradient(
    turned: bool,
) -> None:
    model, behavior = built.induction(turned=turned), built.repeats()
    exact = edge_patching(model, behavior)
    assert {str(e) for e, _ in exact.top(3)} == INDUCTION
    truth = truth_of(exact)
    assert int(truth.sum()) == 3
    assert auroc(edge_attribution(model, behavior, steps=20), truth) == 1.0
    assert auroc(edge_attribution(model, behavior, steps=20, variant="activations"), truth) == 1.0
    plain = edge_attribution(model, behavior)
    missed = Edge("L0H0", "L1H0.k")
    assert abs(plain.of(missed)) < 1e-6 < 0.8 < abs(exact.of(missed))


@pytest.mark.parametrize(
    ("kind", "direction", "value"),
    [("and", "noise", -1), ("and", "denoise", 0), ("or", "noise", 0), ("or", "denoise", 1)],
)
def test_gates_show_in_one_direction_only(
    kind: Literal["and", "or"], direction: Literal["noise", "denoise"], value: float
) -> None:
    exact = edge_patching(built.gate(kind), built.bits(), direction=direction)
    for head in ("L0H0", "L0H1"):
        assert exact.of(Edge(head, "MLP0")) == pytest.approx(value, abs=1e-5)
    assert exact.effects[exact.graph.index(Edge("MLP0", "logits"))] == pytest.approx(1.0)


def test_a_redundant_branch_has_its_value_under_denoising_only() -> None:
    model, behavior = built.gate("or", hop=True), built.bits(hop=True)
    noise = edge_patching(model, behavior)
    denoise = edge_patching(model, behavior, direction="denoise")
    for edge in (Edge("L0H0", "MLP0"), Edge("L0H1", "MLP0")):
        assert noise.of(edge) == pytest.approx(0.0, abs=1e-5)
        assert denoise.of(edge) == pytest.approx(1.0, abs=1e-5)
    for edge in (Edge("MLP0", "L1H0.v"), Edge("L1H0", "logits")):
        assert noise.of(edge) == pytest.approx(-1.0, abs=1e-5)
    found = edge_attribution(model, behavior, steps=4)
    assert auroc(found, truth_of(denoise)) == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_all_edges_are_the_model_and_none_are_full_ablation(name: str) -> None:
    model, behavior = model_of(name), prompts()
    with torch.no_grad():
        clean = behavior.metric(model(behavior.clean).logits)
        corrupted = behavior.metric(model(behavior.corrupted).logits)
    with on_bench(model, behavior) as bench:
        lawful = bench.graph.lawful
        whole, none = bench.metric(torch.stack([lawful, torch.zeros_like(lawful)]))
    assert torch.allclose(whole, clean, atol=1e-4)
    assert torch.allclose(none, corrupted, atol=1e-4)
    assert not torch.allclose(clean, corrupted, atol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "qwen3", "gemma2"])
def test_an_edge_into_the_logits_is_what_a_hand_written_hook_does(name: str) -> None:
    """Into the final norm alone: the head's own write, exchanged there and nowhere else."""
    model, behavior = model_of(name), prompts()
    with on_bench(model, behavior) as bench:
        graph, wiring = bench.graph, bench.wiring
        mask = graph.lawful.clone()
        mask[graph.index(Edge("L0H2", "logits"))] = False
        made = bench.metric(mask[None])[0]
        at = graph.writers.index("L0H2")
        with torch.no_grad():
            runs = [wiring.see(ids) for ids in (behavior.clean, behavior.corrupted)]
            change = wiring.difference(runs[1], runs[0])[at]
        norm = wiring.modules[wiring.anatomy.readers[-1].module]
        handle = norm.register_forward_pre_hook(lambda module, args: (args[0] + change,))
        with torch.no_grad():
            wanted = behavior.metric(model(behavior.clean).logits)
        handle.remove()
    assert torch.allclose(made, wanted, atol=1e-4)


def test_cutting_all_that_reads_a_head_is_patching_its_output() -> None:
    model, behavior = model_of("llama"), prompts()
    with on_bench(model, behavior) as bench:
        mask = bench.graph.lawful.clone()
        mask[bench.graph.writers.index("L0H1")] = False
        made = bench.metric(mask[None])[0]
    with mi.attention.tap(model) as seen, torch.no_grad():
        model(behavior.corrupted)
    z = seen.sites[0].z

    def edit(index: int, own: Tensor) -> Tensor:
        if index:
            return own
        changed = own.clone()
        changed[:, 1] = z[:, 1]
        return changed

    with mi.attention.tap(model, edit), torch.no_grad():
        wanted = behavior.metric(model(behavior.clean).logits)
    assert torch.allclose(made, wanted, atol=1e-4)


class Linear(nn.Module):
    """Attention that is fixed, and no norm: the logits are linear in the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        turn = built.rotation(12)
        torch.manual_seed(0)
        flat = torch.zeros(12, 3)
        heads = [
            [
                built.HeadWeights(flat, flat, torch.randn(12, 3), torch.randn(3, 12))
                for _ in range(2)
            ]
            for _ in range(2)
        ]
        blocks = [built.Heads(own, turn) for own in heads]
        E, P, U = torch.randn(31, 12), torch.randn(8, 12), torch.randn(12, 31)
        self.net = built.Built(E, P, blocks, U, turn)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)


def test_attribution_is_exact_where_the_model_is_linear() -> None:
    model, behavior = Linear().eval(), prompts()
    exact = edge_patching(model, behavior)
    for found in (
        edge_attribution(model, behavior),
        edge_attribution(model, behavior, steps=3),
        edge_attribution(model, behavior, steps=2, variant="activations"),
    ):
        lawful = exact.graph.lawful
        assert torch.allclose(found.values[lawful], exact.values[lawful], atol=1e-4)
    assert float(exact.values[exact.graph.lawful].abs().max()) > 0.1


@pytest.mark.parametrize("how", ["greedy", "top"])
def test_a_circuit_is_taken_from_scores_and_does_it_all(how: Any) -> None:
    model, behavior = built.induction(), built.repeats()
    scores = edge_attribution(model, behavior, steps=20)
    circuit = scores.circuit(n_edges=3, how=how)
    assert names(circuit) == INDUCTION
    assert circuit.nodes == ("embed", "L0H0", "L1H0", "logits")
    assert circuit.run(model, behavior).faithfulness == pytest.approx(1.0, abs=1e-4)
    assert circuit.ablate(model, behavior).faithfulness == pytest.approx(0.0, abs=1e-4)
    assert names(scores.circuit(threshold=0.5)) == INDUCTION
    assert names(acdc(model, behavior)) == INDUCTION
    smaller = circuit.shrink()
    assert len(smaller) < 3
    assert names(circuit.shrink().grow(3)) >= INDUCTION


def test_a_number_of_edges_that_is_none_is_refused() -> None:
    scores = edge_attribution(built.induction(), built.repeats(), steps=5)
    circuit = scores.circuit(n_edges=3)
    calls: list[Any] = [
        lambda: scores.circuit(n_edges=-3, how="top"),  # Would be all but three of them.
        lambda: scores.circuit(n_edges=2.5),  # type: ignore[arg-type]
        lambda: circuit.shrink(-1),  # Would leave one edge.
        lambda: circuit.grow(-1),
    ]
    for call in calls:
        with pytest.raises(mi.errors.ArgumentError, match="an int of at least 0"):
            call()
    assert len(scores.circuit(n_edges=0)) == 0
    assert circuit.shrink(0) == circuit == circuit.grow(0)


def test_what_leads_nowhere_is_pruned() -> None:
    graph = edge_attribution(built.induction(), built.repeats()).graph
    loose = graph.mask([Edge("L0H0", "L1H0.k"), Edge("L1H0", "logits")])
    assert not graph.connected(loose).any()
    whole = graph.mask([Edge("embed", "L0H0.v")]) | loose
    assert torch.equal(graph.connected(whole | graph.mask([Edge("embed", "L0H1.v")])), whole)


def test_a_circuit_is_kept_compared_and_drawn(tmp_path: Path) -> None:
    scores = edge_attribution(built.induction(), built.repeats(), steps=20)
    circuit = scores.circuit(n_edges=3)
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert again == circuit
    assert again.weights == pytest.approx(circuit.weights)
    assert again.found_by["method"] == "EAP-IG inputs"
    other = circuit.without([Edge("L1H0", "logits")])
    assert circuit.jaccard(other) == pytest.approx(2 / 3)
    drawing = circuit.svg()
    assert drawing.count("<path") == 3
    assert ">L1H0<" in drawing
    panel = circuit.panel()
    assert panel.axes == ("edge",)
    assert set(panel.coords["edge"]) == INDUCTION


def test_rankings_are_compared_from_the_top() -> None:
    assert rank_biased_overlap([1, 2, 3], [1, 2, 3]) == 1.0
    first, last = rank_biased_overlap("abcd", "abdc"), rank_biased_overlap("abcd", "bacd")
    assert 0.0 < last < first < 1.0
    # By hand: A = 0, 1 with p = 0.5: 0.5/0.5·(0.5·0 + 0.25·1) + 0.25·1.
    assert rank_biased_overlap("ab", "ba", p=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "edge",
    [
        Edge("L1H0", "L0H0.q"),
        Edge("L0H0", "L0H1.k"),
        Edge("L0H0", "nowhere"),
        Edge("embed", "L0H0.v", source=3, target=1),
        Edge("embed", "L0H0.q", source=1, target=2),
    ],
)
def test_edges_that_cannot_be_are_refused_when_a_circuit_is_made(edge: Edge) -> None:
    graph = edge_attribution(built.induction(), built.repeats()).graph
    with pytest.raises(mi.errors.ArgumentError, match="edges"):
        Circuit(graph, (edge,))
    assert len(Circuit(graph, (Edge("embed", "L0H0.v", source=1, target=3),))) == 1
    free = Graph(**{**vars_of(graph), "causal": False})
    assert len(Circuit(free, (Edge("embed", "L0H0.v", source=3, target=1),))) == 1


def vars_of(graph: Graph) -> dict[str, Any]:
    return {n: getattr(graph, n) for n in Graph.__dataclass_fields__}


def test_a_perfect_method_has_the_area_that_the_benchmark_gives_it() -> None:
    assert areas(FRACTIONS, [1.0] * len(FRACTIONS)) == (0.999, 0.0)
    model, behavior = built.induction(), built.repeats()
    curve = faithfulness_curve(model, behavior, edge_patching(model, behavior))
    assert curve.absolute[-1] == pytest.approx(1.0, abs=1e-4)
    assert 0.8 < curve.cpr <= 0.9991
    assert curve.cmd < 0.2
    worst = edge_patching(model, behavior)
    backwards = EdgeScores(worst.graph, -worst.values, worst.clean, worst.corrupted)
    assert faithfulness_curve(model, behavior, backwards).cpr < curve.cpr


@pytest.mark.parametrize(
    ("edges", "given"),
    [
        (42, [1, 1, 1, 1, 1, 3, 5, 9, 21, 42]),
        (100, [1, 1, 1, 1, 2, 5, 10, 20, 50, 100]),
        (999, [1, 2, 5, 10, 20, 50, 100, 200, 500, 999]),
        (1999, [1, 3, 9, 19, 39, 99, 199, 399, 999, 1999]),
        (70_651, [70, 141, 353, 706, 1413, 3532, 7065, 14_130, 35_325, 70_651]),
    ],
)
def test_sizes_are_rounded_down_and_in_small_graphs_up(edges: int, given: list[int]) -> None:
    assert [share_of_edges(f, edges) for f in FRACTIONS] == given
    assert share_of_edges(0.07, 100) == 7  # Though 0.07 * 100 is a little more.


def test_the_scorecard_of_the_induction_circuit() -> None:
    model, behavior = built.induction(), built.repeats(pairs=8)
    found, judged = behavior.split()
    circuit = edge_attribution(model, found, steps=20).circuit(n_edges=3)
    card = circuit.scorecard(model, judged, untrained=built.induction(beta=0.0), controls=4)
    assert card.faithfulness.value == pytest.approx(1.0, abs=1e-3)
    assert card.rest.value == pytest.approx(0.0, abs=1e-3)
    assert card.incompleteness.value == pytest.approx(0.0, abs=1e-3)
    assert card.marginals["L0H0"].alone.value == pytest.approx(1.0, abs=1e-3)
    assert card.redundant == card.idle == ()
    assert card.faithful
    assert (card.edges, card.nodes, card.all_edges) == (3, 4, circuit.graph.n_edges)
    assert card.faithfulness.low <= card.faithfulness.value <= card.faithfulness.high
    against = card.controls
    assert against.untrained is not None
    assert abs(against.untrained.value) < 0.2
    assert len(against.random) == 4
    assert against.shuffled is not None
    assert len(against.searches) == 8
    assert against.shuffled.value == pytest.approx(sum(against.searches) / 8, abs=1e-6)
    assert set(against.margins) == {
        "random circuits",
        "the best random circuit",
        "the same search on shuffled answers",
        "the untrained model",
    }
    assert card.convention["shared_prompts"] == 0
    assert "faithfulness 1.00" in str(card)
    assert "it was found on others" in str(card)
    assert "K-composition" in card.sentences["L1H0"]
    assert "reads L0H0 by its keys" in card.sentences["L1H0"]
    assert "without it 1.00 of the effect is lost" in card.sentences["L0H0"]


def test_a_scorecard_is_panels_and_a_table() -> None:
    model, behavior = built.induction(), built.repeats(pairs=8)
    circuit = edge_attribution(model, behavior, steps=20).circuit(n_edges=3)
    card = circuit.scorecard(model, behavior, controls=2)
    assert card.convention["shared_prompts"] == 8
    reading = card.reading()
    said = reading["faithfulness"].convention
    assert (said["ablation"], said["found_by"]["how"]) == ("corrupted", "greedy")
    assert said["low"] <= reading["faithfulness"].item() <= said["high"]
    assert set(reading["circuit"].coords["edge"]) == INDUCTION
    assert reading["circuit"].convention["writers"] == [e.writer for e in circuit.edges]
    assert "L1H0" in reading["circuit"].convention["sentences"]
    assert reading["marginals"].axes == ("writer",)
    wiring = reading["wiring"]
    assert wiring.axes == ("writer", "reader")
    assert int(wiring.values.isfinite().sum()) == 3
    assert wiring.convention["sign"].startswith("negative: the edge carries")
    assert "L1H0 (copying, induction) reads L0H0 by its keys" in wiring.convention["what"]
    records = [mi.Record(f"scorecard/{name}", panel) for name, panel in reading.items()]
    shown = plan(records)
    assert not shown.pictures
    assert set(shown.scalars) - {"mi/step", "mi/nonfinite"} == {
        f"mi_scorecard/{name}"
        for name in "faithfulness rest incompleteness edges cpr cmd beyond_random".split()
    }
    html = card.html()
    assert html.count("<path") == 3
    assert "8 of them it was found on, too" in html
    assert "<script" not in html


def test_the_measurement_finds_on_some_prompts_and_judges_on_others(tmp_path: Path) -> None:
    model, behavior = built.induction(), built.repeats(pairs=8)
    measured = CircuitScorecard(behavior, steps=20, controls=3)
    records = {r.what: r.panel for r in mi.measure(model, measured)}
    assert records["faithfulness"].item() == pytest.approx(1.0, abs=1e-3)
    assert records["faithfulness"].convention["shared_prompts"] == 0
    assert set(records["circuit"].coords["edge"]) == INDUCTION
    edge_attribution(model, behavior, steps=20).circuit(n_edges=3).save(tmp_path / "kept.json")
    kept = CircuitScorecard(behavior, circuit=str(tmp_path / "kept.json"), controls=0)
    early = {r.what: r.panel for r in mi.measure(built.induction(beta=0.0), kept)}
    assert early["faithfulness"].item() != pytest.approx(1.0, abs=0.1)
    assert early["edges"].item() == 3
    same = mi.Behavior(behavior.clean, behavior.clean, answers=behavior.answers)
    nothing = {r.what: r.panel for r in mi.measure(model, CircuitScorecard(same, controls=0))}
    assert math.isnan(nothing["faithfulness"].item())
    assert "no difference" in nothing["faithfulness"].convention["reason"]


def test_the_smallest_circuit_is_found_edge_by_edge() -> None:
    model, behavior = built.induction(), built.repeats()
    scores = edge_attribution(model, behavior, steps=20)
    found = smallest_circuit(model, behavior, scores)
    assert names(found) == INDUCTION
    assert faithfulness_curve(model, behavior, scores).smallest() == 3
    backwards = EdgeScores(scores.graph, scores.values.exp(), scores.clean, scores.corrupted)
    assert len(smallest_circuit(model, behavior, backwards)) > 3
    same = mi.Behavior(behavior.clean, behavior.clean, answers=behavior.answers)
    with pytest.raises(mi.errors.ArgumentError, match="no difference"):
        smallest_circuit(model, same, scores)


def test_intervals_hold_what_prompts_drawn_anew_would_give() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = Draws(400).estimate(values)
    # Of a mean the middle 95 % is ±1.96 standard errors.
    wide = 1.96 * float(values.std()) / 20
    assert found.high - found.low == pytest.approx(2 * wide, rel=0.1)
    share = Draws(400).share(2 * values + 3, values + 1.5)
    assert (share.low, share.high) == pytest.approx((2.0, 2.0))


def test_one_prompt_says_nothing_about_others() -> None:
    model, behavior = built.induction(), built.repeats()
    circuit = edge_attribution(model, behavior, steps=5).circuit(n_edges=3)
    card = circuit.scorecard(model, behavior.select([0]))
    assert card.faithfulness.value == pytest.approx(1.0, abs=0.02)
    assert card.curve is not None
    ends = (card.faithfulness.low, card.rest.high, *card.curve.cpr_interval)
    assert all(math.isnan(v) for v in ends)
    assert card.controls.margins
    assert not card.beats_controls


def test_the_scorecard_names_redundant_and_idle_parts() -> None:
    model, behavior = built.gate("or", hop=True), built.bits(hop=True)
    graph = edge_attribution(model, behavior).graph
    wires = [
        Edge("embed", "L0H0.v"),
        Edge("embed", "L0H1.v"),
        Edge("L0H0", "MLP0"),
        Edge("L0H1", "MLP0"),
        Edge("MLP0", "L1H0.v"),
        Edge("L1H0", "logits"),
    ]
    card = Circuit(graph, tuple(wires)).scorecard(model, behavior, controls=0)
    assert set(card.redundant) == {"L0H0", "L0H1"}
    assert card.idle == ()
    assert card.marginals["L0H0"].beside == "L0H1"
    assert "not missed alone, but 1.00 is lost once L0H1 is gone" in card.sentences["L0H0"]
    assert "redundant L0H0 (with L0H1), L0H1 (with L0H0)" in str(card)
    assert "shuffled answers" in card.notes
    half = [e for e in wires if "L0H1" not in str(e)]
    short = Circuit(graph, tuple(half)).scorecard(model, behavior, controls=0)
    assert short.faithfulness.value == pytest.approx(1.0, abs=1e-4)
    # Its branch removed, the model goes on by the other one: it is faithful, yet incomplete.
    assert short.rest.value == pytest.approx(0.0, abs=1e-4)
    assert short.incompleteness.value == pytest.approx(1.0, abs=1e-4)


def test_random_circuits_are_connected_and_match_nodes_and_size() -> None:
    graph = edge_attribution(model_of("gpt2"), prompts()).graph
    keys = torch.rand(graph.lawful.shape, generator=torch.Generator().manual_seed(0))
    scores = EdgeScores(graph, keys, 1.0, 0.0)
    mask = scores.circuit(n_edges=20).mask
    drawn = random_circuits(graph, mask, 5, seed=1)
    for one in drawn:
        assert torch.equal(graph.connected(one), one)
        assert abs(int(one.sum()) - int(mask.sum())) <= 3
        assert not torch.equal(one, mask)
    assert torch.equal(drawn, random_circuits(graph, mask, 5, seed=1))


class Counted(Trial):
    """A trial in which the metric is the number of edges, whatever they are."""

    def metric(self, masks: Any) -> Tensor:
        return torch.stack([m.sum().double().expand(len(self.clean)) for m in masks])


def test_shuffles_are_drawn_anew_as_prompts_are() -> None:
    """One search finds all 4 edges, the other one 2: their mean may be 1, .75 or .5."""
    zeros = torch.zeros(4, dtype=torch.float64)
    with on_bench(built.induction(), built.repeats()) as bench:
        trial = Counted(bench, zeros + 4.0, zeros, Draws(4))
        masks = [strongest(bench.graph, bench.graph.lawful.float(), n) for n in (4, 2)]
        both = controls_of(trial, masks[0], masks, 0)
        one = controls_of(trial, masks[0], masks[1:], 0)
    assert both.searches == (1.0, 0.5)
    assert both.shuffled == Estimate(0.75, 0.5, 1.0)
    assert both.beyond_shuffled == Estimate(0.25, 0.0, 0.5)
    assert not both.beaten
    assert one.beyond_shuffled == Estimate(0.5, 0.5, 0.5)
    assert one.beaten


def test_searches_on_shuffled_answers_are_given_as_many_edges() -> None:
    model, behavior = built.induction(), built.repeats(pairs=8)
    scores = edge_attribution(model, behavior, steps=5)
    circuit = scores.circuit(n_edges=6)
    others, why = same_search(model, circuit, scores, behavior, None, count=3)
    assert why is None
    assert len(others) == 3
    assert all(len(circuit) <= int(o.sum()) <= len(circuit) + 2 for o in others)
    assert same_search(model, circuit, scores, behavior, None, count=0) == ([], None)
    nobody, why = same_search(model, circuit, None, behavior, None, count=3)
    assert nobody == []
    assert "scores are at hand" in str(why)


def test_shuffled_answers_leave_no_prompt_its_own() -> None:
    behavior = built.repeats(pairs=6)
    other = shuffled(behavior)
    assert other is not None
    assert behavior.answers is not None
    assert other.answers is not None
    assert sorted(other.answers.tolist()) == sorted(behavior.answers.tolist())
    assert shuffled(built.bits()) is None


def test_a_metric_that_coincides_is_undefined_everywhere() -> None:
    model, behavior = built.induction(), built.repeats()
    same = mi.Behavior(behavior.clean, behavior.clean, answers=behavior.answers)
    exact = edge_patching(model, same)
    assert bool(exact.values.isnan().all())
    assert exact.reason is not None
    circuit = Circuit(exact.graph, (Edge("embed", "logits"),))
    outcome = circuit.run(model, same)
    assert math.isnan(outcome.faithfulness)
    assert outcome.reason is not None
    card = circuit.scorecard(model, same)
    assert math.isnan(card.faithfulness.value)
    assert "undefined" in str(card)
    curve = faithfulness_curve(model, same, exact)
    assert math.isnan(curve.cpr)
    assert curve.reason == exact.reason
    for call in (lambda: exact.circuit(n_edges=3), lambda: acdc(model, same)):
        with pytest.raises(mi.errors.ArgumentError):
            call()


def test_ablation_keeps_biases_and_says_what_it_puts_there() -> None:
    model, behavior = model_of("gpt2"), prompts()
    graph = edge_attribution(model, behavior).graph
    empty = Circuit(graph, ())
    zs: list[Tensor] = []
    with mi.attention.tap(model, lambda i, z: zs.append(z) or torch.zeros_like(z)), torch.no_grad():
        hooks = [
            block.mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            for block in model.transformer.h  # type: ignore[union-attr]
        ]
        hooks += [
            table.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            for table in (model.transformer.wte, model.transformer.wpe)  # type: ignore[union-attr]
        ]
        wanted = behavior.metric(model(behavior.clean).logits)
    for hook in hooks:
        hook.remove()
    outcome = empty.run(model, behavior, ablation="zero")
    assert torch.allclose(outcome.metric, wanted, atol=1e-4)
    with pytest.raises(mi.errors.ArgumentError):
        empty.run(model, behavior, ablation="noise")  # type: ignore[arg-type]


def test_a_circuit_belongs_to_a_model_of_its_form() -> None:
    circuit = edge_attribution(model_of("gpt2"), prompts()).circuit(n_edges=5)
    with pytest.raises(mi.errors.ArgumentError, match=r"12 writers and 27 .*without L0H2"):
        circuit.run(built.induction(), built.repeats())


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Return prompts with two tokens of padding before them."""
    mask = torch.ones_like(ids)
    mask, ids = (torch.nn.functional.pad(t, (2, 0)) for t in (mask, ids))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}


@pytest.mark.parametrize("name", ["gpt2", "gpt2 eager", "gemma2"])
def test_padding_before_prompts_changes_nothing(name: str) -> None:
    """Padding looks everywhere in eager attention that masks with finite numbers."""
    model, plain = model_of(name), prompts()
    other = mi.Behavior(
        padded(plain.clean), padded(plain.corrupted), answers=plain.answers, wrong=plain.wrong
    )
    for score in (edge_attribution, edge_patching):
        one, two = score(model, plain), score(model, other)
        assert one.graph == two.graph
        assert one.graph.causal
        lawful = one.graph.lawful
        assert torch.allclose(one.values[lawful], two.values[lawful], atol=1e-5)
    edges = one.circuit(n_edges=20)
    outcomes = [edges.run(model, b, ablation="mean").metric for b in (plain, other)]
    assert torch.allclose(*outcomes, atol=1e-4)


def test_means_of_half_precision_are_not_rounded_to_it() -> None:
    model, behavior = model_of("gpt2").bfloat16(), prompts()
    with torch.no_grad():
        clean, corrupted = (
            float(behavior.metric(model(b).logits).float().mean())
            for b in (behavior.clean, behavior.corrupted)
        )
    assert clean != float(torch.tensor(clean).bfloat16())
    for scores in (edge_attribution(model, behavior), edge_patching(model, behavior)):
        assert (scores.clean, scores.corrupted) == pytest.approx((clean, corrupted), rel=1e-6)
    outcome = Circuit(scores.graph, ()).run(model, behavior)
    assert outcome.metric.dtype == torch.float32
    assert float(outcome.ablated.mean()) == pytest.approx(corrupted, rel=1e-6)


def test_half_precision_runs() -> None:
    model, behavior = model_of("llama").bfloat16(), prompts()
    scores = edge_attribution(model, behavior, steps=2)
    assert bool(scores.values[scores.graph.lawful].isfinite().all())
    whole = Circuit(scores.graph, scores.graph.edges(scores.graph.lawful))
    assert whole.run(model, behavior).faithfulness == pytest.approx(1.0, abs=0.1)
