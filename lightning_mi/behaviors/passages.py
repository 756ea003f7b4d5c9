"""Induction on real text: a passage begins a second time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..behavior import Behavior
from ..characteristic import Characteristic
from ..errors import ArgumentError
from .copying import Blocks, Corruption, copied, distance, partners, shown_of
from .encoding import encoder, loaded
from .metrics import Metric

__all__ = ["RepeatedText"]


@dataclass(frozen=True)
class RepeatedText:
    """Passages of real text that begin a second time: [BOS] r_1 … r_L r_1 … r_k.

    As `RepeatedTokens`, with blocks out of a text, so that what a model knows about language
    competes with the copy. A passage is taken where its trigger r_k and its answer r_{k+1} occur
    once in it; what the corrupted prompts carry instead comes from another passage.

    Args:
        text: The text, or its token ids ``[position]`` (a tensor or a list).
        tokenizer: See `encoding.encoder`; not needed for ids.
        length: L, tokens in a passage.
        passages: Number of passages.
        corruption: What the corrupted prompts lack; see `copying.copied`.
        shown: k; None shows half.
        bos: Token in front, None for none.
        metric: One of `metrics.METRICS`.
        seed: Seed of the draw.

    Example:
        >>> words = "the cat sat on the mat and a dog lay in front of its warm red house".split()
        >>> text = RepeatedText(" ".join(words), words, length=6, passages=2).behavior()
        >>> text.clean.shape, text.positions
        (torch.Size([2, 9]), {'trigger': 2, 'answer': 3, 'last': 8})
    """

    text: Any
    tokenizer: Any = None
    length: int = 16
    passages: int = 16
    corruption: Corruption = "answer"
    shown: int | None = None
    bos: int | None = None
    metric: Metric = "logit_difference"
    seed: int = 0

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: the copy depends on the match, not on the distance.

        Returns:
            ``distance_insensitivity``, for passages of eight tokens or more.
        """
        if self.length < 8:
            return ()
        short = dataclasses.replace(self, length=self.length // 2, shown=None)
        return (distance(self, short),)

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            One pair a passage.

        Raises:
            ArgumentError: If the text has too few such passages, or ``shown`` is out of range.
        """
        k = shown_of(self.shown, self.length)
        blocks = self._blocks(k, torch.Generator().manual_seed(self.seed))
        made = copied(blocks, self.corruption, self.metric, "induction_text")
        made.characteristics = self.characteristics()
        made.texts = self._texts(made)
        return made

    def _blocks(self, k: int, generator: torch.Generator) -> Blocks:
        """Draw passages that do not overlap, and to each another one of which it has nothing."""
        windows = self._stream().unfold(0, self.length, self.length)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        partner = partners(windows, k, generator)
        count = [(windows == windows[:, [place]]).sum(1) for place in (k - 1, k)]
        usable = (count[0] == 1) & (count[1] == 1)
        if self.corruption == "trigger":
            usable &= partner >= 0
        own, others, place = [], [], []
        for index in usable.nonzero()[:, 0].tolist():
            # The passage after it, unless that one holds the trigger or the answer itself.
            foreign = ~((windows == windows[index, k]) | (windows == windows[index, k - 1])).any(1)
            foreign &= ~(windows[:, [k]] == windows[index]).any(1)
            found = foreign.roll(-index - 1).nonzero()[:, 0]
            if len(found):
                own.append(index)
                others.append((int(found[0]) + index + 1) % len(windows))
                place.append(int(partner[index]))
            if len(own) == self.passages:
                swap = torch.tensor(place) if self.corruption == "trigger" else None
                return Blocks(windows[own], windows[others], swap, k, self.bos)
        raise ArgumentError.of(
            "text",
            expected=f"{self.passages} passages of {self.length} tokens, in which the trigger and "
            "the answer occur once",
            got=f"{len(own)} of {len(windows)}",
            do="Give a longer text, or ask for fewer or shorter passages.",
        )

    def _stream(self) -> Tensor:
        ids = encoder(self.tokenizer)(self.text) if isinstance(self.text, str) else self.text
        if not isinstance(ids, Tensor | Sequence | np.ndarray):
            raise ArgumentError.of(
                "text",
                expected="a text, or its token ids",
                got=type(ids).__name__,
                do="The text comes first, then the tokenizer.",
            )
        stream = torch.as_tensor(ids).long()
        if stream.ndim != 1 or len(stream) < 2 * self.length:
            raise ArgumentError.of(
                "text",
                expected=f"a text or ids [position] of at least {2 * self.length} tokens",
                got=f"ids of shape {tuple(stream.shape)}",
                do="Give a longer text, or ask for shorter passages.",
            )
        return stream

    def _texts(self, made: Behavior) -> list[tuple[str, str]]:
        decode = getattr(loaded(self.tokenizer), "decode", None)
        if not callable(decode):
            return []
        return [
            (str(decode(clean.tolist())), str(decode(corrupted.tolist())))
            for clean, corrupted in zip(made.clean, made.corrupted, strict=True)
        ]
