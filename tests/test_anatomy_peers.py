"""Anatomies of models that TransformerLens has made, where it is installed."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mi.anatomy import Anatomy
from lightning_mi.circuits import logit_attribution

SIZE = 53


def ids() -> Tensor:
    return torch.randint(0, SIZE, (2, 9), generator=torch.Generator().manual_seed(1))


def loud(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def hooked(**options: Any) -> Any:
    lens = pytest.importorskip("transformer_lens")
    try:
        config = lens.HookedTransformerConfig(
            n_layers=2,
            d_model=32,
            n_ctx=16,
            d_head=8,
            n_heads=4,
            d_vocab=SIZE,
            d_mlp=48,
            act_fn="gelu",
            seed=0,
            **options,
        )
        return loud(lens.HookedTransformer(config))
    except ImportError as error:  # TransformerLens 4 has none any more.
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_type": "LN"},
        {"normalization_type": None, "attn_only": True},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 8},
    ],
)
def test_hooked_transformer(options: dict[str, Any]) -> None:
    model = hooked(**options)
    anatomy = Anatomy.of(model, ids())
    assert anatomy.notes == ()
    for layer in range(2):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            stored = getattr(model.blocks[layer].attn, name)
            assert (getattr(anatomy, name)[layer] - stored).abs().max() <= 1e-6
    assert anatomy.W_E is not None
    assert torch.equal(anatomy.W_E, model.W_E)
    assert logit_attribution(model, ids(), 5, 7, anatomy=anatomy).gap <= 1e-5


def test_transformer_bridge() -> None:
    lens = pytest.importorskip("transformer_lens.model_bridge")
    config = GPT2Config(
        vocab_size=SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    inner = loud(GPT2LMHeadModel(config))
    expected = Anatomy.of(inner, ids())
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    bridge = lens.TransformerBridge.boot_transformers(
        folder, hf_model=inner, device="cpu", tokenizer=None
    )
    anatomy = Anatomy.of(bridge, ids())
    for layer in range(2):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(getattr(anatomy, name)[layer], getattr(expected, name)[layer])
    assert logit_attribution(bridge, ids(), 5, 7, anatomy=anatomy).gap <= 1e-5


def test_timm() -> None:
    pytest.importorskip("torchvision", reason="timm imports torchvision", exc_type=ImportError)
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = loud(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5))
    anatomy = Anatomy.of(model, torch.rand(2, 3, 32, 32))
    own = model.blocks[0].attn
    stored = own.qkv.weight.reshape(3, 3, 64, 192)[0].transpose(1, 2)
    assert (anatomy.W_Q[0] - stored).abs().max() <= 1e-5
