"""Copying: does a head raise the logits of the token it looks at?

Row vectors: a head that looks at token t adds E_t·W_OV·W_U to the logits. E is the embedding (or
what the first block makes of it, see `vocabulary`), with the gain of the head's norm folded into
W_V and that of the final norm into W_U.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import ArgumentError
from ...measurement import Context
from ...record import Panel, Reading
from .factors import heads_of, norm_before, reads, writes
from .panels import head_panel
from .tokens import Vocabulary, vocabulary

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["KINDS", "Copying", "copying_null", "copying_score", "matching_score", "table"]

KINDS = ("eigenvalue", "logit", "top_k", "argmax")

SEQUENCE, SEQUENCES = 25, 40
"""Length and number of the random sequences of the logit form; 25 is that of Olsson et al."""

TOP = 5
"""A token is copied, in the top-k form, if it is among the five largest logits (Wang et al.)."""

ASKED = 256
"""Tokens that are asked about in the top-k and argmax forms, against the whole vocabulary."""


def copying_score(
    anatomy: Anatomy,
    kind: str = "eigenvalue",
    *,
    anti: bool = False,
    tokens: Vocabulary | None = None,
    seed: int = 0,
) -> Tensor:
    """Return how much each head copies the tokens it looks at.

    - ``"eigenvalue"`` (Elhage et al. 2021): Σλ / Σ|λ| over the eigenvalues λ of W_E·W_OV·W_U, in
      [−1, 1], taken from the d_head × d_head matrix W_O·(W_U·W_E)·W_V with the same ones but zeros.
      Random heads have 0; 0/0 is 0.
    - ``"logit"`` (Olsson et al. 2022): for tokens of a random sequence of n = 25, the logits over
      the sequence minus their mean, cut at 0; the share s that falls on the token itself; 2s − 1.
      Random heads have 2/n − 1, a perfect copier 1.
    - ``"top_k"`` (Wang et al. 2022): share of tokens that are among their own 5 largest logits of
      all tokens, the normalised embedding going through W_V, its bias and W_O. Random: 5/tokens.
    - ``"argmax"``: share of tokens whose own logit is the largest. Random: 1/tokens.

    Ties count against the head, so a head that writes nothing copies nothing.

    Args:
        anatomy: The model's anatomy.
        kind: One of the four.
        anti: Score the negated logits: an anti-copying head has the score of a copying one. (A
            perfect anti-copier has a logit score of −1, hardly less than a random head.)
        tokens: What to ask about; None takes all tokens with W_E.
        seed: Seed of the generator that draws sequences and asked tokens.

    Returns:
        ``[layer, head]``; NaN where undefined and beyond the heads of a layer that has fewer.

    Raises:
        ArgumentError: If kind is none of the four.

    Example:
        >>> copying_null("logit", 1000)
        -0.92
    """
    _check_kind(kind)
    asked = vocabulary(anatomy) if tokens is None else tokens
    sign = -1.0 if anti else 1.0
    if kind == "eigenvalue":
        rows = [sign * _eigenvalue(anatomy, layer, asked) for layer in range(anatomy.n_layers)]
    elif kind == "logit":
        rows = [_logit(anatomy, layer, asked, sign, seed) for layer in range(anatomy.n_layers)]
    else:
        k = TOP if kind == "top_k" else 1
        rows = [_top(anatomy, layer, asked, sign, k, seed) for layer in range(anatomy.n_layers)]
    return table(rows)


def matching_score(anatomy: Anatomy, *, tokens: Vocabulary | None = None) -> Tensor:
    """Return how much each head looks for the token it stands on.

    Σλ / Σ|λ| over the eigenvalues λ of W_E·W_QK·W_Eᵀ, in [−1, 1]: +1 for a head whose logit is
    highest between equal tokens, −1 for one that avoids them. Random heads have 0; 0/0 is 0.
    Rotary embedding and biases are left out.

    Args:
        anatomy: The model's anatomy.
        tokens: What to ask about; None takes all tokens with W_E.

    Returns:
        ``[layer, head]``; NaN beyond the heads of a layer that has fewer.
    """
    asked = vocabulary(anatomy) if tokens is None else tokens
    rows = []
    for layer in range(anatomy.n_layers):
        key, query = reads(anatomy, layer, "K"), reads(anatomy, layer, "Q")
        rows.append(_balance(key.mT @ asked.gram(layer) @ query))
    return table(rows)


def copying_null(kind: str, size: int) -> float:
    """Return the copying score of a head with random weights.

    Args:
        kind: One of the four kinds.
        size: Number of tokens in the vocabulary.

    Returns:
        Its expectation.
    """
    if kind == "logit":
        return 2 / min(SEQUENCE, size) - 1
    return {"eigenvalue": 0.0, "top_k": min(1.0, TOP / size), "argmax": 1 / size}[kind]


def table(rows: list[Tensor]) -> Tensor:
    """Return values by layer as one table.

    Args:
        rows: For each layer ``[head]``.

    Returns:
        ``[layer, head]``, NaN where a layer has fewer heads.
    """
    heads = max(len(row) for row in rows)
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (0, heads - len(row)), value=math.nan) for row in rows])


@dataclass(frozen=True)
class Copying:
    """Copying, anti-copying and same-token matching of every head, from its weights.

    Panels over (layer, head), named by kind (see `copying_score`): ``eigenvalue`` (its negative is
    anti-copying), ``logit`` and ``logit_anti``, ``top_k`` and ``top_k_anti``, ``argmax`` and
    ``argmax_anti``, and ``matching`` (see `matching_score`). All with their null.

    Args:
        name: First part of the records' names.
        kinds: Which forms.
        vocabulary: Number of tokens that are drawn; None takes all. The top-k and argmax forms ask
            for the largest logit among these.
        tied: Where W_U is W_E transposed, ask later layers about the stream after the first block
            (see `vocabulary`); False takes W_E.
        seed: Seed of the generators that draw tokens.

    Raises:
        ArgumentError: If a kind is unknown, or vocabulary below 2.
    """

    name: str = "copying"
    kinds: Sequence[str] = ("eigenvalue", "logit")
    vocabulary: int | None = 4096
    tied: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for kind in self.kinds:
            _check_kind(kind)
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ArgumentError.of(
                "vocabulary", expected="at least 2", got=self.vocabulary, do="Pass None for all."
            )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels; NaN with a reason where the model has no tokens.
        """
        anatomy = shared_anatomy(model, context)
        names = [n for k in self.kinds for n in ((k,) if k == KINDS[0] else (k, f"{k}_anti"))]
        if anatomy.W_E is None or anatomy.W_U is None:
            return {name: _undefined(anatomy, name) for name in [*names, "matching"]}
        with torch.no_grad():
            tokens = self._tokens(model, anatomy, context)
            about = _convention(tokens)
            found = {n: self._panel(n, anatomy, tokens, about) for n in names}
            values = matching_score(anatomy, tokens=tokens)
        about |= {"what": WHAT["matching"], "null": 0.0, "display": {}}
        return found | {"matching": head_panel(values, anatomy, about, "QK")}

    def _tokens(self, model: nn.Module, anatomy: Anatomy, context: Context) -> Vocabulary:
        task = context.task if context.has_batch else context.known_task
        chosen = model if self.tied else None
        return vocabulary(anatomy, model=chosen, task=task, size=self.vocabulary, seed=self.seed)

    def _panel(
        self, name: str, anatomy: Anatomy, tokens: Vocabulary, about: dict[str, Any]
    ) -> Panel:
        kind = name.removesuffix("_anti")
        anti = name != kind
        values = copying_score(anatomy, kind, anti=anti, tokens=tokens, seed=self.seed)
        about = {**about, "what": WHAT[kind] + (", of negated logits" if anti else "")}
        about |= {"null": copying_null(kind, len(tokens.ids))}
        about |= {"sign": "larger: copies less" if anti else "larger: copies more"}
        if kind == "logit":
            about["reason"] = "NaN: the head writes nothing that the answer reads"
        about["display"] = {"ranks": 1, "picture": "map"} if kind == "eigenvalue" else {}
        return head_panel(values, anatomy, about, "OV")


WHAT = {
    "eigenvalue": "sum of eigenvalues / sum of their moduli, of W_E W_OV W_U",
    "logit": "2 share - 1 of a token's own logit among 25 random tokens, above their mean",
    "top_k": "share of tokens among their own 5 largest logits",
    "argmax": "share of tokens whose own logit is the largest",
    "matching": "sum of eigenvalues / sum of their moduli, of W_E W_QK W_E^T",
}


def _convention(tokens: Vocabulary) -> dict[str, Any]:
    return {"embedding": tokens.embedding, "tokens": len(tokens.ids)}


def _undefined(anatomy: Anatomy, name: str) -> Panel:
    values = heads_of(anatomy.n_heads, anatomy.W_O[0]).float() * math.nan
    kind = name.removesuffix("_anti")
    reason = "the model has no embedding and unembedding of tokens"
    about = {"what": WHAT[kind], "reason": reason, "display": {}}
    return head_panel(values, anatomy, about, "QK" if kind == "matching" else "OV")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ArgumentError.of("kind", expected=f"one of {KINDS}", got=repr(kind), do="Choose.")


def _eigenvalue(anatomy: Anatomy, layer: int, tokens: Vocabulary) -> Tensor:
    written = writes(anatomy, layer) @ tokens.through(layer)
    return _balance(written @ reads(anatomy, layer, "V"))


def _balance(small: Tensor) -> Tensor:
    """Return Σλ/Σ|λ| of square matrices; the eigenvalues of a zero matrix balance at 0."""
    # On the CPU: the matrices are small, and not every device can do it.
    values: Tensor = torch.linalg.eigvals(small.cpu())
    sizes = values.abs().sum(-1)
    zero = sizes <= torch.finfo(small.dtype).eps * torch.linalg.matrix_norm(small.cpu())
    return (values.real.sum(-1) / sizes.where(~zero, 1.0)).where(~zero, 0.0).to(small.device)


def _logit(anatomy: Anatomy, layer: int, tokens: Vocabulary, sign: float, seed: int) -> Tensor:
    chosen = _sequences(len(tokens.ids), seed).to(tokens.ids.device)
    z = tokens.read(layer)[chosen] @ reads(anatomy, layer, "V")[:, None]
    written = z @ writes(anatomy, layer)[:, None]
    logits = sign * (written @ tokens.unembedding[:, chosen].permute(1, 0, 2))
    above = (logits - logits.mean(-1, keepdim=True)).clamp(min=0)
    share = above.diagonal(dim1=-2, dim2=-1) / above.sum(-1)
    return 2 * share.nanmean((1, 2)) - 1


def _top(
    anatomy: Anatomy, layer: int, tokens: Vocabulary, sign: float, k: int, seed: int
) -> Tensor:
    chosen = _sample(len(tokens.ids), ASKED, seed).to(tokens.ids.device)
    read, norm = tokens.read(layer)[chosen], norm_before(anatomy, layer)
    read = read if norm is None else norm(read)
    hits = []
    for head, weight in enumerate(reads(anatomy, layer, "V", fold=False)):
        z = read @ weight
        if k > 1:
            z = z + anatomy.b_V[layer][anatomy.kv_head(layer)[head]].to(z)
        logits = sign * (z @ writes(anatomy, layer)[head] @ tokens.unembedding)
        own = logits.gather(1, chosen[:, None])
        hits.append(((logits >= own).sum(1) <= k).to(z.dtype).mean())
    return torch.stack(hits)


def _sequences(size: int, seed: int) -> Tensor:
    """Return indices of distinct tokens, ``[sequence, position]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(size, generator=generator)[:SEQUENCE] for _ in range(SEQUENCES)]
    return torch.stack(rows)


def _sample(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count]
