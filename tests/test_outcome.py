"""What the summary of a run says: onset, final and best value of each role of heads."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mi import Panel, Record
from lightning_mi.callbacks._facts import outcome
from lightning_mi.emergence import head_onsets


def records(curve: list[float], score: str = "induction") -> list[Record]:
    """Return a curve of head L0H1 beside a head that stays at chance."""
    made = []
    for at, value in enumerate(curve):
        panel = Panel(torch.tensor([[0.05, value]]), ("layer", "head"))
        made.append(Record(f"head_scores/{score}", panel, step=10 * at))
        null = Panel(torch.full((1, 2), 0.05), ("layer", "head"))
        made.append(Record(f"head_scores/{score}_null", null, step=10 * at))
    return made


RISEN = [0.05, 0.05, 0.3, 0.8, 0.95, 0.9, 0.9, 0.9, 0.9, 0.9]


def test_onset_final_and_best() -> None:
    found = outcome([*records(RISEN), *records([0.1, 0.2], "previous_token")])
    assert found == {
        "induction_onset": 20,
        "induction_final": pytest.approx(0.9),
        "induction_best": pytest.approx(0.95),
        "prev_token_final": pytest.approx(0.2),
        "prev_token_best": pytest.approx(0.2),
    }
    assert head_onsets(records(RISEN))[0].onset.step == 20


def test_the_last_defined_value_counts() -> None:
    last = Panel(torch.full((1, 2), math.nan), ("layer", "head"))
    found = outcome([*records([0.1, 0.4, 0.3]), Record("head_scores/induction", last, step=30)])
    assert found["induction_final"] == pytest.approx(0.3)
    assert found["induction_best"] == pytest.approx(0.4)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    nothing = Panel(torch.full((1, 2), math.nan), ("layer", "head"))
    assert outcome([]) == {}
    assert outcome([Record("head_scores/induction", nothing)]) == {}
