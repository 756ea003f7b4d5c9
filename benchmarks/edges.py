"""What edge attribution costs beside one attribution pass, GPT-2-small size.

The limit is two forward passes and one backward pass with frozen parameters, logits of the last
position only: what attribution patching needs at least. 4 pairs of 16 tokens; finding the anatomy
belongs to the set-up, as it is done once. Memory is shown at 12 and at 48 layers of a quarter of
the width: it may grow by what has to be kept, and by little else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from harness import Case, Promise, Round, compare, verdict
from least import least

LIMIT = "limit: 2 forward, 1 backward"
PLAIN, FIVE, NODES, SPARE = (
    "ours, all edges, EAP",
    "ours, all edges, EAP-IG 5 steps",
    "ours, nodes, EAP-IG 5 steps",
    "bare EAP-IG 5 steps, nodes",
)
PAIRS, LENGTH, STEPS = 4, 16, 5
DEEP = {layers: f"ours, all edges, EAP-IG 5 steps, {layers} layers 192 wide" for layers in (12, 48)}
"""Four times the layers have four times the activations of a pass, and sixteen times the edges."""
HEADS, NARROW = 12, 192


def made(layers: int = 12, width: int = 768) -> tuple[Any, Any]:
    """Return a model of twelve heads a layer and prompts."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import lightning_mi as mi

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width)).eval().requires_grad_(False)
    clean = torch.randint(0, 50_257, (PAIRS, LENGTH))
    corrupted = clean.clone()
    corrupted[:, 6:9] = torch.randint(0, 50_257, (PAIRS, 3))
    answers, wrong = torch.randint(0, 50_257, (2, PAIRS))
    return model, mi.Behavior(clean, corrupted, answers=answers, wrong=wrong)


def bare(steps: int) -> Case:
    """Return hooks on the modules that hold z, and nothing else."""
    return lambda: least(*made(), steps)


def ours(steps: int, layers: int = 12, width: int = 768) -> Case:
    """Return scores of all edges."""

    def setup() -> Callable[[], Any]:
        from lightning_mi.anatomy import Anatomy
        from lightning_mi.circuits import edge_attribution

        model, b = made(layers, width)
        anatomy = Anatomy.of(model, b.clean)
        return lambda: edge_attribution(model, b, steps=steps, anatomy=anatomy)

    return setup


def nodes(steps: int) -> Case:
    """Return scores of all nodes."""

    def setup() -> Callable[[], Any]:
        from lightning_mi.anatomy import Anatomy
        from lightning_mi.circuits import node_attribution

        model, b = made()
        anatomy = Anatomy.of(model, b.clean)
        return lambda: node_attribution(model, b, steps=steps, anatomy=anatomy)

    return setup


def facts(result: Any) -> dict[str, Any]:
    """Return how many edges were scored."""
    graph = getattr(result, "graph", None)
    if graph is None:
        return {}
    return {"edges": graph.n_edges, "matrix": result.values.nbytes / 2**20}


def needed(layers: int) -> float:
    """Return the megabytes of streams and differences that a model of these layers has to keep.

    Most where both runs are compared: what each node writes in one run less the other, what each
    reader was handed and each module wrote in either run. (The points of the path come later and
    are fewer: a stream a layer.) Four bytes each.
    """
    stream = PAIRS * LENGTH * NARROW * 4 / 2**20
    nodes, parts = layers * (HEADS + 1) + 2, 4 * layers + 3
    return stream * (nodes + 2 * parts)


def flat(rounds: Sequence[Round]) -> None:
    """Print how much memory grows with depth beyond what has to be kept and the matrix of edges."""
    grown = []
    for r in rounds:
        own = {n: r[DEEP[n]]["megabytes"] - needed(n) - r[DEEP[n]]["matrix"] for n in DEEP}
        grown.append(own[48] - own[12])
    found = statistics.median(grown)
    kept = f"{needed(48) - needed(12):.0f} MB of streams and differences and the matrix"
    print(
        f"growth from 12 to 48 layers beyond {kept}: {found:.0f} MB "
        f"({min(grown):.0f} to {max(grown):.0f}), {verdict(found, GROWTH)}"
    )


CASES: dict[str, Case] = {LIMIT: bare(1), SPARE: bare(STEPS), PLAIN: ours(0), FIVE: ours(STEPS)}
CASES[NODES] = nodes(STEPS)
CASES |= {name: ours(STEPS, layers, 192) for layers, name in DEEP.items()}


PROMISES = [Promise(NODES, LIMIT, 3.2), Promise(FIVE, LIMIT, 4.5)]
GROWTH = 4.0
"""Most megabytes that memory may grow beyond what has to be kept: what the allocator rounds up.
(Further matrices of edges, while scores are made, come when the streams of both runs are gone.)"""


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    flat(compare(CASES, beside=LIMIT, promises=PROMISES, facts=facts))


if __name__ == "__main__":
    main()
