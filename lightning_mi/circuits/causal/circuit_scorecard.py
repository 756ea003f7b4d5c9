"""A circuit that is found and judged at one state of a model: `CircuitScorecard`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...checks import counted, counts, share_of
from ...measurement import Context
from ...record import Reading
from ...task import Task
from .bench import Ablation
from .circuit import Circuit
from .edges import edge_attribution
from .judge import Judge
from .scorecard import Scorecard
from .scores import EdgeScores
from .search import searched

__all__ = ["CircuitScorecard"]


@dataclass(frozen=True)
class CircuitScorecard:
    """Finds a circuit on half of the prompts and judges it on the others; see `Scorecard`.

    Without ``circuit`` it is searched for anew at each state by EAP-IG; with it the same one is
    judged at every state, which shows how it forms. Panels: ``faithfulness``, ``rest``,
    ``incompleteness``, ``distance``, ``edges``, ``nodes``, ``bits``, ``cpr``, ``cmd``, controls
    (``random``, ``shuffled``, ``beyond_…``), ``marginals`` over (writer) and ``circuit`` over
    (edge), with a sentence for each node in its convention.

    Args:
        behavior: What is explained.
        name: First part of the records' names.
        n_edges: Number of edges; None takes the smallest circuit with a faithfulness between 0.8
            and 1.2 on the prompts that it is found on.
        circuit: File of a circuit (`Circuit.save`) that is judged in place of a search.
        steps: Points of the path of the search.
        share: Share of the prompts that it is found on.
        ablation: What edges outside carry.
        controls: Number of random connected circuits.
        nodes: Most nodes that are removed one by one.
        seed: Seed of split and draws.
        shuffles: Number of searches on shuffled answers.

    Raises:
        ArgumentError: If a number is no int of at least 0, or the share is none.

    Example:
        >>> import torch
        >>> pair = Behavior(torch.tensor([[1, 2], [4, 2]]), torch.tensor([[3, 2], [5, 2]]))
        >>> CircuitScorecard(pair, n_edges=10).name
        'scorecard'
    """

    behavior: BehaviorLike
    name: str = "scorecard"
    n_edges: int | None = None
    circuit: str | None = None
    steps: int = 5
    share: float = 0.5
    ablation: Ablation = "corrupted"
    controls: int = 8
    nodes: int = 32
    seed: int = 0
    shuffles: int = 8

    def __post_init__(self) -> None:
        """Check numbers, before a training begins."""
        names = ("steps", "controls", "nodes", "seed", "shuffles")
        counts({name: getattr(self, name) for name in names})
        share_of("share", self.share)
        if self.n_edges is not None:
            counted("n_edges", self.n_edges, do="It counts edges.")

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            Names to panels; NaN with the reason where the metric coincides.
        """
        return self.card(model, context).reading()

    def card(self, model: nn.Module, context: Context) -> Scorecard:
        """Return the scorecard itself.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The scorecard.
        """
        whole = as_behavior(self.behavior).to(context.device)
        found_on, judged_on = whole.split(self.share, self.seed)
        task = context.known_task
        # Search and judge look at one model: what it is made of is found once.
        anatomy = Anatomy.of(model, found_on.clean, task=task)
        circuit, scores = self._circuit(model, found_on, task, anatomy)
        judge = Judge(
            circuit,
            scores,
            self.ablation,
            task,
            self.controls,
            self.seed,
            self.nodes,
            anatomy,
            self.shuffles,
        )
        return judge(model, judged_on)

    def _circuit(
        self, model: nn.Module, found_on: Behavior, task: Task | None, anatomy: Anatomy
    ) -> tuple[Circuit, EdgeScores | None]:
        if self.circuit is not None:
            return Circuit.load(self.circuit), None
        scores = edge_attribution(model, found_on, steps=self.steps, task=task, anatomy=anatomy)
        if scores.reason is None and self.n_edges is not None:
            return scores.circuit(n_edges=self.n_edges), scores
        found = searched(
            model, found_on, scores, ablation=self.ablation, task=task, anatomy=anatomy
        )
        if isinstance(found, str):  # At step 0, say: the judge then says why nothing is defined.
            return Circuit(scores.graph, (), found_by={"undefined": found}), None
        return found, scores
