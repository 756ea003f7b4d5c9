"""Edge attribution: hand-built circuits, identities, and a backward pass for each head."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import hand_built as built
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_mi as mi
from lightning_mi.circuits.causal import (
    Edge,
    EdgeAttribution,
    along,
    edge_attribution,
    edge_patching,
    node_attribution,
    path_patching,
)
from lightning_mi.circuits.causal.blocks import Part, blocks_of, differentiated
from lightning_mi.circuits.causal.edges import wired
from lightning_mi.circuits.causal.gradients import at_inputs, wanted_for_inputs
from lightning_mi.circuits.causal.streams import Wiring

V = 31
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
GPT2: dict[str, Any] = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2 eager": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, attn_implementation="eager")),
    "llama": llama,
    # Its slowest pairs hardly turn within a few positions.
    "llama slow": lambda: llama(
        head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "llama eager": lambda: llama(attn_implementation="eager"),
    "neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SMALL, rotary_pct=0.5, use_parallel_residual=True)
    ),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2, rotary_dim=2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=4)
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **SMALL,
            num_key_value_heads=2,
            head_dim=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",
        )
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0.2 * torch.randn_like(p))
    return model


def prompts(pairs: int = 3, length: int = 7) -> mi.Behavior:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(3, V, (pairs, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2:4] = torch.randint(3, V, (pairs, 2), generator=generator)
    answers, wrong = torch.randint(3, V, (2, pairs), generator=generator)
    return mi.Behavior(clean, corrupted, answers=answers, wrong=wrong)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_inputs_of_heads_get_the_gradient_that_a_backward_pass_for_each_gives(name: str) -> None:
    model, behavior = model_of(name), prompts()
    with mi.untouched(model) as plain:
        wiring = wired(plain, behavior, None, None)
        both = torch.cat([behavior.clean, behavior.corrupted])  # Two steps of a path.
        wiring.learn(wiring.see(both))
        assert all(own is not None for own in wiring.heads)
        fast = gradients(wiring, both, behavior, exact=False)
        slow = gradients(wiring, both, behavior, exact=True)
    for a, b in zip(fast, slow, strict=True):
        assert close(a, b), name


def gradients(wiring: Wiring, rows: Tensor, behavior: mi.Behavior, *, exact: bool) -> list[Tensor]:
    """Return gradients at all inputs from one graph."""
    found: list[Tensor] = []

    def take(part: Part, at: list[Tensor | None]) -> None:
        found.extend(g for _, g in at_inputs(wiring, part, at, steps=2, size=3, exact=exact))

    differentiated(
        wiring,
        rows,
        (behavior, 2),
        lambda outputs: torch.stack([behavior.metric(o).sum() for o in outputs.split(3)]).sum(),
        lambda part: wanted_for_inputs(wiring, part),
        take,
        blocks={},
        keep=exact,
    )
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["inputs", "activations"])
def test_block_by_block_the_same_is_found_as_from_one_graph(
    name: str, variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, behavior = model_of(name), prompts()
    found = edge_attribution(model, behavior, steps=2, variant=variant)
    taken: list[dict[int, str]] = []

    def whole(wiring: Wiring, once: Callable[[dict[int, str]], Tensor]) -> Tensor:
        taken.append(blocks_of(wiring))
        return once({})

    monkeypatch.setattr(along, "separately", whole)
    other = edge_attribution(model, behavior, steps=2, variant=variant)
    assert [len(blocks) for blocks in taken] == [2] * len(taken)
    assert close(found.values.nan_to_num(), other.values.nan_to_num())


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("variant", ["inputs", "activations"])
def test_a_cache_of_keys_and_values_takes_no_gradient_away(name: str, variant: Any) -> None:
    """A model inside a module of the user's keeps its cache, as nobody tells it not to."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(name)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.inner(ids).logits
            return out

    behavior = prompts()
    alone = edge_attribution(model_of(name), behavior, steps=2, variant=variant)
    inside = edge_attribution(Wrapped(), behavior, steps=2, variant=variant)
    assert close(inside.values.nan_to_num(), alone.values.nan_to_num())


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gptj"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_edges_that_leave_a_head_add_up_to_its_attribution(name: str, direction: Any) -> None:
    model, behavior = model_of(name), prompts()
    found = edge_attribution(model, behavior, direction=direction)
    zs: list[list[Tensor]] = []
    ends = (behavior.clean, behavior.corrupted)
    for ids in ends if direction == "noise" else ends[::-1]:
        with mi.attention.tap(model) as seen:
            outputs = model(ids).logits
        zs.append([s.z for s in seen.sites])
        if len(zs) == 1:
            grads = torch.autograd.grad(behavior.metric(outputs).mean(), zs[0])
    by_head = [((b - a) * g).sum((0, 2, 3)) for a, b, g in zip(zs[0], zs[1], grads, strict=True)]
    heads = [i for i, w in enumerate(found.graph.writers) if w.startswith("L")]
    assert close(found.nodes[heads], torch.cat(by_head).detach())


def test_edges_that_leave_the_embeddings_add_up_to_the_whole_change() -> None:
    model, behavior = model_of("llama"), prompts()
    gaps = []
    for steps in (1, 8, 64):
        found = edge_attribution(model, behavior, steps=steps)
        whole = found.corrupted - found.clean
        gaps.append(abs(float(found.nodes[found.graph.sources].sum()) - whole) / abs(whole))
    assert gaps[2] < 1e-3 < gaps[0]


def test_parallel_blocks_have_no_edges_inside_a_layer() -> None:
    found = edge_attribution(model_of("neox"), prompts())
    graph = found.graph
    w, r = graph.writers.index("L0H0"), graph.readers.index("MLP0")
    assert not graph.lawful[w, r]
    assert math.isnan(found.values[w, r])
    one = edge_attribution(model_of("gpt2"), prompts()).graph
    assert one.lawful[one.writers.index("L0H0"), one.readers.index("MLP0")]


def test_keys_and_values_are_read_once_for_each_of_their_heads() -> None:
    graph = edge_attribution(model_of("llama"), prompts()).graph
    first = [r for r in graph.readers if r.startswith("L0")]
    assert len(first) == 4 + 2 + 2
    assert "L0H1.k" in first
    assert "L0H2.k" not in first
    head = graph.writers.index("L0H3")
    assert [graph.readers[i] for i in graph.inputs[head]] == ["L0H3.q", "L0H1.k", "L0H1.v"]


def test_a_saturated_circuit_is_found_by_integrated_gradients_and_not_by_one() -> None:
    model, behavior = built.induction(), built.repeats()
    edge = Edge("L0H0", "L1H0.k")
    assert abs(edge_attribution(model, behavior).of(edge)) < 1e-6
    for variant in ("inputs", "activations"):
        found = edge_attribution(model, behavior, steps=50, variant=variant)
        assert found.effects[found.graph.index(edge)] == pytest.approx(1.0, abs=0.01)
        strongest = {str(e) for e, _ in found.top(3)}
        assert strongest == {"embed->L0H0.v", "L0H0->L1H0.k", "L1H0->logits"}


@pytest.mark.parametrize("steps", [0, 4])
def test_a_metric_that_coincides_is_undefined_with_a_reason(steps: int) -> None:
    model, behavior = built.induction(beta=0.0), built.repeats()
    same = mi.Behavior(behavior.clean, behavior.clean, answers=behavior.answers)
    found = edge_attribution(model, same, steps=steps)
    assert bool(found.values.isnan().all())
    assert "no difference" in str(found.reason)
    panel = found.reading()["edges"]
    assert panel.convention["reason"] == found.reason


def test_the_measurement_leaves_the_model_alone_and_says_how_it_was_made() -> None:
    model, behavior = model_of("gpt2"), prompts()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.train()
    records = mi.measure(model, EdgeAttribution(behavior, steps=2), batch=behavior.clean)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    edges = next(r for r in records if r.what == "edges")
    assert edges.panel.axes == ("writer", "reader")
    assert edges.panel.convention["steps"] == 2
    assert edges.panel.convention["direction"] == "noise"


def test_bad_arguments_are_refused() -> None:
    model, behavior = built.induction(), built.repeats()
    wrong = ({"steps": -1}, {"variant": "both"}, {"direction": "up"}, {"variant": "activations"})
    for more in wrong:  # The last moves along a path, but has no step.
        with pytest.raises(mi.errors.ArgumentError):
            edge_attribution(model, behavior, **more)  # type: ignore[arg-type]
    rank = mi.Behavior(behavior.clean, behavior.corrupted, target=mi.target.Rank(3))
    with pytest.raises(mi.errors.ArgumentError, match="gradient"):
        edge_attribution(model, rank)


def test_a_stream_that_norms_pass_through_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(V, 8), layer
            self.unembed = nn.Linear(8, V)

        def forward(self, ids: Tensor) -> Tensor:
            return self.unembed(self.layer(self.embed(ids)))

    with pytest.raises(mi.errors.ModelError, match="sum"):
        edge_attribution(Post().eval(), prompts())


def test_of_a_diverged_model_it_is_said_that_it_has() -> None:
    model = MODELS["gpt2"]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    for attribute in (edge_attribution, node_attribution):
        with pytest.raises(mi.errors.ModelError, match="it has diverged"):
            attribute(model, prompts())


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_left_out_before_the_corruption_changes_no_score(name: str, steps: int) -> None:
    """Scores are means over examples; one that differs everywhere leaves nothing out for any."""
    model, behavior = model_of(name), prompts(4)
    wide = behavior.select([3])
    generator = torch.Generator().manual_seed(5)
    wide = mi.Behavior(
        wide.clean,
        torch.randint(3, V, wide.clean.shape, generator=generator),
        answers=wide.answers,
        wrong=wide.wrong,
    )
    near = behavior.select([0, 1, 2])
    assert behavior.answers is not None
    assert behavior.wrong is not None
    both = mi.Behavior(
        behavior.clean,
        torch.cat([near.corrupted, wide.corrupted]),
        answers=behavior.answers,
        wrong=behavior.wrong,
    )
    each = [edge_attribution(model, b, steps=steps).values for b in (near, wide, both)]
    lawful = ~each[0].isnan()
    whole = (3 * each[0] + each[1])[lawful] / 4
    assert close(whole, each[2][lawful])
    assert float(each[0][lawful].abs().max()) > 1e-3


def test_mlps_run_only_where_something_changes() -> None:
    model, behavior = model_of("gpt2"), prompts(3, length=9)
    lengths: list[int] = []
    handle = model.transformer.h[0].mlp.c_fc.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: lengths.append(output.shape[1])
    )
    edge_attribution(model, behavior, steps=3)
    handle.remove()
    assert lengths[-1] == 7
    # Bidirectional attention carries the change to what lies before it.
    assert 9 in lengths


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gptj"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_nodes_get_the_sum_of_the_edges_that_leave_them(name: str, direction: Any) -> None:
    model, behavior = model_of(name), prompts()
    edges = edge_attribution(model, behavior, steps=3, direction=direction)
    panel = node_attribution(model, behavior, steps=3, direction=direction)
    assert panel.coords["writer"] == list(edges.graph.writers)
    assert close(panel.values, edges.nodes)
    same = mi.Behavior(behavior.clean, behavior.clean, answers=behavior.answers)
    nothing = node_attribution(model, same)
    assert bool(nothing.values.isnan().all())
    assert "no difference" in nothing.convention["reason"]
    with pytest.raises(mi.errors.ArgumentError, match="steps"):
        node_attribution(model, behavior, steps=0)


class Kept:
    """Bytes of a tensor that a graph keeps, counted while it is alive."""

    now, most = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.nbytes
        Kept.now += self.size
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.size


def most_kept(model: nn.Module, steps: int) -> int:
    """Return the most bytes that graphs keep at once."""
    Kept.now = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        edge_attribution(model, prompts(), steps=steps)
    return Kept.most


@pytest.mark.parametrize("steps", [0, 3])
def test_what_graphs_keep_does_not_grow_with_depth(steps: int) -> None:
    flat, deep = (
        most_kept(hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": n})).eval(), steps)
        for n in (2, 6)
    )
    assert 0 < deep <= 1.01 * flat


def living() -> int:
    """Return the bytes of all tensors that anything in Python still holds."""
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


ASKED: dict[str, Callable[[nn.Module, mi.Behavior], object]] = {
    "EAP": edge_attribution,
    "EAP-IG inputs": lambda m, b: edge_attribution(m, b, steps=2),
    "EAP-IG activations": lambda m, b: edge_attribution(m, b, steps=1, variant="activations"),
    "exact": edge_patching,
    "paths": lambda m, b: path_patching(m, b, receivers=mi.nodes.Logits()),
}


@pytest.mark.parametrize("name", ASKED)
def test_nothing_of_a_pass_waits_for_the_garbage_collector(name: str) -> None:
    model, behavior = model_of("gpt2"), prompts()
    ASKED[name](model, behavior)
    gc.collect()
    gc.disable()
    try:
        before = living()
        ASKED[name](model, behavior)
        assert living() <= before
    finally:
        gc.enable()


class Large(TorchDispatchMode):
    """Counts the tensors of a size that operations make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.nbytes >= self.size and not func.is_view:
            self.count += not any(made is a for a in args)
        return made


@pytest.mark.parametrize("steps", [0, 2])
def test_what_nodes_write_is_held_once(steps: int) -> None:
    """Differences of all nodes are the one thing that grows with nodes, positions and width."""
    deep = hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": 12})).eval()
    behavior = prompts()
    nodes, entries = 12 * (4 + 1) + 2, behavior.clean.numel() * GPT2["n_embd"]
    with Large(4 * nodes * entries) as made:
        edge_attribution(deep, behavior, steps=steps)
    assert made.count == 1
