"""Prompts out of pieces: encoded by any tokenizer, equally long, with the place of every piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..behavior import Behavior
from ..errors import ArgumentError
from ..target import LogitDifference, Probability, Rank, TargetLike
from ..target import LogProbability as LogProb

__all__ = ["METRICS", "Encode", "Pair", "Pieces", "encoder", "gathered", "metric_of"]

Encode: TypeAlias = Callable[[str], list[int]]
Pieces: TypeAlias = Sequence["tuple[str, str] | str"]
"""Texts in order; those that have a place of interest stand beside its name."""

METRICS = ("logit_difference", "log_probability", "probability", "loss", "rank")


@dataclass
class Pair:
    """A clean prompt, its corrupted twin, and what each of them asks for.

    Args:
        clean: Pieces of the clean prompt.
        corrupted: Pieces of the corrupted one.
        answer: Text that goes on after the clean prompt.
        wrong: Text that goes on after the corrupted one.
        group: Kind of the prompt.
    """

    clean: Pieces
    corrupted: Pieces
    answer: str
    wrong: str
    group: int = 0


@dataclass
class Encoded:
    """A pair as ids."""

    pair: Pair
    clean: list[int]
    corrupted: list[int]
    answer: int
    wrong: int
    places: dict[str, int] = field(default_factory=dict)


def encoder(tokenizer: Any) -> Encode:
    """Return what turns text into ids, without special tokens.

    Args:
        tokenizer: A tokenizer of transformers or tokenizers, a function ``text -> ids``, or a
            vocabulary (words in order, or word -> id) for text that is split at spaces.

    Returns:
        The function.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> encoder(["a", "b"])("b a b")
        [1, 0, 1]
    """
    if isinstance(tokenizer, Mapping | list | tuple):
        return _words(tokenizer)
    if hasattr(tokenizer, "encode"):
        return lambda text: _ids(tokenizer.encode(text, add_special_tokens=False))
    if callable(tokenizer):
        return lambda text: _ids(tokenizer(text))
    raise ArgumentError.of(
        "tokenizer",
        expected="a tokenizer with encode(), a function, a list of words or a mapping to ids",
        got=type(tokenizer).__name__,
        do="Pass the tokenizer that the model was trained with.",
    )


def gathered(
    name: str,
    pairs: Iterable[Pair],
    tokenizer: Any,
    count: int,
    *,
    prefix: Sequence[int] = (),
    metric: str = "logit_difference",
) -> Behavior:
    """Return the first pairs whose prompts all have one length.

    A pair is left out where the two prompts differ in length, where the answers begin with the
    same token, or where the tokenizer melts two pieces into one token, so that a piece has no
    place of its own.

    Args:
        name: Name of the behavior.
        pairs: Candidates, in an order of no meaning.
        tokenizer: See `encoder`.
        count: Number of pairs wanted.
        prefix: Ids in front of every prompt (the beginning-of-sequence token).
        metric: One of ``METRICS``.

    Returns:
        The behavior.

    Raises:
        ArgumentError: If no length has so many pairs.
    """
    encode = encoder(tokenizer)
    by_length: dict[int, list[Encoded]] = defaultdict(list)
    for pair in pairs:
        found = _encoded(pair, encode, list(prefix))
        if found is None:
            continue
        same = by_length[len(found.clean)]
        same.append(found)
        if len(same) == count:
            return _behavior(name, same, metric)
    best = max(by_length.values(), key=len, default=[])
    raise ArgumentError.of(
        "pairs",
        expected=f"{count} pairs of prompts of one length under this tokenizer",
        got=f"{len(best)}",
        do=f"Ask {name!r} for fewer pairs, or give it words that are single tokens.",
    )


def metric_of(metric: str, answers: torch.Tensor, wrong: torch.Tensor) -> TargetLike:
    """Return the target by which a behavior is judged.

    Args:
        metric: One of ``METRICS``.
        answers: Right tokens ``[example]``.
        wrong: Wrong tokens ``[example]``.

    Returns:
        The target.

    Raises:
        ArgumentError: If the metric has another name.
    """
    if metric == "logit_difference":
        return LogitDifference(answers, other=wrong)
    kinds = {"log_probability": LogProb, "probability": Probability, "rank": Rank}
    if metric in kinds:
        return kinds[metric](answers)
    if metric == "loss":
        return NegativeLogProbability(answers)
    raise ArgumentError.of("metric", expected=f"one of {METRICS}", got=repr(metric), do="Choose.")


@dataclass(frozen=True)
class NegativeLogProbability:
    """−log p of a token at the last position, in nats: the loss of that prediction.

    Args:
        token: Tokens ``[example]``.
    """

    token: Any
    higher_is_better: bool = field(default=False, init=False, repr=False)

    def __call__(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the loss.

        Args:
            outputs: Logits.
            batch: The batch they came from.

        Returns:
            Shape ``[example]``, nats.
        """
        return -LogProb(self.token)(outputs, batch)


def _behavior(name: str, found: Sequence[Encoded], metric: str) -> Behavior:
    answers, wrong = (torch.tensor([getattr(e, k) for e in found]) for k in ("answer", "wrong"))
    shared = set(found[0].places).intersection(*(e.places for e in found))
    return Behavior(
        torch.tensor([e.clean for e in found]),
        torch.tensor([e.corrupted for e in found]),
        metric_of(metric, answers, wrong),
        name=name,
        positions={k: [e.places[k] for e in found] for k in sorted(shared)},
        answers=answers,
        wrong=wrong,
        groups=torch.tensor([e.pair.group for e in found]),
        texts=[(_joined(e.pair.clean), _joined(e.pair.corrupted)) for e in found],
    )


def _encoded(pair: Pair, encode: Encode, prefix: list[int]) -> Encoded | None:
    clean, corrupted = _placed(pair.clean, encode), _placed(pair.corrupted, encode)
    if clean is None or corrupted is None or len(clean[0]) != len(corrupted[0]):
        return None
    answer = _following(_joined(pair.clean), pair.answer, encode)
    wrong = _following(_joined(pair.corrupted), pair.wrong, encode)
    if answer is None or wrong is None or answer == wrong:
        return None
    places = {name: place + len(prefix) for name, place in clean[1].items()}
    places["last"] = len(prefix) + len(clean[0]) - 1
    return Encoded(pair, prefix + clean[0], prefix + corrupted[0], answer, wrong, places)


def _placed(pieces: Pieces, encode: Encode) -> tuple[list[int], dict[str, int]] | None:
    """Return ids and the place of each named piece's last token, or None where pieces melt."""
    whole = encode(_joined(pieces))
    places, text = {}, ""
    for piece in pieces:
        name, words = ("", piece) if isinstance(piece, str) else piece
        text += words
        until = encode(text)
        if not until or whole[: len(until)] != until:
            return None
        if name:
            places[name] = len(until) - 1
    return whole, places


def _following(prompt: str, text: str, encode: Encode) -> int | None:
    """Return the first token of a text in the place where it would follow a prompt."""
    before, both = encode(prompt), encode(prompt + text)
    if both[: len(before)] != before or len(both) == len(before):
        return None
    return both[len(before)]


def _joined(pieces: Pieces) -> str:
    return "".join(piece if isinstance(piece, str) else piece[1] for piece in pieces)


def _words(vocabulary: Mapping[str, int] | Sequence[str]) -> Encode:
    table = (
        dict(vocabulary)
        if isinstance(vocabulary, Mapping)
        else {word: i for i, word in enumerate(vocabulary)}
    )

    def encode(text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in table]
        if unknown:
            raise ArgumentError.of(
                "tokenizer",
                expected="a vocabulary that has every word of the prompts",
                got=f"none of {unknown[:5]}",
                do="Add the words, or give the behavior words of your own.",
            )
        return [table[word] for word in text.split()]

    return encode


def _ids(encoded: Any) -> list[int]:
    found = getattr(encoded, "ids", encoded)
    if isinstance(found, Mapping):
        found = found["input_ids"]
    return [int(i) for i in found]
