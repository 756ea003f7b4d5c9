"""Where clean and corrupted prompts give the same, as at step 0: NaN with the reason."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mi import Behavior, Record, circuits, measure
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import (
    Circuit,
    CircuitHypothesis,
    Removes,
    Step,
    edge_patching,
    faithfulness_curve,
)
from lightning_mi.errors import ArgumentError

V = 40
REASON = ("there is no difference that", "noise changes nothing")


def model(*, silent: bool = False) -> nn.Module:
    """Return a tiny model; a silent one answers 0 whatever it reads, as one at step 0 may."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=V, n_positions=64, bos_token_id=0,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    made = GPT2LMHeadModel(config).eval()
    if silent:
        with torch.no_grad():
            made.lm_head.weight.zero_()
    return made


def behavior(*, same: bool = False) -> Behavior:
    made = RepeatedTokens(V, length=6, sequences=4).behavior("trigger")
    made = dataclasses.replace(made, positions={**made.positions, "query": 2})
    return dataclasses.replace(made, corrupted=made.clean) if same else made


# Steps without prior expectations take every part of their kind.
STATED = CircuitHypothesis(
    "all of it",
    (
        Step("heads", posterior=(Removes(0.5, "mean"),)),
        Step("units", kind="mlp", posterior=(Removes(0.2, "zero"),)),
    ),
)
Made = Callable[[Behavior], Any]
MEASURED: dict[str, Made] = {
    "ActivationPatching": circuits.ActivationPatching,
    "AttributionPatching": lambda b: circuits.AttributionPatching(b, corrections=("graddrop",)),
    "PathPatching": lambda b: circuits.PathPatching(b, ("L1H0.k",)),
    "SubspacePatching": lambda b: circuits.SubspacePatching(b, "L0H0"),
    "Align": lambda b: circuits.Align(b, "resid1", steps=2, reader="logits"),
    "CircuitScorecard": lambda b: circuits.CircuitScorecard(b, controls=1),
    "EdgeAttribution": lambda b: circuits.EdgeAttribution(b, steps=2),
    "HypothesisTest": lambda b: circuits.HypothesisTest(b, STATED),
    "Functions": lambda b: circuits.Functions(functions=(), behaviors={"own": b}),
    "FunctionalSubspaces": lambda b: circuits.FunctionalSubspaces({"own": b}, ("MLP0", "L1H0")),
    "AttentionKnockout": lambda b: circuits.AttentionKnockout(b, target="query"),
    "SubjectTracing": lambda b: circuits.SubjectTracing(b, subject="query", draws=1),
    "Characteristics": circuits.Characteristics,
}
# What is no share of the difference: sizes, the metric itself, patterns and weights.
DEFINED = {
    "SubjectTracing": {"total"},
    "EdgeAttribution": {"clean", "corrupted"},
    "HypothesisTest": {"fit_heads", "fit_units"},
    "FunctionalSubspaces": {"rank", "effective_rank", "overlap"},
    "Functions": {"multiplexing", "layer_functions"},
}  # fmt: skip


def told(reason: object) -> bool:
    """Return whether it is said that there is nothing to have a share of."""
    return any(words in str(reason) for words in REASON)


def names() -> set[str]:
    """Return measurements that are about a behavior."""
    kinds = {n: getattr(circuits, n) for n in circuits.__all__}
    return {
        name
        for name, kind in kinds.items()
        if inspect.isclass(kind)
        and dataclasses.is_dataclass(kind)
        and "__call__" in vars(kind)
        and {f.name for f in dataclasses.fields(kind)} & {"behavior", "behaviors"}
    }


def test_every_measurement_about_a_behavior_is_asked() -> None:
    assert names() == set(MEASURED)


@pytest.mark.parametrize("name", sorted({*MEASURED} - {"Characteristics"}))
@pytest.mark.parametrize("state", ["silent model", "same prompts"])
def test_a_share_of_nothing_is_nan_with_the_reason(name: str, state: str) -> None:
    if (name, state) == ("SubjectTracing", "same prompts"):
        pytest.skip("tracing corrupts prompts itself, with noise")
    silent = state == "silent model"
    records = measure(model(silent=silent), MEASURED[name](behavior(same=not silent)))
    shares = [r for r in records if r.what not in DEFINED.get(name, ())]
    assert shares
    for record in shares:
        assert bool(record.panel.values.isnan().all()), record.what
        assert told(record.panel.convention["reason"]), record.what


@pytest.mark.parametrize("name", sorted({*MEASURED} - {"Characteristics"}))
def test_where_they_differ_the_same_shares_are_numbers(name: str) -> None:
    records = measure(model(), MEASURED[name](behavior()))
    shares = [r for r in records if r.what not in DEFINED.get(name, ())]
    assert any(bool(r.panel.values.isfinite().any()) for r in shares)
    assert not any(told(r.panel.convention.get("reason")) for r in shares)


def scores_at_step_0(made: circuits.CircuitScorecard) -> dict[str, Any]:
    """Return the panels of a card in a sweep, which nothing may stop."""
    panels = {r.what: r.panel for r in measure(model(), made)}
    assert math.isnan(panels["faithfulness"].item())
    assert told(panels["faithfulness"].convention["reason"])
    return panels


@pytest.mark.parametrize("n_edges", [None, 5])
def test_a_search_that_finds_nothing_is_undefined_wherever_it_would_be_judged(
    n_edges: int | None,
) -> None:
    """The prompts of the search coincide, those of the judge do not."""
    whole = behavior()
    card = circuits.CircuitScorecard(whole, n_edges=n_edges, controls=1, seed=3)
    found_on, _ = whole.split(card.share, card.seed)
    corrupted = whole.corrupted.clone()
    for row in range(len(whole)):
        if bool((found_on.clean == whole.clean[row]).all(1).any()):
            corrupted[row] = whole.clean[row]
    part = dataclasses.replace(whole, corrupted=corrupted)
    panels = scores_at_step_0(dataclasses.replace(card, behavior=part))
    assert all(math.isnan(panels[name].item()) for name in ("edges", "nodes", "bits"))


def test_an_ablation_that_changes_nothing_stops_no_sweep() -> None:
    """Scores, from corrupted prompts, are defined; shares of what zeros change are not."""
    pair = dataclasses.replace(behavior().select([0, 0]), target=7)
    graph = edge_patching(model(), pair).graph
    alone = Circuit(graph, ()).run(model(), pair, ablation="zero")
    # Without any of the embeddings norms magnify what rounding leaves, so two digits are asked for.
    whole, zeroed = (round(float(m[0]), 2) for m in (alone.clean, alone.ablated))

    def as_far_from_either_run(outputs: Tensor, batch: object) -> Tensor:
        logit = outputs[:, -1, 7]
        rounded = logit + (logit.round(decimals=2) - logit).detach()
        return (rounded - (whole + zeroed) / 2) ** 2

    asked = dataclasses.replace(pair, target=as_far_from_either_run)
    assert edge_patching(model(), asked).reason is None
    scores_at_step_0(circuits.CircuitScorecard(asked, ablation="zero", controls=1))
    with pytest.raises(ArgumentError, match="no difference"):
        circuits.smallest_circuit(model(), asked, edge_patching(model(), asked), ablation="zero")


def test_a_kept_circuit_has_its_size_where_nothing_is_defined(tmp_path: Path) -> None:
    found = edge_patching(model(), behavior()).circuit(n_edges=4)
    found.save(tmp_path / "kept.json")
    same = behavior(same=True)
    made = circuits.CircuitScorecard(same, circuit=str(tmp_path / "kept.json"), controls=1)
    assert scores_at_step_0(made)["edges"].item() == len(found)


def test_functions_say_it_too() -> None:
    plain, same = model(), behavior(same=True)
    exact = edge_patching(plain, same)
    assert bool(exact.values.isnan().all())
    assert told(exact.reason)
    nodes = circuits.node_attribution(plain, same)
    assert bool(nodes.values.isnan().all())
    assert told(nodes.convention["reason"])
    circuit = Circuit(exact.graph, exact.graph.edges(exact.graph.lawful))
    outcome = circuit.run(plain, same)
    assert math.isnan(outcome.faithfulness)
    assert told(outcome.reason)
    assert told(circuit.scorecard(plain, same, controls=1).reason)
    assert math.isnan(faithfulness_curve(plain, same, exact).cpr)
    # What returns a circuit has none to return.
    for search in (circuits.smallest_circuit, lambda m, b, s: circuits.acdc(m, b)):
        with pytest.raises(ArgumentError, match=r"no difference|nothing to carry"):
            search(plain, same, exact)


def test_characteristics_divide_by_nothing() -> None:
    """They compare answers, so they are told at step 0 as well."""
    records: list[Record] = measure(
        model(silent=True), circuits.Characteristics(behavior(same=True))
    )
    assert all(bool(r.panel.values.isfinite().all()) for r in records)
