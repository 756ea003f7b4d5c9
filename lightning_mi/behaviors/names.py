"""Indirect-object identification: which of two people was given something (Wang et al. 2022)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .metrics import Metric
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

ORDERS = ("both", "receiver_first", "giver_first")


@dataclass(frozen=True)
class IndirectObject:
    """Two people, one of whom gives something to the other: to whom? (Wang et al. 2022).

    "When Mary and John went to the store, John gave a drink to" goes on with " Mary".

    Half of the prompts name the receiver first, half second (``groups``: template and order). The
    answer is the name that is not repeated, the wrong one the name that is.

    Positions: ``first_name``, ``second_name``, ``subject`` (the repeated name, second time),
    ``last``.

    Args:
        tokenizer: See `encoding.encoder`; names that are several tokens are left out.
        pairs: Number of pairs.
        corruption: ``"swap"`` repeats the other name, so that the answers change places;
            ``"other"`` repeats nobody: the subject becomes a third name, and the answers are
            equally likely.
        order: Who is named first: half and half, always the receiver, or always the giver.
        metric: What is compared; one of `metrics.METRICS`.
        names: Names to draw from.
        prefix: Ids in front of every prompt.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If corruption or order has another name.
    """

    tokenizer: Any
    pairs: int = 16
    corruption: Literal["swap", "other"] = "swap"
    order: Literal["both", "receiver_first", "giver_first"] = "both"
    metric: Metric = "logit_difference"
    names: tuple[str, ...] = NAMES
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the names of the choices."""
        allowed = {"corruption": ("swap", "other"), "order": ORDERS}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ArgumentError.of(
                    name, expected=f"one of {choices}", got=repr(getattr(self, name)), do="Choose."
                )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: whoever is named first, the answer is the receiver.

        Returns:
            ``order_insensitivity``: accuracies of the two orders within .15, each above .5.
        """
        first = dataclasses.replace(self, order="receiver_first")
        second = dataclasses.replace(self, order="giver_first")
        return (
            Characteristic(
                "order_insensitivity",
                "The receiver is found by not being repeated, not by the place of the name.",
                {"receiver_first": first, "giver_first": second},
                (
                    Expectation("receiver_first", "near", "giver_first", 0.15),
                    Expectation("receiver_first", "above", 0.5),
                    Expectation("giver_first", "above", 0.5),
                ),
            ),
        )

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
            characteristics=self.characteristics(),
        )

    def _candidates(self) -> Iterator[Pair]:
        draw = random.Random(self.seed)
        for number in range(64 * self.pairs):
            kind, flipped = number % len(TEMPLATES), number // len(TEMPLATES) % 2
            if self.order != "both":
                flipped = int(self.order == "receiver_first")
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
