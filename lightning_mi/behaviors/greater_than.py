"""Greater-than: a war that began in 1732 ended in 17… (Hanna et al. 2023)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .metrics import Metric
from .prompts import Pair, gathered

__all__ = ["GreaterThan"]

NOUNS = (
    *("war", "siege", "drought", "famine", "dispute", "trial", "reign", "expedition", "strike"),
    *("rebellion", "alliance", "project", "journey", "plague", "quarrel", "occupation"),
)


@dataclass(frozen=True)
class GreaterThan:
    """Something lasted from the year 1732 to the year 17…: any later year (Hanna et al. 2023).

    The answers are sets. A token is right if it can begin later years only, wrong if it can begin
    earlier ones (or the same) only, and neither if it can begin both: so the question is the same
    for vocabularies with two-digit tokens, and for those of single digits. What is compared by
    default is the probability of the right tokens minus that of the wrong ones, at the last
    position.

    The corrupted prompt begins in 1701, after which every year is later; it is judged by the years
    of the clean one. ``groups`` is the century. Positions: ``noun``, ``shown`` and ``year`` (in the
    first year, the last tokens of the digits that are shown again, and of the rest), ``last``.

    Args:
        tokenizer: See `encoding.encoder`.
        pairs: Number of pairs.
        shown: Digits of the second year that are shown, 2 or 3. Vocabularies of three-digit tokens
            need 3.
        centuries: First two digits of the years.
        nouns: What lasted.
        metric: One of `metrics.METRICS`; ``logit_difference`` is that of the two sets' logsumexp.
        prefix: Ids in front of every prompt.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If ``shown`` is neither 2 nor 3, or a century has not two digits.
    """

    tokenizer: Any
    pairs: int = 16
    shown: int = 2
    centuries: tuple[int, ...] = (13, 14, 15, 16, 17, 18)
    nouns: tuple[str, ...] = NOUNS
    metric: Metric = "probability_difference"
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.shown not in (2, 3):
            raise ArgumentError.of("shown", expected="2 or 3", got=self.shown, do="Change it.")
        if not self.centuries or any(not 10 <= c <= 99 for c in self.centuries):
            raise ArgumentError.of(
                "centuries", expected="numbers of two digits", got=self.centuries, do="Change them."
            )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: it works in any century.

        Returns:
            ``century_insensitivity``: in each, later years outweigh earlier ones in more than half
            of the prompts, and accuracies are within .2 of the first.
        """
        each = {
            f"{century}00s": dataclasses.replace(self, centuries=(century,))
            for century in self.centuries
        }
        first, *others = each
        near = [Expectation(other, "near", first, 0.2) for other in others]
        above = [Expectation(century, "above", 0.5) for century in each]
        return (
            Characteristic(
                "century_insensitivity",
                "Later years are preferred whatever the century.",
                each,
                (*above, *near),
            ),
        )

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            Clean and corrupted prompts of one length.
        """
        return gathered(
            "greater_than",
            self._candidates(),
            self.tokenizer,
            self.pairs,
            prefix=self.prefix,
            metric=self.metric,
            characteristics=self.characteristics(),
        )

    def _candidates(self) -> Iterator[Pair]:
        draw = random.Random(self.seed)
        digits = 4 - self.shown
        for _ in range(64 * self.pairs):
            noun, century = draw.choice(self.nouns), draw.choice(self.centuries)
            decade = "" if self.shown == 2 else str(draw.randrange(1, 10))
            # Neither the first years, which leave nothing earlier, nor the last.
            rest = draw.randrange(2, 10**digits - 1)
            years = [f"{year:0{digits}d}" for year in range(10**digits)]

            def pieces(year: str) -> list[tuple[str, str] | str]:
                return [
                    "The",
                    ("noun", f" {noun}"),  # noqa: B023 - called at once
                    " lasted from the year",
                    ("shown", f" {century}{decade}"),  # noqa: B023
                    ("year", year),
                    f" to the year {century}{decade}",  # noqa: B023
                ]

            yield Pair(
                pieces(years[rest]),
                pieces(years[1]),
                years[rest + 1 :],
                years[: rest + 1],
                group=self.centuries.index(century),
                key=f"{noun} {century}{decade}{rest}",
            )
