"""What models are asked to do: inputs on which a behaviour shows, and their controls."""

from __future__ import annotations

from .arithmetic import ModularAddition
from .induction import Induction, RepeatedTokens, matches
from .metrics import METRICS, AnyOf
from .names import IndirectObject
from .passages import RepeatedText
from .prompts import Pair, gathered

__all__ = [
    # tokens
    "RepeatedTokens",
    "Induction",
    "matches",
    # text
    "RepeatedText",
    "IndirectObject",
    # numbers
    "ModularAddition",
    # your own
    "Pair",
    "gathered",
    "METRICS",
    "AnyOf",
]
