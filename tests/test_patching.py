"""Activation, attribution and path patching, against peers' values, twins and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mi import Behavior, LogitDifference
from lightning_mi.anatomy import Anatomy
from lightning_mi.circuits import activation_patching

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
