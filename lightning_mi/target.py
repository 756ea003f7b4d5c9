"""The scalar that a question is asked about: `Target`.

One concept serves attribution targets, influence queries and patching metrics: a differentiable
function ``(outputs, batch) -> Tensor[example]`` that says whether more of it is better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .batch import attention_mask_of
from .errors import ArgumentError
from .task import IGNORED, NextToken, Task

__all__ = [
    "LogProbability",
    "Logit",
    "LogitDifference",
    "Loss",
    "Margin",
    "Probability",
    "Rank",
    "Target",
    "TargetLike",
    "TargetOption",
    "as_target",
]


@runtime_checkable
class Target(Protocol):
    """A differentiable scalar for each example."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it means that the model does better."""

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return shape ``[example]`` from the model's outputs and the batch."""


TargetLike: TypeAlias = Target | Callable[[Tensor, Any], Tensor] | Tensor | int | None
"""What is accepted wherever a target is: see `as_target`."""


class _Kind:
    """Base of the kinds: parsers of YAML keep subclasses apart only if not all are dataclasses."""


@dataclass(frozen=True)
class Logit(_Kind):
    """The logit of one token or class.

    Args:
        token: Token or class, for all examples (int) or for each (tensor). None takes the true
            next token, or the example's label, or where there is none the model's own answer.
        position: For outputs ``[example, position, token]``, the position whose logits are read,
            counted from the last one that is not padding. With ``token=None``, −1 is the last
            position whose next token is known.
        task: Where labels come from; filled in by whoever runs the target.
    """

    token: int | Tensor | None = None
    position: int = -1
    task: Task | None = field(default=None, repr=False, compare=False)
    higher_is_better: bool = field(default=True, init=False, repr=False)
    compares: ClassVar[bool] = False
    """Whether the value depends on other logits, so that one output alone has to become two."""

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the logit.

        Args:
            outputs: Logits ``[example, position, token]``, ``[example, class]`` or ``[example]``.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``.
        """
        logits, tokens = select(outputs, batch, self)
        return _take(logits, tokens)


@dataclass(frozen=True)
class LogProbability(Logit):
    """The log-probability of one token or class, in nats; arguments as for `Logit`."""

    compares: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return log softmax(logits)[token].

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, nats.
        """
        logits, tokens = select(outputs, batch, self)
        return _take(logits.log_softmax(-1), tokens)


@dataclass(frozen=True)
class Probability(Logit):
    """The probability of one token or class; arguments as for `Logit`.

    It saturates: where it is near 0 or 1 it hardly moves, whatever is done to the model. Prefer
    `LogitDifference` where effects are to add up.
    """

    compares: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return softmax(logits)[token].

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, from 0 to 1.
        """
        logits, tokens = select(outputs, batch, self)
        return _take(logits.softmax(-1), tokens)


@dataclass(frozen=True)
class Rank(Logit):
    """How many tokens or classes have a larger logit; 0 is the best. Arguments as for `Logit`.

    It moves in steps, so it has no gradient: measurements that need one refuse it.
    """

    higher_is_better: bool = field(default=False, init=False, repr=False)
    compares: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the rank.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, whole numbers as floats.
        """
        logits, tokens = select(outputs.detach(), batch, self)
        return (logits > _take(logits, tokens)[:, None]).sum(-1).to(torch.get_default_dtype())


@dataclass(frozen=True)
class Margin(Logit):
    """logit[token] − logsumexp of the others = log(p / (1 − p)); arguments as for `Logit`.

    The model output function of TRAK (Park et al. 2023).
    """

    compares: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the log-odds of the token.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, nats.
        """
        logits, tokens = select(outputs, batch, self)
        others = logits.scatter(-1, tokens[:, None], float("-inf"))
        return _take(logits, tokens) - others.logsumexp(-1)


@dataclass(frozen=True)
class LogitDifference(Logit):
    """logit[token] − logit[other]; arguments as for `Logit`.

    Args:
        other: The token or class to compare with; None takes the best of the others.
    """

    other: int | Tensor | None = None
    compares: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the difference of the two logits.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, logits.
        """
        logits, tokens = select(outputs, batch, self)
        if self.other is None:
            rivals = logits.detach().scatter(-1, tokens[:, None], float("-inf")).argmax(-1)
        else:
            rivals = _indices(self.other, logits, "other")
        return _take(logits, tokens) - _take(logits, rivals)


@dataclass(frozen=True)
class Loss(_Kind):
    """The task's own loss of each example."""

    task: Task | None = field(default=None, repr=False, compare=False)
    higher_is_better: bool = field(default=False, init=False, repr=False)

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss.

        Args:
            outputs: The model's outputs.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, in the units of the task's loss.

        Raises:
            ArgumentError: If no task is known.
        """
        if self.task is None:
            raise ArgumentError.of(
                "target",
                expected="a task whose loss is meant",
                got="Loss() without one",
                do="Pass task=Classification() (or your own) or Loss(task).",
            )
        return self.task.loss(outputs, batch)


@dataclass(frozen=True)
class Custom:
    """A user's function as a target; higher is taken to be better unless it says otherwise."""

    function: Callable[[Tensor, Any], Tensor]
    higher_is_better: bool = True

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return what the function returns, checked for its shape.

        Args:
            outputs: The model's outputs.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``.

        Raises:
            ArgumentError: If it is not one number for each example.
        """
        value = self.function(outputs, batch)
        if not isinstance(value, Tensor) or value.shape != outputs.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError.of(
                "target",
                expected=f"a function that returns a tensor of shape ({len(outputs)},)",
                got=got,
                do="Return one number for each example.",
            )
        return value


TargetOption: TypeAlias = (
    Logit | LogProbability | LogitDifference | Probability | Margin | Loss | int | None
)
"""Targets that a YAML file can name; a protocol would hide their classes from its parser."""


def as_target(target: TargetLike, task: Task | None = None) -> Target:
    """Return what is meant by anything that is accepted as a target.

    Args:
        target: A `Target`; an int or a tensor of ints (the logit of that token or class); a
            function ``(outputs, batch) -> Tensor[example]``; None for the default: the logit of
            the true next token, of the label, or of the model's own answer.
        task: Fills in the task of a target that has none.

    Returns:
        The target, with its task.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> as_target(3)
        Logit(token=3, position=-1)
    """
    if target is None:
        return Logit(task=task)
    is_float = isinstance(target, Tensor) and target.is_floating_point()
    if isinstance(target, bool | type) or is_float:
        pass  # A class such as Margin, without its brackets, would pass for a function.
    elif isinstance(target, int | Tensor):
        return Logit(token=target, task=task)
    elif isinstance(target, Logit | Loss):
        return target if target.task is not None else dataclasses.replace(target, task=task)
    elif isinstance(target, Target):
        return target
    elif callable(target):
        return Custom(target, bool(getattr(target, "higher_is_better", True)))
    raise ArgumentError.of(
        "target",
        expected="an int, a tensor of ints, a function (outputs, batch) or a Target",
        got=f"the class {target.__name__}" if isinstance(target, type) else repr(target)[:60],
        do="For example target=3, or target=LogitDifference(3, other=5).",
    )


def positions(outputs: Tensor, batch: Any, target: Logit) -> Tensor:
    """Return the position whose logits a target reads, for each example.

    Args:
        outputs: Logits ``[example, position, token]``.
        batch: The batch they came from.
        target: The target.

    Returns:
        Long tensor ``[example]``.

    Raises:
        ArgumentError: If the position does not exist.
    """
    length = outputs.shape[1]
    last = _last_real(outputs, batch)
    if target.token is None and isinstance(target.task, NextToken):
        known = _last(target.task.labels(batch) != IGNORED)
        # Where no next token is known, the model's own answer at the last position is meant.
        last = torch.where(known < 0, last, known)
    index = torch.full_like(last, target.position)
    index = index if target.position >= 0 else last + 1 + target.position
    if bool((index < 0).any()) or bool((index >= length).any()):
        raise ArgumentError.of(
            "position",
            expected=f"a position inside the {length} of the outputs",
            got=target.position,
            do="Negative positions count from the last one that is not padding.",
        )
    return index


def select(outputs: Tensor, batch: Any, target: Logit) -> tuple[Tensor, Tensor]:
    """Return the logits that a target reads, and the token it asks about.

    Args:
        outputs: Logits ``[example, position, token]``, ``[example, class]`` or ``[example]``.
        batch: The batch they came from.
        target: The target.

    Returns:
        Logits ``[example, token]`` and tokens ``[example]``.
    """
    labels = target.task.labels(batch) if target.task is not None else None
    if outputs.ndim == 3:
        index = positions(outputs, batch, target)
        rows = torch.arange(len(outputs), device=outputs.device)
        logits = outputs[rows, index]
        labels = labels[rows, index] if labels is not None and labels.ndim == 2 else None
    elif outputs.ndim == 1 or outputs.shape[1:] == (1,):
        logits = outputs.reshape(-1, 1)
        if target.compares:
            # A single output is the logit of class 1 against class 0.
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        else:
            labels = torch.zeros_like(logits[:, 0], dtype=torch.long)
    else:
        logits = outputs
    return logits, _tokens(logits, labels, target)


def _tokens(logits: Tensor, labels: Tensor | None, target: Logit) -> Tensor:
    if target.token is not None:
        return _indices(target.token, logits, "target")
    answer = logits.detach().argmax(-1)
    if labels is None or labels.is_floating_point() or labels.numel() != len(logits):
        return answer
    labels = labels.reshape(-1).to(answer)
    return torch.where(labels == IGNORED, answer, labels)


def _indices(token: int | Tensor, logits: Tensor, argument: str) -> Tensor:
    tokens = torch.as_tensor(token, device=logits.device)
    tokens = tokens.expand(len(logits)) if tokens.ndim == 0 else tokens
    classes = logits.shape[-1]
    if tokens.is_floating_point() or tokens.shape != logits.shape[:1]:
        raise ArgumentError.of(
            argument,
            expected=f"one index, or one for each of the {len(logits)} examples",
            got=f"{str(tokens.dtype)[6:]} of shape {tuple(tokens.shape)}",
            do="Pass an int or a tensor as long as the batch.",
        )
    lowest, highest = (int(end) for end in tokens.aminmax())
    if lowest < 0 or highest >= classes:
        raise ArgumentError.of(
            argument,
            expected=f"an index from 0 to {classes - 1}",
            got=tokens.tolist() if tokens.numel() < 9 else f"values up to {highest}",
            do="Choose one of the model's outputs.",
        )
    return tokens.long()


def _take(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0]


def _last_real(outputs: Tensor, batch: Any) -> Tensor:
    mask = attention_mask_of(batch)
    if mask is None:
        return torch.full(outputs.shape[:1], outputs.shape[1] - 1, device=outputs.device)
    return _last(mask[:, : outputs.shape[1]].bool())


def _last(known: Tensor) -> Tensor:
    steps = torch.arange(known.shape[1], device=known.device)
    return torch.where(known, steps, -1).amax(1)
