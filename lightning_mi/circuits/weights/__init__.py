"""What the weights alone say: copying, composition, subspaces."""

from __future__ import annotations

from .bases import Subspaces, subspaces
from .composing import Composition, composition, composition_z
from .copying import Copying, copying_score, matching_score
from .directions import HeadDirections, SingularDirections, singular_directions
from .overlap import SubspaceOverlap, principal_angles, subspace_overlap
from .tokens import Vocabulary, vocabulary

__all__ = [
    # measurements
    "Composition",
    "Copying",
    "HeadDirections",
    "SubspaceOverlap",
    # pure functions
    "composition",
    "composition_z",
    "copying_score",
    "matching_score",
    "principal_angles",
    "singular_directions",
    "subspace_overlap",
    "subspaces",
    "vocabulary",
    # what they return and take
    "SingularDirections",
    "Subspaces",
    "Vocabulary",
]
