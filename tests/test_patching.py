"""Activation, attribution and path patching, against peers' values, twins and closed forms."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import hand_built as built
import numpy as np
import pytest
import torch
from torch import nn

from lightning_mi import MLP, Behavior, Logit, LogitDifference, measure
from lightning_mi.anatomy import Anatomy
from lightning_mi.circuits import (
    ActivationPatching,
    AttributionPatching,
    EdgeAttribution,
    activation_patching,
    subspace_patching,
)
from lightning_mi.circuits.causal import restart
from lightning_mi.errors import LightningMIError

REFERENCE = Path(__file__).parent / "reference"


def tiny_gpt2(implementation: str) -> nn.Module:
    """Return the model that the peers' values belong to."""
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=53,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=implementation,
    )
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict(load_file(REFERENCE / "tiny_gpt2.safetensors"), strict=False)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def peer() -> Any:
    """Return values that TransformerLens computed."""
    return np.load(REFERENCE / "tl4_gpt2.npz")


def behavior_of(peer: Any) -> Behavior:
    """Return the prompts and the metric that they are about."""
    clean, corrupted = (torch.tensor(peer[n]) for n in ("tokens", "tokens_corrupted"))
    return Behavior(clean, corrupted, target=LogitDifference(7, other=9))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def known(request: Any) -> tuple[nn.Module, Anatomy]:
    """Return the model and what it is made of, which need not be found for each test."""
    model = tiny_gpt2(request.param)
    return model, Anatomy.of(model)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("z", "act_patch_head.z"),
        ("q", "act_patch_head.q"),
        ("v", "act_patch_head.v"),
        ("pattern", "act_patch_head.pattern"),
        ("mlp", "act_patch_mlp_out_by_pos"),
        ("residual", "act_patch_resid_pre_by_pos"),
    ],
)
def test_patching_gives_the_values_of_transformer_lens(
    peer: Any, what: Any, name: str, known: tuple[nn.Module, Anatomy]
) -> None:
    model, anatomy = known
    found = activation_patching(model, behavior_of(peer), what=what, anatomy=anatomy)
    about = found.convention
    assert about["clean"] == pytest.approx(float(peer["metric_clean"]), abs=1e-5)
    metric = found.values * (about["clean"] - about["corrupted"]) + about["corrupted"]
    assert torch.allclose(metric, torch.tensor(peer[name]), atol=2e-6)


def tiny(family: str) -> nn.Module:
    """Return a tiny model of a family, with random weights."""
    import transformers as hf

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    if family == "neox":
        config: Any = hf.GPTNeoXConfig(**common, use_parallel_residual=True)
    elif family == "gemma":
        config = hf.Gemma2Config(
            **common,
            num_key_value_heads=2,
            head_dim=4,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            query_pre_attn_scalar=4,
            sliding_window=4,
            attn_implementation="eager",
        )
    else:
        config = hf.Qwen2Config(**common, num_key_value_heads=1)
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config).eval()
    return model


def slices(family: str, model: nn.Module, what: str, head: int) -> tuple[list[nn.Module], slice]:
    """Return for each layer the module that makes it, and which of its outputs are meant."""
    body: Any = model.gpt_neox if family == "neox" else model.model
    if family == "neox":
        start = head * 12 + "qkv".index(what) * 4
        modules = [layer.attention.query_key_value for layer in body.layers]
        return modules, slice(start, start + 4)
    return [getattr(layer.self_attn, f"{what}_proj") for layer in body.layers], slice(
        head * 4, head * 4 + 4
    )


@pytest.mark.parametrize("family", ["neox", "gemma", "qwen"])
def test_real_architectures_are_patched_as_by_hooks_on_their_projections(family: str) -> None:
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(1, 31, (2, 6), generator=generator) for _ in range(2))
    pair = Behavior(clean, corrupted, target=LogitDifference(3, other=9))
    anatomy = Anatomy.of(model, clean)
    for what in ("q", "k", "v"):
        found = activation_patching(
            model, pair, what=what, direction="noise", anatomy=anatomy  # type: ignore[arg-type]
        )  # fmt: skip
        counts = {"neox": 4, "gemma": 2, "qwen": 1}[family] if what != "q" else 4
        assert found.values.shape == (2, counts)
        for head in {0, counts - 1}:
            modules, where = slices(family, model, what, head)
            for layer, module in enumerate(modules):
                twin = by_hook(model, pair, module, where)
                assert float(found.values[layer, head]) == pytest.approx(twin, abs=2e-3)


def by_hook(model: nn.Module, pair: Behavior, module: nn.Module, where: slice) -> float:
    """Return the share under noising when part of a module's output is exchanged by a hook."""
    kept: list[torch.Tensor] = []

    def keep(m: nn.Module, args: Any, output: torch.Tensor) -> None:
        kept.append(output.clone())

    def put(m: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., where] = kept[0][..., where]
        return output

    with torch.no_grad():
        handle = module.register_forward_hook(keep)
        donor = pair.metric(model(pair.corrupted).logits).mean()
        handle.remove()
        base = pair.metric(model(pair.clean).logits).mean()
        handle = module.register_forward_hook(put)
        patched = pair.metric(model(pair.clean).logits).mean()
        handle.remove()
    return float((patched - base) / (donor - base))


@pytest.mark.parametrize("family", ["neox", "gemma", "qwen"])
@pytest.mark.parametrize("what", ["z", "k", "pattern", "mlp", "residual"])
def test_what_is_left_out_before_prompts_differ_changes_nothing(
    family: str, what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    pair = alike_until(4)
    anatomy = Anatomy.of(model, pair.clean)
    found = activation_patching(model, pair, what=what, positions="all", anatomy=anatomy)
    monkeypatch.setattr(restart, "Levels", restart.Levels[-1:])
    other = activation_patching(model, pair, what=what, positions="all", anatomy=anatomy)
    torch.testing.assert_close(found.values, other.values, atol=1e-4, rtol=1e-4)


def alike_until(position: int) -> Behavior:
    generator = torch.Generator().manual_seed(2)
    clean, corrupted = (torch.randint(1, 31, (3, 7), generator=generator) for _ in range(2))
    corrupted[:, :position] = clean[:, :position]
    return Behavior(clean, corrupted, target=LogitDifference(3, other=9))


def test_maps_run_only_where_prompts_differ_and_only_in_models_that_look_back() -> None:
    import transformers as hf

    gpt2: Any = tiny_gpt2("sdpa")
    bert: Any = hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=53, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    found = {}
    for model, part in (
        (gpt2, gpt2.transformer.h[1].attn.c_attn),
        (bert, bert.bert.encoder.layer[1].attention.self.query),
    ):
        lengths: list[int] = []
        forward = type(part).forward

        def noted(
            self: Any, x: torch.Tensor, run: Any = forward, into: list[int] = lengths
        ) -> torch.Tensor:
            into.append(x.shape[1])
            made: torch.Tensor = run(self, x)
            return made

        part.forward = types.MethodType(noted, part)
        activation_patching(model, alike_until(4))
        found[type(model).__name__] = lengths
    # Whole in both runs and in the patch that is run whole.
    assert sorted(found["GPT2LMHeadModel"])[-3:] == [7, 7, 7]
    assert found["GPT2LMHeadModel"][-1] == 3
    assert found["BertForMaskedLM"][-1] == 7
    assert 3 not in found["BertForMaskedLM"]


OF_THREE = LogitDifference(torch.tensor([3, 9, 3]), other=40)


@pytest.mark.parametrize(
    ("target", "relates", "made"),
    [(OF_THREE, False, 3), (OF_THREE, True, 3), (Logit(52), False, 1), (Logit(52), True, 53)],
)
def test_logits_that_no_metric_names_are_made_only_where_others_depend_on_them(
    target: Any, relates: bool, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log-probability depends on all logits; the difference of two does not."""
    model: Any = tiny_gpt2("sdpa")
    pair = dataclasses.replace(alike_until(4), target=target)
    widths: list[int] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        widths.append(output.logits.shape[-1])
        if relates:
            output.logits = output.logits.log_softmax(-1)

    model.register_forward_hook(after)
    found = activation_patching(model, pair).values
    distinct = len(
        {*torch.as_tensor(target.token).flatten().tolist(), getattr(target, "other", 52)}
    )
    assert widths[-1] == (53 if relates and distinct == 1 else distinct)
    monkeypatch.setattr(restart, "Levels", restart.Levels[-1:])
    torch.testing.assert_close(activation_patching(model, pair).values, found, atol=1e-4, rtol=1e-4)
    assert widths[-1] == 53


@pytest.mark.parametrize("what", ["mlp", "residual"])
@pytest.mark.parametrize("kind", [ActivationPatching, AttributionPatching])
def test_a_part_that_the_model_lacks_is_refused_by_name(kind: Any, what: Any) -> None:
    """Two layers of attention alone, which no module holds together with the stream."""
    model, pair = built.induction(), built.repeats()
    name = {"mlp": "what: expected a kind of part", "residual": "residual stream of layer 0"}[what]
    with pytest.raises(LightningMIError, match=name):
        measure(model, kind(pair, what=what))


def test_an_mlp_that_there_is_not_is_named() -> None:
    with pytest.raises(LightningMIError, match="MLP: expected a model with MLPs"):
        subspace_patching(built.induction(), built.repeats(), MLP(0), torch.eye(44)[:, :1])
    with pytest.raises(LightningMIError, match=r"out of \[0\], got layer 3"):
        subspace_patching(built.gate("and"), built.bits(), MLP(3), torch.eye(9)[:, :1])


def test_measurements_of_one_firing_find_the_anatomy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = tiny("qwen"), alike_until(2)
    calls: list[int] = []
    find = Anatomy.of

    def counted(*args: Any, **kwargs: Any) -> Anatomy:
        calls.append(1)
        return find(*args, **kwargs)

    monkeypatch.setattr(Anatomy, "of", counted)
    asked = [EdgeAttribution(pair), ActivationPatching(pair), AttributionPatching(pair, verify=1)]
    found = measure(model, asked)
    assert len(calls) == 1
    assert {"edge_attribution/edges", "activation_patching/effect"} <= {r.name for r in found}
