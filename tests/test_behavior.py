"""Behaviors: pairs of prompts that can be compared position by position."""

from __future__ import annotations

import pytest
import torch

import lightning_mi as mi
from lightning_mi.behavior import as_behavior
from lightning_mi.behaviors import IndirectObject


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
