"""The same measurements over saved checkpoints: `sweep`."""

from __future__ import annotations

import copy
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .comparison import agreement
from .errors import ArgumentError, ModelError
from .isolation import unwrapped
from .measurement import (
    Context,
    IndexedData,
    Measurement,
    as_list,
    at_home,
    check_names,
    measure,
)
from .progress import track
from .record import Record
from .runs import Run
from .task import Task

__all__ = ["Checkpoint", "STATE_MARK", "find_checkpoints", "sweep"]

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")

STATE_MARK = "lightning_mi"
"""Key by which the state of our callbacks is known in a checkpoint."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a sweep needs of one checkpoint.

    Args:
        step: Optimizer steps taken.
        epoch: Epochs done.
        weights: Parameters and buffers by name.
        samples: Training examples seen, None where no monitor counted them.
        tokens: Training tokens seen, likewise.
        learning_rates: In force at the last step, by parameter name.
    """

    step: int
    epoch: int
    weights: Mapping[str, Tensor]
    samples: int | None = None
    tokens: int | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, weights: str = "current", weights_only: bool = True
    ) -> Checkpoint:
        """Read a checkpoint that Lightning or ``torch.save`` wrote.

        A file without ``global_step`` takes its step from the name: the number after ``step``,
        else the last number.

        Args:
            path: The file.
            weights: ``"current"`` or ``"average"``, where weight averaging saved both.
            weights_only: Refuse to run code from the file. Pass False for a file you trust.

        Returns:
            The checkpoint, on the CPU.

        Raises:
            ArgumentError: If it cannot be read, or holds no weights.
        """
        return cls.of(content_of(path, weights_only=weights_only), path, weights=weights)

    @classmethod
    def of(
        cls,
        content: Mapping[str, Any],
        path: str | os.PathLike[str],
        *,
        weights: str = "current",
    ) -> Checkpoint:
        """Take it from the content of a file that was read already.

        Args:
            content: What `content_of` returned.
            path: The file.
            weights: As in `load`.

        Returns:
            The checkpoint.

        Raises:
            ArgumentError: If it holds no weights.
        """
        state = _monitor_state(content)
        return cls(
            step=_step(content, Path(path)),
            epoch=int(content.get("epoch", 0)),
            weights=_weights(content, weights, Path(path)),
            samples=state.get("samples"),
            tokens=state.get("tokens"),
            learning_rates=state.get("learning_rates") or _kept_rates(content),
        )


def content_of(
    path: str | os.PathLike[str], *, weights_only: bool = True, mapped: bool = False
) -> Mapping[str, Any]:
    """Return all that a checkpoint holds, its optimizer states for example.

    Args:
        path: The file.
        weights_only: Refuse to run code from the file.
        mapped: Read tensors when they are looked at, and not before; the file has to stay as it is
            for so long.

    Returns:
        The content, on the CPU.

    Raises:
        ArgumentError: If it cannot be read, or is no mapping.
    """
    mapped = mapped and zipfile.is_zipfile(path)  # torch.save once wrote another format.
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ArgumentError.of(
            "checkpoints",
            expected="files that hold tensors and built-in types",
            got=f"{os.fspath(path)!r} with python objects ({str(error)[:80]}…)",
            do="Pass weights_only=False if you trust where it came from.",
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ArgumentError.of(
            "checkpoints",
            expected="whole files that torch.save or Lightning wrote",
            got=f"{os.fspath(path)!r} ({str(error)[:80]})",
            do="Leave it out, or save it again.",
        ) from error
    if not isinstance(content, Mapping):
        raise ArgumentError.of(
            "checkpoints",
            expected="a mapping with the key state_dict",
            got=f"a {type(content).__name__} in {os.fspath(path)!r}",
            do="Save with trainer.save_checkpoint or torch.save(model.state_dict()).",
        )
    return content


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, without reading its tensors.

    Args:
        path: The file.

    Returns:
        Optimizer steps taken.

    Raises:
        ArgumentError: If it cannot be read, or holds no weights.
    """
    return Checkpoint.of(content_of(path, mapped=True), path).step


def find_checkpoints(checkpoints: str | os.PathLike[str] | Sequence[Any]) -> list[Path]:
    """Return checkpoint files, in order of the numbers in their names.

    Args:
        checkpoints: A folder, a file, or a list of files.

    Returns:
        Paths; ``step=2.ckpt`` comes before ``step=10.ckpt``.

    Raises:
        ArgumentError: If there is none, or one is missing.
    """
    if isinstance(checkpoints, str | os.PathLike):
        path = Path(checkpoints)
        found = sorted(path.glob("*.ckpt"), key=_order) if path.is_dir() else [path]
    else:
        found = [Path(p) for p in checkpoints]
    missing = [str(p) for p in found if not p.is_file()]
    if missing or not found:
        raise ArgumentError.of(
            "checkpoints",
            expected="a folder with .ckpt files, or a list of existing files",
            got=", ".join(missing) or f"none in {str(checkpoints)!r}",
            do="ScheduledCheckpoint saves them during training.",
        )
    return found


def sweep(
    checkpoints: str | os.PathLike[str] | Sequence[Any],
    model: nn.Module,
    measurements: Measurement | Sequence[Measurement],
    *,
    batch: Any = None,
    task: Task | None = None,
    run: Run | str | os.PathLike[str] | None = None,
    dataset: Any = None,
    weights: str = "current",
    weights_only: bool = True,
    decode: Callable[[Sequence[int]], list[str]] | None = None,
    logger: Any = None,
) -> Run:
    """Take measurements at every checkpoint, on a deep copy of the model.

    A record taken here is bit-equal to the one that a monitor took at that step during training.
    What fails at the first checkpoint is an error; what fails at a later one, as a circuit does
    that cannot be read from weights that are no numbers any more, is left out with a warning.

    Args:
        checkpoints: A folder, or a list of files.
        model: A model of the same architecture; it is not changed.
        measurements: What to measure.
        batch: What to measure on; None takes the batch that the run's monitors measured on.
        task: How the batch becomes outputs and losses; None is inferred.
        run: Where the records go: a run, or a folder. None takes the run that was recorded while
            the checkpoints were saved (``../mi``), else makes ``mi`` beside them.
        dataset: Training examples by index (a dataset or `IndexedData`), for influence.
        weights: ``"current"`` or ``"average"`` under weight averaging.
        weights_only: Refuse to run code from the files.
        decode: Token ids to one piece of text each.
        logger: A Lightning logger, or several, that also get the records: of a run's own logger
            only those that it does not hold already. Closing it is left to you.

    Returns:
        The run; the new records have the source ``"sweep"``.

    Raises:
        ArgumentError: If checkpoints, weights or measurements do not fit.
    """
    # Here, because the import of the package must stay light.
    from .attribution.drifting import drift_series, is_attribution
    from .influence import RankingChange, tracin_sum
    from .sinks import send_swept, sinks_for

    paths = find_checkpoints(checkpoints)
    chosen = as_list(measurements)
    check_names(chosen)
    if weights not in ("current", "average"):
        raise ArgumentError.of(
            "weights", expected='"current" or "average"', got=repr(weights), do="Choose one."
        )
    target = run if isinstance(run, Run) else Run(_folder(paths) if run is None else run)
    batch = target.batch() if batch is None else batch
    copied = copy.deepcopy(unwrapped(model))
    data = dataset if dataset is None or isinstance(dataset, IndexedData) else IndexedData(dataset)
    written: set[tuple[str, int]] = set()

    def keep(records: Sequence[Record]) -> None:
        target.write_all(records)
        written.update((r.name, r.step) for r in records)

    failed: dict[str, list[tuple[int, Exception]]] = {}

    for path in track(paths, "sweeping checkpoints"):
        state = Checkpoint.load(path, weights=weights, weights_only=weights_only)
        load_weights(copied, state.weights, path)
        context = Context(
            copied,
            at_home(copied, batch),
            task,
            step=state.step,
            epoch=state.epoch,
            samples=state.samples,
            tokens=state.tokens,
            dataset=data,
            learning_rates=state.learning_rates,
            decode=decode,
        )

        def excuse(name: str, error: Exception, step: int = state.step) -> None:
            failed.setdefault(name, []).append((step, error))

        records = measure(
            copied,
            chosen,
            context=context,
            source="sweep",
            weights=weights,
            excuse=None if path == paths[0] else excuse,
        )
        if not (target.path / "run.json").exists():  # nothing is left behind by a refusal
            target = Run.create(target.path)
        keep([*records, *agreement(records)])
    _tell(failed)
    seen = {name for name, _ in written}
    keep(tracin_sum(_comparable(target.records("influence/scores"))))
    # Every reading goes through the whole file of records: only those that there are.
    for name in (m.name for m in chosen if f"{m.name}/scores" in seen):
        keep(RankingChange(name)(target.records(f"{name}/scores", source="sweep")))
    values = [f"{m.name}/values" for m in chosen if f"{m.name}/values" in seen]
    swept = (r for name in values for r in target.records(name, source="sweep"))
    keep(drift_series([r for r in swept if is_attribution(r)]))
    loggers = logger if isinstance(logger, list | tuple) else [logger]
    send_swept(target, sinks_for([one for one in loggers if one is not None]), written)
    return target


def _tell(failed: Mapping[str, Sequence[tuple[int, Exception]]]) -> None:
    for name, cases in failed.items():
        _, error = cases[0]
        steps = ", ".join(str(step) for step, _ in cases)
        warnings.warn(
            f"sweep: {name!r} was not measured at step {steps} ({type(error).__name__}: {error}). "
            "All else is in the run.",
            UserWarning,
            stacklevel=3,
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a model, seeing through prefixes of wrappers.

    Args:
        model: The model that is changed.
        weights: Parameters and buffers by name.
        path: Where they came from, for the message.

    Raises:
        ModelError: If names or shapes do not fit.
    """
    plain: Mapping[str, Tensor] = {_plain_name(n): value for n, value in weights.items()}
    wanted = {_plain_name(name): name for name in model.state_dict()}
    if not wanted.keys() <= plain.keys():
        plain = _behind_prefix(plain, set(wanted), path)
    try:
        model.load_state_dict({wanted.get(name, name): value for name, value in plain.items()})
    except RuntimeError as error:
        raise ModelError(
            f"model: expected the architecture saved in {path.name!r}, got {str(error)[:300]}. "
            "Build the model with the arguments that it was trained with."
        ) from error


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _behind_prefix(
    weights: Mapping[str, Tensor], wanted: set[str], path: Path
) -> Mapping[str, Tensor]:
    """Return what a LightningModule saved of the bare network in it, behind one prefix."""
    first = min(wanted, default="")
    prefixes = [n[: -len(first)] for n in weights if first and n.endswith("." + first)]
    parts = {p: {n[len(p) :]: v for n, v in weights.items() if n.startswith(p)} for p in prefixes}
    fitting = {prefix: part for prefix, part in parts.items() if wanted <= set(part)}
    if len(fitting) > 1:
        raise ModelError(
            f"model: expected one network of this architecture in {path.name!r}, got "
            f"{sorted(fitting)}. Pass the whole LightningModule, with task=…(module=…) naming one."
        )
    return next(iter(fitting.values()), weights)


def _folder(paths: list[Path]) -> Path:
    """Return the run that was recorded while these checkpoints were saved, else a new place."""
    neighbour = paths[0].parent.parent / "mi"
    recorded = (neighbour / "records.jsonl").exists()
    return neighbour if recorded else paths[0].parent / "mi"


def _comparable(scores: Sequence[Record]) -> list[Record]:
    """Keep swept scores of the steps that were measured live, if any were: sums then compare."""
    live = {r.step for r in scores if r.source == "live"}
    return [r for r in scores if r.source == "sweep" and (not live or r.step in live)]


def _order(path: Path) -> tuple[list[int], str]:
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    return [int(d) for d in digits], path.name


def _monitor_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    callbacks = content.get("callbacks", {})
    states = (s for s in callbacks.values() if isinstance(s, Mapping) and STATE_MARK in s)
    return next(states, {})


def _kept_rates(content: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the rates that ScheduledCheckpoint kept where no monitor did."""
    states = content.get("callbacks", {}).items()
    kept = (
        s.get("learning_rates")
        for key, s in states
        if str(key).startswith("ScheduledCheckpoint") and isinstance(s, Mapping)
    )
    return next((rates for rates in kept if rates), {})


def _step(content: Mapping[str, Any], path: Path) -> int:
    if "global_step" in content:
        return int(content["global_step"])
    named = re.findall(r"step\D?(\d+)", path.stem) or re.findall(r"\d+", path.stem)
    return int(named[-1]) if named else 0


def _weights(content: Mapping[str, Any], which: str, path: Path) -> Mapping[str, Tensor]:
    # Under weight averaging Lightning saves the average under the usual key, and both names.
    averages = "current_model_state" in content
    if which == "average" and not averages:
        raise ArgumentError.of(
            "weights",
            expected="a checkpoint that weight averaging saved",
            got=f"none in {os.fspath(path)!r}",
            do='Take weights="current".',
        )
    if which == "current" and averages:
        found: Any = content["current_model_state"]
    else:
        found = next((content[k] for k in WEIGHT_KEYS if k in content), content)
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ArgumentError.of(
            "checkpoints",
            expected="a mapping with the key state_dict",
            got=f"the keys {list(map(str, content))[:8]} in {os.fspath(path)!r}",
            do="Save with trainer.save_checkpoint or torch.save(model.state_dict()).",
        )
    return tensors
