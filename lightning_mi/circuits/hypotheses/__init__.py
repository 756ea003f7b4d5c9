"""Circuits stated in advance, step by step, and tested: evidence under four headings."""

from __future__ import annotations

from .builtin import InductionCircuit, IOICircuit
from .connections import Carries, Composes, Overlaps
from .counting import CountingDecompositions
from .cuts import Removes
from .evidence import Evidence, Line
from .expectations import Attends, Copies, Looks, Prior, Writes
from .hypothesis import CircuitHypothesis, Step
from .measured import HypothesisTest

__all__ = [
    # hypotheses
    "CircuitHypothesis",
    "Step",
    "InductionCircuit",
    "IOICircuit",
    "CountingDecompositions",
    # what is stated
    "Prior",
    "Looks",
    "Copies",
    "Attends",
    "Writes",
    "Removes",
    "Composes",
    "Overlaps",
    "Carries",
    # what is found
    "Evidence",
    "Line",
    # on schedule
    "HypothesisTest",
]
