"""What `saliency` costs beside the least that it can cost, and beside captum.

The limit is one forward pass and the gradient of its inputs, parameters frozen. A small CNN on 64
images of 28 x 28 pixels, and a transformer on 8 sequences of 128 token ids (for the limit and for
captum their embedded vectors). Other methods that take several passes are compared with as many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

REPEATS = 20
"""Calls that make one measured call, as one alone is short."""

SAMPLES = 10
LIMIT, OURS, THEIRS = "limit", "saliency", "captum's Saliency"
TEXT_LIMIT, TEXT_OURS = "limit, text", "saliency, text"
NOISY_LIMIT, NOISY = "limit, 10 passes", "SmoothGrad, 10 samples"
NOISY_THEIRS = "captum's NoiseTunnel"
PROMISES = (
    Promise(OURS, LIMIT, 1.05),
    Promise(OURS, THEIRS, 1.0),
    Promise(TEXT_OURS, TEXT_LIMIT, 1.05),
    Promise(NOISY, NOISY_LIMIT, 1.15),
    Promise(NOISY, NOISY_THEIRS, 1.0),
)


def images() -> tuple[Any, Any, Any]:
    """Return a CNN, 64 images and their classes."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    convolution = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    model = nn.Sequential(
        *(convolution(1, 8), nn.ReLU(), convolution(8, 16, stride=2), nn.ReLU()),
        *(convolution(16, 16, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return model.eval(), torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))


def text() -> tuple[Any, Any, Any]:
    """Return a transformer that classifies, 8 sequences of ids, and their classes."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(1000, 128)
            layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.out = nn.Linear(128, 5)

        def embedded(self, vectors: Any) -> Any:
            return self.out(self.body(vectors).mean(1))

        def forward(self, ids: Any) -> Any:
            return self.embedded(self.words(ids))

    torch.manual_seed(0)
    model = Transformer().eval()
    return model, torch.randint(0, 1000, (8, 128)), torch.randint(0, 5, (8,))


def repeated(work: Callable[[], Any], repeats: int = REPEATS) -> Callable[[], Any]:
    """Return work that is done several times."""

    def run() -> Any:
        for _ in range(repeats):
            found = work()
        return found

    return run


def limit(noisy: bool = False) -> Callable[[], Any]:
    """Return the bare gradient, once or with noise as often as SmoothGrad."""
    import torch

    model, x, y = images()
    model.requires_grad_(False)

    def slope(points: Any) -> Any:
        leaf = points.detach().clone().requires_grad_()
        logits = model(leaf).gather(1, y[:, None])
        return torch.autograd.grad(logits.sum(), leaf)[0]

    def smooth() -> Any:
        return sum(slope(x + 0.15 * torch.randn_like(x)) for _ in range(SAMPLES)).abs()

    return repeated(smooth, 3) if noisy else repeated(lambda: slope(x).abs())


def text_limit() -> Callable[[], Any]:
    """Return the bare gradient at embedded vectors."""
    import torch

    model, ids, y = text()
    model.requires_grad_(False)

    def run() -> Any:
        leaf = model.words(ids).detach().requires_grad_()
        logits = model.embedded(leaf).gather(1, y[:, None])
        return torch.autograd.grad(logits.sum(), leaf)[0].norm(dim=-1)

    return repeated(run, 3)


def ours(kind: str) -> Callable[[], Any]:
    """Return ours."""
    from lightning_mi.attribution import saliency, smooth_grad

    model, x, y = text() if kind == "text" else images()
    if kind == "noisy":
        return repeated(lambda: smooth_grad(model, x, y, samples=SAMPLES), 3)
    return repeated(lambda: saliency(model, x, y), 3 if kind == "text" else REPEATS)


def captum(noisy: bool = False) -> Callable[[], Any]:
    """Return captum's."""
    from captum.attr import NoiseTunnel, Saliency

    model, x, y = images()
    method = Saliency(model)
    if not noisy:
        return repeated(lambda: method.attribute(x.clone().requires_grad_(), target=y))
    tunnel, options = NoiseTunnel(method), {"nt_samples": SAMPLES, "stdevs": 0.15, "abs": False}
    return repeated(lambda: tunnel.attribute(x.clone().requires_grad_(), target=y, **options), 3)


CASES: dict[str, Case] = {
    LIMIT: limit,
    OURS: functools.partial(ours, "images"),
    THEIRS: captum,
    TEXT_LIMIT: text_limit,
    TEXT_OURS: functools.partial(ours, "text"),
    NOISY_LIMIT: functools.partial(limit, noisy=True),
    NOISY: functools.partial(ours, "noisy"),
    NOISY_THEIRS: functools.partial(captum, noisy=True),
}


if __name__ == "__main__":
    compare(CASES, beside=LIMIT, promises=PROMISES)
