"""Prompts out of pieces: encoded by any tokenizer, with the place of every piece."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..behavior import Behavior
from ..characteristic import Characteristic
from ..errors import ArgumentError
from .encoding import Encode, encoder
from .metrics import METRICS, AnyOf, metric_of

__all__ = ["METRICS", "Encode", "Pair", "Pieces", "encoder", "gathered", "metric_of"]

Pieces: TypeAlias = Sequence["tuple[str, str] | str"]
"""Texts in order; those that have a place of interest stand beside its name."""

Answers: TypeAlias = str | Sequence[str]
"""What goes on after a prompt; several where any of them will do."""


@dataclass
class Pair:
    """A clean prompt, its corrupted twin, and what each of them asks for.

    A named piece gives a position of interest: that of its last token, or with a name
    ``"first|last"`` two of them.

    Args:
        clean: Pieces of the clean prompt.
        corrupted: Pieces of the corrupted one.
        answer: Text that goes on after the clean prompt.
        wrong: Text that goes on after the corrupted one.
        group: Kind of the prompt.
        key: Only one pair of each key is taken; "" means that any number is.
        rivals: All texts that a right answer must beat, where that is not ``wrong`` alone.
    """

    clean: Pieces
    corrupted: Pieces
    answer: Answers
    wrong: Answers
    group: int = 0
    key: str = ""
    rivals: Answers = ()


@dataclass
class Encoded:
    """A pair as ids."""

    pair: Pair
    clean: list[int]
    corrupted: list[int]
    answer: list[int]
    wrong: list[int]
    rivals: list[int]
    places: dict[str, int] = field(default_factory=dict)


class UnfitError(ValueError):
    """Why a pair cannot be used with this tokenizer; never leaves this file."""


def gathered(
    name: str,
    pairs: Iterable[Pair],
    tokenizer: Any,
    count: int | None,
    *,
    prefix: Sequence[int] = (),
    metric: str = "logit_difference",
    padding: int | None = None,
    characteristics: Sequence[Characteristic] = (),
) -> Behavior:
    """Return the first pairs whose prompts all have one length.

    A pair is left out where the two prompts differ in length, where the answers begin with the
    same token, or where the tokenizer melts two pieces into one token, so that a piece has no
    place of its own.

    Args:
        name: Name of the behavior.
        pairs: Candidates, in an order of no meaning.
        tokenizer: See `encoder`.
        count: Number of pairs wanted; None takes all, and refuses those that cannot be used.
        prefix: Ids in front of every prompt (the beginning-of-sequence token).
        metric: One of ``METRICS``.
        padding: Id that fills shorter prompts up on the right; the batches are then dictionaries
            with an ``attention_mask``. None takes prompts of one length only.
        characteristics: What the behavior names as testable.

    Returns:
        The behavior.

    Raises:
        ArgumentError: If there are not so many pairs that can be used.
    """
    encode = encoder(tokenizer)
    by_length: dict[int, list[Encoded]] = defaultdict(list)
    taken: set[str] = set()
    unfit: Counter[str] = Counter()
    for pair in pairs:
        if pair.key in taken:
            continue
        try:
            found = _encoded(pair, encode, list(prefix))
        except UnfitError as reason:
            unfit[str(reason)] += 1
            continue
        if pair.key:
            taken.add(pair.key)
        length = 0 if padding is not None else len(found.clean)
        by_length[length].append(found)
        if len(by_length[length]) == count:
            break
    best = max(by_length.values(), key=len, default=[])
    complete = not unfit and len(by_length) == 1 if count is None else len(best) == count
    if not complete:
        wanted = "every pair" if count is None else f"{count} pairs"
        raise ArgumentError.of(
            "pairs",
            expected=f"{wanted} of prompts of one length under this tokenizer",
            got=f"{len(best)}{_reasons(unfit)}",
            do=f"Ask {name!r} for fewer pairs, or give it words that are single tokens.",
        )
    return _behavior(name, best, metric, padding, characteristics)


def _reasons(unfit: Counter[str]) -> str:
    told = "; ".join(f"{n} left out because {reason}" for reason, n in unfit.most_common(2))
    return f" ({told})" if told else ""


def _behavior(
    name: str,
    found: Sequence[Encoded],
    metric: str,
    padding: int | None,
    characteristics: Sequence[Characteristic],
) -> Behavior:
    answers, wrong = _filled([e.answer for e in found]), _filled([e.wrong for e in found])
    single = answers.shape[1] == wrong.shape[1] == 1
    if single:
        answers, wrong = answers[:, 0], wrong[:, 0]
    shared = set(found[0].places).intersection(*(e.places for e in found))
    return Behavior(
        _batch([e.clean for e in found], padding),
        _batch([e.corrupted for e in found], padding),
        metric_of(metric, answers, wrong),
        name=name,
        positions={k: [e.places[k] for e in found] for k in sorted(shared)},
        answers=answers if single else None,
        wrong=wrong if single else None,
        groups=torch.tensor([e.pair.group for e in found]),
        texts=[(_joined(e.pair.clean), _joined(e.pair.corrupted)) for e in found],
        margin=_margin(found, metric),
        characteristics=characteristics,
    )


def _margin(found: Sequence[Encoded], metric: str) -> AnyOf | None:
    """Sets are compared as wholes where their probabilities are, else by their best tokens."""
    if all(len(e.answer) == 1 and len(e.rivals) == 1 for e in found):
        return None
    answers, rivals = _filled([e.answer for e in found]), _filled([e.rivals for e in found])
    return AnyOf(answers, rivals, metric if metric == "probability_difference" else "margin")


def _batch(rows: Sequence[list[int]], padding: int | None) -> Any:
    if padding is None:
        return torch.tensor(rows)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _filled(tokens: Sequence[list[int]]) -> Tensor:
    """Return ``[example, answer]``, filled up by −1."""
    most = max(map(len, tokens))
    return torch.tensor([row + [-1] * (most - len(row)) for row in tokens])


def _encoded(pair: Pair, encode: Encode, prefix: list[int]) -> Encoded:
    clean, places = _placed(pair.clean, encode)
    corrupted, _ = _placed(pair.corrupted, encode)
    if len(clean) != len(corrupted):
        raise UnfitError("clean and corrupted prompts differ in length")
    answer = _following(_joined(pair.clean), pair.answer, encode)
    wrong = _following(_joined(pair.corrupted), pair.wrong, encode)
    both = set(answer) & set(wrong)  # Such a token may begin a right answer as well as a wrong one.
    answer, wrong = ([i for i in ids if i not in both] for ids in (answer, wrong))
    if not answer or not wrong:
        raise UnfitError("right and wrong answers begin with the same token")
    rivals = _following(_joined(pair.clean), pair.rivals, encode) if pair.rivals else wrong
    places = {name: place + len(prefix) for name, place in places.items()}
    places["last"] = len(prefix) + len(clean) - 1
    return Encoded(pair, prefix + clean, prefix + corrupted, answer, wrong, rivals, places)


def _placed(pieces: Pieces, encode: Encode) -> tuple[list[int], dict[str, int]]:
    """Return ids, and the places that the named pieces give."""
    whole = encode(_joined(pieces))
    places, text, start = {}, "", 0
    for piece in pieces:
        name, words = ("", piece) if isinstance(piece, str) else piece
        text += words
        until = encode(text)
        if not until or whole[: len(until)] != until:
            raise UnfitError("the tokenizer melts pieces of the prompt together")
        first, _, last = name.rpartition("|")
        places.update({first: start, last: len(until) - 1})
        start = len(until)
    return whole, {name: place for name, place in places.items() if name}


def _following(prompt: str, answers: Answers, encode: Encode) -> list[int]:
    """Return the first tokens of texts in the place where they would follow a prompt.

    One of several that melts into the prompt is left out: a model never continues so.
    """
    before = encode(prompt)
    found = []
    for text in [answers] if isinstance(answers, str) else answers:
        both = encode(prompt + text)
        if both[: len(before)] == before and len(both) > len(before):
            found.append(both[len(before)])
    if not found:
        raise UnfitError("the tokenizer melts the answer into the prompt")
    return list(dict.fromkeys(found))


def _joined(pieces: Pieces) -> str:
    return "".join(piece if isinstance(piece, str) else piece[1] for piece in pieces)
