"""What was observed must reproduce what the model computed: rows of pattern @ v against z."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import TapError
from .site import Site, grouped_product, widened

__all__ = ["Check", "verify"]

Check = Literal["rows", "all", "none"]


def verify(site: Site, check: Check) -> None:
    """Compare rows of the pattern, times v, with the output that the model itself computed.

    Args:
        site: The attention, with its z not yet edited.
        check: ``"rows"`` compares two query positions of the first example, ``"all"`` every row
            and, where the model computes a pattern, also the pattern with q and k.

    Raises:
        TapError: If they differ by more than rounding; it names module, row and difference.
    """
    with torch.no_grad():
        if check == "all":
            _compare(site, slice(None), slice(None))
            _replay(site)
        elif check == "rows" and site.z.shape[0]:
            last = site.z.shape[2] - 1
            for row in sorted({last // 2, last}):
                _compare(site, slice(0, 1), slice(row, row + 1))


def _compare(site: Site, examples: slice, queries: slice) -> None:
    found = grouped_product(site.pattern(examples, queries), site.v[examples])
    own = widened(site.z[examples, :, queries])
    _within(site, found, own, _size(site.v[examples]), "z", queries.start or 0)


def _replay(site: Site) -> None:
    if site.replay is None or site.probabilities is None:
        return
    found = site.replay(site.q, site.k)
    own = site.probabilities
    _within(site, widened(found.reshape(own.shape)), widened(own), 1.0, "the pattern", 0)


def _within(site: Site, found: Tensor, own: Tensor, size: float, what: str, first: int) -> None:
    # A row that the model itself left undefined says nothing about what was observed.
    difference = torch.where(own.isfinite(), found - own, 0.0).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    if worst <= tolerance(site.z) * size + 1e-30:
        return
    _, head, row, _ = (int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise TapError(
        f"attention in {site.module!r}: expected that q, k, mask and scale as observed reproduce "
        f"{what}, got a difference of {worst:.3g} at query position {first + row} of head {head}. "
        "If this attention adds something of its own (a bias, a sink, dropout), please report the "
        "model; tap(..., check='none') skips this check, and then patterns are not to be trusted."
    )


def tolerance(z: Tensor) -> float:
    """Return how far rounding alone may carry an output, relative to the largest value.

    Args:
        z: The output, for its type and device.

    Returns:
        A relative tolerance.
    """
    if z.element_size() < 4:
        return 4e-2
    if z.dtype == torch.float64:
        return 1e-8
    # Kernels on accelerators may round single precision to 10 bits (TF32).
    return 2e-4 if z.device.type == "cpu" else 1e-2


def _size(values: Tensor) -> float:
    finite = torch.where(values.isfinite(), values, 0.0)
    return float(finite.abs().max()) if finite.numel() else 0.0
