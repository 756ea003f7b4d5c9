"""Input × gradient, SmoothGrad and its kin, Grad-CAM, occlusion: closed forms, twins, captum."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import attribution as at
from lightning_mi.attribution import copies as copies_module
from lightning_mi.callbacks import SaliencyMonitor
from lightning_mi.errors import ArgumentError, ModelError
from lightning_mi.target import LogitDifference

REFERENCE = Path(__file__).parent / "reference"
Method = Callable[..., at.Attribution]


def few(method: Method, /, **options: Any) -> Method:
    return lambda *args, **more: method(*args, **options, **more)


FLOATS: dict[str, Method] = {
    "saliency": at.saliency,
    "input_x_gradient": at.input_x_gradient,
    "smooth_grad": few(at.smooth_grad, samples=5),
    "smooth_grad_squared": few(at.smooth_grad_squared, samples=5),
    "var_grad": few(at.var_grad, samples=5),
    "occlusion": at.occlusion,
}
LAYERED = {"grad_cam": at.grad_cam, "layer_grad_cam": at.layer_grad_cam}


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def tanh_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Cnn(nn.Module):
    """Two convolutions, a batch norm whose statistics must not move, a change in place."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(6 * 3 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(torch.tanh(self.first(x))))
        return self.out(self.act(x).flatten(1))


def images(count: int = 3, channels: int = 2) -> Tensor:
    return torch.randn(count, channels, 7, 9).double()


class Words(nn.Module):
    """Embedding, positions, attention over real tokens, mean over them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(13, width)
        self.places = nn.Embedding(20, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 3)

    def embedded(self, vectors: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        x = vectors + self.places(places)
        keys = mask[:, None].bool()
        scores = (x @ self.mix(x).transpose(1, 2)).masked_fill(~keys, float("-inf"))
        x = torch.tanh(x + scores.softmax(-1) @ x)
        weights = mask[..., None].to(x)
        return self.out((x * weights).sum(1) / weights.sum(1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        return self.embedded(self.words(input_ids), mask, position_ids)


def padded(left: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Four sentences of unequal length, and each alone."""
    torch.manual_seed(3)
    sentences = [torch.randint(1, 13, (n,)) for n in (7, 4, 1, 5)]
    ids, mask = torch.zeros(4, 7).long(), torch.zeros(4, 7).long()
    for row, sentence in enumerate(sentences):
        where = slice(7 - len(sentence), 7) if left else slice(0, len(sentence))
        ids[row, where], mask[row, where] = sentence, 1
    return {"input_ids": ids, "attention_mask": mask}, sentences


# --- closed forms ---------------------------------------------------------------------------------


def test_linear_model() -> None:
    model = nn.Linear(5, 3).double()
    x, w = torch.randn(4, 5).double(), model.weight[1].detach()
    close(at.input_x_gradient(model, x, 1).values, x * w)
    close(at.input_x_gradient(model, x, 1, kind="absolute").values, (x * w).abs())
    close(at.smooth_grad(model, x, 1, kind="signed").values, w.expand(4, 5))
    close(at.smooth_grad(model, x, 1).values, w.abs().expand(4, 5))
    close(at.smooth_grad_squared(model, x, 1).values, w.square().expand(4, 5))
    close(at.var_grad(model, x, 1).values, torch.zeros(4, 5).double())
    close(at.occlusion(model, x, 1).values, x * w)
    close(at.occlusion(model, x, 1, baseline=2.0).values, (x - 2) * w)


def test_product_and_square() -> None:
    x = torch.tensor([[3.0, 5.0], [-2.0, 7.0]]).double()
    product: Any = lambda out, batch: out.prod(1)  # noqa: E731
    # x · ∂(ab) = (ab, ab); without one factor nothing is left.
    whole = x.prod(1)[:, None].expand(2, 2)
    close(at.input_x_gradient(nn.Identity(), x, product).values, whole)
    close(at.occlusion(nn.Identity(), x, product).values, whole)
    # g(x + ε) = 2(x + ε): the variance is 4σ², the mean square 4x² + 4σ² on average.
    square: Any = lambda out, batch: out.square().sum(1)  # noqa: E731
    x = torch.tensor([[0.0, 1.0, 3.0]]).double()
    sigma = 0.15 * 3.0
    found = at.var_grad(nn.Identity(), x, square, samples=20_000).values
    torch.testing.assert_close(found, torch.full_like(x, 4 * sigma**2), rtol=0.05, atol=0)
    found = at.smooth_grad_squared(nn.Identity(), x, square, samples=20_000).values
    torch.testing.assert_close(found, 4 * x.square() + 4 * sigma**2, rtol=0.05, atol=0)


def test_relu_kink_is_smoothed() -> None:
    # relu at 0 with noise σ: the gradient is 1 half of the time; its variance is ¼.
    x = torch.tensor([[0.0, 1.0]]).double()
    relu: Any = lambda out, batch: out[:, 0].relu()  # noqa: E731
    mean = at.smooth_grad(nn.Identity(), x, relu, samples=4000, kind="signed").values[0, 0]
    assert float(mean) == pytest.approx(0.5, abs=0.03)
    assert float(at.var_grad(nn.Identity(), x, relu, samples=4000).values[0, 0]) == pytest.approx(
        0.25, abs=0.01
    )


def test_without_noise_it_is_the_gradient() -> None:
    model, x = tanh_net(), torch.randn(4, 5).double()
    for kind in ("signed", "absolute"):
        plain = at.saliency(model, x, 1, kind=kind)
        smooth = at.smooth_grad(model, x, 1, kind=kind, level=0, samples=1)
        close(smooth.values, plain.values)
        close(smooth.target, plain.target)
    close(at.var_grad(model, x, 1, level=0).values, torch.zeros(4, 5).double())


def test_constant_inputs_have_no_noise() -> None:
    model, x = tanh_net(), torch.full((2, 5), 0.3).double()
    close(at.smooth_grad(model, x, 1, kind="signed").values,
          at.saliency(model, x, 1, kind="signed").values)  # fmt: skip


# --- slow twins -----------------------------------------------------------------------------------


def draws(seed: int, samples: int) -> list[torch.Generator]:
    master = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (samples,), generator=master).tolist()
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_smoothing_slow_twin() -> None:
    model, x = tanh_net(), torch.randn(3, 5).double()
    rows = []
    for example in x:
        sigma = 0.2 * (example.max() - example.min())
        slopes = []
        for generator in draws(4, 6):
            noisy = example + sigma * torch.randn(5, dtype=torch.float64, generator=generator)
            leaf = noisy[None].requires_grad_()
            slopes.append(torch.autograd.grad(model(leaf)[0, 2], leaf)[0][0])
        rows.append(torch.stack(slopes))
    options = {"level": 0.2, "samples": 6, "seed": 4}
    found = torch.stack(rows)
    close(at.smooth_grad(model, x, 2, kind="signed", **options).values, found.mean(1))
    close(at.smooth_grad_squared(model, x, 2, **options).values, found.square().mean(1))
    close(at.var_grad(model, x, 2, **options).values, found.var(1, correction=0))
    other = at.smooth_grad(model, x, 2, kind="signed", level=0.2, samples=6, seed=5).values
    assert float((other - found.mean(1)).abs().max()) > 1e-6


def test_smoothing_of_tokens_slow_twin() -> None:
    model = Words().double()
    ids = torch.tensor([[1, 2, 3, 4]])
    vectors = model.words(ids).detach()
    moving = torch.tensor([False, True, True, True])
    mask, places = torch.ones(1, 4), torch.arange(4)[None]
    sigma = 0.15 * (vectors[0, 1:].max() - vectors[0, 1:].min())
    slopes = []
    for generator in draws(0, 5):
        noise = torch.zeros(4, 8).double()
        for t in range(1, 4):
            noise[t] = torch.randn(8, dtype=torch.float64, generator=generator)
        leaf = (vectors + sigma * noise).requires_grad_()
        value = model.embedded(leaf, mask, places)[0, 1]
        slopes.append(torch.autograd.grad(value, leaf)[0][0])
    found = torch.stack(slopes)
    assert not bool(moving[0])
    options: Any = {"samples": 5, "keep": [1]}
    close(at.smooth_grad(model, ids, 1, kind="signed", **options).values[0], found.mean(0).sum(-1))
    close(at.smooth_grad(model, ids, 1, **options).values[0], found.mean(0).norm(dim=-1))
    close(at.var_grad(model, ids, 1, **options).values[0], found.var(0, correction=0).sum(-1))


def test_input_x_gradient_of_tokens() -> None:
    model, ids = Words().double(), torch.tensor([[1, 2, 3, 4], [5, 5, 0, 1]])
    leaf = model.words(ids).detach().requires_grad_()
    mask, places = torch.ones(2, 4), torch.arange(4)[None]
    (slope,) = torch.autograd.grad(model.embedded(leaf, mask, places)[:, 1].sum(), leaf)
    close(at.input_x_gradient(model, ids, 1).values, (slope * leaf).sum(-1).detach())


def looped_occlusion(model: Any, x: Tensor, window: Any, stride: Any, at_class: int) -> Tensor:
    """One example and one window at a time, over ``[channel, y, x]``."""
    values = torch.zeros_like(x)
    for example, kept in zip(x, values, strict=True):
        count = torch.zeros_like(example)
        starts = []
        for size, side, step in zip(example.shape, window, stride, strict=True):
            found = [0]
            while found[-1] + side < size:
                found.append(found[-1] + step)
            starts.append(found)
        for c in starts[0]:
            for i in starts[1]:
                for j in starts[2]:
                    where = (slice(c, c + window[0]), slice(i, i + window[1]),
                             slice(j, j + window[2]))  # fmt: skip
                    hidden = example.clone()
                    hidden[where] = 0
                    loss = (model(example[None]) - model(hidden[None]))[0, at_class]
                    kept[where] += loss.detach()
                    count[where] += 1
        kept /= count
    return values


@pytest.mark.parametrize(("window", "stride"), [((2, 3, 4), (2, 2, 3)), ((2, 2, 5), (2, 1, 1))])
def test_occlusion_slow_twin_and_captum(window: Any, stride: Any) -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = Cnn().double().eval(), images()
    twin = looped_occlusion(model, x, window, stride, 1)
    found = at.occlusion(model, x, 1, window=window[1:], stride=stride[1:])
    assert found.axes == ("example", "y", "x")
    close(found.values, twin[:, 0])
    theirs = captum.Occlusion(model).attribute(x, window, stride, baselines=0, target=1)
    close(found.values, theirs[:, 0].double(), 1e-6)  # captum counts windows in float32.
    one = at.occlusion(model, x, 1, window=(1, *window[1:]), stride=(1, *stride[1:]))
    assert one.axes == ("example", "channel", "y", "x")
    close(one.values, looped_occlusion(model, x, (1, *window[1:]), (1, *stride[1:]), 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_default_occlusion_covers_images(channels: int) -> None:
    model = Cnn(channels).double()
    found = at.occlusion(model, images(channels=channels), 1)
    assert found.values.shape == (3, 7, 9)
    assert bool((found.values != 0).all())
    assert found.convention["window"] == [1, 1, 2]


def test_occlusion_of_tokens_slow_twin() -> None:
    model, ids = Words().double(), torch.tensor([[1, 2, 3, 4], [5, 5, 0, 1]])
    vectors, mask, places = model.words(ids).detach(), torch.ones(1, 4), torch.arange(4)[None]

    def twin(start: Tensor) -> Tensor:
        rows = torch.zeros(2, 4).double()
        for b in range(2):
            for t in range(4):
                hidden = vectors[b : b + 1].clone()
                hidden[0, t] = start
                change = model(ids[b : b + 1]) - model.embedded(hidden, mask, places)
                rows[b, t] = change[0, 2].detach()
        return rows

    close(at.occlusion(model, ids, 2).values, twin(torch.zeros(8).double()))
    close(at.occlusion(model, ids, 2, baseline=0).values, twin(model.words.weight[0].detach()))
    held = at.occlusion(model, ids, 2, keep=[1]).values
    assert held[0, 0] == held[1, 3] == 0
    assert held[0, 1] != 0


def test_occlusion_averages_over_windows_of_tokens() -> None:
    model, ids = Words().double(), torch.tensor([[1, 2, 3]])
    vectors, mask, places = model.words(ids).detach(), torch.ones(1, 3), torch.arange(3)[None]

    def loss(*hidden: int) -> Tensor:
        changed = vectors.clone()
        changed[0, list(hidden)] = 0
        return (model(ids) - model.embedded(changed, mask, places))[0, 0].detach()

    a, b = loss(0, 1), loss(1, 2)
    found = at.occlusion(model, ids, 0, window=2, stride=1).values[0]
    close(found, torch.stack([a, (a + b) / 2, b]))


# --- Grad-CAM -------------------------------------------------------------------------------------


def cam(model: Cnn, x: Tensor, at_class: int) -> Tensor:
    activation = model.second(model.norm(torch.tanh(model.first(x)))).detach().requires_grad_()
    (slope,) = torch.autograd.grad(
        model.out(activation.relu().flatten(1))[:, at_class].sum(), activation
    )
    return torch.einsum("bc,bchw->bhw", slope.mean((2, 3)), activation).detach()


def test_grad_cam_by_hand_and_captum() -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = Cnn().double().eval(), images()
    expected = cam(model, x, 1)
    found = at.layer_grad_cam(model, x, 1, layer="second", relu=False)
    close(found.values, expected)
    assert found.axes == ("example", "y", "x")
    close(at.layer_grad_cam(model, x, 1).values, expected.relu())  # the last convolution
    model.act.inplace = False  # captum reads what a later change in place has left.
    theirs = captum.LayerGradCam(model, model.second).attribute(x, target=1)
    close(found.values, theirs[:, 0].detach())
    full = at.grad_cam(model, x, 1)
    mode = {"size": (7, 9), "mode": "bilinear", "align_corners": False}
    close(full.values, F.interpolate(expected.relu()[:, None], **mode)[:, 0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch._dynamo's imports
def test_layers_by_name_inside_a_module() -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.teacher = Cnn(), Cnn()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    outer, x = Wrapping().double(), images()
    by_name = at.grad_cam(outer, x, 1, layer="model.second").values
    close(at.grad_cam(outer, x, 1, layer=outer.model.second).values, by_name)
    close(at.grad_cam(outer.model, x, 1, layer="second").values, by_name)
    close(
        at.grad_cam(torch.compile(outer, backend="eager"), x, 1, layer="model.second").values,
        by_name,
    )
    with pytest.raises(ArgumentError, match="2 of them"):
        at.grad_cam(outer, x, 1, layer="second")
    with pytest.raises(ArgumentError, match=r"model\.second"):
        at.grad_cam(outer, x, 1, layer="model.secnd")
    with pytest.raises(ModelError, match="0 calls"):
        at.grad_cam(outer, x, 1, layer="teacher.second")
    with pytest.raises(ArgumentError, match="module of the model"):
        at.grad_cam(outer, x, 1, layer=Cnn().second)


class Patches(nn.Module):
    """A tiny vision transformer with a class token, by convolution or by cutting."""

    def __init__(self, cut: str = "conv") -> None:
        super().__init__()
        self.cut = cut
        self.patch = nn.Conv2d(1, 6, 2, 2) if cut == "conv" else nn.Linear(4, 6)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == "conv":
            tokens = self.patch(x).flatten(2).transpose(1, 2)
        else:
            tokens = self.patch(F.unfold(x, 2, stride=2).transpose(1, 2))
        tokens = self.mix(torch.cat([self.start.expand(len(x), -1, -1), tokens], 1))
        return self.out(tokens.mean(1))


@pytest.mark.parametrize("cut", ["conv", "linear"])
def test_grad_cam_of_patches(cut: str) -> None:
    model = Patches(cut).double()
    x = torch.randn(2, 1, 8, 4 if cut == "conv" else 8).double()
    with pytest.raises(ArgumentError, match="layer"):
        at.grad_cam(model, x, 1)
    found = at.layer_grad_cam(model, x, 1, layer="mix", relu=False)
    assert found.values.shape == (2, 4, x.shape[3] // 2)
    # The head is linear in the mean over positions: every channel's weight is out.weight / n.
    hidden: list[Tensor] = []
    handle = model.mix.register_forward_hook(lambda m, a, out: hidden.append(out.detach()))
    model.eval()(x)
    handle.remove()
    count = hidden[0].shape[1]
    expected = (hidden[0][:, 1:] @ (model.out.weight[1] / count).detach()).view_as(found.values)
    close(found.values, expected)
    assert at.grad_cam(model, x, 1, layer="mix").values.shape == (2, *x.shape[2:])


def test_grad_cam_of_sequences() -> None:
    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv = nn.Embedding(13, 6), nn.Conv1d(6, 5, 3, padding=1)
            self.out = nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.conv(self.words(ids).transpose(1, 2)).relu().mean(2))

    model, ids = Sentence().double(), torch.randint(0, 13, (2, 9))
    found = at.grad_cam(model, ids, 1, relu=False)
    assert found.axes == ("example", "position")
    activation = model.conv(model.words(ids).transpose(1, 2)).detach()
    weights = ((activation > 0) * model.out.weight[1][:, None] / 9).mean(2)
    close(found.values, torch.einsum("bc,bct->bt", weights, activation).detach())


def test_grad_cam_refuses_what_is_no_grid() -> None:
    model, x = Cnn().double(), images()
    with pytest.raises(ArgumentError, match="grid"):
        at.grad_cam(model, x, 1, layer="out")
    with pytest.raises(ArgumentError, match="no convolution"):
        at.grad_cam(tanh_net(), torch.randn(2, 5).double(), 1)

    class Twice(Cnn):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    with pytest.raises(ModelError, match="2 calls"):
        at.grad_cam(Twice().double(), x, 1, layer="second")


# --- any input, any target, any batch -------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", [*FLOATS, "occlusion 2", "occlusion 3/2"])
def test_padded_batch_equals_one_by_one(name: str, left: bool) -> None:
    model = Words().double()
    method = {
        **FLOATS,
        "occlusion 2": few(at.occlusion, window=1, stride=1),
        "occlusion 3/2": few(at.occlusion, window=3, stride=2),
    }[name]
    batch, sentences = padded(left)
    found = method(model, batch, 1).values
    for row, sentence in enumerate(sentences):
        if name == "occlusion 3/2" and len(sentence) < 3:
            continue
        real = batch["attention_mask"][row].bool()
        alone = method(model, {"input_ids": sentence[None]}, 1).values[0]
        close(found[row][real], alone, 1e-9)
        assert bool((found[row][~real] == 0).all())


def test_padded_grad_cam_equals_one_by_one() -> None:
    model = Words().double()
    batch, sentences = padded(left=False)
    found = at.grad_cam(model, batch, 1, layer="mix").values
    for row, sentence in enumerate(sentences):
        alone = at.grad_cam(model, {"input_ids": sentence[None]}, 1, layer="mix").values[0]
        close(found[row][: len(sentence)], alone, 1e-9)
        assert bool((found[row][len(sentence) :] == 0).all())


@pytest.mark.parametrize("name", [*FLOATS, *LAYERED])
def test_batch_equals_one_by_one_and_targets_agree(name: str) -> None:
    model, x = Cnn().double(), images(4)
    method = {**FLOATS, **LAYERED}[name]
    classes = torch.tensor([2, 0, 1, 1])
    found = method(model, x, classes)
    for i in range(4):
        close(method(model, x[i : i + 1], int(classes[i])).values[0], found.values[i], 1e-9)
    rivals = (classes + 1) % 3

    def chosen(out: Tensor, batch: Any) -> Tensor:
        return out.gather(1, classes[:, None])[:, 0]

    def ahead(out: Tensor, batch: Any) -> Tensor:
        return chosen(out, batch) - out.gather(1, rivals[:, None])[:, 0]

    close(method(model, x, chosen).values, found.values)
    close(method(model, (x, classes)).values, found.values)
    close(method(model, {"x": x, "labels": classes}).values, found.values)
    pair = method(model, x, LogitDifference(classes, other=rivals)).values
    close(method(model, x, ahead).values, pair)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", ["floats", "ids"])
def test_result_does_not_depend_on_portions(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = Cnn().double() if kind == "floats" else Words().double()
    x = images() if kind == "floats" else torch.randint(0, 13, (3, 5))
    found = []
    for portion in (1, 4000, 10**9):
        monkeypatch.setattr(copies_module, "PORTION", {"cpu": portion})
        found.append(FLOATS[name](model, x, 1).values)
    close(found[0], found[1])
    close(found[0], found[2])


@pytest.mark.parametrize("name", FLOATS)
def test_model_that_mixes_its_batch_is_not_stacked(name: str) -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x - x.mean(0)).tanh() ** 2).sum(1, keepdim=True)

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().view(3, 5).sum(1, keepdim=True)

    x = torch.randn(3, 5).double()
    for model in (Centred(), Counting()):
        found = FLOATS[name](model, x).values
        assert found.shape == (3, 5)
        if name == "occlusion":
            hidden = x.clone()
            hidden[:, 2] = 0
            close(found[:, 2], (model(x) - model(hidden))[:, 0])


@pytest.mark.parametrize("name", [*FLOATS, *LAYERED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precision_in_is_precision_out(name: str, dtype: torch.dtype) -> None:
    method = {**FLOATS, **LAYERED}[name]
    torch.manual_seed(1)
    model, x = Cnn().double(), images()
    found = method(copy.deepcopy(model).to(dtype), x.to(dtype), 1).values
    assert found.dtype == dtype
    exact = method(model, x, 1).values
    if name not in ("var_grad", "occlusion"):  # Small differences of rounded numbers.
        away = (found.double() - exact).norm() / exact.norm()
        assert float(away) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 0.1)


class Both(nn.Module):
    """An image, a table and ids in one dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(4, 3)
        self.words = nn.Embedding(9, 3)

    def inner(self, image: Tensor, table: Tensor, vectors: Tensor) -> Tensor:
        seen = self.conv(image).tanh().mean((2, 3))
        return seen * self.table(table).tanh() + (vectors * seen[:, None]).sum(1)

    def forward(self, image: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return self.inner(image, table, self.words(ids))


def test_several_inputs_at_once() -> None:
    model = Both().double()
    image, table = torch.randn(2, 1, 5, 6).double(), torch.randn(2, 4).double()
    ids, labels = torch.tensor([[1, 2], [3, 3]]), torch.tensor([2, 0])
    leaves = [v.detach().clone().requires_grad_() for v in (image, table, model.words(ids))]
    value = model.inner(*leaves).gather(1, labels[:, None]).sum()
    slopes = torch.autograd.grad(value, leaves)
    expected = [slopes[0].abs(), slopes[1].abs(), slopes[2].norm(dim=-1)]
    batches = {
        ("image", "table", "ids"): {"image": image, "table": table, "ids": ids, "labels": labels},
        (0, 1, 2): (image, table, ids, labels),
    }
    for keys, batch in batches.items():
        found = at.each_input(at.saliency, model, batch, keys=keys)
        for key, slope in zip(keys, expected, strict=True):
            close(found[key].values, slope)
        hidden = at.each_input(at.occlusion, model, batch, keys=keys[1:2])[keys[1]].values
        less = table.clone()
        less[:, 3] = 0
        gone = (model(image, table, ids) - model(image, less, ids)).gather(1, labels[:, None])
        close(hidden[:, 3], gone[:, 0].detach())
        measurements = [at.Saliency(name=f"of {i}", of=key) for i, key in enumerate(keys)]
        panels = {r.name: r.panel for r in mi.measure(model, measurements, batch=batch)}
        for i, slope in enumerate(expected):
            close(panels[f"of {i}/values"].values, slope)
        mapped = at.each_input(
            at.captum_attribution, model, batch, keys=keys[:1],
            options={"method": "Saliency"},
        )  # fmt: skip
        close(mapped[keys[0]].values, expected[0])
    with pytest.raises(ArgumentError, match="image"):
        at.each_input(at.saliency, model, batches["image", "table", "ids"], keys=["picture"])


# --- harm -----------------------------------------------------------------------------------------


class Purpose(Exception):  # noqa: N818
    """Raised on purpose."""


class Touchy(nn.Module):
    """Everything that a careless method would disturb, and a forward pass that may fail."""

    def __init__(self, fails: int = 10**9) -> None:
        super().__init__()
        self.body, self.drop = Cnn(), nn.Dropout(0.5)
        self.body.norm.eval()
        self.body.out.bias.requires_grad_(False)
        self.fails, self.calls = fails, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.fails:
            raise Purpose
        return self.drop(self.body(x))


def state(model: nn.Module) -> list[Any]:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone())
         for p in model.parameters()],
        [[len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
         for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
    ]  # fmt: skip


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert (a == b).all()
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("fails", [0, 1, 10**9])
@pytest.mark.parametrize("name", [*FLOATS, *LAYERED])
def test_model_is_left_as_it_was(name: str, fails: int) -> None:
    model, x = Touchy().double().train(), images()
    model.body.norm.eval()
    model(x).sum().backward()
    model.fails, model.calls = fails, 0
    before, given = state(model), x.clone()
    try:
        {**FLOATS, **LAYERED}[name](model, x, 1)
    except Purpose:
        assert fails < 10**9
    assert_same(before, state(model))
    assert torch.equal(x, given)
    assert not x.requires_grad


@pytest.mark.parametrize("name", [*FLOATS, *LAYERED])
def test_works_without_gradients_around_it_and_on_subclasses(name: str) -> None:
    class Image(Tensor):
        pass

    method, model, x = {**FLOATS, **LAYERED}[name], Cnn().double(), images()
    plain = method(model, x, 1).values
    with torch.no_grad():
        close(method(model, x, 1).values, plain)
    with torch.inference_mode():
        close(method(model, x.clone(), 1).values, plain)
    found = method(model, x.as_subclass(Image), 1).values
    assert type(found) is Tensor
    close(found, plain)


@pytest.mark.parametrize("name", FLOATS)
def test_recurrent_network(name: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    model = Recurrent().double().train()
    found = FLOATS[name](model, torch.randn(3, 6, 4).double(), 1)
    assert found.values.shape[:2] == (3, 6)
    assert bool(found.values.isfinite().all())


@pytest.mark.parametrize("name", [*FLOATS, *LAYERED])
def test_memory_is_flat(name: str) -> None:
    method, model, x = {**FLOATS, **LAYERED}[name], Cnn(2), images().float()
    small = {"occlusion": few(at.occlusion, window=4), "var_grad": few(at.var_grad, samples=2)}
    method = small.get(name, method)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    method(model, x, 1)
    before = tensors()
    for _ in range(200 if name == "saliency" else 5):
        kept = method(model, x, 1)
    assert not kept.values.requires_grad
    del kept
    assert tensors() <= before


def test_arguments_out_of_range() -> None:
    model, x = tanh_net(), torch.randn(2, 5).double()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (at.saliency, {"kind": "loud"}, "kind"),
        (at.input_x_gradient, {"kind": "l2"}, "kind"),
        (at.smooth_grad, {"level": -1}, "level"),
        (at.smooth_grad, {"level": float("nan")}, "level"),
        (at.smooth_grad, {"samples": 0}, "samples"),
        (at.var_grad, {"samples": 2.5}, "samples"),
        (at.smooth_grad_squared, {"seed": -1}, "seed"),
        (at.occlusion, {"window": 0}, "window"),
        (at.occlusion, {"window": 6}, "window"),
        (at.occlusion, {"window": (1, 1)}, "window"),
        (at.occlusion, {"window": 2, "stride": 3}, "stride"),
        (at.occlusion, {"baseline": torch.zeros(3)}, "baseline"),
    ]
    for method, options, named in wrong:
        with pytest.raises(ArgumentError, match=named):
            method(model, x, 1, **options)
    for cls, options in (
        (at.Saliency, {"kind": "loud"}),
        (at.SmoothGrad, {"samples": 0}),
        (at.VarGrad, {"level": -1}),
        (at.Occlusion, {"window": -1}),
        (at.GradCam, {"examples": 0}),
    ):
        with pytest.raises(ArgumentError):
            cls(**options)


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["input_x_gradient", "smooth_grad", "occlusion", "DeepLift"])
def test_gpt2_padded_equals_one_by_one(name: str, left: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 13}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double()
    method = few(at.captum_attribution, method="DeepLift") if name == "DeepLift" else FLOATS[name]
    batch, sentences = padded(left)
    found = method(model, batch, 3)
    for row, sentence in enumerate(sentences):
        real = batch["attention_mask"][row].bool()
        one = {"input_ids": sentence[None], "attention_mask": torch.ones_like(sentence)[None]}
        close(found.values[row][real], method(model, one, 3).values[0], 1e-9)
        assert float(found.values[row][~real].abs().max() if bool((~real).any()) else 0) == 0


def test_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=12, patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 1, 12, 12)
    name = next(n for n, _ in model.named_modules() if n.endswith("0.layernorm_before"))
    found = at.layer_grad_cam(model, {"pixel_values": x}, 1, layer=name)
    assert found.values.shape == (2, 3, 3)
    assert at.grad_cam(model, {"pixel_values": x}, 1, layer=name).values.shape == (2, 12, 12)


# --- captum's numbers -----------------------------------------------------------------------------


def captum_cnn() -> tuple[nn.Module, dict[str, Tensor]]:
    with np.load(REFERENCE / "captum_cnn.npz") as file:
        data = {k: torch.from_numpy(file[k]) for k in file.files}
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 5),
    ).double()  # fmt: skip
    names = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    model.load_state_dict(names)
    return model, data


def test_captum_input_x_gradient() -> None:
    model, data = captum_cnn()
    found = at.input_x_gradient(model, data["x"], data["target"])
    close(found.values, data["input_x_gradient"])


# --- measurements, callback, report ---------------------------------------------------------------

MEASUREMENTS: list[Any] = [
    at.Saliency(examples=2),
    at.InputXGradient(examples=2),
    at.SmoothGrad(samples=3, examples=2),
    at.SmoothGradSquared(samples=3, examples=2),
    at.VarGrad(samples=3, examples=2),
    at.GradCam(examples=2),
    at.LayerGradCam(examples=2),
    at.Occlusion(examples=2),
]


def test_measured_equals_the_function() -> None:
    model, x, y = Cnn().double(), images(3), torch.tensor([0, 2, 1])
    records = mi.measure(model, MEASUREMENTS, batch=(x, y))
    found = {r.name: r.panel for r in records}
    functions = {**FLOATS, **LAYERED}
    for m in MEASUREMENTS:
        method = functions[m.name]
        if hasattr(m, "samples"):
            method = few(getattr(at, m.name), samples=3)
        expected = method(model, x[:2], y[:2])
        panel = found[f"{m.name}/values"]
        close(panel.values, expected.values)
        assert panel.axes == expected.axes
        assert panel.convention["method"] == m.name
        assert panel.convention["target_unit"] == "logits"
        close(found[f"{m.name}/target"].values, expected.target)


def test_measured_twice_computes_once() -> None:
    model = Touchy().double()
    one = at.SmoothGrad(samples=2, examples=None)
    calls = model.calls
    context = mi.Context(model, (images(), torch.tensor([0, 1, 2])), mi.Classification())
    first = one.attribution(model, context)
    used = model.calls - calls
    assert one.attribution(model, context) is first
    assert model.calls - calls == used
    other = at.SmoothGrad(samples=2, seed=1, examples=None).attribution(model, context)
    assert not torch.equal(other.values, first.values)


@pytest.mark.parametrize(
    ("options", "cls"),
    [
        ({}, at.Saliency),
        ({"method": "smooth_grad", "kind": "signed", "options": {"samples": 2}}, at.SmoothGrad),
        ({"method": "grad_cam", "layer": "net.0"}, at.GradCam),
        ({"method": "occlusion", "options": {"window": 2}}, at.Occlusion),
        ({"method": "DeepLift"}, at.CaptumAttribution),
        ({"method": "LayerConductance", "layer": "net.0"}, at.CaptumAttribution),
    ],
)
def test_monitor_takes_a_method(options: dict[str, Any], cls: type) -> None:
    monitor = SaliencyMonitor(**options)
    assert type(monitor.measurements[0]) is cls


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gradient"},
        {"method": "DeepLyft"},
        {"method": "grad_cam", "kind": "signed"},
        {"method": "saliency", "layer": "net"},
        {"method": "smooth_grad", "options": {"sigma": 1}},
        {"method": "DeepLift", "kind": "signed"},
        {"method": "LayerConductance"},
    ],
)
def test_monitor_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        SaliencyMonitor(**options)


def test_monitors_during_training(tmp_path: Any) -> None:
    import cases

    pl = cases.lightning()

    class Digits(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 6), torch.randint(0, 3, (16,)))
    loader = torch.utils.data.DataLoader(data, 4)
    methods = ["grad_cam", "occlusion", "smooth_grad", "DeepLift", "FeatureAblation"]
    monitors = [SaliencyMonitor(method=m, examples=2) for m in methods]
    trainer = cases.trainer(callbacks=monitors, default_root_dir=tmp_path, max_steps=2)
    trainer.fit(Digits(), loader, loader)
    run = mi.Run.open(tmp_path)
    assert run.dataset("grad_cam")["values"].dims == ("step", "example", "y", "x")
    assert run.dataset("smooth_grad")["values"].dims == ("step", "example", "channel", "y", "x")
    assert float(abs(run.dataset("captum_deep_lift")["gap"]).max()) < 1e-3
    assert bool((run.dataset("captum_feature_ablation")["values"] != 0).any())
