"""What models are asked to do: inputs on which a behaviour shows, and their controls."""

from __future__ import annotations

from .induction import RepeatedTokens, matches

__all__ = ["RepeatedTokens", "matches"]
