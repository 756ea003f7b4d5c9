"""The parts that an `Anatomy` is made of: norms, writers, readers and notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from ..nodes import Node

__all__ = ["Norm", "NormKind", "Note", "ReaderInput", "ReaderKind", "Writer", "WriterKind"]

NormKind: TypeAlias = Literal["layer", "rms", "other"]
WriterKind: TypeAlias = Literal["embed", "position", "heads", "mlp", "other"]
ReaderKind: TypeAlias = Literal["attention", "mlp", "logits", "other"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation: y = gain · (x − mean) / sqrt(variance + eps) + bias.

    Args:
        module: Dotted name.
        kind: ``"layer"`` subtracts the mean; ``"rms"`` does not, and divides by the root mean
            square; ``"other"`` does something else, so that nothing can be said about parts of x.
        weight: The gain that is in effect ``[d]`` (where a model stores w and multiplies by 1 + w,
            this is 1 + w); None for a gain of 1.
        bias: What is added ``[d]``, or None.
        eps: What is added to the variance, or to the mean square.
    """

    module: str
    kind: NormKind
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def scale(self, x: Tensor) -> Tensor:
        """Return what x is divided by.

        Args:
            x: Shape ``[..., d]``.

        Returns:
            Shape ``[..., 1]``, in single precision at least.
        """
        wide = x.float() if x.element_size() < 4 else x
        centred = wide - wide.mean(-1, keepdim=True) if self.kind == "layer" else wide
        return (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, part: Tensor, scale: Tensor) -> Tensor:
        """Return what becomes of a part of x when the scale is kept as it is.

        The parts of x so treated, plus the bias, add up to `__call__` of x exactly.

        Args:
            part: Shape ``[..., d]``.
            scale: What `scale` returned for the whole x, broadcastable.

        Returns:
            gain · (part − mean of part, for ``"layer"``) / scale, shape ``[..., d]``.
        """
        if self.kind == "layer":
            part = part - part.mean(-1, keepdim=True)
        part = part / scale
        return part if self.weight is None else part * self.weight.to(part.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised x, computed from the parts."""
        y = self.linear(x, self.scale(x))
        return y if self.bias is None else y + self.bias.to(y.device)

    def folded(self, weight: Tensor) -> Tensor:
        """Return a matrix that reads x / scale as ``weight`` reads the normalised x.

        Args:
            weight: Shape ``[..., d, out]``.

        Returns:
            diag(gain) · weight, and for ``"layer"`` its mean over d taken off, which is what
            subtracting the mean of x amounts to.
        """
        if self.weight is not None:
            weight = self.weight.to(weight)[:, None] * weight
        return weight - weight.mean(-2, keepdim=True) if self.kind == "layer" else weight


@dataclass(frozen=True, eq=False)
class Writer:
    """A module whose output is added to the residual stream.

    Args:
        label: ``embed``, ``pos``, ``attn0``, ``MLP0``, or the module's name.
        module: Dotted name of the module whose output is written; ``""`` where no module returns
            it, so that it is found by subtraction.
        layer: The layer it belongs to; −1 for what is written before the first.
        kind: ``"heads"`` is an attention, which splits into its heads and a bias.
        norm: A norm between the module's output and the stream (a sandwich norm), or None.
        factor: A number that the output is multiplied by before it is added.
        through: Norms that the whole stream passes after this write and before its end, in order;
            none but in post-norm models.
        node: The name of the part, where it has one.
        output: Which of the module's outputs is written, where it returns several.
        reads: Index of the reader whose input this is computed from, −1 if from none.
    """

    label: str
    module: str
    layer: int
    kind: WriterKind
    norm: Norm | None = None
    factor: float = 1.0
    through: tuple[Norm, ...] = ()
    node: Node | None = None
    output: int = 0
    reads: int = -1


@dataclass(frozen=True, eq=False)
class ReaderInput:
    """A module whose input is the residual stream: a norm, or what reads where there is none.

    Args:
        label: ``attn0``, ``MLP0`` or ``logits``.
        module: Dotted name of the module whose first input is the stream.
        layer: The layer it belongs to; the number of layers for the logits.
        kind: What reads.
        norm: The norm in between, or None; then ``module`` is the norm.
        after: How many of the writers have written when this reads.
        node: The name of the part, where it has one.
    """

    label: str
    module: str
    layer: int
    kind: ReaderKind
    norm: Norm | None = None
    after: int = 0
    node: Node | None = None


@dataclass(frozen=True)
class Note:
    """What is approximate or unknown, where, and why.

    Args:
        part: The field of `Anatomy` that it concerns, such as ``W_Q``.
        layer: The layer, or None if it concerns no single layer.
        kind: ``"approximate"``: a value is there, and says less than it seems to; ``"unknown"``:
            there is none; ``"refused"``: a part of the model that is left out.
        reason: A sentence.
    """

    part: str
    layer: int | None
    kind: Literal["approximate", "unknown", "refused"]
    reason: str

    def __str__(self) -> str:
        """Return it as one line."""
        where = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.part}{where}: {self.kind}: {self.reason}"
