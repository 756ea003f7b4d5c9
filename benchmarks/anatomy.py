"""What it costs to find out what a model is made of, beside forward passes of it.

A randomly initialised model of the size of GPT-2 small; a pass takes 8 sequences of 128 tokens. The
first pass and the first anatomy, which warm everything up, are not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

FOUND, PASSED = "ours, Anatomy.of", "one forward pass"


def made() -> tuple[Any, Any]:
    """Return the model and a batch."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval(), torch.randint(0, 50_257, (8, 128))


def ours() -> Callable[[], Any]:
    """Return the anatomy."""
    from lightning_mi.anatomy import Anatomy

    model, ids = made()
    return lambda: Anatomy.of(model, ids)


def plain() -> Callable[[], Any]:
    """Return a pass with logits."""
    import torch

    model, ids = made()
    return torch.no_grad()(lambda: model(ids).logits)


def facts(result: Any) -> dict[str, Any]:
    """Return how many heads were found and how many notes were made."""
    heads = getattr(result, "n_heads", None)
    return {} if heads is None else {"heads": sum(heads), "notes": len(result.notes)}


CASES: dict[str, Case] = {FOUND: ours, PASSED: plain}


def main() -> None:
    """Print a table of ratios and whether the promise is kept."""
    compare(CASES, beside=PASSED, promises=[Promise(FOUND, PASSED, 6.0)], facts=facts)


if __name__ == "__main__":
    main()
