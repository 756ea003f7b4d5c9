"""By what a behavior is judged, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import ArgumentError
from ..target import Logit, LogitDifference, LogProbability, Probability, Rank, TargetLike, select

__all__ = ["METRICS", "AnyOf", "Metric", "NegativeLogProbability", "metric_of"]

Metric = Literal[
    "logit_difference",
    "log_probability",
    "probability",
    "probability_difference",
    "loss",
    "rank",
]

METRICS: tuple[str, ...] = get_args(Metric)


@dataclass(frozen=True)
class NegativeLogProbability:
    """−log p of a token at the last position, in nats: the loss of that prediction.

    Args:
        token: Tokens ``[example]``.
    """

    token: Any
    higher_is_better: bool = field(default=False, init=False, repr=False)

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, nats.
        """
        return -LogProbability(self.token)(outputs, batch)


@dataclass(frozen=True)
class AnyOf:
    """Right answers, any of which will do, against wrong ones, at the last position.

    With R and W the sets: ``probability_difference`` Σ_R p − Σ_W p (Hanna et al. 2023),
    ``logit_difference`` logsumexp_R − logsumexp_W, the log-odds of R against W in nats,
    ``probability`` Σ_R p, ``log_probability`` log Σ_R p, ``loss`` −log Σ_R p, ``rank`` the number
    of tokens above the best of R, and ``margin`` max_R − max_W, in logits.

    Args:
        right: Tokens ``[example, answer]``, −1 where an example has fewer.
        wrong: Likewise.
        metric: Which of these.
        position: Where the logits are read, counted from the last that is not padding.
    """

    right: Tensor
    wrong: Tensor
    metric: str = "probability_difference"
    position: int = -1

    @property
    def higher_is_better(self) -> bool:
        """False for a loss and a rank."""
        return self.metric not in ("loss", "rank")

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the comparison.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``.
        """
        logits, _ = select(outputs, batch, Logit(position=self.position))
        if self.metric == "margin":
            return _of(logits, self.right).amax(-1) - _of(logits, self.wrong).amax(-1)
        if self.metric == "rank":
            best = _of(logits.detach(), self.right).amax(-1, keepdim=True)
            return (logits > best).sum(-1).to(logits.dtype)
        if self.metric == "logit_difference":
            return _of(logits, self.right).logsumexp(-1) - _of(logits, self.wrong).logsumexp(-1)
        logs = logits.log_softmax(-1)
        right = _of(logs, self.right).logsumexp(-1)
        if self.metric == "probability_difference":
            return right.exp() - _of(logs, self.wrong).logsumexp(-1).exp()
        if self.metric == "probability":
            return right.exp()
        return -right if self.metric == "loss" else right


def metric_of(metric: str, answers: Tensor, wrong: Tensor) -> TargetLike:
    """Return the target by which a behavior is judged.

    Args:
        metric: One of ``METRICS``.
        answers: Right tokens ``[example]``, or ``[example, answer]`` where any of several will do
            (−1 where an example has fewer).
        wrong: Wrong tokens, likewise.

    Returns:
        The target.

    Raises:
        ArgumentError: If the metric has another name.
    """
    if metric not in METRICS:
        raise ArgumentError.of(
            "metric", expected=f"one of {METRICS}", got=repr(metric), do="Choose."
        )
    if answers.ndim == 2:
        return AnyOf(answers, wrong, metric)
    if metric == "logit_difference":
        return LogitDifference(answers, other=wrong)
    if metric == "probability_difference":
        return AnyOf(answers[:, None], wrong[:, None], metric)
    kinds = {"log_probability": LogProbability, "probability": Probability, "rank": Rank}
    return kinds[metric](answers) if metric in kinds else NegativeLogProbability(answers)


def _of(values: Tensor, tokens: Tensor) -> Tensor:
    """Return the values of some tokens, −∞ where there is none."""
    tokens = tokens.to(values.device)
    found = values.gather(-1, tokens.clamp(min=0))
    return found.masked_fill(tokens < 0, float("-inf"))
