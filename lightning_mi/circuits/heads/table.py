"""Head scores of a model on given tokens: one forward pass under a tap, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...attention import Site, tap
from ...errors import ArgumentError, ModelError
from ...task import Task
from .entries import Entries, Means
from .layout import Layout, require_harmless_padding
from .survey import run_tokens

__all__ = ["HeadTable", "check_tokens", "head_table"]


@dataclass(frozen=True)
class HeadTable:
    """Scores of every head in every sequence.

    Args:
        scores: By name, ``[sequence, layer, head]``; NaN where a sequence has no query, and beyond
            the heads of a layer that has fewer than others.
        nulls: The same under uniform attention over each site's real mask.
        excluded: By name, for each layer, how many queries had no reachable target.
        modules: Name of the module of each layer.
        outputs: What the model returned; None if it was stopped early.
    """

    scores: dict[str, Tensor]
    nulls: dict[str, Tensor]
    excluded: dict[str, list[int]]
    modules: list[str]
    outputs: Tensor | None


def head_table(
    model: nn.Module,
    task: Task,
    tokens: Tensor,
    layout: Layout | None = None,
    *,
    entries: Entries | None = None,
    stop_after: int | None = None,
) -> HeadTable:
    """Score all heads in one forward pass.

    Args:
        model: The user's model, in evaluation mode.
        task: How it is called.
        tokens: Ids ``[sequence, position]`` on the model's device.
        layout: Mask and position ids, or None.
        entries: What is read of the patterns; None reads the five head scores of the tokens.
        stop_after: Index of the last attention; what follows it is not computed.

    Returns:
        The scores.
    """
    layout = layout or Layout()
    require_harmless_padding(model, task, tokens, layout)
    chosen = Entries.of(tokens, layout.documents(tokens)) if entries is None else entries
    means = Means(chosen.to(tokens.device))
    modules: list[str] = []
    outputs: Tensor | None = None

    def visit(index: int, site: Site) -> None:
        _check_site(site, tokens)
        modules.append(site.module)
        means.add(site)

    with tap(model, visit=visit, keep=False, normalizers=True, stop_after=stop_after):
        outputs = run_tokens(model, task, tokens, layout.mask, layout.positions)
    heads = max(values.shape[2] for values in means.scores)
    scores = torch.stack([_padded(s, heads) for s in means.scores], 2)
    nulls = torch.stack(
        [
            _padded(r.null.expand_as(s), heads)
            for r, s in zip(means.reaches, means.scores, strict=True)
        ],
        2,
    )
    names = means.entries.names
    return HeadTable(
        dict(zip(names, scores, strict=True)),
        dict(zip(names, nulls, strict=True)),
        {n: [int(r.excluded[i]) for r in means.reaches] for i, n in enumerate(names)},
        modules,
        outputs,
    )


def check_tokens(tokens: Tensor, model: nn.Module) -> None:
    """Refuse what is no batch of token ids on the model's device.

    Args:
        tokens: What was given.
        model: The model.

    Raises:
        ArgumentError: If it is not.
    """
    if not isinstance(tokens, Tensor):
        raise ArgumentError.of(
            "tokens",
            expected="token ids [sequence, position]",
            got=f"a {type(tokens).__name__}",
            do="A protocol makes them: RepeatedTokens().tokens(vocabulary size).",
        )
    seen = f"shape {tuple(tokens.shape)} of {str(tokens.dtype)[6:]} on {tokens.device}"
    home = next((p.device for p in model.parameters()), tokens.device)
    wrong = tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex()
    if wrong or tokens.device != home or not tokens.numel():
        raise ArgumentError.of(
            "tokens",
            expected=f"token ids [sequence, position] on {home}",
            got=seen,
            do="Add a batch axis with tokens[None], or move them to the model's device.",
        )


def _check_site(site: Site, tokens: Tensor) -> None:
    if site.cross:
        raise ModelError(
            f"attention in {site.module!r}: expected self-attention over the tokens, got attention "
            "to another sequence. Heads of encoder-decoder models have no induction score; use "
            "lightning_mi.attention.tap to look at their patterns."
        )
    if site.q.shape[0] != len(tokens) or site.q.shape[2] != tokens.shape[1]:
        raise ModelError(
            f"attention in {site.module!r}: expected {len(tokens)} sequences of {tokens.shape[1]} "
            f"positions as given, got {site.q.shape[0]} of {site.q.shape[2]}. A model that adds "
            "positions or cuts windows has no one-to-one map from tokens to positions."
        )


def _padded(values: Tensor, heads: int) -> Tensor:
    """Return ``[score, sequence, head]`` with NaN for heads that a layer does not have."""
    return torch.nn.functional.pad(values, (0, heads - values.shape[2]), value=torch.nan)
