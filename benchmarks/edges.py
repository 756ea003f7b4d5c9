"""What edge attribution costs beside one attribution pass, GPT-2-small size.

The limit is two forward passes and one backward pass with frozen parameters, logits of the last
position only: what attribution patching needs at least. 4 pairs of 16 tokens; finding the anatomy
belongs to the set-up, as it is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

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

    def setup() -> Callable[[], Any]:
        import torch

        model, b = made()
        rows = torch.arange(PAIRS * steps)
        z: list[Any] = []

        def work() -> Any:
            z.clear()
            handles = [
                block.attn.c_proj.register_forward_pre_hook(lambda m, args: z.append(args[0]))
                for block in model.transformer.h
            ]
            with torch.no_grad():
                model.transformer(b.clean, use_cache=False)
                clean = list(z)
                z.clear()
                start, end = (model.transformer.wte(ids) for ids in (b.corrupted, b.clean))
            share = (torch.arange(steps) / steps).view(-1, 1, 1, 1)
            x = (start + share * (end - start)).flatten(0, 1).requires_grad_()
            logits = model(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits[:, -1]
            gap = logits[rows, b.answers.repeat(steps)] - logits[rows, b.wrong.repeat(steps)]
            grads = torch.autograd.grad(gap.sum(), z)
            for handle in handles:
                handle.remove()
            shape = (steps, PAIRS, LENGTH, 12, 64)
            return [
                ((c - k.detach().view(steps, *c.shape)[0]).view(shape[1:]) * g.view(shape).mean(0))
                .sum((0, 1, 3))
                for c, k, g in zip(clean, z, grads, strict=True)
            ]  # fmt: skip

        return work

    return setup


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
