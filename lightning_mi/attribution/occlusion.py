"""Occlusion: what a target loses when a part of the input is replaced (Zeiler & Fergus 2014)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..batch import attention_mask_of
from ..errors import ArgumentError
from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Baseline, Keep, baseline_point
from .copies import Copies
from .entry import Entry
from .gradients import attributed
from .measured import Attributed
from .question import widened
from .result import Attribution, channel_axis

__all__ = ["Occlusion", "Window", "occlusion"]

Window: TypeAlias = int | Sequence[int] | None
"""A side for all axes, a side for each, or None for the default."""


def occlusion(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    window: Window = None,
    stride: Window = None,
    baseline: Baseline = None,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return F(x) − F(x with a window replaced), averaged over the windows that cover an input.

    A window slides over pixels, positions or features; what it covers becomes the baseline. Of
    images and of ``[example, position, channel]`` it takes all channels, unless it has a side for
    the channels too. Of token ids it replaces word embeddings, by default by the zero vector;
    padding is not counted, so each example has the windows that it would have alone.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`. Classes and tokens are settled at the whole inputs.
        window: Sides of the window, one for all axes or one for each: ``(height, width)`` or
            ``(channels, height, width)``. None: 1 token, 1 feature, a quarter of each side of an
            image.
        stride: Steps between windows, of the same form, at most the window's side. None: half of
            each side. The last window ends with the input and may be smaller.
        baseline: What takes the place, as in `integrated_gradients`: zero, a number, a tensor;
            for ids the zero vector, an id (padding, mask) or ids, vectors.
        keep: Tokens that are never replaced, and so score 0: ids, or a boolean mask.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores in units of the target, positive where an input raises it, shaped like the inputs;
        without the channel axis where windows take all channels.

    Raises:
        ArgumentError: If an argument cannot be used: a window larger than the inputs, a stride
            larger than the window.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)
        >>> scores = occlusion(model, torch.tensor([[1.0, -2.0]]), target=1)
        >>> torch.allclose(scores.values.sum(1), scores.target)
        True
    """
    with asking(model, inputs, target, task, graph=False) as (entry, question):
        start = baseline_point(entry, baseline, keep)
        grid = _grid(entry, window, stride)
        copies = Copies(entry, question, grid.count)
        with torch.no_grad():
            scores = _averaged(copies, start, grid)
        axis = None if entry.is_tokens else channel_axis(entry.inputs.ndim)
        reduced = axis is not None and grid.shape[axis - 1] == 1
        scores = scores.squeeze(axis) if axis is not None and reduced else scores
        return attributed(
            entry,
            question,
            scores.to(entry.point.dtype),
            "occlusion",
            reduced=reduced,
            unit=question.unit,
            convention={
                "window": list(grid.sides),
                "stride": list(grid.strides),
                "baseline": "zero" if baseline is None else describe(baseline),
                "sign": "positive raises the target",
                "of": "word embedding" if entry.is_tokens else "inputs",
                **recipe(target, question),
            },
        )


@dataclass(frozen=True, eq=False)
class Occlusion(Attributed):
    """`occlusion` of the first examples of the measured batch.

    Records ``occlusion/values`` (axes example, position for tokens; example, y, x for images;
    example, feature for tables) and ``occlusion/target``.

    Args:
        name: First part of the records' names.
        target: As in `occlusion`, as are window, stride and baseline.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        window: Sides of the window.
        stride: Steps between windows.
        baseline: What takes the place.
        keep: Ids of tokens that are never replaced, such as special ones.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "occlusion"
    examples: int | None = 4
    window: int | list[int] | None = None
    stride: int | list[int] | None = None
    baseline: Baseline = None
    keep: Keep = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        for name, sides in (("window", self.window), ("stride", self.stride)):
            _check_sides(name, sides)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `occlusion`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return occlusion(
            model,
            batch,
            self.target,
            window=self.window,
            stride=self.stride,
            baseline=self.baseline,
            keep=self.keep,
            task=task,
        )


@dataclass(frozen=True, eq=False)
class Grid:
    """Where windows lie.

    Args:
        shape: Of one example, 1 for an axis that windows take as a whole.
        sides: Of a window, for each axis of ``shape``.
        strides: Likewise.
        ranks: For ids the number of each position among those that are not padding, −1 for
            padding, ``[example, position]``; else None.
    """

    shape: tuple[int, ...]
    sides: tuple[int, ...]
    strides: tuple[int, ...]
    ranks: Tensor | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of windows along each axis."""
        sized = zip(self.shape, self.sides, self.strides, strict=True)
        return tuple(max(0, -(-(n - side) // step)) + 1 for n, side, step in sized)

    @property
    def count(self) -> int:
        """Number of windows."""
        total = 1
        for count in self.counts:
            total *= count
        return total

    def masks(self, device: torch.device) -> Iterator[Tensor]:
        """Yield what each window covers.

        Args:
            device: Where the inputs are.

        Yields:
            Boolean, ``[1, …]`` or, for ids, ``[example, position]``.
        """
        if self.ranks is not None:
            yield from self._of_tokens(self.ranks)
            return
        for index in itertools.product(*map(range, self.counts)):
            mask = torch.zeros(self.shape, dtype=torch.bool, device=device)
            placed = zip(index, self.sides, self.strides, strict=True)
            mask[tuple(slice(i * step, i * step + side) for i, side, step in placed)] = True
            yield mask[None]

    def _of_tokens(self, ranks: Tensor) -> Iterator[Tensor]:
        (side,), (step,) = self.sides, self.strides
        length = ranks.amax(1, keepdim=True) + 1
        for i in range(self.counts[0]):
            there = (ranks >= i * step) & (ranks < i * step + side)
            # As many windows as the example has alone: one that adds nothing new is none.
            yield there & ((i == 0) | (length > (i - 1) * step + side))


def _averaged(copies: Copies, start: Tensor, grid: Grid) -> Tensor:
    """Return the mean loss over the windows that cover an input."""
    entry = copies.entry
    point = widened(entry.point)
    whole = copies.question(entry.outputs, copies.rows)
    masks = grid.masks(point.device)
    shape = grid.ranks.shape if grid.ranks is not None else (len(point), *grid.shape)
    total, count = point.new_zeros(shape), point.new_zeros(shape)
    while portion := list(itertools.islice(masks, copies.many)):
        points = [torch.where(_over(mask, point), start, point) for mask in portion]
        losses = (whole - copies.values(torch.cat(points)).view(len(portion), -1)).to(total)
        for mask, loss in zip(portion, losses, strict=True):
            total += mask * loss.view(-1, *[1] * (total.ndim - 1))
            count += mask
    return total / count.clamp(min=1)


def _over(mask: Tensor, point: Tensor) -> Tensor:
    return mask if mask.ndim == point.ndim else mask[..., None]


def _grid(entry: Entry, window: Window, stride: Window) -> Grid:
    full = tuple(entry.inputs.shape[1:])
    if entry.is_tokens:
        if len(full) != 1:
            raise ArgumentError.of(
                "inputs",
                expected="token ids [example, position]",
                got=f"ids of shape {tuple(entry.inputs.shape)}",
                do="Add or remove an axis.",
            )
        sides = _sides("window", window, full, (1,))
        strides = _sides("stride", stride, sides, _halves(sides))
        return Grid(full, sides, strides, _ranks(entry))
    axis = channel_axis(entry.inputs.ndim)
    spatial = tuple(n for i, n in enumerate(full, 1) if i != axis)
    with_channels = isinstance(window, Sequence) and len(window) == len(full)
    if axis is None or with_channels:
        sides = _sides("window", window, full, tuple(1 for _ in full))
        return Grid(full, sides, _sides("stride", stride, sides, _halves(sides)))
    default = tuple(max(1, n // 4) for n in spatial) if len(spatial) > 1 else (1,)
    sides = _sides("window", window, spatial, default)
    strides = _sides("stride", stride, sides, _halves(sides))
    shape, sides, strides = (_with_one(s, axis - 1) for s in (spatial, sides, strides))
    return Grid(shape, sides, strides)


def _ranks(entry: Entry) -> Tensor:
    ids, mask = entry.inputs, attention_mask_of(entry.batch)
    if mask is None or mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    real = mask[:, : ids.shape[1]].bool()
    return torch.where(real, real.long().cumsum(1) - 1, -1)


def _with_one(sides: tuple[int, ...], at: int) -> tuple[int, ...]:
    return (*sides[:at], 1, *sides[at:])


def _halves(sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, (side + 1) // 2) for side in sides)


def _sides(
    name: str, given: Window, most: tuple[int, ...], default: tuple[int, ...]
) -> tuple[int, ...]:
    _check_sides(name, given)
    if given is None:
        return default
    sides = (given,) * len(most) if isinstance(given, int) else tuple(given)
    if len(sides) != len(most) or any(s > n for s, n in zip(sides, most, strict=True)):
        raise ArgumentError.of(
            name,
            expected=f"an int or {len(most)} ints of at most {most}",
            got=given,
            do="Give one side for each axis, no larger than the inputs "
            "(of a stride: than the window).",
        )
    return sides


def _check_sides(name: str, given: Window) -> None:
    sides = [given] if isinstance(given, int) else list(given or ())
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise ArgumentError.of(
            name, expected="positive ints", got=repr(given), do="Pass None for the default."
        )
