"""Facts of common knowledge, by relation."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELATIONS", "Relation"]


@dataclass(frozen=True)
class Relation:
    """Subjects and their attributes, with sentences that ask for them.

    Args:
        name: Name of the relation.
        templates: Wordings, each with ``{subject}`` in its place, that end where the attribute
            follows.
        facts: Pairs of subject and attribute.
    """

    name: str
    templates: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Read "France: Paris, Japan: Tokyo"."""
    pairs = [entry.partition(":") for entry in text.split(",")]
    return tuple((subject.strip(), attribute.strip()) for subject, _, attribute in pairs)


CAPITALS = _pairs(
    "France: Paris, Japan: Tokyo, Italy: Rome, Spain: Madrid, Germany: Berlin, Russia: Moscow,"
    "England: London, China: Beijing, Egypt: Cairo, Greece: Athens, Cuba: Havana, Austria: Vienna,"
    "Portugal: Lisbon, Ireland: Dublin, Poland: Warsaw, Sweden: Stockholm, Norway: Oslo,"
    "Turkey: Ankara, Iran: Tehran, Iraq: Baghdad, Kenya: Nairobi, Peru: Lima, Canada: Ottawa,"
    "Hungary: Budapest, Belgium: Brussels, Finland: Helsinki, Denmark: Copenhagen, Chile: Santiago"
)
LANGUAGES = _pairs(
    "France: French, Japan: Japanese, Italy: Italian, Spain: Spanish, Germany: German,"
    "Russia: Russian, England: English, China: Chinese, Greece: Greek, Portugal: Portuguese,"
    "Brazil: Portuguese, Mexico: Spanish, Argentina: Spanish, Austria: German, Egypt: Arabic,"
    "Poland: Polish, Sweden: Swedish, Turkey: Turkish, Iran: Persian, Korea: Korean,"
    "Australia: English, Hungary: Hungarian, Finland: Finnish, Denmark: Danish"
)
CONTINENTS = _pairs(
    "France: Europe, Japan: Asia, Italy: Europe, Spain: Europe, Germany: Europe, China: Asia,"
    "Egypt: Africa, Kenya: Africa, Nigeria: Africa, India: Asia, Poland: Europe, Sweden: Europe,"
    "Thailand: Asia, Ghana: Africa, Vietnam: Asia, Ethiopia: Africa, Norway: Europe, Iraq: Asia"
)

RELATIONS = (
    Relation(
        "capital",
        ("The capital of {subject} is", "The capital city of {subject} is called"),
        CAPITALS,
    ),
    Relation(
        "language",
        (
            "The language that is spoken in {subject} is",
            "People who live in {subject} mostly speak",
        ),
        LANGUAGES,
    ),
    Relation(
        "continent",
        ("The country of {subject} lies in", "On a map, {subject} is found on the continent of"),
        CONTINENTS,
    ),
)
"""What the behaviour asks for unless it is told otherwise."""
