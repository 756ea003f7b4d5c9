"""Examples by dataset index, in chunks whose size follows from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from ..batch import batch_size, main_input, moved
from ..errors import ArgumentError
from ..measurement import IndexedData
from .point import Point

__all__ = [
    "Singles",
    "as_indexed",
    "chosen",
    "chunks",
    "chunk_size",
    "fetched",
    "of_one_shape",
    "passes",
    "row",
]

KEPT = 2**24
"""Numbers in inputs that are kept between passes rather than fetched again."""

SMALL = 2**22
"""Examples times parameters up to which more examples than 64 are run at once."""

Candidates = None | int | Sequence[int]
"""Which training examples are scored: all, so many drawn at random, or these indices."""


class Singles(IndexedData):
    """Batches of one example each, which are never put together.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__(batches, lambda rows: rows[0])


def as_indexed(data: Any, argument: str) -> IndexedData:
    """Return training examples addressed by dataset index.

    Args:
        data: A map-style dataset, `IndexedData`, or a DataLoader, of which only the dataset and
            its ``collate_fn`` are used: shuffling, samplers and ``drop_last`` change nothing.
        argument: How the user calls it.

    Returns:
        The examples.

    Raises:
        ArgumentError: If there is no dataset, it has no indices, or it is empty.
    """
    if isinstance(data, DataLoader):
        # Without batches of its own a loader's collate_fn is made for single examples.
        single = data.batch_sampler is None
        data = IndexedData(data.dataset, None if single else data.collate_fn)
    found = data if isinstance(data, IndexedData) else None
    dataset = data if found is None else found.dataset
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ArgumentError.of(
            argument,
            expected="a map-style dataset",
            got="none" if dataset is None else f"a {type(dataset).__name__}, an IterableDataset",
            do="Influence names training examples by index, which a stream does not have: "
            "pass a dataset with __getitem__ and __len__.",
        )
    found = IndexedData(dataset) if found is None else found
    if len(found) == 0:
        raise ArgumentError.of(
            argument, expected="at least one example", got="an empty dataset", do="Pass some."
        )
    return found


def chosen(candidates: Candidates, size: int, seed: int) -> list[int]:
    """Return the dataset indices that are meant by ``candidates``.

    Args:
        candidates: None for all; a number, of which so many are drawn and sorted; or indices.
        size: Length of the dataset.
        seed: Of the draw, which touches no global generator.

    Returns:
        Dataset indices.

    Raises:
        ArgumentError: If an index does not exist or a number is not positive.
    """
    if candidates is None:
        return list(range(size))
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        if candidates > 0:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            return sorted(order[:candidates].tolist())
    elif not isinstance(candidates, bool) and len(candidates):
        indices = [int(i) for i in candidates]
        if all(0 <= i < size for i in indices):
            return indices
    raise ArgumentError.of(
        "candidates",
        expected=f"None, a positive number, or dataset indices from 0 to {size - 1}",
        got=candidates if isinstance(candidates, int) else f"{list(candidates)[:4]} …",
        do="None scores every training example.",
    )


def chunk_size(data: IndexedData, parameters: int = SMALL) -> int:
    """Return how many examples are run at once where the user says nothing.

    Args:
        data: The examples; the first is looked at.
        parameters: P, the model's size.

    Returns:
        At most 64, fewer for long texts and large images, so that memory stays bounded. More
        where the model is small, because its activations are too.
    """
    inputs = main_input(fetched(data, [0]))
    limit = 2**18 if inputs.is_floating_point() else 2**14
    most = max(64, min(2048, SMALL // max(1, parameters)))
    return max(1, min(most, limit // max(1, inputs.numel())))


def chunks(
    data: IndexedData, indices: Sequence[int], size: int | None, point: Point
) -> Iterator[Any]:
    """Yield the examples in batches on the model's device, floats in its type.

    Args:
        data: The examples.
        indices: Which of them, in this order.
        size: Examples in a batch; None takes `chunk_size`.
        point: Where the model is.

    Yields:
        Batches.

    Raises:
        ArgumentError: If the size is not positive.
    """
    step = chunk_size(data, point.size) if size is None else size
    if step < 1:
        raise ArgumentError.of("batch_size", expected="1 or more", got=step, do="Or leave it out.")
    for start in range(0, len(indices), step):
        yield moved(fetched(data, indices[start : start + step]), point.device, point.dtype)


def fetched(data: IndexedData, indices: Sequence[int]) -> Any:
    """Return examples as one batch, as `IndexedData.batch` does.

    Args:
        data: The examples.
        indices: Which of them.

    Returns:
        The batch; tensors of a `TensorDataset` are indexed at once rather than one by one.
    """
    known = type(data.dataset) is TensorDataset and data.collate is default_collate
    if not known:
        return data.batch(indices)
    start, stop = indices[0], indices[-1] + 1
    if list(indices) == list(range(start, stop)):  # In order, as where all are asked for.
        return [t[start:stop].clone() for t in data.dataset.tensors]
    places = torch.as_tensor(list(indices))
    return [t[places.to(t.device)] for t in data.dataset.tensors]


def of_one_shape(data: IndexedData) -> bool:
    """Say whether all examples have tensors of the same shapes, so that none pads another.

    Args:
        data: The examples.

    Returns:
        Whether they have.
    """
    if type(data.dataset) is TensorDataset and data.collate is default_collate:
        return True
    if isinstance(data, Singles):
        return False
    first = _shapes(data.batch([0]))
    return all(_shapes(data.batch([i])) == first for i in range(1, len(data)))


def passes(
    data: IndexedData, indices: Sequence[int], size: int | None, point: Point
) -> Callable[[], Iterable[Any]]:
    """Return a function that gives the batches of `chunks` anew each time it is called.

    Args:
        data: The examples.
        indices: Which of them.
        size: Examples in a batch.
        point: Where the model is.

    Returns:
        The function. Data of up to `KEPT` numbers is fetched once and kept.
    """
    numbers = main_input(data.batch([0])).numel() * len(indices)
    if numbers > KEPT:
        return lambda: chunks(data, indices, size, point)
    kept = list(chunks(data, indices, size, point))
    return lambda: kept


def row(batch: Any, index: int) -> Any:
    """Return one example of a batch as a batch of one.

    Args:
        batch: Any batch.
        index: Which example.

    Returns:
        A new batch; what is not as long as the batch is kept whole.
    """
    whole = batch_size(batch)

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: pick(v) for k, v in value.items()}
        if isinstance(value, Tensor):
            matches = value.ndim and value.shape[0] == whole
            return value[index : index + 1] if matches else value
        if isinstance(value, list | tuple):
            if len(value) == whole and not any(isinstance(v, Tensor | Mapping) for v in value):
                return value[index : index + 1]
            return type(value)(pick(v) for v in value)
        return value

    return pick(batch)


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {k: _shapes(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return [_shapes(v) for v in batch]
    return tuple(batch.shape) if isinstance(batch, Tensor) else None
