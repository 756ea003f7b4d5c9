"""A circuit before the judge: metrics of sets of edges, as shares of the whole effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bench import Bench
from .estimates import Draws, Estimate, interval
from .scores import coinciding

__all__ = ["Trial", "without"]


@dataclass(frozen=True, eq=False)
class Trial:
    """A bench whose ends are known.

    Args:
        bench: The model and the prompts.
        clean: m(M) ``[example]``.
        nothing: m(∅) ``[example]``.
        draws: Bootstrap draws of the prompts.
        where: What codes of edges mean, if there are others than 0 and 1; see `where.coded`.
    """

    bench: Bench
    clean: Tensor
    nothing: Tensor
    draws: Draws
    where: Tensor | None = None

    @classmethod
    def on(cls, bench: Bench, seed: int = 0, where: Tensor | None = None) -> Trial:
        """Return a trial on a bench.

        Args:
            bench: The model and the prompts.
            seed: Seed of the draws.
            where: What codes of edges mean.

        Returns:
            The trial.
        """
        none = torch.zeros_like(bench.graph.lawful)[None]
        clean, nothing = (m.double().cpu() for m in (bench.clean, bench.metric(none)[0]))
        return cls(bench, clean, nothing, Draws(len(clean), seed), where)

    @property
    def reason(self) -> str | None:
        """Why no share is defined, or None."""
        return coinciding(float(self.clean.mean()), float(self.nothing.mean()))

    @property
    def whole(self) -> Tensor:
        """m(M) − m(∅) ``[example]``."""
        return self.clean - self.nothing

    def metric(self, masks: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the metric when only some edges are live.

        Args:
            masks: Boolean, or codes ``[set, writer, reader]``.

        Returns:
            Shape ``[set, example]``, in double precision.
        """
        if not len(masks):
            return self.clean.new_zeros(0, len(self.clean))
        whole = masks if isinstance(masks, Tensor) else torch.stack(list(masks))
        return self.bench.metric(whole, self.where).double().cpu()

    def share(self, some: Tensor, less: Tensor | None = None) -> Estimate:
        """Return a difference of two metrics as a share of the whole effect.

        Args:
            some: A metric ``[example]``.
            less: What is taken off; None takes m(∅).

        Returns:
            The share and its interval.
        """
        return self.draws.share(some - (self.nothing if less is None else less), self.whole)

    def distance(self, some: Tensor, other: Tensor) -> Estimate:
        """Return |mean difference| of two metrics as a share of the size of the whole effect.

        Args:
            some: A metric ``[example]``.
            other: Another one.

        Returns:
            The share, not negative, and its interval.
        """
        part, whole = some - other, self.whole
        drawn = self.draws.means(part) / self.draws.means(whole)
        return interval(abs(float(part.mean() / whole.mean())), drawn.abs())


def without(mask: Tensor, nodes: Sequence[int]) -> Tensor:
    """Return edges without those that leave some nodes: then nobody reads what they write.

    Args:
        mask: Boolean, or codes ``[writer, reader]``.
        nodes: Indices of writers.

    Returns:
        A copy.
    """
    left = mask.clone()
    left[list(nodes)] = 0
    return left
