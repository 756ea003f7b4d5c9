"""What monitors cost in training: CPU time with them beside CPU time without.

A GPT-2 of 4 layers, 128 wide, 4 heads, 512 tokens, on 16 sequences of 128 tokens a step, trained
with nothing, with the three monitors of inputs and heads at their defaults, and with
`InfluenceMonitor` at its defaults, each every 100 steps and with Lightning's own CSVLogger (or
another: ``--logger``). ``--cases idle`` adds one with a monitor that never fires, as a control.

All trainings live in one process, one thread each, and take turns step by step: only one runs at a
time, and all meet the same weather on a busy machine. A block is 100 steps and the one firing in
them; its ratio is formed to the same block of the training without monitors, then the median over
blocks is taken. Each round is a fresh process in which another training is the first, as threads
are not quite equal. What happens once (set-up, the firing before the first step, the last one, and
what the end adds) is told apart. An idle monitor costs too little for that: it is measured with a
model whose step costs nothing, beside a callback without hooks, which Lightning calls as often.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from harness import Promise, Ratio, compared, fresh, judge, ratio_of, verdict

from lightning_mi.callbacks import (
    HeadMonitor,
    InfluenceMonitor,
    IntegratedGradientsMonitor,
    MeasurementMonitor,
    SaliencyMonitor,
)

EVERY = 100
NOTHING, IDLE, THREE, INFLUENCE = "nothing", "idle", "three monitors", "InfluenceMonitor"
EMPTY = "empty callback"
PROMISES = (Promise(THREE, NOTHING, 1.02), Promise(INFLUENCE, NOTHING, 1.05))
IDLE_SHARE, IDLE_MICROSECONDS = 1e-3, 20.0
SMALL_TURNS, SMALL_STEPS = 150, 25


def idle() -> MeasurementMonitor:
    """Return a monitor that never fires."""
    return MeasurementMonitor(
        measurements=[], every_n_train_steps=10**9, at_start=False, at_end=False
    )


KINDS: dict[str, Callable[[], list[MeasurementMonitor]]] = {
    NOTHING: list,
    IDLE: lambda: [idle()],
    THREE: lambda: [
        kind(every_n_train_steps=EVERY)
        for kind in (HeadMonitor, SaliencyMonitor, IntegratedGradientsMonitor)
    ],
    INFLUENCE: lambda: [InfluenceMonitor(every_n_train_steps=EVERY)],
}


class Sequences(torch.utils.data.Dataset[torch.Tensor]):
    """Sequences of a Markov chain: one of four tokens follows each."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(0)
        following = torch.randint(0, 512, (512, 4), generator=draw)
        self.tokens = torch.randint(0, 512, (count, 128), generator=draw)
        choice = torch.randint(0, 4, (count, 128), generator=draw)
        for t in range(1, 128):
            self.tokens[:, t] = following[self.tokens[:, t - 1], choice[:, t]]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a sequence."""
        return self.tokens[index]


class Language(pl.LightningModule):
    """The language model."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": 512}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.net(ids, use_cache=False).logits

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return self.net(batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Nothing(pl.LightningModule):
    """A model whose step costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 8)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Turns:
    """Trainings in threads of which only one runs at a time, and the CPU seconds of every turn.

    Args:
        names: Who takes part.
    """

    def __init__(self, names: list[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._waiting = list(names)
        self._changed = threading.Condition()
        self._began = 0.0

    def begin(self, name: str) -> None:
        """Wait for one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == name)
        self._began = time.process_time()

    def end(self, name: str, *, last: bool = False) -> None:
        """Let the next one go on."""
        self.seconds[name].append(time.process_time() - self._began)
        with self._changed:
            self._waiting.remove(name)
            self._waiting += [] if last else [name]
            self._changed.notify_all()

    def run(self, works: dict[str, Callable[[], None]]) -> None:
        """Run everything, each in its thread."""

        def alone(name: str, work: Callable[[], None]) -> None:
            self.begin(name)
            try:
                work()
            finally:
                self.end(name, last=True)

        threads = [threading.Thread(target=alone, args=pair) for pair in works.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Turn(pl.Callback):
    """Ends a turn before every so manieth step; the first callback, so that nothing is missed."""

    def __init__(self, turns: Turns, name: str, steps: int) -> None:
        super().__init__()
        self.turns, self.name, self.steps = turns, name, steps

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Let the others go on."""
        if trainer.global_step % self.steps == 0:
            self.turns.end(self.name)
            self.turns.begin(self.name)


def timed(monitor: MeasurementMonitor) -> dict[int, float]:
    """Return the CPU seconds of each firing by step, filled while training."""
    fire, found = monitor.fire, {}

    def measured(trainer: Any, model: Any) -> None:
        start = time.process_time()
        fire(trainer, model)
        found.setdefault(trainer.global_step, time.process_time() - start)

    monitor.fire = measured  # type: ignore[method-assign]
    return found


def train(
    model: Callable[[], Any], loader: Any, steps: int, callbacks: list[Any], logger: Any
) -> None:
    """Train for some steps."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model(), loader)


def made(kind: str, folder: str) -> Any:
    """Return a logger by name."""
    from pytorch_lightning import loggers

    if kind == "wandb":  # a run for each training; what W&B does in its own process is not counted
        return loggers.WandbLogger(save_dir=folder, offline=True, reinit="create_new")
    kinds = {"csv": loggers.CSVLogger, "tensorboard": loggers.TensorBoardLogger}
    return kinds[kind](folder) if kind in kinds else False


def language(blocks: int, names: list[str], logger: str, folder: str) -> dict[str, Any]:
    """Return CPU seconds of every step of every training, and of every firing."""
    steps = EVERY * blocks + 2
    data, turns, firings = Sequences(16 * steps), Turns(names), {}
    works = {}
    for name in names:
        monitors = KINDS[name]()
        firings |= {f"{name}: {type(m).__name__}": timed(m) for m in monitors}
        callbacks = [Turn(turns, name, 1), *monitors]
        loader = torch.utils.data.DataLoader(data, 16)
        own = made(logger, f"{folder}/{name}")
        works[name] = functools.partial(train, Language, loader, steps, callbacks, own)
    turns.run(works)
    return {"seconds": turns.seconds, "firings": firings}


def nothing(folder: str) -> dict[str, list[float]]:
    """Return CPU microseconds of a step of each turn, in trainings whose steps cost nothing."""
    kinds: dict[str, list[Any]] = {NOTHING: [], EMPTY: [pl.Callback()], IDLE: [idle()]}
    turns, works, steps = Turns(list(kinds)), {}, SMALL_TURNS * SMALL_STEPS
    data = torch.utils.data.TensorDataset(torch.randn(steps, 8))
    for name, callbacks in kinds.items():
        loader, own = torch.utils.data.DataLoader(data, 1), made("csv", f"{folder}/small {name}")
        whole = [Turn(turns, name, SMALL_STEPS), *callbacks]
        works[name] = functools.partial(train, Nothing, loader, steps, whole, own)
    turns.run(works)
    warm = {name: seconds[10:-1] for name, seconds in turns.seconds.items()}
    return {name: [s / SMALL_STEPS * 1e6 for s in seconds] for name, seconds in warm.items()}


def blocks_of(found: dict[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Return the CPU seconds of every 100 steps of a round."""
    # The first turn is the set-up, the second the first step and the firing before it; the last
    # holds the last step, its firing and the end.
    steps = {name: turns[2:-1] for name, turns in found["seconds"].items()}
    starts = range(0, len(steps[NOTHING]), EVERY)
    return [{n: {"seconds": sum(s[i : i + EVERY])} for n, s in steps.items()} for i in starts]


def show(rounds: list[dict[str, Any]]) -> float:
    """Print ratios and what they are made of; return the seconds of a step."""
    blocks = [block for found in rounds for block in blocks_of(found)]
    steps = [statistics.median(found["seconds"][NOTHING][2:-1]) for found in rounds]
    print(f"a training step without monitors: {statistics.median(steps) * 1e3:.0f} ms of CPU time")
    for name in blocks[0]:
        print(f"  {name:18} {compared(blocks, name, NOTHING)} x over {len(blocks)} blocks")
    print("once in a run, in training steps: set-up and first firing; last firing and end")
    for name in blocks[0]:
        turns = [found["seconds"][name] for found in rounds]
        start = share_of([sum(t[:2]) for t in turns], steps).median - 1
        end = share_of([t[-1] for t in turns], steps).median - 1
        print(f"  {name:18} {start:5.1f} {end:5.1f}")
    print("a firing between the first and the last, in % of 100 training steps")
    for name, known in rounds[0]["firings"].items():
        if known:
            costs = [statistics.mean(list(f["firings"][name].values())[1:-1]) for f in rounds]
            print(f"  {name:45} {share_of(costs, steps)}")
    judge(blocks, [p for p in PROMISES if p.case in blocks[0]])
    return statistics.median(steps)


def share_of(seconds: list[float], steps: list[float]) -> Ratio:
    """Return how many training steps something takes, each in its own round."""
    return ratio_of([s / step for s, step in zip(seconds, steps, strict=True)])


def show_idle(small: list[dict[str, list[float]]], step: float) -> None:
    """Print what an idle monitor costs a step."""
    median = [{name: statistics.median(turns) for name, turns in s.items()} for s in small]
    print(f"a step that costs nothing: {statistics.median(m[NOTHING] for m in median):.0f} us")
    over = {n: ratio_of([m[n] - m[NOTHING] for m in median]) for n in (EMPTY, IDLE)}
    own = ratio_of([m[IDLE] - m[EMPTY] for m in median])
    for name, found in over.items():
        print(f"  {name} beyond nothing: {microseconds(found)} a step")
    said = verdict(own.median, IDLE_MICROSECONDS)
    print(f"  {IDLE} beyond {EMPTY}: {microseconds(own)} a step, {said}")
    share = over[IDLE].median / 1e6 / step
    print(f"  {IDLE} beyond nothing, share of the step above: {share:.3%},", end=" ")
    print(verdict(share, IDLE_SHARE))


def microseconds(found: Ratio) -> str:
    """Return a median and its interval in words."""
    return f"{found.median:.1f} us ({found.low:.1f} to {found.high:.1f})"


def round_of(names: list[str], blocks: int, logger: str) -> dict[str, Any]:
    """Return all that is measured in one process."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        return {**language(blocks, names, logger, folder), "small": nothing(folder)}


def main() -> None:
    """Measure in fresh processes with one thread, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="processes")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of 100 steps in each")
    parser.add_argument("--logger", choices=("csv", "tensorboard", "wandb", "none"), default="csv")
    parser.add_argument("--cases", nargs="*", choices=KINDS, default=[THREE, INFLUENCE])
    parser.add_argument("--first", type=int, help="measure in this process, from this case on")
    options = parser.parse_args()
    names = list(dict.fromkeys([NOTHING, *options.cases]))
    if options.first is not None:
        first = options.first % len(names)
        turned = [*names[first:], *names[:first]]
        print(json.dumps(round_of(turned, options.blocks, options.logger)))
        return
    commands = [[*sys.argv, "--first", str(i)] for i in range(options.rounds)]
    rounds = [json.loads(fresh(command)[1].splitlines()[-1]) for command in commands]
    print(f"logger: {options.logger}")
    show_idle([found["small"] for found in rounds], show(rounds))


if __name__ == "__main__":
    main()
