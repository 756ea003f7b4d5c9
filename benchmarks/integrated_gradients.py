"""What `integrated_gradients` costs beside captum and beside the least that 50 nodes can cost.

A small CNN on 64 images of 28 x 28 pixels; 50 Gauss-Legendre nodes from a zero baseline. The limit
is 50 times one forward pass and the gradient of its inputs, parameters frozen, one node at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

STEPS = 50
OURS, ADAPTED = "ours, 50 nodes", "ours, until the gap is 1 %"
BEST, DEFAULT = "captum, at its best", "captum, by default"
PROMISES = (
    Promise(OURS, "limit", 1.05),
    Promise(OURS, BEST, 1.0),
    Promise(OURS, DEFAULT, 0.55),
    Promise(ADAPTED, DEFAULT, 0.20),
    Promise(OURS, DEFAULT, 0.25, "megabytes"),
)


def trained() -> tuple[Any, Any, Any]:
    """Return a CNN that tells ten smooth patterns apart in noise, and 64 images with labels."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    convolution = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    model = nn.Sequential(
        *(convolution(1, 8), nn.ReLU(), convolution(8, 16, stride=2), nn.ReLU()),
        *(convolution(16, 16, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    patterns = F.interpolate(torch.rand(10, 1, 7, 7), size=28, mode="bilinear")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        labels = torch.randint(0, 10, (64,))
        images = patterns[labels] + 0.3 * torch.randn(64, 1, 28, 28)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), images, labels


def limit() -> Callable[[], Any]:
    """Return the bare loop over nodes."""
    import numpy as np
    import torch

    model, images, labels = trained()
    model.requires_grad_(False)
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)

    def run() -> Any:
        total = torch.zeros_like(images)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            point = (images * ((node + 1) / 2)).requires_grad_()
            logits = model(point).gather(1, labels[:, None])
            total.add_(torch.autograd.grad(logits.sum(), point)[0], alpha=weight / 2)
        return total.mul_(images)

    return run


def ours(steps: int | None) -> Callable[[], Any]:
    """Return ours, with so many nodes or adapted to each image."""
    from lightning_mi.attribution import integrated_gradients

    model, images, labels = trained()
    return lambda: integrated_gradients(model, images, labels, steps=steps)


def captum(batch: int | None) -> Callable[[], Any]:
    """Return captum's, with so many points in a pass."""
    from captum.attr import IntegratedGradients

    model, images, labels = trained()
    method = IntegratedGradients(model)
    options = {"n_steps": STEPS, "internal_batch_size": batch}
    return lambda: method.attribute(images, 0 * images, target=labels, **options)


CASES: dict[str, Case] = {
    "limit": limit,
    OURS: functools.partial(ours, STEPS),
    ADAPTED: functools.partial(ours, None),
    BEST: functools.partial(captum, 64),
    DEFAULT: functools.partial(captum, None),
}


def facts(result: Any) -> dict[str, Any]:
    """Return the nodes that each image took and the largest gap that was left."""
    if not hasattr(result, "steps"):
        return {}
    return {"steps": result.steps.tolist(), "gap": float(result.gap.abs().max())}


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    adapted = compare(CASES, beside=DEFAULT, promises=PROMISES, facts=facts)[0][ADAPTED]
    counts = {n: adapted["steps"].count(n) for n in sorted(set(adapted["steps"]))}
    print(f"images by nodes until 1 %: {counts}; largest gap {adapted['gap']:.2%}")


if __name__ == "__main__":
    main()
