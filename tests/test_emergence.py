"""`emergence`: closed forms of curves that rise, do not, or not yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mi.emergence import Onset, head_onsets, one_source, onset
from lightning_mi.errors import ArgumentError
from lightning_mi.record import Panel, Record, scalar

STEPS = np.arange(0, 4001, 20)


def logistic(middle: float, width: float, low: float = 0.02, high: float = 0.75) -> np.ndarray:
    return low + (high - low) / (1 + np.exp(-(STEPS - middle) / width))


def test_a_logistic_curve_forms_where_it_crosses_a_tenth() -> None:
    curve = logistic(1500, 60)
    found = onset(STEPS, curve, null=0.02)
    crossing = 1500 - 60 * np.log(9)  # where the logistic is at 0.1
    assert found.state == "formed"
    assert found.step is not None
    assert found.interval == (found.step - 20, found.step)
    assert found.interval[0] < crossing <= found.interval[1]
    assert found.start == curve[0]
    assert found.final == pytest.approx(0.75, abs=1e-6)
    assert found.threshold == pytest.approx(0.02 + 0.1 * 0.73, abs=1e-3)
    assert found.times_chance == pytest.approx(37.5, abs=1e-3)


@pytest.mark.parametrize("noise", [0.005, 0.02])
@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_the_onset_little(noise: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    found = onset(STEPS, logistic(1500, 60) + draw.normal(0, noise, len(STEPS)), null=0.02)
    assert found.state == "formed"
    assert found.step is not None
    assert abs(found.step - 1368) <= 100


@pytest.mark.parametrize("seed", range(20))
def test_flat_noise_is_none(seed: int) -> None:
    draw = np.random.default_rng(seed)
    assert onset(STEPS, 0.02 + draw.normal(0, 0.01, len(STEPS)), null=0.02).state == "none"


@pytest.mark.parametrize("seed", range(50))
def test_a_random_walk_gives_a_state(seed: int) -> None:
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 0.02, 100))
    found = onset(np.arange(100), walk)
    assert found.state in {"none", "forming", "formed"}
    assert (found.step is None) == (found.state != "formed")


def test_a_curve_that_still_rises_is_forming_not_none() -> None:
    late = onset(STEPS, logistic(3900, 150), null=0.02)
    assert late.state == "forming"
    assert late.step is None
    assert "times chance" in late.describe()
    assert "no onset" in late.describe()
    small = onset(STEPS, 0.02 + 0.06 * (STEPS / 4000) ** 4, null=0.02)
    assert small.state == "forming"  # below the margin, yet clearly on its way
    assert onset(STEPS, STEPS / 4000, null=0.02).state == "forming"


def test_both_margins_must_be_cleared() -> None:
    curve = logistic(1500, 60, high=0.2)
    assert onset(STEPS, curve, null=0.02).state == "formed"
    assert onset(STEPS, curve, null=0.15).state == "none"  # a head that passes its own null
    assert onset(STEPS, curve, null=0.02, margin=0.3).state == "none"
    assert onset(STEPS, np.full(len(STEPS), 0.9), null=0.02).state == "none"  # it began there


def test_a_rise_that_is_lost_again_is_none() -> None:
    curve = logistic(1500, 60)
    curve[120:] = 0.02
    assert onset(STEPS, curve, null=0.02).state == "none"


def test_a_lone_spike_is_not_a_crossing() -> None:
    curve = logistic(1500, 60)
    curve[10:12] = 0.9
    found = onset(STEPS, curve)
    assert found.step is not None
    assert found.step > 1300
    assert onset(STEPS, curve, sustained=2).step == 200


def test_fewer_than_eight_are_too_early() -> None:
    rising = [0, 0, 0.5, 1, 1, 1, 1]
    found = onset(range(7), rising)
    assert found.state == "too early"
    assert found.measurements == 7
    assert found.step is None
    assert onset(range(8), [*rising, 1]).state == "formed"
    assert onset([], []).state == "too early"
    assert onset([0], [float("nan")]).state == "too early"


def test_gaps_are_not_measured() -> None:
    curve = logistic(1500, 60)
    curve[::3] = np.nan
    found = onset(STEPS, curve, null=np.where(STEPS < 2000, np.nan, 0.02), tokens=list(STEPS * 10))
    assert found.state == "formed"
    assert found.null == pytest.approx(0.02)
    assert found.step is not None
    assert found.tokens == found.step * 10
    assert np.isfinite(curve[found.step // 20])
    assert onset(STEPS, np.full(len(STEPS), np.nan)).state == "too early"


def test_lengths_must_fit() -> None:
    with pytest.raises(ArgumentError, match="one number for each of 3 steps"):
        onset([0, 1, 2], [0.0, 1.0])


def test_every_state_has_words() -> None:
    assert onset(STEPS, logistic(1500, 60), null=0.02).describe() == (
        "formed at step 1,380 (after 1,360): from 0.02 to 0.75 (chance 0.02)"
    )
    assert Onset("none", start=0.0, final=0.1).describe() == "none: from 0.00 to 0.10"


def records(name: str, values: np.ndarray, source: str = "live") -> list[Record]:
    axes = ("layer", "head") if values.ndim == 3 else ()
    return [
        Record(name, Panel(torch.tensor(v), axes), int(s), tokens=int(s) * 8, source=source)
        for s, v in zip(STEPS, values, strict=True)
    ]


def test_heads_come_in_order_of_rising() -> None:
    flat = np.full(len(STEPS), 0.02)
    curves = np.stack([flat, logistic(2000, 60), logistic(900, 60), logistic(3900, 150)], 1)
    kept = records("head_scores/induction", curves.reshape(-1, 2, 2))
    found = head_onsets(kept)
    assert [f.label for f in found] == ["L1H0", "L0H1", "L1H1", "L0H0"]
    assert [f.onset.state for f in found] == ["formed", "formed", "forming", "none"]
    assert found[0].onset.tokens == 8 * (found[0].onset.step or 0)
    assert found[0].onset.null is None
    assert head_onsets(kept, "previous_token") == []


def test_the_higher_null_counts() -> None:
    curves = np.stack([logistic(1000, 60), logistic(1000, 60)], 1).reshape(-1, 1, 2)
    matched = np.full_like(curves, 0.01)
    matched[..., 1] = 0.7  # this head attends at a fixed offset whatever the tokens are
    null = [Record("head_scores/induction_null", scalar(0.02), 0)]
    kept = records("head_scores/induction", curves)
    found = head_onsets([*kept, *null, *records("head_scores/induction_matched", matched)])
    states = {f.label: (f.onset.state, round(f.onset.null or 0, 3)) for f in found}
    assert states == {"L0H0": ("formed", 0.02), "L0H1": ("none", 0.7)}


def test_live_records_come_before_swept_ones() -> None:
    flat, up = np.full((len(STEPS), 1, 1), 0.02), logistic(1000, 60).reshape(-1, 1, 1)
    swept = records("head_scores/induction", up, "sweep")
    both = [*swept, *records("head_scores/induction", flat)]
    assert head_onsets(swept)[0].onset.state == "formed"
    assert head_onsets(both)[0].onset.state == "none"
    assert {r.source for r in one_source(both)} == {"live"}
