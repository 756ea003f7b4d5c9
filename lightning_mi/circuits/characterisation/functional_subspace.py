"""Which part of the hidden space a step works in: `functional_subspace`, `functional_overlap`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...batch import attention_mask_of
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...nodes import MLP, Head
from ...record import Panel, Reading, scalar
from ...task import Task
from ..causal import At, Estimate, Residual, intervene
from ..causal.edges import coinciding
from ..causal.places import as_place, named_part
from ..causal.ports import Ports
from ..causal.values import from_run
from .intervals import share_of

__all__ = [
    "FunctionalSubspace",
    "FunctionalSubspaces",
    "Place",
    "functional_overlap",
    "functional_subspace",
]

Place = Head | MLP | Residual
DRAWS = 8


@dataclass(frozen=True, eq=False)
class FunctionalSubspace:
    """Where what a part computes differs between clean and corrupted prompts, and what that does.

    Args:
        part: The part.
        behavior: Name of the behavior.
        basis: Orthonormal columns ``[d, rank]``; d is d_head for a head (its z), else d_model.
        written: The same as it stands in the stream, ``[d_model, rank]``; for a head through W_O.
        energies: σ² of the differences as shares, largest first ``[min(rows, d)]``.
        effective_rank: (Σσ²)² / Σσ⁴, between 1 and d.
        whole: Share of the effect that is lost when the whole part carries its corrupted value.
        removes: When only the subspace does (*project-out*).
        keeps: What the subspace alone carries (*keep-only*): ``whole`` less what is lost when all
            outside it is corrupted, so that ``whole`` is the most.
        random: ``removes`` of random subspaces of the same rank.
        convention: Energy, positions, seeds, numbers of prompts.
        reason: Why effects are NaN.
    """

    part: Place
    behavior: str
    basis: Tensor
    written: Tensor
    energies: Tensor
    effective_rank: float
    whole: Estimate
    removes: Estimate
    keeps: Estimate
    random: tuple[float, ...] = ()
    convention: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.basis.shape[1]

    def __str__(self) -> str:
        """Return it in words."""
        if self.reason is not None:
            return f"{self.part} on {self.behavior}: undefined: {self.reason}"
        lucky = f"{max(self.random):.2f}" if self.random else "none"
        return (
            f"{self.part} on {self.behavior}: rank {self.rank} of {len(self.basis)} "
            f"(effective {self.effective_rank:.2f}); whole {self.whole}, project-out "
            f"{self.removes}, keep-only {self.keeps}, random subspaces at most {lucky}"
        )

    def reading(self) -> dict[str, Panel]:
        """Return it as panels.

        Returns:
            ``rank``, ``effective_rank``, ``whole``, ``removes``, ``keeps`` and ``random`` (the
            largest), all scalars, and ``energies`` over ``feature``.
        """
        about: dict[str, Any] = {**self.convention, "part": str(self.part), "null": None}
        about |= {"behavior": self.behavior, "direction": "noise", "sign": "larger: more of it"}
        ends = {"whole": self.whole, "removes": self.removes, "keeps": self.keeps}
        what = {
            "whole": "share lost when the whole part is corrupted",
            "removes": "share lost when the subspace alone is corrupted (project-out)",
            "keeps": "share that the subspace alone carries (keep-only)",
        }
        told = {} if self.reason is None else {"reason": self.reason}
        made = {
            name: scalar(
                e.value,
                "share",
                **{**about, **told, "what": what[name], "null": 0.0},
                low=None if math.isnan(e.low) else e.low,
                high=None if math.isnan(e.high) else e.high,
            )
            for name, e in ends.items()
        }
        lucky = max(self.random, default=math.nan)
        made["random"] = scalar(
            lucky,
            "share",
            **{**about, **told, "what": "largest share lost for random subspaces of the same rank"},
            all=list(self.random),
        )
        same = "clean and corrupted values are the same"
        empty = {} if self.rank else {"reason": self.reason or same}
        made["rank"] = scalar(
            float(self.rank), "dimensions", **about, what="dimensions that hold it"
        )
        made["effective_rank"] = scalar(
            self.effective_rank, "dimensions", **{**about, **empty}, what="participation ratio"
        )
        about |= {"what": "energy of the differences by direction", "display": {}}
        labels = {"feature": [str(i) for i in range(len(self.energies))]}
        made["energies"] = Panel(self.energies, ("feature",), labels, "share", about)
        return made


def functional_subspace(
    model: nn.Module,
    behavior: BehaviorLike,
    part: Place,
    *,
    positions: str | None = None,
    rank: int | None = None,
    energy: float = 0.9,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> FunctionalSubspace:
    """Find the subspace that a step works in, and what becomes of the behavior without it.

    Differences a(clean) − a(corrupted) of what the part computes, on one half of the pairs; their
    largest right singular vectors span the subspace. On the other half the part carries its
    corrupted value inside it (*project-out*), outside it (*keep-only*), and everywhere. Shares of
    m(clean) − m(corrupted). The null are random subspaces of the same rank.

    An effect inside a subspace need not come from what the model uses there: it can pass through a
    dormant direction that the corrupted value wakes up (Makelov et al. 2023). That ``whole`` is not
    exceeded speaks against it.

    Args:
        model: The user's model; it is left as it was.
        behavior: Pairs of prompts; half of them find the subspace, half judge it.
        part: A head (its z), an MLP (what it writes), or the stream entering a layer (`Residual`).
        positions: A position that the behavior names; None takes all.
        rank: Dimensions; None takes as many as hold ``energy``.
        energy: Share of the squared differences that the subspace holds.
        anatomy: What the model is made of, where that is known already.
        task: How the model is called; None calls it with the batch.
        seed: Seed of the split and of random subspaces.

    Returns:
        The subspace; effects are NaN with a reason where the metric is the same on both prompts.

    Raises:
        ArgumentError: If energy or rank are out of range, or the behavior has a single pair.
    """
    if not 0 < energy <= 1 or (rank is not None and rank < 1):
        raise ArgumentError.of(
            "energy, rank",
            expected="energy above 0 and at most 1, rank of at least 1",
            got=f"{energy}, {rank}",
            do="Take energy=0.9.",
        )
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        known = anatomy or Anatomy.of(plain, own.clean, task=task)
        found, judged = own.split(seed=seed)
        trial = _Trial(plain, known, task or Task(), part, positions)
        rows = trial.differences(found)
        finite = bool(rows.isfinite().all())
        rows = rows if finite else torch.zeros_like(rows)  # Of what is not finite: no subspace.
        basis, shares, effective = _spanned(rows, rank, energy)
        written = _in_stream(basis, part, known)
        reason, ends, lucky = trial.effects(judged, basis, seed)
        reason = reason if finite else "what the part computes is not finite"
    about = {
        "energy": energy,
        "positions": positions or "all",
        "pairs": [len(found), len(judged)],
        "d": rows.shape[1],
        "seed": seed,
        "interval": "95 %, bootstrap over prompts",
        "ablation": "corrupted run's value",
    }
    return FunctionalSubspace(
        part, own.name, basis, written, shares, effective, *ends, lucky, about, reason
    )


def functional_overlap(one: FunctionalSubspace, other: FunctionalSubspace) -> tuple[float, float]:
    """Return how much two functions share in the stream, and the null.

    ‖UᵀV‖² / min(k, l) with U and V the orthonormal bases of what is written, of rank k and l: the
    mean squared cosine of the principal angles, 1 if one lies inside the other. For Haar-random
    subspaces it is max(k, l) / d_model.

    Args:
        one: A subspace.
        other: Another one of the same model.

    Returns:
        The overlap and its null; NaN where a subspace is empty.

    Raises:
        ArgumentError: If they stand in streams of different width.
    """
    if len(one.written) != len(other.written):
        raise ArgumentError.of(
            "other",
            expected=f"a subspace of a stream of {len(one.written)} numbers",
            got=f"one of {len(other.written)}",
            do="Compare subspaces of one model.",
        )
    ranks = (one.written.shape[1], other.written.shape[1])
    if not min(ranks):
        return math.nan, math.nan
    value = float((one.written.T @ other.written).square().sum()) / min(ranks)
    return value, max(ranks) / len(one.written)


@dataclass(eq=False)
class _Trial:
    """A model and a part of it, run on halves of a behavior."""

    model: nn.Module
    anatomy: Anatomy
    task: Task
    part: Place
    positions: str | None

    def differences(self, behavior: Behavior) -> Tensor:
        """Return clean − corrupted of what the part computes ``[row, d]``."""
        ports = Ports(self.model, self.task, lambda: self.anatomy)
        if as_place(self.part).kind == "residual":
            ports.find_streams(behavior.clean)
        clean, corrupted = (self._seen(ports, b) for b in (behavior.clean, behavior.corrupted))
        rows = (clean - corrupted).float().cpu()
        if self.positions is not None:
            at = behavior.where(self.positions).cpu()
            return rows[torch.arange(len(rows)), at]
        mask = attention_mask_of(behavior.clean)
        flat = rows.flatten(0, 1)
        return flat if mask is None else flat[mask.flatten().bool().cpu()]

    def _seen(self, ports: Ports, batch: Any) -> Tensor:
        place = as_place(self.part)
        seen: dict[Any, Tensor] = {}
        with ports.opened({}, seen, {place.port}):
            self.task.outputs(self.model, batch)
        return place.taken(seen[place.port]).clone()

    def effects(
        self, behavior: Behavior, basis: Tensor, seed: int
    ) -> tuple[str | None, tuple[Estimate, Estimate, Estimate], tuple[float, ...]]:
        """Return why there are none, what is lost and kept, and what random subspaces lose."""
        clean, corrupted = (
            behavior.metric(self.task.outputs(self.model, b)).float()
            for b in (behavior.clean, behavior.corrupted)
        )
        reason = coinciding(float(clean.mean()), float(corrupted.mean()), "a part")
        if reason is None and not basis.shape[1]:
            reason = "the part computes the same on clean and corrupted prompts"
        if reason is not None:
            nothing = Estimate(math.nan)
            return reason, (nothing, nothing, nothing), ()
        effect = clean - corrupted
        all_lost = clean - self._without(behavior, None)
        lost = clean - self._without(behavior, basis)
        outside = clean - self._without(behavior, basis, outside=True)
        generator = torch.Generator().manual_seed(seed)
        lucky = []
        for _ in range(DRAWS):
            drawn = torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q
            some = clean - self._without(behavior, drawn)
            lucky.append(share_of(some, effect).value)
        ends = (
            share_of(all_lost, effect, seed=seed),
            share_of(lost, effect, seed=seed),
            share_of(all_lost - outside, effect, seed=seed),
        )
        return None, ends, tuple(lucky)

    def _without(
        self, behavior: Behavior, basis: Tensor | None, *, outside: bool = False
    ) -> Tensor:
        where = None if self.positions is None else behavior.where(self.positions)
        at = At(self.part, positions=where, basis=basis, outside=outside)
        value = from_run(behavior.corrupted)
        with intervene(
            self.model, {at: value}, task=self.task, anatomy=self.anatomy, example=behavior.clean
        ):
            return behavior.metric(self.task.outputs(self.model, behavior.clean)).float()


def _spanned(rows: Tensor, rank: int | None, energy: float) -> tuple[Tensor, Tensor, float]:
    """Return a basis of differences, their energies as shares, and the effective rank."""
    _, values, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
    squared = values.square()
    total = squared.sum()
    if not bool(total > 0):
        return vectors[:0].T.float(), torch.zeros(0), math.nan
    shares = squared / total
    real = int((values > 1e-6 * values[0]).sum())
    held = int((shares.cumsum(0) < energy - 1e-12).sum()) + 1
    k = min(real, held if rank is None else rank)
    effective = float(total**2 / squared.square().sum())
    return vectors[:k].T.float().contiguous(), shares.float(), effective


def _in_stream(basis: Tensor, part: Place, anatomy: Anatomy) -> Tensor:
    """Return an orthonormal basis of what a subspace writes into the stream."""
    if not isinstance(part, Head) or not basis.shape[1]:
        return basis if not isinstance(part, Head) else basis.new_zeros(anatomy.d_model, 0)
    out = anatomy.W_O[part.layer][part.head].float().cpu()
    columns, values, _ = torch.linalg.svd(out.T @ basis, full_matrices=False)
    found: Tensor = columns[:, values > 1e-6 * values[0].clamp(min=1e-30)]
    return found


@dataclass(frozen=True)
class FunctionalSubspaces:
    """Subspaces that steps work in, what their loss does, and how they overlap.

    For a single part of a single behavior the panels of `FunctionalSubspace.reading`. For several,
    over ``feature`` (behavior at part): ``rank``, ``effective_rank``, ``whole``, ``removes``,
    ``keeps``, ``random``; and over (writer, reader) ``overlap`` less its null; see
    `functional_overlap`.

    Args:
        behaviors: Behaviors by name.
        parts: Printed names of heads and MLPs (``L1H3``, ``MLP2``), or ``resid4`` for the stream
            that enters a layer; each on every behavior.
        name: First part of the records' names.
        positions: A position that all behaviors name, or None.
        energy: See `functional_subspace`.
        rank: See there.

    Raises:
        ArgumentError: If there is no behavior or part, or a name is no part's.
    """

    behaviors: Mapping[str, BehaviorLike]
    parts: Sequence[str]
    name: str = "functional_subspaces"
    positions: str | None = None
    energy: float = 0.9
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.behaviors or not self.parts:
            raise ArgumentError.of(
                "behaviors, parts", expected="one or more of each", got="none", do="Name some."
            )
        for text in self.parts:
            named_part(text)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        made = {}
        for name, behavior in self.behaviors.items():
            own = as_behavior(behavior).to(context.device)
            known = shared_anatomy(model, context, own.clean)
            for text in self.parts:
                made[f"{name} at {text}"] = functional_subspace(
                    model,
                    own,
                    named_part(text),
                    positions=self.positions,
                    energy=self.energy,
                    rank=self.rank,
                    anatomy=known,
                    task=context.known_task,
                )
        if len(made) == 1:
            return next(iter(made.values())).reading()
        return _joined(made)


NUMBERS = ("rank", "effective_rank", "whole", "removes", "keeps", "random")


def _joined(found: Mapping[str, FunctionalSubspace]) -> dict[str, Panel]:
    readings = {label: space.reading() for label, space in found.items()}
    labels = list(found)
    made: dict[str, Panel] = {}
    for name in NUMBERS:
        panels = [reading[name] for reading in readings.values()]
        values = torch.tensor([panel.item() for panel in panels])
        about = dict(panels[0].convention)
        reasons = [p.convention["reason"] for p in panels if "reason" in p.convention]
        for key in ("part", "behavior", "low", "high", "all", "reason"):
            about.pop(key, None)
        about |= {"reason": reasons[0]} if reasons else {}
        about["display"] = {"picture": "bars"} if name in ("removes", "keeps") else {}
        made[name] = Panel(values, ("feature",), {"feature": labels}, panels[0].unit, about)
    pairs = [[functional_overlap(a, b) for b in found.values()] for a in found.values()]
    excess = torch.tensor([[value - null for value, null in row] for row in pairs])
    nulls = [[null for _, null in row] for row in pairs]
    about = {
        "what": "overlap of what two functions write, less its null max(k, l)/d_model",
        "null": 0.0,
        "nulls": [[None if math.isnan(v) else v for v in row] for row in nulls],
        "sign": "larger: they share more",
        "display": {},
    }
    if bool(excess.isnan().any()):
        about["reason"] = "NaN: a subspace is empty"
    coords = {"writer": labels, "reader": labels}
    made["overlap"] = Panel(excess, ("writer", "reader"), coords, "1", about)
    return made
