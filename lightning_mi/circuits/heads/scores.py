"""Head scores: which heads do induction, copy positions, find duplicates, or rest on a sink.

Prefix matching and the repeated-random-token protocol are those of Olsson et al. (2022),
"In-context learning and induction heads".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...isolation import untouched
from ...measurement import Context
from ...record import Reading
from ...task import Task
from .entries import Entries
from .layout import Layout
from .panels import control_panels, copy_panels, icl_panels, score_panels
from .scored import scored
from .survey import survey
from .table import check_tokens, head_table

__all__ = ["HeadScores", "head_scores"]


def head_scores(
    model: nn.Module,
    tokens: Tensor,
    *,
    reduce: Literal["mean"] | None = "mean",
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    positions_of: Tensor | None = None,
    task: Task | None = None,
) -> dict[str, Tensor]:
    """Score every attention head by where it looks.

    With A the attention pattern, T the targets of a query, and x the tokens:

    - ``induction``: mean of Σ A[t, s] over s in T(t) = {p+1 : p<t, x_p = x_t}, over all t that have
      a target (prefix matching). On tokens repeated with period L that is A[t, t−L+1].
    - ``duplicate_token``: the same with T(t) = {p : p<t, x_p = x_t}, hence A[t, t−L].
    - ``previous_token``, ``current_token``, ``first_position``: mean over t ≥ 2 of A[t, t−1],
      A[t, t] and A[t, 0].

    Targets are found from the tokens themselves, so natural text is scored as well. Beside each
    ``<name>`` stands ``<name>_null``, its value if the head attended uniformly to all keys that
    its real mask leaves. Queries without a reachable target (a window shorter than the period)
    are left out. Every sequence counts the same.

    With grad enabled the scores are differentiable; under ``torch.no_grad`` no pattern is stored,
    and the pass ends at the last attention.

    Args:
        model: Any model of token ids with self-attention; its mode and state are left as they are.
        tokens: Ids ``[sequence, position]``, on the model's device.
        reduce: ``"mean"`` over sequences, or None.
        attention_mask: 1 at real tokens ``[sequence, position]``; positions count from the first
            real one. Or a block mask of packed sequences ``[sequence, 1, query, key]``: positions
            count from the first token of each document, and no target lies in another one.
        position_ids: Position ids, if the model takes them; where they start anew a new document
            begins. For left padding they are built, and checked to have done their work.
        positions_of: Tokens whose targets are read instead, the same shape: with
            ``tokens=protocol.matched()`` this is the matched null.
        task: How the model is called, if not with the ids alone.

    Returns:
        By name ``[layer, head]``, or ``[sequence, layer, head]`` for ``reduce=None``. Layers are
        the self-attentions in the order in which they run; NaN where there is nothing to measure.

    Raises:
        ArgumentError: If tokens are no batch of ids, a mask does not fit them, or ``reduce`` is
            neither.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50))
        >>> scores = head_scores(model, RepeatedTokens(length=8).tokens(50))
        >>> tuple(scores["induction"].shape)
        (2, 2)
    """
    check_tokens(tokens, model)
    if reduce not in ("mean", None):
        raise ArgumentError.of("reduce", expected="'mean' or None", got=repr(reduce), do="Choose.")
    chosen, wants_grad = task or Task(), torch.is_grad_enabled()
    layout = Layout(attention_mask, position_ids)
    documents = layout.documents(tokens)
    entries = None if positions_of is None else Entries.of(positions_of, documents)
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        with torch.no_grad():
            last = survey(plain, chosen).sites - 1
        table = head_table(plain, chosen, tokens, layout, entries=entries, stop_after=last)
    named = {}
    for name in table.scores:
        named[name], named[f"{name}_null"] = table.scores[name], table.nulls[name]
    return {n: v if reduce is None else v.nanmean(0) for n, v in named.items()}


@dataclass(frozen=True)
class HeadScores:
    """Head scores on repeated random tokens, their nulls, and what the second copy is worth.

    Panels over (layer, head), all attention probabilities: the five scores of `head_scores`;
    ``<name>_null`` (uniform over the real mask); ``<name>_stderr`` (standard error over
    sequences); ``induction_matched_null`` and ``duplicate_token_matched_null``, the same entries
    with the first block replaced by fresh tokens, which a head that merely attends at a fixed
    offset does not beat; ``previous_token_matched_null``, ``current_token_matched_null`` and
    ``first_position_matched_null``, the entries one position further;
    ``induction_random_period``, the score where each sequence has its own period. Scalars in nats:
    ``loss_first_copy``, ``loss_second_copy``, ``copy_gain`` (their difference; positive: the model
    copies), ``icl_score`` (loss late − loss early in the measured batch; negative: context helps)
    and ``icl_slope``.

    Args:
        name: First part of the records' names.
        tokens: The protocol, shortened to what the model takes and without the special tokens that
            its configuration names; None scores the measured batch's own tokens, without what
            only repeated tokens have.

    Example:
        >>> HeadScores().tokens.positions
        64
    """

    name: str = "head_scores"
    tokens: RepeatedTokens | None = field(default_factory=RepeatedTokens)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        found = scored(model, context, self.tokens)
        panels = score_panels(found.main, found.convention)
        if found.control is not None:
            panels |= control_panels(found.control, found.convention)
        if found.protocol is not None:
            panels |= copy_panels(found)
        return panels | icl_panels(model, context, found)
