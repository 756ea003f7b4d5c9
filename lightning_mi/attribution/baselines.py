"""Where a path begins: the baseline x′ and what stays at its own value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..batch import attention_mask_of
from ..errors import ArgumentError
from .entry import Entry
from .joint import Joint
from .question import widened

__all__ = ["Baseline", "Keep", "baseline_point"]

Start: TypeAlias = Tensor | int | float | None
"""A number, a tensor, or None for zero."""

Baseline: TypeAlias = Start | Mapping[str | int, Start]
"""A number, a tensor, or None for zero; of several inputs one for each key."""

Keep: TypeAlias = Tensor | Sequence[int] | Mapping[str | int, Tensor | Sequence[int] | None] | None
"""A boolean mask, or token ids; of several inputs one for each key."""


def baseline_point(entry: Entry, baseline: Baseline, keep: Keep = None) -> Tensor:
    """Return the point at which the path begins, as float32 or float64.

    Args:
        entry: The model and its inputs.
        baseline: What the user gave.
        keep: Tokens that keep their own embedding.

    Returns:
        Shaped like the inputs; for ids one vector for each.

    Raises:
        ArgumentError: If baseline or mask do not fit the inputs.
    """
    if isinstance(entry, Joint):
        return _side_by_side(entry, baseline, keep)
    if isinstance(baseline, Mapping) or isinstance(keep, Mapping):
        raise ArgumentError.of(
            "baseline or keep",
            expected="what one input takes",
            got="a mapping",
            do="Mappings are for several inputs at once: see together.",
        )
    point = widened(entry.point)
    start = _vectors(entry, baseline, point) if entry.is_tokens else _floats(baseline, point)
    kept = _kept(entry, keep, point)
    return start if kept is None else torch.where(kept, point, start)


def _side_by_side(entry: Joint, baseline: Baseline, keep: Keep) -> Tensor:
    """Return the baselines of several inputs; a tensor is a point of all of them."""
    starts, kept = for_each(entry, "baseline", baseline), for_each(entry, "keep", keep)
    if isinstance(baseline, Tensor):
        whole = baseline.expand(entry.inputs.shape)
        starts = dict(entry.split(whole))
    return entry.side_by_side(lambda key, part: baseline_point(part, starts[key], kept[key]))


def for_each(entry: Joint, argument: str, given: Any) -> dict[str | int, Any]:
    """Return what an argument says about each of several inputs.

    Args:
        entry: The inputs.
        argument: Name of the argument.
        given: A mapping from keys; None for all, or where a key is missing; a tensor stands for
            all inputs side by side and is left to the caller.

    Returns:
        One entry for each key.

    Raises:
        ArgumentError: If it is anything else, or a key is unknown.
    """
    known = list(entry.parts)
    if given is not None and not isinstance(given, Tensor | Mapping):
        raise _no_mapping(argument, known, repr(given)[:60])
    named = given if isinstance(given, Mapping) else {}
    if any(key not in known for key in named):
        raise _no_mapping(argument, known, f"the keys {list(named)}")
    return {key: named.get(key) for key in known}


def _no_mapping(argument: str, known: list[str | int], got: str) -> ArgumentError:
    return ArgumentError.of(
        argument,
        expected=f"a mapping from the inputs {known}",
        got=got,
        do="Several inputs are explained at once: say for which of them this is meant.",
    )


def _floats(baseline: Start, point: Tensor) -> Tensor:
    if baseline is None or isinstance(baseline, int | float):
        return torch.full_like(point, float(baseline or 0))
    same = baseline.ndim == point.ndim and all(
        a in (1, b) for a, b in zip(baseline.shape, point.shape, strict=True)
    )
    if not same and baseline.shape != point.shape[1:] and baseline.ndim:
        raise ArgumentError.of(
            "baseline",
            expected=f"the shape of the inputs {tuple(point.shape)} or of one example "
            f"{tuple(point.shape[1:])}",
            got=tuple(baseline.shape),
            do="Sizes of 1 are repeated; a number stands for a constant baseline.",
        )
    return baseline.to(point).expand(point.shape).clone()


def _vectors(entry: Entry, baseline: Start, point: Tensor) -> Tensor:
    if baseline is None:
        return torch.zeros_like(point)
    given = torch.as_tensor(baseline, device=point.device)
    if given.is_floating_point() and given.ndim:
        fits = given.shape in (point.shape, point.shape[1:], point.shape[-1:])
        if not fits:
            raise _misfit(entry, point, given)
        return given.to(point).expand(point.shape).clone()
    if given.is_floating_point() or given.dtype == torch.bool:
        raise _misfit(entry, point, given)
    ids = entry.inputs
    if given.shape not in (ids.shape, ids.shape[1:], torch.Size([])):
        raise _misfit(entry, point, given)
    size = min(lookup.table.num_embeddings for lookup in entry.lookups)
    if bool((given < 0).any()) or bool((given >= size).any()):
        raise ArgumentError.of(
            "baseline",
            expected=f"token ids from 0 to {size - 1}",
            got=f"{int(given.min())} to {int(given.max())}",
            do="Pass for example the id of the padding token.",
        )
    return widened(entry.embed(given.expand(ids.shape).to(ids.dtype)))


def _misfit(entry: Entry, point: Tensor, given: Tensor) -> ArgumentError:
    shape = tuple(entry.inputs.shape)
    return ArgumentError.of(
        "baseline",
        expected=f"token ids of shape {shape}, {shape[1:]} or one id, or vectors of shape "
        f"{tuple(point.shape)}, {tuple(point.shape[1:])} or {tuple(point.shape[-1:])}",
        got=f"{str(given.dtype)[6:]} of shape {tuple(given.shape)}",
        do="Ids are never interpolated: the path runs between embedded vectors.",
    )


def _kept(entry: Entry, keep: Keep, point: Tensor) -> Tensor | None:
    shape = point.shape[:-1] if entry.is_tokens else point.shape
    kept = torch.zeros(shape, dtype=torch.bool, device=point.device)
    mask = attention_mask_of(entry.batch)
    if entry.is_tokens and mask is not None and mask.shape[:1] == shape[:1] and len(shape) == 2:
        kept[:, : mask.shape[1]] |= ~mask[:, : shape[1]].bool()
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        if keep.shape not in (shape, shape[1:]):
            raise ArgumentError.of(
                "keep",
                expected=f"a mask of shape {tuple(shape)}",
                got=tuple(keep.shape),
                do="True marks what keeps its own value.",
            )
        kept |= keep.to(kept.device)
    elif keep is not None:
        if not entry.is_tokens:
            raise ArgumentError.of(
                "keep",
                expected="a boolean mask, as the inputs are floats",
                got=repr(keep)[:60],
                do="Ids can be kept only where the inputs are ids.",
            )
        kept |= torch.isin(entry.inputs, torch.as_tensor(keep, device=kept.device))
    return (kept[..., None] if entry.is_tokens else kept) if bool(kept.any()) else None
