"""What models are asked to do: inputs on which a behaviour shows, and their controls."""

from __future__ import annotations

from .induction import RepeatedTokens, matches
from .names import IndirectObject

__all__ = ["IndirectObject", "RepeatedTokens", "matches"]
