"""Repeated random tokens and their controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

from lightning_mi import ArgumentError, Behavior
from lightning_mi.behavior import as_behavior
from lightning_mi.behaviors import (
    Counting,
    Induction,
    ModularAddition,
    RepeatedTokens,
    Scenes,
    matches,
)

CORRUPTIONS: Any = ("answer", "trigger", "block")


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


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_perfect_induction_circuit_answers_and_is_corrupted(corruption: Any) -> None:
    behavior = RepeatedTokens(40, length=12, sequences=6, bos=0).behavior(corruption, shown=5)
    model = Oracle(beta=30.0)
    with torch.no_grad():
        clean, corrupted = model(behavior.clean), model(behavior.corrupted)
    assert bool(behavior.correct(clean).all())
    assert torch.allclose(behavior.metric(clean), torch.ones(6), atol=1e-4)
    # With the answer moved or replaced, the other one is found; with nothing to copy, neither.
    expected = torch.zeros(6) if corruption == "block" else -torch.ones(6)
    assert torch.allclose(behavior.metric(corrupted), expected, atol=0.1)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(("bos", "repeats"), [(None, 2), (3, 3)])
def test_only_the_whole_copies_are_corrupted(
    corruption: Any, bos: int | None, repeats: int
) -> None:
    protocol = RepeatedTokens(60, length=8, repeats=repeats, sequences=5, bos=bos)
    behavior = protocol.behavior(corruption)
    length = protocol.start + 8 * (repeats - 1) + 4
    assert torch.equal(behavior.clean, protocol.tokens()[:, :length])
    changed = (behavior.clean != behavior.corrupted)[:, protocol.start :]
    copies = changed[:, : 8 * (repeats - 1)].reshape(5, repeats - 1, 8)
    assert not bool(changed[:, 8 * (repeats - 1) :].any())
    wanted = {"answer": 1, "trigger": 2, "block": 8}[corruption]
    assert bool((copies.sum(-1) == wanted).all())
    for name, offset in (("trigger", 3), ("answer", 4)):
        place = protocol.start + 8 * (repeats - 2) + offset
        assert behavior.where(name).tolist() == [place] * 5
        assert corruption == "answer" or name == "answer" or bool(copies[..., offset].all())
    answer = behavior.clean[:, behavior.where("answer")[0]]
    assert torch.equal(behavior.answers, answer)
    # No token of the clean prompt is left that could be the wrong answer, but for the swap.
    there = (behavior.clean == behavior.wrong[:, None]).any(1)
    assert bool(there.all()) == bool(there.any()) == (corruption == "trigger")
    assert behavior.where("last").tolist() == [length - 1] * 5


def test_a_small_vocabulary_is_enough_where_no_fresh_block_is_needed() -> None:
    protocol = RepeatedTokens(9, length=8, sequences=2)
    assert len(protocol.behavior("answer")) == 2
    with pytest.raises(ArgumentError, match="length: expected at most"):
        protocol.behavior("block")
    with pytest.raises(ArgumentError, match="length: expected a block of five tokens"):
        RepeatedTokens(9, length=4).behavior("trigger")
    with pytest.raises(ArgumentError, match="shown: expected 1 to 7"):
        protocol.behavior(shown=8)
    with pytest.raises(ArgumentError, match="corruption: expected one of"):
        protocol.behavior("blocks")  # type: ignore[arg-type]


def test_a_protocol_is_a_behavior_and_induction_names_its_corruption() -> None:
    protocol = RepeatedTokens(60, length=8, sequences=3)
    assert torch.equal(as_behavior(protocol).corrupted, protocol.behavior("answer").corrupted)
    block = as_behavior(Induction(protocol, "block", shown=2))
    assert torch.equal(block.corrupted, protocol.behavior("block", shown=2).corrupted)
    (only,) = RepeatedTokens(length=8).behavior(vocabulary_size=60).characteristics
    lengths = [as_behavior(v).clean.shape[1] for v in only.variants.values()]
    assert lengths == [12, 6]


@pytest.mark.parametrize("form", ["a b =", "a b"])
def test_sums_are_right_and_one_number_changes(form: Any) -> None:
    behavior = ModularAddition(11, pairs=40, form=form).behavior()
    (clean, answers), (corrupted, wrong) = behavior.clean, behavior.corrupted
    assert torch.equal(answers, (clean[:, 0] + clean[:, 1]) % 11)
    assert torch.equal(wrong, (corrupted[:, 0] + corrupted[:, 1]) % 11)
    assert bool((answers != wrong).all())
    assert clean.shape[1] == len(form.split())
    assert form == "a b" or bool((clean[:, 2] == 11).all())
    changed = clean != corrupted
    assert torch.equal(changed.nonzero()[:, 1], behavior.groups)
    assert len({tuple(row) for row in clean.tolist()}) == 40


class Adder(nn.Module):
    """Adds modulo p, and is right."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.p = p

    def forward(self, ids: Tensor) -> Tensor:
        sums = nn.functional.one_hot((ids[:, 0] + ids[:, 1]) % self.p, self.p)
        return torch.stack([torch.zeros_like(sums)] * (ids.shape[1] - 1) + [sums], 1).float()


def test_an_adder_is_right_in_either_order() -> None:
    base = ModularAddition(7, pairs=20)
    (commutes,) = base.characteristics()
    values = {}
    for name, variant in commutes.variants.items():
        behavior = as_behavior(variant)
        outputs = Adder(7)(behavior.clean[0])
        assert torch.equal(behavior.metric(outputs), torch.ones(20))
        assert torch.equal(behavior.metric(Adder(7)(behavior.corrupted[0])), -torch.ones(20))
        values[name] = float(behavior.correct(outputs).float().mean())
    assert values == {"a + b": 1.0, "b + a": 1.0}
    assert all(commutes.verdicts(values).values())
    plain, swapped = (as_behavior(v) for v in commutes.variants.values())
    assert torch.equal(plain.clean[0][:, :2], swapped.clean[0][:, :2].flip(1))
    assert plain.positions["a"] == swapped.positions["b"] == 0


def test_modular_addition_refuses_what_there_is_not() -> None:
    with pytest.raises(ArgumentError, match="pairs: expected 1 to 9"):
        ModularAddition(3, pairs=10)
    with pytest.raises(ArgumentError, match="modulus: expected at least 2"):
        ModularAddition(1, pairs=1)
    with pytest.raises(ArgumentError, match="form: expected one of"):
        ModularAddition(form="b a")  # type: ignore[arg-type]


FACTORS: Any = ("shape", "colour", "column")


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("by", [1, 3])
def test_one_level_of_one_factor_changes_in_number(factor: Any, by: int) -> None:
    task = Counting(factor, by=by, pairs=60)
    clean, corrupted = task.scenes()
    behavior = task.behavior()
    moved = corrupted.counts(factor) - clean.counts(factor)
    assert bool(((moved != 0).sum(1) == 1).all())
    assert torch.equal((moved != 0).nonzero()[:, 1], behavior.groups)
    assert bool((moved.abs().sum(1) == by).all())
    assert {int(m) for m in moved.sum(1)} == {by, -by}
    assert torch.equal(behavior.answers, clean.totals)
    assert torch.equal(behavior.wrong, corrupted.totals)
    assert len(set(behavior.groups.tolist())) == moved.shape[1]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_change_of_kind_leaves_the_answer(factor: Any) -> None:
    task = Counting(factor, "kind", by=2, pairs=60)
    clean, corrupted = task.scenes()
    assert torch.equal(clean.totals, corrupted.totals)
    for other in FACTORS:
        same = torch.equal(clean.counts(other), corrupted.counts(other))
        assert same == (other != factor)
    behavior = task.behavior()
    assert bool((behavior.wrong != behavior.answers).all())
    assert not torch.equal(behavior.clean[0], behavior.corrupted[0])


def test_pictures_show_their_scenes() -> None:
    scenes = Scenes.drawn(50, torch.Generator().manual_seed(0))
    images = scenes.images()
    assert images.shape == (50, 3, 32, 32)
    cells = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).amax(1).amax((2, 4))
    assert torch.equal(cells > 0, scenes.filled)
    blue = (images[:, 2] > 0.9).unflatten(1, (4, 8)).unflatten(3, (4, 8)).any(2).any(3)
    assert torch.equal(blue, scenes.colour == 0)
    # A disc is as wide at the top as at the bottom; a triangle is not.
    rows = images.amax(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).gt(0).sum(4)
    pointed = rows[:, :, 2] < rows[:, :, 5]
    assert torch.equal(pointed, scenes.shape == 0)
    counts = torch.bincount(
        Scenes.drawn(3400, torch.Generator().manual_seed(1)).totals, minlength=17
    )
    assert bool(((counts - 200).abs() < 70).all())


def test_both_pictures_have_one_noise_and_one_shift() -> None:
    behavior = Counting("shape", pairs=20).behavior()
    clean, corrupted = behavior.clean[0], behavior.corrupted[0]
    changed = (clean - corrupted).abs().amax(1) > 1e-5
    sizes = changed.sum((1, 2))
    assert int(sizes.min()) > 10
    assert int(sizes.max()) < 64
    quiet = Counting("shape", pairs=20, noise=0.0, shift=0).behavior()
    assert not torch.equal(quiet.clean[0], clean)
    assert bool((quiet.clean[0] == quiet.clean[0].round(decimals=1)).all())


class PerfectCounter(nn.Module):
    """Counts filled cells of pictures without noise, or only those of one shape's colour."""

    def __init__(self, channel: int | None = None) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, images: Tensor) -> Tensor:
        lit = images.amax(1) if self.channel is None else images[:, self.channel] - 0.5
        cells = lit.unflatten(1, (4, 8)).unflatten(3, (4, 8)).amax((2, 4))
        return -(cells.gt(0).sum((1, 2))[:, None] - torch.arange(17)).abs().float()


def accuracy(model: nn.Module, behavior: Behavior) -> float:
    return float(behavior.correct(model(behavior.clean[0])).float().mean())


def test_characteristics_tell_who_counts_one_colour_only() -> None:
    base = Counting(noise=0.0, shift=0, pairs=60)
    _, colours = base.characteristics()
    verdicts = []
    for model in (PerfectCounter(), PerfectCounter(channel=2)):
        values = {name: accuracy(model, as_behavior(v)) for name, v in colours.variants.items()}
        verdicts += colours.verdicts(values).values()
    assert verdicts == [True, False]


def test_counting_refuses_what_there_is_not() -> None:
    with pytest.raises(ArgumentError, match="factor: expected one of"):
        Counting("size")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="shapes: expected some of"):
        Counting(shapes=("square",))
    with pytest.raises(ArgumentError, match="colours: expected two of them to change"):
        Counting("colour", "kind", colours=("blue",))
    with pytest.raises(ArgumentError, match="by: expected 1 to 4"):
        Counting(by=5)
