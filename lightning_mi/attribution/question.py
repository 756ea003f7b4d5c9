"""One question, asked at many points: a target whose token and position do not move on the way.

Along a path the model's own answer changes, and with it the meaning of a target such as "the
logit of the answer". So tokens, positions and rivals are read once, at the inputs, and kept.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..target import (
    Logit,
    LogitDifference,
    LogProbability,
    Margin,
    Probability,
    Target,
    positions,
    select,
)

__all__ = ["Question", "ask"]

LOGITS = (Logit, LogProbability, Probability, Margin, LogitDifference)

SATURATED = 1e-3
"""Distance from 0 or 1 at which a probability hardly moves any more."""


@dataclass(eq=False)
class Question:
    """A target that means the same at every point.

    Args:
        target: The target; of the kinds that read logits, its tokens are known.
        batch: The user's batch, at the inputs.
        outputs: The model's outputs at the inputs.
        position: Position read, ``[example]``, or None.
        token: Token or class read, ``[example]``, or None.
    """

    target: Target
    batch: Any
    outputs: Tensor
    position: Tensor | None = None
    token: Tensor | None = None

    @property
    def unit(self) -> str:
        """Unit of the target."""
        if type(self.target) in (Logit, LogitDifference):
            return "logits"
        return "nats" if type(self.target) in (LogProbability, Margin) else "1"

    @property
    def reads(self) -> Tensor | None:
        """The one position of each example that counts, where there are several; else None."""
        one = self.token is not None and isinstance(self.target, Logit)
        return self.position if one and self.outputs.ndim == 3 else None

    def __call__(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return the target's value.

        Args:
            outputs: Any number of stacked copies of the outputs for the chosen examples.
            rows: Which examples these are, ``[row]``.

        Returns:
            One number for each output, in float32 at least.
        """
        outputs = widened(outputs)
        if len(outputs) == len(rows):
            return self._one(outputs, rows)
        pieces = torch.split(outputs, len(rows))
        return torch.cat([self._one(piece, rows) for piece in pieces])

    def _one(self, outputs: Tensor, rows: Tensor) -> Tensor:
        if self.token is not None and isinstance(self.target, Logit):
            chosen: dict[str, Any] = {"token": self.token[rows]}
            if isinstance(self.target, LogitDifference):
                chosen["other"] = torch.as_tensor(self.target.other, device=rows.device)[rows]
            return dataclasses.replace(self.target, **chosen)(self._read(outputs, rows), None)
        # A user's function may hold one number for each example of its batch, so it always gets
        # the whole batch; the other rows do not count.
        whole = outputs
        if len(outputs) != len(self.outputs):
            whole = widened(self.outputs).index_copy(0, rows, outputs)
        return self.target(whole, self.batch)[rows]

    def _read(self, outputs: Tensor, rows: Tensor) -> Tensor:
        if self.position is None:
            return outputs if outputs.ndim == 2 else outputs.reshape(-1, 1)
        if outputs.shape[1] == 1:  # Only the position that is read was computed.
            return outputs[:, 0]
        return outputs[torch.arange(len(rows), device=rows.device), self.position[rows]]


def ask(target: Target, outputs: Tensor, batch: Any) -> Question:
    """Settle what a target asks about.

    Args:
        target: The target, with its task.
        outputs: The model's outputs at the inputs.
        batch: The batch they came from.

    Returns:
        The question.

    Raises:
        ArgumentError: If the outputs have more axes than a logit can be chosen from.
    """
    plain = outputs.detach()
    if type(target) not in LOGITS or not isinstance(target, Logit):
        return Question(target, batch, plain)
    if outputs.ndim > 3:
        raise ArgumentError.of(
            "target",
            expected="outputs [example, class] or [example, position, token] to choose from",
            got=f"outputs of shape {tuple(outputs.shape)}",
            do="Pass target=function(outputs, batch) that returns one number for each example.",
        )
    logits, token = select(plain, batch, target)
    position = positions(plain, batch, target) if plain.ndim == 3 else None
    fixed = dataclasses.replace(target, token=token, task=None)
    if isinstance(fixed, LogitDifference):
        fixed = dataclasses.replace(fixed, other=_rivals(logits, token, fixed.other))
    question = Question(fixed, batch, plain, position, token)
    if isinstance(target, Probability):
        _warn_if_saturated(question)
    return question


def widened(values: Tensor) -> Tensor:
    """Return half precision as float32, all else as it is.

    Args:
        values: Any floats.

    Returns:
        Float32 or float64.
    """
    return values.float() if values.element_size() < 4 else values


def _warn_if_saturated(question: Question) -> None:
    plain = question.outputs
    value = question(plain, torch.arange(len(plain), device=plain.device))
    flat = (value - value.round()).abs() < SATURATED
    if bool(flat.any()):
        warnings.warn(
            f"target: {int(flat.sum())} of {len(flat)} probabilities are within {SATURATED:g} of 0 "
            "or 1, where gradients vanish. Pass target=Logit(…) or LogitDifference(…) instead.",
            UserWarning,
            stacklevel=2,
        )


def _rivals(logits: Tensor, token: Tensor, other: int | Tensor | None) -> Tensor:
    if other is None:
        return logits.scatter(-1, token[:, None], float("-inf")).argmax(-1)
    return torch.as_tensor(other, device=logits.device).expand(len(logits))
