"""What a transformer is made of: heads, weights and the residual graph, found by asking it."""

from __future__ import annotations

from .anatomy import Anatomy
from .parts import Norm, Note, ReaderInput, Writer

__all__ = ["Anatomy", "Norm", "Note", "ReaderInput", "Writer"]
