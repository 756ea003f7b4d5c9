"""What a circuit must beat: random connected circuits, shuffled answers, the untrained model."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior
from ...task import Task
from .edges import edge_attribution
from .estimates import Estimate, interval
from .extraction import How, greedy
from .graph import Graph
from .scores import EdgeScores
from .trial import Trial

if TYPE_CHECKING:
    from .circuit import Circuit

__all__ = ["Controls", "controls_of", "kind_of", "random_circuits", "same_search", "shuffled"]

TRIES = 20


@dataclass(frozen=True, eq=False)
class Controls:
    """What other circuits, and another model, do; shares of the trained model's whole effect.

    Args:
        random: Faithfulness of random connected circuits matched in size, layers and node types.
        beyond_random: Faithfulness less the mean of ``random``; circuits are drawn anew, too.
        beyond_best: Faithfulness less that of the best random circuit.
        shuffled: Faithfulness of circuits that the same search finds for shuffled answers, mean
            over shuffles; these are drawn anew, too.
        searches: The same by shuffle. One shuffle tells little: where few paths change at all
            between the two prompts, some find the circuit itself, and others nothing.
        beyond_shuffled: Faithfulness less ``shuffled``.
        untrained: (m₀(C) − m₀(∅)) / (m(M) − m(∅)), m₀ of the untrained model: its own effect
            would be 0 / 0.
        beyond_untrained: Faithfulness less that.
    """

    random: tuple[float, ...] = ()
    beyond_random: Estimate | None = None
    beyond_best: Estimate | None = None
    shuffled: Estimate | None = None
    searches: tuple[float, ...] = ()
    beyond_shuffled: Estimate | None = None
    untrained: Estimate | None = None
    beyond_untrained: Estimate | None = None

    @property
    def margins(self) -> dict[str, Estimate]:
        """By how much the circuit does better than each control that was run."""
        found = {
            "random circuits": self.beyond_random,
            "the best random circuit": self.beyond_best,
            "the same search on shuffled answers": self.beyond_shuffled,
            "the untrained model": self.beyond_untrained,
        }
        return {name: e for name, e in found.items() if e is not None}

    @property
    def beaten(self) -> bool:
        """Whether every margin is above zero with its whole interval."""
        margins = self.margins.values()
        return bool(margins) and all(e.low > 0.0 for e in margins)


def controls_of(
    trial: Trial, mask: Tensor, others: Sequence[Tensor], count: int, seed: int = 0
) -> Controls:
    """Return what random circuits do, and those that were found for shuffled answers.

    Args:
        trial: The model and the prompts.
        mask: The circuit ``[writer, reader]``, boolean or in codes. Random ones are live at all
            positions.
        others: The circuits found for shuffled answers, if there are any.
        count: Number of random circuits.
        seed: Seed of the draws.

    Returns:
        The controls, without those of the untrained model.
    """
    drawn = random_circuits(trial.bench.graph, mask.bool(), count, seed)
    made = trial.metric([mask, *others, *drawn])
    alone, searched, lucky = torch.split(made, [1, len(others), len(drawn)])
    found = Controls()
    if len(searched):
        found = dataclasses.replace(
            found,
            shuffled=_mean(trial, searched - trial.nothing),
            searches=tuple(trial.share(row).value for row in searched),
            beyond_shuffled=_mean(trial, alone - searched),
        )
    if not len(lucky):
        return found
    shares = [trial.share(row).value for row in lucky]
    best = lucky[max(range(len(lucky)), key=shares.__getitem__)]
    return dataclasses.replace(
        found,
        random=tuple(shares),
        beyond_random=_mean(trial, alone - lucky),
        beyond_best=trial.share(alone[0], best),
    )


def _mean(trial: Trial, gains: Tensor) -> Estimate:
    """Return the mean of gains ``[circuit, example]`` as a share; both are drawn anew."""
    draws = trial.draws
    each = draws.means(gains).T
    picks = torch.randint(len(gains), each.shape, generator=draws.generator)
    drawn = each.gather(1, picks).mean(1) / draws.means(trial.whole)
    return interval(float(gains.mean() / trial.whole.mean()), drawn)


def same_search(
    model: nn.Module,
    circuit: Circuit,
    scores: EdgeScores | None,
    behavior: Behavior,
    task: Task | None,
    seed: int = 0,
    anatomy: Anatomy | None = None,
    count: int = 1,
) -> tuple[list[Tensor], str | None]:
    """Return what the search that found a circuit finds when prompts have others' answers.

    Args:
        model: The user's model.
        circuit: The circuit.
        scores: The scores it was found by, or None.
        behavior: Prompts to search on where ``scores`` does not hold its own.
        task: How the model is called.
        seed: Seed of the first shuffle; the next ones have the next seeds.
        anatomy: What the model is made of, where that is known already.
        count: Number of shuffles.

    Returns:
        A boolean ``[writer, reader]`` for each shuffle, of as many edges or a few more, and None;
        or none and why.
    """
    if count < 1:
        return [], None
    if scores is None or not scores.method.startswith("EAP"):
        return [], "the circuit was not found by edge attribution whose scores are at hand"
    found, why = [], None
    for turn in range(count):
        other = shuffled(scores.found_on or behavior, seed + turn)
        if other is None:
            return [], "the behavior names no answers that could be shuffled"
        mask, why = _searched(model, circuit, scores, other, task, anatomy)
        if mask is not None:
            found.append(mask)
    return found, None if found else why


def _searched(
    model: nn.Module,
    circuit: Circuit,
    scores: EdgeScores,
    other: Behavior,
    task: Task | None,
    anatomy: Anatomy | None,
) -> tuple[Tensor | None, str | None]:
    """Return what the search finds for another behavior, or why it finds nothing."""
    found = edge_attribution(
        model,
        other,
        steps=scores.steps,
        variant="activations" if "activations" in scores.method else "inputs",
        direction=scores.direction,
        task=task,
        anatomy=anatomy,
    )
    if found.reason is not None:
        return None, f"with shuffled answers {found.reason}"
    said, size = circuit.found_by, int(circuit.mask.sum())
    how: How = "top" if said.get("how") == "top" else "greedy"
    absolute, asked = said.get("ranking") != "signed", size
    mask = found.circuit(asked, how=how, absolute=absolute).mask
    while (lacking := size - int(mask.sum())) > 0 and asked < found.graph.n_edges:
        asked += lacking  # What leads nowhere was pruned: a smaller circuit would be no match.
        mask = found.circuit(asked, how=how, absolute=absolute).mask
    return mask, None


def random_circuits(graph: Graph, mask: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return random connected circuits of the size, the layers and the node types of another one.

    As many heads of each layer, the same MLPs (a layer has but one) and the same embeddings, drawn
    anew; then as many edges among them, grown from the logits by random keys, every one on a way
    from an embedding to the logits. Disconnected ones would do nothing, and prove nothing.

    Args:
        graph: The edges that there are.
        mask: The circuit that is matched ``[writer, reader]``.
        count: How many.
        seed: Seed of the draws.

    Returns:
        Boolean ``[circuit, writer, reader]``; sizes may fall short by a few edges where the drawn
        nodes do not have as many. Never the circuit itself, so there may be fewer or none where
        the graph leaves no other choice.
    """
    generator = torch.Generator().manual_seed(seed)
    size = int(mask.sum())
    found = []
    for _ in range(count):
        best = torch.zeros_like(mask)
        for _ in range(TRIES):
            drawn = _drawn(graph, mask, size, generator)
            if torch.equal(drawn, mask):  # It cannot be its own control.
                continue
            if abs(int(drawn.sum()) - size) < abs(int(best.sum()) - size) or not best.any():
                best = drawn
            if int(best.sum()) == size:
                break
        if best.any():
            found.append(best)
    return torch.stack(found) if found else mask.new_zeros(0, *mask.shape)


def _drawn(graph: Graph, mask: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return one draw: nodes, then edges among them."""
    allowed = graph.lawful & _nodes(graph, mask, generator)[:, None]
    readers = torch.zeros(len(graph.readers), dtype=torch.bool)
    readers[-1] = True
    for writer in allowed.any(1).nonzero()[:, 0].tolist():
        readers[list(graph.inputs[writer])] = True
    allowed &= readers
    keys = torch.rand(mask.shape, generator=generator).masked_fill(~allowed, -1.0)
    # What leads nowhere is pruned, so more are taken until as many are left: found by halving.
    low, high = size, max(size, int(allowed.sum()))
    while low < high:
        middle = (low + high) // 2
        enough = int(graph.connected(greedy(graph, keys, middle) & allowed).sum()) >= size
        low, high = (low, middle) if enough else (middle + 1, high)
    return graph.connected(greedy(graph, keys, low) & allowed)


def _nodes(graph: Graph, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many nodes of each layer and type as the circuit has."""
    kinds: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, (name, layer) in enumerate(zip(graph.writers, graph.writer_layers, strict=True)):
        kinds[layer, kind_of(name)].append(i)
    used = mask.any(1)
    chosen = torch.zeros(len(graph.writers), dtype=torch.bool)
    for (layer, _), members in kinds.items():
        own = torch.tensor(members)
        if layer < 0:
            chosen[own] = used[own]
            continue
        order = torch.randperm(len(members), generator=generator)
        chosen[own[order[: int(used[own].sum())]]] = True
    return chosen


def kind_of(name: str) -> str:
    """Return the type of a node by its name.

    Args:
        name: Its printed name.

    Returns:
        ``"head"`` or the letters the name begins with.
    """
    return "head" if name.startswith("L") and "H" in name else name.rstrip("0123456789")


def shuffled(behavior: Behavior, seed: int = 0) -> Behavior | None:
    """Return the prompts with the answers of other prompts.

    Args:
        behavior: The prompts.
        seed: Seed of the shuffle.

    Returns:
        The behavior, what is asked of each prompt moved on so that none keeps its own; None where
        the same is asked of all, or there is one prompt only.
    """
    size = len(behavior)
    if size < 2 or not _varies(behavior):
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    moved = behavior.select(other)
    asked = {name: getattr(moved, name) for name in ("target", "margin", "answers", "wrong")}
    return dataclasses.replace(behavior, **asked)


def _varies(behavior: Behavior) -> bool:
    """Return whether prompts are asked different things."""
    if behavior.target is None:
        return behavior.answers is not None
    own: list[Any] = [*vars(behavior.target).values()] if is_dataclass(behavior.target) else []
    rows = [v for v in own if isinstance(v, Tensor) and v.ndim and len(v) == len(behavior)]
    return any(bool((v != v[:1]).any()) for v in rows)
