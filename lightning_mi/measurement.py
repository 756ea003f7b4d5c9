"""What to measure at one state of the model: `Measurement`, its `Context`, and `measure`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from .batch import cloned, fingerprint, main_input, moved, tree_map
from .beneath import with_inputs
from .errors import ArgumentError
from .inferring import infer_task
from .isolation import untouched
from .record import Panel, Reading, Record, plain
from .target import Target, TargetLike, as_target
from .task import Task

__all__ = ["Context", "IndexedData", "Measurement", "describe", "measure"]

T = TypeVar("T")


@runtime_checkable
class Measurement(Protocol):
    """A pure description of what to measure at one state of a model.

    Usually a frozen dataclass. It never knows when it runs, where the result goes, or how it is
    drawn, so the same object serves during training, over checkpoints and in a notebook. It runs
    inside `untouched`: in evaluation mode, with gradients available, on one device.
    """

    @property
    def name(self) -> str:
        """First part of the names of its records; two of one name cannot share a run."""

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task, moment and shared results.

        Returns:
            Short names to panels.
        """


class IndexedData:
    """Training examples addressed by dataset index, whatever the loader's order.

    Args:
        dataset: A map-style dataset.
        collate: Makes a batch of a list of examples; None takes torch's default.

    Raises:
        ArgumentError: If the dataset cannot be indexed.

    Example:
        >>> data = IndexedData(torch.utils.data.TensorDataset(torch.arange(4.0)))
        >>> data.batch([2, 0])
        [tensor([2., 0.])]
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None = None) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ArgumentError.of(
                "dataset",
                expected="a map-style dataset with __getitem__ and __len__",
                got=f"a {type(dataset).__name__}",
                do="Influence names training examples by index, which a stream does not have.",
            )
        self.dataset = dataset
        self.collate = collate or torch.utils.data.default_collate

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Any:
        """Return the examples as one batch.

        Args:
            indices: Dataset indices.

        Returns:
            The collated batch, on the CPU.
        """
        return self.collate([self.dataset[int(i)] for i in indices])

    def describe(self, index: int) -> str:
        """Return the dataset's own words about an example, if it has a ``describe`` method.

        Args:
            index: Dataset index.

        Returns:
            The words, or ``train[index]``.
        """
        own = getattr(self.dataset, "describe", None)
        return str(own(index)) if callable(own) else f"train[{index:,}]"


class Context:
    """What a measurement is handed.

    Args:
        model: The model that is measured; used to infer the task where none is given.
        batch: The measured batch, on the model's device.
        task: The user's task; None is inferred when it is first asked for.
        step: Optimizer steps taken.
        epoch: Epochs done.
        samples: Training examples seen, None where unknown.
        tokens: Training tokens seen, None where unknown.
        dataset: The training examples by index.
        learning_rates: Learning rate in force at the last step, by parameter name.
        decode: Token ids to one piece of text each.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any = None,
        task: Task | None = None,
        *,
        step: int = 0,
        epoch: int = 0,
        samples: int | None = None,
        tokens: int | None = None,
        dataset: IndexedData | None = None,
        learning_rates: Mapping[str, float] | None = None,
        decode: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> None:
        self.step, self.epoch = step, epoch
        self.samples, self.tokens = samples, tokens
        self.dataset = dataset
        self.learning_rates = dict(learning_rates or {})
        self.decode = decode
        self._model, self._batch, self._task = model, _usable(batch), task
        self._memo: dict[Hashable, Any] = {}

    @property
    def has_batch(self) -> bool:
        """Whether a batch was given."""
        return self._batch is not None

    @property
    def batch(self) -> Any:
        """The measured batch.

        Raises:
            ArgumentError: If none was given.
        """
        if self._batch is None:
            raise ArgumentError.of(
                "batch",
                expected="a batch to measure on",
                got="none",
                do="Pass batch=(inputs, labels) or whatever the model's own loader delivers.",
            )
        return self._batch

    @property
    def task(self) -> Task:
        """The user's task, or the one inferred from the batch and one forward pass."""
        if self._task is None:
            self._task = infer_task(self._model, self.batch)
        return self._task

    @property
    def known_task(self) -> Task | None:
        """The task if it was given or has been inferred already; None before."""
        return self._task

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what was computed under this key in this firing, computing it the first time.

        Args:
            key: Names the result among all measurements; start it with the name of your module.
            compute: Called at most once.

        Returns:
            The result. Do not change it: others read it too.
        """
        if key not in self._memo:
            self._memo[key] = compute()
        result: T = self._memo[key]
        return result

    def outputs(self, model: nn.Module) -> Tensor:
        """Return the model's outputs on the batch, without gradients, computed once a firing.

        Args:
            model: The model.

        Returns:
            What the task's ``outputs`` returns.
        """

        def run() -> Tensor:
            with torch.no_grad():
                return self.task.outputs(model, self.batch)

        return self.shared("outputs", run)

    def target(self, target: TargetLike = None) -> Target:
        """Return a target that knows this context's task.

        Args:
            target: Anything that `as_target` accepts.

        Returns:
            The target.
        """
        return as_target(target, self.task)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return one piece of text for each token id, or the ids themselves as text.

        Args:
            ids: Token ids.

        Returns:
            As many texts.
        """
        if self.decode is None:
            return [str(int(i)) for i in ids]
        return self.decode([int(i) for i in ids])


def measure(
    model: nn.Module,
    measurements: Measurement | Sequence[Measurement],
    *,
    batch: Any = None,
    task: Task | None = None,
    step: int = 0,
    context: Context | None = None,
    source: str = "live",
    weights: str = "current",
    inside: Callable[[], AbstractContextManager[Any]] | None = None,
    excuse: Callable[[str, Exception], None] | None = None,
) -> list[Record]:
    """Take measurements at one state of a model, leaving it exactly as it was.

    Args:
        model: The user's model, in any mode, on any device.
        measurements: What to measure. They share forward passes.
        batch: What to measure on, on the model's device.
        task: How the batch becomes outputs and losses; None is inferred.
        step: Written into the records.
        context: Replaces ``batch``, ``task`` and ``step`` where more is known.
        source: Written into the records.
        weights: Written into the records.
        inside: Makes a context to measure in, for example a Trainer's autocast; None measures in
            the precision of the parameters.
        excuse: Told the name of a measurement that failed, and why, so that what the others found
            is kept. None raises instead.

    Returns:
        One record for each panel.

    Raises:
        ArgumentError: If two measurements have one name, batch and model are on two devices, or a
            measurement returns no panels.

    Example:
        >>> from lightning_mi.attribution import Saliency
        >>> model = nn.Linear(2, 3)
        >>> records = measure(model, Saliency(), batch=(torch.ones(1, 2), torch.tensor([0])))
        >>> records[0].name
        'saliency/values'
    """
    chosen = as_list(measurements)
    check_names(chosen)
    with untouched(model) as quiet, nullcontext() if inside is None else inside():
        if context is None:
            context = Context(quiet, batch, task, step=step)
        if context.has_batch:
            inputs = main_input(context.batch)
            check_device(
                quiet, inputs, "batch", "Move the batch; the monitors do so by themselves."
            )
        readings = []
        for m in chosen:
            try:
                readings.append((m, with_inputs(_checked(m, m(quiet, context)), quiet, context)))
            except Exception as error:
                if excuse is None:
                    raise
                excuse(m.name, error)
    recipes = {m.name: describe(m) for m in chosen}
    return [
        Record(
            name=f"{m.name}/{what}",
            panel=panel,
            step=context.step,
            epoch=context.epoch,
            samples=context.samples,
            tokens=context.tokens,
            weights=weights,
            source=source,
            made_by=recipes[m.name],
        )
        for m, reading in readings
        for what, panel in reading.items()
    ]


def _checked(measurement: Measurement, reading: Any) -> Reading:
    """Refuse what a measurement of the user's own may return by mistake."""
    entries = reading.items() if isinstance(reading, Mapping) else ()
    wrong = [name for name, panel in entries if not isinstance(panel, Panel)]
    if not isinstance(reading, Mapping) or wrong:
        kind = type(reading[wrong[0]] if wrong else reading).__name__
        raise ArgumentError.of(
            f"measurement {measurement.name!r}",
            expected="a mapping of names to Panels to be returned",
            got=f"a {kind} for {wrong[0]!r}" if wrong else f"a {kind}",
            do='Return for example {"mean": Panel(values.mean())}.',
        )
    return reading


def as_list(measurements: Measurement | Iterable[Measurement]) -> list[Measurement]:
    """Return one measurement, or several, as a list.

    Args:
        measurements: One or several.

    Returns:
        The list.

    Raises:
        ArgumentError: If one is no measurement, or its class instead of an instance.
    """
    single = isinstance(measurements, Measurement) or not isinstance(measurements, Iterable)
    chosen: list[Any] = [measurements] if single else list(measurements)  # type: ignore[arg-type]
    for m in chosen:
        if isinstance(m, type) or not isinstance(m, Measurement):
            raise ArgumentError.of(
                "measurements",
                expected="measurements, with a name and callable with (model, context)",
                got=f"the class {m.__name__}" if isinstance(m, type) else f"a {type(m).__name__}",
                do="Pass for example Saliency(), with brackets.",
            )
    return chosen


def check_names(measurements: Iterable[Measurement]) -> None:
    """Refuse two measurements of one name.

    Args:
        measurements: What is to share a run.

    Raises:
        ArgumentError: If two have one name.
    """
    seen: set[str] = set()
    for m in measurements:
        if m.name in seen or "/" in m.name:
            raise ArgumentError.of(
                "measurements",
                expected="a distinct name without a slash for each",
                got=f"{m.name!r}" + (" twice" if m.name in seen else ""),
                do=f"Pass {type(m).__name__}(name='…').",
            )
        seen.add(m.name)


def at_home(model: nn.Module, batch: Any) -> Any:
    """Return a batch on the model's device, its floats in the precision of the weights.

    Args:
        model: The model.
        batch: Any batch, or None.

    Returns:
        The batch; tensors that are right already are not copied.
    """
    home = next(model.parameters(), torch.empty(0))
    return None if batch is None else moved(batch, home.device, home.dtype)


def describe(thing: Any) -> Any:
    """Return a recipe as JSON: class path and arguments, the form that a YAML file would have.

    Args:
        thing: A measurement, or anything that may stand in one.

    Returns:
        Plain JSON; tensors and arrays by fingerprint, a dataset by class and length (fetching its
        examples might change its state), functions by name, never an address.

    Example:
        >>> describe(torch.ones(2))["shape"]
        [2]
    """
    if isinstance(thing, Enum):
        return thing.name
    if thing is None or isinstance(thing, bool | int | float | str | np.generic):
        return plain(thing)
    if isinstance(thing, torch.device | torch.dtype | PurePath | timedelta):
        return str(thing)
    if isinstance(thing, np.ndarray):
        thing = torch.as_tensor(thing) if thing.dtype.kind in "biuf" else thing.tolist()
    if isinstance(thing, Tensor):
        return {"tensor": fingerprint(thing), "shape": list(thing.shape), "dtype": str(thing.dtype)}
    if isinstance(thing, Mapping):
        return {str(k): describe(v) for k, v in thing.items()}
    if isinstance(thing, set | frozenset):
        return sorted((describe(v) for v in thing), key=repr)
    if isinstance(thing, list | tuple | range):
        return [describe(v) for v in thing]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        arguments = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        init = {f.name for f in dataclasses.fields(thing) if f.init}
        return {
            "class_path": _path(type(thing)),
            "init_args": {k: v for k, v in arguments.items() if k in init and v is not None},
        }
    if isinstance(thing, Task):
        return {"class_path": _path(type(thing)), "init_args": describe(vars(thing))}
    if callable(thing) and hasattr(thing, "__qualname__"):
        return {"function": _path(thing)}
    size = {"length": len(thing)} if hasattr(thing, "__len__") else {}
    return {"class_path": _path(type(thing)), **size}


def _usable(batch: Any) -> Any:
    """Replace tensors made in inference mode, which no gradient can pass."""
    found = False

    def check(value: Any) -> Any:
        nonlocal found
        found = found or (isinstance(value, Tensor) and value.is_inference())
        return value

    tree_map(check, batch)
    return cloned(batch) if found else batch


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def check_device(model: nn.Module, inputs: Tensor, argument: str, do: str) -> None:
    """Refuse inputs that lie on another device than the model.

    Args:
        model: The model.
        inputs: The inputs.
        argument: What the user called them.
        do: What the user can do.

    Raises:
        ArgumentError: If the devices differ.
    """
    home = next((p.device for p in model.parameters()), inputs.device)
    if inputs.device != home:
        raise ArgumentError.of(
            argument,
            expected=f"tensors on the model's device, {home}",
            got=str(inputs.device),
            do=do,
        )
