"""Recognising a normalisation by what it does: `norm_of`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .parts import Norm
from .tape import is_equal

__all__ = ["norm_of"]

Function = Callable[[Tensor], Tensor]

LOUD = 300.0
"""Inputs so large that eps does not count."""


def norm_of(function: Function, module: str, given: Tensor, made: Tensor) -> Norm | None:
    """Return the norm that a function computes, or None if it computes none.

    The bias is f(0), the gain is (f(x) − bias) / x̂ for a loud x, eps follows from faint ones, and
    whether the mean is subtracted from a shift of x. What is found must reproduce ``made`` from
    ``given``, which the model itself computed.

    Args:
        function: Maps ``[..., d]`` to ``[..., d]``.
        module: Its name.
        given: What it was given in a forward pass.
        made: What it returned.

    Returns:
        The norm, in the precision in which the function runs.
    """
    if made.shape != given.shape or given.shape[-1] < 2 or not given.numel():
        return None
    for kind in ("rms", "layer"):
        found = _fitted(function, Norm(module, kind, eps=0.0), given)
        if found is not None and is_equal(found(given.detach()), made.detach(), 1e-3):
            return found
    return None


def _fitted(function: Function, plain: Norm, like: Tensor) -> Norm | None:
    width = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=generator, dtype=torch.float64)
    if plain.kind == "layer":
        rows[1] += 1.0  # It must not matter.
    rows = rows.to(like)
    ask = torch.cat([torch.zeros_like(rows[:1]), LOUD * rows])
    bias, answers = _split(_call(function, ask, like))
    unit = plain(rows)
    best = unit.abs().argmax(0, keepdim=True)
    gain = (answers.gather(0, best) / unit.gather(0, best))[0]
    if not is_equal(unit * gain, answers):
        return None
    eps = _eps(function, plain, rows[:1], answers[0], bias, like)
    # What is to be differentiated has a gradient also where the gain is one and the bias zero.
    known = gain.requires_grad or bias.requires_grad
    weight = None if is_equal(gain, torch.ones_like(gain), 1e-6) and not known else gain
    return Norm(plain.module, plain.kind, weight, bias if known or bool(bias.any()) else None, eps)


def _eps(
    function: Function, plain: Norm, row: Tensor, loud: Tensor, bias: Tensor, like: Tensor
) -> float:
    """Return eps from how much faint inputs are kept from their full size."""
    sizes = torch.logspace(-7, 1, 17, dtype=torch.float64).to(row)
    answers = _call(function, sizes[:, None] * row, like) - bias
    kept = (answers @ loud) / (loud @ loud).clamp(min=1e-30)
    nearest = int((kept - 0.7).abs().argmin())
    ratio = float(kept[nearest])
    variance = float(plain.scale(row)) ** 2 * float(sizes[nearest]) ** 2
    return variance * (1.0 / ratio**2 - 1.0) if 0.05 < ratio < 0.999 else 0.0


def _split(answers: Tensor) -> tuple[Tensor, Tensor]:
    return answers[0], answers[1:] - answers[0]


def _call(function: Function, rows: Tensor, like: Tensor) -> Tensor:
    shape = (*([1] * (like.ndim - 2)), *rows.shape) if like.ndim > 1 else rows.shape
    return function(rows.reshape(shape)).detach().reshape(rows.shape)
