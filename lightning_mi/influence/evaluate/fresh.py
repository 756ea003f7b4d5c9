"""Retraining with Lightning: a new model and a new Trainer each time: `FreshTrainer`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ...errors import ArgumentError
from ...isolation import untouched
from ...measurement import IndexedData
from ...target import Loss, Target, TargetLike
from ..data import as_indexed, chunks, of_one_shape
from ..objective import Objective, as_objective
from ..point import Point
from ..reader import ValueFunction

__all__ = ["FreshTrainer", "losses_at", "query_batches", "query_losses"]

LOSS = Loss()


@dataclass(frozen=True)
class FreshTrainer:
    """A `Retrain` function that fits a new model with a new Trainer.

    A Trainer that has fitted once trains nothing when asked again, because it has reached its
    ``max_epochs`` or ``max_steps``; so both are made by functions, and used Trainers are refused.

    Args:
        model: Makes a new LightningModule, after all generators were seeded.
        trainer: Makes a new Trainer. Turn off what is of no use a hundred times over: loggers,
            checkpoints, the progress bar.
        train: Map-style dataset, `IndexedData`, or a DataLoader, of which only the dataset and its
            ``collate_fn`` are used; of it the examples with the given indices are trained on.
        queries: Dataset of the queries.
        objective: Gives the queries' losses; a Task is enough.
        loader: Makes the loader of a subset; None is a shuffling `DataLoader` with ``batch_size``.
        batch_size: Of that loader.
        query: What is asked about; a query of which more is better is negated.

    Example:
        >>> from lightning_mi import Regression
        >>> FreshTrainer(object, object, [], [], Regression()).batch_size
        64
    """

    model: Callable[[], Any]
    trainer: Callable[[], Any]
    train: Any
    queries: Any
    objective: Any
    loader: Callable[[Any], Any] | None = None
    batch_size: int = 64
    query: TargetLike = LOSS

    def __call__(self, indices: Sequence[int], seed: int) -> Tensor:
        """Train on some examples.

        Args:
            indices: Their dataset indices.
            seed: Of everything that is drawn.

        Returns:
            The queries' losses, ``[query]``.

        Raises:
            ArgumentError: If the Trainer is a used one, or trained nothing.
        """
        with seeded(seed):
            model, trainer = self.model(), self.trainer()
            if trainer.global_step:
                raise ArgumentError.of(
                    "trainer",
                    expected="a function that makes a new Trainer",
                    got=f"a Trainer that has taken {trainer.global_step} steps already",
                    do="Pass for example lambda: Trainer(max_epochs=5, logger=False).",
                )
            data = as_indexed(self.train, "train")
            subset: Any = Subset(data.dataset, list(indices))
            own = self.loader or partial(
                DataLoader, batch_size=self.batch_size, shuffle=True, collate_fn=data.collate
            )
            trainer.fit(model, own(subset))
        if not trainer.global_step:
            raise ArgumentError.of(
                "trainer",
                expected="a Trainer that takes a step",
                got="no step at all",
                do="Look at max_epochs, max_steps, and whether the loader has a batch.",
            )
        return query_losses(model, as_objective(self.objective), self.queries, self.query)


def query_losses(
    model: Any, objective: Objective, queries: Any, query: TargetLike = LOSS
) -> Tensor:
    """Return L_q of each query: its loss, or the target turned so that less is better.

    Args:
        model: The model; it is left as it was.
        objective: Gives outputs and losses.
        queries: Dataset.
        query: What is asked about.

    Returns:
        Shape ``[query]``, double precision.
    """
    data, asked = as_indexed(queries, "queries"), objective.query(query)
    with untouched(model) as plain:
        point = Point(plain)
        ask = partial(objective.query_losses, query=asked)
        return losses_at(point, ask, query_batches(point, objective, asked, data))


def query_batches(
    point: Point, objective: Objective, query: Target, data: IndexedData
) -> Iterable[Any]:
    """Return queries in batches, one by one where another would pad them.

    Args:
        point: Where the model is.
        objective: Says whether they can be asked together.
        query: What is asked about.
        data: The queries.

    Returns:
        Batches.
    """
    alone = objective.asks_by_itself(query) or not of_one_shape(data)
    return chunks(data, range(len(data)), 1 if alone else None, point)


def losses_at(point: Point, losses: ValueFunction, batches: Iterable[Any]) -> Tensor:
    """Return the losses of some batches at a point.

    Args:
        point: The model.
        losses: ``(model, batch) -> [example]``.
        batches: The examples.

    Returns:
        Shape ``[example]``, double precision, on the CPU.
    """
    with torch.no_grad():
        rows = [point.call(partial(losses, batch=b)).double().cpu() for b in batches]
    return torch.cat(rows)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python's, numpy's and torch's generators for the while, and put them back.

    Args:
        seed: Any whole number.

    Yields:
        Nothing.
    """
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
