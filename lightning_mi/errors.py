"""Every error that this package raises on purpose.

One base class, so that a user can catch all of ours with one clause. The subclasses also derive
from the built-in error a Python programmer expects, so that existing handlers keep working.
"""

from __future__ import annotations

__all__ = [
    "LightningMIError",
    "ArgumentError",
    "ModelError",
    "NoAttentionError",
    "RunError",
    "TapError",
]


class LightningMIError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(LightningMIError, ValueError):
    """An argument has a value that cannot be used."""

    @classmethod
    def of(cls, argument: str, *, expected: str, got: object, do: str) -> ArgumentError:
        """Build the four-part message that every error of ours carries.

        Args:
            argument: Name of the argument, as the user wrote it.
            expected: What would have been right.
            got: What came.
            do: What the user can do now.

        Returns:
            The error, ready to be raised.

        Example:
            >>> print(ArgumentError.of("steps", expected="a positive int", got=0, do="Pass 8."))
            steps: expected a positive int, got 0. Pass 8.
        """
        return cls(f"{argument}: expected {expected}, got {got}. {do}")


class ModelError(LightningMIError, TypeError):
    """The model cannot be measured in the way that was asked for."""


class NoAttentionError(ModelError):
    """No attention was found in a model whose heads were to be measured."""


class TapError(LightningMIError, RuntimeError):
    """What was observed inside the model does not reproduce what the model computed."""


class RunError(LightningMIError, OSError):
    """A run folder cannot be written or read."""
