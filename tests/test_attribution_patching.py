"""Attribution patching: identities, twins, corrections and what is verified."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hand_built import Built, Heads, HeadWeights, bits, gate, induction, repeats, rotation, units
from test_patching import alike_until, tiny, tiny_gpt2
from torch import Tensor, nn

from lightning_mi import Behavior, LogitDifference, measure
from lightning_mi.circuits import (
    ActivationPatching,
    AttributionPatching,
    activation_patching,
    attribution_patching,
)
from lightning_mi.circuits.causal.attribution_patching import attribution_panels
from lightning_mi.circuits.causal.beginnings import Beginning
from lightning_mi.errors import ArgumentError
from lightning_mi.target import Rank

Direction = Literal["denoise", "noise"]


def linear(layers: int = 2) -> tuple[Built, Behavior]:
    """Return a model that is linear in what each head writes, as patterns see positions alone."""
    V, P, extra, size = 6, 5, 4, 5
    width = V + P + extra
    token, place = units(width, (0, V), (V, P))
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rest = torch.eye(width)
    rest[V : V + P] = 0.0  # No head writes where positions are kept.

    def head() -> HeadWeights:
        W_Q, W_K = place.T @ random(P, size), place.T @ random(P, size)
        return HeadWeights(W_Q, W_K, random(width, size), random(size, width) @ rest)

    turn = rotation(width)
    blocks = [Heads([head(), head()], turn) for _ in range(layers)]
    model = Built(token, place, blocks, random(width, 3), turn)
    clean, corrupted = (torch.randint(V, (3, P), generator=generator) for _ in range(2))
    return model, Behavior(clean, corrupted, target=LogitDifference(0, other=1))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("what", ["z", "v"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_exact_equals_attribution_in_a_linear_model(
    direction: Direction, what: Literal["z", "v"], positions: str
) -> None:
    model, pair = linear()
    for reduce in ("mean", None):
        made: dict[str, Any] = {
            "what": what, "direction": direction, "positions": positions, "reduce": reduce
        }  # fmt: skip
        found = attribution_patching(model, pair, verify=0, **made)
        exact = activation_patching(model, pair, **made)
        assert found.axes == exact.axes
        assert torch.allclose(found.values, exact.values, atol=1e-4, rtol=1e-3)
    assert found.values.abs().max() > 0.05


def test_the_directions_take_gradients_of_different_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(53, (3, 8), generator=generator) for _ in range(2))
    model, pair = tiny_gpt2("eager"), Behavior(clean, corrupted, target=LogitDifference(7, other=9))
    found = {
        d: attribution_patching(model, pair, direction=d, verify=0).values
        for d in ("denoise", "noise")
    }

    def run(ids: Tensor) -> tuple[list[Tensor], Tensor]:
        z: list[Tensor] = []
        hooks = [
            b.attn.c_proj.register_forward_pre_hook(lambda m, args: z.append(args[0]))
            for b in model.transformer.h  # type: ignore[union-attr, operator]
        ]
        metric = pair.metric(model(ids).logits)
        for hook in hooks:
            hook.remove()
        return z, metric

    runs = {"noise": run(pair.clean), "denoise": run(pair.corrupted)}
    for direction, other in (("noise", "denoise"), ("denoise", "noise")):
        (base, metric), (donor, wanted) = runs[direction], runs[other]
        grads = torch.autograd.grad(metric.sum(), base)
        whole = float((wanted - metric).detach().mean())
        twin = torch.stack(
            [
                ((d - b) * g).unflatten(-1, (4, 8)).sum((1, 3)).mean(0) / whole
                for d, b, g in zip(donor, base, grads, strict=True)
            ]
        )
        assert torch.allclose(found[direction], twin, atol=1e-5)  # type: ignore[index]
    assert (found["noise"] - found["denoise"]).abs().max() > 0.01


@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_a_recomputed_softmax_is_exact_where_all_that_follows_is_linear(
    what: Literal["q", "k"], positions: str
) -> None:
    model, pair = induction(), repeats()
    if what == "q":  # The token that asks must differ.
        asks = pair.clean.clone()
        asks[:, -1] = (asks[:, -1] + 1) % 12
        pair = Behavior(pair.clean, asks, answers=pair.answers, wrong=pair.wrong)
    made: dict[str, Any] = {"what": what, "direction": "noise", "positions": positions}
    exact = activation_patching(model, pair, **made).values
    plain = attribution_patching(model, pair, verify=0, **made).values
    right = attribution_patching(model, pair, verify=0, corrections=("qk",), **made).values
    assert exact[1, 0].sum() > 0.9  # The head that matches has lost what it looks for.
    assert plain[1].abs().max() < 1e-3  # Saturated: the gradient of the softmax is nil.
    assert torch.allclose(right[1], exact[1], atol=1e-4)


def test_an_and_gate_shows_under_noising_and_an_or_gate_under_denoising() -> None:
    for kind, shown, hidden in (("and", "noise", "denoise"), ("or", "denoise", "noise")):
        model, pair = gate(kind), bits()  # type: ignore[arg-type]
        a = activation_patching(model, pair, direction=shown).values  # type: ignore[arg-type]
        b = activation_patching(model, pair, direction=hidden).values  # type: ignore[arg-type]
        assert torch.allclose(a, torch.ones(1, 2), atol=1e-4)
        assert torch.allclose(b, torch.zeros(1, 2), atol=1e-4)


def test_grad_drop_drops_one_layer_at_a_time() -> None:
    model, pair = linear(3)
    made = attribution_panels(model, pair, corrections=("graddrop",), verify=2, direction="noise")
    drop = made["grad_drop"]
    assert "unsigned" in drop.convention["sign"]
    assert bool((drop.values >= 0).all())

    def z_of(block: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, getattr(block, f"W_{r}")) for r in "QKV")
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    def run(ids: Tensor, dropped: int) -> tuple[list[Tensor], Tensor]:
        x, kept = model.embed(ids) + model.pos(torch.arange(ids.shape[1])), []
        for layer, block in enumerate(model.blocks):
            kept.append(z_of(block, x))
            written = torch.einsum("bhtk,hkd->btd", kept[-1], block.W_O)
            x = x + (written.detach() if layer == dropped else written)
        return kept, pair.metric(model.unembed(x))

    donor, other = run(pair.corrupted, -1)
    total = torch.zeros(3, 2)
    for layer in range(3):
        base, metric = run(pair.clean, layer)
        grads = torch.autograd.grad(metric.sum(), base, allow_unused=True)
        for at, (a, b, g) in enumerate(zip(donor, base, grads, strict=True)):
            if g is not None:
                total[at] += ((a - b) * g).sum((2, 3)).abs().mean(0).detach() / 2
    whole = float((other - metric).detach().mean())
    assert torch.allclose(drop.values, total / abs(whole), atol=1e-4)
    # It is no estimate: it does not add up to what the linear identity demands.
    assert not torch.allclose(drop.values, made["effect"].values.abs(), atol=1e-2)
    chosen = [(v["layer"], v["head"]) for v in made["effect"].convention["verified"]]
    largest = drop.values.flatten().argsort(descending=True)[:2].tolist()
    assert chosen == [(i // 2, i % 2) for i in largest]


def test_the_largest_are_verified_exactly() -> None:
    model, pair = induction(), repeats()
    made = attribution_panels(model, pair, verify=2, direction="noise")
    exact = activation_patching(model, pair, direction="noise").values
    told = made["effect"].convention["verified"]
    assert [(v["layer"], v["head"]) for v in told] == [(1, 0), (0, 0)] or len(told) == 2
    sizes = made["effect"].values.abs().flatten().sort(descending=True).values
    assert [abs(v["estimate"]) for v in told] == pytest.approx(sizes[:2].tolist(), abs=1e-5)
    for entry in told:
        assert entry["exact"] == pytest.approx(
            float(exact[entry["layer"], entry["head"]]), abs=1e-4
        )
        assert float(made["exact"].values[entry["layer"], entry["head"]]) == pytest.approx(
            entry["exact"], abs=1e-5
        )
    assert int(made["exact"].values.isnan().sum()) == 2
    assert attribution_patching(model, pair, verify=0).convention["verified"] == []


def test_nothing_is_said_where_the_metric_coincides() -> None:
    model, pair = linear()
    same = Behavior(pair.clean, pair.clean.clone(), target=pair.target)
    for found in (
        *attribution_panels(model, same, corrections=("graddrop",)).values(),
        activation_patching(model, same),
        activation_patching(model, same, what="v", positions="each"),
    ):
        assert bool(found.values.isnan().all())
        assert "no difference" in found.convention["reason"]
    mixed = pair.corrupted.clone()
    mixed[1] = pair.clean[1]
    one = Behavior(pair.clean, mixed, target=pair.target)
    for found in (
        attribution_patching(model, one, reduce=None),
        activation_patching(model, one, reduce=None),
    ):
        assert found.values.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_what_means_nothing_is_refused() -> None:
    model, pair = linear()
    with pytest.raises(ArgumentError, match="corrections"):
        attribution_patching(model, pair, corrections=("nonsense",))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match='"qk" for queries'):
        attribution_patching(model, pair, corrections=("qk",))
    with pytest.raises(ArgumentError, match="verify"):
        attribution_patching(model, pair, verify=-1)
    with pytest.raises(ArgumentError, match="gradient"):
        attribution_patching(model, Behavior(pair.clean, pair.corrupted, target=Rank(0)))


def test_the_model_stays_as_it_was_even_if_the_metric_raises() -> None:
    model, pair = linear()
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}

    def broken(outputs: Tensor, batch: Any) -> Tensor:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        attribution_patching(model, Behavior(pair.clean, pair.corrupted, target=broken))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None


def test_compiled_and_checkpointed_models_give_the_same() -> None:
    model, pair = linear()
    found = attribution_patching(model, pair, verify=0).values
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(attribution_patching(compiled, pair, verify=0).values, found, atol=1e-6)

    class Again(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            return out

    model.blocks = nn.ModuleList(Again(block) for block in model.blocks)
    again = attribution_patching(model, pair, verify=0).values
    assert torch.allclose(again, found, atol=1e-5)


def nothing_taken(beginning: Beginning) -> list[nn.Module]:
    return []


@pytest.mark.parametrize("family", ["neox", "gemma", "qwen"])
@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern", "mlp", "residual"])
def test_what_is_taken_over_before_prompts_differ_changes_nothing(
    family: str, what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair = tiny(family), alike_until(4)
    taken: list[int] = []
    same = Beginning.same

    def noted(beginning: Beginning) -> bool:
        taken.append(len(beginning._moved))
        return same(beginning)

    monkeypatch.setattr(Beginning, "same", noted)
    options: dict[str, Any] = {"what": what, "positions": "each", "corrections": ("graddrop",)}
    found = attribution_panels(model, pair, **options)
    assert taken[0] >= 8  # Four maps or more in each of two layers.
    monkeypatch.setattr(Beginning, "_maps", nothing_taken)
    other = attribution_panels(model, pair, **options)
    assert taken[1] == 0
    for name in ("effect", "exact", "grad_drop"):
        torch.testing.assert_close(
            found[name].values, other[name].values, atol=1e-4, rtol=1e-4, equal_nan=True
        )


def mean_of_positions(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output.mean(1, keepdim=True)


def turned(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 1.5 * output


@pytest.mark.parametrize("kind", ["causal", "steered", "mixed"])
def test_nothing_is_taken_over_where_positions_see_later_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_gpt2("sdpa")
    pair = alike_until(4)
    if kind == "steered":
        model.transformer.h[0].attn.c_attn.register_forward_hook(turned)
    if kind == "mixed":
        model.transformer.drop.register_forward_hook(mean_of_positions)
    lengths: list[int] = []
    part = model.transformer.h[1].mlp.c_fc
    forward = part.forward

    def noted(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        made: Tensor = forward(x)
        return made

    part.forward = noted
    found = attribution_patching(model, pair, verify=0).values
    seen = [n for n in lengths if n in (3, 7)]
    assert seen[0] == 7
    assert seen[-1] == (7 if kind == "mixed" else 3)
    monkeypatch.setattr(Beginning, "_maps", nothing_taken)
    other = attribution_patching(model, pair, verify=0).values
    torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4)


def test_checkpointed_layers_run_again_with_what_was_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny_gpt2("sdpa")
    pair = alike_until(4)
    found = attribution_patching(model, pair, verify=0).values
    for block in model.transformer.h:
        inner = block.forward

        def again(*args: Any, run: Any = inner, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **kwargs)

        block.forward = again
    checkpointed = attribution_patching(model, pair, verify=0).values
    torch.testing.assert_close(checkpointed, found, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(Beginning, "_maps", nothing_taken)
    whole = attribution_patching(model, pair, verify=0).values
    torch.testing.assert_close(whole, found, atol=1e-5, rtol=1e-4)


def test_both_run_as_measurements() -> None:
    model, pair = linear()
    found = {
        r.name: r.panel
        for r in measure(model, [AttributionPatching(pair, verify=1), ActivationPatching(pair)])
    }
    assert set(found) == {
        "attribution_patching/effect",
        "attribution_patching/exact",
        "activation_patching/effect",
    }
    assert found["attribution_patching/effect"].convention["direction"] == "denoise"
    assert not math.isnan(float(found["activation_patching/effect"].values[0, 0]))
