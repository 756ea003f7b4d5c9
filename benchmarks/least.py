"""The least that attribution over z has to compute: the limit that its benchmarks stand beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def least(model: Any, behavior: Any, steps: int = 1) -> Callable[[], Any]:
    """Return hooks on the modules that hold z of a GPT-2, and nothing else.

    Args:
        model: transformers' GPT-2, its parameters without gradients.
        behavior: Prompts of equal length, with answers and wrong ones.
        steps: Points of the path between both prompts' embeddings, all in one pass.

    Returns:
        What runs two forward passes and one backward pass and gives a score for each head.
    """
    import torch

    pairs, length = behavior.clean.shape
    shape = (steps, pairs, length, model.config.n_head, -1)
    rows = torch.arange(pairs * steps)
    answers, wrong = behavior.answers.repeat(steps), behavior.wrong.repeat(steps)
    z: list[Any] = []

    def work() -> Any:
        z.clear()
        handles = [
            block.attn.c_proj.register_forward_pre_hook(lambda m, args: z.append(args[0]))
            for block in model.transformer.h
        ]
        with torch.no_grad():
            model.transformer(behavior.clean, use_cache=False)
            clean = list(z)
            z.clear()
            ends = (behavior.corrupted, behavior.clean)
            start, end = (model.transformer.wte(ids) for ids in ends)
        share = (torch.arange(steps) / steps).view(-1, 1, 1, 1)
        x = (start + share * (end - start)).flatten(0, 1).requires_grad_()
        logits = model(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits[:, -1]
        gap = logits[rows, answers] - logits[rows, wrong]
        grads = torch.autograd.grad(gap.sum(), z)
        for handle in handles:
            handle.remove()
        scores = []
        for c, k, g in zip(clean, z, grads, strict=True):
            change = c.view(shape[1:]) - k.detach().view(shape)[0]
            scores.append((change * g.view(shape).mean(0)).sum((0, 1, 3)))
        return torch.stack(scores)

    return work
