"""What models are asked to do: inputs on which a behaviour shows, and their controls."""

from __future__ import annotations

from ..characteristic import Characteristic, Expectation
from .arithmetic import ModularAddition
from .counting import Counting
from .facts import Relation
from .greater_than import GreaterThan
from .in_context import InContextLearning
from .induction import RepeatedTokens, matches
from .induction_task import Induction
from .knowledge import KnowledgeRecall
from .metrics import METRICS, AnyOf
from .names import IndirectObject
from .own import PromptPairs
from .passages import RepeatedText
from .prompts import Pair, gathered
from .scenes import Scenes

__all__ = [
    # repeated tokens
    "RepeatedTokens",
    "Induction",
    "RepeatedText",
    "matches",
    # text
    "IndirectObject",
    "InContextLearning",
    "KnowledgeRecall",
    "Relation",
    "GreaterThan",
    # numbers and pictures
    "ModularAddition",
    "Counting",
    "Scenes",
    # your own
    "PromptPairs",
    "Pair",
    "gathered",
    "METRICS",
    "AnyOf",
    # what else should be true
    "Characteristic",
    "Expectation",
]
