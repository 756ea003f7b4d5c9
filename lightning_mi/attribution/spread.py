"""Where the scores of an attribution lie: concentration, and the share on chosen units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import Context, Measurement
from ..record import Panel, Reading
from .gradients import Saliency
from .result import Attribution, channel_axis

__all__ = ["Concentration", "Scores", "concentration", "share"]

Scores: TypeAlias = Attribution | Panel | Tensor
"""Scores ``[example, …]``."""

NO_SPREAD = "constant or undefined scores, or fewer than three of them"

METHOD = Saliency()
"""What is described where no method is named."""


def concentration(scores: Scores) -> tuple[Tensor, Tensor]:
    """Return how concentrated the absolute scores are.

    With p the absolute scores divided by their sum, n units: Gini = Σ_i (2i − n − 1) p_(i) / n in
    ascending order, from 0 (all equal) to 1 − 1/n (all on one unit); entropy −Σ p log p, from
    log n to 0.

    Args:
        scores: ``[example, …]``.

    Returns:
        Gini and entropy in nats, each ``[example]``; NaN where all scores are 0.

    Example:
        >>> gini, entropy = concentration(torch.tensor([[0.0, 0.0, 0.0, -2.0]]))
        >>> gini.item(), entropy.item()
        (0.75, 0.0)
    """
    p = _shares(units_of(scores))
    count = p.shape[1]
    place = torch.arange(1, count + 1, dtype=p.dtype, device=p.device)
    gini = (p.sort(dim=1).values * (2 * place - count - 1)).sum(1) / count
    entropy = -torch.special.xlogy(p, p).sum(1)
    return gini, entropy + 0.0  # no negative zero


def share(scores: Scores, mask: Tensor) -> Tensor:
    """Return the share Σ_mask |φ| / Σ |φ| of the absolute scores on some units.

    Args:
        scores: ``[example, …]``.
        mask: Boolean, shaped like the units of all examples or of one: special tokens, background
            pixels, a region of one's own.

    Returns:
        Shape ``[example]``, from 0 to 1; NaN where all scores are 0.

    Raises:
        ArgumentError: If the mask does not fit.

    Example:
        >>> share(torch.tensor([[3.0, -1.0]]), torch.tensor([True, False])).item()
        0.75
    """
    p = _shares(units_of(scores))
    chosen = mask.to(p.device).bool()
    per_example = chosen.numel() == p.numel() and len(chosen) == len(p)
    if not per_example and chosen.numel() != p.shape[1]:
        raise ArgumentError.of(
            "mask",
            expected=f"one entry for each of {p.shape[1]} units, of all examples or of each",
            got=f"shape {tuple(mask.shape)}",
            do="Leave out the channel axis: a pixel is one unit.",
        )
    chosen = chosen.reshape(len(p) if per_example else 1, -1)
    return (p * chosen).sum(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Concentration:
    """Where the scores of a method lie on the measured batch.

    Records the scalars ``gini`` and ``entropy`` and, each beside the share that it would have if
    all units scored alike (``null`` in its convention): ``special`` (on special tokens),
    ``background`` (on background pixels) and ``masked`` (on a mask).

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        special: Ids of special tokens.
        background: Value of background pixels, the same in all channels.
        mask: Boolean, one entry for each unit of an example: a region of one's own.
    """

    # Not a default of its own: parsers of YAML refuse one where the type is a protocol.
    method: Measurement | None = None
    name: str = "concentration"
    special: list[int] | None = None
    background: float | None = None
    mask: Tensor | None = None

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            Means over the examples.

        Raises:
            ArgumentError: If special tokens are named and the inputs are no ids, or background
                pixels and they are.
        """
        from .evaluate.methods import (
            measured,
            task_for,
        )  # here, because that package compares by drift

        method = self.method or METHOD
        scores = measured(method, model, context)
        gini, entropy = concentration(scores)
        panels = {
            "gini": mean_of(gini, "gini", sign="higher is more concentrated", null=0.0),
            "entropy": mean_of(entropy, "entropy", "nats", sign="lower is more concentrated"),
        }
        inputs = task_for(method, context, model).inputs(context.batch)[: len(gini)]
        for what, mask in self._masks(inputs).items():
            null = float(mask.double().mean())
            panels[what] = mean_of(share(scores, mask), what, null=null, of="absolute scores")
        return panels

    def _masks(self, inputs: Tensor) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        if self.special is not None:
            if inputs.is_floating_point():
                raise _misfit("special", "token ids as inputs", inputs)
            masks["special"] = torch.isin(inputs, torch.tensor(self.special, device=inputs.device))
        if self.background is not None:
            if not inputs.is_floating_point():
                raise _misfit("background", "pixels or features as inputs", inputs)
            axis = channel_axis(inputs.ndim)
            empty = inputs == self.background
            masks["background"] = empty if axis is None else empty.all(axis)
        if self.mask is not None:
            masks["masked"] = self.mask
        return masks


def mean_of(values: Tensor, what: str, unit: str = "1", **convention: Any) -> Panel:
    """Return the mean over the examples where it is defined.

    Args:
        values: ``[example]``.
        what: Name of the scalar.
        unit: Its unit.
        **convention: What is needed to read it.

    Returns:
        A panel without axes; NaN with a reason where no example is defined.
    """
    known = values[~values.isnan()].double()
    mean = known.mean() if len(known) else torch.tensor(math.nan)
    said: dict[str, Any] = {"n": len(known), "display": {"scalar": what}, **convention}
    if not len(known):
        said["reason"] = NO_SPREAD
    if len(known) > 1:
        said["stderr"] = float(known.std()) / math.sqrt(len(known))
    return Panel(mean.double(), (), {}, unit, said)


def units_of(scores: Scores) -> Tensor:
    """Return one score for each unit; channels are added up where the axes are named.

    Args:
        scores: ``[example, …]``.

    Returns:
        Float64 ``[example, unit]``.

    Raises:
        ArgumentError: If there is no axis but that of examples.
    """
    values = scores if isinstance(scores, Tensor) else scores.values
    axes: Sequence[str] = () if isinstance(scores, Tensor) else scores.axes
    values = values.detach().double()
    if "channel" in axes and len(axes) > 2 and values.ndim == len(axes):
        values = values.sum(list(axes).index("channel"))
    if values.ndim < 2:
        raise ArgumentError.of(
            "scores",
            expected="scores [example, …]",
            got=f"shape {tuple(values.shape)}",
            do="Add the axis of examples with scores[None].",
        )
    return values.flatten(1)


def _misfit(argument: str, expected: str, inputs: Tensor) -> ArgumentError:
    return ArgumentError.of(
        argument, expected=expected, got=str(inputs.dtype)[6:], do="Leave the argument out."
    )


def _shares(units: Tensor) -> Tensor:
    size = units.abs()
    total = size.sum(1, keepdim=True)
    none = torch.full_like(total, math.nan)
    return size / torch.where(total > 0, total, none)
