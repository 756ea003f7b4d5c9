"""How far an attribution can be believed.

Each measure is a function and a measurement that takes any attribution method, so that it also
runs while a model trains. Each stands beside what chance gives: random attributions and, for
tokens, the attribution that knows the position alone.
"""

from __future__ import annotations

from .curves import Deletion, Insertion, deletion, insertion
from .methods import Explanation, Method
from .result import Evaluation, Interval, interval

__all__ = [
    # what comes out
    "Evaluation",
    "Interval",
    "interval",
    # what goes in
    "Explanation",
    "Method",
    # removing units in order
    "deletion",
    "Deletion",
    "insertion",
    "Insertion",
]
