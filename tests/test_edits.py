"""Edits: what they change, what they leave, and that they can be taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped import Grouped, one, prompts, written_out
from torch import Tensor, nn

from lightning_mi import Behavior
from lightning_mi.circuits import (
    Edit,
    Residual,
    boost_tokens,
    edit_table,
    key_covariance,
    rank_edit,
    scale_heads,
    spellings,
    steer,
    suppress_tokens,
)
from lightning_mi.errors import ArgumentError
from lightning_mi.nodes import MLP, Head


class Tied(nn.Module):
    """A table that is input and output embedding at once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.table(ids))))
        return out


def state(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    return [(n, p.detach().clone(), id(p)) for n, p in model.named_parameters()]


def assert_same(model: nn.Module, before: list[tuple[str, Tensor, int]]) -> None:
    for (name, value, identity), (n, p) in zip(before, model.named_parameters(), strict=True):
        assert name == n
        assert identity == id(p)
        assert torch.equal(value, p)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def all_edits(model: Grouped, ids: Tensor) -> list[Edit]:
    return [
        suppress_tokens(model, [2, 3], example=ids),
        boost_tokens(model, 4, amount=3.0, example=ids),
        scale_heads(model, {Head(0, 1): 0.0, Head(1, 2): 2.0}),
        steer(model, MLP(0), torch.ones(12), example=ids),
        rank_edit(model, "blocks.0.mlp.down", torch.randn(2, 20), torch.randn(2, 12)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_every_edit_changes_the_answer_and_leaves_no_trace(index: int) -> None:
    model, (ids, _) = Grouped().eval(), prompts()
    edit = all_edits(model, ids)[index]
    before, was = state(model), model(ids).detach()
    with edit:
        assert edit.active
        assert not torch.allclose(model(ids), was, atol=1e-3)
    assert_same(model, before)
    assert torch.equal(model(ids), was)
    edit.apply()
    with pytest.raises(ArgumentError, match="in force"):
        edit.apply()
    edit.revert()
    edit.revert()
    assert_same(model, before)

    def broken() -> None:
        with edit:
            model(ids)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        broken()
    assert_same(model, before)
    assert not edit.active


def test_tokens_are_suppressed_by_an_exact_amount_and_tied_embeddings_stay() -> None:
    model = Tied().eval()
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids).detach()
    with suppress_tokens(model, [5, 6], amount=4.0, example=ids):
        found = model(ids)
        assert model.table.weight is model.head.weight  # Still one and the same.
    wanted = logits.clone()
    wanted[..., 5:] -= 4.0
    assert torch.allclose(found, wanted, atol=1e-6)
    assert model.head.bias is None
    with boost_tokens(model, 5, amount=4.0, example=ids):
        odds = (model(ids).log_softmax(-1) - logits.log_softmax(-1)).diff(dim=-1)
    assert torch.allclose(odds[..., 4:], torch.tensor([4.0, -4.0]).expand(1, 3, 2), atol=1e-5)
    with pytest.raises(ArgumentError, match="tokens"):
        suppress_tokens(model, 7, example=ids)


class Scaled(Tied):
    """Logits are what the head returns, divided by eight."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) / 8


def test_the_amount_is_that_of_the_logits_where_the_model_scales_them() -> None:
    model, ids = Scaled().eval(), torch.tensor([[1, 2, 3]])
    logits = model(ids).detach()
    with suppress_tokens(model, 5, amount=4.0, example=ids):
        moved = model(ids).detach() - logits
    assert torch.allclose(moved[..., 5], torch.full((1, 3), -4.0), atol=1e-5)
    assert torch.equal(moved[..., :5], torch.zeros(1, 3, 5))


def test_behavior_and_control_of_one_name_are_told_apart() -> None:
    model, ids = Tied().eval(), torch.tensor([[1, 2], [3, 4]])
    pair = Behavior(ids, ids.flip(1), answers=torch.tensor([0, 0]), name="asks")
    edit = suppress_tokens(model, 0, example=ids)
    names = [row.what for row in edit_table(edit, pair, pair).rows]
    assert len({*names}) == len(names)
    assert "asks, control: metric" in names
    with pytest.raises(ArgumentError, match="tokenizer"):
        edit_table(edit, pair, tokenizer=["a", "b"])


def test_heads_are_scaled_and_the_stream_is_steered_as_by_hand() -> None:
    model, (ids, _) = Grouped().eval(), prompts()
    _, seen = written_out(model, ids)
    with scale_heads(model, {Head(1, 2): -0.5}), torch.no_grad():
        found = model(ids)
    twin, _ = written_out(model, ids, one("z1", 2, -0.5 * seen["z1"]))
    assert torch.allclose(found, twin, atol=1e-5)
    push = torch.linspace(-1, 1, 12)
    with steer(model, Residual(1), push, amount=2.0, positions=[-1], example=ids), torch.no_grad():
        found = model(ids)
    moved = seen["resid1"].clone()
    moved[:, -1] += 2 * push
    twin, _ = written_out(model, ids, one("resid1", None, moved))
    assert torch.allclose(found, twin, atol=1e-5)
    with pytest.raises(ArgumentError, match="direction"), steer(model, Head(0, 0), push):
        model(ids)


def test_a_rank_edit_gives_the_wanted_values_and_moves_all_else_least() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    model = nn.Sequential(layer)
    A = torch.randn(6, 6, dtype=torch.float64)
    C = A @ A.T + torch.eye(6)
    keys, values = torch.randn(2, 6).double(), torch.randn(2, 4).double()
    W = layer.weight.detach().clone()
    with rank_edit(model, "0", keys, values, covariance=C):
        assert torch.allclose(model(keys), values, atol=1e-8)
        change = layer.weight.detach() - W
    assert int(torch.linalg.matrix_rank(change)) == 2
    cost = float((change @ C @ change.T).trace())
    # Any other change that does the same costs more: add what the keys do not see.
    free = torch.eye(6).double() - keys.T @ torch.linalg.pinv(keys.T)
    for seed in range(5):
        more = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double() @ free
        other = change + 0.1 * more
        assert torch.allclose((W + other) @ keys.T + layer.bias[:, None], values.T, atol=1e-8)
        assert float((other @ C @ other.T).trace()) > cost
    # The soft form is the ridge solution, and demands as its weight goes to 0.
    with rank_edit(model, "0", keys, values, covariance=C, weight=1e-9):
        assert torch.allclose(model(keys), values, atol=1e-5)
    lam, gap = 0.7, values - layer(keys).detach()
    with rank_edit(model, "0", keys, values, covariance=C, weight=lam):
        D = (layer.weight.detach() - W).requires_grad_()
    loss = (D @ keys.T - gap.T).square().sum() + lam * (D @ C @ D.T).trace()
    (g,) = torch.autograd.grad(loss, D)
    assert float(g.abs().max()) < 1e-8
    with pytest.raises(ArgumentError, match="independent"):
        rank_edit(model, "0", keys[[0, 0]], values)
    with pytest.raises(ArgumentError, match="keys"):
        rank_edit(model, "0", keys[:, :3], values)


def test_weights_that_are_stored_the_other_way_round_and_their_keys() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), Conv1D(4, 5))
    batches = [torch.randn(7, 3), torch.randn(2, 3)]
    C = key_covariance(model, "1", batches, damping=0.0)
    k = model[0](torch.cat(batches)).double().detach()
    assert torch.allclose(C, k.T @ k / 9, atol=1e-6)
    key, value = torch.randn(1, 5), torch.randn(1, 4)
    with rank_edit(model, "1", key, value, covariance=C):
        assert torch.allclose(model[1](key), value, atol=1e-4)
    with pytest.raises(ArgumentError, match="batches"):
        key_covariance(model, "1", [])


class Letters:
    """A tokenizer whose tokens are words, some with a space in front."""

    words = (" cat", "cat", "Cat", " CAT", "dog", " Cat", "CAT")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        own = [self.words.index(text)] if text in self.words else [0, 1]
        return [4, *own] if add_special_tokens else own


def test_the_table_shows_behavior_control_divergence_and_leakage() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.tensor([[1, 2], [3, 4]])
    pair = Behavior(
        ids, ids.flip(1), answers=torch.tensor([0, 0]), wrong=torch.tensor([4, 4]), name="asks"
    )
    control = Behavior(ids, ids.flip(1), target=4, name="rests")
    edit = suppress_tokens(model, 0, amount=2.0, example=ids)
    assert spellings(Letters(), 0) == [1, 6, 3, 2, 5]
    before = model(ids).detach()
    table = edit_table(edit, pair, control, text=ids, tokenizer=Letters())
    rows = {r.what: r for r in table.rows}
    gap = float((before[:, -1, 0] - before[:, -1, 4]).mean())
    assert rows["asks: metric"].before == pytest.approx(gap, abs=1e-5)
    assert rows["asks: metric"].after == pytest.approx(gap - 2.0, abs=1e-5)
    assert rows["rests, control: metric"].after == pytest.approx(
        rows["rests, control: metric"].before, abs=1e-6
    )
    p = before[:, -1].softmax(-1)
    shifted = before.clone()
    shifted[..., 0] -= 2.0
    q = shifted[:, -1].softmax(-1)
    own = rows["P(' cat'), edited"]
    assert own.before == pytest.approx(float(p[:, 0].mean()), abs=1e-6)
    assert own.after == pytest.approx(float(q[:, 0].mean()), abs=1e-6)
    leak = rows["P('Cat'), spelled otherwise"]
    assert leak.after == pytest.approx(float(q[:, 2].mean()), abs=1e-6)
    assert leak.after > leak.before  # What one spelling loses, the others gain.
    P, Q = before.softmax(-1), shifted.softmax(-1)
    kl = (P * (P / Q).log()).sum(-1)
    assert table.kl is not None
    assert table.kl[0] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert table.kl[1] == pytest.approx(float(kl.max()), abs=1e-5)
    assert "KL on control text" in str(table)
    panels = table.reading()
    assert panels["after"].axes == ("feature",)
    assert float(panels["kl"].values) == pytest.approx(table.kl[0])
    assert not edit.active


def test_what_cannot_be_edited_is_refused() -> None:
    model = Grouped().eval()
    for match, made in (
        ("factors", lambda: scale_heads(model, {})),
        ("module", lambda: rank_edit(model, "norm", torch.ones(1, 12), torch.ones(1, 12))),
    ):
        with pytest.raises(ArgumentError, match=match):
            made()
    headless: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(ArgumentError, match="head"):
        suppress_tokens(headless, 0, example=torch.randn(1, 3, 8))
