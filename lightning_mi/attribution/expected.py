"""Expected gradients (Erion et al. 2021): integrated gradients averaged over many baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..measurement import Context
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Keep, baseline_point, for_each
from .copies import Copies, check_count
from .entry import Entry
from .gradients import attributed
from .joint import Joint, units
from .measured import Attributed, explaining, task_in
from .paths import with_gap
from .question import widened
from .result import Attribution
from .several import InputsOf

__all__ = ["ExpectedGradients", "References", "expected_gradients"]

References: TypeAlias = Tensor | Mapping[str | int, Tensor] | None
"""Baselines, examples first; of several inputs for each key. None: the batch itself."""


def expected_gradients(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    references: References = None,
    samples: int = 100,
    seed: int = 0,
    tolerance: float = 0.05,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return E[(x − x′) · ∂F/∂x(x′ + α(x − x′))] over baselines x′ from data and α in [0, 1].

    Each sample takes one baseline and one α; all baselines are used equally often, and the α of n
    samples lie one in each n-th of [0, 1]. The scores add up to F(x) − E F(x′) in expectation;
    what is missing of F(x) less the mean of F over the baselines that were drawn is the gap.
    Every example gets the same draws, so a batch gives what its examples give one by one.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `integrated_gradients`.
        target: As in `integrated_gradients`.
        references: The baselines, ``[reference, …]``: shaped like the inputs, ids where the inputs
            are ids; of several inputs a mapping from their keys. None takes the inputs of the batch
            itself, so that scores depend on it.
        samples: Number of gradients for each example; the error falls with its root.
        seed: Of the draws; the global generators are not used.
        tolerance: Largest |gap| that counts as converged.
        keep: Tokens that keep their own embedding: ids, or a boolean mask ``[example, position]``.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores in units of the target, positive where an input raises it, with ``gap``, ``delta``,
        ``output_change``, ``steps`` (the samples) and ``converged`` for each example.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model, x = nn.Linear(2, 3), torch.ones(1, 2)
        >>> found = expected_gradients(model, x, 1, references=torch.zeros(4, 2), samples=4)
        >>> torch.allclose(found.values[0], model.weight[1].detach())
        True
    """
    check_count("samples", samples)
    with asking(model, inputs, target, task, graph=False, joint=True) as (entry, question):
        baselines = _references(entry, references)
        copies = Copies(entry, question, samples)
        point = widened(entry.point)
        total = point.new_zeros(point.shape)
        begun = question(entry.outputs, copies.rows).detach() * 0
        size = begun.clone()
        for starts, alphas in _draws(entry, baselines, (samples, seed, copies.many), keep):
            ways = point - starts
            scale = alphas.to(point).view(-1, *[1] * point.ndim)
            gradients = copies.slopes((starts + scale * ways).flatten(0, 1))
            for way, gradient in zip(ways, gradients, strict=True):
                total.addcmul_(way, gradient.to(total))
            with torch.no_grad():
                values = copies.values(starts.flatten(0, 1)).view(len(starts), -1)
            begun += values.sum(0) / samples
            size = torch.maximum(size, values.abs().amax(0))
        scores = total.div_(samples)
        tokens = entry.is_tokens
        found = attributed(
            entry,
            question,
            units(entry, scores).to(entry.point.dtype),
            "expected_gradients",
            unit=question.unit,
            convention={
                "references": len(baselines),
                "samples": samples,
                "seed": seed,
                "tolerance": tolerance,
                "sign": "positive raises the target",
                "of": "word embedding" if tokens else "inputs",
                **recipe(target, question),
            },
        )
        return with_gap(found, scores, begun, size, samples, tolerance)


@dataclass(frozen=True, eq=False)
class ExpectedGradients(Attributed):
    """`expected_gradients` of the first examples, against the whole of the measured batch.

    Records ``expected_gradients/values`` (axes as `IntegratedGradients`) and for each example
    ``gap``, ``delta``, ``output_change``, ``steps``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `expected_gradients`, as are all below but the last two.
        references: The baselines; None takes the inputs of the whole measured batch. Of several
            inputs one for each key.
        samples: Number of gradients for each example.
        seed: Of the draws.
        tolerance: Largest |gap| that counts as converged.
        keep: Ids of tokens that keep their own embedding, such as special ones.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
            Several move together on one path.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "expected_gradients"
    references: References = None
    samples: int = 24
    seed: int = 0
    tolerance: float = 0.05
    keep: Keep = None
    examples: int | None = 2
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_count("samples", self.samples)

    def attribution(self, model: nn.Module, context: Context) -> Attribution:
        """Return the scores.

        Args:
            model: The user's model.
            context: Batch and task.

        Returns:
            The scores.
        """
        if self.references is not None:
            return super().attribution(model, context)
        task = explaining(self.of, task_in(context, model, self.target))
        batch = context.batch
        inputs = task.each(batch) if isinstance(task, InputsOf) else task.inputs(batch)
        whole = dataclasses.replace(self, references=inputs)
        return whole.attribution(model, context)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `expected_gradients`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return expected_gradients(
            model,
            batch,
            self.target,
            references=self.references,
            samples=self.samples,
            seed=self.seed,
            tolerance=self.tolerance,
            keep=self.keep,
            task=task,
        )


def _references(entry: Entry, references: References) -> Tensor:
    if isinstance(entry, Joint):
        return _references_of_each(entry, references)
    if isinstance(references, Mapping):
        raise ArgumentError.of(
            "references",
            expected="a tensor",
            got="a mapping",
            do="Mappings are for several inputs at once: see together.",
        )
    given = entry.inputs if references is None else references.detach().to(entry.inputs.device)
    fits = given.ndim and len(given) and given.shape[1:] == entry.inputs.shape[1:]
    if not fits or given.is_floating_point() != entry.inputs.is_floating_point():
        raise ArgumentError.of(
            "references",
            expected=f"{'ids' if entry.is_tokens else 'floats'} of shape [reference, "
            f"{', '.join(map(str, entry.inputs.shape[1:]))}]",
            got=f"{str(given.dtype)[6:]} of shape {tuple(given.shape)}",
            do="Pass inputs of other examples, prepared in the same way.",
        )
    return given


def _references_of_each(entry: Joint, references: References) -> Tensor:
    """Return the baselines of several inputs as points; the n-th of all of them belong together."""
    if references is None:
        return entry.inputs
    known = for_each(entry, "references", None if isinstance(references, Tensor) else references)
    if any(given is None for given in known.values()):
        raise ArgumentError.of(
            "references",
            expected=f"baselines of each input {list(known)}",
            got=f"{list(references) if isinstance(references, Mapping) else 'a tensor'}",
            do="Pass a mapping from each key to as many baselines.",
        )
    found = {key: _references(part, known[key]) for key, part in entry.parts.items()}
    points = [
        (part.embed(found[key]) if part.is_tokens else found[key]).flatten(1)
        for key, part in entry.parts.items()
    ]
    if len({len(point) for point in points}) > 1:
        raise ArgumentError.of(
            "references",
            expected="as many baselines of each input",
            got={key: len(given) for key, given in found.items()},
            do="The first of one belongs to the first of the others.",
        )
    return torch.cat([point.to(entry.inputs) for point in points], 1)


def _draws(
    entry: Entry, baselines: Tensor, draws: tuple[int, int, int], keep: Keep
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield baselines ``[draw, example, …]`` and α, as many at a time as one pass takes."""
    samples, seed, many = draws
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-samples // len(baselines))
    shuffled = [torch.randperm(len(baselines), generator=generator) for _ in range(rounds)]
    which = torch.cat(shuffled)[:samples]
    strata = torch.randperm(samples, generator=generator)
    alphas = (strata + torch.rand(samples, generator=generator, dtype=torch.float64)) / samples
    for chosen, alpha in zip(torch.split(which, many), torch.split(alphas, many), strict=True):
        yield torch.stack([baseline_point(entry, baselines[i], keep) for i in chosen]), alpha
