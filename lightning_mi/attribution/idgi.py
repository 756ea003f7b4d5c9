"""IDGI (Yang et al. 2023): what F gains on each piece of the path, shared by squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Baseline, Keep, baseline_point
from .copies import check_count, moving
from .gradients import attributed
from .joint import units
from .line import Line
from .measured import Attributed
from .paths import with_gap
from .result import Attribution

__all__ = ["Idgi", "idgi"]


def idgi(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    steps: int = 64,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return Σ_k g_k² / ‖g_k‖² · (F(x_{k+1}) − F(x_k)), g_k being the gradient at x_k.

    The points of the path are x_k = x′ + k/n (x − x′), k = 0 … n. The part of a gradient that is
    at right angles to the direction in which F grows does not count, so there is less noise than
    in integrated gradients. Increments telescope: the scores add up to F(x) − F(x′) with any number
    of steps, but for steps at whose beginning the gradient is zero; what they lose is the gap. The
    sign of a score is that of the increments of F: an input cannot speak against the target on a
    step on which F grows.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `integrated_gradients`.
        target: As in `integrated_gradients`.
        baseline: x′, as in `integrated_gradients`.
        steps: Number of pieces n.
        keep: Tokens that keep their own embedding and score 0.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores in units of the target, with ``gap``, ``delta``, ``output_change``, ``steps`` and
        ``converged`` (|gap| at most 1 %) for each example.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
        >>> found = idgi(model, x, 0, steps=4)
        >>> bool((found.gap.abs() < 1e-5).all())
        True
    """
    check_count("steps", steps)
    with asking(model, inputs, target, task, graph=False, joint=True) as (entry, question):
        line = Line(entry, question, baseline_point(entry, baseline, keep))
        moves = moving(entry, keep)
        scores = _scores(line, steps, moves[..., None] if entry.is_tokens else moves)
        tokens = entry.is_tokens
        found = attributed(
            entry,
            question,
            units(entry, scores).to(line.dtype),
            "idgi",
            unit=question.unit,
            value=line.end,
            convention={
                "most_steps": steps,
                "baseline": "zero" if baseline is None else describe(baseline),
                "sign": "positive raises the target",
                "of": "word embedding" if tokens else "inputs",
                **recipe(target, question),
            },
        )
        return with_gap(found, scores, line.end - line.change, line.size, steps, 0.01)


@dataclass(frozen=True, eq=False)
class Idgi(Attributed):
    """`idgi` of the first examples of the measured batch.

    Records ``idgi/values`` (axes as `IntegratedGradients`) and for each example ``gap``, ``delta``,
    ``output_change``, ``steps``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `idgi`, as are the three below.
        baseline: x′.
        steps: Number of pieces of the path.
        keep: Ids of tokens that keep their own embedding, such as special ones.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
            Several move together on one path.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "idgi"
    baseline: Baseline = None
    steps: int = 16
    keep: Keep = None
    examples: int | None = 2
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_count("steps", self.steps)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `idgi`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return idgi(
            model,
            batch,
            self.target,
            baseline=self.baseline,
            steps=self.steps,
            keep=self.keep,
            task=task,
        )


def _scores(line: Line, steps: int, moves: Tensor) -> Tensor:
    alphas = (torch.arange(steps, dtype=torch.float64) / steps)[:, None]
    total = torch.zeros_like(line.start)
    begun: tuple[Tensor, Tensor] | None = None
    for value, gradient in line.sampled(alphas.expand(-1, len(line.rows)), line.rows):
        if begun is not None:
            _add(total, begun[1], value - begun[0])
        begun = value, _shares(gradient * moves)
    if begun is not None:
        _add(total, begun[1], line.end - begun[0])
    return total


def _add(total: Tensor, shares: Tensor, gain: Tensor) -> None:
    total.addcmul_(shares, gain.to(shares).view(-1, *[1] * (shares.ndim - 1)))


def _shares(gradient: Tensor) -> Tensor:
    """Return g² / ‖g‖² for each example; zeros where the gradient is zero."""
    flat = gradient.flatten(1)
    # Relative to the largest one: squares of very small or large gradients leave the range.
    largest = flat.abs().amax(1, keepdim=True)
    squares = (flat / largest.clamp(min=torch.finfo(flat.dtype).tiny)).square()
    whole = squares.sum(1, keepdim=True)
    return (squares / whole.where(whole > 0, torch.ones_like(whole))).view_as(gradient)
