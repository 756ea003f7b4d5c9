"""Training again on parts of the data, once for each part and seed: `Retraining`."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ...errors import ArgumentError, RunError
from ...progress import track
from ...runs import write_whole
from ..result import InfluenceScores

__all__ = ["Retrain", "Retraining", "RetrainLike", "as_retraining"]

Job: TypeAlias = tuple[tuple[int, ...], int]
"""Dataset indices, in ascending order, and a seed."""


class Retrain(Protocol):
    """Trains a new model on some examples."""

    def __call__(self, indices: Sequence[int], seed: int) -> Tensor | Sequence[float]:
        """Train from scratch and ask.

        Args:
            indices: Dataset indices of the training examples, in ascending order.
            seed: Of initialisation, order of the data and dropout: the same seed and indices
                have to give the same losses.

        Returns:
            The loss of each query on the new model, shape ``[query]``; less is better.
        """


@dataclass(frozen=True)
class Retraining:
    """A function that trains, where its results are kept, and in how many processes it runs.

    Args:
        retrain: See `Retrain`.
        folder: Results are kept here, one small file for each training, and are not made again:
            a run that was stopped goes on where it was, and evaluations of other scores share
            them. A folder belongs to one function; where that changes take another.
        processes: Trainings that run at once. More than one starts new interpreters, to which the
            function is sent: it has to be importable (defined in a module, no lambda), and in a
            script the call has to stand under ``if __name__ == "__main__":``.

    Raises:
        ArgumentError: If the number of processes is not positive, or the function cannot be sent.

    Example:
        >>> once = Retraining(lambda indices, seed: [float(len(indices)), float(seed)])
        >>> once([((0, 1, 2), 5)]).tolist()
        [[3.0, 5.0]]
    """

    retrain: Retrain
    folder: str | Path | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be used."""
        if self.processes < 1:
            raise ArgumentError.of(
                "processes", expected="1 or more", got=self.processes, do="1 trains one by one."
            )
        if not callable(self.retrain):
            raise ArgumentError.of(
                "retrain",
                expected="a function (indices, seed) -> loss of each query",
                got=f"a {type(self.retrain).__name__}",
                do="For example FreshTrainer(…).",
            )
        if self.processes > 1:
            _check_sendable(self.retrain)

    def __call__(self, jobs: Sequence[Job], description: str = "retraining") -> Tensor:
        """Return the losses of each training.

        Args:
            jobs: Dataset indices and seed of each.
            description: Stands beside the progress bar.

        Returns:
            Shape ``[training, query]``, double precision.

        Raises:
            ArgumentError: If the function does not return one number for each query.
            RunError: If a kept result cannot be read.
        """
        known = {job: self._read(job) for job in jobs}
        missing = [job for job, found in known.items() if found is None]
        done = self._trained(missing)
        for job, losses in track(done, description, total=len(missing)):
            self._write(job, losses)
            known[job] = losses
        rows = [row for job in jobs if (row := known[job]) is not None]
        if len({len(row) for row in rows}) > 1:
            raise ArgumentError.of(
                "retrain",
                expected="losses of the same queries from every training",
                got=f"{sorted({len(row) for row in rows})} numbers",
                do="Ask the same queries; a folder of results belongs to one set of queries.",
            )
        return torch.tensor(rows, dtype=torch.float64)

    def _trained(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[float]]]:
        if self.processes == 1 or len(jobs) < 2:
            for job in jobs:
                yield job, _losses(self.retrain, job)
            return
        share = max(1, torch.get_num_threads() // self.processes)
        context = multiprocessing.get_context("spawn")  # A fork of threads may never return.
        count = min(self.processes, len(jobs))
        with ProcessPoolExecutor(count, context, torch.set_num_threads, (share,)) as pool:
            futures = {pool.submit(_losses, self.retrain, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------ the folder

    def _read(self, job: Job) -> list[float] | None:
        path = self._path(job)
        if path is None or not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            return [float(v) for v in found["losses"]]
        except (ValueError, KeyError, TypeError) as problem:
            raise RunError(
                f"folder: expected the losses of a training in {path}, got {problem}. "
                "Delete the file; it will be made again."
            ) from problem

    def _write(self, job: Job, losses: Sequence[float]) -> None:
        path = self._path(job)
        if path is None:
            return
        # JSON has no NaN; text that float() reads has.
        texts = [repr(float(v)) for v in losses]
        entry = json.dumps({"examples": len(job[0]), "seed": job[1], "losses": texts})
        # Whole or not at all, whenever the run is stopped.
        write_whole(path, lambda file: file.write(entry.encode()))

    def _path(self, job: Job) -> Path | None:
        if self.folder is None:
            return None
        text = ",".join(map(str, job[0])) + f";{job[1]}"
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return Path(self.folder) / f"{name}.json"


RetrainLike: TypeAlias = Retrain | Retraining


def as_retraining(retrain: RetrainLike) -> Retraining:
    """Return a function that trains as a `Retraining`, or the one it is.

    Args:
        retrain: Either.

    Returns:
        The retraining.

    Raises:
        ArgumentError: If it is neither.
    """
    return retrain if isinstance(retrain, Retraining) else Retraining(retrain)


def check_queries(scores: InfluenceScores, count: int) -> None:
    """Refuse losses of other queries than those that have scores.

    Args:
        scores: Scores of queries.
        count: How many losses each retrained model has.

    Raises:
        ArgumentError: If there are more or fewer.
    """
    if len(scores.values) != count:
        raise ArgumentError.of(
            "retrain",
            expected=f"losses of {len(scores.values)} queries, as many as have scores",
            got=count,
            do="Ask the same queries of the retrained models.",
        )


def _losses(retrain: Retrain, job: Job) -> list[float]:
    found = torch.as_tensor(retrain(list(job[0]), job[1])).detach()
    if found.ndim != 1 or not len(found):
        raise ArgumentError.of(
            "retrain",
            expected="the loss of each query, shape [query]",
            got=f"shape {list(found.shape)}",
            do="Return one number for each query, also where there is one query alone.",
        )
    values: list[float] = found.double().cpu().tolist()
    return values


def _check_sendable(retrain: Retrain) -> None:
    try:
        pickle.dumps(retrain)
    except Exception as problem:
        raise ArgumentError.of(
            "processes",
            expected="1 for a function that cannot be sent to other processes",
            got=f"{type(problem).__name__}: {problem}",
            do="Define retrain in a module (no lambda, nothing inside a function), or processes=1.",
        ) from problem
