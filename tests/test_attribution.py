"""Saliency and integrated gradients: closed forms, slow twins, captum's numbers, no harm done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi.attribution import (
    Attribution,
    IntegratedGradients,
    Saliency,
    integrated_gradients,
    saliency,
)
from lightning_mi.attribution.paths import relative_gap
from lightning_mi.attribution.rules import Rule, ladder, nodes
from lightning_mi.errors import ArgumentError, ModelError, TapError

REFERENCE = Path(__file__).parent / "reference"
RULES = get_args(Rule)


# --- models ---------------------------------------------------------------------------------------


def tanh_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    sizes = [(5, 32), (32, 32), (32, 1)]
    layers: list[nn.Module] = []
    for a, b in sizes:
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def relu_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


class Bag(nn.Module):
    """Mean of embeddings with positions, then a nonlinear head."""

    def __init__(self, vocabulary: int = 11, width: int = 6, length: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.out = nn.Linear(width, 3)

    def embedded(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        places = torch.arange(vectors.shape[1])[None]
        hidden = torch.tanh(vectors + self.places(places))
        if mask is None:
            return self.out(hidden.square().mean(1))
        weights = mask[..., None].to(hidden)
        return self.out((hidden.square() * weights).sum(1) / weights.sum(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.embedded(self.words(input_ids), attention_mask)


class Tied(nn.Module):
    """One table looked up twice by the ids, once by other ids, and used as the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        start = self.words(torch.tensor([1]))
        hidden = torch.tanh(first).sum(1) + (second * first).sum(1) + start
        return hidden @ self.words.weight.t()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.words(ids), self.words(ids.clone().long()))


class SequenceFirst(nn.Module):
    """An LSTM that wants positions before examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.lstm(self.words(ids.t()))[0][-1])


def loop(function: Any, x: Tensor, start: Tensor, rule: Rule, steps: int) -> Tensor:
    """The formula, one node and one example at a time."""
    alphas, weights = nodes(rule, steps)
    rows = []
    for a, b in zip(x, start, strict=True):
        total = torch.zeros_like(a)
        for alpha, weight in zip(alphas.tolist(), weights.tolist(), strict=True):
            point = (b + alpha * (a - b)).requires_grad_()
            (slope,) = torch.autograd.grad(function(point[None])[0], point)
            total += weight * slope
        rows.append(total * (a - b))
    return torch.stack(rows)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 23}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


# --- quadrature -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 8, 50])
def test_weights_add_up_to_one(rule: Rule, steps: int) -> None:
    alphas, weights = nodes(rule, steps)
    assert alphas.dtype == weights.dtype == torch.float64
    assert abs(float(weights.sum()) - 1) < 1e-15
    assert float(alphas.min()) >= 0
    assert float(alphas.max()) <= 1


def test_gauss_legendre_is_exact_for_polynomials() -> None:
    alphas, weights = nodes("gauss-legendre", 4)
    for degree in range(8):
        assert abs(float((weights * alphas**degree).sum()) - 1 / (degree + 1)) < 1e-15
    assert abs(float((weights * alphas**8).sum()) - 1 / 9) > 1e-8


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("left", [0, 0.25, 0.5, 0.75]),
        ("right", [0.25, 0.5, 0.75, 1]),
        ("midpoint", [0.125, 0.375, 0.625, 0.875]),
        ("trapezoid", [0, 1 / 3, 2 / 3, 1]),
    ],
)
def test_nodes(rule: Rule, expected: list[float]) -> None:
    close(nodes(rule, 4)[0], torch.tensor(expected, dtype=torch.float64))


def test_ladder_ends_at_the_last_number_and_stays_cheap() -> None:
    assert ladder(12) == [12]
    assert ladder(16) == [8, 16]
    assert ladder(256) == [8, 16, 32, 64, 128, 256]
    for most in range(1, 300):
        rungs = ladder(most)
        assert rungs[-1] == most
        assert sum(rungs) <= 2.5 * most
        assert rungs == sorted(set(rungs))


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 5, 50])
def test_linear_model_is_weight_times_input(rule: Rule, steps: int) -> None:
    model = nn.Linear(4, 3).double()
    x, start = torch.randn(6, 4).double(), torch.randn(4).double()
    found = integrated_gradients(model, x, 1, baseline=start, rule=rule, steps=steps)
    close(found.values, (x - start) * model.weight[1].detach())
    assert found.gap is not None
    assert float(found.gap.abs().max()) <= 1e-12
    assert found.converged is not None
    assert bool(found.converged.all())


def test_product_is_shared_evenly() -> None:
    # Along (αa, αb) the gradient of ab is (αb, αa): each input gets ab/2.
    x = torch.tensor([[3.0, 5.0], [-2.0, 7.0]]).double()
    found = integrated_gradients(nn.Identity(), x, lambda out, batch: out.prod(1))
    close(found.values, (x.prod(1) / 2)[:, None].expand(2, 2))


def test_kink_needs_more_nodes_and_says_so() -> None:
    # relu(x − 1) from 0 to 2: the gradient is 0 up to ½ and 1 beyond, so the score is 1.
    function = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    function[0].weight.data.fill_(1.0)
    function[0].bias.data.fill_(-0.9)
    x = torch.tensor([[2.0]])
    coarse = integrated_gradients(function, x, 0, steps=2)
    fine = integrated_gradients(function, x, 0, tolerance=0.01, max_steps=256)
    assert coarse.gap is not None and fine.gap is not None  # noqa: PT018
    assert float(coarse.gap) == pytest.approx((1.0 - 1.1) / 1.1, abs=1e-6)
    assert coarse.converged is not None
    assert not bool(coarse.converged)
    assert abs(float(fine.gap)) <= 0.01
    assert fine.steps is not None
    assert int(fine.steps) > 8


def test_tanh_net_converges_spectrally() -> None:
    model, x = tanh_net(), torch.randn(8, 5).double()
    gaps = {
        n: float(integrated_gradients(model, x, 0, steps=n).gap.abs().max())  # type: ignore[union-attr]
        for n in (4, 16, 32)
    }
    assert gaps[16] <= 1e-10
    assert gaps[32] <= 1e-12
    assert gaps[4] > 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_slow_twin(rule: Rule) -> None:
    model, x, start = tanh_net(), torch.randn(5, 5).double(), torch.randn(5, 5).double()
    found = integrated_gradients(model, x, 0, baseline=start, rule=rule, steps=7)
    close(found.values, loop(lambda z: model(z)[:, 0], x, start, rule, 7))


def test_steps_doubled_leave_the_sum_unchanged() -> None:
    model, x = tanh_net(), torch.randn(3, 5).double()
    one = integrated_gradients(model, x, 0, steps=16).values
    two = integrated_gradients(model, x, 0, steps=32).values
    close(one, two, 1e-9)


def test_saliency_kinds_of_a_linear_model() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.copy_(weight)
    x = torch.randn(4, 3)
    close(saliency(model, x, 0, kind="signed").values, weight.expand(4, 3))
    close(saliency(model, x, 0).values, weight.abs().expand(4, 3))
    close(saliency(model, x, 0, kind="l2").values, weight.abs().expand(4, 3))
    close(saliency(model, x, 0).target, model(x)[:, 0].detach())


def test_saliency_of_pixels_over_channels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2)).double()
    x = torch.randn(3, 2, 3, 4).double()
    grid = model[1].weight[1].detach().view(2, 3, 4).expand(3, 2, 3, 4)
    close(saliency(model, x, 1).values, grid.abs())
    close(saliency(model, x, 1, kind="max").values, grid.abs().amax(1))
    close(saliency(model, x, 1, kind="l2").values, grid.norm(dim=1))


# --- token ids ------------------------------------------------------------------------------------


def test_ids_go_through_the_word_embedding_alone() -> None:
    model = Bag().double()
    ids = torch.tensor([[1, 2, 3, 3], [4, 0, 9, 10]])
    vectors = model.words(ids).detach()
    leaf = vectors.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.embedded(leaf)[:, 2].sum(), leaf)
    close(saliency(model, ids, 2).values, slope.norm(dim=-1))
    close(saliency(model, ids, 2, kind="signed").values, slope.sum(-1))
    close(saliency(model, ids, 2, kind="max").values, slope.abs().amax(-1))
    twin = loop(
        lambda z: model.embedded(z)[:, 2], vectors, torch.zeros_like(vectors), "midpoint", 9
    )
    found = integrated_gradients(model, ids, 2, rule="midpoint", steps=9)
    close(found.values, twin.sum(-1))
    # F(x′) still has the position embeddings.
    change = model(ids)[:, 2] - model.embedded(torch.zeros_like(vectors))[:, 2]
    close(found.output_change, change.detach())  # type: ignore[arg-type]


def test_ids_that_equal_the_positions_are_not_mistaken_for_them() -> None:
    model = Bag().double()
    ids = torch.arange(5)[None]
    found = integrated_gradients(model, ids, 0, steps=24)
    change = model(ids)[:, 0] - model.embedded(torch.zeros(1, 5, 6).double())[:, 0]
    close(found.output_change, change.detach())  # type: ignore[arg-type]
    close(found.values.sum(1), change.detach(), 1e-8)


def test_table_used_twice_and_tied() -> None:
    model = Tied().double()
    ids = torch.tensor([[1, 2, 3], [4, 1, 1]])
    vectors = model.words(ids).detach()
    # The copy of the ids is not the same memory: only the first lookup is the input's.
    fixed = loop(lambda z: model.inner(z, model.words(ids[:1]))[:, 5], vectors[:1], 0 * vectors[:1],
                 "gauss-legendre", 12)  # fmt: skip
    close(integrated_gradients(model, ids[:1], 5, steps=12).values, fixed.sum(-1))

    class Twice(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(self.words(ids), self.words(ids.view(-1)).view(*ids.shape, -1))

    twice = Twice().double()
    vectors = twice.words(ids).detach()
    both = loop(lambda z: twice.inner(z, z)[:, 5], vectors, 0 * vectors, "gauss-legendre", 12)
    found = integrated_gradients(twice, ids, 5, steps=12)
    close(found.values, both.sum(-1))
    assert float(found.gap.abs().max()) < 1e-9  # type: ignore[union-attr]


def test_two_tables_for_one_id() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 3)
            self.out = nn.Linear(7, 2)

        def inner(self, both: Tensor) -> Tensor:
            return self.out(torch.tanh(both)).sum(1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(torch.cat([self.a(ids), self.b(ids)], -1))

    model, ids = Two().double(), torch.tensor([[1, 8, 3]])
    vectors = torch.cat([model.a(ids), model.b(ids)], -1).detach()
    other = torch.cat([model.a(0 * ids), model.b(0 * ids)], -1).detach()
    twin = loop(lambda z: model.inner(z)[:, 1], vectors, other, "midpoint", 6).sum(-1)
    found = integrated_gradients(model, ids, 1, baseline=0, rule="midpoint", steps=6)
    close(found.values, twin)


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (1, 4)])
def test_positions_first(shape: tuple[int, int]) -> None:
    model = SequenceFirst().double()
    ids = torch.full(shape, 4)  # All equal, and square once: only the memory tells which is which.
    found = integrated_gradients(model, ids, 1, steps=16)
    alone = [integrated_gradients(model, row[None], 1, steps=16).values[0] for row in ids]
    close(found.values, torch.stack(alone), 1e-10)
    assert float(found.gap.abs().max()) < 1e-8  # type: ignore[union-attr]
    # A recurrent network forgets: the last token is not the first.
    assert not torch.allclose(found.values[:, 0], found.values[:, -1])


def test_scaled_embedding_and_a_users_own_hook() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    model = Bag().double()
    model.words = Scaled(11, 6).double()
    model.words.register_forward_hook(lambda module, args, output: output + 1)
    ids = torch.tensor([[1, 2, 3]])
    vectors = model.words(ids).detach()
    twin = loop(lambda z: model.embedded(z)[:, 0], vectors, 0 * vectors, "midpoint", 5).sum(-1)
    close(integrated_gradients(model, ids, 0, rule="midpoint", steps=5).values, twin)


def test_baselines_of_ids() -> None:
    model, ids = Bag().double(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    pad = model.words.weight[7].detach()
    want = integrated_gradients(model, ids, 0, baseline=7, steps=6).values
    for other in (torch.tensor(7), torch.full((3,), 7), torch.full((2, 3), 7)):
        close(integrated_gradients(model, ids, 0, baseline=other, steps=6).values, want)
    for other in (pad, pad.expand(3, 6), pad.expand(2, 3, 6), pad.expand(2, 3, 6).float().double()):
        close(integrated_gradients(model, ids, 0, baseline=other, steps=6).values, want)
    assert not torch.allclose(want, integrated_gradients(model, ids, 0, steps=6).values)
    same = integrated_gradients(model, ids, 0, baseline=ids)
    close(same.values, torch.zeros(2, 3).double())
    assert bool(same.converged.all())  # type: ignore[union-attr]


def test_kept_tokens_score_zero() -> None:
    model, ids = Bag().double(), torch.tensor([[1, 2, 3], [4, 1, 6]])
    by_id = integrated_gradients(model, ids, 0, keep=[1], steps=20)
    by_mask = integrated_gradients(model, ids, 0, keep=ids == 1, steps=20)
    assert torch.equal(by_id.values, by_mask.values)
    assert by_id.values[0, 0] == by_id.values[1, 1] == 0
    close(by_id.values.sum(1), by_id.output_change, 1e-9)  # type: ignore[arg-type]
    start = torch.where((ids == 1)[..., None], model.words(ids), 0.0).detach()
    change = model(ids)[:, 0] - model.embedded(start)[:, 0]
    close(by_id.output_change, change.detach())  # type: ignore[arg-type]


def test_padded_batch_equals_one_by_one() -> None:
    model = Bag().double()
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for method in (saliency, integrated_gradients):
        both = method(model, {"input_ids": ids, "attention_mask": mask}, 1).values
        short = method(model, ids[:1, :3], 1).values
        close(both[:1, :3], short, 1e-6)
        close(both[1:], method(model, ids[1:], 1).values, 1e-6)
        close(both[0, 3:], torch.zeros(2).double())


def test_gpt2_left_padded_equals_one_by_one() -> None:
    model = gpt2()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    for method in (saliency, integrated_gradients):
        both = method(model, batch, 9).values
        short = method(model, {"input_ids": ids[:1, 2:], "attention_mask": mask[:1, 2:]}, 9).values
        close(both[:1, 2:], short, 1e-5)
        close(both[0, :2], torch.zeros(2))
    with torch.no_grad():
        embedded = model(inputs_embeds=model.transformer.wte(ids[1:])).logits[0, -1, 9]
        empty = model(inputs_embeds=torch.zeros(1, 5, 16)).logits[0, -1, 9]
    found = integrated_gradients(model, batch, 9, steps=32)
    close(found.output_change[1], embedded - empty, 1e-5)  # type: ignore[index]
    close(found.values.sum(1), found.output_change, 1e-5)  # type: ignore[arg-type]


def test_positions_after_the_one_that_is_read_score_zero() -> None:
    model, ids = gpt2(), torch.randint(1, 23, (2, 7))
    target = mi.Logit(3, position=2)
    for found in (saliency(model, ids, target), integrated_gradients(model, ids, target)):
        close(found.values[:, 3:], torch.zeros(2, 4))
        assert float(found.values[:, :3].abs().min()) > 0
        assert found.position.tolist() == [2, 2]  # type: ignore[union-attr]


def test_default_target_is_the_true_next_token() -> None:
    model, ids = gpt2(), torch.randint(1, 23, (2, 7))
    default = integrated_gradients(model, {"input_ids": ids}, steps=8)
    told = integrated_gradients(model, ids, mi.Logit(ids[:, -1], position=-2), steps=8)
    assert torch.equal(default.values, told.values)
    assert default.token.tolist() == ids[:, -1].tolist()  # type: ignore[union-attr]


# --- targets --------------------------------------------------------------------------------------


def test_target_forms_agree() -> None:
    model, x = relu_net(), torch.randn(4, 20)
    want = integrated_gradients(model, x, 2, steps=8)
    for target in (
        torch.full((4,), 2),
        torch.tensor(2),
        mi.Logit(2),
        lambda outputs, batch: outputs[:, 2],
        lambda outputs, batch: outputs.gather(1, torch.full((4, 1), 2))[:, 0],
    ):
        close(integrated_gradients(model, x, target, steps=8).values, want.values, 1e-6)
        close(saliency(model, x, target).values, saliency(model, x, 2).values, 1e-6)


def test_targets_for_each_example_survive_leaving_examples_out() -> None:
    model, x = relu_net(), torch.randn(9, 20)
    classes = torch.randint(0, 3, (9,))
    labels = torch.randint(0, 3, (9,))
    targets = {
        "tensor": (classes, lambda i: classes[i : i + 1]),
        "function": (
            lambda outputs, batch: outputs.gather(1, classes[:, None])[:, 0],
            lambda i: lambda outputs, batch: outputs.gather(1, classes[i : i + 1, None])[:, 0],
        ),
        "loss": (mi.Loss(), lambda i: mi.Loss()),
    }
    for target, alone in targets.values():
        options = {"tolerance": 0.002, "task": mi.Classification()}
        found = integrated_gradients(model, (x, labels), target, **options)
        assert len(set(found.steps.tolist())) > 1  # type: ignore[union-attr]
        for i in range(9):
            batch = (x[i : i + 1], labels[i : i + 1])
            one = integrated_gradients(model, batch, alone(i), **options)
            close(found.values[i : i + 1], one.values, 1e-5)
            assert found.steps[i] == one.steps[0]  # type: ignore[index]


def test_the_models_answer_is_settled_at_the_inputs() -> None:
    # At the baseline the biases make another class win; the question must not change on the way.
    model = nn.Linear(2, 2).double()
    model.weight.data.copy_(torch.eye(2))
    model.bias.data.copy_(torch.tensor([1.0, 0.0]))
    x = torch.tensor([[0.0, 5.0]]).double()
    close(integrated_gradients(model, x).values, torch.tensor([[0.0, 5.0]]).double())
    found = integrated_gradients(model, x, mi.LogitDifference())
    close(found.values, torch.tensor([[0.0, 5.0]]).double())
    close(found.output_change, torch.tensor([5.0]).double())  # type: ignore[arg-type]


def test_label_is_the_default_target() -> None:
    model, x, y = relu_net(), torch.randn(4, 20), torch.tensor([0, 1, 2, 0])
    close(saliency(model, (x, y)).values, saliency(model, x, y).values)
    close(saliency(model, {"x": x, "y": y}).values, saliency(model, x, y).values)


def test_single_output_needs_no_target() -> None:
    for model in (nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))):
        x = torch.randn(2, 3)
        close(integrated_gradients(model, x).values, x * model.get_parameter(
            "weight" if isinstance(model, nn.Linear) else "0.weight").detach(), 1e-6)  # fmt: skip


# --- precision and batching -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_in_is_precision_out(dtype: torch.dtype) -> None:
    model, x = tanh_net(dtype), torch.randn(4, 5).to(dtype)
    found = integrated_gradients(model, x, 0, steps=16)
    assert found.values.dtype == dtype
    assert saliency(model, x, 0).values.dtype == dtype
    widest = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.gap.dtype == found.target.dtype == widest  # type: ignore[union-attr]
    exact = integrated_gradients(copy.deepcopy(model).double(), x.double(), 0, steps=16)
    slack = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    close(found.values.double(), exact.values, slack)


def test_half_precision_is_added_up_in_float32() -> None:
    # 300 equal contributions of 1/300 in bfloat16 would stop growing long before 1.
    model, x = nn.Linear(2, 1, bias=False).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    model.weight.data.fill_(1.0)
    found = integrated_gradients(model, x, 0, rule="midpoint", steps=300)
    close(found.values.float(), torch.ones(1, 2), 1e-6)


@pytest.mark.parametrize("kind", ["floats", "ids"])
def test_result_does_not_depend_on_portions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = relu_net() if kind == "floats" else Bag()
    x = torch.randn(5, 20) if kind == "floats" else torch.randint(0, 11, (5, 6))
    found = []
    for portion in (1, 2**11, 2**30):
        monkeypatch.setattr("lightning_mi.attribution.line.PORTION", {"cpu": portion})
        found.append(integrated_gradients(model, x, 1, max_steps=64).values)
    close(found[0], found[1], 1e-6)
    close(found[0], found[2], 1e-6)


def test_batch_equals_one_by_one() -> None:
    model, x = relu_net(), torch.randn(6, 20)
    for method in (saliency, integrated_gradients):
        both = method(model, x, 1).values
        close(both, torch.cat([method(model, row[None], 1).values for row in x]), 1e-6)


def test_relu_net_reaches_its_tolerance() -> None:
    found = integrated_gradients(relu_net(), torch.randn(32, 20), 0, tolerance=0.01, max_steps=512)
    assert float(found.gap.abs().max()) <= 0.01  # type: ignore[union-attr]
    steps = found.steps
    assert steps is not None
    assert int(steps.min()) == 8
    assert int(steps.max()) > 8
    # The gap is about the scores that came out.
    change = found.output_change
    assert change is not None
    close(found.values.sum(1) - change, found.delta, 1e-5)  # type: ignore[arg-type]


def test_repeats_are_bit_equal() -> None:
    model, x = relu_net(), torch.randn(6, 20)
    first, second = (integrated_gradients(model, x, 1) for _ in range(2))
    assert torch.equal(first.values, second.values)


def test_gap_is_guarded() -> None:
    scores = torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, 0.5]])
    change, size = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    close(relative_gap(scores, change, size), torch.tensor([0.0, 0.0, 0.5]))
    noise = relative_gap(torch.tensor([[1e-9]]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert abs(float(noise)) < 1e-4


def test_nan_is_not_converged() -> None:
    found = integrated_gradients(nn.Linear(2, 1), torch.tensor([[float("nan"), 1.0]]), 0)
    assert not bool(found.converged)  # type: ignore[arg-type]


# --- awkward models -------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", ["parameter", "detached", "unused"])
def test_constant_model_gives_zeros(constant: str) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            out = self.bias.expand(len(x), 3)
            return {"parameter": out, "detached": out.detach(), "unused": out + 0 * len(x)}[
                constant
            ]

    x = torch.randn(2, 4)
    close(saliency(Constant(), x, 0).values, torch.zeros(2, 4))
    found = integrated_gradients(Constant(), x, 0)
    close(found.values, torch.zeros(2, 4))
    close(found.gap, torch.zeros(2))  # type: ignore[arg-type]
    assert bool(found.converged.all())  # type: ignore[union-attr]


def test_model_that_cuts_the_gradient_is_refused() -> None:
    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    for method in (saliency, integrated_gradients):
        with pytest.raises(ModelError, match="carry no gradient"):
            method(Cut(4, 3), torch.randn(2, 4), 0)


def test_model_that_counts_on_its_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = relu_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.view(5, 20))

    model, x = Fixed(), torch.randn(5, 20)
    found = integrated_gradients(model, x, 1, steps=16)
    close(found.values, integrated_gradients(model.net, x, 1, steps=16).values, 1e-6)
    adapted = integrated_gradients(model, x, 1, max_steps=1024)
    assert bool(adapted.converged.all())  # type: ignore[union-attr]


def test_model_that_mixes_its_batch_is_not_stacked() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tanh_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - x.mean(0) + torch.linspace(0, 1, len(x))[:, None])

    model, x = Centred().double(), torch.randn(4, 5).double()
    found = integrated_gradients(model, x, 0, steps=16)
    point, total = x.clone().requires_grad_(), torch.zeros_like(x)
    for alpha, weight in zip(*nodes("gauss-legendre", 16), strict=True):
        (slope,) = torch.autograd.grad(model(alpha * point).sum(), point)
        total += weight / alpha * slope
    close(found.values, total * x, 1e-9)
    close(found.values.sum(), found.output_change.sum(), 1e-9)  # type: ignore[union-attr]


def test_model_that_makes_one_output_of_many_rows() -> None:
    class Document(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, sentences: Tensor) -> Tensor:
            return self.net(sentences).view(-1, 5, 3).mean(1)

    for method in (saliency, integrated_gradients):
        with pytest.raises(ModelError, match=r"one output for each of the 10 examples.*\(2, 3\)"):
            method(Document(), torch.randn(10, 4), 0)


def test_extra_inputs_travel_with_their_examples() -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return (torch.relu(x - 0.3) * gate).sum(1, keepdim=True)

    x, gate, y = torch.rand(7, 3), torch.randn(7, 3), torch.zeros(7)
    found = integrated_gradients(Gated(), (x, gate, y), max_steps=128)
    for i in range(7):
        one = integrated_gradients(Gated(), (x[i, None], gate[i, None], y[i, None]), max_steps=128)
        close(found.values[i], one.values[0], 1e-6)


def test_outputs_in_a_tuple_and_a_module_inside() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = relu_net()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = relu_net()

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.net(x), {}

    x, pair = torch.randn(3, 20), Pair()
    close(saliency(pair, x, 0).values, saliency(pair.net, x, 0).values)
    wrapped = Wrapped()
    task = mi.Classification(module="net")
    close(saliency(wrapped, x, 0, task=task).values, saliency(wrapped.net, x, 0).values)


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_recurrent_network(recurrent: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = recurrent(3, 4, batch_first=True)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x)[0][:, -1])

    model, x = Net().double().train(), torch.randn(3, 5, 3).double()
    found = integrated_gradients(model, x, 1, steps=24)
    twin = loop(lambda z: model(z)[:, 1], x, torch.zeros_like(x), "gauss-legendre", 24)
    close(found.values, twin, 1e-10)
    assert found.axes == ("example", "position", "channel")


def test_tensor_subclass() -> None:
    class Image(Tensor):
        pass

    model, x = relu_net(), torch.randn(2, 20)
    for method in (saliency, integrated_gradients):
        close(method(model, x.as_subclass(Image), 0).values, method(model, x, 0).values)


# --- errors ---------------------------------------------------------------------------------------


def test_ids_without_an_embedding() -> None:
    for method in (saliency, integrated_gradients):
        with pytest.raises(
            ArgumentError, match=r"inputs: expected floats, or token ids .* got int64"
        ):
            method(nn.Linear(4, 2), torch.ones(2, 4, dtype=torch.long), 0)


def test_ids_that_are_changed_before_the_lookup() -> None:
    class Shifted(Bag):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids + 1)

    with pytest.raises(ArgumentError, match="looks up unchanged"):
        saliency(Shifted(), torch.tensor([[1, 2]]), 0)


def test_ids_that_change_with_the_vectors() -> None:
    class Fickle(Bag):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            vectors = self.words(input_ids)
            if float(vectors.detach().abs().sum()) < 1:
                return self.embedded(vectors * 0)
            return self.embedded(vectors + self.words(input_ids))

    with pytest.raises(TapError, match="same ids at every pass"):
        integrated_gradients(Fickle(), torch.tensor([[1, 2]]), 0, rule="left", steps=1)


@pytest.mark.parametrize("baseline", [torch.zeros(2, 3), torch.zeros(5), torch.zeros(2, 1, 4)])
def test_baseline_of_the_wrong_shape(baseline: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"baseline: expected the shape of the inputs \(2, 4\)"):
        integrated_gradients(nn.Linear(4, 2), torch.ones(2, 4), 0, baseline=baseline)


@pytest.mark.parametrize(
    "baseline", [torch.zeros(2, 3), torch.zeros(2, 4).long(), 0.5, torch.zeros(3, 6).bool()]
)
def test_baseline_of_ids_of_the_wrong_shape(baseline: Any) -> None:
    with pytest.raises(ArgumentError, match=r"baseline: expected token ids of shape \(2, 3\)"):
        integrated_gradients(Bag(), torch.tensor([[1, 2, 3], [4, 5, 6]]), 0, baseline=baseline)


def test_baseline_token_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="token ids from 0 to 10, got 11"):
        integrated_gradients(Bag(), torch.tensor([[1, 2]]), 0, baseline=11)


def test_arguments_out_of_range() -> None:
    model, x = nn.Linear(4, 2), torch.ones(2, 4)
    for method in (saliency, integrated_gradients):
        with pytest.raises(ArgumentError, match="target: expected an index from 0 to 1"):
            method(model, x, 2)
        with pytest.raises(ArgumentError, match="target: expected one index, or one for each"):
            method(model, x, torch.tensor([0, 1, 1]))
        with pytest.raises(ArgumentError, match="target: expected a function that returns"):
            method(model, x, lambda outputs, batch: outputs.sum())
        with pytest.raises(ArgumentError, match="at least one example"):
            method(model, x[:0], 0)
    with pytest.raises(ArgumentError, match="kind: expected one of"):
        saliency(model, x, 0, kind="loud")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rule: expected one of"):
        integrated_gradients(model, x, 0, rule="simpson")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="steps: expected an int of at least 1"):
        integrated_gradients(model, x, 0, steps=0)
    with pytest.raises(ArgumentError, match="steps: expected an int of at least 2"):
        integrated_gradients(model, x, 0, rule="trapezoid", steps=1)
    with pytest.raises(ArgumentError, match="tolerance"):
        integrated_gradients(model, x, 0, tolerance=float("nan"))
    with pytest.raises(ArgumentError, match="examples"):
        Saliency(examples=0)
    with pytest.raises(ArgumentError, match="keep: expected a boolean mask"):
        integrated_gradients(model, x, 0, keep=[1])
    with pytest.raises(ArgumentError, match="keep: expected a mask of shape"):
        integrated_gradients(Bag(), torch.tensor([[1, 2]]), 0, keep=torch.ones(3).bool())


def test_outputs_with_too_many_axes() -> None:
    with pytest.raises(ArgumentError, match="target: expected outputs"):
        saliency(nn.Conv2d(1, 2, 1), torch.randn(1, 1, 2, 2), 0)


# --- no harm --------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
    ]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_same(one, two)
    else:
        assert a == b


class Touchy(nn.Module):
    """Everything that a careless measurement changes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 3)
        self.out.bias.requires_grad_(False)
        self.fails = False

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.drop(self.words(ids))
        if self.fails:
            raise RuntimeError("on purpose")
        return self.out(self.norm(vectors.sum(1)))


@pytest.mark.parametrize("method", [saliency, integrated_gradients])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(method: Any, fails: bool) -> None:
    model, ids = Touchy(), torch.randint(0, 11, (4, 5))
    model.drop.eval()
    model(ids).sum().backward()
    model.fails = fails
    before, copy_of_ids = state(model), ids.clone()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            method(model, ids, 0)
    else:
        method(model, ids, 0)
    assert_same(before, state(model))
    assert torch.equal(ids, copy_of_ids)


def test_hooks_are_gone_after_a_failure_in_the_middle() -> None:
    model, ids = Bag(), torch.randint(0, 11, (4, 5))
    calls = []

    def target(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("on purpose")
        return outputs[:, 0]

    with pytest.raises(KeyError):
        integrated_gradients(model, ids, target, steps=4)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [saliency, integrated_gradients])
def test_works_without_gradients_around_it(mode: Any, method: Any) -> None:
    model, x, bag = relu_net(), torch.randn(3, 20), Bag()
    ids = torch.randint(0, 11, (3, 5))
    want, want_ids = method(model, x, 0).values, method(bag, ids, 0).values
    with mode():
        assert torch.equal(method(model, x.clone(), 0).values, want)
        assert torch.equal(method(bag, ids.clone(), 0).values, want_ids)


def test_autocast_around_it_changes_nothing() -> None:
    model, x = relu_net(), torch.randn(3, 20)
    want = integrated_gradients(model, x, 0).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(integrated_gradients(model, x, 0).values, want)


def test_result_holds_no_graph() -> None:
    for found in (
        saliency(relu_net(), torch.randn(3, 20), 0),
        integrated_gradients(relu_net(), torch.randn(3, 20), 0),
    ):
        for value in vars(found).values():
            assert not (isinstance(value, Tensor) and value.requires_grad)


def test_memory_does_not_grow_with_the_steps() -> None:
    class Watched(nn.Linear):
        largest = 0

        def forward(self, x: Tensor) -> Tensor:
            self.largest = max(self.largest, x.numel())
            return super().forward(x)

    largest = []
    for steps in (50, 2000):
        model = Watched(3, 100_000)
        found = integrated_gradients(model, torch.randn(1, 3), 5, rule="midpoint", steps=steps)
        largest.append(model.largest)
        assert float(found.gap.abs()) < 1e-4  # type: ignore[union-attr]
    assert largest[0] == largest[1]


@pytest.mark.slow
def test_resident_memory_is_flat() -> None:
    resource = pytest.importorskip("resource")
    model, x = nn.Linear(3, 100_000), torch.randn(4, 3)

    def peak(steps: int) -> int:
        integrated_gradients(model, x, 5, rule="midpoint", steps=steps)
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    peak(20)
    assert peak(2000) - peak(20) < 20_000  # kB; the graphs of 2,000 steps would be 3 GB.


# --- peers ----------------------------------------------------------------------------------------


def reference(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data}


def load(model: nn.Module, data: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict({k[6:]: v for k, v in data.items() if k.startswith("param.")})
    return model


def captum_cnn() -> tuple[nn.Module, dict[str, Tensor]]:
    data = reference("captum_cnn.npz")
    layers = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    return load(nn.Sequential(*layers).double(), data), data


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).mean(2))


def test_captum_saliency() -> None:
    model, data = captum_cnn()
    close(saliency(model, data["x"], data["target"]).values, data["saliency_abs"])
    signed = saliency(model, data["x"], data["target"], kind="signed").values
    close(signed, data["saliency_signed"])


@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("gauss-legendre", "gausslegendre"),
        ("left", "riemann_left"),
        ("right", "riemann_right"),
        ("midpoint", "riemann_middle"),
    ],
)
def test_captum_integrated_gradients(rule: Rule, theirs: str, steps: int) -> None:
    model, data = captum_cnn()
    found = integrated_gradients(
        model, data["x"], data["target"], baseline=data["baseline"], rule=rule, steps=steps
    )
    # captum's own nodes are rounded to float32 on their way.
    close(found.values, data[f"ig.{theirs}.{steps}"], 1e-7)
    close(found.delta, data[f"ig_delta.{theirs}.{steps}"], 1e-6)  # type: ignore[arg-type]


def test_captum_trapezoid_is_biased_and_ours_is_not() -> None:
    model, data = captum_cnn()
    found = integrated_gradients(
        model, data["x"], data["target"], baseline=data["baseline"], rule="trapezoid", steps=50
    )
    theirs = data["ig_delta.riemann_trapezoid.50"].abs().max()
    assert float(found.delta.abs().max()) < 0.05 * float(theirs)  # type: ignore[union-attr]
    # Their weights add up to (n − 1)/n.
    close(found.values * 49 / 50, data["ig.riemann_trapezoid.50"], 1e-6)


def test_captum_zero_baseline() -> None:
    model, data = captum_cnn()
    found = integrated_gradients(model, data["x"], data["target"], steps=32)
    close(found.values, data["ig_zero_baseline.gausslegendre.32"], 1e-7)


def test_captum_text() -> None:
    data = reference("captum_text.npz")
    model = load(Text().double(), data)
    found = integrated_gradients(model, data["ids"], data["target"], baseline=data["ref"], steps=24)
    close(found.values, data["layer_ig_emb"].sum(-1), 1e-7)
    close(found.delta, data["layer_ig_emb_delta"], 1e-6)  # type: ignore[arg-type]


def test_captum_alive() -> None:
    attr = pytest.importorskip("captum.attr")
    model, x, y = relu_net().double(), torch.randn(6, 20).double(), torch.randint(0, 3, (6,))
    theirs = attr.Saliency(model).attribute(x.clone().requires_grad_(), y)
    close(saliency(model, x, y).values, theirs)
    theirs = attr.IntegratedGradients(model).attribute(x, target=y, n_steps=20)
    close(integrated_gradients(model, x, y, steps=20).values, theirs, 1e-6)
    bag, ids = Bag().double(), torch.randint(0, 11, (3, 5))
    layer = attr.LayerIntegratedGradients(bag, bag.words)
    theirs = layer.attribute(ids, torch.full_like(ids, 7), target=1, n_steps=20)
    ours = integrated_gradients(bag, ids, 1, baseline=7, steps=20)
    close(ours.values, theirs.sum(-1), 1e-6)


# --- measurements and panels ----------------------------------------------------------------------


def panels(records: list[mi.Record]) -> dict[str, mi.Panel]:
    return {r.name: r.panel for r in records}


def test_records_of_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 3 * 4, 5))
    batch = (torch.randn(4, 3, 5, 6), torch.tensor([0, 1, 2, 3]))
    found = panels(mi.measure(model, [Saliency(), IntegratedGradients()], batch=batch))
    assert found["saliency/values"].axes == ("example", "channel", "y", "x")
    assert found["saliency/values"].size == {"example": 4, "channel": 3, "y": 5, "x": 6}
    assert set(found) == {
        "saliency/values",
        "saliency/target",
        "saliency/inputs",
        *(
            f"integrated_gradients/{what}"
            for what in (
                "inputs",
                "values",
                "target",
                "gap",
                "delta",
                "output_change",
                "steps",
                "converged",
            )
        ),
    }
    scores = found["integrated_gradients/values"]
    assert scores.size["example"] == 2
    assert scores.unit == "logits"
    assert scores.convention["display"] == {"picture": "image"}
    assert scores.convention["baseline"] == "zero"
    assert scores.convention["target_token"] == [0, 1]
    assert found["integrated_gradients/gap"].convention["display"] == {"scalar": "gap"}
    assert int(found["integrated_gradients/steps"].values.max()) <= 16


def test_records_of_tables_and_other_shapes() -> None:
    found = panels(
        mi.measure(nn.Linear(4, 2), Saliency(), batch=(torch.ones(3, 4), torch.ones(3).long()))
    )
    assert found["saliency/values"].axes == ("example", "feature")
    assert found["saliency/values"].convention["display"] == {"picture": "bars"}
    film = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 4 * 5, 2))
    axes = saliency(film, torch.randn(2, 3, 2, 4, 5), 0).reading()["values"].axes
    assert axes == ("example", "channel", "position", "y", "x")
    flat = saliency(nn.Flatten(), torch.randn(2, 1, 1, 1, 1, 3), 0).reading()["values"]
    assert flat.axes == ("example", "feature")
    assert flat.size == {"example": 2, "feature": 3}


def test_records_of_tokens_carry_their_texts() -> None:
    model, ids = gpt2(), torch.randint(1, 23, (3, 7))
    letters = "abcdefghijklmnopqrstuvw"
    context = mi.Context(model, {"input_ids": ids}, decode=lambda row: [letters[i] for i in row])
    records = mi.measure(model, [Saliency(), IntegratedGradients()], context=context)
    found = panels(records)
    scores = found["integrated_gradients/values"]
    assert scores.axes == ("example", "position")
    assert scores.coords["position"] == list(range(7))
    assert scores.coords["example,position"] == [[letters[i] for i in row] for row in ids[:2]]
    assert scores.convention["target_position"] == [5, 5]
    assert scores.convention["target_token"] == ids[:2, -1].tolist()
    assert scores.convention["target_text"] == [letters[i] for i in ids[:2, -1]]
    assert scores.convention["display"] == {"picture": "strip"}
    assert found["saliency/values"].convention["kind"] == "l2"
    assert found["saliency/values"].size["example"] == 3
    close(found["integrated_gradients/target"].values,
          model(ids[:2]).logits[:, 5].gather(1, ids[:2, -1:])[:, 0].detach(), 1e-5)  # fmt: skip
    made = records[-1].made_by
    assert made["class_path"].endswith("IntegratedGradients")
    assert made["init_args"]["max_steps"] == 12


def test_windows_of_one_token_more_than_the_model_reads() -> None:
    model, window = Window(), torch.randint(0, 11, (2, 6))
    found = panels(mi.measure(model, IntegratedGradients(examples=None), batch=window))
    assert found["integrated_gradients/values"].size == {"example": 2, "position": 5}
    assert found["integrated_gradients/values"].convention["target_token"] == window[:, -1].tolist()


class Window(nn.Module):
    """Reads at most five tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.out = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.out(torch.tanh(hidden.cumsum(1)))


def test_one_firing_computes_once() -> None:
    model, batch = relu_net(), (torch.randn(3, 20), torch.tensor([0, 1, 2]))
    context = mi.Context(model, batch)
    first = Saliency().attribution(model, context)
    assert Saliency(name="again").attribution(model, context) is first
    assert Saliency(kind="signed").attribution(model, context) is not first
    assert isinstance(first, Attribution)


def test_measured_equals_the_function() -> None:
    model, batch = relu_net(), (torch.randn(3, 20), torch.tensor([0, 1, 2]))
    found = panels(mi.measure(model, IntegratedGradients(examples=None, max_steps=64), batch=batch))
    direct = integrated_gradients(model, batch, max_steps=64)
    assert torch.equal(found["integrated_gradients/values"].values, direct.values)


def test_examples_are_stacked_only_where_that_is_right() -> None:
    seen: list[int] = []

    class Sized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    integrated_gradients(Sized(4, 2), torch.randn(3, 4), 0, steps=10)
    assert seen == [3, 6, 30]


def test_channels_last() -> None:
    model, x = captum_cnn()[0], torch.randn(2, 1, 8, 8).double()
    for method in (saliency, integrated_gradients):
        want = method(model, x, 1).values
        wide = nn.Sequential(nn.Conv2d(3, 1, 1), *model).double()
        y = torch.randn(2, 3, 8, 8).double()
        assert want.shape == x.shape
        close(
            method(wide, y.to(memory_format=torch.channels_last), 1).values,
            method(wide, y, 1).values,
        )


def test_measurements_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--measurements", type=list[mi.Measurement])
    target = {"class_path": "lightning_mi.LogitDifference", "init_args": {"token": 3, "other": 4}}
    recipes = [("Saliency", {"target": target}), ("IntegratedGradients", {"baseline": 7})]
    given = [
        {"class_path": f"lightning_mi.attribution.{name}", "init_args": arguments}
        for name, arguments in recipes
    ]
    made = parser.instantiate(parser.parse_object({"measurements": given})).measurements
    assert made[0].target == mi.LogitDifference(3, other=4)
    assert made[1].baseline == 7
    assert isinstance(made[1].baseline, int)  # A token id, not a level.
