"""What a behavior, a circuit and its steps are like, once they are known to exist."""

from __future__ import annotations

from .characterising import (
    Characterisation,
    Characterised,
    Characteristics,
    Claim,
    characterise,
)

__all__ = [
    "Characteristics",
    "characterise",
    "Characterisation",
    "Characterised",
    "Claim",
]
