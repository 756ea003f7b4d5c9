"""Batches of any usual form: a tensor, a tuple ``(inputs, labels)``, a dictionary.

Nothing here knows a model. Everything returns new containers; the user's batch is never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError

__all__ = [
    "batch_size",
    "cloned",
    "cut",
    "doubled",
    "fingerprint",
    "labels_of",
    "main_input",
    "moved",
]

INPUT_KEYS = ("input_ids", "pixel_values", "input_values", "inputs_embeds", "inputs", "x", "image")
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def main_input(batch: Any) -> Tensor:
    """Return the tensor that explanations are about: ids, pixels or features.

    Args:
        batch: A tensor, a sequence whose first entry holds the inputs, or a mapping with one of
            the usual keys (``input_ids``, ``pixel_values``, ``x``, …), else its first tensor that
            is no label.

    Returns:
        The tensor, not copied.

    Raises:
        ArgumentError: If no tensor is found.

    Example:
        >>> main_input({"labels": torch.zeros(2), "x": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        key = input_key(batch)
        if key is not None:
            return main_input(batch[key])
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch):
        return main_input(batch[0])
    raise ArgumentError.of(
        "batch",
        expected="a tensor, a tuple (inputs, labels) or a dictionary of tensors",
        got=_kind(batch),
        do="Pass a Task whose inputs(batch) returns the input tensor.",
    )


def input_key(batch: Mapping[str, Any]) -> str | None:
    """Return the key of the main input of a mapping, or None.

    Args:
        batch: A mapping.

    Returns:
        The first usual name present, else the first key of a tensor that is no label.
    """
    for key in INPUT_KEYS:
        if batch.get(key) is not None:
            return key
    others = (k for k, v in batch.items() if isinstance(v, Tensor) and k not in LABEL_KEYS)
    return next(others, None)


def with_main_input(batch: Any, inputs: Tensor) -> Any:
    """Return the batch with its main input replaced.

    Args:
        batch: Any batch that `main_input` understands.
        inputs: The new main input.

    Returns:
        A new container of the same form.
    """
    if isinstance(batch, Mapping):
        key = input_key(batch)
        return {k: (with_main_input(v, inputs) if k == key else v) for k, v in batch.items()}
    if isinstance(batch, Sequence):
        entries = [with_main_input(batch[0], inputs), *batch[1:]]
        return tuple(entries) if isinstance(batch, tuple) else entries
    return inputs


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels that travel with a batch, or None.

    Args:
        batch: Any batch.

    Returns:
        The last entry of a sequence, or the value of a usual key of a mapping.
    """
    if isinstance(batch, Mapping):
        found = next((batch[k] for k in LABEL_KEYS if batch.get(k) is not None), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        found = batch[-1]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def attention_mask_of(batch: Any) -> Tensor | None:
    """Return the padding mask of a mapping (1 = a real token), or None.

    Args:
        batch: Any batch.

    Returns:
        The value of ``attention_mask`` if it is a two-dimensional tensor.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def batch_size(batch: Any) -> int:
    """Return the number of examples in a batch.

    Args:
        batch: Any batch that `main_input` understands.

    Returns:
        Length of the main input.
    """
    inputs = main_input(batch)
    return int(inputs.shape[0]) if inputs.ndim else 1


def tree_map(function: Callable[[Any], Any], batch: Any) -> Any:
    """Apply a function to every leaf of nested mappings and sequences.

    Args:
        function: Called with each leaf.
        batch: Any batch. Mappings become dicts, tuples stay tuples, other sequences become lists.

    Returns:
        The new batch.
    """
    if isinstance(batch, Mapping):
        return {k: tree_map(function, v) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return tuple(tree_map(function, v) for v in batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [tree_map(function, v) for v in batch]
    return function(batch)


def cut(batch: Any, size: int) -> Any:
    """Return the first ``size`` examples of a batch.

    Args:
        batch: Any batch.
        size: Number of examples to keep.

    Returns:
        A new batch: tensors and lists as long as the batch are shortened, all else is kept.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), 2)
        (tensor([0, 1]), ['a', 'b'])
    """
    whole = batch_size(batch)

    def shorten(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: shorten(v) for k, v in value.items()}
        if isinstance(value, Tensor):
            return value[:size] if value.ndim and value.shape[0] == whole else value
        if isinstance(value, list | tuple):
            if len(value) == whole and not any(isinstance(v, Tensor | Mapping) for v in value):
                return value[:size]
            # Not type(value)(…): a named tuple takes its entries one by one.
            entries = [shorten(v) for v in value]
            return tuple(entries) if isinstance(value, tuple) else entries
        return value

    return shorten(batch)


def doubled(batch: Any) -> Any:
    """Return a batch of one example with that example twice.

    Args:
        batch: A batch of one.

    Returns:
        A new batch: tensors and lists of one entry are doubled, all else is kept.

    Example:
        >>> doubled((torch.ones(1), ["a"]))
        (tensor([1., 1.]), ['a', 'a'])
    """
    if isinstance(batch, Mapping):
        return {k: doubled(v) for k, v in batch.items()}
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch]) if batch.ndim and len(batch) == 1 else batch
    if isinstance(batch, list | tuple):
        if len(batch) == 1 and not isinstance(batch[0], Tensor | Mapping):
            return batch * 2
        entries = [doubled(v) for v in batch]
        return tuple(entries) if isinstance(batch, tuple) else entries
    return batch


def cloned(batch: Any) -> Any:
    """Return a copy that shares no storage and was not made in inference mode.

    Args:
        batch: Any batch.

    Returns:
        The copy, detached.
    """
    with torch.inference_mode(False), torch.no_grad():
        return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, batch)


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return the batch on a device, its floating-point tensors in the dtype of the parameters.

    Args:
        batch: Any batch.
        device: Where to.
        dtype: Floating-point type; None keeps each tensor's own.

    Returns:
        The batch; tensors that are right already are not copied.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if value.is_floating_point() and dtype is not None else value.dtype
        return value.to(device=device, dtype=wanted)

    return tree_map(move, batch)


def fingerprint(batch: Any) -> str:
    """Return a short text that is equal for equal batches and names no memory address.

    Args:
        batch: Any batch.

    Returns:
        Sixteen hexadecimal digits.

    Example:
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2))
        True
    """
    digest = hashlib.sha256()

    for piece in _pieces(batch):
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest.hexdigest()[:16]


def _pieces(batch: Any) -> Iterator[bytes]:
    """Yield what tells one batch from another, containers and keys included."""
    if isinstance(batch, Mapping):
        yield b"mapping"
        for key, value in batch.items():
            yield repr(key).encode()
            yield from _pieces(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        yield f"sequence {len(batch)}".encode()
        for value in batch:
            yield from _pieces(value)
    elif isinstance(batch, Tensor):
        yield f"{tuple(batch.shape)}{batch.dtype}".encode()
        # A single number may keep any stride under `contiguous`, and then is no row of bytes.
        row = batch.detach().cpu().contiguous().as_strided((batch.numel(),), (1,))
        yield row.view(torch.uint8).numpy().tobytes()
    elif isinstance(batch, np.ndarray) and batch.dtype != object:
        yield f"{batch.shape}{batch.dtype}".encode()
        yield batch.tobytes()
    else:
        # The repr of any other object may hold its address.
        known = isinstance(batch, str | bytes | int | float | np.generic) or batch is None
        yield (repr(batch) if known else type(batch).__qualname__).encode()


def _kind(batch: Any) -> str:
    return f"a {type(batch).__name__}"
