"""`intervene`: what is put where, what stays, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped import Grouped, one, prompts, written_out
from torch import Tensor, nn

from lightning_mi import Behavior
from lightning_mi.anatomy import Anatomy
from lightning_mi.circuits import (
    At,
    Residual,
    from_run,
    intervene,
    mean,
    resample,
    scale_heads,
    value,
    zero,
)
from lightning_mi.errors import ArgumentError, ModelError
from lightning_mi.nodes import MLP, Head, Neuron, Reader


@pytest.fixture(scope="module")
def model() -> Grouped:
    return Grouped().eval()


@pytest.fixture(scope="module")
def anatomy(model: Grouped) -> Anatomy:
    return Anatomy.of(model, prompts()[0])


def run(model: nn.Module, ids: Tensor, parts: Any, **more: Any) -> Tensor:
    with intervene(model, parts, **more), torch.no_grad():
        out: Tensor = model(ids)
    return out


def test_zero_leaves_the_bias_of_the_output_projection(model: Grouped) -> None:
    clean, _ = prompts()
    layer = model.blocks[1].attn
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda m, args, out: seen.append(out))
    run(model, clean, {Head(1, h): zero() for h in range(4)})
    hook.remove()
    assert torch.allclose(seen[0], layer.o_proj.bias.expand_as(seen[0]), atol=1e-6)


def test_a_layer_that_there_is_not_is_refused(model: Grouped) -> None:
    """Else cutting its heads would seem to do nothing."""
    clean, _ = prompts()
    for part in (Head(2, 0), Reader(Head(2, 0), "k"), At(Head(2, 0), "pattern")):
        with pytest.raises(ArgumentError, match=r"out of \[0, 1\], got layer 2"):
            run(model, clean, {Head(0, 0): zero(), part: zero()})
    with pytest.raises(ArgumentError, match="got layer 2"), scale_heads(model, {Head(2, 0): 0.0}):
        model(clean)
    for seen in (mean(clean), from_run(clean)):
        with pytest.raises(ArgumentError, match="got layer 2"):
            run(model, clean, {Head(2, 0): seen})


def test_several_layers_get_stored_values_not_those_that_the_others_made(model: Grouped) -> None:
    clean, corrupted = prompts()
    parts = {Head(0, 0): from_run(clean), Head(1, 0): from_run(clean)}
    found = run(model, corrupted, parts)
    _, donor = written_out(model, clean)
    twin, _ = written_out(
        model, corrupted, {**one("z0", 0, donor["z0"]), **one("z1", 0, donor["z1"])}
    )
    assert torch.allclose(found, twin, atol=1e-5)
    # Patched with what it reads now, the second head would take in the first one's change.
    live = run(model, corrupted, {Head(0, 0): from_run(clean)})
    assert not torch.allclose(found, live, atol=1e-3)


def test_interventions_nest_and_the_inner_one_reads_its_values_inside(model: Grouped) -> None:
    clean, corrupted = prompts()
    with intervene(model, {Head(0, 1): zero()}):
        found = run(model, clean, {Head(1, 2): from_run(corrupted)})
    no = one("z0", 1, torch.zeros(3, 4, 6, 3))
    _, donor = written_out(model, corrupted, no)
    twin, _ = written_out(model, clean, {**no, **one("z1", 2, donor["z1"])})
    assert torch.allclose(found, twin, atol=1e-5)


def test_a_mean_is_over_the_reference_without_its_padding(model: Grouped) -> None:
    clean, reference = prompts(examples=4)
    _, seen = written_out(model, reference)
    pooled = seen["z1"][:, 2].mean((0, 1))
    twin, _ = written_out(model, clean, one("z1", 2, pooled.expand(4, 4, 6, 3)))
    assert torch.allclose(run(model, clean, {Head(1, 2): mean(reference)}), twin, atol=1e-5)
    by_position = seen["z1"].mean(0, keepdim=True).expand(4, -1, -1, -1)
    twin, _ = written_out(model, clean, one("z1", 2, by_position))
    kept = {Head(1, 2): mean(reference, over="examples")}
    assert torch.allclose(run(model, clean, kept), twin, atol=1e-5)
    # Any length fits a pooled mean.
    assert run(model, clean[:, :3], {Head(1, 2): mean(reference)}).shape[1] == 3
    with pytest.raises(ArgumentError, match="equal length"):
        run(model, clean[:, :3], kept)


def test_a_mean_does_not_count_padding() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed = nn.Embedding(9, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.inner(
                self.embed(input_ids), src_key_padding_mask=attention_mask == 0
            )
            return out

    model = Padded().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }
    results = []
    for reference in (whole, padded):
        with intervene(model, {Head(0, 1): mean(reference)}), torch.no_grad():
            results.append(model(**whole))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_a_resample_is_the_same_for_the_same_seed(model: Grouped) -> None:
    clean, reference = prompts(examples=6)
    a, b, c = (
        run(model, clean, {Head(1, 0): resample(reference, seed=seed)}) for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    _, seen = written_out(model, reference)
    rows = torch.randint(6, (6,), generator=torch.Generator().manual_seed(0))
    twin, _ = written_out(model, clean, one("z1", 0, seen["z1"][rows]))
    assert torch.allclose(a, twin, atol=1e-5)


def test_positions_are_counted_for_all_or_for_each_example(
    model: Grouped, anatomy: Anatomy
) -> None:
    clean, corrupted = prompts()
    _, donor = written_out(model, corrupted)
    base, own = written_out(model, clean)
    for positions, where in (
        ([-1], [[5]] * 3),
        (2, [[2]] * 3),
        (torch.tensor([0, 3, -1]), [[0], [3], [5]]),
    ):
        new = own["mlp0"].clone()
        for example, chosen in enumerate(where):
            new[example, chosen] = donor["mlp0"][example, chosen]
        twin, _ = written_out(model, clean, one("mlp0", None, new))
        parts = {At(MLP(0), positions=positions): from_run(corrupted)}  # type: ignore[arg-type]
        assert torch.allclose(run(model, clean, parts, anatomy=anatomy), twin, atol=1e-5)
        assert not torch.allclose(base, twin, atol=1e-4)
    with pytest.raises(ArgumentError, match="positions"):
        run(model, clean, {At(MLP(0), positions=[7]): zero()}, anatomy=anatomy)
    with pytest.raises(ArgumentError, match="positions"):
        run(model, clean, {At(MLP(0), positions=torch.zeros(2).long()): zero()}, anatomy=anatomy)


def test_a_subspace_is_exchanged_inside_or_outside(model: Grouped, anatomy: Anatomy) -> None:
    clean, corrupted = prompts()
    basis = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    P = basis @ torch.linalg.pinv(basis)
    _, own = written_out(model, clean)
    _, donor = written_out(model, corrupted)
    change = donor["resid1"] - own["resid1"]
    more = {"anatomy": anatomy, "example": clean}
    for outside, part in ((False, change @ P), (True, change - change @ P)):
        twin, _ = written_out(model, clean, one("resid1", None, own["resid1"] + part))
        parts = {At(Residual(1), basis=basis, outside=outside): from_run(corrupted)}
        assert torch.allclose(run(model, clean, parts, **more), twin, atol=1e-5)
    # Zero inside projects the subspace out.
    twin, _ = written_out(model, clean, one("resid1", None, own["resid1"] - own["resid1"] @ P))
    found = run(model, clean, {At(Residual(1), basis=basis): zero()}, **more)
    assert torch.allclose(found, twin, atol=1e-5)


def test_neurons_are_hidden_units(model: Grouped, anatomy: Anatomy) -> None:
    clean, _ = prompts()
    seen: list[Tensor] = []
    hook = model.blocks[0].mlp.down.register_forward_hook(lambda m, a, out: seen.append(a[0]))
    run(model, clean, {Neuron(0, 4): value(2.5)}, anatomy=anatomy)
    run(model, clean, {Neuron(0, 5): zero()}, anatomy=anatomy)
    hook.remove()
    assert bool((seen[0][..., 4] == 2.5).all())
    assert not bool((seen[0][..., 5] == 0).any())
    assert bool((seen[1][..., 5] == 0).all())


def test_the_user_keeps_hooks_modes_and_gradients(model: Grouped) -> None:
    clean, _ = prompts()
    count: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda *_: count.append(1))
    model.train()

    def broken() -> None:
        with intervene(model, {Head(0, 0): zero()}):
            model(clean)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        broken()
    assert len(count) == 1
    model(clean)
    assert len(count) == 2
    assert model.training
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with intervene(model, {Head(1, 0): zero()}):
        model(clean).sum().backward()
    grad = model.blocks[1].attn.o_proj.weight.grad
    # What a replaced head wrote gets no gradient, all others do.
    assert float(grad[:, :3].abs().max()) == 0.0
    assert float(grad[:, 3:].abs().min()) > 0.0
    model.zero_grad()
    model.eval()


def test_a_compiled_model_is_changed_as_well(model: Grouped) -> None:
    clean, _ = prompts()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(clean)
        with intervene(compiled, {Head(0, 2): zero()}):
            found = compiled(clean)
        assert torch.allclose(found, run(model, clean, {Head(0, 2): zero()}))
        assert not torch.allclose(found, before)
        assert torch.allclose(compiled(clean), before)


def test_torchs_own_attention_and_a_single_key_value_head() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    x, other = torch.randn(2, 3, 5, 8)
    attention = layer.self_attn
    with torch.no_grad():
        n = layer.norm1(x)
        parts = torch.split(n @ attention.in_proj_weight.T + attention.in_proj_bias, 8, -1)
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in parts)
        m = torch.split(
            layer.norm1(other) @ attention.in_proj_weight.T + attention.in_proj_bias, 8, -1
        )
        new = m[1].unflatten(-1, (2, 4)).transpose(1, 2)
        k = torch.stack([k[:, 0], new[:, 1]], 1)
        z = (q @ k.mT / 2).softmax(-1) @ v
        y = x + attention.out_proj(z.transpose(1, 2).flatten(2))
        twin = y + layer.linear2(layer.linear1(layer.norm2(y)).relu())
    found = run(layer, x, {Reader(Head(0, 1), "k"): from_run(other)})
    assert torch.allclose(found, twin, atol=1e-5)


def test_what_cannot_be_meant_is_refused(model: Grouped) -> None:
    clean, _ = prompts()
    with pytest.raises(ArgumentError, match="replacements"):
        run(model, clean, {})
    with pytest.raises(ArgumentError, match="zero"):
        run(model, clean, {Head(0, 0): 0.0})
    with pytest.raises(ArgumentError, match="node"):
        run(model, clean, {"L0H0": zero()})
    with pytest.raises(ArgumentError, match="key-value heads"):
        run(model, clean, {Reader(Head(0, 2), "k"): zero()})
    with pytest.raises(ArgumentError, match="pattern"):
        run(model, clean, {At(MLP(0), "pattern"): zero()})
    with pytest.raises(ArgumentError, match="example"):
        run(model, clean, {Residual(0): zero()})
    with pytest.raises(ArgumentError, match="over"):
        mean(clean, over="positions")  # type: ignore[arg-type]
    with pytest.raises((ArgumentError, ModelError)):
        run(model, clean, {Head(7, 0): from_run(clean)})


def test_a_behavior_stands_for_its_corrupted_prompts(model: Grouped) -> None:
    clean, corrupted = prompts()
    pair = Behavior(clean, corrupted)
    a = run(model, clean, {Head(1, 1): mean(pair)})
    assert torch.equal(a, run(model, clean, {Head(1, 1): mean(corrupted)}))
