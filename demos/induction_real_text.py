"""Watch induction heads form in a small transformer that is trained on real text.

Run by ``make demo``; ``make demo TEXT=path`` takes any other text file. A two-layer transformer of
attention alone learns the King James Bible (half of the windows repeat a passage: that is what
induction is for). Five monitors measure it while it trains, one of them by the circuit that
does induction; afterwards the same measurements run over its checkpoints, and must give the same
numbers.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from _model import AttentionOnly
from _summary import print_summary
from _text import RealText
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from rich.console import Console

from lightning_mi import LogProbability, Record, Run, sweep
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    IntegratedGradientsMonitor,
    MeasurementMonitor,
    SaliencyMonitor,
    ScheduledCheckpoint,
)
from lightning_mi.circuits import CircuitScorecard
from lightning_mi.report import write_report

PASSAGE, SHOWN = 20, 12
"""Prompts are a passage of 20 tokens and its first 12 again; the last is to be foretold."""


def prompts(data: RealText, count: int = 8) -> torch.Tensor:
    """Return prompts from the held-out text: a passage, and its beginning again.

    Where the text allows, each starts at the beginning of a line, has every token once (so that
    there is one place to look) and ends inside a word, where looking back gives the answer.
    """
    stream = data.stream.tokens
    pieces = [data.tokenizer.decode([i]) for i in range(len(data.tokenizer))]

    def wishes(start: int) -> int:
        passage = stream[start : start + PASSAGE].tolist()
        return sum(
            (
                pieces[int(stream[start - 1])].endswith("\n"),
                len(set(passage)) == PASSAGE,
                pieces[passage[SHOWN - 1]].isalpha(),
                not any("\n" in pieces[i] for i in passage),
            )
        )

    starts = range(len(stream) * 9 // 10, len(stream) - PASSAGE)
    best = sorted(starts[:20_000], key=lambda start: -wishes(start))[:count]
    passages = [stream[start : start + PASSAGE] for start in best]
    return torch.stack([torch.cat([p, p[:SHOWN]]) for p in passages])


def monitors(batch: torch.Tensor, vocabulary: int, steps: int) -> list[MeasurementMonitor]:
    """Return the five monitors; they share one run folder, one prompt and their forward passes."""
    often, seldom = max(steps // 64, 1), max(steps // 8, 1)
    # Random tokens, a block of them twice: nothing but induction foretells them.
    repeats = RepeatedTokens(vocabulary, length=24, sequences=24).behavior("trigger")
    return [
        HeadMonitor(batch=batch, every_n_train_steps=often, report=False),
        SaliencyMonitor(batch=batch, examples=2, every_n_train_steps=often),
        IntegratedGradientsMonitor(batch=batch, max_steps=64, every_n_train_steps=often),
        InfluenceMonitor(
            batch=batch,
            query=LogProbability(),
            candidates=600,
            every_n_train_steps=seldom,
        ),
        MeasurementMonitor(
            measurements=[CircuitScorecard(repeats, n_edges=8)],
            batch=batch,
            every_n_train_steps=2 * seldom,
        ),
    ]


def train(data: RealText, steps: int, folder: Path) -> tuple[pl.Trainer, Run]:
    """Train with everything on, and return what there is to look at."""
    pl.seed_everything(0, verbose=False)
    model = AttentionOnly(len(data.tokenizer), data.length)
    watching = monitors(prompts(data), len(data.tokenizer), steps)
    checkpoints = ScheduledCheckpoint(
        folder / "checkpoints", at_steps="log", every_n_train_steps=max(steps // 8, 1)
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=max(steps // 8, 1),
        callbacks=[*watching, checkpoints],
        logger=[
            WandbLogger(
                project="lightning_mi", name=data.text.title, save_dir=folder, offline=True
            ),
            CSVLogger(folder, name="csv", version=""),
        ],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    path = watching[0].run_path
    if path is None:
        raise SystemExit("The run folder was not written.")
    run = Run.open(path)
    run.update_info(title="induction_real_text", text=data.summary())
    return trainer, run


def verify(run: Run, data: RealText, trainer: pl.Trainer, folder: Path) -> dict[str, object]:
    """Measure the saved checkpoints, and compare with what was recorded during training."""
    watching = [c for c in trainer.callbacks if isinstance(c, MeasurementMonitor)]
    measurements = [m for c in watching for m in c.measurements]
    model = AttentionOnly(len(data.tokenizer), data.length)
    decode = watching[0].decode
    sweep(folder / "checkpoints", model, measurements, run=run, dataset=data.train, decode=decode)
    live = {(r.name, r.step): r for r in run.records(source="live")}
    swept = [
        r
        for r in run.records(source="sweep")
        if (r.name, r.step) in live and earlier(r) == earlier(live[r.name, r.step])
    ]
    equal = sum(r.panel.equal(live[r.name, r.step].panel) for r in swept)
    return {
        "check": "Live equals swept",
        "compared": f"{len({r.step for r in swept})} checkpoints measured again after training",
        "result": f"{equal} of {len(swept)} records bit-equal",
        "status": "pass" if equal == len(swept) else "fail",
    }


def earlier(record: Record) -> object:
    """Return the step that a drift was taken from: between checkpoints it is another one."""
    return record.panel.convention.get("at_step")


def main() -> None:
    """Train, verify, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="any text file, instead of the King James Bible")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where results go")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)  # one thread is fastest for a model of this size
    console = Console()
    folder = fresh(options.folder)

    began = time.perf_counter()
    with console.status("learning a vocabulary from the text"):
        data = RealText(options.text)
    console.print(data.summary(), highlight=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on loader workers
        trainer, run = train(data, options.steps, folder)
    check = verify(run, data, trainer, folder)
    run.update_info(checks=[check])
    report = write_report(run)
    print_summary(console, run, data, folder, check, report, time.perf_counter() - began)
    if check["status"] != "pass":
        raise SystemExit("Live records and swept ones differ: please report it.")


def fresh(folder: Path) -> Path:
    """Return a folder that holds no earlier run."""
    number, chosen = 1, folder
    while (chosen / "mi").exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen


if __name__ == "__main__":
    main()
