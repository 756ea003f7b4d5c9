"""Heads written out: any layout in which a model multiplies, to [batch, head, position, d]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ModelError

__all__ = ["Einsum", "four", "heads_of"]


def four(values: Tensor, *, heads: int | None, module: str) -> Tensor:
    """Return a tensor with batch and head as its first two of four axes.

    Args:
        values: ``[batch, head, …]``, ``[batch · head, …]`` or ``[batch, group, head, …]``, each
            with two more axes.
        heads: Number of query heads, for the second form.
        module: Where, for the message.

    Returns:
        The tensor, four-dimensional.

    Raises:
        ModelError: If heads cannot be told apart.
    """
    if values.ndim == 4:
        return values
    if values.ndim == 5:
        return values.flatten(1, 2)
    if values.ndim == 3 and heads and not len(values) % heads:
        return values.reshape(len(values) // heads, heads, *values.shape[1:])
    raise ModelError(
        f"attention in {module!r}: expected [batch, head, position, d_head], or batch and head in "
        f"one axis, got shape {tuple(values.shape)}. Heads cannot be told apart in this layout."
    )


def heads_of(pattern: Tensor, batch: int, module: str) -> int:
    """Return the number of heads of a pattern whose first axis holds batch and heads.

    Args:
        pattern: Shape ``[batch · head, query, key]``.
        batch: Number of examples that the model was given.
        module: Where, for the message.

    Returns:
        The number of heads.

    Raises:
        ModelError: If the first axis is not a multiple of the batch.
    """
    if not batch or len(pattern) % batch:
        raise ModelError(
            f"attention in {module!r}: expected the first axis of a pattern of shape "
            f"{tuple(pattern.shape)} to hold {batch} examples times heads, got {len(pattern)}. "
            "Heads cannot be told apart in this layout."
        )
    return len(pattern) // batch


@dataclass(frozen=True)
class Einsum:
    """An equation with two operands, such as ``bqhd,bkhd->bhqk``."""

    left: str
    right: str
    out: str

    @classmethod
    def read(cls, equation: object) -> Einsum | None:
        """Return the equation in parts, or None if it is none with two operands.

        Args:
            equation: What einsum was given.

        Returns:
            The equation, or None.
        """
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            return None
        inputs, out = equation.replace(" ", "").split("->")
        left, _, right = inputs.partition(",")
        return cls(left, right, out)

    def queries_and_keys(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return both operands as ``[…, position, d]`` in the order of the result's leading axes.

        Args:
            left: First operand.
            right: Second operand.

        Returns:
            Queries and keys, or None if the equation does not multiply such.
        """
        summed = [c for c in self.left if c in self.right and c not in self.out]
        if len(summed) != 1 or len(self.out) < 3:
            return None
        query, key = self.out[-2], self.out[-1]
        if query in self.left and key in self.right and key not in self.left:
            pair = (self.left, left), (self.right, right)
        elif query in self.right and key in self.left and key not in self.right:
            pair = (self.right, right), (self.left, left)
        else:
            return None
        (names_q, q), (names_k, k) = pair
        if query in names_k:
            return None
        leading = self.out[:-2]
        return (
            ordered(q, names_q, leading + query + summed[0]),
            ordered(k, names_k, leading + key + summed[0]),
        )

    def values(
        self, values: Tensor, result: Tensor, swapped: bool
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None:
        """Return values and result as ``[…, position, d]`` in the order of the pattern's axes.

        Args:
            values: The operand that is not the pattern.
            result: What einsum returned.
            swapped: Whether the pattern is the second operand.

        Returns:
            Values, result, and the way back for the result; None if the equation does not weight
            values with a pattern.
        """
        pattern, names = (self.right, self.left) if swapped else (self.left, self.right)
        leading, query, key = pattern[:-2], pattern[-2], pattern[-1]
        inner = [c for c in names if c not in pattern and c in self.out]
        missing = [c for c in leading + query if c not in self.out]
        if len(inner) != 1 or missing or key not in names or key in self.out or query in names:
            return None
        wanted = leading + query + inner[0]
        if len(wanted) != len(self.out):
            return None
        back = [wanted.index(c) for c in self.out]
        return (
            ordered(values, names, leading + key + inner[0]),
            ordered(result, self.out, wanted),
            lambda z: z.permute(back),
        )


def ordered(values: Tensor, names: str, wanted: str) -> Tensor:
    """Return a tensor with its axes in another order, an axis of one entry for each it lacks.

    Args:
        values: Any tensor.
        names: One letter for each of its axes.
        wanted: The axes to return, all of its own among them.

    Returns:
        A view.
    """
    present = [c for c in wanted if c in names]
    values = values.permute([names.index(c) for c in present])
    for place, c in enumerate(wanted):
        if c not in names:
            values = values.unsqueeze(place)
    return values
