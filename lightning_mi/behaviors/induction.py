"""Induction on random tokens: a block is repeated, so that its second copy can be predicted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..behavior import Behavior
from ..characteristic import Characteristic
from ..checks import counted
from ..errors import ArgumentError
from .copying import Blocks, Corruption, copied, distance, partners, shown_of
from .metrics import Metric

__all__ = ["RepeatedTokens", "matches"]

PAIRS = 1 << 20
"""Pairs of positions compared at a time."""


@dataclass(frozen=True)
class RepeatedTokens:
    """Random tokens that repeat: [BOS] r_1 … r_L, r_1 … r_L, … (Olsson et al. 2022).

    The tokens of a block are uniform over the vocabulary without ``bos`` and ``special``, and
    distinct inside a block, so that every token of a later copy has occurred exactly once in each
    copy before. They come from a generator of their own: the same arguments give the same tokens.

    Args:
        vocabulary_size: Number of token ids; None leaves it to whoever calls the methods.
        length: L, tokens in a block.
        repeats: Number of copies, at least 2.
        sequences: Number of sequences.
        bos: Token put in front, never in place of a block's token; None puts none.
        special: Token ids that are not drawn.
        seed: Seed of the generator.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> RepeatedTokens(length=3, sequences=1, bos=0).tokens(10).shape
        torch.Size([1, 7])
    """

    vocabulary_size: int | None = None
    length: int = 32
    repeats: int = 2
    sequences: int = 4
    bos: int | None = None
    special: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        object.__setattr__(self, "special", tuple(int(i) for i in self.special))
        for name, least in (("length", 2), ("repeats", 2), ("sequences", 1)):
            counted(name, getattr(self, name), least)

    @property
    def start(self) -> int:
        """Position of the first token of the first block: 1 with ``bos``, else 0."""
        return 0 if self.bos is None else 1

    @property
    def positions(self) -> int:
        """Length of a sequence."""
        return self.start + self.length * self.repeats

    def tokens(self, vocabulary_size: int | None = None) -> Tensor:
        """Return the repeated tokens.

        Args:
            vocabulary_size: Used where the protocol itself has none.

        Returns:
            Long tensor ``[sequence, position]`` on the CPU.
        """
        draws = self._draws(vocabulary_size, self.length, 0)
        return self._sequences([draw.repeat(self.repeats) for draw in draws])

    def matched(self, vocabulary_size: int | None = None) -> Tensor:
        """Return the matched control: all blocks but the last are replaced by fresh tokens.

        The last block is that of `tokens`. Nothing has occurred before, so whatever a head shows
        at the same entries of the pattern it shows for their position alone.

        Args:
            vocabulary_size: Used where the protocol itself has none.

        Returns:
            Long tensor ``[sequence, position]`` on the CPU.
        """
        draws = self._draws(vocabulary_size, self.length * self.repeats, 0)
        return self._sequences([torch.cat([d[self.length :], d[: self.length]]) for d in draws])

    def random_period(self, vocabulary_size: int | None = None) -> Tensor:
        """Return repeated tokens whose period differs from sequence to sequence.

        The period is uniform from ⌈L/2⌉ to L−1, never L itself; fresh tokens fill the rest. A head
        that attends at a fixed offset cannot keep up.

        Args:
            vocabulary_size: Used where the protocol itself has none.

        Returns:
            Long tensor ``[sequence, position]`` on the CPU.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        least = (self.length + 1) // 2
        periods = torch.randint(
            least, max(self.length, least + 1), (self.sequences,), generator=generator
        )
        total = self.length * self.repeats
        rows = []
        for draw, period in zip(
            self._draws(vocabulary_size, total, 1), periods.tolist(), strict=True
        ):
            block = draw[:period].repeat(self.repeats)
            rows.append(torch.cat([block, draw[period:]])[:total])
        return self._sequences(rows)

    def fitted(self, vocabulary_size: int, positions: int | None = None) -> RepeatedTokens:
        """Return the protocol with blocks short enough for a model.

        Args:
            vocabulary_size: The model's number of token ids.
            positions: The longest sequence it takes, None where unknown.

        Returns:
            The protocol, with its vocabulary size filled in.

        Raises:
            ArgumentError: If not even blocks of two tokens fit.
        """
        size = self.vocabulary_size or vocabulary_size
        longest = len(self._allowed(size)) // self.repeats
        if positions is not None:
            longest = min(longest, (positions - self.start) // self.repeats)
        if longest < 2:
            raise ArgumentError.of(
                "tokens",
                expected="room for two blocks of two distinct tokens",
                got=f"{size} token ids and {positions} positions",
                do="Use a model with a larger vocabulary and context.",
            )
        return dataclasses.replace(self, vocabulary_size=size, length=min(self.length, longest))

    def behavior(
        self,
        corruption: Corruption = "answer",
        *,
        shown: int | None = None,
        vocabulary_size: int | None = None,
        metric: Metric = "logit_difference",
    ) -> Behavior:
        """Return prompts that stop inside the last copy: see `copying.copied`.

        The clean prompts are those of `tokens`, cut.

        Args:
            corruption: What the corrupted prompts lack: ``"answer"``, ``"trigger"``, ``"block"``.
            shown: k, tokens of the last copy that are shown, from 1 to L − 1; None shows half.
            vocabulary_size: Used where the protocol itself has none.
            metric: One of `metrics.METRICS`.

        Returns:
            One pair a sequence.

        Raises:
            ArgumentError: If ``shown`` is out of range, or the block too short for a swap.
        """
        k = shown_of(shown, self.length)
        fresh = {"answer": 1, "block": self.length}.get(corruption, 0)
        draws = torch.stack(self._draws(vocabulary_size, self.length + fresh, 0))
        own, other = draws[:, : self.length], draws[:, : self.length].clone()
        other[:, k] = draws[:, -1]
        if corruption == "block":
            other = draws[:, self.length :]
        generator = torch.Generator().manual_seed(self.seed + 2)
        partner = partners(own, k, generator) if corruption == "trigger" else None
        if partner is not None and bool((partner < 0).any()):
            raise ArgumentError.of(
                "length",
                expected="a block of five tokens or more, where there is one to swap with",
                got=self.length,
                do="Lengthen the blocks, or take another corruption.",
            )
        blocks = Blocks(own, other, partner, k, self.bos, self.repeats)
        made = copied(blocks, corruption, metric, "induction")
        size = self.vocabulary_size or vocabulary_size
        made.characteristics = dataclasses.replace(self, vocabulary_size=size).characteristics()
        return made

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: what is copied depends on the match, not on the distance.

        Returns:
            ``distance_insensitivity``: accuracies with blocks of half and of full length within
            .15. It is left out where blocks are too short to be halved.
        """
        if self.length < 8:
            return ()
        short = dataclasses.replace(self, length=self.length // 2)
        return (distance(self, short),)

    def _allowed(self, size: int) -> Tensor:
        excluded = [*self.special, *(() if self.bos is None else (self.bos,))]
        kept = torch.ones(size, dtype=torch.bool)
        kept[[i for i in excluded if 0 <= i < size]] = False
        return kept.nonzero()[:, 0]

    def _draws(self, vocabulary_size: int | None, count: int, stream: int) -> list[Tensor]:
        size = self.vocabulary_size or vocabulary_size
        if size is None:
            raise ArgumentError.of(
                "vocabulary_size", expected="a number", got="None", do="Pass it here or above."
            )
        allowed = self._allowed(size)
        if len(allowed) < count:
            raise ArgumentError.of(
                "length",
                expected=f"at most {len(allowed) // max(1, count // self.length)} with {size} ids",
                got=self.length,
                do="Shorten the blocks.",
            )
        generator = torch.Generator().manual_seed(self.seed + stream)
        return [
            allowed[torch.randperm(len(allowed), generator=generator)[:count]]
            for _ in range(self.sequences)
        ]

    def _sequences(self, rows: list[Tensor]) -> Tensor:
        tokens = torch.stack(rows)
        if self.bos is None:
            return tokens
        return torch.cat([torch.full_like(tokens[:, :1], self.bos), tokens], 1)


def matches(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return every earlier occurrence of every token.

    Args:
        tokens: Ids ``[sequence, position]``.
        mask: True at real tokens ``[sequence, position]``; None means all.

    Returns:
        Long tensor ``[match, 3]``: sequence, position t, position p < t with the same token.

    Example:
        >>> matches(torch.tensor([[5, 6, 5]]))
        tensor([[0, 2, 0]])
    """
    found = [tokens.new_zeros(0, 3, dtype=torch.long)]
    length = tokens.shape[1]
    rows = max(1, PAIRS // max(1, length))  # position x position would not fit in memory
    for index, row in enumerate(tokens):
        real = None if mask is None else mask[index].bool()
        for top in range(0, length, rows):
            later = row[top : top + rows, None]
            same = (later == row).tril(top - 1)
            if real is not None:
                same &= real & real[top : top + rows, None]
            pairs = same.nonzero()
            pairs[:, 0] += top
            found.append(torch.cat([torch.full_like(pairs[:, :1], index), pairs], 1))
    return torch.cat(found)
