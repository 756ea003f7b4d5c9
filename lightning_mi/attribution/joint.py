"""Several inputs at once as one point: what is moved together on one path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .entry import Entry, enter
from .result import Attribution, axes_of
from .several import InputsOf

__all__ = ["Joint", "enter_joint", "parted", "units"]


@dataclass(eq=False, kw_only=True)
class Joint(Entry):
    """A model as a function of several inputs side by side, ``[example, component]``.

    Components are the numbers of float inputs and of the word vectors of ids, one input after the
    other. `Entry.inputs` is the point itself, so methods take it for float inputs.

    Args:
        parts: For each key the entry of that input alone.
    """

    parts: Mapping[str | int, Entry] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[nn.Embedding, ...]:
        """The tables of all inputs."""
        return tuple(table for part in self.parts.values() for table in part.tables)

    def split(self, points: Tensor) -> dict[str | int, Tensor]:
        """Return what belongs to each input, in its own form.

        Args:
            points: ``[point, component]``.

        Returns:
            For each key ``[point, …]``.
        """
        shapes = {key: part.point.shape[1:] for key, part in self.parts.items()}
        pieces = torch.split(points, [shape.numel() for shape in shapes.values()], 1)
        return {
            key: piece.reshape(-1, *shape)
            for (key, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def side_by_side(self, each: Callable[[str | int, Entry], Tensor]) -> Tensor:
        """Return one tensor of what a function says of each input.

        Args:
            each: ``(key, entry of that input)`` to ``[example, …]``.

        Returns:
            ``[example, component]``.
        """
        return torch.cat([each(key, part).flatten(1) for key, part in self.parts.items()], 1)

    def units(self, scores: Tensor, *, whole: bool = False) -> Tensor:
        """Return one score for each number of float inputs and for each token.

        Args:
            scores: ``[example, component]``.
            whole: Whether all components of a token have the score of the whole token.

        Returns:
            ``[example, unit]``.
        """
        pieces = self.split(scores)

        def shown(key: str | int, part: Entry) -> Tensor:
            if not part.is_tokens:
                return pieces[key]
            return pieces[key][..., 0] if whole else pieces[key].sum(-1)

        return self.side_by_side(shown)

    def features(self) -> Tensor:
        """Return the number of the unit to which each component belongs, ``[1, component]``."""
        count = 0
        numbers = []
        for part in self.parts.values():
            own = torch.arange(part.inputs[0].numel()) + count
            count += len(own)
            numbers.append(own.repeat_interleave(part.point[0].numel() // len(own)))
        return torch.cat(numbers)[None]

    def run(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the model's outputs at other points.

        Args:
            points: Any number of stacked copies of the chosen examples, ``[point, component]``.
            rows: Which examples of the batch these are, ``[row]``.

        Returns:
            Outputs, as many as points.
        """
        chosen = rows.repeat(len(points) // len(rows))
        batch = self._batch(chosen)
        with self.narrowed(chosen), ExitStack() as stack:
            for key, piece in self.split(points).items():
                part = self.parts[key]
                if part.is_tokens:
                    stack.enter_context(part.exchanged(part.task.inputs(batch), piece))
                else:
                    batch = part.task.with_inputs(batch, piece.to(part.inputs.dtype))
            return self.task.outputs(self.model, batch)


def enter_joint(model: nn.Module, batch: Any, task: InputsOf, *, graph: bool) -> Joint:
    """Find where the gradient is to be taken, for several inputs at once.

    Args:
        model: The plain module, in evaluation mode, its parameters frozen.
        batch: The user's batch, cloned.
        task: Names the inputs.
        graph: Whether `Entry.outputs` can be differentiated with respect to `Entry.leaves`.

    Returns:
        The entry.

    Raises:
        ArgumentError: If an input cannot be entered, or they differ in their number of examples.
    """
    parts = {key: enter(model, batch, task.of(key), graph=False) for key in task.keys}
    sizes = {key: len(part.inputs) for key, part in parts.items()}
    if len(set(sizes.values())) > 1:
        raise ArgumentError.of(
            "keys", expected="inputs of as many examples", got=sizes, do="Name inputs of one batch."
        )
    first = next(iter(parts.values()))
    point = torch.cat([part.point.flatten(1) for part in parts.values()], 1)
    leaf = point.requires_grad_(graph)
    joint = Joint(model, task, batch, point.detach(), (leaf,), first.outputs, parts=parts)
    if graph:
        joint.outputs = joint.run(leaf, torch.arange(len(point), device=point.device))
    joint.head = first.head
    return joint


def units(entry: Entry, scores: Tensor) -> Tensor:
    """Return scores as they are shown: those of the components of a token are added up.

    Args:
        entry: Where the model was run.
        scores: Shaped like its points.

    Returns:
        Shaped like the inputs; of several inputs ``[example, unit]``.
    """
    if isinstance(entry, Joint):
        return entry.units(scores)
    return scores.sum(-1) if entry.is_tokens else scores


def parted(found: Attribution, entry: Entry) -> Attribution:
    """Add to the scores of several inputs those of each input in its own form.

    Args:
        found: Scores of units, ``[example, unit]``, if there are several inputs.
        entry: Where the model was run.

    Returns:
        The same with ``parts``; as it was where there is one input.
    """
    if not isinstance(entry, Joint):
        return found
    counts = [part.inputs[0].numel() for part in entry.parts.values()]
    pieces = torch.split(found.values, counts, 1)
    keys = list(entry.parts)

    def part_of(key: str | int, values: Tensor) -> Attribution:
        part = entry.parts[key]
        tokens, shape = part.is_tokens, part.inputs.shape
        said = {
            "of": "word embedding" if tokens else "inputs",
            "input": key,
            "together_with": [other for other in keys if other != key],
        }
        return dataclasses.replace(
            found,
            values=values.reshape(shape).to(part.point.dtype),
            axes=axes_of(shape, tokens=tokens, reduced=False),
            ids=part.inputs if tokens else None,
            convention={**found.convention, **said},
        )

    parts = {key: part_of(key, piece) for key, piece in zip(keys, pieces, strict=True)}
    return dataclasses.replace(found, parts=parts)
