"""What should be true of whoever does something in the way that is claimed: `Characteristic`.

A circuit can be faithful on the prompts that it was found on and still do another thing than the
model. A characteristic is a fact about the behaviour, stated before it is measured, that one can
ask of the model and of the circuit alone: learning in context, for example, hardly cares whether
the demonstrations carry their own labels (Min et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import ArgumentError

if TYPE_CHECKING:
    from .behavior import BehaviorLike

__all__ = ["Characteristic", "Expectation"]

Relation = Literal["above", "below", "near"]


@dataclass(frozen=True)
class Expectation:
    """One comparison that should come out in a stated way.

    Args:
        left: Name of a variant.
        relation: ``"above"``: left − right > ``by``; ``"below"``: right − left > ``by``;
            ``"near"``: |left − right| ≤ ``by``.
        right: Name of another variant, or a number (chance, zero).
        by: In units of what is compared.

    Raises:
        ArgumentError: If the relation has another name, or ``by`` is negative.

    Example:
        >>> Expectation("gold", "near", "flipped", 0.1).holds({"gold": 0.69, "flipped": 0.65})
        True
    """

    left: str
    relation: Relation
    right: str | float
    by: float = 0.0

    def __post_init__(self) -> None:
        """Check the relation."""
        if self.relation not in ("above", "below", "near"):
            raise ArgumentError.of(
                "relation",
                expected="'above', 'below' or 'near'",
                got=repr(self.relation),
                do="Say how the left side should compare.",
            )
        if not self.by >= 0:
            raise ArgumentError.of(
                "by", expected="a number of at least 0", got=self.by, do="Swap the sides instead."
            )

    def difference(self, values: Mapping[str, float]) -> float:
        """Return left − right.

        Args:
            values: What was measured of each variant.

        Returns:
            The difference, NaN where a value is.

        Raises:
            ArgumentError: If a variant was not measured.
        """
        sides = [self.left, self.right]
        missing = [side for side in sides if isinstance(side, str) and side not in values]
        if missing:
            raise ArgumentError.of(
                "values",
                expected=f"a number for each of {[s for s in sides if isinstance(s, str)]}",
                got=f"none for {missing}",
                do="Measure all variants of the characteristic.",
            )
        left, right = (values[s] if isinstance(s, str) else float(s) for s in sides)
        return left - right

    def holds(self, values: Mapping[str, float]) -> bool:
        """Return whether it came out as stated.

        Args:
            values: What was measured of each variant.

        Returns:
            False also where a value is NaN: what is undefined supports nothing.
        """
        difference = self.difference(values)
        if self.relation == "near":
            return abs(difference) <= self.by
        return (difference if self.relation == "above" else -difference) > self.by

    def __str__(self) -> str:
        """Return it as people read it."""
        sign = {"above": ">", "below": "<", "near": "≈"}[self.relation]
        step = {"above": f" + {self.by:g}", "below": f" − {self.by:g}", "near": f" ± {self.by:g}"}
        return f"{self.left} {sign} {self.right}{step[self.relation] if self.by else ''}"


@dataclass(frozen=True, eq=False)
class Characteristic:
    """A testable property of a behavior: variants of it, and how they should compare.

    Args:
        name: How it is called in the report.
        statement: What is claimed, in one sentence.
        variants: Behaviors, or descriptions of them, by name. Where they ask about the same
            examples in the same order (``paired``), differences can be taken example by example.
        expected: What should come out; all of it.
        compares: What is compared: ``"accuracy"``, the share of examples that are right
            (`Behavior.correct`), or ``"metric"``, the mean of `Behavior.metric`.
        paired: Whether example i is the same one in all variants.

    Raises:
        ArgumentError: If an expectation names a variant that there is not, or nothing is expected.
    """

    name: str
    statement: str
    variants: Mapping[str, BehaviorLike]
    expected: tuple[Expectation, ...]
    compares: Literal["accuracy", "metric"] = "accuracy"
    paired: bool = False

    def __post_init__(self) -> None:
        """Check that every expectation can be looked up."""
        sides = [side for e in self.expected for side in (e.left, e.right)]
        missing = [s for s in sides if isinstance(s, str) and s not in self.variants]
        if missing or not self.expected:
            raise ArgumentError.of(
                "expected",
                expected=f"expectations about the variants {list(self.variants)}",
                got=f"{missing}" if missing else "none",
                do="Name what should be above, below or near what.",
            )

    def verdicts(self, values: Mapping[str, float]) -> dict[str, bool]:
        """Return which expectations hold.

        Args:
            values: What was measured of each variant.

        Returns:
            Each expectation as text, and whether it holds.
        """
        return {str(e): e.holds(values) for e in self.expected}
