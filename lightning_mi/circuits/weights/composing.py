"""Composition of attention heads: how much of what one writes does another read.

Row vectors. With A = W_OV of the writer and B = W_QK (Q), W_QKᵀ (K) or W_OV (V) of the reader,
composition is ‖A·B‖ / (‖A‖·‖B‖), Frobenius norms (Elhage et al. 2021, *A Mathematical Framework for
Transformer Circuits*). B is what the reader sees: the gain of its norm is folded in, and where that
norm is a LayerNorm the all-ones direction is dropped from A and B.

The null is exact: for a Haar-random rotation U of the residual basis E‖A·U·B‖² = ‖A‖²·‖B‖²/d_model,
whatever the spectra, so unrelated heads have a root mean square of 1/√d_model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import ArgumentError
from ...measurement import Context
from ...record import Panel, Reading
from .factors import Role, earlier, role_of
from .pairs import Pairs, z_scores
from .panels import pair_panel, reader_panel, strongest_panel

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["Composition", "composition", "composition_z"]

FORMS = ("frobenius", "spectrum")


def composition(
    anatomy: Anatomy,
    kind: str = "Q",
    corrected: bool = True,
    *,
    form: str = "frobenius",
    fold: bool = True,
) -> Tensor:
    """Return Q-, K- or V-composition of all pairs of heads.

    Form ``"frobenius"``: ‖A·B‖ / (‖A‖·‖B‖). Its maximum depends on the spectra (1/√k for flat
    ones of rank k), so ``"spectrum"`` divides by what perfectly aligned heads would have:
    ‖A·B‖ / √(Σ σ_i(A)²·σ_i(B)²), in [0, 1]. Neither changes when weights are scaled or when the
    residual basis is rotated.

    Args:
        anatomy: The model's anatomy.
        kind: What the reader reads it for: ``"Q"``, ``"K"`` or ``"V"``.
        corrected: Subtract the null: 1/√d_model, for the spectrum form divided by the same.
        form: ``"frobenius"`` or ``"spectrum"``.
        fold: Fold gains of norms and drop what LayerNorm does not see; False takes plain weights.

    Returns:
        ``[layer, head, layer, head]``, writer first. 0 unless the writer is in an earlier layer,
        and where a head has no weights (0/0); NaN beyond the heads of a layer that has fewer.

    Raises:
        ArgumentError: If kind or form is none of those.
    """
    role = role_of(kind, "kind")
    if form not in FORMS:
        raise ArgumentError.of("form", expected=f"one of {FORMS}", got=repr(form), do="Choose.")
    pairs = Pairs.of(anatomy, role, fold=fold)
    values = pairs.norms()
    if corrected:
        values = values - pairs.defined() / math.sqrt(anatomy.d_model)
    return values if form == "frobenius" else _by_ceiling(values, pairs)


def composition_z(
    anatomy: Anatomy, kind: str = "Q", *, rotations: int = 64, seed: int = 0
) -> Tensor:
    """Return how far composition is from that of randomly rotated heads, in standard deviations.

    z = (c − mean of c_n) / sd of c_n, where c_n is the composition after the n-th Haar-random
    rotation between writer and reader. ‖A·U·B‖² is Σ_ij σ_i(A)²·W_ij²·σ_j(B)² with W a corner of
    the rotation, so no d_model × d_model matrix is drawn. All pairs share the rotations.

    Args:
        anatomy: The model's anatomy.
        kind: ``"Q"``, ``"K"`` or ``"V"``.
        rotations: Number of rotations, at least 2.
        seed: Seed of their own generator.

    Returns:
        ``[layer, head, layer, head]``, writer first. 0 unless the writer is in an earlier layer;
        NaN where a head has no weights, where all rotations give one value, and for heads that a
        layer does not have.

    Raises:
        ArgumentError: If kind is none of those, or rotations is below 2.
    """
    role = role_of(kind, "kind")
    _check_rotations(rotations, least=2)
    pairs = Pairs.of(anatomy, role)
    return _z(pairs.norms(), pairs, rotations, seed)


@dataclass(frozen=True)
class Composition:
    """Composition of all pairs of heads, with its null and its distance from random rotations.

    Panels for each kind, named by it. Over (writer, reader): ``K`` (raw, in [0, 1]), ``K_spectrum``
    (divided by what aligned heads would have), ``K_z`` (standard deviations from random rotations).
    Over (layer, head): ``K_reader``, raw minus 1/√d_model of the strongest earlier writer. Scalar:
    ``K_strongest``, the largest of these, its pair named in the convention. See `composition`.

    Args:
        name: First part of the records' names.
        kinds: Which of ``"Q"``, ``"K"`` and ``"V"``.
        rotations: Random rotations behind ``K_z``; 0 leaves it out.
        seed: Seed of the rotations' own generator.

    Raises:
        ArgumentError: If a kind is none of those, or rotations is 1 or negative.
    """

    name: str = "composition"
    kinds: Sequence[str] = ("Q", "K", "V")
    rotations: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for kind in self.kinds:
            role_of(kind, "kinds")
        if self.rotations:
            _check_rotations(self.rotations, least=2)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        anatomy = shared_anatomy(model, context)
        panels: dict[str, Panel] = {}
        pairs: Pairs | None = None
        with torch.no_grad():
            for role in (role_of(kind, "kinds") for kind in self.kinds):
                pairs = Pairs.of(anatomy, role, like=pairs)
                panels |= self._panels(pairs, anatomy, role)
        return panels

    def _panels(self, pairs: Pairs, anatomy: Anatomy, role: Role) -> dict[str, Panel]:
        raw, null = pairs.norms(), 1 / math.sqrt(anatomy.d_model)
        above = (raw - null).where(pairs.defined() == 1, math.nan)
        about: dict[str, Any] = {"what": WHAT[role]}
        about["sign"] = "larger: reads more of what the writer writes"
        tables: dict[str, tuple[Tensor, dict[str, Any]]] = {role: (raw, {"null": null})}
        form = {"form": "divided by its value for aligned heads", "null": "1/sqrt(d_model), too"}
        tables[f"{role}_spectrum"] = (_by_ceiling(raw, pairs), form)
        if self.rotations:
            drawn = {"rotations": self.rotations, "null": 0.0, "form": Z}
            tables[f"{role}_z"] = (_z(raw, pairs, self.rotations, self.seed), drawn)
        panels: dict[str, Panel] = {}
        panels |= {n: pair_panel(v, anatomy, role, {**about, **c}) for n, (v, c) in tables.items()}
        about |= {"null": 0.0, "subtracted": null, "corrected": "above 1/sqrt(d_model), the null"}
        shown = {**about, "display": {"picture": "map"} if role == "K" else {}}
        panels[f"{role}_reader"] = reader_panel(above, anatomy, role, shown)
        shown = {**about, "display": {"scalar": role}}
        panels[f"{role}_strongest"] = strongest_panel(above, anatomy, role, shown)
        return panels


WHAT: dict[str, str] = {
    "Q": "|W_OV(writer) W_QK(reader)| / (|W_OV| |W_QK|), Frobenius norms, norms' gains folded in",
    "K": "|W_OV(writer) W_QK(reader)^T| / (|W_OV| |W_QK|), Frobenius norms, norms' gains folded in",
    "V": "|W_OV(writer) W_OV(reader)| / (|W_OV| |W_OV|), Frobenius norms, norms' gains folded in",
}

Z = "(value - mean) / standard deviation over random rotations between writer and reader"


def _by_ceiling(values: Tensor, pairs: Pairs) -> Tensor:
    ceiling = pairs.ceiling()
    return values / ceiling.where(ceiling != 0, 1.0)


def _z(values: Tensor, pairs: Pairs, rotations: int, seed: int) -> Tensor:
    scores = z_scores(values, *pairs.rotated(rotations, seed))
    return scores.where(earlier(values), values)


def _check_rotations(rotations: int, *, least: int) -> None:
    if rotations < least:
        raise ArgumentError.of(
            "rotations",
            expected=f"at least {least}",
            got=rotations,
            do="A deviation needs two; pass 64.",
        )
