"""`intervene`: replace what parts of a model compute by something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...errors import ArgumentError
from ...isolation import untouched, unwrapped
from ...task import Task
from .places import At, Part, Place, Port, as_place
from .ports import ATTENTION, Change, Ports
from .values import Value

__all__ = ["Prepared", "intervene", "prepare"]

Key = TypeVar("Key", bound=Part | At)


@contextmanager
def intervene(
    model: nn.Module,
    replacements: Mapping[Key, Value],
    *,
    task: Task | None = None,
    anatomy: Anatomy | None = None,
    example: Any = None,
    only_while: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Replace what parts of a model compute, as long as the block lasts.

    Heads are replaced before the output projection, so its bias stays. Queries, keys and values
    are those that enter the kernel, after rotary embedding; keys and values count key-value heads.
    What a head then writes is computed with the model's own mask, scale and soft-cap. Values that
    come from a run are taken from the model as it is when the block is entered, once, and kept:
    several replacements do not see each other. Interventions nest; an inner one sees the model as
    the outer one makes it. Gradients flow through whatever is not replaced. A compiled model runs
    uncompiled inside.

    Args:
        model: The user's model; its weights, mode and hooks stay as they are.
        replacements: Parts, or `At` a portion of them, to what is put there: `zero`, `mean`,
            `resample`, `from_run` or `value`.
        task: How the model is called on reference batches; None calls it with the batch.
        anatomy: What the model is made of, where that is known already. Only MLPs, neurons and
            the residual stream need it.
        example: A batch to find the anatomy with; None takes a reference batch, if there is one.
        only_while: Asked in every pass; where it says False, nothing is replaced.

    Yields:
        Nothing: run the model inside.

    Raises:
        ArgumentError: If there is nothing to replace, or a part cannot be replaced.

    Example:
        >>> from lightning_mi.nodes import Head
        >>> from lightning_mi.circuits import intervene, zero
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> x = torch.randn(1, 5, 8)
        >>> with intervene(layer, {Head(0, 1): zero()}):
        ...     without = layer(x)
        >>> bool((layer(x) != without).any())
        True
    """
    made = prepare(model, replacements, task=task, anatomy=anatomy, example=example)
    with made.held(only_while):
        yield


@dataclass(eq=False)
class Prepared:
    """Replacements whose values have been taken and are kept.

    Args:
        ports: The model.
        chosen: Places and what is put there.
        kept: For each the stored value.
    """

    ports: Ports
    chosen: list[tuple[Place, Value]]
    kept: list[Tensor]

    @contextmanager
    def held(self, only_while: Callable[[], bool] | None = None) -> Iterator[None]:
        """Replace, as long as the block lasts.

        Args:
            only_while: See `intervene`.

        Yields:
            Nothing.
        """
        with self.ports.opened(_changes(self.chosen, self.kept, only_while)):
            yield


def prepare(
    model: nn.Module,
    replacements: Mapping[Key, Value],
    *,
    task: Task | None = None,
    anatomy: Anatomy | None = None,
    example: Any = None,
) -> Prepared:
    """Take the values of replacements from the model as it is now.

    Args:
        model: See `intervene`.
        replacements: See there.
        task: See there.
        anatomy: See there.
        example: See there.

    Returns:
        What can be held, once or often.

    Raises:
        ArgumentError: If there is nothing to replace, or a part cannot be replaced.
    """
    plain = unwrapped(model)
    chosen = _checked(replacements)
    batches = {v.key: v.batch for _, v in chosen if v.key}
    own = next(iter(batches.values()), None) if example is None else example
    find = cache(lambda: anatomy or Anatomy.of(plain, own, task=task))
    ports = Ports(plain, task or Task(), find)
    with untouched(model), torch.no_grad():
        if any(p.kind == "residual" for p, _ in chosen):
            ports.find_streams(_example(own))
        kept = _stored(ports, chosen, batches)
    return Prepared(ports, chosen, kept)


def _checked(replacements: Mapping[Key, Value]) -> list[tuple[Place, Value]]:
    for part, own in replacements.items():
        if not isinstance(own, Value):
            raise ArgumentError.of(
                f"replacements[{part}]",
                expected="zero(), mean(…), resample(…), from_run(…) or value(…)",
                got=type(own).__name__,
                do="They are in lightning_mi.circuits.",
            )
    if not replacements:
        raise ArgumentError.of(
            "replacements",
            expected="parts and what is put in their place",
            got="none",
            do="For example {Head(1, 3): zero()}.",
        )
    return [(as_place(part), own) for part, own in replacements.items()]


def _example(example: Any) -> Any:
    if example is None:
        raise ArgumentError.of(
            "example",
            expected="a batch on which the residual stream can be found",
            got="none",
            do="Pass example=batch.",
        )
    return example


def _stored(
    ports: Ports, chosen: list[tuple[Place, Value]], batches: Mapping[str, Any]
) -> list[Tensor]:
    """Run each reference once and return what is kept for each replacement."""
    seen: dict[str, dict[Port, Tensor]] = {}
    for key, batch in batches.items():
        wanted = {place.port for place, own in chosen if own.key == key}
        seen[key] = {}
        with ports.opened({}, seen[key], wanted):
            ports.task.outputs(ports.model, batch)
    return [own.stored(p, seen[own.key].get(p.port) if own.key else None) for p, own in chosen]


def _changes(
    chosen: list[tuple[Place, Value]],
    kept: list[Tensor],
    only_while: Callable[[], bool] | None,
) -> dict[Port, Change]:
    grouped: dict[Port, list[tuple[Place, Value, Tensor]]] = defaultdict(list)
    for (place, own), stored in zip(chosen, kept, strict=True):
        grouped[place.port].append((place, own, stored))

    def change(entries: list[tuple[Place, Value, Tensor]]) -> Change:
        def apply(values: Tensor) -> Tensor:
            if only_while is not None and not only_while():
                return values
            made = values
            for place, own, stored in entries:
                part = place.taken(values)
                made = place.put(made, own.given(stored.to(values.device), part, place))
            return made

        indices = tuple(place.index for place, *_ in entries if place.index is not None)
        whole = entries[0][0].kind not in ATTENTION
        return Change(apply, None if whole else indices)

    return {port: change(entries) for port, entries in grouped.items()}
