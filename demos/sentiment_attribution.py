"""Watch which words a small transformer goes by while it learns to tell praise from complaint.

Run by ``make demo-text``. It learns short reviews and tweets in some hundred steps. From the first
step to the last the same held-out texts are explained by several methods; then tokens are taken
away in the order of each method, from texts that were not trained on, and the model must lose its
answer faster than when tokens go at random or by their position.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from _snippets import Reader, Snippets, fetch
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

from lightning_mi import LogitDifference
from lightning_mi.attribution import IntegratedGradients, Occlusion
from lightning_mi.attribution.attn_lrp import AttnLRP
from lightning_mi.callbacks import IntegratedGradientsMonitor, MeasurementMonitor, SaliencyMonitor
from lightning_mi.report import write_report

LEAST = 0.1
"""By so much of the probability must an area be smaller than another order's; 95 % interval."""

SHOWN, JUDGED = 6, 200

TARGET = LogitDifference()
"""The answer's logit less the other's: with two classes only their difference says anything."""


def monitors(data: Snippets, steps: int) -> list[MeasurementMonitor]:
    """Return three monitors that explain the same texts at the same steps."""
    batch, at = data.shown(SHOWN), moments(steps)
    methods = [
        Occlusion(examples=SHOWN, target=TARGET),
        AttnLRP(examples=SHOWN, target=TARGET),
    ]
    return [
        IntegratedGradientsMonitor(
            target=TARGET, batch=batch, examples=SHOWN, max_steps=64, at_steps=at
        ),
        SaliencyMonitor(target=TARGET, batch=batch, examples=SHOWN, at_steps=at),
        MeasurementMonitor(measurements=methods, batch=batch, at_steps=at),
    ]


def judged(model: Reader, data: Snippets, count: int) -> list[Verdict]:
    """Judge the methods that say how much each token adds to the answer."""
    methods = [
        IntegratedGradients(max_steps=64, examples=None, target=TARGET),
        Occlusion(examples=None, target=TARGET),
        AttnLRP(examples=None, target=TARGET),
    ]
    return judge(model, data.val[-count:], methods, LEAST)


def main() -> None:
    """Train and watch the model, judge its explanations, and say where to see them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--judged", type=int, default=JUDGED, help="texts judged by deletion")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-text"))
    parser.add_argument("--texts", type=Path, help="archive that holds the rated texts")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)  # one thread is fastest for a model of this size
    console, began = Console(), time.perf_counter()
    with console.status("fetching the texts and learning a vocabulary"):
        data = Snippets(options.texts or fetch(options.folder.parent))
    console.print(data.summary(), highlight=False)
    folder = fresh(options.folder)
    pl.seed_everything(0, verbose=False)
    model = Reader(len(data.tokenizer), data.length)
    run = watched(model, data, monitors(data, options.steps), options.steps, folder / "sentiment")
    verdicts = judged(model, data, options.judged)
    run.update_info(checks=[verdict.check() for verdict in verdicts])
    report, pictures = write_report(run), save_pictures(run, folder / "pictures")
    console.print(f"{run.info['text']} after {options.steps} steps")
    title = f"Deletion, {options.judged} held-out texts: lower is better"
    print_verdicts(console, title, verdicts)
    print_places(console, report, pictures, folder / "sentiment")
    console.print(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes.", highlight=False)
    if not all(verdict.passes for verdict in verdicts):
        raise SystemExit("An explanation was no better than another order: please report it.")


if __name__ == "__main__":
    main()
