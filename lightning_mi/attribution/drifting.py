"""How an attribution moves while a model learns: `drift`, and its `Series` over a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comparison import pearson, permutation_floor, ranks
from ..errors import ArgumentError
from ..record import Reading, Record
from .spread import Scores, concentration, mean_of, share, units_of

__all__ = ["Drift", "drift", "drift_series"]

SHOWN = ("spearman", "jaccard")
"""What loggers show of each attribution; six charts of it would crowd out what they go beside."""


@dataclass(frozen=True, eq=False)
class Drift:
    """How similar two attributions of the same examples are; all ``[example]``.

    Args:
        spearman: Rank correlation of the scores over the units of an example, −1 to 1.
        absolute: The same of absolute scores, for methods whose sign means nothing.
        jaccard: |A ∩ B| / |A ∪ B| of the k units with the largest absolute scores, 0 to 1.
        cosine: Cosine of the scores as vectors, −1 to 1.
        k: Number of units that the Jaccard index looks at.
        units: Number of units of an example.
    """

    spearman: Tensor
    absolute: Tensor
    jaccard: Tensor
    cosine: Tensor
    k: int
    units: int

    def reading(self, **said: Any) -> Reading:
        """Return the panels that are recorded.

        Args:
            **said: Added to each convention, for example what was compared with.

        Returns:
            The scalars ``spearman``, ``absolute``, ``jaccard`` and ``cosine``: means over the
            examples where they are defined. Their convention holds ``n``, the standard error and
            the ``null``: what scores in random order would give. Loggers show those of `SHOWN`.
        """
        chance = self.k / (2 * self.units - self.k)  # k·k/n of two random sets of k overlap
        nulls = {"spearman": 0.0, "absolute": 0.0, "jaccard": chance, "cosine": None}
        panels = {}
        for what, null in nulls.items():
            convention = {**said, "sign": "higher is more similar", "k": self.k, "null": null}
            if what in ("spearman", "absolute"):
                convention["floor"] = chance_floor(self.units)
            if what not in SHOWN:
                convention["display"] = {}
            panels[what] = mean_of(getattr(self, what), what, **convention)
        return panels


def drift(a: Scores, b: Scores, k: int | None = None) -> Drift:
    """Compare two attributions of the same inputs, example by example.

    A unit is a feature, a pixel or a token: where the axes are named, scores of a pixel's channels
    are added up first.

    Args:
        a: Scores, ``[example, …]``, for example of now.
        b: Scores of the same shape, for example of the previous firing or the final checkpoint.
        k: Number of units for the Jaccard index; None takes a tenth of them, rounded up.

    Returns:
        Rank correlations, Jaccard index and cosine; NaN where they are undefined.

    Raises:
        ArgumentError: If the shapes differ, or k is impossible.

    Example:
        >>> now, then = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[6.0, 2.0, 4.0]])
        >>> round(drift(now, then).spearman.item(), 6), round(drift(now, -then).cosine.item(), 6)
        (1.0, -1.0)
    """
    x, y = units_of(a), units_of(b)
    if x.shape != y.shape:
        raise ArgumentError.of(
            "b",
            expected=f"the shape of a, {tuple(x.shape)} (examples, units)",
            got=tuple(y.shape),
            do="Compare attributions of the same inputs.",
        )
    count = x.shape[1]
    k = max(1, math.ceil(count / 10)) if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
        raise ArgumentError.of(
            "k", expected=f"an int from 1 to {count}", got=repr(k), do="Pass None: a tenth."
        )
    return Drift(
        spearman=_spearman(x, y),
        absolute=_spearman(x.abs(), y.abs()),
        jaccard=_jaccard(x.abs(), y.abs(), k),
        cosine=_cosine(x, y),
        k=k,
        units=count,
    )


def drift_series(
    records: Sequence[Record], *, final: bool = True, mask: Tensor | None = None
) -> list[Record]:
    """Follow every attribution of a run: how concentrated it is, and how it moves.

    A `Series`: for each attribution measurement (its panel ``values`` says which ``method`` made
    it) and each step the scalars

    - ``<measurement>_drift/gini`` and ``entropy``, see `concentration`; with a mask ``share``;
    - ``spearman``, ``absolute``, ``jaccard`` and ``cosine`` with the previous firing, which the
      first one does not have;
    - with ``final`` the same four with the last record, named ``…_final``.

    Args:
        records: Records of one run and one source.
        final: Whether to compare with the last record as well.
        mask: Units whose share of the absolute scores is followed, as in `share`.

    Returns:
        New records, each at the step of the attribution that it describes.

    Example:
        >>> from lightning_mi import Panel
        >>> values = Panel([[1.0, 2.0, 3.0]], ("example", "feature"), {}, "1", {"method": "m"})
        >>> run = [Record("m/values", values, step=step) for step in (0, 5)]
        >>> made = drift_series(run, final=False)
        >>> [(r.name, r.step, r.panel.item()) for r in made if r.what == "spearman"]
        [('m_drift/spearman', 5, 1.0)]
    """
    made = []
    for name in dict.fromkeys(r.name for r in records if is_attribution(r)):
        by_step = {r.step: r for r in records if r.name == name}
        ordered = [by_step[step] for step in sorted(by_step)]
        for before, now in itertools.pairwise([None, *ordered]):
            made += moved(before, now, mask)
        for one in ordered if final else ():
            made += _compared(ordered[-1], one, "final", "_final")
    return made


def moved(before: Record | None, now: Record | None, mask: Tensor | None = None) -> list[Record]:
    """Return what `drift_series` says of one step.

    Args:
        before: The previous record of this attribution, or None.
        now: The record that is described.
        mask: As in `drift_series`.

    Returns:
        Scalars at the step of ``now``.
    """
    if now is None:
        return []
    gini, entropy = concentration(now.panel)
    panels = {
        "gini": mean_of(gini, "gini", sign="higher is more concentrated", null=0.0, display={}),
        "entropy": mean_of(
            entropy, "entropy", "nats", sign="lower is more concentrated", display={}
        ),
    }
    if mask is not None:
        null = float(mask.double().mean())
        panels["share"] = mean_of(share(now.panel, mask), "share", null=null)
    own = _named(now, panels, "")
    return own if before is None else own + _compared(before, now, "previous", "")


def _compared(before: Record, now: Record, reference: str, ending: str) -> list[Record]:
    """Return the four scalars of a comparison; none where the inputs had another shape."""
    if before.panel.values.shape != now.panel.values.shape or before.panel.axes != now.panel.axes:
        return []
    found = drift(now.panel, before.panel)
    return _named(now, found.reading(compared_with=reference, at_step=before.step), ending)


def _named(now: Record, panels: Reading, ending: str) -> list[Record]:
    made_by = {"function": "lightning_mi.attribution.drift_series"}
    section = f"{now.measurement}_drift"
    return [
        now.replace(name=f"{section}/{what}{ending}", panel=panel, made_by=made_by)
        for what, panel in panels.items()
    ]


def chance_floor(units: int) -> float:
    """Return how large a rank correlation gets by chance.

    Args:
        units: Number of units.

    Returns:
        The 95 % quantile of |Spearman| under random order; 1.96/√(n − 1) beyond 256 units.
    """
    return permutation_floor(units) if units <= 256 else 1.96 / math.sqrt(units - 1)


def is_attribution(record: Record) -> bool:
    """Say whether a record holds scores of the inputs.

    Args:
        record: Any record.

    Returns:
        Whether it is a panel ``values`` over examples that names its method.
    """
    panel = record.panel
    named = record.what == "values" and isinstance(panel.convention.get("method"), str)
    return named and panel.axes[:1] == ("example",) and len(panel.axes) > 1


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    """Return `comparison.spearman` of every row at once: an image has 50,000 units."""
    unknown = (x.isnan() | y.isnan()).any(1)
    return pearson(ranks(x), ranks(y)).masked_fill(unknown, math.nan).cpu()


def _jaccard(x: Tensor, y: Tensor, k: int) -> Tensor:
    chosen = [torch.zeros_like(v).scatter_(1, v.topk(k, dim=1).indices, 1.0) for v in (x, y)]
    both = (chosen[0] * chosen[1]).sum(1)
    flat = [(v.amax(1) == v.amin(1)) | v.isnan().any(1) for v in (x, y)]
    # Which units are the largest of equal ones is a matter of chance.
    return (both / (2 * k - both)).masked_fill(flat[0] | flat[1], math.nan).cpu()


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    size = x.norm(dim=1) * y.norm(dim=1)
    nothing = torch.full_like(size, math.nan)
    return ((x * y).sum(1) / torch.where(size > 0, size, nothing)).clamp(-1, 1).cpu()
