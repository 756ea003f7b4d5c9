"""Behaviors made of text, for tokenizers of several kinds."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_mi as mi
from lightning_mi.behavior import BehaviorLike
from lightning_mi.behaviors import (
    Counting,
    GreaterThan,
    InContextLearning,
    Induction,
    KnowledgeRecall,
    ModularAddition,
    Relation,
    RepeatedText,
    RepeatedTokens,
)
from lightning_mi.behaviors.encoding import encoder
from lightning_mi.measurement import describe


class Regex:
    """A tokenizer that cuts text by a pattern and numbers the pieces as they come."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.ids = re.compile(pattern), {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        pieces = self.pattern.findall(text)
        assert "".join(pieces) == text
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        names = list(self.ids)
        return "".join(names[i] for i in ids)


# Words with the space before them; numbers in twos from the left, or digit by digit, or in threes.
WORDS = r"\s?[^\W\d]+|[^\w\s]|\s"
PAIRS, DIGITS, THREES = (
    Regex(rf" ?\d{{1,2}}|{WORDS}"),
    Regex(rf"\d|{WORDS}"),
    Regex(rf"\d{{1,3}}|{WORDS}"),
)


@pytest.mark.parametrize(
    ("tokenizer", "shown"), [(PAIRS, 2), (DIGITS, 2), (DIGITS, 3), (THREES, 3)]
)
def test_right_years_are_those_that_are_later_in_any_vocabulary(
    tokenizer: Regex, shown: int
) -> None:
    behavior = GreaterThan(tokenizer, pairs=12, shown=shown).behavior()
    names = {i: piece for piece, i in tokenizer.ids.items()}
    digits = len(names[int(behavior.question.right[0, 0])])
    for row, (clean, corrupted) in enumerate(behavior.texts):
        year = re.findall(r"\d{4}", clean)[0]
        begin = year[shown : shown + digits]
        sets = [
            {names[int(i)] for i in tokens[row] if i >= 0}
            for tokens in (behavior.question.right, behavior.question.wrong)
        ]
        every = {f"{n:0{digits}d}" for n in range(10**digits)}
        assert sets[0] == {d for d in every if d > begin}
        # A first digit that begins earlier years as well as later ones decides nothing.
        undecided = set() if digits == 4 - shown or year[-1] == "9" else {begin}
        assert sets[1] == {d for d in every if d <= begin} - undecided
        assert re.findall(r"\d{4}", corrupted)[0][shown:] in ("01", "1")
        assert clean.endswith(year[:shown])


def test_the_place_of_a_year() -> None:
    behavior = GreaterThan(DIGITS, pairs=4).behavior()
    rows = torch.arange(4)
    names = list(DIGITS.ids)
    for name, cut in (("shown", slice(1, 2)), ("year", slice(3, 4))):
        found = [names[i] for i in behavior.clean[rows, behavior.where(name)].tolist()]
        assert found == [re.findall(r"\d{4}", clean)[0][cut] for clean, _ in behavior.texts]


def test_greater_than_counts_probability_of_sets() -> None:
    behavior = GreaterThan(PAIRS, pairs=3).behavior()
    outputs = torch.randn(3, behavior.clean.shape[1], len(PAIRS.ids))
    chances = outputs[:, -1].softmax(-1)
    right, wrong = behavior.question.right, behavior.question.wrong
    for row, value in enumerate(behavior.metric(outputs)):
        sums = [chances[row, t[row][t[row] >= 0]].sum() for t in (right, wrong)]
        assert torch.allclose(value, sums[0] - sums[1], atol=1e-6)
    assert torch.equal(behavior.correct(outputs), behavior.metric(outputs) > 0)
    (only,) = behavior.characteristics
    (one,) = {int(g) for g in only.variants["1700s"].behavior().groups}
    assert one == 0


def test_greater_than_refuses_what_it_cannot_ask() -> None:
    with pytest.raises(mi.ArgumentError, match="shown: expected 2 or 3, got 4"):
        GreaterThan(PAIRS, shown=4)
    with pytest.raises(mi.ArgumentError, match="centuries: expected numbers of two digits"):
        GreaterThan(PAIRS, centuries=(7,))
    with pytest.raises(mi.ArgumentError, match="melts pieces of the prompt"):
        GreaterThan(THREES, pairs=2).behavior()


def test_kinds_of_labels_share_queries_and_examples() -> None:
    base = InContextLearning(PAIRS, pairs=20, shots=4)
    kinds, helps = base.characteristics()
    assert (kinds.name, helps.name) == ("label_insensitivity", "demonstrations_help")
    made = {name: one.behavior() for name, one in kinds.variants.items()}
    shown = {
        name: [re.findall(r"Review: (.*)\nSentiment: ?(\w*)", t) for t, _ in b.texts]
        for name, b in made.items()
    }
    opposite = {"positive": "negative", "negative": "positive"}
    agree = []
    for row in range(20):
        gold, flipped = shown["gold"][row], shown["flipped"][row]
        assert [t for t, _ in gold] == [t for t, _ in flipped]
        assert [t for t, _ in gold] == [t for t, _ in shown["random"][row]]
        assert gold[-1] == shown["zero_shot"][row][0]
        assert [opposite[c] for _, c in gold[:-1]] == [c for _, c in flipped[:-1]]
        assert sorted(c for _, c in gold[:-1]) == ["negative"] * 2 + ["positive"] * 2
        agree += [g[1] == r[1] for g, r in zip(gold[:-1], shown["random"][row][:-1], strict=True)]
        # Nobody is asked what the prompt has told.
        assert gold[-1][0] not in [t for t, _ in gold[:-1]]
    assert 0.3 < sum(agree) / len(agree) < 0.7
    assert all(torch.equal(b.answers, made["gold"].answers) for b in made.values())


def test_labels_of_sentences_are_their_own() -> None:
    behavior = InContextLearning(PAIRS, pairs=8, shots=2).behavior()
    names = list(PAIRS.ids)
    rows = torch.arange(8)
    ids = behavior.clean["input_ids"]
    shown = [names[i] for i in ids[rows, behavior.where("label_1")].tolist()]
    assert shown == [" " + re.findall(r"Sentiment: (\w+)", t)[0] for t, _ in behavior.texts]
    query = [names[i] for i in ids[rows, behavior.where("query")].tolist()]
    assert query == [" " + t.split("\n")[-2].split()[-1] for t, _ in behavior.texts]
    assert {names[int(i)] for i in behavior.answers} == {" positive", " negative"}
    assert bool((behavior.answers != behavior.wrong).all())


def test_a_changed_query_differs_in_few_words_and_asks_for_the_other_label() -> None:
    behavior = InContextLearning(PAIRS, pairs=16, shots=2).behavior()
    clean, corrupted = (b["input_ids"] for b in (behavior.clean, behavior.corrupted))
    assert torch.equal(behavior.clean["attention_mask"], behavior.corrupted["attention_mask"])
    assert bool(((clean != corrupted).sum(1) == 1).all())
    lengths = behavior.clean["attention_mask"].sum(1)
    assert torch.equal(behavior.where("last"), lengths - 1)
    assert len(lengths.unique()) > 1


def test_changed_labels_change_nothing_else() -> None:
    behavior = InContextLearning(PAIRS, pairs=6, shots=3, corruption="labels").behavior()
    clean, corrupted = (b["input_ids"] for b in (behavior.clean, behavior.corrupted))
    places = torch.stack([behavior.where(f"label_{i}") for i in (1, 2, 3)], 1)
    expected = torch.zeros_like(clean, dtype=torch.bool).scatter(1, places, True)
    assert torch.equal(clean != corrupted, expected)


def test_three_classes_of_ones_own() -> None:
    examples = [(f"{w} {n}", w) for w in ("red", "green", "blue") for n in ("a", "b", "c", "d")]
    behavior = InContextLearning(PAIRS, pairs=9, shots=3, examples=tuple(examples)).behavior()
    classes = [PAIRS.ids[f" {w}"] for w in ("red", "green", "blue")]
    outputs = torch.randn(9, behavior.clean["input_ids"].shape[1], len(PAIRS.ids))
    logits = outputs[torch.arange(9), behavior.where("last")][:, classes]
    best = torch.tensor(classes)[logits.argmax(1)]
    assert torch.equal(behavior.correct(outputs), best == behavior.answers)


def test_in_context_learning_refuses_what_it_cannot_ask() -> None:
    with pytest.raises(mi.ArgumentError, match="labels: expected one of"):
        InContextLearning(PAIRS, labels="wrong")  # type: ignore[arg-type]
    with pytest.raises(mi.ArgumentError, match="shots: expected at least 0, and at least 1"):
        InContextLearning(PAIRS, shots=0, corruption="labels")
    with pytest.raises(mi.ArgumentError, match="examples: expected two classes or more"):
        InContextLearning(PAIRS, examples=(("a", "x"), ("b", "x")))


def test_facts_are_asked_once_and_answered_by_their_own() -> None:
    behavior = KnowledgeRecall(PAIRS, pairs=24).behavior()
    clean = [c for c, _ in behavior.texts]
    assert len(set(clean)) == 24
    names, rows = list(PAIRS.ids), torch.arange(24)
    subjects = [names[i] for i in behavior.clean[rows, behavior.where("subject")].tolist()]
    assert all(subject in text for subject, text in zip(subjects, clean, strict=True))
    known = {"The capital of France is": " Paris", "The language that is spoken in Japan is": " J"}
    behavior = KnowledgeRecall(PAIRS, pairs=60, padding=0).behavior()
    answers = dict(zip([c for c, _ in behavior.texts], behavior.answers.tolist(), strict=True))
    assert all(names[answers[q]].startswith(a) for q, a in known.items() if q in answers)
    assert set(known) & set(answers)
    first, second = behavior.split()
    assert not {c for c, _ in first.texts} & {c for c, _ in second.texts}


def test_subjects_of_several_tokens_have_two_places() -> None:
    relation = Relation(
        "owner", ("{subject} belongs to",), (("big red dog", "Ann"), ("a b c", "Bo"))
    )
    behavior = KnowledgeRecall(PAIRS, pairs=2, relations=(relation,)).behavior()
    assert behavior.where("subject").tolist() == [0, 0]
    assert behavior.where("subject_last").tolist() == [2, 2]
    assert behavior.characteristics == ()
    with pytest.raises(mi.ArgumentError, match="wording: expected 0 to 0 for 'owner', got 1"):
        KnowledgeRecall(PAIRS, relations=(relation,), wording=1)
    nowhere = dataclasses.replace(relation, templates=("It belongs to",))
    with pytest.raises(mi.ArgumentError, match=r"templates with \{subject\} in them"):
        KnowledgeRecall(PAIRS, relations=(nowhere,))


@pytest.mark.parametrize("corruption", ["answer", "trigger", "block"])
def test_real_passages_begin_again(corruption: Any) -> None:
    words = [f"w{i % 7 if i % 3 == 0 else i}" for i in range(400)]
    text = " ".join(words)
    made = RepeatedText(text, PAIRS_OF_WORDS, length=12, passages=6, bos=9_999)
    made = dataclasses.replace(made, corruption=corruption)
    behavior = made.behavior()
    k = 6
    assert behavior.clean.shape == (6, 1 + 12 + k)
    assert torch.equal(behavior.clean[:, 1 : 1 + k], behavior.clean[:, 13:])
    assert torch.equal(behavior.clean[:, 13:], behavior.corrupted[:, 13:])
    rows = torch.arange(6)
    assert torch.equal(behavior.clean[rows, behavior.where("answer")], behavior.answers)
    trigger = behavior.clean[rows, behavior.where("last")]
    assert torch.equal(behavior.clean[rows, behavior.where("trigger")], trigger)
    for block, old, last in zip(
        behavior.corrupted[:, 1:13], behavior.answers, trigger, strict=True
    ):
        followers = block.tolist()[1:]
        found = [f for t, f in zip(block.tolist(), followers, strict=False) if t == last]
        assert int(old) not in found
    again = made.behavior()
    assert torch.equal(again.corrupted, behavior.corrupted)


def PAIRS_OF_WORDS(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_text_and_tokenizer_in_the_wrong_order_are_told_apart() -> None:
    with pytest.raises(mi.ArgumentError, match="The text comes first"):
        RepeatedText(lambda text: list(text.encode()), "some text", length=4).behavior()


def test_text_without_enough_passages_is_refused() -> None:
    with pytest.raises(mi.ArgumentError, match="text: expected 3 passages of 4 tokens"):
        RepeatedText(torch.zeros(40, dtype=torch.long), length=4, passages=3).behavior()
    with pytest.raises(mi.ArgumentError, match="text: expected a text or ids"):
        RepeatedText(torch.arange(7), length=4).behavior()
    with pytest.raises(mi.ArgumentError, match="shown: expected 1 to 3"):
        RepeatedText(torch.arange(40), length=4, shown=4).behavior()


def test_a_tokenizer_may_be_named_by_its_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "a", "b"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encoder(str(tmp_path / "tokenizer.json"))("b a") == [2, 1]
    with pytest.raises(mi.ArgumentError, match="tokenizer: expected a file, folder or name"):
        encoder(str(tmp_path / "nothing.json"))


@dataclass(frozen=True)
class Asked:
    """Stands for a measurement of a behavior."""

    behavior: BehaviorLike


@pytest.mark.parametrize(
    "made",
    [
        Induction(RepeatedTokens(50, length=8), "block"),
        RepeatedTokens(50),
        InContextLearning("somewhere", shots=2, labels="flipped"),
        GreaterThan("somewhere", centuries=(17,)),
        KnowledgeRecall(["a"], relations=(Relation("one", ("{subject} is",), (("a", "b"),)),)),
        Counting("column", shapes=("disc",)),
        ModularAddition(7, pairs=5, form="a b"),
    ],
    ids=lambda made: type(made).__name__,
)
def test_recipes_of_behaviors_build_them_again(made: Any) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Asked, "asked")
    recipe = describe(Asked(made))["init_args"]
    again = parser.instantiate(parser.parse_object({"asked": _unnested(recipe)}))
    assert again.asked.behavior == made


def _unnested(recipe: dict[str, Any]) -> Any:
    """Leave out the class paths of dataclasses inside dataclasses, which a parser knows."""
    inner = recipe["behavior"]["init_args"]
    for key, value in inner.items():
        several = value if isinstance(value, list) else [value]
        plain = [v["init_args"] if isinstance(v, dict) else v for v in several]
        inner[key] = plain if isinstance(value, list) else plain[0]
    return recipe
