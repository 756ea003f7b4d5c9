"""Subspaces: does one head read where another writes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import ArgumentError
from ...measurement import Context
from ...nodes import Head, Reader, parse
from ...record import Panel, Reading
from .bases import Subspaces, check_energy, subspaces
from .factors import check_count, head_of, role_of
from .panels import pair_panel, reader_panel, strongest_panel

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["SubspaceOverlap", "principal_angles", "subspace_overlap"]


def subspace_overlap(
    anatomy: Anatomy,
    reads: str = "Q",
    *,
    weighted: bool = False,
    energy: float = 0.9,
    k: int | None = None,
) -> Tensor:
    """Return how much of the space that one head writes another one reads.

    ‖U·Vᵀ‖²/k with U and V the orthonormal rows of writer and reader: the mean squared cosine of the
    principal angles, in [0, 1]. Weighted: Σ_i σ_i²·‖V·u_i‖² / Σ_i σ_i² over all directions u_i that
    the writer writes, the share of its energy that falls into the reader's space. Null of both, for
    a Haar-random rotation: k/d_model.

    Args:
        anatomy: The model's anatomy.
        reads: Which input of the reader: ``"Q"``, ``"K"`` or ``"V"``.
        weighted: Weigh the writer's directions by their energy.
        energy: Chooses k; see `subspaces`, which also tells the k that was chosen.
        k: A number of directions instead.

    Returns:
        ``[layer, head, layer, head]``, writer first. 0 unless the writer is in an earlier layer;
        NaN where a head has no weights, and for heads that a layer does not have.

    Raises:
        ArgumentError: If the input is none of those, energy is not in (0, 1], or k not in
            1 … d_head.
    """
    return subspaces(anatomy, reads, energy=energy, k=k).overlap(weighted=weighted)


def principal_angles(
    anatomy: Anatomy,
    writer: Head | str,
    reader: Reader | str,
    *,
    energy: float = 0.9,
    k: int | None = None,
) -> Tensor:
    """Return the angles between what one head writes and what an input of another reads.

    Args:
        anatomy: The model's anatomy.
        writer: The head that writes, such as ``"L0H1"``.
        reader: The input that reads, such as ``"L1H0.k"`` or ``Reader(Head(1, 0), "k")``.
        energy: Chooses k; see `subspaces`.
        k: A number of directions instead.

    Returns:
        ``[k]``, radians, smallest first: 0 for a shared direction, π/2 for one that is not read.

    Raises:
        ArgumentError: If there are no such heads, energy is not in (0, 1], or k not in
            1 … d_head.
    """
    source = head_of(anatomy, writer, "writer")
    place = parse(reader) if isinstance(reader, str) else reader
    if not isinstance(place, Reader):
        raise ArgumentError.of(
            "reader",
            expected="an input of a head, such as L1H0.k",
            got=str(reader),
            do="Name q, k or v.",
        )
    head_of(anatomy, place.node, "reader")
    return subspaces(anatomy, place.role.upper(), energy=energy, k=k).angles(source, place)


@dataclass(frozen=True)
class SubspaceOverlap:
    """How much of the space that one head writes another one reads, for all pairs.

    Panels for each input, named by it. Over (writer, reader): ``K`` (mean squared cosine of the
    principal angles) and ``K_weighted`` (share of the writer's energy in the reader's space). Over
    (layer, head): ``K_reader``, weighted minus k/d_model for the strongest earlier writer. Scalar:
    ``K_strongest``, the largest of these, its pair and the principal angles of that pair (radians)
    in the convention. The k that energy chose and the null k/d_model stand in every convention; the
    last two are above it. See `subspace_overlap`.

    Args:
        name: First part of the records' names.
        reads: Which of ``"Q"``, ``"K"`` and ``"V"``.
        energy: k is the number of directions that hold this share of Σσ² in the median head.
        k: A number of directions instead, the same at every step.

    Raises:
        ArgumentError: If an input is none of those, energy not in (0, 1], or k not positive.
    """

    name: str = "subspace_overlap"
    reads: Sequence[str] = ("Q", "K", "V")
    energy: float = 0.9
    k: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for role in self.reads:
            role_of(role, "reads")
        check_energy(self.energy)
        if self.k is not None:
            check_count(self.k, "k")

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        anatomy = shared_anatomy(model, context)
        with torch.no_grad():
            found = [
                _panels(subspaces(anatomy, role, energy=self.energy, k=self.k), role)
                for role in self.reads
            ]
        return {name: panel for panels in found for name, panel in panels.items()}


def _panels(spaces: Subspaces, input_name: str) -> dict[str, Panel]:
    role, anatomy = role_of(input_name, "reads"), spaces.anatomy
    null = spaces.k / anatomy.d_model
    about: dict[str, Any] = {"k": spaces.k, "energy": spaces.energy, "null": null}
    about |= {"sign": "larger: reads more of what the writer writes"}
    plain = {**about, "what": "mean squared cosine of the principal angles"}
    weighed = {**about, "what": "share of the writer's energy inside what the reader reads"}
    overlap, weighted = spaces.overlap(), spaces.overlap(weighted=True)
    # Only pairs whose writer comes first are looked at, so the null may be taken off everywhere.
    above = weighted - null
    higher = {**weighed, "null": 0.0, "subtracted": null, "corrected": "above k/d_model, the null"}
    shown = {"picture": "map"} if role == "K" else {}
    return {
        role: pair_panel(overlap, anatomy, role, plain),
        f"{role}_weighted": pair_panel(weighted, anatomy, role, weighed),
        f"{role}_reader": reader_panel(above, anatomy, role, {**higher, "display": shown}),
        f"{role}_strongest": _with_angles(
            strongest_panel(above, anatomy, role, {**higher, "display": {"scalar": role}}), spaces
        ),
    }


def _with_angles(panel: Panel, spaces: Subspaces) -> Panel:
    """Add the principal angles of the strongest pair to its convention."""
    pair = panel.convention.get("pair")
    if pair is None:
        return panel
    writer, reader = (parse(name) for name in pair.split(" -> "))
    if not isinstance(writer, Head) or not isinstance(reader, Reader):
        return panel
    angles = [round(a, 4) for a in spaces.angles(writer, reader).tolist()]
    return dataclasses.replace(panel, convention={**panel.convention, "angles": angles})
