"""Induction on random tokens with a chosen corruption, as a description of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ..behavior import Behavior
from ..characteristic import Characteristic
from ..errors import ArgumentError
from .copying import Corruption
from .induction import RepeatedTokens
from .metrics import Metric

__all__ = ["Induction"]


@dataclass(frozen=True)
class Induction:
    """Induction on random tokens, with a chosen corruption; for YAML, and wherever behaviors go.

    Args:
        protocol: The blocks; its ``vocabulary_size`` must be given.
        corruption: What the corrupted prompts lack; see `copying.copied`.
        shown: Tokens of the last copy that are shown; None shows half.
        metric: One of `metrics.METRICS`.

    Raises:
        ArgumentError: If the protocol is none.

    Example:
        >>> made = Induction(RepeatedTokens(10, length=4, sequences=1), "block").behavior()
        >>> made.clean.shape, made.where("last")
        (torch.Size([1, 6]), tensor([5]))
    """

    protocol: RepeatedTokens
    corruption: Corruption = "answer"
    shown: int | None = None
    metric: Metric = "logit_difference"

    def __post_init__(self) -> None:
        """Check what comes first, where a vocabulary's size is easily put."""
        if not isinstance(self.protocol, RepeatedTokens):
            raise ArgumentError.of(
                "protocol",
                expected="RepeatedTokens",
                got=repr(self.protocol),
                do="Pass RepeatedTokens(vocabulary_size).",
            )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable; see `RepeatedTokens.characteristics`.

        Returns:
            The same ones.
        """
        return self.protocol.characteristics()

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            One pair a sequence.
        """
        return self.protocol.behavior(self.corruption, shown=self.shown, metric=self.metric)
