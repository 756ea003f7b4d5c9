"""Which parts of a model do the work."""

from __future__ import annotations

from .heads import (
    HeadScores,
    PromptAttention,
    copy_losses,
    head_scores,
    icl_score,
    icl_slope,
)

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
