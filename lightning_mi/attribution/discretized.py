"""Discretised integrated gradients (Sanyal and Ren 2021): a path of words instead of a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import describe
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Baseline, Keep, baseline_point
from .copies import Copies, check_count
from .entry import Entry
from .gradients import attributed
from .measured import Attributed
from .paths import with_gap
from .question import widened
from .result import Attribution
from .word_paths import Strategy, word_paths

__all__ = ["DiscretizedIntegratedGradients", "discretized_integrated_gradients"]

Sums: TypeAlias = Literal["left", "trapezoid"]
"""Which gradient stands for a piece: the one at its beginning, or the mean of both ends."""


def discretized_integrated_gradients(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    baseline: Baseline = None,
    steps: int = 30,
    strategy: Strategy = "greedy",
    neighbours: int = 100,
    rule: Sums = "left",
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return Σ_d Σ_k (w_{k+1} − w_k)_d · ∂F/∂w_d(w_k) along a path of words from x′ to x.

    A straight line leaves the embeddings that the model knows. This path runs from word to word
    (`word_paths`), and each dimension is monotone. A token's path depends on the token and its
    baseline alone, so a batch gives what its examples give one by one. The scores add up to
    F(x) − F(x′) only approximately, as the pieces are as long as words are apart: look at the gap.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Token ids, or a whole batch with them.
        target: As in `integrated_gradients`.
        baseline: x′: ids such as that of the mask or the padding token, or vectors; None: zeros.
        steps: Number of pieces of the path.
        strategy: How the next word of a path is chosen: ``"greedy"``: the one that has to be moved
            least to be monotone; ``"maxcount"``: the one that is monotone in most dimensions.
        neighbours: Number of nearest words to choose from.
        rule: ``"left"`` takes the gradient at the beginning of each piece, as in the paper;
            ``"trapezoid"`` the mean of its two ends, for the same cost and a smaller gap.
        keep: Tokens that keep their own embedding, and so score 0: ids, or a boolean mask.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        One score for each token in units of the target, positive where it raises it, with ``gap``,
        ``delta``, ``output_change``, ``steps`` and ``converged`` (|gap| at most 1 %).

    Raises:
        ArgumentError: If an argument cannot be used, or the inputs are not ids of one table.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> found = discretized_integrated_gradients(model, ids, 0, baseline=0, steps=4)
        >>> found.values.shape, bool(found.converged)
        (torch.Size([1, 3]), True)
    """
    _check(steps, strategy, neighbours, rule)
    with asking(model, inputs, target, task, graph=False) as (entry, question):
        _check_words(entry)
        copies = Copies(entry, question, steps + 1)
        start = baseline_point(entry, baseline, keep)
        points, place = _paths(entry, start, steps, strategy, neighbours)
        scores = _scores(copies, points, place, rule)
        with torch.no_grad():
            begin = copies.values(points[0][place])
        found = attributed(
            entry,
            question,
            scores.sum(-1).to(entry.point.dtype),
            "discretized_integrated_gradients",
            unit=question.unit,
            convention={
                "rule": rule,
                "most_steps": steps,
                "strategy": strategy,
                "neighbours": neighbours,
                "baseline": "zero" if baseline is None else describe(baseline),
                "sign": "positive raises the target",
                "of": "word embedding",
                **recipe(target, question),
            },
        )
        return with_gap(found, scores, begin, begin.abs(), steps, 0.01)


@dataclass(frozen=True, eq=False)
class DiscretizedIntegratedGradients(Attributed):
    """`discretized_integrated_gradients` of the first examples of the measured batch.

    Records ``discretized_integrated_gradients/values`` (axes example, position) and for each
    example ``gap``, ``delta``, ``output_change``, ``steps``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `discretized_integrated_gradients`, as are all below but the last two.
        baseline: x′.
        steps: Number of pieces of the path.
        strategy: How the next word of a path is chosen.
        neighbours: Number of nearest words to choose from.
        rule: Which gradient stands for a piece.
        keep: Ids of tokens that keep their own embedding, such as special ones.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "discretized_integrated_gradients"
    baseline: Baseline = None
    steps: int = 16
    strategy: Strategy = "greedy"
    neighbours: int = 100
    rule: Sums = "left"
    keep: Keep = None
    examples: int | None = 2

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check(self.steps, self.strategy, self.neighbours, self.rule)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `discretized_integrated_gradients`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return discretized_integrated_gradients(
            model,
            batch,
            self.target,
            baseline=self.baseline,
            steps=self.steps,
            strategy=self.strategy,
            neighbours=self.neighbours,
            rule=self.rule,
            keep=self.keep,
            task=task,
        )


def _paths(
    entry: Entry, start: Tensor, steps: int, strategy: Strategy, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Return different paths ``[step + 1, path, channel]`` from x′ to x, and whose is whose."""
    words = torch.arange(entry.lookups[0].table.num_embeddings, device=start.device)
    table = widened(entry.embed(words))
    flat = start.reshape(-1, start.shape[-1])
    ids = entry.inputs.reshape(-1)
    # Each different token and end once. Ids stay exact in float32 up to 2²⁴.
    keys = torch.cat([ids[:, None].to(flat), flat], 1)
    _, place = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(ids), device=ids.device)
    first.scatter_reduce_(0, place, torch.arange(len(ids), device=ids.device), "amin")
    paths = word_paths(table, ids[first], flat[first], steps, strategy, neighbours).flip(0)
    return paths, place.view(entry.inputs.shape)


def _scores(copies: Copies, points: Tensor, place: Tensor, rule: Sums) -> Tensor:
    ways = points.diff(dim=0)
    none = torch.zeros_like(ways[:1])
    after, before = torch.cat([ways, none]), torch.cat([none, ways])
    moves = after if rule == "left" else (after + before) / 2
    count = len(points) - 1 if rule == "left" else len(points)
    total = torch.zeros_like(points[0][place])
    for numbers in torch.split(torch.arange(count), copies.many):
        gradients = copies.slopes(torch.cat([points[k][place] for k in numbers.tolist()]))
        for k, gradient in zip(numbers.tolist(), gradients, strict=True):
            total.addcmul_(gradient, moves[k][place])
    return total


def _check_words(entry: Entry) -> None:
    if len(entry.lookups) != 1:
        raise ArgumentError.of(
            "inputs",
            expected="token ids that are looked up in one nn.Embedding",
            got=f"ids of {len(entry.lookups)} tables" if entry.is_tokens else "floats",
            do="Use integrated_gradients: a straight line needs no words.",
        )


def _check(steps: int, strategy: str, neighbours: int, rule: str) -> None:
    check_count("steps", steps)
    check_count("neighbours", neighbours)
    for name, value, options in (
        ("strategy", strategy, get_args(Strategy)),
        ("rule", rule, get_args(Sums)),
    ):
        if value not in options:
            raise ArgumentError.of(
                name, expected=f"one of {list(options)}", got=repr(value), do="Choose one."
            )
