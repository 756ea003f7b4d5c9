"""Edits of a model, each reversible, each with a table of what it does."""

from __future__ import annotations

from .edit import Edit
from .rank import key_covariance, rank_edit
from .running import scale_heads, steer
from .table import EditRow, EditTable, edit_table
from .tokens import boost_tokens, spellings, suppress_tokens

__all__ = [
    "Edit",
    "EditRow",
    "EditTable",
    "boost_tokens",
    "edit_table",
    "key_covariance",
    "rank_edit",
    "scale_heads",
    "spellings",
    "steer",
    "suppress_tokens",
]
