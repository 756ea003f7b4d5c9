"""Behaviors: pairs of prompts that can be compared position by position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lightning_mi as mi
from lightning_mi import Behavior
from lightning_mi.behavior import as_behavior
from lightning_mi.behaviors import (
    AnyOf,
    Characteristic,
    Expectation,
    IndirectObject,
    Induction,
    PromptPairs,
)
from lightning_mi.errors import ArgumentError
from lightning_mi.target import LogitDifference


def characters(text: str) -> list[int]:
    """A tokenizer of words, with their spaces in front, and of punctuation."""
    words = text.replace(",", " ,").split()
    return [sum(ord(c) * 31**i for i, c in enumerate(word)) % 65_521 for word in words]


def test_indirect_object_asks_for_the_name_that_is_not_repeated() -> None:
    behavior = IndirectObject(characters, pairs=8).behavior()
    assert len(behavior) == 8
    rows = torch.arange(8)
    subject = behavior.clean[rows, behavior.where("subject")]
    names = torch.stack([behavior.clean[rows, behavior.where(n)] for n in FIRST], 1)
    assert bool((subject == behavior.wrong).all())
    assert bool(((names == subject[:, None]).sum(1) == 1).all())
    assert bool(((names == behavior.answers[:, None]).sum(1) == 1).all())
    # Swapped prompts differ in the subject alone, which is then the clean answer.
    changed = behavior.clean != behavior.corrupted
    assert bool((changed.sum(1) == 1).all())
    assert torch.equal(behavior.corrupted[changed], behavior.answers)


FIRST = ("first_name", "second_name")


def test_the_same_seed_gives_the_same_prompts() -> None:
    a, b, c = (IndirectObject(characters, pairs=4, seed=s).behavior() for s in (0, 0, 1))
    assert torch.equal(a.clean, b.clean)
    assert a.texts != c.texts


def test_metric_asks_the_clean_question_of_any_outputs() -> None:
    behavior = IndirectObject(characters, pairs=3).behavior()
    outputs = torch.randn(3, behavior.clean.shape[1], 65_521)
    rows = torch.arange(3)
    expected = outputs[rows, -1, behavior.answers] - outputs[rows, -1, behavior.wrong]
    assert torch.equal(behavior.metric(outputs), expected)


def test_parts_are_disjoint_and_keep_their_answers() -> None:
    behavior = IndirectObject(characters, pairs=6).behavior()
    first, second = behavior.split(0.5)
    assert (len(first), len(second)) == (3, 3)
    assert not set(first.texts) & set(second.texts)
    outputs = torch.randn(6, behavior.clean.shape[1], 65_521)
    place = [behavior.texts.index(t) for t in second.texts]
    assert torch.equal(second.metric(outputs[place]), behavior.metric(outputs)[place])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_same_prompt_is_never_in_both_parts(share: float) -> None:
    clean = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2], [7, 8], [9, 9]])
    behavior = Behavior(clean, clean.flip(1), answers=torch.arange(8))
    for seed in range(4):
        parts = behavior.split(share, seed)
        one, other = ({tuple(row) for row in part.clean.tolist()} for part in parts)
        assert one
        assert other
        assert not one & other
        kept = sorted(int(i) for part in parts for i in (part.answers if part else ()))
        assert kept == [*range(8)]
        if share == 0.5:
            assert {len(part) for part in parts} <= {3, 4, 5}
    one_prompt = Behavior(clean[:1].expand(4, -1), clean[:4])
    assert [len(part) for part in one_prompt.split()] == [2, 2]


@pytest.mark.parametrize("share", [0, 1, -0.5, math.nan])
def test_a_share_that_leaves_one_part_none_is_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match="share: expected a share above 0 and below 1"):
        IndirectObject(characters, pairs=6).behavior().split(share)


def test_the_size_of_a_vocabulary_is_no_protocol() -> None:
    size: Any = 20
    with pytest.raises(ArgumentError, match=r"protocol: expected RepeatedTokens, got 20"):
        Induction(size)


@pytest.mark.parametrize("metric", ["probability", "log_probability", "loss", "rank"])
def test_metrics_by_name(metric: str) -> None:
    behavior = IndirectObject(characters, pairs=2, metric=metric).behavior()
    outputs = torch.zeros(2, behavior.clean.shape[1], 65_521)
    outputs[torch.arange(2), -1, behavior.answers] = 3.0
    chance = outputs[0, -1].softmax(-1).max()
    wanted = {"probability": chance, "log_probability": chance.log(), "loss": -chance.log()}
    value = behavior.metric(outputs)
    assert torch.allclose(value, wanted.get(metric, torch.zeros(())).expand(2))


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(mi.ArgumentError, match="metric: expected one of"):
        IndirectObject(characters, pairs=2, metric="accuracy").behavior()
    with pytest.raises(mi.ArgumentError, match="pairs of prompts of one length"):
        IndirectObject(characters, pairs=2, names=("Mary", "Mary", "Mary")).behavior()
    with pytest.raises(mi.ArgumentError, match="position: expected one of"):
        IndirectObject(characters, pairs=2).behavior().where("verb")
    with pytest.raises(mi.ArgumentError, match="behavior: expected a Behavior"):
        as_behavior(3)  # type: ignore[arg-type]


def test_right_is_the_answer_that_beats_the_wrong_one() -> None:
    ids = torch.zeros(3, 2, dtype=torch.long)
    outputs = torch.zeros(3, 2, 4)
    outputs[:, -1] = torch.tensor([[1.0, 0, 2, 0], [0, 1, 2, 0], [1, 1, 0, 0]])
    answers, wrong = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    against = Behavior(ids, ids, answers=answers, wrong=wrong)
    assert against.correct(outputs).tolist() == [True, False, False]
    assert Behavior(ids, ids, answers=answers).correct(outputs).tolist() == [False, False, False]
    margin = LogitDifference(2, other=0)
    assert Behavior(ids, ids, margin=margin).correct(outputs).tolist() == [True, True, False]
    with pytest.raises(mi.ArgumentError, match="margin: expected a target that is above zero"):
        Behavior(ids, ids).correct(outputs)


def test_last_is_the_last_that_is_not_padding() -> None:
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    behavior = Behavior(batch, batch, positions={"last": -1, "before": [-2, 1]})
    assert behavior.where("last").tolist() == [1, 3]
    assert behavior.where("before").tolist() == [0, 1]
    assert behavior.select([1]).where("last").tolist() == [3]


def test_parts_of_sets_of_answers_keep_their_own() -> None:
    ids = torch.zeros(3, 2, dtype=torch.long)
    right = torch.tensor([[0, 1], [1, -1], [2, 3]])
    target = AnyOf(right, torch.tensor([[4], [4], [4]]))
    behavior = Behavior(ids, ids, target, margin=target)
    outputs = torch.randn(3, 2, 5)
    part = behavior.select([2, 0])
    assert torch.equal(part.metric(outputs[[2, 0]]), behavior.metric(outputs)[[2, 0]])
    assert torch.equal(part.correct(outputs[[2, 0]]), behavior.correct(outputs)[[2, 0]])


def test_sets_of_answers_by_hand() -> None:
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4])
    outputs = chances.log()[None, None]
    sets = torch.tensor([[1, 2]]), torch.tensor([[3, -1]])
    expected = {
        "probability": 0.5,
        "log_probability": torch.tensor(0.5).log(),
        "loss": -torch.tensor(0.5).log(),
        "probability_difference": 0.1,
        "logit_difference": torch.tensor(0.5 / 0.4).log(),
        "margin": torch.tensor(0.3 / 0.4).log(),
        "rank": 1.0,
    }
    for metric, value in expected.items():
        target = AnyOf(*sets, metric)
        assert torch.allclose(target(outputs, None), torch.as_tensor(value)[None]), metric
        assert target.higher_is_better == (metric not in ("loss", "rank"))


def test_expectations_compare_as_they_say() -> None:
    values = {"a": 0.5, "b": 0.25, "undefined": float("nan")}
    assert Expectation("a", "above", "b", 0.2).holds(values)
    assert not Expectation("a", "above", "b", 0.25).holds(values)
    assert Expectation("b", "below", "a").holds(values)
    assert Expectation("a", "near", "b", 0.25).holds(values)
    assert not Expectation("a", "near", 0.2, 0.25).holds(values)
    assert not any(Expectation("undefined", r, "a", 1.0).holds(values) for r in RELATIONS)
    assert str(Expectation("a", "near", 0.2, 0.25)) == "a ≈ 0.2 ± 0.25"
    with pytest.raises(mi.ArgumentError, match="values: expected a number for each of"):
        Expectation("a", "above", "c").holds(values)
    with pytest.raises(mi.ArgumentError, match="relation: expected 'above'"):
        Expectation("a", "equal", "c")  # type: ignore[arg-type]


RELATIONS: Any = ("above", "below", "near")


def test_characteristics_name_their_variants() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    one = Behavior(ids, ids)
    above = Expectation("a", "above", "b")
    made = Characteristic("one", "a does better than b.", {"a": one, "b": one}, (above,))
    assert made.verdicts({"a": 1.0, "b": 0.0}) == {"a > b": True}
    for expected in ((), (Expectation("a", "above", "c"),)):
        with pytest.raises(mi.ArgumentError, match="expected: expected expectations about"):
            Characteristic("one", "a does better.", {"a": one}, expected)


def test_a_behavior_of_ones_own_takes_ten_lines() -> None:
    prompts = [
        ("the [noun: keys] on the table", "the [noun: key] on the table", " are", " is"),
        ("the [noun: dog] near the tree", "the [noun: dogs] near the tree", " is", " are"),
    ]
    behavior = PromptPairs(characters, prompts, name="agreement").behavior()
    assert behavior.where("noun").tolist() == [1, 1]
    assert behavior.where("last").tolist() == [4, 4]
    assert behavior.answers is not None
    assert behavior.answers.tolist() == characters("are is")
    assert behavior.texts[0] == ("the keys on the table", "the key on the table")
    swapped = behavior.clean[:, 1] != behavior.corrupted[:, 1]
    assert bool(swapped.all())


def test_a_prompt_of_ones_own_is_never_dropped() -> None:
    row = ("a b", "a b c", " d", " e")
    with pytest.raises(mi.ArgumentError, match="1 left out because clean and corrupted prompts"):
        PromptPairs(characters, [("a", "b", " c", " d"), row]).behavior()
    with pytest.raises(mi.ArgumentError, match="answers begin with the same token"):
        PromptPairs(characters, [("a", "b", " c", " c")]).behavior()
    lengths: Any = [("a b", "a c", " d", " e"), ("a b c", "a c c", " d", " e")]
    with pytest.raises(mi.ArgumentError, match="every pair of prompts of one length"):
        PromptPairs(characters, lengths).behavior()
    padded = PromptPairs(characters, lengths, padding=0).behavior()
    assert padded.clean["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded.where("last").tolist() == [1, 2]
    with pytest.raises(mi.ArgumentError, match=r"marks of the form \[name: words\]"):
        PromptPairs(characters, [("a [b]", "a c", " d", " e")]).behavior()


def test_who_is_named_first_can_be_chosen() -> None:
    for order, place in (("receiver_first", 0), ("giver_first", 1)):
        behavior = IndirectObject(characters, pairs=8, order=order).behavior()  # type: ignore[arg-type]
        named = behavior.clean[torch.arange(8), behavior.where(FIRST[place])]
        assert behavior.answers is not None
        assert torch.equal(named, behavior.answers)
    with pytest.raises(mi.ArgumentError, match="order: expected one of"):
        IndirectObject(characters, order="any")  # type: ignore[arg-type]
    (only,) = IndirectObject(characters).behavior().characteristics
    assert set(only.variants) == {"receiver_first", "giver_first"}
