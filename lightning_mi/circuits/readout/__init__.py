"""What heads look at, what each part of a model writes into its answer, and what layers believe."""

from __future__ import annotations

from .lens import Lens, logit_lens
from .patterns import attention_entropy, attention_patterns, attention_summary, top_attended
from .readings import LogitAttribution, LogitLens
from .roles import HeadRoles, Roles, head_roles
from .shown import Patterns
from .writing import WriterAttribution, logit_attribution

__all__ = [
    # measurements
    "HeadRoles",
    "LogitAttribution",
    "LogitLens",
    "Patterns",
    # pure functions
    "attention_entropy",
    "attention_patterns",
    "attention_summary",
    "head_roles",
    "logit_attribution",
    "logit_lens",
    "top_attended",
    # results
    "Lens",
    "Roles",
    "WriterAttribution",
]
