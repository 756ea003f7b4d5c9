"""Which parts of a model do the work."""

from __future__ import annotations

from .heads import HeadScores, head_scores
from .losses import copy_losses, icl_score, icl_slope
from .prompt import PromptAttention

__all__ = [
    # measurements
    "HeadScores",
    "PromptAttention",
    # pure functions
    "head_scores",
    "icl_score",
    "icl_slope",
    "copy_losses",
]
