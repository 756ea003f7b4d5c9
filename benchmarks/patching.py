"""What patching costs: attribution for all heads, exact for all heads, beside TransformerLens.

A model of the size of GPT-2 small with random weights, 4 pairs of 16 tokens that differ in the
seventh to the ninth, metric a difference of two logits of the last position, z of all 144 heads.
What precedes the seventh is computed in one run only, which saves nothing where prompts differ from
the first token on: a case of its own. The limit of attribution is two forward passes and one
backward pass with frozen parameters, last logits only. TransformerLens 2 takes part where it is
installed (`HookedTransformer`), with hooks for attribution and with its own `patching` for exact
patching: 144 forward passes. Memory is shown at 12 and at 48 layers of a quarter of the width,
beside the limit's: attribution keeps that graph, and little else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from harness import Case, Promise, compare
from least import least

PAIRS, LENGTH, VOCABULARY, FIRST = 4, 16, 50_257, 6
LIMIT = "limit: 2 forward, 1 backward"
ATTRIBUTION, VERIFIED, EXACT = "ours, attribution", "ours, top 16 verified", "ours, all 144 exact"
EARLY = "ours, attribution, prompts differ at once"
HOOKS, LENS = "TransformerLens, attribution", "TransformerLens, all 144 exact"
DEPTHS = (12, 48)


def made(layers: int = 12, width: int = 768, differ: int = FIRST) -> tuple[Any, Any]:
    """Return the model and prompts that differ in three tokens from a position on."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import lightning_mi as mi

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)

    def tokens(*shape: int) -> Any:
        return torch.randint(0, VOCABULARY, shape, generator=generator)

    clean = tokens(PAIRS, LENGTH)
    corrupted = clean.clone()
    corrupted[:, differ : differ + 3] = tokens(PAIRS, 3)
    answers, wrong = tokens(2, PAIRS)
    return model, mi.Behavior(clean, corrupted, answers=answers, wrong=wrong)


def limit(layers: int = 12, width: int = 768) -> Case:
    """Return hooks on the modules that hold z, and nothing else."""
    return lambda: least(*made(layers, width))


def attribution(verify: int = 0, layers: int = 12, width: int = 768, differ: int = FIRST) -> Case:
    """Return attribution patching of all heads."""

    def setup() -> Callable[[], Any]:
        from lightning_mi.anatomy import Anatomy
        from lightning_mi.circuits import attribution_patching

        model, b = made(layers, width, differ)
        anatomy = Anatomy.of(model, b.clean) if verify else None
        return lambda: attribution_patching(model, b, verify=verify, anatomy=anatomy)

    return setup


def exact(layers: int = 12, width: int = 768) -> Case:
    """Return exact patching of all heads."""

    def setup() -> Callable[[], Any]:
        from lightning_mi.anatomy import Anatomy
        from lightning_mi.circuits import activation_patching

        model, b = made(layers, width)
        anatomy = Anatomy.of(model, b.clean)
        return lambda: activation_patching(model, b, anatomy=anatomy)

    return setup


def lens() -> tuple[Any, Any]:
    """Return TransformerLens's model, with weights of its own, and the prompts."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    _, b = made(layers=1, width=64)
    config = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_vocab=VOCABULARY,
        act_fn="gelu_new", normalization_type="LN", device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedTransformer(config).eval()
    model.requires_grad_(False)
    return model, b


def hooks() -> Callable[[], Any]:
    """Return attribution with TransformerLens's hooks, the usual recipe."""
    import torch

    model, b = lens()
    rows = torch.arange(PAIRS)

    def of_z(name: str) -> bool:
        return name.endswith("hook_z")

    def work() -> Any:
        act: dict[str, Any] = {}
        grad: dict[str, Any] = {}
        with torch.no_grad():
            _, clean = model.run_with_cache(b.clean, names_filter=of_z)
        model.reset_hooks()
        model.add_hook("hook_embed", lambda x, hook: x.requires_grad_())
        model.add_hook(of_z, lambda x, hook: act.__setitem__(hook.name, x.detach()))
        model.add_hook(of_z, lambda g, hook: grad.__setitem__(hook.name, g.detach()), "bwd")
        logits = model(b.corrupted)[:, -1]
        (logits[rows, b.answers] - logits[rows, b.wrong]).mean().backward()
        model.reset_hooks()
        return torch.stack([((clean[n] - act[n]) * grad[n]).sum((0, 1, 3)) for n in act])

    return work


def all_positions() -> Callable[[], Any]:
    """Return exact patching by TransformerLens."""
    import torch
    from transformer_lens import patching

    model, b = lens()
    rows = torch.arange(PAIRS)

    def metric(logits: Any) -> Any:
        return (logits[rows, -1, b.answers] - logits[rows, -1, b.wrong]).mean()

    def work() -> Any:
        with torch.no_grad():
            _, clean = model.run_with_cache(b.clean, names_filter=lambda n: n.endswith("hook_z"))
            return patching.get_act_patch_attn_head_out_all_pos(model, b.corrupted, clean, metric)

    return work


CASES: dict[str, Case] = {
    LIMIT: limit(),
    ATTRIBUTION: attribution(),
    EARLY: attribution(differ=0),
    VERIFIED: attribution(16),
    EXACT: exact(),
}
for depth in DEPTHS:
    CASES[f"limit, {depth} layers"] = limit(depth, 192)
    CASES[f"attribution, {depth} layers"] = attribution(0, depth, 192)
    CASES[f"exact, {depth} layers"] = exact(depth, 192)


def main() -> None:
    """Print a table of ratios and whether the promises are kept."""
    promises = [Promise(name, LIMIT, 1.05) for name in (ATTRIBUTION, EARLY)]
    promises += [Promise(EXACT, ATTRIBUTION, 15.0)]
    for d in DEPTHS:
        promises.append(Promise(f"attribution, {d} layers", f"limit, {d} layers", 1.3, "megabytes"))
    if importlib.util.find_spec("transformer_lens") is not None:
        CASES[HOOKS], CASES[LENS] = hooks, all_positions
        promises += [Promise(name, HOOKS, 0.7) for name in (ATTRIBUTION, EARLY)]
        promises.append(Promise(EXACT, LENS, 0.2))
    compare(CASES, beside=LIMIT, promises=promises)


if __name__ == "__main__":
    main()
