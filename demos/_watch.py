"""What the demos of attributions share: train and watch, judge by deletion, save pictures."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_mi import Context, Run
from lightning_mi.attribution.evaluate import Evaluation, Interval, deletion, interval
from lightning_mi.attribution.measured import Attributed
from lightning_mi.callbacks import MeasurementMonitor
from lightning_mi.sinks.grid import over_steps
from lightning_mi.sinks.names import spelled
from lightning_mi.sinks.pictures import Scales, draw

NAMES = {"random": "in random order", "position": "by position alone"}

SHARES = (0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 1)
"""When to look, as shares of the run: often in the beginning, when most happens."""


def watched(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    monitors: list[MeasurementMonitor],
    steps: int,
    folder: Path,
) -> Run:
    """Train a model with monitors on, and return what they recorded.

    Args:
        model: What to train.
        data: What to train it on.
        monitors: They share one run folder.
        steps: Optimizer steps.
        folder: Where everything goes.

    Returns:
        The run.
    """
    logger = WandbLogger(project="lightning_mi", name=folder.name, save_dir=folder, offline=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=max(steps // 4, 1),
        check_val_every_n_epoch=None,
        callbacks=list(monitors),
        logger=[logger, CSVLogger(folder, name="csv", version="")],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on loader workers
        trainer.fit(model, datamodule=data)
    path = monitors[0].run_path
    if path is None:
        raise SystemExit("The run folder was not written.")
    logger.experiment.finish()
    run = Run.open(path)
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    run.update_info(title=folder.name, text=f"validation accuracy {accuracy:.1%}")
    return run


def moments(steps: int) -> list[int]:
    """Return the steps at which to measure."""
    return sorted({round(share * steps) for share in SHARES})


@dataclass(frozen=True)
class Verdict:
    """How well a method does at deletion.

    Args:
        method: Its name.
        found: Areas under the model's probability while the highest scored inputs go.
        least: The margin that it must reach over random and over position alone, at the lower end
            of the 95 % interval.
    """

    method: str
    found: Evaluation
    least: float

    @property
    def passes(self) -> bool:
        """Whether the intervals of the margins lie above what was stated."""
        return all(margin.low >= self.least for margin in self.margins.values())

    @property
    def margins(self) -> dict[str, Interval]:
        """How much better than random and, for texts, than an order by position alone."""
        alone = self.found.recency_margin
        margins = {"random": self.found.margin_interval}
        return margins if alone is None else {**margins, "position": interval(alone)}

    def check(self) -> dict[str, str]:
        """Return what the report shows under its checks."""
        area = self.found.mean
        others = [f"{area.mean + m.mean:.3f} {NAMES[name]}" for name, m in self.margins.items()]
        least = " and ".join(f"{m.low:.3f}" for m in self.margins.values())
        return {
            "check": f"Deletion by {self.method} beats {' and '.join(self.margins)}",
            "compared": f"area under the probability while the top inputs go, {area.n} held-out "
            f"examples; with 95 % confidence it must be smaller by {self.least:g}",
            "result": f"{area.mean:.3f} against {', '.join(others)}: smaller by at least {least}",
            "status": "pass" if self.passes else "fail",
        }


def judge(
    model: nn.Module,
    batch: Any,
    methods: Sequence[Attributed],
    least: float,
    **options: Any,
) -> list[Verdict]:
    """Remove inputs in the order of each method, and see how fast the model loses its answer.

    Whatever a method explains of a class, what is followed is the probability of that class.

    Args:
        model: The trained model.
        batch: Held-out examples.
        methods: Measurements that explain all of them.
        least: The margin that each must reach.
        **options: As in `deletion`.

    Returns:
        One verdict for each.
    """
    verdicts = []
    for method in methods:
        scores = method.attribution(model, Context(model, batch))
        found = deletion(model, batch, scores, **options)
        verdicts.append(Verdict(spelled(method.name), found, least))
    return verdicts


def save_pictures(run: Run, folder: Path) -> list[Path]:
    """Write one picture for each method: the same examples over steps.

    Args:
        run: The records.
        folder: Where to.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scales, files = Scales(), []
    for shown in over_steps(run.records(source="live")):
        file = folder / f"{shown.records[0].measurement}.png"
        Image.fromarray(draw(shown, scales)).save(file)
        files.append(file)
    return files


def print_verdicts(console: Console, title: str, verdicts: Sequence[Verdict]) -> None:
    """Print a table of areas.

    Args:
        console: Where to.
        title: What was judged.
        verdicts: Of each method.
    """
    table = Table(title=title, title_justify="left")
    against = list(verdicts[0].margins)
    beside = [column for name in against for column in (name, "margin (95 %)")]
    for name in ("method", "area", *beside, f"≥ {verdicts[0].least:g}"):
        table.add_column(name)
    for one in verdicts:
        area, cells = one.found.mean.mean, []
        for margin in one.margins.values():
            cells.append(f"{area + margin.mean:.3f}")
            cells.append(f"{margin.mean:.3f} ({margin.low:.3f} to {margin.high:.3f})")
        passed = "[green]pass[/green]" if one.passes else "[red]FAIL[/red]"
        table.add_row(one.method, f"{area:.3f}", *cells, passed)
    console.print(table)


def print_places(console: Console, report: Path, pictures: Sequence[Path], folder: Path) -> None:
    """Say where everything is.

    Args:
        console: Where to.
        report: The HTML report.
        pictures: One for each method.
        folder: Where W&B's files lie.
    """
    wandb = os.path.relpath(Path(sys.executable).parent / "wandb")
    latest = os.path.relpath(folder / "wandb" / "latest-run")
    for what, where in (
        ("report  ", f"{os.path.relpath(report)}   (open it in a browser)"),
        ("pictures", f"{os.path.relpath(pictures[0].parent)}   ({len(pictures)} methods)"),
        ("W&B     ", f"{wandb} leet {latest}   (offline, in this terminal)"),
    ):
        console.print(f"  {what}  {where}", highlight=False, soft_wrap=True)


def fresh(folder: Path) -> Path:
    """Return a folder that holds no earlier run."""
    number, chosen = 1, folder
    while chosen.exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen
