"""How far an attribution can be believed.

Each measure is a function and a measurement that takes any attribution method, so that it also
runs while a model trains. Each stands beside what chance gives: random attributions and, for
tokens, the attribution that knows the position alone.
"""

from __future__ import annotations

from .consensus import Agreement, MethodAgreement, agreement
from .curves import Deletion, Insertion, deletion, insertion
from .erasure import Comprehensiveness, Sufficiency, comprehensiveness, sufficiency
from .faithfulness import Infidelity, infidelity
from .methods import Explanation, Method
from .randomisation import (
    ParameterRandomisation,
    Randomisation,
    RandomLabelControl,
    parameter_randomisation,
    random_label_control,
)
from .result import Evaluation, Interval, interval
from .stability import MaxSensitivity, max_sensitivity

__all__ = [
    # what comes out
    "Evaluation",
    "Randomisation",
    "Agreement",
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
    "comprehensiveness",
    "Comprehensiveness",
    "sufficiency",
    "Sufficiency",
    # changing the inputs at random
    "infidelity",
    "Infidelity",
    "max_sensitivity",
    "MaxSensitivity",
    # changing the model
    "parameter_randomisation",
    "ParameterRandomisation",
    "random_label_control",
    "RandomLabelControl",
    # between methods
    "agreement",
    "MethodAgreement",
]
