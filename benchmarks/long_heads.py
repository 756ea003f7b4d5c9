"""What `head_scores` needs at 512, 1,024, 2,048 and 4,096 positions: memory linear in length.

A model of four layers of eight heads with random weights, one sequence of two copies of random
tokens. Beside it stands one plain forward pass of the body on the same tokens. What whole patterns
would take is length x length numbers for each head: 67 MB a head at 4,096, 2,147 MB in all. With a
padding mask or a sliding window transformers itself makes a mask of length x length; the plain
forward pass beside it shows that part. With padding two more passes of one sequence, with and
without its padding, show that padding changes nothing: here that sequence is the whole batch.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from harness import Case, Promise, Round, compare

LENGTHS = (512, 1024, 2048, 4096)
VOCABULARY = 8192
KINDS = ("causal", "padded", "window")
BETWEEN = 2.6
"""Most that twice the length may take, where memory is linear: 2, and what does not shrink."""


def model_and_tokens(length: int, kind: str) -> tuple[Any, Any, Any]:
    """Return the model, the repeated tokens and the mask."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from lightning_mi.behaviors import RepeatedTokens

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"max_position_embeddings": max(LENGTHS)}
    if kind == "window":
        model: Any = MistralForCausalLM(MistralConfig(**sizes, sliding_window=length // 2 + 64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    tokens = RepeatedTokens(VOCABULARY, length=length // 2, sequences=1).tokens()
    mask = None
    if kind == "padded":
        mask = torch.ones_like(tokens)
        mask[:, : length // 16] = 0
    return model.eval(), tokens, mask


def plain(length: int, kind: str) -> Callable[[], Any]:
    """Return one forward pass of the body."""
    import torch

    model, tokens, mask = model_and_tokens(length, kind)
    return torch.no_grad()(lambda: model.model(tokens, attention_mask=mask, use_cache=False)[0])


def ours(length: int, kind: str) -> Callable[[], Any]:
    """Return the scores of all heads."""
    import torch

    from lightning_mi.circuits import head_scores

    model, tokens, mask = model_and_tokens(length, kind)
    return torch.no_grad()(lambda: head_scores(model, tokens, attention_mask=mask))


def name(who: str, kind: str, length: int) -> str:
    """Return the name of a case."""
    return f"{who}, {kind}, {length}"


def growth(rounds: Sequence[Round]) -> None:
    """Print how memory grows with the length, ours and the model's own."""
    for kind in KINDS:
        for who in ("body", "ours"):
            used = [
                statistics.median(r[name(who, kind, n)]["megabytes"] for r in rounds)
                for n in LENGTHS
            ]
            ratios = ", ".join(f"{b / max(a, 1):.2f}" for a, b in itertools.pairwise(used))
            sizes = ", ".join(f"{u:.0f}" for u in used)
            print(f"{who}, {kind}: {sizes} MB; each doubling x {ratios}")


CASES: dict[str, Case] = {
    name(who, kind, n): functools.partial(make, n, kind)
    for kind in KINDS
    for n in LENGTHS
    for who, make in (("body", plain), ("ours", ours))
}
PROMISES = [
    Promise(name("ours", "causal", b), name("ours", "causal", a), BETWEEN, "megabytes")
    for a, b in itertools.pairwise(LENGTHS)
]


def main() -> None:
    """Print tables of memory and time, and how memory grows."""
    growth(compare(CASES, beside=name("body", "causal", LENGTHS[0]), promises=PROMISES))


if __name__ == "__main__":
    main()
