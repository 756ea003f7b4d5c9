"""Max-sensitivity: how far scores move when the inputs move a little (Yeh et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...target import TargetLike
from ...task import Task
from ..asking import asking
from ..copies import moving
from ..entry import Entry
from ..question import Question
from ..result import Attribution
from .judged import Judged
from .methods import Fixed, Method, explained, matching, method_name
from .ranking import check_counts
from .result import Evaluation

__all__ = ["MaxSensitivity", "max_sensitivity"]


def max_sensitivity(
    model: nn.Module,
    inputs: Any,
    method: Method,
    target: TargetLike = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
) -> Evaluation:
    """Return max over δ of ‖φ(x + δ) − φ(x)‖₂ / ‖φ(x)‖₂, each entry of δ uniform within ±r.

    For floats r is ``radius`` itself, as in captum; for ids, whose word vectors are moved, it is
    ``radius`` times the largest less the smallest entry of the example's vectors. The question
    stays that of x: the token asked about does not change with the answer. Padding does not move.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        method: A method such as ``Saliency()`` or ``saliency``; scores alone cannot be asked again.
        target: What is asked; None takes the method's target.
        radius: r.
        samples: Number of δ.
        draws: Number of random attributions beside it: φ(x + δ) with its entries in random order.
        seed: Of δ and random orders.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One number for each example, 0 or more; lower is steadier. A method that does not look at
        the input at all is perfectly steady, so this alone proves nothing.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> from lightning_mi.attribution import saliency
        >>> max_sensitivity(nn.Linear(3, 2), torch.ones(1, 3), saliency, target=1).values.item()
        0.0
    """
    check_counts(samples=samples, draws=draws, seed=seed)
    _check_radius(radius)
    target = target if target is not None else getattr(method, "target", None)
    batch = matching(inputs, explained(method, model, inputs, target, task))
    with asking(model, batch, target, task, graph=False) as (entry, question):
        asked = fixed(question, target)
        generator = torch.Generator().manual_seed(seed)
        here = _flat(explained(method, entry.model, batch, asked, entry.task))
        size = here.norm(dim=1)
        largest = torch.zeros_like(size)
        chance = torch.zeros(draws, len(size), dtype=size.dtype, device=size.device)
        for delta in _deltas(entry, radius, samples, generator):
            with _moved(entry, batch, delta) as near:
                there = _flat(explained(method, entry.model, near, asked, entry.task))
            largest = torch.maximum(largest, (there - here).norm(dim=1))
            for i in range(draws):
                mixed = there.gather(1, _order(there, generator))
                chance[i] = torch.maximum(chance[i], (mixed - here).norm(dim=1))
    return Evaluation(
        name="max_sensitivity",
        values=_ratio(largest, size),
        higher_is_better=False,
        random=_ratio(chance, size) if draws else None,
        recency=torch.zeros_like(size) if entry.is_tokens else None,  # It sees no vector.
        convention={
            "method": method_name(method),
            "radius": radius,
            "radius_of": "range of the word vectors" if entry.is_tokens else "inputs",
            "samples": samples,
            "seed": seed,
        },
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxSensitivity(Judged):
    """`max_sensitivity` of a method on the measured batch; records as for `Judged`.

    Args:
        method: Any attribution measurement; None takes ``Saliency()``.
        name: First part of the records' names.
        target: What is asked; None takes the method's.
        radius: r.
        samples: Number of δ.
        draws: Number of random attributions.
        seed: Of δ and random orders.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "max_sensitivity"
    radius: float = 0.02
    samples: int = 10

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_counts(samples=self.samples)
        _check_radius(self.radius)

    def judge(
        self,
        model: nn.Module,
        batch: Any,
        scores: Attribution | Tensor,
        target: TargetLike,
        task: Task,
    ) -> Evaluation:
        """Call `max_sensitivity`.

        Args:
            model: The user's model.
            batch: The examples that were explained.
            scores: Not used: the method is asked again.
            target: What was asked.
            task: Runs the model.

        Returns:
            The evaluation.
        """
        return max_sensitivity(
            model,
            batch,
            self.judged,
            target if target is not None else self.target,
            radius=self.radius,
            samples=self.samples,
            draws=self.draws,
            seed=self.seed,
            task=task,
        )


def fixed(question: Question, target: TargetLike) -> TargetLike:
    """Return a target that asks at other inputs, or of another model, what was asked here.

    Args:
        question: What was settled at the inputs.
        target: As the user gave it.

    Returns:
        The target itself where there is no token to settle.
    """
    if question.token is None:
        return target
    return Fixed(question)


def _flat(scores: Attribution | Tensor) -> Tensor:
    values = scores.values if isinstance(scores, Attribution) else scores
    return values.detach().reshape(len(values), -1).double()


def _deltas(
    entry: Entry, radius: float, samples: int, generator: torch.Generator
) -> Iterator[Tensor]:
    point = entry.point
    free = moving(entry)
    free = free[..., None] if entry.is_tokens else free
    reach = torch.full_like(point, radius)
    if entry.is_tokens:
        rows = point.flatten(1)
        spread = (rows.amax(1) - rows.amin(1)).view(-1, *[1] * (point.ndim - 1))
        reach = reach * spread
    for _ in range(samples):
        drawn = torch.rand(point.shape, generator=generator, dtype=torch.float64) * 2 - 1
        yield drawn.to(point) * reach * free


@contextmanager
def _moved(entry: Entry, batch: Any, delta: Tensor) -> Iterator[Any]:
    """Yield a batch that lies δ away; for ids the word vectors do while the context lasts."""
    if not entry.is_tokens:
        yield entry.task.with_inputs(batch, (entry.inputs + delta).detach())
        return
    ids = entry.task.inputs(batch)
    widths = [lookup.width for lookup in entry.lookups]
    parts = torch.split(delta, widths, -1)
    handles = [
        lookup.table.register_forward_hook(_adding(ids, part))
        for lookup, part in zip(entry.lookups, parts, strict=True)
    ]
    try:
        yield batch
    finally:
        for handle in handles:
            handle.remove()


def _adding(ids: Tensor, part: Tensor) -> Any:
    def hook(table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        called = args[0] if args else None
        if not isinstance(called, Tensor) or called.dtype != ids.dtype:
            return None
        if called.shape == ids.shape and bool((called == ids).all()):
            return output + part.to(output)
        if ids.ndim == 2 and called.shape == ids.shape[::-1] and bool((called == ids.t()).all()):
            return output + part.transpose(0, 1).to(output)
        return None

    return hook


def _order(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return drawn.argsort(1).to(like.device)


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    """0/0 is 0: scores that are nothing and stay nothing are steady; x/0 is undefined."""
    ratio = change / size
    ratio = ratio.masked_fill((size == 0) & (change > 0), math.nan)
    return ratio.masked_fill((size == 0) & (change == 0), 0.0)


def _check_radius(radius: float) -> None:
    if not isinstance(radius, int | float) or not radius > 0:
        raise ArgumentError.of(
            "radius", expected="a positive number", got=repr(radius), do="Pass 0.02."
        )
