"""What `head_scores` costs beside one plain forward pass of the body, and beside TransformerLens.

A model of the size of GPT-2 small with random weights, 8 sequences of 2 x 64 random tokens; scores
of all 144 heads. The limit is one forward pass without the language-model head. TransformerLens's
`detect_head` takes one prompt a call: 8 prompts x 3 patterns, one cached pass for each prompt. It
takes part where `transformer_lens` is installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

LENGTH, SEQUENCES, VOCABULARY = 64, 8, 50257
LIMIT, OURS, MEASURED = "body, plain", "ours", "ours, the whole measurement"
EAGER, DETECT = "patterns of eager attention", "TransformerLens, detect_head x 3"
PROMISES = [Promise(OURS, LIMIT, 1.10), Promise(OURS, LIMIT, 1.10, "megabytes")]
PATTERNS = ("previous_token_head", "duplicate_token_head", "induction_head")


def model_and_tokens(implementation: str = "sdpa") -> tuple[Any, Any]:
    """Return the model and the repeated tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from lightning_mi.behaviors import RepeatedTokens

    torch.manual_seed(0)
    config = GPT2Config(attn_implementation=implementation, bos_token_id=0, eos_token_id=0)
    tokens = RepeatedTokens(VOCABULARY, length=LENGTH, sequences=SEQUENCES).tokens()
    return GPT2LMHeadModel(config).eval(), tokens


def without_gradients(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the work, done without gradients."""
    import torch

    return torch.no_grad()(work)


def limit() -> Callable[[], Any]:
    """Return one forward pass of the body."""
    model, tokens = model_and_tokens()
    return without_gradients(lambda: model.transformer(tokens, use_cache=False)[0][0, 0, 0])


def ours() -> Callable[[], Any]:
    """Return the scores of all heads."""
    from lightning_mi.circuits import head_scores

    model, tokens = model_and_tokens()
    return without_gradients(lambda: head_scores(model, tokens))


def whole() -> Callable[[], Any]:
    """Return the measurement: scores, matched controls, random periods and losses."""
    from lightning_mi import measure
    from lightning_mi.behaviors import RepeatedTokens
    from lightning_mi.circuits import HeadScores

    model, _ = model_and_tokens()
    scores = HeadScores(tokens=RepeatedTokens(length=LENGTH, sequences=SEQUENCES))
    return lambda: measure(model, scores)


def eager() -> Callable[[], Any]:
    """Return the mean of three diagonals of every pattern, as transformers hands patterns out."""
    import torch

    model, tokens = model_and_tokens("eager")

    def run() -> Any:
        outputs = model.transformer(tokens, use_cache=False, output_attentions=True)
        offsets = (LENGTH - 1, 1, LENGTH)
        return torch.stack(
            [p.diagonal(-o, -2, -1).mean((0, -1)) for p in outputs.attentions for o in offsets]
        )

    return without_gradients(run)


def detect() -> Callable[[], Any]:
    """Return TransformerLens's detection of three kinds of heads."""
    import tempfile

    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge import TransformerBridge

    model, tokens = model_and_tokens("eager")
    folder = tempfile.mkdtemp()
    model.config.save_pretrained(folder)  # A local configuration: nothing is looked up.
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=model, device="cpu", tokenizer=None
    )
    bridge.to_tokens = lambda prompt, *rest, **options: tokens[int(prompt)][None]

    def run() -> None:
        for i in range(len(tokens)):
            _, cache = bridge.run_with_cache(tokens[i][None], remove_batch_dim=True)
            for pattern in PATTERNS:
                detect_head(bridge, str(i), pattern, cache=cache)

    return without_gradients(run)


def facts(result: Any) -> dict[str, Any]:
    """Return the mean of our induction scores, to see that something was measured."""
    return {"induction": float(result["induction"].mean())} if isinstance(result, dict) else {}


CASES: dict[str, Case] = {LIMIT: limit, OURS: ours, MEASURED: whole, EAGER: eager}


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    promises = list(PROMISES)
    if importlib.util.find_spec("transformer_lens") is not None:
        CASES[DETECT] = functools.partial(detect)
        promises.append(Promise(OURS, DETECT, 0.55))
    compare(CASES, beside=LIMIT, promises=promises, facts=facts)


if __name__ == "__main__":
    main()
