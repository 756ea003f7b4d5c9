"""What `integrated_gradients` costs beside captum and beside the least that 50 nodes can cost.

A small CNN on 64 images of 28 x 28 pixels; 50 Gauss-Legendre nodes from a zero baseline. The limit
is 50 times one forward pass and the gradient of its inputs, parameters frozen, one node at a time.
Every case runs in fresh processes that take turns, so that a busy machine slows all of them;
ratios of CPU time are formed within a round, then the median over rounds is taken.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 50
PROMISES = {
    ("ours, 50 nodes", "limit"): 1.05,
    ("ours, 50 nodes", "captum, at its best"): 1.0,
    ("ours, 50 nodes", "captum, by default"): 0.55,
}
MEMORY_PROMISE = 0.25  # of captum's default


def trained() -> tuple[Any, Any, Any]:
    """Return a CNN that tells ten smooth patterns apart in noise, and 64 images with labels."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(1)
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


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "limit": limit,
    "ours, 50 nodes": functools.partial(ours, STEPS),
    "ours, until the gap is 1 %": functools.partial(ours, None),
    "captum, at its best": functools.partial(captum, 64),
    "captum, by default": functools.partial(captum, None),
}


def run_case(name: str, calls: int) -> None:
    """Print CPU seconds of a warm call, and the memory that it needs at its peak, as JSON."""
    case = CASES[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = case()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(calls):
        start = time.process_time()
        case()
        times.append(time.process_time() - start)
    steps = getattr(result, "steps", None)
    facts = {"seconds": statistics.median(times), "megabytes": (peak - before) / 1024}
    if steps is not None:
        facts |= {"steps": steps.tolist(), "gap": float(result.gap.abs().max())}
    print(json.dumps(facts))


def measured(name: str, calls: int) -> dict[str, Any]:
    """Return what a fresh process says about a case."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--case", name, "--calls", str(calls)]
    told = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each case")
    parser.add_argument("--calls", type=int, default=3, help="warm calls in each process")
    parser.add_argument("--case", choices=CASES, help="run one case in this process")
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.calls)
        return
    rounds = [{n: measured(n, options.calls) for n in CASES} for _ in range(options.rounds)]

    def ratio(name: str, other: str, what: str = "seconds") -> float:
        return statistics.median(r[name][what] / max(r[other][what], 1e-9) for r in rounds)

    for name in CASES:
        seconds = statistics.median(r[name]["seconds"] for r in rounds)
        extra = statistics.median(r[name]["megabytes"] for r in rounds)
        print(
            f"{name:28} {seconds:6.3f} CPU s  {ratio(name, 'limit'):5.2f} x limit  "
            f"{ratio(name, 'captum, by default'):5.2f} x captum's default  {extra:5.0f} MB more"
        )
    adapted = rounds[0]["ours, until the gap is 1 %"]
    counts = {n: adapted["steps"].count(n) for n in sorted(set(adapted["steps"]))}
    print(f"images by nodes until 1 %: {counts}; largest gap {adapted['gap']:.2%}")
    for (name, other), promise in PROMISES.items():
        found = ratio(name, other)
        kept = "kept" if found <= promise else "NOT kept"
        print(f"{name} / {other}: {found:.2f}, promised {promise:.2f}: {kept}")
    found = ratio("ours, 50 nodes", "captum, by default", "megabytes")
    kept = "kept" if found <= MEMORY_PROMISE else "NOT kept"
    print(f"extra memory / captum, by default: {found:.2f}, promised {MEMORY_PROMISE:.2f}: {kept}")


if __name__ == "__main__":
    main()
