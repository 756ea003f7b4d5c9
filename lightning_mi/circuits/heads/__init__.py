"""Where attention heads look, and what their looking is worth."""

from __future__ import annotations

from .losses import copy_losses, icl_score, icl_slope
from .prompt import PromptAttention
from .scores import HeadScores, head_scores

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
