"""Roles are given to heads that beat both nulls, and to no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle import FixedOffset, Oracle
from stated import stated_oracle
from test_heads import gpt2, scores
from test_readout import WholeOracle
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import ArgumentError, Head
from lightning_mi.anatomy import Note
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import HeadRoles, HeadScores, head_roles, head_scores
from lightning_mi.circuits.readout.roles import ROLES

PROTOCOL = RepeatedTokens(length=16, bos=0, sequences=4)


def test_roles_of_the_hand_built_model() -> None:
    roles = head_roles(Oracle(30.0, vocabulary=60), PROTOCOL)
    assert roles.heads("induction") == (Head(1, 0),)
    assert roles.heads("previous_token") == (Head(0, 0),)
    assert set(roles.of(Head(1, 0))) - {"copying"} == {"induction"}
    assert roles.of(Head(0, 0)) == ("previous_token",)
    assert roles.heads("duplicate_token") == roles.heads("current_token") == ()
    assert str(roles).startswith("induction: L1H0\nprevious_token: L0H0")
    assert float(roles.excess["induction"][1, 0]) == pytest.approx(1.0, abs=1e-3)
    uniform = scores(Oracle(0.0, vocabulary=60), PROTOCOL.tokens(60))["induction"][1, 0]
    assert float(roles.uniform["induction"][1, 0]) == pytest.approx(float(uniform), abs=1e-6)


@pytest.mark.parametrize("model", [Oracle(0.0, vocabulary=60), gpt2(initializer_range=0.02)])
def test_nothing_is_called_anything_where_nothing_happens(model: nn.Module) -> None:
    if not isinstance(model, Oracle):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.02)
    roles = head_roles(model, PROTOCOL)
    assert all(roles.heads(role) == () for role in roles.excess)
    # By rank some head would always be first.
    assert all(bool(roles.excess[role].isfinite().all()) for role in ROLES)
    assert str(roles) == ""


@pytest.mark.parametrize(
    ("offset", "role"),
    [(15, ()), (16, ()), (1, ("previous_token",)), (0, ("current_token",)), (2, ())],
)
def test_a_head_at_a_fixed_offset(offset: int, role: tuple[str, ...]) -> None:
    roles = head_roles(FixedOffset(offset), RepeatedTokens(length=16, sequences=8))
    assert roles.of(Head(0, 0)) == role
    if offset == 15:  # perfect by score, and yet no induction head
        assert float(roles.scores["induction"][0, 0]) > 0.999
        assert float(roles.matched["induction"][0, 0]) > 0.999
        assert float(roles.excess["induction"][0, 0]) == pytest.approx(0.0, abs=1e-3)


class Given(nn.Module):
    """One head with a pattern of one's own."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        eye = torch.eye(T).expand(len(ids), 1, -1, -1)
        k = self.logits[:T, :T].T.expand(len(ids), 1, -1, -1)
        v = self.table(ids)[:, None]
        z = F.scaled_dot_product_attention(eye, k, v, is_causal=True, scale=1.0)
        return z[:, 0] @ self.table.weight.T


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_copying_and_anti_copying_of_the_hand_built_model(sign: float) -> None:
    model = WholeOracle(30.0)
    with torch.no_grad():
        model.layers[1].W_O.mul_(sign)
    found = head_roles(model, PROTOCOL, anatomy=stated_oracle(model))
    role, other = ("copying", "anti_copying")[:: int(sign)]
    assert found.heads(role) == (Head(1, 0),)
    assert found.heads(other) == ()
    assert float(found.scores["copying"][1, 0]) == pytest.approx(sign, abs=1e-4)
    # The first head copies into a slot that no logit reads: 0/0, which is 0.
    assert float(found.scores["copying"][0, 0]) == 0.0
    assert float(found.matched["copying"][1, 0]) < 0.6
    without = dataclasses.replace(stated_oracle(model), W_U=None)
    nothing = head_roles(model, PROTOCOL, anatomy=without)
    assert nothing.scores["copying"].isnan().all()
    assert "unembedding" in nothing.reasons["copying"]
    assert nothing.heads("copying") == ()


def test_a_sink_and_a_head_that_looks_at_the_recent_past() -> None:
    sink = torch.zeros(40, 40)
    sink[:, 0] = 9.0
    assert head_roles(Given(sink), PROTOCOL).of(Head(0, 0)) == ("sink",)
    both = torch.zeros(40, 40)
    both[:, :2] = 9.0  # the beginning, but not the first position above others
    assert head_roles(Given(both), PROTOCOL).of(Head(0, 0)) == ()
    place = torch.arange(40)
    recent = -3.0 * (place[:, None] - place - 1.5).abs()  # t - 1 and t - 2 alike
    roles = head_roles(Given(recent), PROTOCOL)
    assert float(roles.scores["previous_token"][0, 0]) > 0.45
    assert roles.of(Head(0, 0)) == ()


def test_the_margin_decides() -> None:
    model = Oracle(5.0, vocabulary=60)
    found = head_roles(model, PROTOCOL)
    value = float(found.excess["induction"][1, 0])
    score, null = (float(x["induction"][1, 0]) for x in (found.scores, found.uniform))
    other = float(found.matched["induction"][1, 0])
    highest = max(null, other)
    assert value == pytest.approx((score - highest) / (1 - highest), abs=1e-6)
    assert 0.5 < value < 0.9
    below, above = value - 0.01, value + 0.01
    assert head_roles(model, PROTOCOL, margin=below).heads("induction") == (Head(1, 0),)
    assert head_roles(model, PROTOCOL, margin=above).heads("induction") == ()


def test_bad_margins_and_roles() -> None:
    for margin in (0.0, 1.5, True):
        with pytest.raises(ArgumentError, match="margin: expected a number in"):
            head_roles(Oracle(1.0), PROTOCOL, margin=margin)
    with pytest.raises(ArgumentError, match="margin"):
        HeadRoles(margin=-1.0)
    with pytest.raises(ArgumentError, match="role: expected one of"):
        head_roles(Oracle(1.0), PROTOCOL).heads("inductive")


def test_roles_that_rest_on_weights_say_what_is_approximate() -> None:
    model = WholeOracle(30.0)
    note = Note("W_O", 1, "approximate", "a norm follows")
    query = Note("W_Q", 1, "approximate", "queries pass a norm")
    anatomy = dataclasses.replace(stated_oracle(model), notes=(note, query))
    assert head_roles(model, PROTOCOL, anatomy=anatomy).approximate == (str(note),)
    context = mi.Context(model)
    context.shared("anatomy", lambda: anatomy)
    panels = HeadRoles(tokens=PROTOCOL)(model, context)
    assert list(panels["copying"].convention["approximate"]) == [str(note)]
    assert "approximate" not in panels["induction"].convention


def test_tokens_that_are_no_protocol() -> None:
    ids = PROTOCOL.tokens(60)
    with pytest.raises(ArgumentError, match="tokens: expected a RepeatedTokens protocol"):
        head_roles(gpt2(), ids)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tokens: expected token ids"):
        head_scores(gpt2(), PROTOCOL)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="anatomy: expected an Anatomy"):
        head_roles(gpt2(), PROTOCOL, anatomy=3)  # type: ignore[arg-type]


def test_a_window_that_is_too_short_gives_a_reason() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 61}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=6)).eval()
    tokens = RepeatedTokens(length=12)
    panels = {r.what: r.panel for r in mi.measure(model, HeadRoles(tokens=tokens))}
    assert panels["induction"].values.isnan().all()
    assert "within reach" in panels["induction"].convention["reason"]
    assert panels["induction_heads"].item() == 0.0
    assert "reason" not in panels["previous_token"].convention


def test_measurement() -> None:
    model = Oracle(30.0, vocabulary=60)
    records = mi.measure(model, [HeadScores(tokens=PROTOCOL), HeadRoles(tokens=PROTOCOL)])
    panels = {r.name: r.panel for r in records}
    found = head_roles(model, PROTOCOL)
    for role, values in found.excess.items():
        panel = panels[f"head_roles/{role}"]
        assert panel.axes == ("layer", "head")
        assert torch.equal(panel.values.nan_to_num(9), values.nan_to_num(9))
        assert panel.nonfinite == 0 or panel.convention["reason"]
        assert panel.convention["heads"] == [str(h) for h in found.heads(role)]
        assert panels[f"head_roles/{role}_heads"].item() == len(found.heads(role))
    assert panels["head_roles/induction"].convention["margin"] == 0.3
    for name in ("previous_token", "current_token", "first_position"):
        panel = panels[f"head_scores/{name}_matched_null"]
        assert panel.convention["what"].startswith("one position further")
