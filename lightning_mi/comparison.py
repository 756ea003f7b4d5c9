"""Do the black-box explanations agree with the mechanistic one?

`agreement` compares, at every step, where the strongest induction head looks from the last token
of the prompt with where saliency and integrated gradients say that the answer comes from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .record import Panel, Record

__all__ = ["FEWEST", "agreement", "pearson", "permutation_floor", "ranks", "spearman"]

FEWEST = 3
"""Pairs that a correlation needs at least."""

EXPLANATIONS = {"saliency": "agree_sal", "integrated_gradients": "agree_ig"}
"""Measurements that are compared, and the headline under which each agreement is logged."""


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation; ties share the mean of their ranks.

    Args:
        a: Shape ``[n]``.
        b: Shape ``[n]``.

    Returns:
        From −1 to 1; NaN where one of them is constant or holds a NaN, or n < 3.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0]))
        1.0
    """
    if bool(a.isnan().any() or b.isnan().any()):
        return math.nan
    return float(pearson(ranks(a.double()), ranks(b.double())))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation of rows.

    Args:
        a: Shape ``[…, n]``.
        b: The same shape.

    Returns:
        Shape ``[…]``, double; NaN where a row is constant, or n < 3.
    """
    a, b = (t.double() - t.double().mean(-1, keepdim=True) for t in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    known = (scale > 0) & (a.shape[-1] >= FEWEST)
    found = (a * b).sum(-1) / torch.where(known, scale, 1.0)
    return torch.where(known, found.clamp(-1, 1), math.nan)


def ranks(values: Tensor) -> Tensor:
    """Return ranks along the last dimension, ties sharing the mean of theirs.

    Args:
        values: Any shape ``[…, n]``, without NaN.

    Returns:
        Double, from 0.

    Example:
        >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [1.5, 0.0, 1.5]
    """
    # Sorted, not compared pair by pair: an image has 50,000 pixels.
    ordered, place = values.sort(-1)
    index = torch.arange(values.shape[-1], device=values.device).expand_as(place)
    fresh = torch.ones_like(place, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    final = torch.ones_like(fresh)
    final[..., :-1] = fresh[..., 1:]
    first = torch.where(fresh, index, 0).cummax(-1).values
    last = torch.where(final, index, values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    mean = (first + last).double() / 2
    return torch.empty_like(mean).scatter_(-1, place, mean)


@functools.lru_cache(maxsize=256)  # the prompt's length does not change from firing to firing
def permutation_floor(n: int, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> float:
    """Return how large a rank correlation of n positions gets by chance.

    Args:
        n: Number of positions.
        level: Share of random orders that stay below.
        draws: Number of random orders.
        seed: Of their generator.

    Returns:
        The quantile of |Spearman| between n ranks and a random order of them; about 1.96/√(n−1).
    """
    if n < FEWEST:
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, n, generator=generator, dtype=torch.float64).argsort(1).double()
    ranks = torch.arange(n, dtype=torch.float64)
    centred = ranks - ranks.mean()
    rho = (orders - orders.mean(1, keepdim=True)) @ centred / centred.square().sum()
    return float(rho.abs().quantile(level))


def agreement(records: Sequence[Record]) -> list[Record]:
    """Compare the explanations of one prompt with the attention of the induction head.

    For every step that has ``prompt/attention``, ``head_scores/induction`` and an explanation, the
    Spearman correlation over the positions of the prompt (up to the one that predicts) between the
    attention of the head with the highest induction score at that step and the absolute values of
    the explanation.

    Args:
        records: Records of one run and one source.

    Returns:
        Scalars ``agreement/saliency`` and ``agreement/integrated_gradients``. Their convention
        holds ``n``, the ``head``, and ``floor``, the 95 % quantile of |ρ| under random order.
    """
    made = []
    found = {(r.name, r.step): r for r in records}
    steps = sorted({r.step for r in records if r.name == "prompt/attention"})
    for step in steps:
        attention = found[("prompt/attention", step)]
        scores = found.get(("head_scores/induction", step))
        for name, headline in EXPLANATIONS.items():
            values = found.get((f"{name}/values", step))
            if scores is None or values is None:
                continue
            if values.panel.axes == ("example", "position"):
                made.append(_compare(attention, scores, values, headline))
    return made


def _compare(attention: Record, scores: Record, values: Record, headline: str) -> Record:
    head, row = _strongest(attention, scores)
    explained = values.panel.values[0].abs()[: len(row)]
    row = row[: len(explained)]
    convention = {
        "statistic": "Spearman over positions, |explanation| against attention",
        "n": len(row),
        "floor": permutation_floor(len(row)),
        "head": head,
        "display": {"headline": headline},
    }
    rho = torch.tensor(spearman(row, explained))
    made_by = {"function": "lightning_mi.comparison.agreement"}
    panel = Panel(rho, (), {}, "1", convention)
    return attention.replace(name=f"agreement/{values.measurement}", panel=panel, made_by=made_by)


def _strongest(attention: Record, scores: Record) -> tuple[str, Tensor]:
    """Return the recorded head with the highest induction score, and its attention row."""
    names = [str(label) for label in attention.panel.coords["head"]]
    table = scores.panel.values.nan_to_num(-1.0)
    rank = {
        f"L{layer}H{head}": float(table[layer, head])
        for layer in range(table.shape[0])
        for head in range(table.shape[1])
    }
    best = max(range(len(names)), key=lambda i: rank.get(names[i], -1.0))
    return names[best], attention.panel.values[best]
