"""What composition of all pairs of heads costs beside TransformerLens' `all_composition_scores`.

144 x 144 heads with random weights of the size of GPT-2 small, no norms folded on either side. Ours
takes an anatomy, theirs a `TransformerBridge` around a model of two tokens; both hold the weights
before the clock starts. TransformerLens takes part where it is installed. One kind (K) is measured:
theirs needs many seconds and several gigabytes for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare

LAYERS, HEADS, WIDTH, SIZE = 12, 12, 768, 64
OURS, FOLDED, WHOLE = "ours", "ours, z-score too", "ours, the whole measurement"
THEIRS = "TransformerLens, all_composition_scores"
MEGABYTES = 300.0


def weights() -> list[list[Any]]:
    """Return W_Q, W_K, W_V, W_O of every layer."""
    import torch

    torch.manual_seed(0)
    shapes = [(HEADS, WIDTH, SIZE)] * 3 + [(HEADS, SIZE, WIDTH)]
    return [[0.02 * torch.randn(*shape) for _ in range(LAYERS)] for shape in shapes]


def anatomy() -> Any:
    """Return an anatomy with those weights."""
    import torch

    from lightning_mi.anatomy import Anatomy

    W_Q, W_K, W_V, W_O = (tuple(w) for w in weights())
    zeros = (torch.zeros(HEADS, SIZE),) * LAYERS
    return Anatomy(
        n_layers=LAYERS,
        n_heads=(HEADS,) * LAYERS,
        n_kv_heads=(HEADS,) * LAYERS,
        d_head=(SIZE,) * LAYERS,
        d_model=WIDTH,
        modules=tuple(f"layers.{i}" for i in range(LAYERS)),
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=W_O,
        b_Q=zeros,
        b_K=zeros,
        b_V=zeros,
        b_O=(torch.zeros(WIDTH),) * LAYERS,
        scale=(SIZE**-0.5,) * LAYERS,
    )


def ours() -> Callable[[], Any]:
    """Return K-composition of all pairs."""
    from lightning_mi.circuits import composition

    made = anatomy()
    return lambda: composition(made, "K", corrected=False)


def with_z() -> Callable[[], Any]:
    """Return its z-score from 64 rotations."""
    from lightning_mi.circuits import composition_z

    made = anatomy()
    return lambda: composition_z(made, "K")


def whole() -> Callable[[], Any]:
    """Return the measurement: Q, K and V, raw, by spectrum and as z-score."""
    from torch import nn

    from lightning_mi import Context
    from lightning_mi.circuits import Composition

    made, model = anatomy(), nn.Linear(1, 1)

    def run() -> None:
        context = Context(model)
        context.shared("anatomy", lambda: made)
        Composition()(model, context)

    return run


def theirs() -> Callable[[], Any]:
    """Return TransformerLens' scores."""
    import tempfile

    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2,
        n_positions=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).eval()
    W_Q, W_K, W_V, W_O = weights()
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            fused = [w[i].transpose(0, 1).flatten(1) for w in (W_Q, W_K, W_V)]
            block.attn.c_attn.weight.copy_(torch.cat(fused, 1))
            block.attn.c_proj.weight.copy_(W_O[i].flatten(0, 1))
    folder = tempfile.mkdtemp()
    model.config.save_pretrained(folder)  # A local configuration: nothing is looked up.
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=model, device="cpu", tokenizer=None
    )
    return torch.no_grad()(lambda: bridge.all_composition_scores("K").scores)


def facts(result: Any) -> dict[str, Any]:
    """Return the mean score, to see that all measured the same."""
    return {"mean": float(result.mean())} if hasattr(result, "mean") else {}


CASES: dict[str, Case] = {OURS: ours, FOLDED: with_z, WHOLE: whole}


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    promises, beside = [], OURS
    if importlib.util.find_spec("transformer_lens") is not None:
        CASES[THEIRS] = theirs
        promises, beside = [Promise(OURS, THEIRS, 0.25)], THEIRS
    rounds = compare(CASES, beside=beside, promises=promises, facts=facts)
    most = max(r[OURS]["megabytes"] for r in rounds)
    kept = "kept" if most <= MEGABYTES else "NOT kept"
    print(f"{OURS}: {most:.0f} MB more, promised {MEGABYTES:g}: {kept}")
    for name in (OURS, THEIRS):
        if name in CASES:
            print(f"mean score, {name}: {rounds[0][name]['mean']:.7f}")


if __name__ == "__main__":
    main()
