"""Padding and packing change nothing: not head scores, not what is built on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_heads import gpt2, llama, scores, twin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lightning_mi as mi
from lightning_mi import ArgumentError, ModelError
from lightning_mi.attention import tap
from lightning_mi.behaviors import RepeatedTokens, matches
from lightning_mi.circuits import HeadScores, attention_summary
from lightning_mi.circuits.heads.entries import Entries
from lightning_mi.circuits.heads.layout import documents_of

PADS = (1, 3, 8)


def sides(tokens: Tensor, pads: int, side: str) -> tuple[Tensor, Tensor]:
    """Return tokens padded on one side, and their mask."""
    where = (pads, 0) if side == "left" else (0, pads)
    return F.pad(tokens, where, value=7), F.pad(torch.ones_like(tokens), where)


def packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return position ids, document numbers and a boolean causal block mask."""
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    block = (numbers[:, None] == numbers).tril()
    return positions[None], numbers[None], block[None, None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_padding_changes_no_score(make: Any, implementation: str, side: str) -> None:
    model = make(attn_implementation=implementation)
    tokens = RepeatedTokens(61, length=9, sequences=2).tokens()
    plain = scores(model, tokens)
    for pads in PADS:
        ids, mask = sides(tokens, pads, side)
        found = scores(model, ids, attention_mask=mask)
        for name in plain:
            assert torch.allclose(plain[name], found[name], atol=1e-5), (name, pads)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score_of_a_measurement(side: str) -> None:
    model, tokens = (
        gpt2(),
        torch.randint(3, 15, (2, 20), generator=torch.Generator().manual_seed(1)),
    )
    plain = mi.measure(model, HeadScores(tokens=None), batch={"input_ids": tokens})
    ids, mask = sides(tokens, 3, side)
    batch = {"input_ids": ids, "attention_mask": mask}
    padded = mi.measure(model, HeadScores(tokens=None), batch=batch)
    for a, b in zip(plain, padded, strict=True):
        assert a.name == b.name
        assert torch.allclose(a.panel.values, b.panel.values, atol=1e-5, equal_nan=True), a.name


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_are_counted_from_beyond_the_padding(side: str) -> None:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    model = RobertaModel(config).eval()
    tokens = RepeatedTokens(61, length=9, sequences=2, special=(1,)).tokens()
    plain = scores(model, tokens)
    for pads in PADS:
        ids, mask = sides(tokens, pads, side)
        ids = torch.where(mask.bool(), ids, 1)
        found = scores(model, ids, attention_mask=mask)
        for name in plain:
            assert torch.allclose(plain[name], found[name], atol=1e-5), (name, pads)


def test_a_model_without_mask_or_positions_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt2()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids).logits

    model, tokens = Bare(), RepeatedTokens(61, length=9, sequences=2).tokens()
    ids, mask = sides(tokens, 3, "left")
    with pytest.raises(ModelError, match=r"padding.*position_ids"):
        scores(model, ids, attention_mask=mask)
    # What stands to the right of a causal model's tokens cannot reach them.
    ids, mask = sides(tokens, 3, "right")
    plain, found = scores(model, tokens), scores(model, ids, attention_mask=mask)
    assert torch.allclose(plain["induction"], found["induction"], atol=1e-6)


def test_wrong_position_ids_are_refused_and_right_ones_taken() -> None:
    model, tokens = gpt2(), RepeatedTokens(61, length=9, sequences=2).tokens()
    ids, mask = sides(tokens, 3, "left")
    wrong = torch.arange(ids.shape[1]).expand_as(ids)
    right = (mask.cumsum(1) - 1).clamp(min=0)
    plain = scores(model, tokens)["induction"]
    found = scores(model, ids, attention_mask=mask, position_ids=right)["induction"]
    assert torch.allclose(plain, found, atol=1e-5)
    # The padding is taken away with its position ids, so these only move all positions.
    assert scores(model, ids, attention_mask=mask, position_ids=wrong)["induction"].isfinite().all()


def test_bidirectional_model() -> None:
    from transformers import BertConfig, BertForMaskedLM

    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 16, "vocab_size": 61}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**settings)).eval()
    tokens = RepeatedTokens(61, length=9, sequences=2).tokens()
    plain = scores(model, tokens)
    for side in ("left", "right"):
        ids, mask = sides(tokens, 3, side)
        found = scores(model, ids, attention_mask=mask)
        for name in plain:
            assert torch.allclose(plain[name], found[name], atol=1e-5), (name, side)


# Packing.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_packed_documents_score_as_they_do_alone(make: Any, implementation: str) -> None:
    model, lengths = make(attn_implementation=implementation), (12, 7, 9)
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(3, 9, (1, n), generator=generator) for n in lengths]
    positions, _, block = packed(lengths)
    bias = torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)
    found = scores(model, torch.cat(parts, 1), attention_mask=bias, position_ids=positions)
    alone = [scores(model, part) for part in parts]
    entries = [Entries.of(part) for part in parts]
    for name in ("induction", "previous_token", "duplicate_token", "first_position"):
        counts = [len(set(e.triples(name)[:, 1].tolist())) for e in entries]
        mean = sum(n * a[name] for n, a in zip(counts, alone, strict=True) if n) / sum(counts)
        assert torch.allclose(found[name], mean, atol=1e-5), name


def test_no_target_lies_in_another_document() -> None:
    tokens = torch.tensor([[5, 6, 7, 5, 6, 5, 6, 7]])
    positions, numbers, block = packed((4, 4))
    for documents in (
        documents_of(tokens, positions=positions),
        documents_of(tokens, block),
        documents_of(tokens, torch.zeros(block.shape).masked_fill(~block, -1e9)),
        documents_of(tokens, block[0]),
    ):
        assert documents.tolist() == numbers.tolist()
        entries = Entries.of(tokens, documents)
        for name in ("induction", "duplicate_token", "previous_token", "first_position"):
            for _, t, s in entries.triples(name).tolist():
                assert numbers[0, t] == numbers[0, s]
        assert entries.triples("induction").tolist() == [[0, 3, 1], [0, 6, 5]]
        assert entries.triples("first_position").tolist() == [
            [0, 2, 0],
            [0, 3, 0],
            [0, 6, 4],
            [0, 7, 4],
        ]


def test_documents_behind_padding() -> None:
    tokens = torch.arange(7)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    assert documents_of(tokens, mask).tolist() == [[0, 0, 1, 1, 1, 1, 0]]
    places = torch.tensor([[0, 0, 0, 1, 0, 1, 1]])
    assert documents_of(tokens, mask, places).tolist() == [[0, 0, 1, 1, 2, 2, 0]]
    places = torch.tensor([[1, 1, 0, 1, 2, 3, 1]])
    assert documents_of(tokens, mask, places).tolist() == [[0, 0, 1, 1, 1, 1, 0]]
    with pytest.raises(ArgumentError, match=r"attention_mask: expected shape \(1, 7\)"):
        documents_of(tokens, mask[:, :3])
    with pytest.raises(ArgumentError, match="position_ids: expected shape"):
        documents_of(tokens, positions=torch.zeros(1, 3))


def test_packed_batch_of_a_measurement() -> None:
    model, lengths = llama(), (12, 8)
    tokens = torch.randint(3, 9, (2, 20), generator=torch.Generator().manual_seed(1))
    positions, _, block = packed(lengths)
    batch = {"input_ids": tokens, "position_ids": positions.expand(2, -1)}
    batch["attention_mask"] = block.expand(2, -1, -1, -1)
    records = {r.what: r.panel for r in mi.measure(model, HeadScores(tokens=None), batch=batch)}
    expected = scores(model, tokens, attention_mask=block, position_ids=positions)
    assert torch.allclose(records["induction"].values, expected["induction"], atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_that_may_look_nowhere_are_left_out(implementation: str) -> None:
    model, tokens = llama(attn_implementation=implementation), torch.randint(3, 9, (2, 16))
    block = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    block[1, :, :5] = False
    block[1, :, :, :5] = False
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad(), tap(model, check="all") as seen:
        mi.NextToken().outputs(model, {"input_ids": tokens, "attention_mask": block})
    found = scores(model, tokens, attention_mask=block, reduce=None)
    for layer, site in enumerate(seen.sites):
        pattern = site.pattern()
        for b in range(2):
            slow = twin(pattern[b, 3], block[b, 0], tokens[b].tolist(), mask[b].bool().tolist())
            for name, value in slow.items():
                own = float(found[name][b, layer, 3])
                assert own == pytest.approx(value, abs=2e-6, nan_ok=True), name
                assert math.isfinite(own)


def test_matches_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mi.behaviors import induction

    tokens = torch.randint(0, 5, (3, 23), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 23) > 0.2
    expected = [
        [b, t, p]
        for b in range(3)
        for t in range(23)
        for p in range(t)
        if tokens[b, t] == tokens[b, p] and mask[b, t] and mask[b, p]
    ]
    assert matches(tokens, mask).tolist() == expected
    monkeypatch.setattr(induction, "PAIRS", 23 * 4)
    assert matches(tokens, mask).tolist() == expected
    assert matches(tokens[:0]).shape == (0, 3)


# Long sequences.


class Largest(TorchFunctionMode):
    """Notes the largest tensor that any function makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and 0 not in result.stride():
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("window", [None, 700])
def test_nothing_of_length_times_length_is_made_for_long_sequences(window: int | None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 600}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = MistralConfig(**settings, sliding_window=window, max_position_embeddings=1536)
    model = MistralForCausalLM(config).eval()
    tokens = torch.randint(0, 600, (1, 1536), generator=torch.Generator().manual_seed(0))
    own, ours = Largest(), Largest()
    with torch.no_grad(), own:
        model.model(tokens, use_cache=False)
    with ours:
        found = scores(model, tokens)
    assert found["induction"].isfinite().all()
    patterns = 4 * 1536 * 1536
    blocks = 1 << 20
    assert ours.numbers <= max(own.numbers, blocks) < patterns
    with ours:
        whole = attention_summary(model, tokens)
    assert whole["entropy"].shape == (1, 4)
    assert ours.numbers <= max(own.numbers, blocks)


def test_a_refusal_leaves_no_hook_behind() -> None:
    model, tokens = gpt2(), RepeatedTokens(61, length=9, sequences=2).tokens()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(IndexError):  # the model's own
        attention_summary(model, tokens + 61)
    with pytest.raises(ArgumentError, match="attention_mask"):
        scores(model, tokens, attention_mask=torch.ones(2, 3))
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert before == after
