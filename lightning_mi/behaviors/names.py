"""Indirect-object identification: which of two people was given something (Wang et al. 2022)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..behavior import Behavior
from .prompts import Pair, gathered

__all__ = ["IndirectObject"]

NAMES = (
    *("Mary", "John", "Tom", "James", "Sarah", "Paul", "Anna", "Peter", "Emma", "Mark", "Laura"),
    *("David", "Alice", "Robert", "Susan", "Kevin", "Karen", "Michael", "Lisa", "George", "Jane"),
    *("Daniel", "Kate", "Simon", "Rachel", "Steven", "Helen", "Andrew", "Julia", "Thomas"),
)
PLACES = ("store", "school", "office", "park", "station", "house", "garden", "restaurant")
THINGS = ("drink", "book", "ring", "letter", "basket", "ball", "computer", "key")
VERBS = ("gave", "handed", "offered", "brought")

TEMPLATES = (
    ("When{a} and{b} went to the {place},", " {verb} a {thing} to"),
    ("After{a} and{b} arrived at the {place},", " {verb} a {thing} to"),
    ("Then,{a} and{b} were working at the {place}, and", " {verb} a {thing} to"),
    ("While{a} and{b} were at the {place},", " {verb} the {thing} to"),
)
"""What is said before the name that is repeated, and after it."""


@dataclass(frozen=True)
class IndirectObject:
    """Two people, one of whom gives something to the other: to whom? (Wang et al. 2022).

    "When Mary and John went to the store, John gave a drink to" goes on with " Mary".

    Half of the prompts name the receiver first, half second (``groups``: template and order). The
    answer is the name that is not repeated, the wrong one the name that is.

    Positions: ``first_name``, ``second_name``, ``subject`` (the repeated name, second time),
    ``last``.

    Args:
        tokenizer: See `prompts.encoder`; names that are several tokens are left out.
        pairs: Number of pairs.
        corruption: ``"swap"`` repeats the other name, so that the answers change places;
            ``"other"`` repeats nobody: the subject becomes a third name, and the answers are
            equally likely.
        metric: What is compared; one of `prompts.METRICS`.
        names: Names to draw from.
        prefix: Ids in front of every prompt.
        seed: Seed of the draw.
    """

    tokenizer: Any
    pairs: int = 16
    corruption: Literal["swap", "other"] = "swap"
    metric: str = "logit_difference"
    names: tuple[str, ...] = NAMES
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            Clean and corrupted prompts of one length.
        """
        return gathered(
            "indirect_object",
            self._candidates(),
            self.tokenizer,
            self.pairs,
            prefix=self.prefix,
            metric=self.metric,
        )

    def _candidates(self) -> Iterator[Pair]:
        draw = random.Random(self.seed)
        for number in range(64 * self.pairs):
            kind, flipped = number % len(TEMPLATES), number // len(TEMPLATES) % 2
            receiver, giver, third = draw.sample(self.names, 3)
            words = {"place": draw.choice(PLACES), "thing": draw.choice(THINGS)}
            words["verb"] = draw.choice(VERBS)
            first, second = (receiver, giver) if flipped else (giver, receiver)
            other = receiver if self.corruption == "swap" else third

            def pieces(subject: str) -> list[tuple[str, str] | str]:
                before, after = TEMPLATES[kind]  # noqa: B023 - called at once
                opening, rest = before.split("{a}")
                middle, ending = rest.split("{b}")
                return [
                    opening,
                    ("first_name", f" {first}"),  # noqa: B023
                    middle,
                    ("second_name", f" {second}"),  # noqa: B023
                    ending.format(**words),  # noqa: B023
                    ("subject", f" {subject}"),
                    after.format(**words),  # noqa: B023
                ]

            yield Pair(
                pieces(giver), pieces(other), f" {receiver}", f" {giver}", 2 * kind + flipped
            )
