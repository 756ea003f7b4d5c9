"""What an evaluation returns: a number for each example, beside what chance would give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...record import Panel, Reading

__all__ = ["Evaluation", "Interval", "interval"]

STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t with 1 to 30 degrees of freedom."""

NORMAL = 1.95996
"""The same of the normal distribution."""

ONE = "fewer than two defined examples"


class Interval(NamedTuple):
    """A mean over examples, and how far it can be trusted.

    Attributes:
        mean: Over the examples where it is defined; NaN without any.
        stderr: Standard error s/√n of the mean; NaN for fewer than two examples.
        low: Lower end of the 95 % interval of Student's t.
        high: Upper end.
        n: Number of examples.
    """

    mean: float
    stderr: float
    low: float
    high: float
    n: int


def interval(values: Tensor) -> Interval:
    """Return mean ± t·s/√n over the examples, NaN left out.

    Args:
        values: ``[example]``.

    Returns:
        The mean with its 95 % interval.

    Example:
        >>> from torch import tensor
        >>> interval(tensor([1.0, 3.0])).mean, interval(tensor([1.0])).n
        (2.0, 1)
    """
    known = values.double()[~values.isnan()]
    n = len(known)
    mean = float(known.mean()) if n else math.nan
    stderr = float(known.std()) / math.sqrt(n) if n > 1 else math.nan
    half = _student(n - 1) * stderr
    return Interval(mean, stderr, mean - half, mean + half, n)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well an attribution does, example by example, and how well chance does.

    Args:
        name: Name of the measure.
        values: ``[example]``; NaN where it is undefined.
        higher_is_better: Whether a larger value speaks for the attribution.
        unit: Unit of the values.
        random: The same for random attributions, ``[draw, example]``.
        recency: The same for the attribution that knows the position alone, ``[example]``; only
            where the inputs are tokens.
        convention: What is needed to read the values.
        fractions: Shares that were removed or revealed, ``[step]``, for curves, as are all below.
        curve: The model's answer at each share, ``[example, step]``.
        random_curve: Mean of the random attributions' curves.
        recency_curve: Curve of the attribution that knows the position alone.
    """

    name: str
    values: Tensor
    higher_is_better: bool
    unit: str = "1"
    random: Tensor | None = None
    recency: Tensor | None = None
    convention: Mapping[str, Any] = field(default_factory=dict)
    fractions: Tensor | None = None
    curve: Tensor | None = None
    random_curve: Tensor | None = None
    recency_curve: Tensor | None = None

    @property
    def mean(self) -> Interval:
        """Mean over the examples, with standard error and 95 % interval."""
        return interval(self.values)

    @property
    def margin(self) -> Tensor | None:
        """How much better than the mean of the random attributions, ``[example]``."""
        return None if self.random is None else self._better_than(self.random.mean(0))

    @property
    def recency_margin(self) -> Tensor | None:
        """How much better than the attribution that knows the position alone, ``[example]``."""
        return None if self.recency is None else self._better_than(self.recency)

    @property
    def margin_interval(self) -> Interval:
        """Mean margin over random, with its 95 % interval over examples; NaN without draws."""
        return interval(self.values.new_empty(0) if self.margin is None else self.margin)

    def reading(self) -> Reading:
        """Return the panels that are recorded.

        Returns:
            ``values`` ``[example]``, the scalars ``mean``, ``margin`` (over random), ``random``,
            where the inputs are tokens ``recency`` and ``recency_margin``, each with its
            ``…_stderr``, and of curves ``curve``, ``random_curve`` and ``recency_curve``
            ``[example, step]``.
        """
        panels = {"values": self._panel(self.values, ("example",))}
        scalars: dict[str, tuple[Tensor | None, str]] = {
            "mean": (self.values, self._better),
            "margin": (self.margin, "positive is better than random"),
            "random": (None if self.random is None else self.random.mean(0), self._better),
            "recency": (self.recency, self._better),
            "recency_margin": (self.recency_margin, "positive is better than position alone"),
        }
        for what, (each, sign) in scalars.items():
            if each is not None:
                panels |= self._summary(what, each, sign)
        return panels | self._curves()

    def _better_than(self, other: Tensor) -> Tensor:
        return self.values - other if self.higher_is_better else other - self.values

    @property
    def _better(self) -> str:
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    def _panel(self, values: Tensor, axes: tuple[str, ...], **said: Any) -> Panel:
        convention = {"measure": self.name, "sign": self._better, "display": {}}
        if bool(values.isnan().any()):
            convention["reason"] = "an example without anything to remove, or undefined scores"
        return Panel(values, axes, {}, self.unit, {**convention, **self.convention, **said})

    def _summary(self, what: str, each: Tensor, sign: str) -> dict[str, Panel]:
        found = interval(each)
        said: dict[str, Any] = {"sign": sign, "n": found.n}
        spread = {} if found.n > 1 else {"reason": ONE}
        if found.n > 1:
            said["interval"] = [found.low, found.high]
        if what != "mean" and self.random is not None:
            said["draws"] = len(self.random)
        return {
            what: self._panel(_scalar(each, found.mean), (), display={"scalar": what}, **said),
            f"{what}_stderr": self._panel(_scalar(each, found.stderr), (), n=found.n, **spread),
        }

    def _curves(self) -> dict[str, Panel]:
        curves = {
            "curve": self.curve,
            "random_curve": self.random_curve,
            "recency_curve": self.recency_curve,
        }
        shares = [] if self.fractions is None else [round(f, 6) for f in self.fractions.tolist()]
        panels = {}
        for what, curve in curves.items():
            if curve is not None:
                panel = self._panel(curve, ("example", "step"), axis="share removed or revealed")
                panels[what] = Panel(
                    curve, panel.axes, {"step": shares}, self.unit, panel.convention
                )
        return panels


def _scalar(like: Tensor, value: float) -> Tensor:
    return like.new_tensor(value).double()


def _student(freedom: int) -> float:
    if freedom < 1:
        return math.nan
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    # Cornish–Fisher: correct to four digits beyond 30 degrees of freedom.
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
