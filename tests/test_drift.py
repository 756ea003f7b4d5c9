"""How attributions move and where they lie: closed forms, records, live and after a resume."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import language_model, loaders, trainer
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi import Panel, Record, Run
from lightning_mi.attribution import (
    Concentration,
    Saliency,
    concentration,
    drift,
    drift_series,
    saliency,
    share,
)
from lightning_mi.callbacks import SaliencyMonitor
from lightning_mi.comparison import spearman
from lightning_mi.errors import ArgumentError

NAN = float("nan")


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False, equal_nan=True)


# --- two attributions -----------------------------------------------------------------------------


def test_closed_forms() -> None:
    a, b = t([1, 2, 3, 4], [1, 2, 3, 4]), t([1, 3, 2, 4], [-4, -3, -2, -1])
    found = drift(a, b, k=2)
    close(found.spearman, t([0.8, 1.0])[0])
    close(found.absolute, t([0.8, -1.0])[0])
    close(found.jaccard, t([1 / 3, 0])[0])  # {2, 3} and {1, 3}; {2, 3} and {0, 1}
    close(found.cosine, t([29 / 30, -20 / 30])[0])


def test_equal_scaled_and_opposite() -> None:
    a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    same, opposite = drift(a, 5 * a), drift(a, -a)
    for one in (same.spearman, same.absolute, same.jaccard, same.cosine):
        close(one, torch.ones(3))
    for one in (opposite.spearman, opposite.cosine):
        close(one, -torch.ones(3))
    close(opposite.jaccard, torch.ones(3))
    assert same.k == 4


def test_slow_twin() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 5, 12, generator=generator)
    found = drift(a, b, k=3)
    for i in range(5):
        assert found.spearman[i].item() == pytest.approx(spearman(a[i], b[i]), abs=1e-12)
        tops = []
        for scores in (a[i], b[i]):
            size = scores.abs().tolist()
            best = max(combinations(range(12), 3), key=lambda c: sum(size[j] for j in c))
            tops.append(set(best))
        assert found.jaccard[i].item() == pytest.approx(
            len(tops[0] & tops[1]) / len(tops[0] | tops[1])
        )


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ties_share_their_ranks(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    a, b = torch.randint(-levels, levels, (2, 6, 30), generator=generator).double()
    found = drift(a, b)
    for i in range(6):
        assert found.spearman[i].item() == pytest.approx(spearman(a[i], b[i]), abs=1e-12)
        assert found.absolute[i].item() == pytest.approx(
            spearman(a[i].abs(), b[i].abs()), abs=1e-12
        )
    assert drift(t([1, 2]), t([1, 2])).spearman.isnan().all()
    assert drift(t([1, NAN, 2]), t([1, 2, 3])).spearman.isnan().all()


def test_pixels_are_units_where_axes_are_named() -> None:
    values = torch.randn(2, 3, 4, 5)
    axes = ("example", "channel", "y", "x")
    one, other = Panel(values, axes), Panel(values.flip(1), axes)
    close(drift(one, other).spearman, torch.ones(2))
    assert drift(one, other).units == 20
    assert drift(values, values).units == 60
    attribution = saliency(nn.Conv2d(3, 2, (4, 5)), values, lambda y, batch: y.sum((1, 2, 3)))
    assert drift(attribution, attribution).units == 20


def test_undefined_is_nan_with_a_reason() -> None:
    found = drift(t([0, 0, 0, 0]), t([1, 2, 3, 4]))
    for one in (found.spearman, found.absolute, found.jaccard, found.cosine):
        assert one.isnan().all()
    reading = found.reading()
    assert all("reason" in panel.convention for panel in reading.values())
    half = drift(t([0, 0, 0, 0], [1, 2, 3, 4]), t([1, 2, 3, 4], [1, 2, 3, 4]))
    assert half.reading()["spearman"].item() == 1
    assert half.reading()["spearman"].convention["n"] == 1


def test_chance_is_stated_and_true() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 400, 30, generator=generator)
    reading = drift(a, b, k=6).reading()
    for name in ("spearman", "absolute", "jaccard"):
        null = reading[name].convention["null"]
        assert reading[name].item() == pytest.approx(null, abs=0.03)
    floor = reading["spearman"].convention["floor"]
    assert (drift(a, b).spearman.abs() < floor).double().mean().item() == pytest.approx(
        0.95, abs=0.03
    )


def test_large_images_fit_in_memory() -> None:
    a = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    found = drift(a, a + 0.1 * a.flip(1))
    assert 0.98 < found.spearman.item() < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift(t([1, 2, 3]), t([1, 2])), "b: expected the shape"),
        (lambda: drift(t([1, 2, 3]), t([1, 2, 3]), k=4), "k: expected an int from 1 to 3"),
        (lambda: drift(torch.ones(3), torch.ones(3)), "scores"),
        (lambda: share(t([1, 2, 3]), torch.tensor([True])), "mask"),
        (
            lambda: mi.measure(nn.Linear(2, 2), Concentration(special=[0]), batch=labelled()),
            "special",
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


# --- one attribution ------------------------------------------------------------------------------


def test_concentration_in_closed_form() -> None:
    gini, entropy = concentration(t([1, 1, 1, 1], [0, 0, 0, -3], [1, -2, 3, 4], [0, 0, 0, 0]))
    close(gini, torch.tensor([0, 0.75, 0.25, NAN]))
    mixed = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    close(entropy, t([math.log(4), 0, mixed, NAN])[0])


def test_gini_is_the_mean_difference() -> None:
    scores = torch.randn(3, 17, generator=torch.Generator().manual_seed(3)).double()
    gini, _ = concentration(scores)
    p = scores.abs()
    pairs = (p[:, :, None] - p[:, None, :]).abs().mean((1, 2))
    close(gini, pairs / (2 * p.mean(1)))


def test_share() -> None:
    scores = t([3, -1, 0, 4], [1, 1, 1, 1])
    close(share(scores, torch.tensor([True, True, False, False])), torch.tensor([0.5, 0.5]))
    each = torch.tensor([[True, False, False, False], [True, True, True, False]])
    close(share(scores, each), torch.tensor([3 / 8, 0.75]))
    image = torch.ones(2, 3, 4, 5)
    region = torch.zeros(4, 5, dtype=torch.bool)
    region[:2] = True
    close(share(Panel(image, ("example", "channel", "y", "x")), region), torch.tensor([0.5, 0.5]))


def labelled() -> tuple[Tensor, Tensor]:
    return torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])


def test_the_measurement_knows_background_special_tokens_and_a_mask() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0], [2.0, 2.0]]))
    measurement = Concentration(background=0.0, mask=torch.tensor([True, False]))
    found = {r.what: r.panel for r in mi.measure(model, measurement, batch=labelled())}
    assert found["background"].item() == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["background"].convention["null"] == 0.5
    assert found["masked"].item() == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["gini"].item() == pytest.approx((0.25 + 0) / 2)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(ids)).sum(1))

    words, ids = Words(), torch.tensor([[0, 3, 4], [0, 2, 1]])
    batch = (ids, torch.tensor([0, 1]))
    special = {r.what: r.panel for r in mi.measure(words, Concentration(special=[0]), batch=batch)}
    scores = saliency(words, batch).values
    expected = (scores[:, 0] / scores.sum(1)).mean().item()
    assert special["special"].item() == pytest.approx(expected)
    assert special["special"].convention["null"] == pytest.approx(1 / 3)


# --- over a run -----------------------------------------------------------------------------------


def records(*values: list[float], name: str = "saliency") -> list[Record]:
    said = {"method": "saliency"}
    return [
        Record(f"{name}/values", Panel([v], ("example", "feature"), {}, "1", said), step=10 * i)
        for i, v in enumerate(values)
    ]


def test_a_series_compares_with_the_one_before_and_the_last() -> None:
    run = records([1, 2, 3, 4], [1, 3, 2, 4], [4, 3, 2, 1])
    other = Record("head_scores/values", Panel([[1.0, 2.0]], ("layer", "head")), step=0)
    made = {(r.what, r.step): r for r in drift_series([*reversed(run), other])}
    assert all(r.measurement == "saliency_drift" for r in made.values())
    assert made["spearman", 10].panel.item() == pytest.approx(0.8)
    assert made["spearman", 20].panel.item() == pytest.approx(-0.8)
    assert made["spearman_final", 0].panel.item() == pytest.approx(-1)
    assert made["spearman_final", 20].panel.item() == pytest.approx(1)
    assert ("spearman", 0) not in made
    assert made["gini", 0].panel.item() == pytest.approx(0.25)
    assert made["cosine", 20].panel.convention["at_step"] == 10
    shares = drift_series(run, final=False, mask=torch.tensor([True, False, False, False]))
    assert [r.panel.item() for r in shares if r.what == "share"] == pytest.approx([0.1, 0.1, 0.4])


def test_inputs_of_another_shape_are_not_compared() -> None:
    made = drift_series(records([1, 2, 3, 4], [1, 2, 3]))
    assert {r.what for r in made if r.step == 10} >= {"gini", "spearman_final"}
    assert not [r for r in made if r.what == "spearman"]


def test_live_records_are_those_of_the_series(tmp_path: Any) -> None:
    monitor = SaliencyMonitor(every_n_train_steps=2)
    train, validation = loaders()
    fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=6)
    fitted.fit(language_model(), train, validation)
    run = Run.open(tmp_path)
    values = run.records("saliency/values", source="live")
    assert [r.step for r in values] == [0, 2, 4, 6]
    expected = {(r.name, r.step): r for r in drift_series(values)}
    live = {(r.name, r.step): r for r in run.records("saliency_drift", source="live")}
    assert live.keys() == expected.keys()
    assert all(r.panel.equal(expected[key].panel) for key, r in live.items())
    spearmans = [r.panel.item() for r in run.records("saliency_drift/spearman")]
    assert all(-1 <= rho < 1 for rho in spearmans)


def test_a_resumed_run_goes_on_from_the_firing_before(tmp_path: Any) -> None:
    train, validation = loaders()

    def fit(steps: int, ckpt: Any = None) -> Any:
        monitor = SaliencyMonitor(every_n_train_steps=2, dirpath=tmp_path / "mi")
        fitted = trainer(callbacks=[monitor], default_root_dir=tmp_path, max_steps=steps)
        fitted.fit(language_model(), train, validation, ckpt_path=ckpt)
        return fitted

    fit(4).save_checkpoint(tmp_path / "four.ckpt")
    fit(6, tmp_path / "four.ckpt")
    run = Run.open(tmp_path)
    values = run.records("saliency/values", source="live")
    expected = drift_series(values, final=False)
    live = {(r.name, r.step): r for r in run.records("saliency_drift", source="live")}
    assert ("saliency_drift/spearman", 6) in live
    for record in expected:
        assert live[record.name, record.step].panel.equal(record.panel)


def test_two_keys_of_a_firing_are_shown_and_the_rest_recorded() -> None:
    from lightning_mi.sinks.keys import plan

    one, two = records([1, 2, 3, 4], [1, 3, 2, 4])
    made = [r for r in drift_series([one, two], final=False) if r.step == 10]
    keys = plan(made).scalars.keys() - {"mi/step", "mi/nonfinite"}
    assert keys == {"mi_saliency_drift/spearman", "mi_saliency_drift/jaccard"}
    names = ("spearman", "absolute", "jaccard", "cosine", "gini", "entropy")
    assert {r.what for r in made} == set(names)
    assert Saliency().name == "saliency"
