"""What a monitor asks a Trainer and a model about themselves."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, pieces
from ..emergence import head_onsets, one_source
from ..errors import ArgumentError, LightningMIError, RunError
from ..measurement import IndexedData
from ..record import Record
from ._base import Trainer, class_names

__all__ = [
    "averages_weights",
    "check_writable",
    "facts",
    "is_last",
    "outcome",
    "piecewise",
    "planned_steps",
    "refuse_sharded",
    "say",
    "training_data",
]


SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


def refuse_sharded(trainer: Trainer, do: str) -> None:
    """Refuse a strategy that keeps a part of the model in each process.

    Args:
        trainer: The Trainer.
        do: What to do instead, a sentence.

    Raises:
        LightningMIError: If the strategy shards the model.
    """
    sharded = class_names(trainer.strategy) & SHARDED
    if sharded:
        raise LightningMIError(
            f"strategy: expected a strategy that keeps the whole model in each process, got "
            f"{sharded.pop()}. {do}"
        )


def facts(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """Return what the report says about a run as a whole.

    Args:
        trainer: The Trainer.
        model: The user's model.

    Returns:
        Plain JSON.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "name": _name(trainer, model),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": str(getattr(datamodule, "description", "")),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "versions": {
            "lightning_mi": __version__,
            "torch": torch.__version__,
            "lightning": _version(type(trainer)),
        },
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }


def outcome(records: Sequence[Record]) -> dict[str, float]:
    """Return how the roles of heads came out, for the loggers' summary.

    Args:
        records: Records of one run and one source.

    Returns:
        For ``induction`` and ``prev_token``, where they were measured: ``…_onset``, the step at
        which the first head formed, only where one may be claimed; ``…_final`` and ``…_best``, the
        last defined and the largest value of the best head.
    """
    found: dict[str, float] = {}
    for score, key in (("induction", "induction"), ("previous_token", "prev_token")):
        steps = [h.onset.step for h in head_onsets(records, score) if h.onset.step is not None]
        if steps:
            found[f"{key}_onset"] = min(steps)
        curve = one_source(r for r in records if r.name == f"head_scores/{score}")
        finite = [r.panel.values[r.panel.values.isfinite()] for r in curve]
        best = [float(values.max()) for values in finite if values.numel()]
        if best:
            found[f"{key}_final"], found[f"{key}_best"] = best[-1], max(best)
    return found


def planned_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps training will take, or None where that is open.

    ``trainer.estimated_stepping_batches`` would set the loaders up a second time.

    Args:
        trainer: A Trainer whose loaders are set up.

    Returns:
        The smaller of what ``max_steps`` and ``max_epochs`` allow.
    """
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and math.isfinite(batches):
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        limits.append(steps * int(trainer.max_epochs or 0))
    return min(limits) if limits else None


def piecewise(tokenizer: Any) -> Callable[[Sequence[int]], list[str]] | None:
    """Return a function from token ids to one piece of text each.

    Args:
        tokenizer: Anything with ``decode(list of ids) -> str``, a function like that, or None.

    Returns:
        The function, or None.

    Raises:
        ArgumentError: If it cannot decode.
    """
    if tokenizer is None:
        return None
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        raise ArgumentError.of(
            "tokenizer",
            expected="an object with decode(list of ids) -> str, or a function like that",
            got=f"a {type(tokenizer).__name__}",
            do="Load it first, for example AutoTokenizer.from_pretrained(…).",
        )
    return pieces.piecewise(tokenizer)


def training_data(trainer: Trainer) -> IndexedData | None:
    """Return the training examples by index, without touching the loader's iterator.

    Args:
        trainer: A Trainer whose loaders are set up.

    Returns:
        The examples of the first training loader, or None if there is none.
    """
    loader: Any = trainer.train_dataloader
    while isinstance(loader, Mapping | list | tuple) and len(loader):
        loader = next(iter(loader.values())) if isinstance(loader, Mapping) else loader[0]
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    return IndexedData(dataset, getattr(loader, "collate_fn", None))


def say(trainer: Trainer, text: str) -> None:
    """Say something once, as Lightning says its own messages.

    Args:
        trainer: The Trainer.
        text: One line.
    """
    if trainer.is_global_zero:
        # A child of the Trainer's own logger, so that it is shown like them.
        logging.getLogger(type(trainer).__module__).info(text)


def averages_weights(trainer: Trainer) -> bool:
    """Say whether a callback averages weights.

    Args:
        trainer: The Trainer.

    Returns:
        Whether, at the very end of training, the model may hold averaged weights.
    """
    names = {"WeightAveraging", "StochasticWeightAveraging"}
    return any(names & class_names(c) for c in trainer.callbacks)  # type: ignore[attr-defined]


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before training starts.

    Args:
        folder: The run folder to be.

    Raises:
        RunError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"dirpath: expected a folder that can be written, got {str(folder)!r} "
            f"({error.strerror or error}). Choose another with dirpath=… or the Trainer's "
            "default_root_dir."
        ) from error


def is_last(trainer: Trainer) -> bool:
    """Say, at the end of an epoch, whether training ends here.

    Args:
        trainer: The Trainer.

    Returns:
        Whether no further epoch will start.
    """
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    epochs = trainer.max_epochs not in (None, -1) and (
        trainer.current_epoch + 1 >= trainer.max_epochs
    )
    return bool(steps or epochs or trainer.should_stop)


def _name(trainer: Trainer, model: nn.Module) -> str:
    names = (getattr(logger, "name", None) for logger in trainer.loggers)
    return next((str(n) for n in names if n), type(model).__name__)


def _version(cls: type) -> str:
    """Return the version of the package that a class comes from."""
    package = sys.modules[cls.__module__.split(".")[0]]
    return f"{package.__name__} {getattr(package, '__version__', '')}"
