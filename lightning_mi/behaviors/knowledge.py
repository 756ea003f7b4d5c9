"""Knowledge recall: an attribute of a subject that only the weights can know."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .facts import RELATIONS, Relation
from .metrics import Metric
from .prompts import Pair, gathered

__all__ = ["KnowledgeRecall"]


@dataclass(frozen=True)
class KnowledgeRecall:
    """A subject goes in, its attribute comes out: "The capital of France is" (Meng et al. 2022).

    The corrupted prompt names another subject of the same relation, as many tokens long, with
    another attribute: that is the wrong answer. ``groups`` is the relation. Positions: ``subject``
    and ``subject_last`` (first and last token of the subject), ``last``.

    Each subject of a relation is asked about once, so that parts of a split share none.

    Args:
        tokenizer: See `encoding.encoder`.
        pairs: Number of pairs.
        relations: What is asked; None takes the facts that come with the package.
        wording: Which of a relation's wordings is used.
        padding: Id that fills shorter prompts up on the right, so that subjects of any length can
            stand in one batch; None takes prompts of one length.
        metric: One of `metrics.METRICS`.
        prefix: Ids in front of every prompt.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If a relation has no such wording, or a wording no ``{subject}``.
    """

    tokenizer: Any
    pairs: int = 16
    relations: tuple[Relation, ...] | None = None
    wording: int = 0
    padding: int | None = None
    metric: Metric = "logit_difference"
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that every relation can be asked in this wording."""
        for relation in self._relations:
            templates = relation.templates
            if not 0 <= self.wording < len(templates):
                raise ArgumentError.of(
                    "wording",
                    expected=f"0 to {len(templates) - 1} for {relation.name!r}",
                    got=self.wording,
                    do="Give the relation more templates.",
                )
            if templates[self.wording].count("{subject}") != 1:
                raise ArgumentError.of(
                    "relations",
                    expected="templates with {subject} in them, once",
                    got=repr(templates[self.wording]),
                    do="For example 'The capital of {subject} is'.",
                )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: the wording makes no difference.

        Returns:
            ``wording_insensitivity``: accuracies of the first two wordings within .15, each above
            .5; nothing where a relation has one wording only.
        """
        if min(len(relation.templates) for relation in self._relations) < 2:
            return ()
        each = {
            name: dataclasses.replace(self, wording=i) for i, name in enumerate(("first", "second"))
        }
        return (
            Characteristic(
                "wording_insensitivity",
                "The attribute comes with the subject, however the question is put.",
                each,
                (
                    Expectation("first", "near", "second", 0.15),
                    Expectation("first", "above", 0.5),
                    Expectation("second", "above", 0.5),
                ),
            ),
        )

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            Clean and corrupted prompts, row by row of one length.
        """
        return gathered(
            "knowledge_recall",
            self._candidates(),
            self.tokenizer,
            self.pairs,
            prefix=self.prefix,
            metric=self.metric,
            padding=self.padding,
            characteristics=self.characteristics(),
        )

    @property
    def _relations(self) -> tuple[Relation, ...]:
        return RELATIONS if self.relations is None else self.relations

    def _candidates(self) -> Iterator[Pair]:
        draw = random.Random(self.seed)
        asked = [
            (group, relation, fact)
            for group, relation in enumerate(self._relations)
            for fact in relation.facts
        ]
        draw.shuffle(asked)
        for group, relation, (subject, attribute) in asked:
            others = [fact for fact in relation.facts if fact[1] != attribute]
            for other, wrong in draw.sample(others, len(others)):
                yield Pair(
                    self._pieces(relation, subject),
                    self._pieces(relation, other),
                    f" {attribute}",
                    f" {wrong}",
                    group=group,
                    key=f"{relation.name}: {subject}",
                )

    def _pieces(self, relation: Relation, subject: str) -> list[tuple[str, str] | str]:
        before, after = relation.templates[self.wording].split("{subject}")
        spaced = subject
        if before.endswith(" "):  # The space belongs to the word that follows it.
            before, spaced = before[:-1], f" {subject}"
        pieces: list[tuple[str, str] | str] = [("subject|subject_last", spaced), after]
        return [before, *pieces] if before else pieces
