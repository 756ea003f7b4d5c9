"""Repeated random tokens and their controls."""

from __future__ import annotations

import pytest
import torch

from lightning_mi import ArgumentError
from lightning_mi.behaviors import RepeatedTokens, matches


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("bos", [None, 4])
def test_blocks_repeat_and_are_distinct_inside(repeats: int, bos: int | None) -> None:
    protocol = RepeatedTokens(50, length=12, repeats=repeats, sequences=6, bos=bos, special=(0, 7))
    tokens = protocol.tokens()
    assert tokens.shape == (6, protocol.positions)
    assert tokens.dtype == torch.long
    if bos is not None:
        assert bool((tokens[:, 0] == bos).all())
    blocks = tokens[:, protocol.start :].reshape(6, repeats, 12)
    for block in blocks:
        assert bool((block == block[0]).all())
        assert len(block[0].unique()) == 12
    drawn = set(blocks.flatten().tolist())
    assert not drawn & {0, 7, bos}
    assert max(drawn) < 50


def test_same_arguments_give_the_same_tokens_whatever_the_global_seed() -> None:
    first = RepeatedTokens(50).tokens()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(
        RepeatedTokens(50, length=25).tokens(), RepeatedTokens(50, length=25).tokens()
    )
    assert torch.equal(first, RepeatedTokens().tokens(50))
    assert not torch.equal(first, RepeatedTokens(50, seed=1).tokens())
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_uniformly() -> None:
    counts = RepeatedTokens(10, length=5, sequences=4000).tokens()[:, :5].flatten().bincount()
    # 2,000 each, standard deviation 32.
    assert bool(((counts - 2000).abs() < 160).all())


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("bos", [None, 0])
def test_matched_control_keeps_the_last_block_only(repeats: int, bos: int | None) -> None:
    protocol = RepeatedTokens(80, length=12, repeats=repeats, bos=bos)
    plain, matched = protocol.tokens(), protocol.matched()
    assert plain.shape == matched.shape
    assert torch.equal(plain[:, -12:], matched[:, -12:])
    assert len(matches(matched)) == 0
    if bos is not None:
        assert torch.equal(plain[:, 0], matched[:, 0])


def test_random_periods_differ_and_are_never_the_protocols_own() -> None:
    protocol = RepeatedTokens(80, length=12, sequences=40, bos=3)
    tokens = protocol.random_period()
    assert tokens.shape == (40, 25)
    found = matches(tokens)
    periods = {}
    for sequence, t, p in found.tolist():
        periods.setdefault(sequence, set()).add(t - p)
    assert all(len(p) == 1 for p in periods.values())
    lengths = {next(iter(p)) for p in periods.values()}
    assert lengths == {6, 7, 8, 9, 10, 11}
    # Each second copy is whole: as many matches as the period is long.
    for sequence, own in periods.items():
        assert int((found[:, 0] == sequence).sum()) == next(iter(own))


def test_matches_of_natural_text_and_padding() -> None:
    tokens = torch.tensor([[9, 9, 5, 6, 5, 9]])
    assert matches(tokens).tolist() == [[0, 1, 0], [0, 4, 2], [0, 5, 0], [0, 5, 1]]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    assert matches(tokens, mask).tolist() == [[0, 4, 2], [0, 5, 1]]


def test_protocol_is_shortened_to_the_model() -> None:
    protocol = RepeatedTokens()
    assert protocol.fitted(1000).length == 32
    assert protocol.fitted(1000, 20).length == 10
    assert RepeatedTokens(bos=0).fitted(1000, 20).length == 9
    assert protocol.fitted(31).length == 15
    assert RepeatedTokens(repeats=3).fitted(1000, 20).length == 6
    fitted = RepeatedTokens(bos=0).fitted(33, 33)
    assert fitted.matched().shape == fitted.random_period().shape == (4, 33)
    with pytest.raises(ArgumentError, match="tokens: expected room for two blocks"):
        protocol.fitted(1000, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length: expected an int of at least 2, got 1"),
        ({"repeats": 1}, "repeats: expected an int of at least 2, got 1"),
        ({"sequences": 0}, "sequences: expected an int of at least 1, got 0"),
        ({"length": 2.5}, "length: expected an int"),
    ],
)
def test_bad_numbers_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        RepeatedTokens(**settings)


def test_missing_or_small_vocabulary_is_refused() -> None:
    with pytest.raises(ArgumentError, match="vocabulary_size: expected a number, got None"):
        RepeatedTokens().tokens()
    with pytest.raises(ArgumentError, match="length: expected at most 10 with 10 ids, got 20"):
        RepeatedTokens(10, length=20).tokens()
