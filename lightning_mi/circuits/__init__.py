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
    Lens,
    LogitAttribution,
    LogitLens,
    Patterns,
    Roles,
    WriterAttribution,
    attention_entropy,
    attention_patterns,
    attention_summary,
    head_roles,
    logit_attribution,
    logit_lens,
    top_attended,
)

__all__ = [
    # measurements
    "LogitAttribution",
    "LogitLens",
    "Patterns",
    "HeadRoles",
    "HeadScores",
    "PromptAttention",
    # pure functions
    "logit_attribution",
    "logit_lens",
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
    "Lens",
    "WriterAttribution",
    "Roles",
]
