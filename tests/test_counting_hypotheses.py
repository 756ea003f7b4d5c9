"""By what a model counts: exact decisions on counters whose way is known."""

from __future__ import annotations

import math

import pytest
import torch
from counters import By, Counter, ViT, trained
from torch import nn

from lightning_mi import Behavior, measure
from lightning_mi.behaviors import Counting
from lightning_mi.behaviors.scenes import Scenes
from lightning_mi.circuits import CountingDecompositions, HypothesisTest
from lightning_mi.circuits.hypotheses.interchange import Code, untrained_copy
from lightning_mi.circuits.hypotheses.partitions import Partition, only
from lightning_mi.errors import ArgumentError, ModelError

QUIET = Counting(noise=0.0, shift=0, pairs=8)
RIVALS = CountingDecompositions(pairs=32, scenes=256, draws=3)


@pytest.mark.parametrize(
    ("by", "decision"),
    [
        ("shape", "by shape"),
        ("colour", "by colour"),
        ("column", "by column"),
        ("total", "cell-wise additive"),
        ("cells", "cell-wise additive"),
        ("kinds", "cell-wise additive"),
        ("onehot", "none of these"),
    ],
)
def test_the_way_a_counter_was_built_is_found(by: By, decision: str) -> None:
    evidence = RIVALS.test(Counter(by), QUIET)
    assert evidence.decision == decision
    assert evidence.verdict == ("not" if by == "onehot" else "supported")
    found = {line.step: line for line in evidence.under("existence (posterior)")}
    if decision in found:
        assert found[decision].value == 1.0
        assert found[decision].null < 0.4
    # The answer depends on the site alone, whatever stands there.
    assert evidence.under("connection")[0].value == 1.0
    assert all(line.holds for line in evidence.under("existence (prior)"))


def test_what_works_for_random_cells_as_well_proves_nothing() -> None:
    evidence = RIVALS.test(Counter("cells"), QUIET)
    column = next(line for line in evidence.lines if line.step == "by column")
    assert (column.value, column.null, column.holds) == (1.0, 1.0, False)
    shape = next(
        line for line in RIVALS.test(Counter("kinds"), QUIET).lines if line.step == "by shape"
    )
    # Blue triangles and green discs against the others are swapped as well.
    assert (shape.value, shape.null, shape.holds) == (1.0, 1.0, False)


def test_a_net_of_random_weights_counts_by_none_of_these() -> None:
    evidence = RIVALS.test(untrained_copy(Counter("column"), seed=3), QUIET)
    assert (evidence.decision, evidence.verdict) == ("none of these", "not")
    assert evidence.failing[0].step == "model"  # It does not count at all.
    torch.manual_seed(0)
    evidence = RIVALS.test(ViT(), Counting(pairs=8))
    assert evidence.decision == "none of these"


def test_a_claim_is_tested_against_all_rivals() -> None:
    for claim, verdict in (("column", "supported"), ("shape", "not")):
        stated = CountingDecompositions(claim=claim, pairs=16, scenes=128, draws=1)  # type: ignore[arg-type]
        evidence = stated.test(Counter("column"), QUIET)
        assert (evidence.decision, evidence.verdict) == ("by column", verdict)


def test_tokens_of_single_cells_are_no_aggregation() -> None:
    torch.manual_seed(0)
    stated = CountingDecompositions("blocks.0", position=3, pairs=16, scenes=64, draws=1)
    model = ViT()
    model.blocks = nn.ModuleList([nn.Identity()])  # Nothing looks elsewhere.
    evidence = stated.test(model, QUIET)
    site = evidence.lines[0]
    assert (site.step, site.value, site.holds) == ("site", 1.0, False)
    assert evidence.verdict == "not"
    with pytest.raises(ModelError, match="position="):
        CountingDecompositions("blocks.0", pairs=16, scenes=64).test(model, QUIET)


def test_a_site_inside_a_model_can_be_named() -> None:
    stated = CountingDecompositions("site", pairs=16, scenes=128, draws=1)
    evidence = stated.test(Counter("colour"), QUIET)
    assert evidence.decision == "by colour"
    assert evidence.convention["site"] == "output of site"
    with pytest.raises(ArgumentError, match="site"):
        CountingDecompositions("nowhere").test(Counter("colour"), QUIET)
    with pytest.raises(ArgumentError, match="linear"):
        CountingDecompositions().test(nn.Conv2d(3, 17, 32), QUIET)


def test_a_number_as_the_output_will_do() -> None:
    class Number(Counter):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return self.head(self.site(self._partial(pictures) @ self.turn))

    model = Number("shape")
    model.head = nn.Linear(20, 1)
    with torch.no_grad():
        model.head.weight.copy_(model.turn.sum(0)[None])
        model.head.bias.zero_()
    # A metric of logits has nothing to ask of it, so the kinds change and not the number.
    stated = CountingDecompositions(pairs=16, scenes=128, draws=1)
    from lightning_mi.circuits.hypotheses.counting import _Trial
    from lightning_mi.circuits.hypotheses.interchange import Spot
    from lightning_mi.task import Task

    trial = _Trial(stated, QUIET, Spot(model, Task(), "head", "input"))
    assert trial.partition(Partition.of("shape")).value == 1.0
    assert trial.partition(Partition.of("colour")).value < 0.3


def test_a_model_that_answers_always_the_same_says_nothing() -> None:
    model = Counter("total")
    with torch.no_grad():
        model.head.weight.zero_()
    evidence = RIVALS.test(model, QUIET)
    assert evidence.verdict == "not"
    assert "no difference" in str(evidence.reason)
    verdict = evidence.reading()["verdict"]
    assert math.isnan(verdict.item())
    assert "no difference" in verdict.convention["reason"]


def test_it_runs_on_schedule_and_leaves_the_model_alone() -> None:
    model = Counter("column").train()
    before = [p.clone() for p in model.parameters()]
    test = HypothesisTest(QUIET, CountingDecompositions(pairs=16, scenes=128, draws=1), "counting")
    found = {r.name: r.panel for r in measure(model, test)}
    assert found["counting/verdict"].item() == 1.0
    assert found["counting/verdict"].convention["decision"] == "by column"
    assert found["counting/by_column_interchange"].item() == 1.0
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_behaviors_are_refused() -> None:
    pairs = Behavior(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ArgumentError, match="Counting"):
        CountingDecompositions().test(Counter("total"), pairs)
    for wrong in ({"claim": "size"}, {"rank": 0}, {"at_least": 0.0}, {"pairs": 3}):
        with pytest.raises(ArgumentError):
            CountingDecompositions(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------ parts


def test_partitions_count_what_the_scenes_hold() -> None:
    scenes = Scenes.drawn(40, torch.Generator().manual_seed(0))
    for name in ("shape", "colour", "column"):
        assert torch.equal(Partition.of(name).counts(scenes), scenes.counts(name))
    assert torch.equal(Partition.of("total").counts(scenes)[:, 0], scenes.totals)
    generator = torch.Generator().manual_seed(1)
    for name in ("shape", "column"):
        other = Partition.of(name).shuffled(generator)
        assert torch.equal(
            other.table.flatten().bincount(), Partition.of(name).table.flatten().bincount()
        )
        assert torch.equal(other.counts(scenes).sum(1), scenes.totals)
    # Columns are shuffled by whole cells.
    assert bool((other.table == other.table[:, :, :1, :1]).all())
    half = torch.zeros(40, 4, 4, dtype=torch.bool)
    half[:, :2] = True
    assert torch.equal(only(scenes, half).totals, scenes.filled[:, :2].sum((1, 2)))


def test_a_code_reads_each_count_apart_where_they_are_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (200, 3), generator=generator)
    directions = torch.randn(3, 10, generator=generator).double()
    h = counts.double() @ directions + 2.0
    code = Code.fitted(h, counts)
    product = torch.einsum("lad,dmb->lamb", code.W, code.R)[:, 0, :, 0]
    assert torch.allclose(product, torch.eye(3).double(), atol=1e-6)
    level = torch.full((100,), 1)
    moved = code.moved(h[:100], h[100:] - h[:100], level)
    expected = counts[:100].clone()
    expected[:, 1] = counts[100:, 1]
    assert torch.allclose(moved, expected.double() @ directions + 2.0, atol=1e-6)


def test_a_code_of_the_total_alone_moves_an_equal_share() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (200, 4), generator=generator)
    h = counts.sum(1, keepdim=True).double() @ torch.randn(1, 6, generator=generator).double()
    code = Code.fitted(h, counts)
    moved = code.moved(h[:1], h[1:2] - h[:1], torch.tensor([2]))
    assert torch.allclose(moved, h[:1] + (h[1:2] - h[:1]) / 4, rtol=1e-3)


# ------------------------------------------------------------ a trained model


@pytest.mark.slow
def test_a_vision_transformer_that_learned_totals_counts_by_none_of_these() -> None:
    stated = CountingDecompositions("blocks.1", position=0, rank=8)
    before = stated.test(trained(0), Counting())
    assert before.decision == "none of these"
    assert before.failing[0].step == "model"
    after = stated.test(trained(300), Counting())
    assert all(line.holds for line in after.under("existence (prior)"))
    assert after.under("connection")[0].value > 0.9
    # The total stands there, in several dimensions (.78 of the swaps); parts of it do not.
    total = next(line for line in after.lines if line.key == "total")
    assert total.value > 0.6
    assert all(line.value < 0.2 for line in after.under("existence (posterior)"))
    assert after.decision == "none of these"
