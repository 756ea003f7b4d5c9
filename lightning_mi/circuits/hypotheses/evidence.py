"""What a hypothesis comes to: lines under four headings, and a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ...nodes import MLP, Head
from ...record import Panel, scalar

__all__ = ["HEADINGS", "Evidence", "Heading", "Line", "Verdict"]

Heading: TypeAlias = Literal[
    "existence (prior)", "existence (posterior)", "connection", "characterisation"
]
Verdict: TypeAlias = Literal["supported", "partly", "not"]

HEADINGS: tuple[Heading, ...] = (
    "existence (prior)",
    "existence (posterior)",
    "connection",
    "characterisation",
)
SHOWN = 8
"""Most parts that a line names in print; the panel names all."""

VALUES = {"supported": 1.0, "partly": 0.5, "not": 0.0}


@dataclass(frozen=True)
class Line:
    """One thing that was stated in advance, and what was found.

    Args:
        heading: One of `HEADINGS`.
        step: Which step it is about.
        key: Short name, for the panel.
        claim: What was stated.
        value: What was found.
        at_least: From where on the claim holds; NaN where nothing was claimed.
        low: Lower end of the value's 95 % interval over prompts, NaN without one.
        high: Its upper end.
        null: What the same measurement shows where there is nothing, NaN if it has no null.
        holds: Whether the claim holds; None where nothing was claimed.
        components: The parts of the model that it is about.
        unit: Unit of the value.
        reason: Why the value is NaN.
    """

    heading: Heading
    step: str
    key: str
    claim: str
    value: float
    at_least: float = math.nan
    low: float = math.nan
    high: float = math.nan
    null: float = math.nan
    holds: bool | None = None
    components: tuple[str, ...] = ()
    unit: str = "1"
    reason: str | None = None

    def __str__(self) -> str:
        """Return it as a row of the table."""
        mark = {True: "yes", False: "no", None: "–"}[self.holds]
        found = "undefined" if math.isnan(self.value) else f"{self.value:.3f}"
        if not math.isnan(self.low):
            found += f" [{self.low:.3f}, {self.high:.3f}]"
        null = "" if math.isnan(self.null) else f", null {self.null:.3f}"
        more = f" and {len(self.components) - SHOWN} more" if len(self.components) > SHOWN else ""
        told = ", ".join(self.components[:SHOWN]) + more
        parts = f" ({told})" if told else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{mark:>3}  {self.step}: {self.claim}{parts}: {found}{null}{why}"

    def panel(self) -> Panel:
        """Return it as a scalar."""
        about: dict[str, Any] = {
            "what": f"{self.step}: {self.claim}",
            "heading": self.heading,
            "sign": "larger: more in favour",
            "null": None if math.isnan(self.null) else self.null,
            "at_least": None if math.isnan(self.at_least) else self.at_least,
            "low": None if math.isnan(self.low) else self.low,
            "high": None if math.isnan(self.high) else self.high,
            "holds": self.holds,
            "components": list(self.components),
            "display": {},
        }
        if self.reason is not None:
            about["reason"] = self.reason
        return scalar(self.value, self.unit, **about)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence for and against a hypothesis.

    Args:
        name: Name of the hypothesis.
        behavior: Name of the behavior.
        lines: What was stated, and what was found.
        components: By step the parts that fit.
        fits: By step how well each head (``[layer, head]``) or MLP (``[layer]``) fits: the smallest
            distance to a stated margin, 0 or more where it fits.
        reason: Why nothing can be said about the behavior, or None.
        decision: Which of several rivals won, if there were several.
        settled: The verdict, where it does not follow from the lines: of several rivals all but one
            should fail.
        convention: Ablations, nulls, seeds, as plain JSON.
    """

    name: str
    behavior: str
    lines: tuple[Line, ...]
    components: Mapping[str, tuple[Head | MLP, ...]] = field(default_factory=dict)
    fits: Mapping[str, Tensor] = field(default_factory=dict)
    reason: str | None = None
    decision: str | None = None
    settled: Verdict | None = None
    convention: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """``"supported"``: every claim holds.

        ``"not"``: a step has no part that looks as stated, or no cut does what was stated, or
        nothing can be said. ``"partly"`` else.
        """
        if self.settled is not None:
            return "not" if self.reason is not None else self.settled
        prior, posterior = (self.under(h) for h in HEADINGS[:2])
        cuts = [line.holds for line in posterior if line.holds is not None]
        if self.reason is not None or any(line.holds is False for line in prior):
            return "not"
        if cuts and not any(cuts):
            return "not"
        return "partly" if self.failing else "supported"

    @property
    def failing(self) -> tuple[Line, ...]:
        """The lines that do not hold, in their order."""
        return tuple(line for line in self.lines if line.holds is False)

    def under(self, heading: str) -> tuple[Line, ...]:
        """Return the lines under a heading.

        Args:
            heading: One of `HEADINGS`.

        Returns:
            Them, in order.
        """
        return tuple(line for line in self.lines if line.heading == heading)

    def __str__(self) -> str:
        """Return a table under its headings, and the verdict."""
        rows = [f"{self.name}, on {self.behavior}"]
        for heading in HEADINGS:
            own = self.under(heading)
            if own:
                rows += [heading, *(f"  {line}" for line in own)]
        end = f"verdict: {self.verdict}"
        if self.decision is not None:
            end += f" ({self.decision})"
        if self.reason is not None:
            end += f"; {self.reason}"
        elif self.failing and self.settled != "supported":
            end += f"; failing: {self.failing[0].step}: {self.failing[0].claim}"
        return "\n".join([*rows, end])

    def reading(self) -> dict[str, Panel]:
        """Return all of it as panels.

        Returns:
            ``verdict`` (1 supported, ½ partly, 0 not; NaN with a reason where nothing can be said),
            ``claims`` over ``feature`` (1 holds, 0 does not, NaN nothing claimed or undefined),
            ``share_holding``, one scalar a line, and ``fit_<step>`` over (layer, head).
        """
        made = {"verdict": self._verdict(), "claims": self._claims()}
        decided = [line.holds for line in self.lines if line.holds is not None]
        share = sum(decided) / len(decided) if decided else math.nan
        about = self._about("share of stated claims that hold")
        made["share_holding"] = scalar(
            math.nan if self.reason else share, "share", **about, display={"scalar": "claims"}
        )
        for line in self.lines:
            name = f"{slug(line.step)}_{line.key}"
            while name in made:
                name += "_"
            made[name] = line.panel()
        for step, values in self.fits.items():
            made[f"fit_{slug(step)}"] = self._fit(step, values)
        return made

    def _about(self, what: str) -> dict[str, Any]:
        about: dict[str, Any] = {**self.convention, "what": what, "hypothesis": self.name}
        about |= {"behavior": self.behavior, "sign": "larger: more in favour"}
        if self.reason is not None:
            about["reason"] = self.reason
        return about

    def _verdict(self) -> Panel:
        about = self._about("verdict: 1 supported, 0.5 partly, 0 not")
        about |= {"verdict": self.verdict, "failing": [str(line) for line in self.failing]}
        about |= {"table": str(self), "decision": self.decision, "display": {"scalar": "verdict"}}
        return scalar(math.nan if self.reason else VALUES[self.verdict], "1", **about)

    def _claims(self) -> Panel:
        labels, values = [], []
        for line in self.lines:
            labels.append(f"{line.heading} · {line.step}: {line.claim}")
            known = line.holds is not None and line.reason is None
            values.append(float(bool(line.holds)) if known else math.nan)
        about = self._about("whether each claim holds: 1, 0, NaN undefined or nothing claimed")
        about |= {"found": [str(line) for line in self.lines], "display": {}}
        return Panel(torch.tensor(values), ("feature",), {"feature": labels}, "1", about)

    def _fit(self, step: str, values: Tensor) -> Panel:
        about = self._about(f"how well each part fits {step!r}: least distance to a stated margin")
        about |= {"null": 0.0, "fitting": [str(c) for c in self.components.get(step, ())]}
        axes: Sequence[str] = ("layer", "head")[: values.ndim]
        if bool(values.isnan().all()) and "reason" not in about:
            about["reason"] = "what was stated cannot be measured in this model"
        about["display"] = {"picture": "map"} if values.ndim == 2 else {}
        return Panel(values, tuple(axes), unit="1", convention=about)


def slug(text: str) -> str:
    """Return a name that can stand in a panel's.

    Args:
        text: Words.

    Returns:
        Lower-case words joined by underscores.

    Example:
        >>> slug("S-inhibition")
        's_inhibition'
    """
    return re.sub(r"\W+", "_", text.lower()).strip("_")
