"""`HypothesisTest`: a hypothesis tested on schedule and over checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ...behavior import BehaviorLike
from ...isolation import frozen
from ...measurement import Context
from ...record import Reading
from .builtin import InductionCircuit
from .counting import CountingDecompositions
from .hypothesis import CircuitHypothesis

__all__ = ["HypothesisTest"]


@dataclass(frozen=True)
class HypothesisTest:
    """A circuit hypothesis, tested again and again, so that one sees evidence accumulate.

    Panels: ``verdict`` (1 supported, ½ partly, 0 not; the table stands in its convention),
    ``share_holding`` (share of the stated claims that hold), ``claims`` over ``feature``, one
    scalar for each claim, and ``fit_<step>`` over (layer, head): how far each head is from what was
    stated of the step (0 or more: it fits). Where the metric is the same on clean and corrupted
    prompts, as at step 0, verdict and cuts are NaN with the reason.

    Args:
        behavior: Prompts and metric.
        hypothesis: What is tested.
        name: First part of the records' names.
    """

    behavior: BehaviorLike
    hypothesis: CircuitHypothesis | CountingDecompositions = field(default_factory=InductionCircuit)
    name: str = "hypothesis"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        with frozen(model):
            return self.hypothesis.gather(model, self.behavior, context).reading()
