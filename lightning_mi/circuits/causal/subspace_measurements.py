"""Subspaces over training: `SubspacePatching` and `Align`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...behavior import Behavior, BehaviorLike, as_behavior
from ...checks import counts, share_of
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...nodes import Logits, Reader, parse
from ...record import Reading
from .alignment import align, check_search
from .edges import Direction
from .exchange import Exchange, SubspacePart
from .places import named_part
from .subspaces import subspace_patching

__all__ = ["Align", "SubspacePatching"]


@dataclass(frozen=True)
class SubspacePatching:
    """What a subspace of a part carries, beside what would expose an illusion.

    Panels as in `SubspaceEffect.reading`: ``inside``, ``whole``, ``outside``, ``row``, ``null``,
    ``random`` and ``beyond_random``, shares of the metric's difference with intervals over pairs;
    see `subspace_patching`.

    Args:
        behavior: Prompts and metric.
        part: Printed name of a head or an MLP (``"L1H3"``, ``"MLP2"``), or ``"resid4"`` for the
            stream that enters a layer.
        name: First part of the records' names.
        basis: A file of directions ``[d, k]`` as `numpy.save` writes it, judged on all pairs. None
            takes the directions in which the part differs most between clean and corrupted
            prompts, found at each state on ``share`` of the pairs and judged on the others.
        rank: How many of these.
        reader: Printed name of a reader (``"L1H3.q"``, ``"logits"``); see `subspace_patching`.
        direction: See there.
        share: Share of the pairs that directions are found on.
        draws: Random subspaces.
        seed: Seed of split and draws.

    Raises:
        ArgumentError: If a name is no part's or no reader's, or a number is impossible.

    Example:
        >>> SubspacePatching(Behavior(torch.ones(1, 2), torch.zeros(1, 2)), "L1H3").rank
        1
    """

    behavior: BehaviorLike
    part: str
    name: str = "subspace_patching"
    basis: str | None = None
    rank: int = 1
    reader: str | None = None
    direction: Direction = "denoise"
    share: float = 0.5
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers."""
        named_part(self.part)
        _reader(self.reader)
        counts({"rank": self.rank}, 1)
        counts({"draws": self.draws, "seed": self.seed})
        share_of("share", self.share)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        own, part = as_behavior(self.behavior).to(context.device), named_part(self.part)
        if self.basis is not None:
            basis = torch.from_numpy(np.load(self.basis))
        else:
            found_on, own = own.split(self.share, self.seed)
            basis = self._widest(model, found_on, part, context)
        return subspace_patching(
            model,
            own,
            part,
            basis,
            reader=_reader(self.reader),
            direction=self.direction,
            draws=self.draws,
            seed=self.seed,
            task=context.known_task,
        ).reading()

    def _widest(
        self, model: nn.Module, behavior: Behavior, part: SubspacePart, context: Context
    ) -> Tensor:
        """Return the directions in which a part differs most ``[d, rank]``."""
        with untouched(model) as plain, frozen(plain), torch.no_grad():
            seen = Exchange(plain, behavior, part, self.direction, context.known_task, None)
            rows = seen.differences()
            if not 1 <= self.rank <= min(rows.shape):
                raise ArgumentError.of(
                    "rank",
                    expected=f"from 1 to {min(rows.shape)}, the width of {part} or what it shows",
                    got=self.rank,
                    do="Choose a smaller one, or give more pairs.",
                )
            rows = rows.nan_to_num(0.0, 0.0, 0.0)  # Of a model that diverged: all is NaN anyway.
            widest: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[: self.rank].T
            return widest


@dataclass(frozen=True)
class Align:
    """A subspace is searched for at each state that carries the answer; see `align`.

    Panels as in `Alignment.reading`: interchange accuracies ``accuracy``, ``accuracy_whole``,
    ``accuracy_random``, ``accuracy_beyond_random``, and on the same held-out pairs the shares of
    `SubspaceEffect.reading`, with intervals. A search that succeeds at step 0 already says nothing
    about training.

    Args:
        behavior: Prompts, metric and answers.
        part: Printed name of a head or an MLP (``"L1H3"``, ``"MLP2"``), or ``"resid4"`` for the
            stream that enters a layer.
        name: First part of the records' names.
        rank: Dimensions, fixed in advance.
        reader: Printed name of a reader (``"L1H3.q"``, ``"logits"``); see `subspace_patching`.
        steps: Steps of Adam.
        learning_rate: Of Adam.
        held_out: Share of the pairs that are kept for judging.
        direction: Which run is patched.
        draws: Random rotations to compare with.
        seed: Seed of the start, the split and the draws.

    Raises:
        ArgumentError: If a name is no part's or no reader's, or a number is impossible.

    Example:
        >>> Align(Behavior(torch.ones(1, 2), torch.zeros(1, 2)), "resid1", rank=2).steps
        100
    """

    behavior: BehaviorLike
    part: str
    name: str = "align"
    rank: int = 1
    reader: str | None = None
    steps: int = 100
    learning_rate: float = 0.05
    held_out: float = 0.5
    direction: Direction = "denoise"
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers."""
        named_part(self.part)
        _reader(self.reader)
        check_search(
            self.rank, self.steps, self.learning_rate, self.held_out, self.draws, self.seed
        )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        return align(
            model,
            as_behavior(self.behavior).to(context.device),
            named_part(self.part),
            self.rank,
            reader=_reader(self.reader),
            steps=self.steps,
            learning_rate=self.learning_rate,
            held_out=self.held_out,
            direction=self.direction,
            draws=self.draws,
            seed=self.seed,
            task=context.known_task,
        ).reading()


def _reader(name: str | None) -> Reader | Logits | None:
    if name is None:
        return None
    node = parse(name)
    if isinstance(node, Reader | Logits):
        return node
    raise ArgumentError.of(
        "reader", expected="a name such as L1H3.q or logits", got=repr(name), do="Choose."
    )
