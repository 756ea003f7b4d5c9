"""Gradients averaged over noisy inputs: SmoothGrad, its square, and VarGrad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..target import TargetLike
from ..task import Task
from .asking import asking, recipe
from .baselines import Keep
from .copies import Copies, check_count, moving
from .entry import Entry
from .gradients import Kind, attributed, check_kind, kept, said
from .measured import Attributed
from .question import Question, widened
from .result import Attribution

__all__ = [
    "SmoothGrad",
    "SmoothGradSquared",
    "VarGrad",
    "smooth_grad",
    "smooth_grad_squared",
    "var_grad",
]


def smooth_grad(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    kind: Kind = "absolute",
    level: float = 0.15,
    samples: int = 50,
    seed: int = 0,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return the mean gradient over noisy inputs, E ∂F/∂x(x + ε) (Smilkov et al. 2017).

    ε is normal with σ = ``level`` · (max x − min x), the range of each example's own inputs. Of
    token ids the word embeddings are noisy; padding and tokens that are kept are not, and do not
    count for the range. Every example gets the same draws, so a batch gives what its examples give
    one by one, and the number of points in a pass changes nothing.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`. Classes and tokens are settled at the inputs without noise.
        kind: What is kept of the mean gradient, as in `saliency`.
        level: σ relative to the range.
        samples: Number of draws; the error of the mean falls with its root.
        seed: Of the noise; the global generators are not used.
        keep: Tokens without noise: ids, or a boolean mask ``[example, position]``.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores shaped as those of `saliency`.

    Raises:
        ArgumentError: If an argument cannot be used.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> scores = smooth_grad(model, torch.rand(1, 2), target=1, kind="signed", samples=2)
        >>> torch.allclose(scores.values[0], model.weight[1].detach())
        True
    """
    check_kind(kind)
    noise = Noise(level, samples, seed, keep)
    with asking(model, inputs, target, task, graph=False) as (entry, question):
        mean, _ = _moments(entry, question, noise)
        return attributed(
            entry,
            question,
            kept(mean, kind, tokens=entry.is_tokens).to(entry.point.dtype),
            "smooth_grad",
            reduced=kind in ("l2", "max"),
            unit=f"{question.unit} per unit",
            convention={**said(entry, kind), **noise.said(), **recipe(target, question)},
        )


def smooth_grad_squared(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    level: float = 0.15,
    samples: int = 50,
    seed: int = 0,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return the mean squared gradient over noisy inputs, E g(x + ε)² (Hooker et al. 2019).

    Noise as in `smooth_grad`. For token ids the squares of the embedding's components are added up.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        level: σ relative to the range.
        samples: Number of draws.
        seed: Of the noise.
        keep: Tokens without noise: ids, or a boolean mask.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores of at least 0, shaped like the inputs; one for each token.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    noise = Noise(level, samples, seed, keep)
    return _second("smooth_grad_squared", model, inputs, target, noise, task)


def var_grad(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    level: float = 0.15,
    samples: int = 50,
    seed: int = 0,
    keep: Keep = None,
    task: Task | None = None,
) -> Attribution:
    """Return the variance of the gradient over noisy inputs, Var g(x + ε) (Adebayo et al. 2018).

    Noise as in `smooth_grad`; the sum of squares is divided by the number of draws. For token ids
    the variances of the embedding's components are added up. A linear model has none.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch, as in `saliency`.
        target: As in `saliency`.
        level: σ relative to the range.
        samples: Number of draws.
        seed: Of the noise.
        keep: Tokens without noise: ids, or a boolean mask.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Scores of at least 0, shaped like the inputs; one for each token.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    noise = Noise(level, samples, seed, keep)
    return _second("var_grad", model, inputs, target, noise, task)


@dataclass(frozen=True, eq=False)
class _Noisy(Attributed):
    level: float = 0.15
    samples: int = 20
    seed: int = 0
    keep: Keep = None
    examples: int | None = 4

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        Noise(self.level, self.samples, self.seed)


@dataclass(frozen=True, eq=False)
class SmoothGrad(_Noisy):
    """`smooth_grad` of the first examples of the measured batch.

    Records ``smooth_grad/values`` (axes as for `Saliency`) and ``smooth_grad/target``.

    Args:
        name: First part of the records' names.
        target: As in `smooth_grad`, as are level, seed and kind.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        level: σ relative to the range.
        samples: Number of draws; fewer than in the function, as it runs often.
        seed: Of the noise; the same at every firing.
        keep: Ids of tokens without noise, such as special ones.
        kind: What is kept of the mean gradient.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "smooth_grad"
    kind: Kind = "absolute"

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        check_kind(self.kind)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `smooth_grad`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return smooth_grad(
            model,
            batch,
            self.target,
            kind=self.kind,
            level=self.level,
            samples=self.samples,
            seed=self.seed,
            keep=self.keep,
            task=task,
        )


@dataclass(frozen=True, eq=False)
class SmoothGradSquared(_Noisy):
    """`smooth_grad_squared` of the first examples of the measured batch.

    Records ``smooth_grad_squared/values`` and ``smooth_grad_squared/target``.

    Args:
        name: First part of the records' names.
        target: As in `smooth_grad`, as are level and seed.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        level: σ relative to the range.
        samples: Number of draws.
        seed: Of the noise.
        keep: Ids of tokens without noise, such as special ones.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "smooth_grad_squared"

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `smooth_grad_squared`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        noise = Noise(self.level, self.samples, self.seed, self.keep)
        return _second("smooth_grad_squared", model, batch, self.target, noise, task)


@dataclass(frozen=True, eq=False)
class VarGrad(_Noisy):
    """`var_grad` of the first examples of the measured batch.

    Records ``var_grad/values`` and ``var_grad/target``.

    Args:
        name: First part of the records' names.
        target: As in `smooth_grad`, as are level and seed.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        level: σ relative to the range.
        samples: Number of draws.
        seed: Of the noise.
        keep: Ids of tokens without noise, such as special ones.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "var_grad"

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Call `var_grad`.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        noise = Noise(self.level, self.samples, self.seed, self.keep)
        return _second("var_grad", model, batch, self.target, noise, task)


@dataclass(frozen=True, eq=False)
class Noise:
    """How noisy inputs are drawn.

    Args:
        level: σ relative to the range of an example's inputs.
        samples: Number of draws.
        seed: Seed of its own generator.
        keep: Tokens without noise.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    level: float
    samples: int
    seed: int
    keep: Keep = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("samples", self.samples)
        check_count("seed", self.seed, least=0)
        if not isinstance(self.level, int | float) or not 0 <= self.level < float("inf"):
            raise ArgumentError.of(
                "level",
                expected="a finite number of at least 0",
                got=repr(self.level),
                do="Pass 0.15: 15 % of the range of the inputs.",
            )

    def said(self) -> dict[str, Any]:
        """Return what a reader needs to know, as plain JSON."""
        return {"level": self.level, "samples": self.samples, "seed": self.seed}

    def draws(self, entry: Entry) -> Iterator[Tensor]:
        """Yield ε for every example, one draw after the other.

        Args:
            entry: The model and its inputs.

        Yields:
            Shaped like the points.
        """
        point, moves = widened(entry.point), moving(entry, self.keep)
        wide = moves[..., None].expand_as(point) if entry.is_tokens else moves
        sigma = self.level * _range(point, wide)
        # Draws are counted from an example's first noisy token: padding on either side, and what
        # else is in the batch, leave them as they are.
        rank = (moves.flatten(1).cumsum(1) - 1).clamp(min=0) if entry.is_tokens else None
        count = 0 if rank is None or not rank.numel() else int(rank.max()) + 1
        generator = torch.Generator().manual_seed(self.seed)
        for own in torch.randint(2**62, (self.samples,), generator=generator).tolist():
            stream = torch.Generator().manual_seed(own)
            if rank is None:
                drawn = _normal(point.shape[1:], point, stream).expand_as(point)
            else:
                rows = [_normal(point.shape[-1:], point, stream) for _ in range(count)]
                drawn = torch.stack(rows)[rank].reshape(point.shape)
            yield drawn * sigma * wide


Statistic = Literal["smooth_grad_squared", "var_grad"]


def _second(
    method: Statistic,
    model: nn.Module,
    inputs: Any,
    target: TargetLike,
    noise: Noise,
    task: Task | None,
) -> Attribution:
    with asking(model, inputs, target, task, graph=False) as (entry, question):
        mean, variance = _moments(entry, question, noise)
        scores = variance if method == "var_grad" else variance + mean.square()
        scores = scores.sum(-1) if entry.is_tokens else scores
        return attributed(
            entry,
            question,
            scores.to(entry.point.dtype),
            method,
            unit=f"({question.unit} per unit)²",
            convention={
                **said(entry, "signed"),
                "kind": "variance" if method == "var_grad" else "mean square",
                "sign": "none",
                **noise.said(),
                **recipe(target, question),
            },
        )


def _moments(entry: Entry, question: Question, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the gradient, added up draw by draw (Welford 1962)."""
    copies = Copies(entry, question, noise.samples)
    point = widened(entry.point)
    mean, spread, count = torch.zeros_like(point), torch.zeros_like(point), 0
    for points in _portions(point, noise.draws(entry), copies.many):
        for gradient in copies.slopes(points):
            count += 1
            off = gradient - mean
            mean += off / count
            spread += off * (gradient - mean)
    return mean, spread / count


def _portions(point: Tensor, draws: Iterator[Tensor], many: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for draw in draws:
        held.append(point + draw)
        if len(held) == many:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _normal(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU in float64, so that a seed means the same in every precision and place.
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(like)


def _range(point: Tensor, counted: Tensor) -> Tensor:
    """Return max − min over what is counted of each example, shaped to be multiplied."""
    flat, held = point.flatten(1) if point.ndim > 1 else point[:, None], counted.flatten(1)
    inf = float("inf")
    high = flat.masked_fill(~held, -inf).amax(1)
    low = flat.masked_fill(~held, inf).amin(1)
    width = torch.where(held.any(1), high - low, 0.0)
    return width.view(-1, *[1] * (point.ndim - 1))
