"""Which entries of an attention pattern a score reads, and their mean without the pattern.

A score is a mean over sequences and queries of the attention that a query pays to its targets.
Under ``no_grad`` an entry is exp(logit − row log-sum-exp), so the pattern is never stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention import Site
from ...attention.site import grouped_product, widened
from ...behaviors import matches

__all__ = ["Entries", "Means", "Reach", "queries_of"]

SCORES = ("induction", "previous_token", "duplicate_token", "current_token", "first_position")

BLOCK = 1 << 20
"""Logits computed at a time: 4 MB stay in a processor's cache."""


@dataclass(frozen=True)
class Entries:
    """Entries (example, query, key) of a pattern, each belonging to one score.

    Args:
        names: Names of the scores.
        examples: Number of sequences.
        positions: Length of a sequence.
        score: Index into ``names``, ``[entry]``.
        example: Sequence, ``[entry]``.
        query: Query position, ``[entry]``.
        key: Key position, ``[entry]``.
    """

    names: tuple[str, ...]
    examples: int
    positions: int
    score: Tensor
    example: Tensor
    query: Tensor
    key: Tensor

    @classmethod
    def of(cls, tokens: Tensor, documents: Tensor | None = None) -> Entries:
        """Return the entries of the five head scores for given tokens.

        With T(t) the targets of query t: induction {p+1 : p<t, x_p = x_t}, duplicate token
        {p : p<t, x_p = x_t}, previous token {t−1}, current token {t}, first position {0}. The last
        three start at t = 2: at t = 1 the previous token is the first one.

        Args:
            tokens: Ids ``[example, position]``.
            documents: 0 at padding, else the number of the document (a mask of ones and zeros is
                one document a row). Positions count from a document's first token, and no target
                lies in another document.

        Returns:
            The entries.
        """
        found = matches(_apart(tokens, documents), documents)
        repeats = found + torch.tensor([0, 0, 1], device=found.device)
        if documents is not None:
            number = documents.long()
            there = number[repeats[:, 0], repeats[:, 2]]
            repeats = repeats[there == number[repeats[:, 0], repeats[:, 1]]]
        own = queries_of(tokens, documents)
        example, query, first = own.unbind(1)
        lists = [
            repeats,
            torch.stack([example, query, query - 1], 1),
            found,
            torch.stack([example, query, query], 1),
            torch.stack([example, query, first], 1),
        ]
        return cls.join(SCORES, lists, tokens)

    @classmethod
    def join(cls, names: Sequence[str], lists: Sequence[Tensor], tokens: Tensor) -> Entries:
        """Return entries from one list of triples for each score.

        Args:
            names: Names of the scores.
            lists: For each, long ``[entry, 3]``: example, query, key.
            tokens: Ids ``[example, position]``, for the sizes.

        Returns:
            The entries.
        """
        rows = torch.cat(list(lists))
        counts = torch.tensor([len(part) for part in lists], device=rows.device)
        score = torch.repeat_interleave(torch.arange(len(lists), device=rows.device), counts)
        example, query, key = rows.unbind(1)
        sequences, positions = tokens.shape
        return cls(tuple(names), sequences, positions, score, example, query, key)

    def triples(self, name: str) -> Tensor:
        """Return the entries of one score.

        Args:
            name: Its name.

        Returns:
            Long ``[entry, 3]``: example, query, key.
        """
        chosen = self.score == self.names.index(name)
        return torch.stack([self.example, self.query, self.key], 1)[chosen]

    def to(self, device: torch.device) -> Entries:
        """Return the entries on a device.

        Args:
            device: Where to.

        Returns:
            The entries.
        """
        tensors = ("score", "example", "query", "key")
        return dataclasses.replace(self, **{n: getattr(self, n).to(device) for n in tensors})

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.score)

    @property
    def row(self) -> Tensor:
        """Index of score and example together, ``[entry]``."""
        return self.score * self.examples + self.example


@dataclass(frozen=True)
class Reach:
    """Which entries a site's mask leaves reachable, and what uniform attention would give them.

    Args:
        weight: Weight of each entry in its sequence's mean, ``[entry, 1 or head]``; 0 where masked.
        null: Value under uniform attention over the keys that a query may look at,
            ``[score, example, 1 or head]``; NaN where there is no query.
        excluded: Queries without a reachable target, ``[score]``; they are not in the mean.
    """

    weight: Tensor
    null: Tensor
    excluded: Tensor

    @classmethod
    def of(cls, entries: Entries, site: Site) -> Reach:
        """Work it out from the mask of a site.

        Args:
            entries: The entries.
            site: The site.

        Returns:
            The reach.
        """
        reached, keys = _reached(entries, site)
        rows, size = entries.row, len(entries.names) * entries.examples
        place = rows * entries.positions + entries.query
        queries, inverse = torch.unique(place, return_inverse=True)
        zero = reached.new_zeros(len(queries), reached.shape[1], dtype=torch.float32)
        hit = zero.index_add(0, inverse, reached.float()) > 0
        row_of_query = queries // entries.positions
        empty = reached.new_zeros(size, reached.shape[1], dtype=torch.float32)
        count = empty.index_add(0, row_of_query, hit.float())
        null = empty.index_add(0, rows, reached.float() / keys) / count
        missed = (~hit).amax(1) if hit.numel() else hit.new_zeros(0)
        excluded = torch.zeros(len(entries.names), dtype=torch.long, device=reached.device)
        excluded.index_add_(0, row_of_query // entries.examples, missed.long())
        shape = (len(entries.names), entries.examples, -1)
        return cls(reached / count[rows].clamp(min=1), null.reshape(shape), excluded)


class Means:
    """Means of the entries at each site, gathered while a model runs under a tap.

    Args:
        entries: What is read.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.scores: list[Tensor] = []
        self.reaches: list[Reach] = []
        self._last: tuple[Tensor | None, bool, Reach] | None = None
        self._blocks: dict[int, list[tuple[slice, slice, Tensor]]] = {}

    def add(self, site: Site) -> None:
        """Add the means of one site, ``[score, example, head]``.

        Args:
            site: An attention of the model over the tokens themselves.
        """
        entries, reach = self.entries, self._reach(site)
        plain = torch.is_grad_enabled() or site.probabilities is not None
        values = self._from_pattern(site) if plain else self._from_logits(site)
        values = values.where(reach.weight > 0, 0.0) * reach.weight.to(values.dtype)
        sums = values.new_zeros(len(entries.names) * entries.examples, values.shape[1])
        sums = sums.index_add(0, entries.row, values)
        sums = sums.reshape(len(entries.names), entries.examples, -1)
        self.scores.append(sums.where(reach.null.isfinite(), torch.nan))
        self.reaches.append(reach)

    def _reach(self, site: Site) -> Reach:
        # Layers usually share one mask, and what it allows takes longer to find than a score.
        if self._last is not None:
            mask, causal, reach = self._last
            if mask is site.mask and causal == site.causal:
                return reach
        with torch.no_grad():
            reach = Reach.of(self.entries, site)
        self._last = (site.mask, site.causal, reach)
        return reach

    def _from_pattern(self, site: Site) -> Tensor:
        e = self.entries
        if site.probabilities is not None:
            values = site.probabilities[e.example, :, e.query, e.key]
            return values.float() if values.element_size() < 4 else values
        return site.pattern()[e.example, :, e.query, e.key]

    def _from_logits(self, site: Site) -> Tensor:
        e = self.entries
        found = widened(site.q.new_zeros(())).new_zeros(len(e), site.heads)
        for examples, queries, inside in self._plan(site):
            example, query, key = e.example[inside], e.query[inside], e.key[inside]
            here = (example - examples.start, slice(None), query - queries.start)
            if site.normalizers is None:
                logits = site.logits(examples, queries)
                values = logits[(*here, key)] - logits.logsumexp(-1)[here]
            else:
                # Masked entries have no weight, so what is not masked needs no mask.
                products = grouped_product(site.q[examples, :, queries], site.k[examples].mT)
                values = products[(*here, key)] * site.scale + site.bias(example, query, key)
                values -= site.normalizers[example, :, query]
            found[inside] = values.exp_()
        return found

    def _plan(self, site: Site) -> list[tuple[slice, slice, Tensor]]:
        """Return blocks of examples and queries, with the entries inside each."""
        width = site.heads * site.k.shape[2]
        if width not in self._blocks:
            self._blocks[width] = list(_blocks(self.entries, width, split=True))
        return self._blocks[width]


def _blocks(e: Entries, width: int, *, split: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of examples (all at once, or split) and queries, with the entries inside."""
    rows = max(1, min(e.positions, BLOCK // width))
    many = max(1, BLOCK // (width * e.positions)) if split else max(1, e.examples)
    for first in range(0, e.examples, many):
        for top in range(0, e.positions, rows):
            here = (e.example >= first) & (e.example < first + many)
            inside = (here & (e.query >= top) & (e.query < top + rows)).nonzero()[:, 0]
            if len(inside):
                last = min(first + many, e.examples)
                yield slice(first, last), slice(top, min(top + rows, e.positions)), inside


def _reached(e: Entries, site: Site) -> tuple[Tensor, Tensor]:
    """Return whether each entry is reachable, and how many keys its query can reach."""
    if site.mask is None:
        keys = e.query + 1 if site.causal else torch.full_like(e.query, site.k.shape[2])
        allowed = e.key <= e.query if site.causal else torch.ones_like(e.key, dtype=torch.bool)
        return allowed[:, None], keys[:, None].float()
    shape = tuple(site.mask.shape[:-2])[-2:]
    batch, heads = (1,) * (2 - len(shape)) + shape
    width = heads * site.k.shape[2]
    allowed = e.key.new_zeros(len(e), heads, dtype=torch.bool)
    keys = e.key.new_zeros(len(e), heads, dtype=torch.float32)
    # In blocks: what a mask allows would take position x position for each sequence.
    for examples, queries, inside in _blocks(e, width, split=batch > 1):
        mask = site.reachable(examples, queries)
        if mask is not None:
            example = (e.example[inside] - examples.start) * (len(mask) > 1)
            place = (example, slice(None), e.query[inside] - queries.start)
            allowed[inside] = mask[(*place, e.key[inside])]
            keys[inside] = mask.sum(-1)[place].float()
    return allowed, keys.clamp(min=1)


def _apart(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Return other ids, by which equal tokens of two documents are two tokens."""
    if documents is None or not tokens.numel():
        return tokens
    return tokens + (tokens.max() + 1 - tokens.min()) * documents.long()


def queries_of(tokens: Tensor, documents: Tensor | None = None, least: int = 2) -> Tensor:
    """Return every query that has at least so many tokens of its own document before it.

    Args:
        tokens: Ids ``[example, position]``.
        documents: 0 at padding, else the number of the document; None means one a row.
        least: Number of tokens before it.

    Returns:
        Long ``[query, 3]``: example, query position, first position of its document.
    """
    number = torch.ones_like(tokens) if documents is None else documents.long()
    real = number > 0
    count = real.long().cumsum(1) - 1
    begins = real & torch.cat([real[:, :1], number[:, 1:] != _last_real(number)[:, :-1]], 1)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = torch.where(begins, places, 0).cummax(1).values
    found = (real & (count - count.gather(1, first) >= least)).nonzero()
    return torch.cat([found, first[found[:, 0], found[:, 1], None]], 1)


def _last_real(number: Tensor) -> Tensor:
    """Return the latest document number up to each position, 0 before the first."""
    return number.cummax(1).values
