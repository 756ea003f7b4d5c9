"""What a behavior, a circuit and its steps are like, once they are known to exist."""

from __future__ import annotations

from .characterising import (
    Characterisation,
    Characterised,
    Characteristics,
    Claim,
    characterise,
)
from .function_map import FunctionMap, Functions, effective_number, function_map
from .functional_subspace import (
    FunctionalSubspace,
    FunctionalSubspaces,
    functional_overlap,
    functional_subspace,
)
from .knockout import AttentionKnockout, attention_knockout
from .tracing import SubjectTracing, subject_tracing

__all__ = [
    # measurements
    "Characteristics",
    "Functions",
    "FunctionalSubspaces",
    "AttentionKnockout",
    "SubjectTracing",
    # pure functions
    "characterise",
    "effective_number",
    "function_map",
    "functional_subspace",
    "functional_overlap",
    "attention_knockout",
    "subject_tracing",
    # results
    "Characterisation",
    "Characterised",
    "Claim",
    "FunctionMap",
    "FunctionalSubspace",
]
