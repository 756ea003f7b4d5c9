"""Integrated gradients (Sundararajan et al. 2017): gradients along a straight path, checked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Baseline, Keep, baseline_point
from .joint import parted, units
from .line import Line
from .measured import Attributed
from .refining import HELD, refine
from .result import Attribution, axes_of
from .rules import Rule, check_rule, ladder, nodes

__all__ = [
    "IntegratedGradients",
    "check_path",
    "integrated",
    "integrated_gradients",
    "path_attribution",
    "relative_gap",
    "with_gap",
]


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    rule: Rule = "gauss-legendre",
    steps: int | None = None,
    tolerance: float = 0.01,
    max_steps: int = 256,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return (x − x′) · ∫₀¹ ∂F/∂x(x′ + α(x − x′)) dα, and how well it adds up.

    By completeness the scores of an example add up to F(x) − F(x′). What is missing is the
    *gap*, returned with every result. With ``steps=None`` each example gets nodes until its gap is
    within the tolerance or ``max_steps`` is reached: 8 Gauss–Legendre nodes, then one at a time
    where the path's increase of F is missed most (kinks), beyond 64 nodes 128 and 256
    Gauss–Legendre nodes. Other rules go through 8, 16, 32 … nodes, as do models that mix the
    examples of a batch.

    Token ids are moved through the word embedding alone: ids are never interpolated, position
    embeddings keep their value. Scores of the embedding's components are added up to one for each
    token. Padding (``attention_mask`` = 0) keeps its own embedding and so scores 0.

    Memory does not grow with the number of steps: they are taken in portions that depend on
    shapes and precision only, and added up in place. Half precision is added up in float32.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary.
        target: An int or a tensor of ints (the logit of that class or token, for language models
            at the last position that is not padding), a function ``(outputs, batch) -> [example]``
            or a `Target`. None: the true next token, the label, or the model's own answer.
        baseline: x′. None is zero (for ids the zero vector). A number or a tensor of the inputs'
            shape or of one example's; for ids: ids, or vectors of the embedding's shape.
        rule: Quadrature rule. Gauss–Legendre converges fastest on smooth models; on ReLU models
            it and the midpoint rule err by about 1/n.
        steps: Number of nodes for every example; None adapts it.
        tolerance: Largest |gap| that counts as converged.
        max_steps: Most nodes of the adaptive form.
        keep: Tokens that keep their own embedding on the whole path, and so score 0: ids, or a
            boolean mask ``[example, position]``.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores in units of the target, positive where an input raises it, with ``gap``, ``delta``,
        ``output_change``, ``steps`` and ``converged`` for each example.

    Raises:
        ArgumentError: If an argument cannot be used: a baseline of the wrong shape, ids that no
            embedding looks up, a target out of range, an unknown rule.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = integrated_gradients(model, torch.ones(1, 2), target=1)
        >>> torch.allclose(scores.values[0], model.weight[1].detach())
        True
        >>> scores.converged.tolist()
        [True]
    """
    check_path(rule, steps, tolerance, max_steps)
    with asking(model, inputs, target, task, graph=False, joint=True) as (entry, question):
        line = Line(entry, question, baseline_point(entry, baseline, keep))
        found = integrated(line, rule, steps, tolerance, max_steps)
        tokens = entry.is_tokens
        return path_attribution(
            "integrated_gradients",
            line,
            (units(entry, found[0]), *found),
            tolerance,
            axes=axes_of(entry.inputs.shape, tokens=tokens, reduced=False),
            ids=entry.inputs if tokens else None,
            convention={
                "rule": rule,
                "tolerance": tolerance,
                "most_steps": max_steps if steps is None else steps,
                "baseline": "zero" if baseline is None else describe(baseline),
                "sign": "positive raises the target",
                "of": "word embedding" if tokens else "inputs",
                **recipe(target, question),
            },
        )


@dataclass(frozen=True, eq=False)
class IntegratedGradients(Attributed):
    """`integrated_gradients` of the first examples of the measured batch.

    Records ``integrated_gradients/values`` (axes example, position for tokens; example, channel,
    y, x for images; example, feature for tables) and for each example ``gap``, ``delta``,
    ``output_change``, ``steps``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `integrated_gradients`, as are all below but the last two.
        baseline: x′.
        rule: Quadrature rule.
        steps: Number of nodes; None adapts it.
        tolerance: Largest |gap| that counts as converged.
        max_steps: Most nodes of the adaptive form; fewer than in the function, as it runs often.
        keep: Ids of tokens that keep their own embedding, such as special ones.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
            Several move together on one path.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "integrated_gradients"
    baseline: Baseline = None
    rule: Rule = "gauss-legendre"
    steps: int | None = None
    tolerance: float = 0.01
    max_steps: int = 12
    keep: Keep = None
    examples: int | None = 2
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_path(self.rule, self.steps, self.tolerance, self.max_steps)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `integrated_gradients`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return integrated_gradients(
            model,
            batch,
            self.target,
            baseline=self.baseline,
            rule=self.rule,
            steps=self.steps,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            keep=self.keep,
            task=task,
        )


def relative_gap(scores: Tensor, change: Tensor, size: Tensor) -> Tensor:
    """Return (Σ scores − change) / max(|change|, τ), signed.

    Where F(x) ≈ F(x′) the gap relative to their difference means nothing. So τ is the larger of
    1 % of Σ|scores| (scores that cancel must still cancel to 1 % of 1 %) and of 1,000 rounding
    errors of F (a difference below them is noise).

    Args:
        scores: ``[example, …]``.
        change: F(x) − F(x′), ``[example]``.
        size: max(|F(x)|, |F(x′)|), ``[example]``.

    Returns:
        Shape ``[example]``; 0 where everything is 0.
    """
    delta = _total(scores) - change
    guard = torch.maximum(0.01 * _total(scores.abs()), 1e3 * torch.finfo(size.dtype).eps * size)
    least = torch.finfo(size.dtype).tiny
    return delta / torch.maximum(change.abs(), guard).clamp(min=least)


def path_attribution(
    method: str,
    line: Line,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    tolerance: float,
    *,
    axes: tuple[str, ...],
    ids: Tensor | None,
    convention: Mapping[str, Any],
) -> Attribution:
    """Return the scores of a path together with how well they add up.

    Args:
        method: Name of the method.
        line: The path.
        found: Scores as they are shown, scores of every component, nodes used and gap.
        tolerance: Largest |gap| that counts as converged.
        axes: Names of the axes of the scores.
        ids: Token ids, where the scores belong to them.
        convention: What is needed to read the scores.

    Returns:
        The attribution.
    """
    values, scores, used, gap = found
    whole = Attribution(
        values=values.to(line.dtype),
        method=method,
        axes=axes,
        target=line.end,
        unit=line.question.unit,
        ids=ids,
        position=line.question.position,
        token=line.question.token,
        convention=convention,
        gap=gap,
        delta=_total(scores) - line.change,
        output_change=line.change,
        steps=used,
        converged=gap.abs() <= tolerance,
    )
    return parted(whole, line.entry)


def with_gap(
    found: Attribution, scores: Tensor, begin: Tensor, size: Tensor, steps: int, tolerance: float
) -> Attribution:
    """Add how well scores add up.

    Args:
        found: The attribution.
        scores: Scores of every component, in the precision of the sums.
        begin: F where the path begins, ``[example]``.
        size: The largest |F| there, ``[example]``.
        steps: Number of nodes.
        tolerance: Largest |gap| that counts as converged.

    Returns:
        The attribution with ``gap``, ``delta``, ``output_change``, ``steps`` and ``converged``.
    """
    change = found.target - begin
    gap = relative_gap(scores, change, torch.maximum(size, found.target.abs()))
    return found.stating(
        gap=gap,
        delta=_total(scores) - change,
        output_change=change,
        steps=torch.full((len(gap),), steps, device=gap.device),
        converged=gap.abs() <= tolerance,
    )


def integrated(
    line: Line, rule: Rule, steps: int | None, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate along a path with the nodes that are asked for, or with adapted ones.

    Args:
        line: The path.
        rule: Quadrature rule.
        steps: Number of nodes; None adapts it.
        tolerance: Largest |gap| at which an example is done.
        max_steps: Most nodes of the adaptive form.

    Returns:
        Scores ``[example, …]``, nodes used and gap, ``[example]``.
    """
    found = torch.zeros_like(line.start), torch.zeros_like(line.rows), torch.zeros_like(line.end)
    rungs = [steps] if steps is not None else ladder(max_steps)
    if steps is None and rule == "gauss-legendre" and line.separable:
        found = refine(line, min(max_steps, HELD), tolerance, functools.partial(_gap, line))
        rungs = [n for n in rungs if n > HELD]
    return _climb(line, rule, rungs, tolerance, found)


def _climb(
    line: Line,
    rule: Rule,
    rungs: list[int],
    tolerance: float,
    found: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Try more and more nodes, each time only for the examples whose gap is still too large."""
    scores, used, gap = found
    left = line.rows[(used == 0) | ((gap.abs() > tolerance) & gap.isfinite())]
    for steps in rungs:
        if not len(left):
            break
        alphas, weights = nodes(rule, steps)
        scores[left] = line.integrate(alphas, weights, left)
        used[left], gap[left] = steps, _gap(line, scores[left], left)
        left = left[gap[left].abs() > tolerance]  # More nodes do not mend NaN.
    return scores, used, gap


def _gap(line: Line, scores: Tensor, rows: Tensor) -> Tensor:
    return relative_gap(scores, line.change[rows], line.size[rows])


def _total(scores: Tensor) -> Tensor:
    return scores.reshape(len(scores), -1).sum(1)


def check_path(rule: Rule, steps: int | None, tolerance: float, max_steps: int) -> None:
    """Refuse arguments of a path method that cannot be used.

    Args:
        rule: Quadrature rule.
        steps: Number of nodes; None adapts it.
        tolerance: Largest |gap| that counts as converged.
        max_steps: Most nodes of the adaptive form.

    Raises:
        ArgumentError: If one of them cannot be used.
    """
    check_rule(rule, steps if steps is not None else max_steps)
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise ArgumentError.of(
            "tolerance",
            expected="a number of at least 0",
            got=repr(tolerance),
            do="Pass 0.01: 1 %.",
        )
