"""What heads look at, what each part of a model writes into its answer, and what layers believe."""

from __future__ import annotations

from .patterns import attention_entropy, attention_patterns, attention_summary, top_attended
from .roles import HeadRoles, Roles, head_roles
from .shown import Patterns

__all__ = [
    # measurements
    "HeadRoles",
    "Patterns",
    # pure functions
    "attention_entropy",
    "attention_patterns",
    "attention_summary",
    "head_roles",
    "top_attended",
    # results
    "Roles",
]
