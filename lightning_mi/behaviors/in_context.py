"""In-context learning: the prompt shows what is wanted by examples (Brown et al. 2020)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .encoding import Encode, encoder
from .metrics import Metric
from .prompts import Pair, gathered
from .sentences import SENTENCES

__all__ = ["InContextLearning"]

Labels = Literal["gold", "random", "flipped"]
Example = tuple[str, str]


@dataclass(frozen=True)
class InContextLearning:
    """k labelled examples and a query, whose label is asked for.

    "Review: the soup tasted awful⏎Sentiment: negative⏎⏎Review: the film was wonderful⏎Sentiment:"
    goes on with " positive", the query's own label, whatever the labels of the examples.

    Three kinds of labels and none at all (``shots=0``) tell whether the model learns a mapping from
    the examples or only recognises what is asked (Min et al. 2022): the queries and examples of
    one seed are the same in all of them, in one order, so that answers can be compared pairwise.

    Prompts differ in length, so the batches are dictionaries with an ``attention_mask``, padded on
    the right. ``groups`` is the class of the query. Positions: ``query`` (last token of the query),
    ``label_1`` … ``label_k``, ``last``.

    Args:
        tokenizer: See `encoding.encoder`.
        pairs: Number of pairs of prompts.
        shots: k, examples before the query; classes take turns in a random order.
        labels: Labels of the examples: their own, drawn uniformly, or the next class in place of
            each (with two classes: all wrong).
        corruption: ``"query"`` puts a sentence of another class and of as many tokens, as similar
            as there is, in place of the query, so that the answer changes; ``"labels"`` moves every
            example's label to the next class, so that only what is shown changes.
        examples: Texts with their labels; None takes the sentences that come with the package.
            The answer is the first token of a label, so these must differ.
        text_name: Word before each text.
        label_name: Word before each label.
        metric: One of `metrics.METRICS`.
        padding: Id that fills shorter prompts up; it is masked.
        prefix: Ids in front of every prompt.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If a choice has another name, a number is out of range, or there are too few
            examples.
    """

    tokenizer: Any
    pairs: int = 16
    shots: int = 8
    labels: Labels = "gold"
    corruption: Literal["query", "labels"] = "query"
    examples: tuple[Example, ...] | None = None
    text_name: str = "Review"
    label_name: str = "Sentiment"
    metric: Metric = "logit_difference"
    padding: int = 0
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check choices, numbers and examples."""
        choices = {"labels": get_args(Labels), "corruption": ("query", "labels")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError.of(
                    name, expected=f"one of {allowed}", got=repr(getattr(self, name)), do="Choose."
                )
        if self.shots < (1 if self.corruption == "labels" else 0):
            raise ArgumentError.of(
                "shots",
                expected="at least 0, and at least 1 where labels are corrupted",
                got=self.shots,
                do="Change it.",
            )
        per_class = -(-self.shots // max(1, len(self.classes))) + 2
        counts = {c: sum(label == c for _, label in self._examples) for c in self.classes}
        if len(counts) < 2 or min(counts.values()) < per_class:
            raise ArgumentError.of(
                "examples",
                expected=f"two classes or more, with at least {per_class} texts each",
                got=counts,
                do="Give more examples, or ask for fewer shots.",
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, in the order in which they first appear."""
        return tuple(dict.fromkeys(label for _, label in self._examples))

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable of learning in context (Min et al. 2022; Yoo et al. 2022).

        Returns:
            ``label_insensitivity``: accuracies with random and with flipped labels within .1 of
            those with gold ones. ``demonstrations_help``: gold labels above no examples at all.
        """
        kinds: dict[str, InContextLearning] = {
            kind: dataclasses.replace(self, labels=kind) for kind in get_args(Labels)
        }
        kinds["zero_shot"] = dataclasses.replace(self, shots=0, corruption="query")
        # Half of random labels are right, none of flipped ones.
        same = tuple(Expectation(kind, "near", "gold", 0.1) for kind in ("random", "flipped"))
        return (
            Characteristic(
                "label_insensitivity",
                "The answer hardly depends on whether the examples carry their own labels.",
                kinds,
                same,
                paired=True,
            ),
            Characteristic(
                "demonstrations_help",
                "Examples with their own labels do better than none.",
                {kind: kinds[kind] for kind in ("gold", "zero_shot")},
                (Expectation("gold", "above", "zero_shot"),),
                paired=True,
            ),
        )

    def behavior(self) -> Behavior:
        """Return the prompts.

        Returns:
            Clean and corrupted prompts, row by row of one length.
        """
        return gathered(
            "in_context_learning",
            self._candidates(encoder(self.tokenizer)),
            self.tokenizer,
            self.pairs,
            prefix=self.prefix,
            metric=self.metric,
            padding=self.padding,
            characteristics=self.characteristics(),
        )

    @property
    def _examples(self) -> tuple[Example, ...]:
        return SENTENCES if self.examples is None else tuple((t, c) for t, c in self.examples)

    def _candidates(self, encode: Encode) -> Iterator[Pair]:
        draw = random.Random(self.seed)
        queries = list(self._examples)
        for number in range(64 * self.pairs):
            if number % len(queries) == 0:
                draw.shuffle(queries)
            query = queries[number % len(queries)]
            # One draw a prompt, whatever is done with it: kinds of labels stay comparable.
            own = random.Random(draw.getrandbits(64))
            twin = self._twin(query, encode)
            if twin is None:
                continue
            shown = self._shown(query, twin, own)
            labels = [self._label(label, self.labels, own) for _, label in shown]
            yield self._pair(query, twin, [text for text, _ in shown], labels)

    def _pair(self, query: Example, twin: Example, texts: list[str], labels: list[str]) -> Pair:
        clean = self._pieces(query[0], texts, labels)
        if self.corruption == "query":
            corrupted, wrong = self._pieces(twin[0], texts, labels), twin[1]
        else:
            corrupted = self._pieces(query[0], texts, [self._next(c) for c in labels])
            wrong = self._next(query[1])
        return Pair(
            clean,
            corrupted,
            f" {query[1]}",
            f" {wrong}",
            group=self.classes.index(query[1]),
            rivals=[f" {c}" for c in self.classes if c != query[1]],
        )

    def _twin(self, query: Example, encode: Encode) -> Example | None:
        """Return the most similar text of another class that has as many tokens."""
        ids = encode(f" {query[0]}")
        found = [(0, query)]
        for other in self._examples:
            theirs = encode(f" {other[0]}") if other[1] != query[1] else []
            if len(theirs) == len(ids):
                found.append((1 + sum(a == b for a, b in zip(ids, theirs, strict=True)), other))
        best = max(found, key=lambda pair: pair[0])
        return best[1] if best[0] else None

    def _shown(self, query: Example, twin: Example, draw: random.Random) -> list[Example]:
        pools = []
        for c in draw.sample(self.classes, len(self.classes)):
            pool = [e for e in self._examples if e[1] == c and e not in (query, twin)]
            pools.append(draw.sample(pool, len(pool)))
        shown = [pools[i % len(pools)][i // len(pools)] for i in range(self.shots)]
        draw.shuffle(shown)
        return shown

    def _label(self, label: str, kind: Labels, draw: random.Random) -> str:
        if kind == "random":
            return draw.choice(self.classes)
        return self._next(label) if kind == "flipped" else label

    def _next(self, label: str) -> str:
        return self.classes[(self.classes.index(label) + 1) % len(self.classes)]

    def _pieces(
        self, query: str, texts: list[str], labels: list[str]
    ) -> list[tuple[str, str] | str]:
        pieces: list[tuple[str, str] | str] = []
        gap = ""  # A piece never ends in white space: tokens reach from there into the next word.
        for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
            pieces += [f"{gap}{self.text_name}: {text}\n{self.label_name}:"]
            pieces += [(f"label_{number}", f" {label}")]
            gap = "\n\n"
        return [*pieces, f"{gap}{self.text_name}:", ("query", f" {query}"), f"\n{self.label_name}:"]
