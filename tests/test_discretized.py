"""Discretised integrated gradients: paths of words, closed forms, a slow twin, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi.attribution import (
    DiscretizedIntegratedGradients,
    discretized_integrated_gradients,
)
from lightning_mi.attribution.word_paths import Strategy, word_paths
from lightning_mi.errors import ArgumentError

STRATEGIES: tuple[Strategy, ...] = ("greedy", "maxcount")


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 6), nn.Embedding(8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        hidden = torch.tanh(hidden)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.out((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_dimension_is_monotone(strategy: Strategy) -> None:
    table, ends = torch.randn(50, 8), torch.randn(12, 8)
    ids = torch.arange(12)
    paths = word_paths(table, ids, ends, 10, strategy, 20)
    close(paths[0], table[ids], 0)
    close(paths[-1], ends, 0)
    toward = (ends - table[ids]).sign()
    assert bool((paths.diff(dim=0) * toward >= -1e-6).all())


def twin(
    table: Tensor, word: int, end: Tensor, steps: int, strategy: Strategy, near: int
) -> list[list[float]]:
    """One path, with lists and loops."""
    point, goal = table[word].tolist(), end.tolist()
    path = [point]
    for left in range(steps, 1, -1):
        others = sorted(
            (float((table[c] - table[word]).square().sum()), c)
            for c in range(len(table))
            if c != word
        )
        found = []
        for rank, (_, c) in enumerate(others[:near]):
            there, count, off = [], 0, 0.0
            for p, b, w in zip(point, goal, table[c].tolist(), strict=True):
                inside = min(p, b) <= w <= max(p, b)
                q = w if inside else p + (b - p) / left
                there.append(q)
                count += inside
                off += (q - w) ** 2
            found.append((off if strategy == "greedy" else -count, rank, c, there))
        _, _, word, point = min(found)
        path.append(point)
    return [*path, goal]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_paths_slow_twin(strategy: Strategy) -> None:
    table, ends = torch.randn(20, 4).double(), torch.randn(5, 4).double()
    ids = torch.tensor([3, 0, 7, 7, 19])
    paths = word_paths(table, ids, ends, 6, strategy, 9)
    for i, word in enumerate(ids.tolist()):
        expected = torch.tensor(twin(table, word, ends[i], 6, strategy, 9), dtype=torch.float64)
        close(paths[:, i], expected)


def test_words_on_a_line_are_walked_over() -> None:
    table = torch.tensor([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [50.0, -50.0]])
    path = word_paths(table, torch.tensor([0]), torch.zeros(1, 2), 4, "greedy", 2)
    assert path[:, 0, 0].tolist() == [4, 3, 2, 1, 0]


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, ends, ids = torch.randn(40, 6), torch.randn(9, 6), torch.arange(9)
    whole = word_paths(table, ids, ends, 8)
    monkeypatch.setattr("lightning_mi.attribution.word_paths.NUMBERS", 1)
    close(word_paths(table, ids, ends, 8), whole, 1e-6)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["left", "trapezoid"])
def test_linear_model_is_exact_on_any_path(rule: Any) -> None:
    model = nn.Sequential(nn.Embedding(12, 5), nn.Flatten(), nn.Linear(15, 2)).double()
    ids = torch.randint(1, 12, (4, 3))
    found = discretized_integrated_gradients(model, ids, 1, baseline=0, steps=5, rule=rule)
    table = dict(model.named_parameters())["0.weight"].detach()
    weight = dict(model.named_parameters())["2.weight"].detach()[1].view(3, 5)
    close(found.values, ((table[ids] - table[0]) * weight).sum(-1))
    assert bool(found.converged.all())  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", ["left", "trapezoid"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slow_twin(strategy: Strategy, rule: Any) -> None:
    model, ids = Words().double(), torch.tensor([[4, 9, 4]])
    found = discretized_integrated_gradients(
        model, ids, 1, baseline=2, steps=7, strategy=strategy, neighbours=11, rule=rule
    )
    table = model.words.weight.detach()
    paths = [twin(table, int(i), table[2], 7, strategy, 11)[::-1] for i in ids[0]]
    points = torch.tensor(paths, dtype=torch.float64).transpose(0, 1)
    slopes = []
    for point in points:
        leaf = point.clone().requires_grad_()
        hidden = torch.tanh(leaf + model.places.weight[:3].detach()).mean(0)
        slopes.append(torch.autograd.grad(model.out(hidden)[1], leaf)[0])
    total = torch.zeros(3).double()
    for k in range(7):
        slope = slopes[k] if rule == "left" else (slopes[k] + slopes[k + 1]) / 2
        total += ((points[k + 1] - points[k]) * slope).sum(1)
    close(found.values[0], total)
    with torch.no_grad():
        change = (model(ids) - model(torch.full_like(ids, 2)))[:, 1]
    close(found.output_change, change)  # type: ignore[arg-type]


def test_trapezoid_adds_up_better() -> None:
    model, ids = Words().double(), torch.randint(0, 30, (16, 8))
    off = {}
    for rule in ("left", "trapezoid"):
        found = discretized_integrated_gradients(model, ids, 0, baseline=0, rule=rule)
        off[rule] = float(found.delta.abs().mean())  # type: ignore[union-attr]
    assert off["trapezoid"] < 0.8 * off["left"]


def test_batch_equals_one_by_one_and_padding_scores_zero() -> None:
    model = Words()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [1, 9, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
    }
    both = discretized_integrated_gradients(model, batch, 1, baseline=7, steps=9)
    for i, length in enumerate((4, 2, 3)):
        one = {key: value[i : i + 1, :length] for key, value in batch.items()}
        alone = discretized_integrated_gradients(model, one, 1, baseline=7, steps=9)
        close(both.values[i, :length], alone.values[0], 1e-6)
        assert not both.values[i, length:].any()
    kept = discretized_integrated_gradients(model, batch, 1, baseline=7, keep=[1])
    assert float(kept.values[0, 0]) == float(kept.values[2, 0]) == 0
    assert float(kept.values[0, 1]) != 0


def test_vectors_as_baseline_and_half_precision() -> None:
    model, ids = Words().double(), torch.randint(0, 30, (2, 5))
    exact = discretized_integrated_gradients(model, ids, 1, steps=6).values
    zeros = discretized_integrated_gradients(model, ids, 1, steps=6, baseline=torch.zeros(6))
    close(exact, zeros.values)
    found = discretized_integrated_gradients(model.bfloat16(), ids, 1, steps=6)
    assert found.values.dtype == torch.bfloat16
    assert found.gap is not None
    assert found.gap.dtype == torch.float32


def test_table_of_one_word_walks_straight() -> None:
    model = nn.Sequential(nn.Embedding(1, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    found = discretized_integrated_gradients(model, torch.zeros(1, 2, dtype=torch.long), 0, steps=3)
    assert bool(found.converged)


def test_refused() -> None:
    with pytest.raises(ArgumentError, match="looked up in one"):
        discretized_integrated_gradients(nn.Linear(3, 2), torch.randn(2, 3), 0)
    for options in ({"steps": 0}, {"strategy": "best"}, {"neighbours": 0}, {"rule": "midpoint"}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            discretized_integrated_gradients(Words(), torch.zeros(1, 2).long(), 0, **options)
        with pytest.raises(ArgumentError, match=next(iter(options))):
            DiscretizedIntegratedGradients(**options)


def test_measurement() -> None:
    model = Words()
    batch = (torch.randint(0, 30, (6, 4)), torch.randint(0, 2, (6,)))
    measured = DiscretizedIntegratedGradients(baseline=0, steps=5)
    panels = {r.name: r.panel for r in mi.measure(model, [measured], batch=batch)}
    values = panels["discretized_integrated_gradients/values"]
    assert values.axes == ("example", "position")
    direct = discretized_integrated_gradients(
        model, batch[0][:2], batch[1][:2], baseline=0, steps=5
    )
    close(values.values, direct.values, 1e-6)
