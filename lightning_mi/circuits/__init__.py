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
from .readout import (
    HeadRoles,
    Patterns,
    Roles,
    attention_entropy,
    attention_patterns,
    attention_summary,
    head_roles,
    top_attended,
)

__all__ = [
    # measurements
    "Patterns",
    "HeadRoles",
    "HeadScores",
    "PromptAttention",
    # pure functions
    "attention_entropy",
    "attention_patterns",
    "attention_summary",
    "head_roles",
    "top_attended",
    "head_scores",
    "icl_score",
    "icl_slope",
    "copy_losses",
    # results
    "Roles",
]
