"""Subspace interventions and distributed alignment search: planted subspaces and an illusion."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_built import bits, gate, rotation
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mi import Behavior, measure
from lightning_mi.circuits import Align, Residual, SubspacePatching, align, subspace_patching
from lightning_mi.errors import ArgumentError
from lightning_mi.nodes import MLP, Head, Reader


class Planted(nn.Module):
    """One head carries a bit of the first token to the end, along one direction of eight.

    Its value also carries the token's second feature, along a direction that the logits do not
    read (dormant); ``turn`` hides both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(
            torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])
        )
        turn = rotation(8, seed=5)
        self.value = nn.Parameter(torch.eye(2, 8) @ turn)
        read = torch.zeros(8, 2)
        read[0] = torch.tensor([2.0, -2.0])
        self.output = nn.Linear(8, 2, bias=False)
        self.output.weight = nn.Parameter((turn.T @ read).T.contiguous())
        self.turn = turn

    def forward(self, ids: Tensor) -> Tensor:
        v = (self.table(ids) @ self.value)[:, None]
        q = torch.zeros(len(ids), 1, ids.shape[1], 8)
        k = torch.zeros_like(q)
        k[:, :, 0], q = 50.0, q + 1.0
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        out: Tensor = self.output(z[:, 0])
        return out


def pairs(count: int = 8) -> Behavior:
    """Return prompts that differ in the bit, and in the second feature as well.

    What follows is not attended to, and different in each of them.
    """
    row = torch.arange(count)
    first, rest = row % 2, torch.stack([row // 4 % 4, row % 4], 1)
    clean = torch.cat([first[:, None], rest], 1)
    corrupted = torch.cat([3 - first[:, None], rest], 1)
    return Behavior(clean, corrupted, answers=first, wrong=1 - first)


def test_a_subspace_is_split_by_what_the_reader_reads() -> None:
    model, pair = Planted().eval(), pairs()
    reader = model.output.weight.detach().T
    true, dormant = model.turn[:1].T, model.turn[1:2].T
    good = subspace_patching(model, pair, Head(0, 0), true, reader=reader)
    assert good.whole == pytest.approx(1.0, abs=1e-5)
    assert good.inside == pytest.approx(1.0, abs=1e-5)
    assert good.outside == pytest.approx(0.0, abs=1e-5)
    assert good.row == pytest.approx(1.0, abs=1e-5)
    assert good.null == pytest.approx(0.0, abs=1e-5)
    assert max(good.random) < 0.95
    assert good.cautions == ()
    assert good.intervals["inside"].value == good.inside
    beyond = good.intervals["beyond_random"]
    assert beyond.value == pytest.approx(1 - max(good.random, key=abs), abs=1e-5)
    assert 0.05 < beyond.low <= beyond.value <= beyond.high
    none = subspace_patching(model, pair, Head(0, 0), dormant, reader=reader)
    assert none.inside == pytest.approx(0.0, abs=1e-5)


def test_an_illusion_is_told_apart() -> None:
    # The metric's answer is put on the dormant feature: the bit is the same on both prompts, so
    # the model has nothing to exchange, and yet a mixed direction moves it.
    model = Planted().eval()
    clean, corrupted = torch.tensor([[0, 0], [1, 0]]), torch.tensor([[2, 0], [3, 0]])
    exchanged = Behavior(clean, corrupted, answers=torch.tensor([0, 1]), wrong=torch.tensor([1, 0]))
    silent = subspace_patching(model, exchanged, Head(0, 0), model.turn[:2].T)
    assert silent.reason is not None
    assert math.isnan(silent.inside)
    # Bit and dormant feature differ: the sum of both directions does half of what it should.
    mixed = (model.turn[0] + model.turn[1])[:, None]
    pair = Behavior(
        torch.tensor([[0, 0], [0, 0]]), torch.tensor([[3, 0], [3, 0]]),
        answers=torch.tensor([0, 0]), wrong=torch.tensor([1, 1]),
    )  # fmt: skip
    reader = model.output.weight.detach().T
    found = subspace_patching(model, pair, Head(0, 0), mixed, reader=reader, held_out=exchanged)
    # Change is (2, −1): along (1, 1)/√2 it is 1/2 of each; the row space alone carries all of it.
    assert found.inside == pytest.approx(0.25, abs=1e-4)
    assert found.row == pytest.approx(1.0, abs=1e-4)
    assert found.null == pytest.approx(0.0, abs=1e-4)
    assert math.isnan(found.held_out)


def test_the_search_finds_a_planted_direction() -> None:
    model, pair = Planted().eval(), pairs(16)
    plain = Planted().eval()
    with torch.no_grad():
        plain.output.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    reader = model.output.weight.detach().T
    found = align(model, pair, Head(0, 0), 1, reader=reader, steps=200, untrained=plain)
    assert found.accuracy == 1.0
    assert found.share == pytest.approx(1.0, abs=0.02)
    assert found.whole == 1.0
    assert found.nothing == 0.0
    assert found.losses[-1] < 0.01 < found.losses[0]
    # Nothing but the read part of the exchanged difference counts: project the basis on it.
    change = 2 * model.turn[0] - model.turn[1]
    q = found.basis[:, 0]
    carried = (q @ change) * (q @ model.turn[0]) / 2
    assert abs(float(carried)) == pytest.approx(1.0, abs=0.02)
    checked = subspace_patching(
        model, pair, Head(0, 0), found.basis, reader=model.output.weight.detach().T
    )
    assert checked.inside == pytest.approx(found.share, abs=0.02)
    # Eight held-out pairs, all right: Wilson's interval.
    assert "interchange accuracy 1.00 [0.68, 1.00]" in str(found)
    assert found.intervals["accuracy"].low == pytest.approx(8 / (8 + 1.96**2), abs=1e-3)
    best = max(found.random)
    assert found.intervals["beyond_random"].value == pytest.approx(1 - best)
    assert found.effect is not None
    assert found.effect.inside == found.share
    assert found.effect.row + found.effect.null == pytest.approx(1.0, abs=0.05)
    assert sum(found.random) / len(found.random) < 0.7


def test_an_mlp_of_rank_one_is_found_exactly() -> None:
    model = gate("and")
    ones, zeros = torch.ones(3).long(), torch.zeros(3).long()
    pair = dataclasses.replace(bits(), answers=ones, wrong=zeros)
    made = model.blocks[1].W_out.detach()[0]
    made = made / made.norm()
    found = align(model, pair, MLP(0), 1, steps=80, held_out=0.34, draws=2)
    assert abs(float(found.basis[:, 0] @ made)) > 0.99
    assert found.share == pytest.approx(1.0, abs=0.03)
    random = subspace_patching(model, pair, MLP(0), torch.eye(9)[:, :1])
    assert random.inside == pytest.approx(float(made[0] ** 2), abs=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    model, pair = Planted().eval(), pairs()
    with pytest.raises(ArgumentError, match="basis"):
        subspace_patching(model, pair, Head(0, 0), torch.ones(3, 1))
    with pytest.raises(ArgumentError, match="got layer 7"):
        subspace_patching(model, pair, Head(7, 0), torch.eye(8)[:, :1])
    with pytest.raises(ArgumentError, match="got layer 7"):
        align(model, pair, Head(7, 0), 1)
    with pytest.raises(ArgumentError, match="reader"):
        subspace_patching(model, pair, Head(0, 0), torch.eye(8)[:, :1], reader=torch.ones(3, 2))
    with pytest.raises(ArgumentError, match="rank"):
        align(model, pair, Head(0, 0), 0)
    with pytest.raises(ArgumentError, match="rank"):
        align(model, pair, Head(0, 0), 9)
    same = Behavior(pair.clean, pair.clean.clone(), answers=pair.answers, wrong=pair.wrong)
    assert align(model, same, Head(0, 0), 1).reason is not None


def test_readers_are_found_by_name() -> None:
    from grouped import Grouped, prompts

    clean, corrupted = prompts()
    model = Grouped().eval()
    pair = Behavior(clean, corrupted, target=2)
    basis = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = subspace_patching(
        model, pair, Residual(1), basis, reader=Reader(Head(1, 1), "k"), draws=2
    )
    assert not math.isnan(found.row + found.null + found.inside)
    named = SubspacePatching(pair, "resid1", rank=2, reader="L1H1.k", share=0.9)
    panels = {r.what: r.panel.item() for r in measure(model, named)}
    assert not math.isnan(panels["row"] + panels["null"])
    assert panels["inside"] != pytest.approx(panels["row"], abs=1e-3)
    own = subspace_patching(model, pair, Head(1, 0), torch.eye(3), draws=1)
    assert own.null == pytest.approx(0.0, abs=1e-6)  # W_O reads all of z.
    assert own.row == pytest.approx(own.whole, abs=1e-4)


def test_subspaces_are_measured_by_name_and_judged_on_held_out_pairs(tmp_path: Path) -> None:
    model, pair = Planted().eval(), pairs(16)
    np.save(tmp_path / "true.npy", model.turn[:1].T.numpy())
    given = SubspacePatching(pair, "L0H0", basis=str(tmp_path / "true.npy"))
    found = {r.what: r.panel for r in measure(model, given)}
    assert found["inside"].item() == pytest.approx(1.0, abs=1e-5)
    assert found["inside"].convention["examples"] == 16
    # The largest difference is (2, -1) along bit and dormant feature, of which 4/5 is the bit's.
    widest = {r.what: r.panel for r in measure(model, SubspacePatching(pair, "L0H0"))}
    assert widest["inside"].item() == pytest.approx(1.0, abs=1e-4)
    assert widest["inside"].convention["examples"] == 8
    assert widest["inside"].convention["low"] == pytest.approx(1.0, abs=1e-4)
    assert {"whole", "outside", "random", "beyond_random"} < set(widest)


def test_the_search_is_a_measurement() -> None:
    model, pair = Planted().eval(), pairs(16)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    searched = Align(pair, "L0H0", steps=100, draws=4)
    found = {r.what: r.panel for r in measure(model, searched)}
    assert found["accuracy"].item() == 1.0
    assert (found["accuracy"].convention["low"], found["accuracy"].convention["held_out"]) == (
        pytest.approx(0.676, abs=1e-3),
        8,
    )
    assert found["accuracy_nothing"].item() == 0.0
    assert found["inside"].item() == pytest.approx(1.0, abs=0.05)
    assert found["loss"].item() < 0.01
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    # Untrained, clean and corrupted prompts give the same: the same panels, and the reason.
    with torch.no_grad():
        model.output.weight.zero_()
    blank = {r.what: r.panel for r in measure(model, searched)}
    assert set(blank) == set(found)
    assert all(
        math.isnan(p.item()) and "no difference" in p.convention["reason"] for p in blank.values()
    )


@pytest.mark.parametrize("kind", [SubspacePatching, Align])
def test_names_are_checked_before_anything_is_run(kind: Any) -> None:
    for more in ({"part": "L0H0.q"}, {"part": "L0H0", "reader": "MLP1"}, {"part": "nobody"}):
        with pytest.raises(ArgumentError, match=r"part|reader|node"):
            kind(pairs(), **more)
    with pytest.raises(ArgumentError, match="rank"):
        measure(Planted().eval(), kind(pairs(), "L0H0", rank=9))
