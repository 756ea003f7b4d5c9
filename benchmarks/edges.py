"""What edge attribution costs beside one attribution pass, GPT-2-small size.

The limit is two forward passes and one backward pass with frozen parameters, logits of the last
position only: what attribution patching needs at least. 4 pairs of 16 tokens; finding the anatomy
belongs to the set-up, as it is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare
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
    return {} if graph is None else {"edges": graph.n_edges}


CASES: dict[str, Case] = {LIMIT: bare(1), SPARE: bare(STEPS), PLAIN: ours(0), FIVE: ours(STEPS)}
CASES[NODES] = nodes(STEPS)
CASES |= {name: ours(STEPS, layers, 192) for layers, name in DEEP.items()}


PROMISES = [Promise(NODES, LIMIT, 3.2), Promise(FIVE, LIMIT, 4.5)]
PROMISES.append(Promise(DEEP[48], DEEP[12], 4.5, "megabytes"))


def main() -> None:
    """Print a table of ratios and whether the promise is kept."""
    compare(CASES, beside=LIMIT, promises=PROMISES, facts=facts)


if __name__ == "__main__":
    main()
