"""Whether attributions can be believed: closed forms, slow twins, captum live, no harm done."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi.attribution import (
    Concentration,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    input_x_gradient,
    integrated_gradients,
    saliency,
)
from lightning_mi.attribution.evaluate import (
    Comprehensiveness,
    Deletion,
    Evaluation,
    Infidelity,
    Insertion,
    MaxSensitivity,
    MethodAgreement,
    ParameterRandomisation,
    RandomLabelControl,
    Sufficiency,
    agreement,
    comprehensiveness,
    deletion,
    infidelity,
    insertion,
    interval,
    max_sensitivity,
    parameter_randomisation,
    random_label_control,
    sufficiency,
)
from lightning_mi.errors import ArgumentError, ModelError
from lightning_mi.measurement import describe

MEASURES = {
    "deletion": deletion,
    "insertion": insertion,
    "comprehensiveness": comprehensiveness,
    "sufficiency": sufficiency,
    "infidelity": infidelity,
    "max_sensitivity": max_sensitivity,
}


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def linear(weights: list[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


def conv() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 5, 3)
    ).double()


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 5, generator=generator, dtype=torch.float64)


class Bag(nn.Module):
    """Word vectors with positions, a nonlinearity, a mean over the words that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.inner(self.words(input_ids), mask)

    def inner(self, vectors: Tensor, mask: Tensor) -> Tensor:
        places = self.places(torch.arange(vectors.shape[1]))
        hidden = torch.tanh(vectors + places).square() * mask[..., None]
        return self.out(hidden.sum(1) / mask.sum(1, keepdim=True))


def padded() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


# --- curves ---------------------------------------------------------------------------------------


def test_the_curves_of_a_linear_model_are_known() -> None:
    x, scores = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    model = linear([4, 1, 3, 2])
    gone = deletion(model, x, scores, steps=4)
    close(gone.curve, torch.tensor([[10.0, 6, 3, 1, 0]]))
    close(gone.values, torch.tensor([(10 / 2 + 6 + 3 + 1) / 4]))
    come = insertion(model, x, scores, steps=4)
    close(come.curve, torch.tensor([[0.0, 4, 7, 9, 10]]))
    close(come.values, torch.tensor([(4 + 7 + 9 + 10 / 2) / 4]))
    close(deletion(model, x, -scores, steps=4).values, come.values)  # the worst of all orders
    assert gone.values.item() < gone.random.min() < gone.random.max() < come.values.item()


def test_a_perfect_order_beats_random_and_the_reversed_one_loses() -> None:
    x = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)).double()
    model = linear([8, 7, 6, 5, 4, 3, 2, 1])
    for way in (deletion, insertion, comprehensiveness, sufficiency):
        good = way(model, x, model.weight * x).margin_interval
        bad = way(model, x, -model.weight * x).margin_interval
        assert good.low > 0 > bad.high, way.__name__


@pytest.mark.parametrize("way", [deletion, insertion])
@pytest.mark.parametrize("baseline", [None, 0.3, "blurred"])
def test_pixels_go_with_all_channels_as_in_a_slow_loop(way: Any, baseline: Any) -> None:
    model, x = conv(), images()
    start = torch.zeros_like(x) if baseline is None else torch.full_like(x, 0.3)
    if baseline == "blurred":
        baseline = start = F.avg_pool2d(x, 3, 1, 1)
    scores = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    found = way(model, x, scores, 2, baseline=baseline, steps=5, draws=0)
    for i in range(len(x)):
        total = scores[i].sum(0)
        order = sorted(
            ((-total[y, z].item(), y, z) for y in range(4) for z in range(5)), key=lambda e: e[0]
        )
        for k in range(6):
            image = x[i].clone() if way is deletion else start[i].clone()
            for _, y, z in order[: k * 20 // 5]:
                image[:, y, z] = start[i][:, y, z] if way is deletion else x[i][:, y, z]
            p = model(image[None]).softmax(-1)[0, 2]
            assert found.curve[i, k].item() == pytest.approx(p.item(), abs=1e-12)
    assert found.random is None
    assert found.margin is None


def test_scores_without_channels_are_those_of_pixels() -> None:
    model, x = conv(), images()
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)).double()
    whole = deletion(model, x, scores, 1)
    assert torch.equal(whole.values, deletion(model, x, scores.sum(1), 1).values)
    assert torch.equal(whole.values, deletion(model, x, scores.sum(1, keepdim=True), 1).values)


@pytest.mark.parametrize("token", [None, 10])
def test_tokens_are_replaced_but_not_padding_nor_what_is_kept(token: int | None) -> None:
    model, batch = Bag(), padded()
    scores = torch.tensor([[5.0, 9, 4, 3, 2, 1], [1, 2, 9, 3, 7, 8]])
    found = deletion(model, batch, scores, 1, baseline=token, keep=[2], steps=8, draws=2)
    orders = [[0, 2, 3, 4, 5], [2, 1, 0]]  # token 2 and padding are never removed
    away = torch.zeros(6) if token is None else model.words.weight[token]
    vectors = model.words(batch["input_ids"]).detach()
    for i, order in enumerate(orders):
        for k in range(9):
            changed = vectors[i].clone()
            for place in order[: (2 * k * len(order) + 8) // 16]:
                changed[place] = away
            mask = batch["attention_mask"][i : i + 1]
            p = model.inner(changed[None], mask).softmax(-1)[0, 1]
            assert found.curve[i, k].item() == pytest.approx(p.item(), abs=1e-6)


def test_batched_equals_one_by_one() -> None:
    model, batch = Bag(), padded()
    whole = deletion(model, batch, integrated_gradients, 1, draws=1)
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        alone = deletion(model, one, integrated_gradients, 1, draws=1)
        close(whole.values[i : i + 1], alone.values, 1e-6)
        close(whole.recency[i : i + 1], alone.recency, 1e-6)


def test_recency_removes_the_latest_tokens_first() -> None:
    model, batch = Bag(), padded()
    found = deletion(model, batch, saliency, 0, steps=6, draws=0)
    by_place = torch.arange(6.0).expand(2, 6)
    close(found.recency, deletion(model, batch, by_place, 0, steps=6, draws=0).values)
    assert "recency_margin" in found.reading()
    assert deletion(conv(), images(), saliency, 0).recency is None


def test_recency_of_a_language_model_ends_at_the_position_that_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 23}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(0))
    found = deletion(model, ids, IntegratedGradients(), steps=7, draws=1)
    # The true next token is asked at position 5: tokens 5, 4, … go first and 6 last of all.
    order = torch.tensor([0.0, 1, 2, 3, 4, 5, -1]).expand(2, 7)
    close(found.recency, deletion(model, ids, order, mi.Logit(task=mi.NextToken()), steps=7).values)


def test_what_was_explained_is_what_is_judged() -> None:
    model, x = conv(), images()
    about_two = saliency(model, x, 2)
    found = deletion(model, x, about_two)
    assert torch.equal(found.values, deletion(model, x, about_two, 2).values)
    assert not torch.equal(found.values, deletion(model, x, about_two, 1).values)
    assert torch.equal(found.values, deletion(model, x, Saliency(target=2)).values)
    custom = saliency(model, x, lambda outputs, batch: outputs.sum(-1))
    with pytest.raises(ArgumentError, match="the same target"):
        deletion(model, x, custom)


def test_any_target_is_followed_where_it_is_no_single_token() -> None:
    model, x = conv(), images()
    difference = mi.LogitDifference(0, other=1)
    found = deletion(model, x, saliency, difference)
    logits = model(x)
    close(found.curve[:, 0], (logits[:, 0] - logits[:, 1]).detach())
    assert found.unit == "logits"
    close(deletion(model, x, saliency, 0, follow="target").curve[:, 0], logits[:, 0].detach())
    close(deletion(model, x, saliency, 0).curve[:, 0], logits.softmax(-1)[:, 0].detach())


def test_ties_are_broken_at_random_but_repeatably() -> None:
    model, x = linear([1.0] * 50), torch.ones(1, 50).double()
    flat = torch.zeros(1, 50)
    assert torch.equal(deletion(model, x, flat).curve, deletion(model, x, flat).curve)
    by_index = torch.arange(50.0)[None]
    ramp = linear([float(i) for i in range(50)])
    worst = deletion(ramp, x, -by_index).values
    best = deletion(ramp, x, by_index).values
    middle = deletion(ramp, x, flat).values
    assert best < middle < worst
    assert abs(middle - (best + worst) / 2) < (worst - best) / 4


class CentresItsBatch(nn.Module):
    """Examples see each other, so copies cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x - x.mean(0)))


def test_a_model_that_mixes_its_batch_gets_its_own_batch() -> None:
    model = CentresItsBatch()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double()
    found = deletion(model, x, torch.randn(3, 4).double(), 1, steps=4)
    p = model(x).softmax(-1)[:, 1]
    close(found.curve[:, 0], p.detach())


# --- comprehensiveness, sufficiency ---------------------------------------------------------------


def test_comprehensiveness_and_sufficiency_count_units_as_eraser_does() -> None:
    model = linear([5, 4, 3, 2, 1])
    x = torch.ones(1, 5).double()
    shares = [0.2, 0.5]  # 1 and 3 of 5 units
    without = comprehensiveness(model, x, model.weight, shares=shares)
    close(without.curve, torch.tensor([[5.0, 12.0]]))
    close(without.values, torch.tensor([8.5]))
    only = sufficiency(model, x, model.weight, shares=shares)
    close(only.curve, torch.tensor([[10.0, 3.0]]))
    assert without.higher_is_better
    assert not only.higher_is_better


def test_comprehensiveness_of_probabilities_by_hand() -> None:
    model, x = conv(), images()
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2)).double()
    found = comprehensiveness(model, x, scores, 1)
    p, drops = model(x).softmax(-1)[:, 1], []
    for q, count in ((0.01, 1), (0.05, 1), (0.1, 2), (0.2, 4), (0.5, 10)):
        changed = x.clone()
        for i in range(2):
            for place in scores[i].flatten().argsort(descending=True)[:count]:
                changed[i, :, place // 5, place % 5] = 0
        drops.append(p - model(changed).softmax(-1)[:, 1])
        assert q in found.convention["shares"]
    close(found.values, torch.stack(drops).mean(0).detach())


# --- infidelity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["removal", "gaussian"])
@pytest.mark.parametrize("optimal", [False, True])
def test_a_linear_model_is_described_perfectly_by_its_gradient(change: Any, optimal: bool) -> None:
    model = nn.Linear(6, 3).double()
    x = torch.randn(4, 6).double()
    gradient = Saliency(kind="signed", target=1)
    for method in (gradient, InputXGradient(target=1), IntegratedGradients(target=1)):
        found = infidelity(model, x, method, change=change, optimal=optimal)
        assert found.values.max() < 1e-20
        assert found.margin.min() > 1e-6
    doubled = infidelity(model, x, 2 * model.weight[1] * x, 1, change=change, optimal=optimal)
    assert bool(doubled.values.max() < 1e-20) is optimal


@pytest.mark.parametrize("optimal", [False, True])
@pytest.mark.parametrize("multiplied", [False, True])
def test_infidelity_agrees_with_captum(optimal: bool, multiplied: bool) -> None:
    metrics = pytest.importorskip("captum.metrics")
    model, x = conv(), images(3)
    attribution = (
        integrated_gradients(model, x, 1) if multiplied else saliency(model, x, 1, kind="signed")
    )
    samples = 12
    generator = torch.Generator().manual_seed(0)
    reach = 0.1 * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    drawn = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(samples)]
    noise = torch.stack(drawn, 1).flatten(0, 1) * reach.repeat_interleave(samples, 0)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        return (noise / inputs if multiplied else noise), inputs - noise

    theirs = metrics.infidelity(
        model,
        perturb,
        x,
        attribution.values,
        target=1,
        n_perturb_samples=samples,
        normalize=optimal,
    )
    ours = infidelity(model, x, attribution, change="gaussian", samples=samples, optimal=optimal)
    close(ours.values, theirs.detach(), 1e-12)


def test_removal_adds_up_what_was_removed_as_in_a_slow_loop() -> None:
    model, batch = Bag(), padded()
    attribution = integrated_gradients(model, batch, 2)
    found = infidelity(model, batch, attribution, samples=9, draws=0)
    generator = torch.Generator().manual_seed(0)
    gone = torch.rand((9, 2, 6), generator=generator) < 0.5
    gone &= batch["attention_mask"].bool()
    vectors = model.words(batch["input_ids"]).detach()
    for i in range(2):
        mask, total = batch["attention_mask"][i : i + 1], 0.0
        whole = model.inner(vectors[i : i + 1], mask)[0, 2]
        for each in gone[:, i]:
            changed = vectors[i : i + 1] * (~each)[None, :, None]
            effect = whole - model.inner(changed, mask)[0, 2]
            total += (attribution.values[i][each].sum() - effect).item() ** 2
        assert found.values[i].item() == pytest.approx(total / 9, abs=1e-6)


def test_gaussian_changes_need_scores_of_the_inputs() -> None:
    with pytest.raises(ArgumentError, match="removal"):
        infidelity(Bag(), padded(), saliency, 1, change="gaussian")
    with pytest.raises(ArgumentError, match="removal"):
        infidelity(conv(), images(), torch.ones(2, 4, 5), 1, change="gaussian")


# --- max-sensitivity ------------------------------------------------------------------------------


def test_the_gradient_of_a_linear_model_never_moves() -> None:
    found = max_sensitivity(nn.Linear(6, 3), torch.randn(2, 6), saliency, 1)
    assert found.values.tolist() == [0, 0]
    assert found.random.min() > 0.1


def test_max_sensitivity_agrees_with_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    metrics = pytest.importorskip("captum.metrics")
    model, x = conv(), images(3)
    generator, samples = torch.Generator().manual_seed(0), 6
    deltas = []
    for _ in range(samples):
        deltas.append(0.02 * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))
    noise = torch.stack(deltas, 1).flatten(0, 1)

    def perturb(inputs: Tensor, radius: float) -> tuple[Tensor]:
        return ((inputs[0] if isinstance(inputs, tuple) else inputs).detach() + noise,)

    def explain(inputs: Any, target: Any) -> tuple[Tensor]:
        point = inputs[0] if isinstance(inputs, tuple) else inputs
        return (attr.Saliency(model).attribute(point.clone().requires_grad_(), target=target),)

    theirs = metrics.sensitivity_max(explain, x, perturb, n_perturb_samples=samples, target=1)
    ours = max_sensitivity(model, x, saliency, 1, samples=samples, draws=0)
    close(ours.values, theirs, 1e-12)


def test_word_vectors_move_and_padding_does_not() -> None:
    model, batch = Bag().double(), padded()
    found = max_sensitivity(model, batch, saliency, 1, samples=3, draws=0)
    vectors = model.words(batch["input_ids"]).detach()
    mask = batch["attention_mask"]

    def scores(points: Tensor) -> Tensor:
        leaf = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model.inner(leaf, mask)[:, 1].sum(), leaf)
        return slope.norm(dim=-1)

    rows = vectors.flatten(1)
    reach = 0.02 * (rows.amax(1) - rows.amin(1)).view(-1, 1, 1) * mask[..., None]
    generator = torch.Generator().manual_seed(0)
    here, largest = scores(vectors), torch.zeros(2).double()
    for _ in range(3):
        drawn = torch.rand(vectors.shape, generator=generator, dtype=torch.float64) * 2 - 1
        there = scores(vectors + reach * drawn)
        largest = torch.maximum(largest, (there - here).norm(dim=1) / here.norm(dim=1))
    close(found.values, largest)
    assert found.values.min() > 0
    assert not any(m._forward_hooks for m in model.modules())


def test_the_question_does_not_change_with_the_answer() -> None:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    # Around 0 the answer flips with the sign of the input; its gradient would jump from 1 to -2.
    found = max_sensitivity(model, torch.tensor([[1e-4]]), Saliency(kind="signed"), radius=0.1)
    assert found.values.item() == 0


# --- randomised parameters, random labels ---------------------------------------------------------


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of noise with a bright bar: upright (class 1) or level (class 0)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    y = torch.randint(0, 2, (count,), generator=generator)
    places = torch.randint(0, 8, (count,), generator=generator).tolist()
    for i, place in enumerate(places):
        (x[i, 0, :, place] if y[i] else x[i, 0, place]).add_(1.0)
    return x, y


def trained(labels: Tensor | None = None, steps: int = 120) -> nn.Sequential:
    x, y = bars(256, 0)
    y = y if labels is None else labels
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def detector() -> nn.Sequential:
    model = trained()
    x, y = bars(64, 9)
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    return model


def test_scores_of_a_trained_model_fall_when_its_parameters_are_randomised(
    detector: nn.Sequential,
) -> None:
    before = copy.deepcopy(detector.state_dict())
    batch = bars(16, 9)
    found = parameter_randomisation(detector, batch, integrated_gradients)
    assert found.layers == ("5", "2", "0")
    fallen = found.signed.mean(1)
    assert fallen[-1].abs() < 0.3
    assert all(torch.equal(a, before[n]) for n, a in detector.state_dict().items())
    # A method that shows the picture itself does not notice: this is what the check is for.
    blind = parameter_randomisation(detector, batch, lambda model, batch, target: batch[0])
    close(blind.signed, torch.ones_like(blind.signed))
    reading = blind.reading()
    assert reading["final"].item() == pytest.approx(1)
    assert reading["signed"].coords["layer"] == ["5", "2", "0"]


def test_the_cascade_by_hand(detector: nn.Sequential) -> None:
    x, _ = bars(3, 9)
    found = parameter_randomisation(detector, x, saliency, 1, seed=7)
    alone = parameter_randomisation(detector, x, saliency, 1, seed=7, how="independent")
    changed, here = copy.deepcopy(detector), saliency(detector, x, 1).values
    for row, name in enumerate(("5", "2", "0")):
        with torch.random.fork_rng():
            torch.manual_seed(7 + row)
            changed.get_submodule(name).reset_parameters()
        one = copy.deepcopy(detector)
        one.get_submodule(name).load_state_dict(changed.get_submodule(name).state_dict())
        for values, model in ((found.absolute, changed), (alone.absolute, one)):
            there = saliency(model, x, 1).values
            for i in range(3):
                rho = mi.comparison.spearman(here[i].flatten(), there[i].flatten())
                assert values[row, i].item() == pytest.approx(rho, abs=1e-9)


def test_layers_come_in_the_order_of_the_forward_pass_and_all_are_reached() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2)
            self.scale = nn.Parameter(torch.arange(8.0))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.attention(x * self.scale, x, x, need_weights=False)[0]
            return self.last(hidden.mean(1))

    model, x = Odd(), torch.randn(2, 3, 8)
    found = parameter_randomisation(model, x, input_x_gradient, 1)
    assert found.layers == ("(model)", "last", "attention.out_proj", "attention")
    coarse = parameter_randomisation(model, x, input_x_gradient, 1, depth=2)
    close(coarse.signed, found.signed[[1, 3]])
    assert model.scale.tolist() == list(range(8))


def test_random_labels(detector: nn.Sequential, tmp_path: Any) -> None:
    batch = bars(16, 9)
    same = random_label_control(detector, detector, batch, saliency)
    close(same.absolute, torch.ones_like(same.absolute))
    labels = torch.randint(0, 2, (256,), generator=torch.Generator().manual_seed(3))
    control = trained(labels)
    other = random_label_control(detector, control, batch, integrated_gradients)
    assert other.signed.mean() < 0.5
    torch.save(control.state_dict(), tmp_path / "random.ckpt")
    measurement = RandomLabelControl(
        checkpoint=str(tmp_path / "random.ckpt"),
        method=IntegratedGradients(examples=None, max_steps=256),
    )
    (final,) = (r for r in mi.measure(detector, measurement, batch=batch) if r.what == "final")
    assert final.panel.item() == pytest.approx(other.absolute.mean().item(), abs=1e-6)


def test_what_is_left_stands_beside_random_scores_and_position_alone(
    detector: nn.Sequential,
) -> None:
    found = parameter_randomisation(detector, bars(16, 9), saliency, draws=50)
    assert found.random is not None
    assert found.random.mean().abs() < found.floor
    assert found.recency is None
    assert "recency" not in found.reading()
    none = parameter_randomisation(detector, bars(2, 9), saliency, depth=1, draws=0)
    assert none.random is None
    assert "random" not in none.reading()

    # An explanation of tokens that only knows where they stand is as alike as can be, and says so.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3))
    ids = torch.randint(0, 9, (5, 6))

    def late(model: nn.Module, batch: Any, target: Any) -> Tensor:
        return torch.arange(6.0).expand(5, 6)

    blind = parameter_randomisation(model, ids, late, 1)
    for values in (blind.absolute, blind.recency, blind.recency_trained):
        assert values is not None
        close(values, torch.ones_like(values))
    honest = parameter_randomisation(model, ids, saliency, 1)
    assert honest.recency is not None
    assert honest.recency.shape == (2, 5)
    here = saliency(model, ids, 1).values.abs()
    for i in range(5):
        rho = mi.comparison.spearman(here[i], torch.arange(6.0))
        assert honest.recency_trained is not None
        assert honest.recency_trained[i].item() == pytest.approx(rho, abs=1e-9)
    reading = honest.reading()
    assert reading["recency"].item() == pytest.approx(honest.recency[-1].mean().item())
    assert {"random", "recency_trained", "floor"} <= set(reading)


def test_a_model_that_cannot_be_copied_or_has_nothing_to_randomise() -> None:
    model = nn.Linear(2, 2)
    model.kept = model(torch.ones(1, 2))  # type: ignore[assignment]
    with pytest.raises(ModelError, match="copied"):
        parameter_randomisation(model, torch.ones(1, 2), saliency, 1)
    with pytest.raises(ModelError, match="parameters"):
        parameter_randomisation(nn.Tanh(), torch.ones(1, 2), saliency, 1)


# --- agreement ------------------------------------------------------------------------------------


def test_agreement_takes_methods_with_their_own_names() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    found = agreement(model, x, [Saliency(), mi.attribution.integrated_gradients], 1)
    named = {"saliency": Saliency(), "integrated_gradients": mi.attribution.integrated_gradients}
    expected = agreement(model, x, named, 1)
    assert found.pairs == expected.pairs == (("saliency", "integrated_gradients"),)
    assert torch.equal(found.found[0].spearman, expected.found[0].spearman)
    with pytest.raises(ArgumentError, match="distinct names"):
        agreement(model, x, [Saliency(), Saliency()], 1)


def test_agreement_of_equal_and_opposite_scores() -> None:
    x = torch.rand(3, 20)
    scores = torch.randn(3, 20)
    found = agreement(nn.Linear(20, 2), x, {"a": scores, "b": 2 * scores, "c": -scores}, 1)
    assert found.pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    same, opposite = found.found[0], found.found[1]
    for one in (same.spearman, same.jaccard, same.cosine, -opposite.spearman, -opposite.cosine):
        close(one, torch.ones(3))
    close(opposite.absolute, torch.ones(3))
    reading = found.reading()
    assert reading["pairs_spearman"].coords["edge"] == ["a – b", "a – c", "b – c"]
    assert reading["spearman"].item() == pytest.approx(-1 / 3)
    assert "recency" not in reading


def test_agreement_leaves_padding_out_and_knows_position_alone() -> None:
    model, batch = Bag(), padded()
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 9, 9]])
    other = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, -7, -8]])
    found = agreement(model, batch, {"a": scores, "b": other}, 1)
    close(found.found[0].spearman, torch.ones(2))
    close(found.recency["a"].spearman, torch.tensor([-1.0, 1.0]))
    assert found.reading()["recency"].item() == pytest.approx(0)


def test_methods_that_explain_fewer_examples_are_compared_on_those() -> None:
    records = mi.measure(conv(), MethodAgreement(), batch=(images(4), torch.tensor([0, 1, 2, 0])))
    by_name = {r.what: r.panel for r in records}
    assert by_name["pairs_absolute"].size == {"edge": 1, "example": 2}
    assert 0 <= by_name["jaccard"].item() <= 1


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 31, 80])
def test_the_interval_is_that_of_student(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).double()
    found = interval(values)
    error = stats.sem(values.numpy())
    low, high = stats.t.interval(0.95, n - 1, values.mean().item(), error)
    assert found.stderr == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


def test_undefined_examples_are_nan_with_a_reason() -> None:
    batch = padded()
    everything = list(range(1, 10))
    found = deletion(Bag(), batch, saliency, 1, keep=everything)
    assert found.values.isnan().all()
    reading = found.reading()
    assert all("reason" in p.convention for p in reading.values() if p.values.isnan().any()), (
        reading
    )
    scores = torch.ones(2, 4, dtype=torch.float64)
    scores[1, 2] = torch.nan
    part = infidelity(linear([1, 2, 3, 4]), torch.ones(2, 4).double(), scores)
    assert part.values.isnan().tolist() == [False, True]
    assert part.mean.n == 1


def all_measurements(method: Any) -> list[Any]:
    kinds = (Deletion, Insertion, Comprehensiveness, Sufficiency, Infidelity, MaxSensitivity)
    return [*(kind(method=method) for kind in kinds), ParameterRandomisation(method=method)]


def test_measurements_record_what_the_functions_return() -> None:
    model, batch = conv(), (images(3), torch.tensor([0, 1, 2]))
    method = Saliency()
    records = mi.measure(model, all_measurements(method), batch=batch)
    by_name = {r.name: r.panel for r in records}
    for name, function in MEASURES.items():
        values = function(model, batch, method).values
        close(by_name[f"{name}/values"].values, values.cpu(), 1e-12)
        assert {f"{name}/mean", f"{name}/margin", f"{name}/random"} <= by_name.keys()
    with_randomness = parameter_randomisation(model, batch, method, depth=4)
    close(by_name["parameter_randomisation/absolute"].values, with_randomness.absolute)
    again = mi.measure(model, all_measurements(method), batch=batch)
    assert all(a.panel.equal(b.panel) for a, b in zip(records, again, strict=True))
    assert all("step" in r.panel.axes or r.panel.values.ndim < 3 for r in records)


def test_the_input_that_a_method_explains_is_the_one_that_is_judged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) + self.b(context)

    batch = {"x": torch.randn(2, 4), "context": torch.randn(2, 6), "y": torch.tensor([0, 1])}
    model, method = Two(), InputXGradient(of="context")
    measurements = [*all_measurements(method), Concentration(method=method, background=0.0)]
    records = mi.measure(model, measurements, batch=batch)
    by_name = {r.name: r.panel for r in records}
    assert by_name["infidelity/values"].values.max() < 1e-10  # linear in this one, not in the other
    assert by_name["infidelity/margin"].item() > 1e-3
    scores = by_name["deletion/curve"].values[:, 0]
    logits = model(batch["x"], batch["context"]).softmax(-1)
    close(scores, logits[[0, 1], [0, 1]].detach(), 1e-6)


def test_recipes_are_plain() -> None:
    for measurement in [*all_measurements(Saliency(target=1)), MethodAgreement()]:
        assert "0x" not in json.dumps(describe(measurement))


def test_half_precision_and_language_models() -> None:
    batch = (images(2).bfloat16(), torch.tensor([0, 1]))
    records = mi.measure(conv().bfloat16(), all_measurements(Saliency()), batch=batch)
    assert not any(r.panel.nonfinite for r in records)
    ids = padded()
    for measurement in all_measurements(IntegratedGradients(target=1)):
        records = mi.measure(Bag(), measurement, batch=ids, task=mi.Task())
        assert {r.panel.size["example"] for r in records if "example" in r.panel.axes} == {2}


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip
    model.train()
    model[0].weight.requires_grad_(False)
    x = images(2).float()
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    functions = [*MEASURES.values(), parameter_randomisation]
    for function in functions:
        function(model, x, saliency, 1)

    def broken(model: nn.Module, batch: Any, target: Any) -> Tensor:
        raise RuntimeError("broken")

    for function in functions:
        with pytest.raises(RuntimeError, match="broken"):
            function(model, x, broken, 1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: deletion(m, x, torch.ones(2, 3)), "scores: expected the shape"),
        (lambda m, x: deletion(m, x, saliency, 1, steps=0), "steps"),
        (lambda m, x: deletion(m, x, saliency, 1, draws=-1), "draws"),
        (lambda m, x: deletion(m, x, saliency, 1, follow="logit"), "follow: expected one of"),  # type: ignore[arg-type]
        (lambda m, x: deletion(m, x, Saliency, 1), "with brackets"),
        (lambda m, x: deletion(m, x, lambda *a: 3, 1), "method"),
        (lambda m, x: sufficiency(m, x, saliency, 1, shares=[0.0]), "shares"),
        (lambda m, x: infidelity(m, x, saliency, 1, scale=0.0), "scale"),
        (lambda m, x: infidelity(m, x, saliency, 1, change="blur"), "change"),  # type: ignore[arg-type]
        (lambda m, x: max_sensitivity(m, x, saliency, 1, radius=0), "radius"),
        (lambda m, x: parameter_randomisation(m, x, saliency, 1, how="all"), "how"),  # type: ignore[arg-type]
        (lambda m, x: agreement(m, x, {"a": saliency}, 1), "methods"),
    ],
)
def test_errors_say_what_was_expected(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(conv(), images())


def test_an_evaluation_without_draws_has_no_margin() -> None:
    bare = Evaluation("x", torch.tensor([1.0, 2.0]), True)
    assert bare.margin_interval.n == 0
    assert set(bare.reading()) == {"values", "mean", "mean_stderr"}
