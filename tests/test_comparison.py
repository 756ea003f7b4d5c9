"""Rank correlation, its floor, and the agreement of explanations."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mi import Panel, Record
from lightning_mi.comparison import agreement, permutation_floor, spearman

NAN = float("nan")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_closed_forms() -> None:
    assert spearman(t(1, 2, 3, 4), t(1, 8, 27, 64)) == 1
    assert spearman(t(1, 2, 3, 4), t(9, 7, 1, -5)) == -1
    # 1 - 6 * sum(d²) / (n (n² - 1)) with d = (0, 1, -1, 0)
    assert spearman(t(1, 2, 3, 4), t(1, 3, 2, 4)) == pytest.approx(1 - 6 * 2 / 60)
    # ranks (1.5, 1.5, 3) against (1, 2, 3): 1.5 / sqrt(1.5 * 2)
    assert spearman(t(0, 0, 5), t(1, 2, 3)) == pytest.approx(1.5 / math.sqrt(3))
    assert spearman(t(-math.inf, 0, math.inf), t(1, 2, 3)) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [(t(1, 1, 1), t(1, 2, 3)), (t(1, 2), t(1, 2)), (t(), t()), (t(1, NAN, 2), t(1, 2, 3))],
)
def test_undefined_is_nan(a: torch.Tensor, b: torch.Tensor) -> None:
    assert math.isnan(spearman(a, b))
    assert math.isnan(spearman(b, a))


@pytest.mark.parametrize("levels", [3, 1000])
def test_against_scipy(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(levels)
    for _ in range(10):
        a, b = torch.randint(0, levels, (2, 40), generator=generator).float()
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("n", [20, 64, 128])
def test_the_floor_is_that_of_random_orders(n: int) -> None:
    assert permutation_floor(n) == pytest.approx(1.96 / math.sqrt(n - 1), rel=0.08)
    assert permutation_floor(n, level=0.5) < permutation_floor(n)


def test_the_floor_is_reproducible_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert permutation_floor(10) == permutation_floor(10)
    assert torch.equal(torch.get_rng_state(), state)
    assert math.isnan(permutation_floor(2))
    assert permutation_floor(3) == 1


# -------------------------------------------------------------------- agreement

ROWS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.2, 0.1, 0.0]])


def firing(step: int, scores: list[list[float]], values: list[float]) -> list[Record]:
    """Return records of two heads, L0H1 and L1H0, and of a saliency of another batch row too."""
    attention = Panel(ROWS, ("head", "key_position"), {"head": ["L0H1", "L1H0"]})
    saliency = Panel([values, [0.0] * len(values)], ("example", "position"))
    return [
        Record("prompt/attention", attention, step=step, epoch=3, samples=9),
        Record("head_scores/induction", Panel(scores, ("layer", "head")), step=step),
        Record("saliency/values", saliency, step=step),
    ]


def test_the_strongest_recorded_head_is_compared() -> None:
    # L1H1 scores highest but is not recorded; of the recorded ones L1H0 does.
    made = agreement(firing(5, [[0.9, 0.3], [0.4, 1.0]], [-9.0, 4.0, 2.0, 1.0]))
    assert [r.name for r in made] == ["agreement/saliency"]
    record = made[0]
    assert record.panel.item() == 1
    assert (record.step, record.epoch, record.samples) == (5, 3, 9)
    assert record.panel.convention["head"] == "L1H0"
    assert record.panel.convention["n"] == 4
    assert record.panel.convention["floor"] == permutation_floor(4)
    assert record.panel.convention["display"] == {"headline": "agree_sal"}


def test_the_head_may_change_from_step_to_step() -> None:
    first = firing(5, [[0.0, 0.3], [0.4, 0.0]], [4.0, 3.0, 2.0, 1.0])
    second = firing(9, [[0.0, 0.5], [0.4, 0.0]], [4.0, 3.0, 2.0, 1.0])
    made = agreement([*second, *first])
    assert [(r.step, r.panel.convention["head"], r.panel.item()) for r in made] == [
        (5, "L1H0", 1.0),
        (9, "L0H1", -1.0),
    ]


def test_scores_of_nan_are_no_strongest() -> None:
    made = agreement(firing(5, [[0.0, 0.1], [NAN, 0.0]], [1.0, 2.0, 3.0, 4.0]))
    assert made[0].panel.convention["head"] == "L0H1"


def test_an_explanation_with_nan_agrees_with_nothing() -> None:
    made = agreement(firing(5, [[0.0, 0.3], [0.4, 0.0]], [1.0, NAN, 3.0, 4.0]))
    assert math.isnan(made[0].panel.item())


def test_positions_beyond_the_prompt_do_not_count() -> None:
    made = agreement(firing(5, [[0.0, 0.3], [0.4, 0.0]], [4.0, 3.0, 2.0, 1.0, 100.0]))
    assert made[0].panel.item() == 1


def test_nothing_without_all_three() -> None:
    records = firing(5, [[0.0, 0.3], [0.4, 0.0]], [4.0, 3.0, 2.0, 1.0])
    for left_out in range(3):
        assert agreement([r for i, r in enumerate(records) if i != left_out]) == []
