"""Panels of pairs of heads, and what is read off them at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ...nodes import Head, Reader
from ...record import Panel, scalar
from .factors import Role, earlier

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["doubts", "head_panel", "pair_panel", "reader_panel", "strongest_panel"]

Resting: TypeAlias = Literal["QK", "OV", "heads"]
"""What values rest on: queries and keys, values and outputs, or both."""


def pair_panel(
    values: Tensor, anatomy: Anatomy, role: Role, convention: Mapping[str, Any]
) -> Panel:
    """Return a table of pairs as a panel over (writer, reader).

    Writers are the heads of all layers but the last, readers those of all but the first.

    Args:
        values: ``[layer, head, layer, head]``, writer first.
        anatomy: The model's anatomy.
        role: Which input of the reader it is about.
        convention: What is needed to read it.

    Returns:
        The panel, recorded and not drawn.
    """
    writers, readers = _heads(anatomy, 0, 1), _heads(anatomy, 1, 0)
    left = [h.layer * values.shape[1] + h.head for h in writers]
    right = [h.layer * values.shape[1] + h.head for h in readers]
    flat = values.flatten(2).flatten(0, 1)[left][:, right]
    coords = {
        "writer": [str(h) for h in writers],
        "reader": [str(Reader(h, role.lower())) for h in readers],  # type: ignore[arg-type]
    }
    about = {**doubts(anatomy, _circuit(role)), **convention}
    about |= {"elsewhere": "0: the writer is in no earlier layer", "display": {}}
    if flat.isnan().any():
        about["reason"] = "NaN: a head has no weights, or rotations change nothing"
    return Panel(flat, ("writer", "reader"), coords, "1", about)


def reader_panel(
    values: Tensor, anatomy: Anatomy, role: Role, convention: Mapping[str, Any]
) -> Panel:
    """Return for each head as reader its strongest pair, over (layer, head).

    Args:
        values: ``[layer, head, layer, head]``, writer first.
        anatomy: The model's anatomy.
        role: Which input of the reader it is about.
        convention: What is needed to read it.

    Returns:
        The panel; 0 in the first layer, which has no head to read.
    """
    strongest = _earlier_only(values).amax((0, 1))
    strongest = strongest.where(strongest > -math.inf, math.nan)
    strongest[0, : anatomy.n_heads[0]] = 0.0
    about = {**convention, "of": "the strongest writer in an earlier layer; 0 in the first layer"}
    return head_panel(strongest, anatomy, about, _circuit(role))


def strongest_panel(
    values: Tensor, anatomy: Anatomy, role: Role, convention: Mapping[str, Any]
) -> Panel:
    """Return the largest value of all pairs as a scalar, with the pair's name in its convention.

    Args:
        values: ``[layer, head, layer, head]``, writer first.
        anatomy: The model's anatomy.
        role: Which input of the reader it is about.
        convention: What is needed to read it.

    Returns:
        The scalar; NaN with a reason where no pair has a value.
    """
    only = _earlier_only(values)
    best = int(only.argmax())
    if not torch.isfinite(only.flatten()[best]):
        reason = "no pair of heads in two layers has weights"
        return scalar(math.nan, **{**convention, "reason": reason})
    layer, head, at, reader = (int(i) for i in torch.unravel_index(torch.tensor(best), only.shape))
    pair = f"{Head(layer, head)} -> {Head(at, reader)}.{role.lower()}"
    return scalar(
        only.flatten()[best], **{**doubts(anatomy, _circuit(role)), **convention, "pair": pair}
    )


def head_panel(
    values: Tensor,
    anatomy: Anatomy,
    convention: Mapping[str, Any],
    circuit: Resting,
) -> Panel:
    """Return values of heads as a panel over (layer, head).

    Args:
        values: ``[layer, head]``.
        anatomy: The model's anatomy.
        convention: What is needed to read it.
        circuit: What the values rest on: queries and keys, values and outputs, or both.

    Returns:
        The panel.
    """
    coords = {"layer": range(values.shape[0]), "head": range(values.shape[1])}
    about = {**doubts(anatomy, circuit), **convention}
    about["modules"] = list(anatomy.modules)
    if values.isnan().any() and "reason" not in about:
        about["reason"] = "NaN: the layer has no such head, or no weights to compare"
    return Panel(values, ("layer", "head"), coords, "1", about)


def doubts(anatomy: Anatomy, circuit: Resting) -> dict[str, Any]:
    """Return why numbers are approximate, for a convention.

    Args:
        anatomy: The model's anatomy.
        circuit: What the numbers rest on.

    Returns:
        ``approximate`` with the reasons; empty where there are none.
    """
    reasons = anatomy.approximate(circuit=circuit)
    return {"approximate": reasons} if reasons else {}


def _circuit(role: Role) -> Resting:
    return "OV" if role == "V" else "heads"


def _heads(anatomy: Anatomy, skipped: int, left_out: int) -> list[Head]:
    layers = range(skipped, anatomy.n_layers - left_out)
    return [Head(layer, head) for layer in layers for head in range(anatomy.n_heads[layer])]


def _earlier_only(values: Tensor) -> Tensor:
    return values.where(earlier(values) & ~values.isnan(), -math.inf)
