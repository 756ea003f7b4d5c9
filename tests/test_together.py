"""Several inputs on one path: closed forms, captum with tuples, a slow twin, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mi as mi
from lightning_mi import attribution as at
from lightning_mi.errors import ArgumentError

KEYS = ["ids", "image", "table"]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Scene(nn.Module):
    """Words, an image and a table; what each adds depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.look, self.read = nn.Conv2d(1, 6, 3), nn.Linear(4, 6)
        self.act, self.out = nn.Tanh(), nn.Linear(6, 3)

    def inner(self, words: Tensor, image: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        places = self.places(torch.arange(words.shape[1], device=words.device))
        real = mask[..., None].to(words)
        said = ((words + places) * real).sum(1) / real.sum(1)
        seen = self.look(image).mean((2, 3))
        return self.out(self.act(said * (1 + seen) + self.read(table) * said))

    def forward(
        self, ids: Tensor, image: Tensor, table: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return self.inner(self.words(ids), image, table, mask)


def scene(count: int = 2) -> tuple[Scene, dict[str, Tensor]]:
    batch = {
        "ids": torch.randint(0, 11, (count, 5)),
        "image": torch.randn(count, 1, 4, 6).double(),
        "table": torch.randn(count, 4).double(),
    }
    return Scene().double(), batch


def total(found: Mapping[Any, at.Attribution]) -> Tensor:
    return sum((f.values.flatten(1).sum(1) for f in found.values()), torch.zeros(()))


def test_a_product_is_shared_where_one_by_one_counts_it_twice() -> None:
    model = nn.Bilinear(1, 1, 1, bias=False).double()
    a, b = torch.tensor([[3.0], [1.0]]).double(), torch.tensor([[5.0], [-2.0]]).double()
    batch = {"input1": a, "input2": b}
    keys = ["input1", "input2"]
    product = model(a, b).detach()
    found = at.together(at.integrated_gradients, model, batch, 0, keys=keys)
    for one in found.values():
        close(one.values, product / 2)
        close(one.output_change, product[:, 0])
        assert bool(one.converged.all())
    alone = at.each_input(at.integrated_gradients, model, batch, 0, keys=keys)
    close(total(alone), 2 * product[:, 0])
    halves = at.together(at.idgi, model, batch, 0, keys=keys, options={"steps": 512})
    close(total(halves), product[:, 0], 1e-2 * float(product.abs().max()))


def test_integrated_gradients_equal_captums_of_tuples() -> None:
    captum = pytest.importorskip("captum.attr")
    model, batch = scene()
    mask = torch.ones_like(batch["ids"])
    start = {"ids": 3, "image": 0.5, "table": torch.ones(4).double()}
    points = (model.words(batch["ids"]).detach(), batch["image"], batch["table"])
    baselines = (
        model.words(torch.full_like(batch["ids"], 3)).detach(),
        0.5,
        torch.ones(2, 4).double(),
    )
    # captum's weights are rounded to float32.
    for rule, theirs in (("gauss-legendre", "gausslegendre"), ("midpoint", "riemann_middle")):
        expected = captum.IntegratedGradients(model.inner).attribute(
            points, baselines, 1, (mask,), n_steps=20, method=theirs
        )
        found = at.together(
            at.integrated_gradients, model, batch, 1, keys=KEYS,
            options={"baseline": start, "rule": rule, "steps": 20},
        )  # fmt: skip
        close(found["ids"].values, expected[0].sum(-1).detach(), 1e-8)
        close(found["image"].values, expected[1].detach(), 1e-8)
        close(found["table"].values, expected[2].detach(), 1e-8)
    assert found["image"].axes == ("example", "channel", "y", "x")
    assert torch.equal(found["ids"].ids, batch["ids"])
    assert found["table"].convention["together_with"] == ["ids", "image"]


@pytest.mark.parametrize("keys", [KEYS, [2, 0, 1]])
def test_all_scores_together_add_up(keys: list[Any]) -> None:
    model, batch = scene(3)
    given = batch if keys == KEYS else tuple(batch.values())
    zero = torch.zeros_like(model.words(batch["ids"])), *(0 * batch[k] for k in KEYS[1:])
    change = (model(**batch) - model.inner(*zero, torch.ones_like(batch["ids"])))[:, 2].detach()
    for method, options in (
        (at.integrated_gradients, {}),
        (at.idgi, {"steps": 64}),
        (at.captum_attribution, {"method": "IntegratedGradients"}),
    ):
        found = at.together(method, model, given, 2, keys=keys, options=options)
        assert list(found) == keys
        close(next(iter(found.values())).output_change, change)
        close(total(found), change, 0.02 * float(change.abs().max()))
        for one in found.values():
            close(one.delta, total(found) - change)


def test_slow_twin_with_two_inputs_of_one_table() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def inner(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(torch.sigmoid(a.mean(1)) * b.mean(1))

        def forward(self, question: Tensor, text: Tensor) -> Tensor:
            return self.inner(self.words(question), self.words(text))

    model = Pair().double()
    batch = {"question": torch.randint(0, 9, (2, 3)), "text": torch.randint(0, 9, (2, 6))}
    found = at.together(
        at.integrated_gradients, model, batch, 1, keys=["question", "text"],
        options={"steps": 8, "rule": "right"},
    )  # fmt: skip
    ends = [model.words(ids).detach() for ids in batch.values()]
    sums = [torch.zeros_like(end) for end in ends]
    for k in range(1, 9):
        leaves = [(end * k / 8).requires_grad_() for end in ends]
        slopes = torch.autograd.grad(model.inner(*leaves)[:, 1].sum(), leaves)
        sums = [s + g / 8 for s, g in zip(sums, slopes, strict=True)]
    for key, end, s in zip(found, ends, sums, strict=True):
        close(found[key].values, (end * s).sum(-1))
    same = {"question": batch["text"], "text": batch["text"].clone()}
    alike = at.together(at.integrated_gradients, model, same, 1, keys=["question", "text"])
    close(alike["text"].output_change, total(alike), 0.02)


def test_a_padded_batch_gives_what_its_examples_give() -> None:
    model, batch = scene(3)
    lengths = [5, 2, 4]
    batch["attention_mask"] = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    for method, options in (
        (at.integrated_gradients, {"keep": {"ids": [1, 2]}}),
        (at.idgi, {}),
        (at.captum_attribution, {"method": "FeatureAblation"}),
    ):
        whole = at.together(method, model, batch, 0, keys=KEYS, options=options)
        for i, length in enumerate(lengths):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            one["ids"], one["attention_mask"] = one["ids"][:, :length], None
            alone = at.together(method, model, one, 0, keys=KEYS, options=options)
            close(whole["ids"].values[i, :length], alone["ids"].values[0], 1e-6)
            assert not whole["ids"].values[i, length:].any()
            for key in KEYS[1:]:
                close(whole[key].values[i], alone[key].values[0], 1e-6)


def test_expected_gradients_draw_baselines_that_belong_together() -> None:
    model = nn.Bilinear(2, 3, 1).double()
    batch = {"input1": torch.randn(2, 2).double(), "input2": torch.randn(2, 3).double()}
    keys, starts = ["input1", "input2"], {k: torch.randn_like(v) for k, v in batch.items()}
    found = at.together(
        at.expected_gradients, model, batch, 0, keys=keys,
        options={"references": starts, "samples": 64},
    )  # fmt: skip
    change = model(**batch)[:, 0] - model(**starts)[:, 0].mean()
    close(found["input1"].output_change, change.detach())
    assert float(found["input1"].gap.abs().max()) < 0.25
    own = at.together(at.expected_gradients, model, batch, 0, keys=keys)
    close(own["input1"].output_change.sum(), torch.tensor(0.0).double())
    for wrong in ({"input1": starts["input1"]}, {**starts, "input2": starts["input2"][:1]}):
        with pytest.raises(ArgumentError, match="references"):
            at.together(
                at.expected_gradients, model, batch, 0, keys=keys, options={"references": wrong}
            )


@pytest.mark.filterwarnings("ignore:Setting forward")
def test_captums_methods_see_all_inputs() -> None:
    captum = pytest.importorskip("captum.attr")
    model, batch = scene()
    mask = torch.ones_like(batch["ids"])
    points = (model.words(batch["ids"]).detach(), batch["image"], batch["table"])
    features = (
        torch.arange(5)[None, :, None].expand(1, 5, 6),
        torch.arange(5, 29).reshape(1, 1, 4, 6),
        torch.arange(29, 33)[None],
    )
    for name, options in (("DeepLift", {}), ("FeatureAblation", {"feature_mask": features})):
        forward = model.inner if name == "FeatureAblation" else Inner(model)
        leaves = tuple(point.clone().requires_grad_(name == "DeepLift") for point in points)
        expected = getattr(captum, name)(forward).attribute(leaves, None, 1, (mask,), **options)
        found = at.together(
            at.captum_attribution, model, batch, 1, keys=KEYS, options={"method": name}
        )
        words = expected[0][..., 0] if name == "FeatureAblation" else expected[0].sum(-1)
        close(found["ids"].values, words.detach())
        close(found["image"].values, expected[1].detach())
        close(found["table"].values, expected[2].detach())


class Inner(nn.Module):
    """A model whose forward pass takes vectors."""

    def __init__(self, model: Scene) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        return self.model.inner(*args)


def test_input_times_gradient_is_that_of_each() -> None:
    model, batch = scene()
    found = at.together(at.input_x_gradient, model, batch, 1, keys=KEYS)
    alone = at.each_input(at.input_x_gradient, model, batch, 1, keys=KEYS)
    for key in KEYS:
        close(found[key].values, alone[key].values)


def test_a_layer_is_reached_by_all_inputs() -> None:
    model, batch = scene()
    task = at.InputsOf(KEYS)
    found = at.layer_integrated_gradients(model, batch, 1, layer="act", task=task)
    whole = at.together(at.integrated_gradients, model, batch, 1, keys=KEYS)
    close(found.output_change, whole["ids"].output_change)
    close(found.values, model.out.weight[1].detach() * layer_change(model, batch))
    with pytest.raises(ArgumentError, match="layer"):
        at.layer_integrated_gradients(model, batch, 1, layer="words", task=task)


def layer_change(model: Scene, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.act.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(**batch)
    zero = torch.zeros_like(model.words(batch["ids"])), *(0 * batch[k] for k in KEYS[1:])
    model.inner(*zero, torch.ones_like(batch["ids"]))
    handle.remove()
    return seen[0] - seen[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_input_gets_its_own_precision_back(dtype: torch.dtype) -> None:
    model, batch = scene()
    exact = at.together(at.integrated_gradients, model, batch, 1, keys=KEYS)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    found = at.together(at.integrated_gradients, model.to(dtype), half, 1, keys=KEYS)
    for key in KEYS:
        assert found[key].values.dtype == dtype
        close(found[key].values.double(), exact[key].values, 0.05)
    assert found["ids"].gap.dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model, batch = scene()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    model.words.register_forward_hook(lambda module, args, out: None)
    at.together(at.integrated_gradients, model, batch, 1, keys=KEYS)
    with pytest.raises(ZeroDivisionError):
        at.together(at.integrated_gradients, model, batch, lambda o, b: 1 / 0, keys=KEYS)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    now = [len(m._forward_hooks) for m in model.modules()]
    assert sum(now) == sum(hooks) + 1
    assert all(not batch[k].requires_grad for k in KEYS)


def test_measured_over_training(tmp_path: Any) -> None:
    model, batch = scene()
    made = mi.attribution.IntegratedGradients(target=1, of=KEYS, steps=8)
    panels = {r.what: r.panel for r in mi.measure(model, [made], batch=batch)}
    found = at.together(at.integrated_gradients, model, batch, 1, keys=KEYS, options={"steps": 8})
    for key in KEYS:
        close(panels[f"values_{key}"].values, found[key].values)
    assert panels["values_image"].convention["display"] == {"picture": "image"}
    assert panels["values"].axes == ("example", "feature")
    assert panels["values"].values.shape == (2, 5 + 24 + 4)
    close(panels["gap"].values, found["ids"].gap)
    others = [
        at.Idgi(target=1, of=KEYS),
        at.ExpectedGradients(target=1, of=KEYS, samples=4),
        at.InputXGradient(target=1, of=KEYS),
        at.CaptumAttribution("FeatureAblation", target=1, of=KEYS),
    ]
    names = {r.name for r in mi.measure(model, others, batch=batch)}
    assert {f"{m.name}/values_table" for m in others} <= names
    sums = at.evaluate.deletion(
        model, {k: batch[k] for k in KEYS}, found["table"].values, 1, task=at.InputOf("table")
    )
    assert sums.values.shape == (2,)


def test_what_is_not_defined_is_refused() -> None:
    model, batch = scene()

    def ask(method: Any = at.integrated_gradients, keys: Any = KEYS, **options: Any) -> None:
        at.together(method, model, batch, 1, keys=keys, options=options)

    for method in (at.saliency, at.smooth_grad, at.occlusion, at.attn_lrp):
        with pytest.raises(ArgumentError, match="each_input"):
            ask(method)
    for options in (
        {"baseline": 0.5},
        {"baseline": {"picture": 0}},
        {"keep": [1]},
        {"method": at.captum_attribution, "keys": KEYS[:2]},
    ):
        with pytest.raises((ArgumentError, TypeError)):
            ask(**options)
    for keys in (["ids"], ["ids", "ids"], "ids", ["ids", "nothing"]):
        with pytest.raises(ArgumentError, match="key"):
            ask(keys=keys)
    with pytest.raises(ArgumentError, match="InputsOf"):
        at.together(
            at.layer_integrated_gradients, model, batch, 1, keys=KEYS, options={"layer": "act"}
        )
    with pytest.raises(ArgumentError, match=r"layer|inputs"):
        at.captum_attribution(
            model, batch, 1, method="LayerActivation", layer="act", task=at.InputsOf(KEYS)
        )
    with pytest.raises(ArgumentError, match="together"):
        at.integrated_gradients(model, batch, 1, baseline={"ids": 0})
    with pytest.raises(ArgumentError, match="of: expected one input"):
        at.Saliency(of=["ids", "image"])
