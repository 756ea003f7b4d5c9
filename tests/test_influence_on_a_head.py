"""Which texts made an induction head form: known, because only some of them repeat a passage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _repeats import LENGTH, LONGEST, SHORTEST, Corpus, Trained, train
from influence_on_a_head import ask, auroc, moments


def test_the_first_half_repeats_and_the_control_has_the_same_tokens() -> None:
    corpus = Corpus.drawn(40, seed=3)
    assert int(corpus.repeats.sum()) == 20
    for text, other in zip(corpus.texts[:20], corpus.shuffled, strict=True):
        periods = [p for p in range(SHORTEST, LONGEST + 1) if bool((text[p:] == text[:-p]).all())]
        assert periods
        assert torch.equal(text[: min(periods)], other[: min(periods)])
        assert sorted(text.tolist()) == sorted(other.tolist())
        assert not bool((text == other).all())
    assert torch.equal(corpus.texts, Corpus.drawn(40, seed=3).texts)


def test_the_onset_lies_between_two_scorings() -> None:
    scores = [torch.tensor([[0.1, 0.1]]), torch.tensor([[0.1, 0.2]]), torch.tensor([[0.6, 0.1]])]
    run = Trained(
        train(torch.zeros(4, LENGTH, dtype=torch.long), steps=0).model, [0, 10, 20], scores
    )
    assert run.onset(0.3) == pytest.approx(12.5)
    assert run.head == (0, 0)
    assert math.isnan(run.onset(0.9))
    assert auroc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])) == 0.875


@pytest.fixture(scope="module")
def run() -> tuple[Trained, Corpus]:
    corpus = Corpus.drawn()
    return train(corpus.texts, seed=0, keep=True), corpus


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model is far")
@pytest.mark.parametrize("solver", ["dot", "kfac", "ekfac"])
def test_repeats_made_the_head(run: Any, solver: str) -> None:
    """Influence on the induction score, beside what would show a preference for nothing."""
    trained, corpus = run
    steps = moments(trained)
    before, at, after = (ask(trained, corpus, steps[name], solver) for name in steps)
    for found in (at, after):
        assert found["induction"] >= 0.75
        assert found["against the same tokens shuffled"] >= 0.75
        assert found["loss of plain text"] <= 0.25  # separates them as well, reversed
    for found in (before, at, after):
        low, high = found["random directions"]
        assert 0.3 < low < high < 0.7
    # Before the onset the score knows nothing, while the gradient's norm alone separates them.
    assert before["induction"] < 0.65
    assert before["against the same tokens shuffled"] < 0.65
    assert before["gradient norm"] > 0.85
