"""What `integrated_gradients` of token ids costs beside captum, on a model of GPT-2 small's size.

Four sequences of 128 random tokens, random weights, 32 Gauss-Legendre nodes from zero embeddings,
the logit of one token at the last position. Captum gets the model as most users hand it over: all
logits are computed. The limit is 32 times one forward pass from embeddings with the logits of the
last position only, and the gradient of the embeddings, parameters frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

STEPS, TOKEN = 32, 5
LIMIT, OURS, THEIRS = "limit", "ours", "captum, all logits"
PROMISES = (Promise(OURS, THEIRS, 0.65),)


def language_model() -> tuple[Any, Any]:
    """Return a GPT-2 of small size with random weights, and token ids."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    return model, torch.randint(0, 50257, (4, 128))


def limit() -> Callable[[], Any]:
    """Return the bare loop over nodes."""
    import numpy as np
    import torch

    model, ids = language_model()
    model.requires_grad_(False)
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)

    def run() -> Any:
        vectors = model.transformer.wte(ids)
        total = torch.zeros_like(vectors)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            point = (vectors * ((node + 1) / 2)).requires_grad_()
            logit = model(inputs_embeds=point, logits_to_keep=1).logits[:, -1, TOKEN]
            total.add_(torch.autograd.grad(logit.sum(), point)[0], alpha=weight / 2)
        return total.mul_(vectors).sum(-1)

    return run


def ours() -> Callable[[], Any]:
    """Return ours, with the default call."""
    from lightning_mi.attribution import integrated_gradients

    model, ids = language_model()
    return lambda: integrated_gradients(model, ids, TOKEN, steps=STEPS)


def captum() -> Callable[[], Any]:
    """Return captum's, one node of all sequences in a pass."""
    import torch
    from captum.attr import LayerIntegratedGradients

    model, ids = language_model()
    method = LayerIntegratedGradients(
        lambda tokens: model(tokens).logits[:, -1], model.transformer.wte
    )
    options = {"target": TOKEN, "n_steps": STEPS, "internal_batch_size": 4}
    return lambda: method.attribute(ids, torch.zeros_like(ids), **options)


CASES: dict[str, Case] = {LIMIT: limit, OURS: ours, THEIRS: captum}


def main() -> None:
    """Print a table of ratios and whether the promise is kept."""
    compare(CASES, beside=THEIRS, promises=PROMISES)


if __name__ == "__main__":
    main()
