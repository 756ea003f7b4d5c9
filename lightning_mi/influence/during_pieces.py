"""Per-example gradients of one call of a layer, from its input and its output's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pieces import Factor, Matrix, Piece, Vector

__all__ = ["known_parameters", "pieces_of_call"]

Names = Mapping[str, str]


def known_parameters(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Return the layers whose gradients are understood, with the names of their parameters.

    Args:
        model: The model.

    Returns:
        For each layer its trainable ``weight`` and ``bias`` by their names in the model. A bias
        that several layers share belongs to none of them.
    """
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    found = {}
    for module in model.modules():
        own = {
            role: names[id(p)]
            for role, p in module.named_parameters(recurse=False)
            if role in ("weight", "bias") and id(p) in names
        }
        if own and _kind(module) is not None:
            found[module] = own
    biases = [own["bias"] for own in found.values() if "bias" in own]
    for own in found.values():
        if "bias" in own and biases.count(own["bias"]) > 1:
            del own["bias"]
    return found


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return "convolution" if plain and not isinstance(module.padding, str) else None
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "norm"
    name, weight = type(module).__name__, getattr(module, "weight", None)
    turned = name == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2
    return "turned" if turned else None


def pieces_of_call(
    module: nn.Module, names: Names, x: Tensor, g: Tensor, examples: int
) -> list[Piece]:
    """Return the gradients of one call.

    Args:
        module: The layer.
        names: Of its parameters.
        x: Its input.
        g: The gradient of the examples' losses at its output.
        examples: Number of examples in the batch.

    Returns:
        Pieces with one cotangent; none where the examples cannot be told apart.
    """
    kind = _kind(module)
    if not examples or not len(x) or not len(g) or len(g) % examples:
        return []
    wide = g.float() if g.element_size() < 4 else g
    if kind == "norm":
        return _norm(module, names, x, wide, examples)
    pulled = _rows(wide, examples, channels=kind == "convolution")
    if "weight" not in names:
        return [Vector(names["bias"], pulled.sum(1)[None])] if "bias" in names else []
    if kind == "embedding":
        return _embedding(module, names, x, pulled, examples)
    if kind == "convolution":
        inputs = _patches(module, x.to(wide.dtype), examples)
    else:
        inputs = _rows(x.to(wide.dtype), examples)
    bias = names.get("bias")
    if bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    a, s = (
        Factor(inputs[None], inputs.shape[-1], False),
        Factor(pulled[None], pulled.shape[-1], True),
    )
    sides = (a, s) if kind == "turned" else (s, a)
    return [Matrix(names["weight"], bias, *sides)]


def _rows(tensor: Tensor, examples: int, *, channels: bool = False) -> Tensor:
    """Return ``[example, row, size]``."""
    if channels:
        tensor = tensor.flatten(2).transpose(1, 2)
    return tensor.reshape(examples, -1, tensor.shape[-1])


def _patches(module: Any, x: Tensor, examples: int) -> Tensor:
    image = x[:, :, None] if x.ndim == 3 else x
    sizes = [module.kernel_size, module.dilation, module.padding, module.stride]
    if x.ndim == 3:  # One row of an image.
        sizes = [(n, *s) for n, s in zip((1, 1, 0, 1), sizes, strict=True)]
    patches = F.unfold(image, *sizes).transpose(1, 2)
    return patches.reshape(examples, -1, patches.shape[-1])


def _embedding(
    module: Any, names: Names, ids: Tensor, pulled: Tensor, examples: int
) -> list[Piece]:
    shared = ids.ndim == 1 and torch.equal(ids, torch.arange(len(ids), device=ids.device))
    if shared or ids.numel() != pulled.shape[0] * pulled.shape[1]:
        # Positions that the whole batch shares: their gradient is a sum over the examples.
        return []
    rows = ids.reshape(examples, -1)
    if module.padding_idx is not None:
        pulled = pulled * (rows != module.padding_idx)[..., None]
    left = Factor(rows[None], module.num_embeddings, False)
    return [Matrix(names["weight"], None, left, Factor(pulled[None], pulled.shape[-1], True))]


def _norm(module: Any, names: Names, x: Tensor, g: Tensor, examples: int) -> list[Piece]:
    shape, found = module.normalized_shape, []
    each = g.reshape(examples, -1, *shape)
    if "weight" in names:
        wide = x.to(g.dtype)
        if isinstance(module, nn.RMSNorm):
            plain = F.rms_norm(wide, shape, None, module.eps)
        else:
            plain = F.layer_norm(wide, shape, None, None, module.eps)
        values = (each * plain.reshape(each.shape)).sum(1).flatten(1)
        found.append(Vector(names["weight"], values[None]))
    if "bias" in names:
        found.append(Vector(names["bias"], each.sum(1).flatten(1)[None]))
    return list(found)
