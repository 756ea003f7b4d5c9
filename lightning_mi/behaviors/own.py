"""A behavior of your own, out of prompts that you write yourself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..behavior import Behavior
from ..errors import ArgumentError
from .metrics import Metric
from .prompts import Pair, Pieces, gathered

__all__ = ["PromptPairs"]


@dataclass(frozen=True)
class PromptPairs:
    """Clean and corrupted prompts as they are given, each with what goes on after it.

    Every pair must be usable: where the two prompts are not equally many tokens, or the answers
    begin with the same one, the error says so. For pairs that are drawn, and may be left out, see
    `prompts.gathered`.

    Args:
        tokenizer: See `encoding.encoder`.
        prompts: Rows (clean, corrupted, answer, wrong). A prompt is a text, in which
            ``[name: words]`` marks a position of interest, the last token of the words. A space
            before the bracket belongs to the words.
        name: How it is called in the report.
        padding: Id that fills shorter prompts up on the right; None wants prompts of one length.
        metric: One of `metrics.METRICS`.
        prefix: Ids in front of every prompt.

    Example:
        >>> words = "the key keys on table is are".split()
        >>> row = ("the [noun: keys] on the table", "the key on the table", " are", " is")
        >>> made = PromptPairs(words, [row]).behavior()
        >>> made.clean.tolist(), made.positions, made.answers.tolist()
        ([[0, 2, 3, 0, 4]], {'last': [4], 'noun': [1]}, [6])
    """

    tokenizer: Any
    prompts: tuple[tuple[str, str, str, str], ...] | list[tuple[str, str, str, str]]
    name: str = "behavior"
    padding: int | None = None
    metric: Metric = "logit_difference"
    prefix: tuple[int, ...] = ()

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            All of them, in their order.
        """
        return gathered(
            self.name,
            self._pairs(),
            self.tokenizer,
            None,
            prefix=self.prefix,
            metric=self.metric,
            padding=self.padding,
        )

    def _pairs(self) -> Iterator[Pair]:
        for row in self.prompts:
            if len(row) != 4:
                raise ArgumentError.of(
                    "prompts",
                    expected="rows (clean, corrupted, answer, wrong)",
                    got=f"{len(row)} entries",
                    do="For example ('2 + 2 =', '2 + 3 =', ' 4', ' 5').",
                )
            clean, corrupted, answer, wrong = row
            yield Pair(_pieces(clean), _pieces(corrupted), answer, wrong)


def _pieces(prompt: str) -> Pieces:
    """Split "the [noun: keys] are" into pieces, the marked ones beside their names."""
    pieces: list[tuple[str, str] | str] = []
    plain, *marked = prompt.split("[")
    for part in marked:
        inside, closed, rest = part.partition("]")
        name, colon, words = inside.partition(":")
        if not closed or not colon:
            raise ArgumentError.of(
                "prompts",
                expected="marks of the form [name: words]",
                got=repr(prompt),
                do="Use gathered(…, [Pair(…)]) for prompts that hold brackets.",
            )
        space = " " if plain.endswith(" ") else ""
        pieces += [plain[: len(plain) - len(space)]] if plain[: len(plain) - len(space)] else []
        pieces.append((name.strip(), space + words.strip()))
        plain = rest
    return [*pieces, plain] if plain else pieces
