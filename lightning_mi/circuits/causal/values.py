"""What an intervention puts in the place of what the model computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ...batch import attention_mask_of, batch_size, fingerprint
from ...errors import ArgumentError, ModelError
from .places import Place

__all__ = ["Value", "from_run", "mean", "resample", "value", "zero"]

Over: TypeAlias = Literal["examples", "all"]


@dataclass(frozen=True, eq=False)
class Value:
    """What is put in a part's place. Made by `zero`, `mean`, `resample`, `from_run` and `value`.

    Args:
        kind: How it is made.
        batch: The batch whose run it comes from, if it comes from one.
        tensor: The value itself, if it was given.
        over: For a mean, what it is taken over.
        seed: For a resample, the seed of the draw.
    """

    kind: Literal["zero", "mean", "resample", "run", "value"]
    batch: Any = None
    tensor: Tensor | None = None
    over: Over = "all"
    seed: int = 0
    key: str = field(default="", repr=False)

    def stored(self, place: Place, seen: Tensor | None) -> Tensor:
        """Return what is kept for a place, from what the reference run computed there.

        Args:
            place: The place.
            seen: The place's tensor in the reference run, None if there was none.

        Returns:
            Detached values; all examples for a resample and a run, else one row.

        Raises:
            ModelError: If the reference run did not compute it.
        """
        if self.kind == "zero":
            return torch.zeros(())
        if self.kind == "value":
            return torch.as_tensor(self.tensor).detach().clone()
        if seen is None:
            raise ModelError(
                f"{place.name}: expected the reference run to compute it, got a pass without it. "
                "Check layer and index."
            )
        part = place.taken(seen.detach()).clone()
        return self._mean(part, place) if self.kind == "mean" else part

    def _mean(self, part: Tensor, place: Place) -> Tensor:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        mask = attention_mask_of(self.batch)
        weight = torch.ones_like(wide[..., :1] if wide.ndim > 2 else wide)
        if mask is not None and mask.shape == part.shape[:2]:
            weight = weight * mask.to(weight).reshape(*mask.shape, *([1] * (wide.ndim - 2)))
        pooled = self.over == "all" and place.kind != "pattern"
        axes = (0, 1) if pooled else (0,)
        total = (wide * weight).sum(axes, keepdim=True)
        return (total / weight.sum(axes, keepdim=True).clamp(min=1)).to(part)

    def given(self, kept: Tensor, part: Tensor, place: Place) -> Tensor:
        """Return what is put in a part's place in a forward pass.

        Args:
            kept: What `stored` returned.
            part: What the model computed ``[example, …]``.
            place: The place.

        Returns:
            A tensor that broadcasts to the part.

        Raises:
            ArgumentError: If it does not.
        """
        if self.kind == "resample":
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.randint(len(kept), (len(part),), generator=generator)
            kept = kept[rows.to(kept.device)]
        elif self.kind == "run" and len(kept) != len(part) and not len(part) % len(kept):
            kept = kept.repeat(len(part) // len(kept), *([1] * (kept.ndim - 1)))
        if not _fits(kept.shape, part.shape):
            raise ArgumentError.of(
                place.name,
                expected=f"a value for shape {tuple(part.shape)}",
                got=f"shape {tuple(kept.shape)}",
                do="Reference and batch must have equal length; mean(batch) fits any length.",
            )
        return kept


def _fits(small: torch.Size, large: torch.Size) -> bool:
    """Say whether one shape broadcasts to another."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)


def zero() -> Value:
    """Return zero: the part writes nothing. Biases after it (b_O) stay.

    Returns:
        The value.
    """
    return Value("zero")


def mean(reference: Any, *, over: Over = "all") -> Value:
    """Return the mean of what the part computes on a reference set.

    Args:
        reference: A batch, or a `Behavior`, whose corrupted prompts are taken. Padding that its
            attention mask names does not count.
        over: ``"all"`` averages over examples and positions, which fits batches of any length;
            ``"examples"`` keeps positions apart. A pattern always keeps them.

    Returns:
        The value.

    Raises:
        ArgumentError: If ``over`` is unknown.
    """
    if over not in ("all", "examples"):
        raise ArgumentError.of(
            "over", expected='"all" or "examples"', got=repr(over), do="Choose one."
        )
    batch = _batch(reference)
    return Value("mean", batch, over=over, key=fingerprint(batch))


def resample(reference: Any, *, seed: int = 0) -> Value:
    """Return what the part computes on an example that is drawn from a reference set.

    All parts with one reference and seed take theirs from the same drawn example.

    Args:
        reference: A batch as long as those that the model will be run on, or a `Behavior`, whose
            corrupted prompts are taken.
        seed: Seed of the draw: the same batch size gets the same examples.

    Returns:
        The value.

    Raises:
        ArgumentError: If the reference is empty.
    """
    batch = _batch(reference)
    if not batch_size(batch):
        raise ArgumentError.of("reference", expected="examples", got="none", do="Pass some.")
    return Value("resample", batch, seed=seed, key=fingerprint(batch))


def from_run(batch: Any) -> Value:
    """Return what the part computes on another batch, example by example.

    Args:
        batch: For example ``behavior.clean`` or ``behavior.corrupted``. It is run once, before
            anything is replaced; its values are kept, never read anew.

    Returns:
        The value.
    """
    return Value("run", batch, key=fingerprint(batch))


def value(tensor: Tensor | float) -> Value:
    """Return a given value.

    Args:
        tensor: A number, or what broadcasts to the part: ``[example, position, d]`` for heads,
            MLPs and the residual stream, ``[example, position]`` for neurons,
            ``[example, query, key]`` for patterns.

    Returns:
        The value.
    """
    return Value("value", tensor=torch.as_tensor(tensor).detach().clone())


def _batch(reference: Any) -> Any:
    corrupted = getattr(reference, "corrupted", None)
    return reference if corrupted is None else corrupted
