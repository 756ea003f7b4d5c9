"""Watch what a CNN and a vision transformer look at while they learn to read digits.

Run by ``make demo-images``. Both learn MNIST in a few hundred steps. From the first step to the
last the same held-out digits are explained by several methods; then pixels are taken away in the
order of each method, on digits that were not trained on, and the model must lose its answer faster
than when pixels go at random.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from _digits import CLASSES, Classifier, Digits, SmallCNN, TinyViT, find_mnist
from _watch import (
    Verdict,
    fresh,
    judge,
    moments,
    print_places,
    print_verdicts,
    save_pictures,
    watched,
)
from rich.console import Console

from lightning_mi import Measurement
from lightning_mi.attribution import (
    GradCam,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SmoothGrad,
)
from lightning_mi.attribution.attention_rollout import AttentionRollout
from lightning_mi.attribution.attn_lrp import AttnLRP
from lightning_mi.attribution.measured import Attributed
from lightning_mi.callbacks import IntegratedGradientsMonitor, MeasurementMonitor, SaliencyMonitor
from lightning_mi.report import write_report

LEAST = 0.2
"""By so much of the probability must an area be smaller than at random; 95 % interval."""

SHOWN, JUDGED = 4, 100


def methods(model: Classifier) -> list[Measurement]:
    """Return what suits a model beside saliency and integrated gradients."""
    if isinstance(model, SmallCNN):
        return [
            SmoothGrad(examples=SHOWN),
            GradCam(examples=SHOWN, layer="features.7"),
            Occlusion(examples=SHOWN, window=5, stride=2),
        ]
    return [
        SmoothGrad(examples=SHOWN),
        AttentionRollout(examples=SHOWN),
        AttnLRP(examples=SHOWN),
    ]


def monitors(model: Classifier, data: Digits, steps: int) -> list[MeasurementMonitor]:
    """Return three monitors that explain the same digits at the same steps."""
    batch, at = data.shown(), moments(steps)
    return [
        IntegratedGradientsMonitor(batch=batch, examples=SHOWN, max_steps=64, at_steps=at),
        SaliencyMonitor(batch=batch, examples=SHOWN, at_steps=at),
        MeasurementMonitor(measurements=methods(model), batch=batch, at_steps=at),
    ]


def judged(model: Classifier, data: Digits, count: int) -> list[Verdict]:
    """Judge the methods that say how much each pixel adds to the answer."""
    images, labels = data.val.tensors
    batch = (images[-count:], labels[-count:])
    chosen: list[Attributed] = [
        IntegratedGradients(max_steps=64, examples=None),
        InputXGradient(),
    ]
    if isinstance(model, SmallCNN):
        chosen += [Occlusion(examples=None, window=5, stride=2)]
    else:
        chosen += [AttnLRP(examples=None)]
    return judge(model, batch, chosen, LEAST)


def run_one(
    console: Console, model: Classifier, data: Digits, steps: int, folder: Path, count: int
) -> bool:
    """Train and watch one model, judge its explanations, and say where to see them.

    Returns:
        Whether every method did what it must.
    """
    console.rule(folder.name)
    run = watched(model, data, monitors(model, data, steps), steps, folder)
    verdicts = judged(model, data, count)
    run.update_info(checks=[verdict.check() for verdict in verdicts])
    report, pictures = write_report(run), save_pictures(run, folder / "pictures")
    console.print(f"{type(model).__name__}: {run.info['text']} after {steps} steps")
    print_verdicts(console, f"Deletion, {count} held-out digits: lower is better", verdicts)
    print_places(console, report, pictures, folder)
    return all(verdict.passes for verdict in verdicts)


def main() -> None:
    """Do it for both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each model")
    parser.add_argument("--judged", type=int, default=JUDGED, help="digits judged by deletion")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-images"))
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)  # one thread is fastest for models of this size
    console, began = Console(), time.perf_counter()
    data, folder = Digits(find_mnist()), fresh(options.folder)
    fine = []
    for name, kind in (("cnn", SmallCNN), ("vit", TinyViT)):
        pl.seed_everything(0, verbose=False)
        model = kind()
        model.class_names = [str(digit) for digit in range(CLASSES)]
        fine.append(run_one(console, model, data, options.steps, folder / name, options.judged))
    console.print(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes.", highlight=False)
    if not all(fine):
        raise SystemExit("An explanation was no better than random order: please report it.")


if __name__ == "__main__":
    main()
