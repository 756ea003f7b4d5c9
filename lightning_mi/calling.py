"""Calling a network as its own ``forward`` wants to be called: `run_model`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .batch import LABEL_KEYS, input_key, main_input
from .errors import ModelError

__all__ = ["networks", "run_model", "takes_all"]


def run_model(network: nn.Module, batch: Any) -> Tensor:
    """Call a network as its own ``forward`` wants to be called, and return its output tensor.

    Labels are never passed, but an entry that forward cannot do without is none. Caches are
    switched off, and position ids are built for left-padded batches where the network takes them
    (their absence shifts every position without an error).

    Args:
        network: Any module.
        batch: Any batch.

    Returns:
        The logits of an output object, else its first floating-point tensor.

    Raises:
        ModelError: If the output holds no tensor.
    """
    names = _parameters(network)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if names == {"batch"}:
        return _tensor(network(batch))
    if isinstance(batch, Mapping):
        labels = set(LABEL_KEYS) - _required(network)
        taken = {k: v for k, v in batch.items() if k in names and k not in labels}
        if taken:
            return _tensor(network(**{**_with_positions(network, taken, names), **options}))
        wants_whole = len(names) == 1 and input_key(batch) is None
        return _tensor(network(batch if wants_whole else main_input(batch), **options))
    if takes_all(network, batch):
        return _tensor(network(*batch, **options))
    if isinstance(batch, Sequence) and len(batch) > 2:
        return _tensor(network(*batch[:-1], **options))
    return _tensor(network(main_input(batch), **options))


def takes_all(network: nn.Module, batch: Any) -> bool:
    """Say whether a network needs every entry of a batch, so that none of them is a label.

    Args:
        network: Any module.
        batch: Any batch.

    Returns:
        Whether it is a sequence of as many tensors as the network cannot be called without, or a
        mapping whose label is one of these.
    """
    if isinstance(batch, Mapping):
        return any(key in batch for key in _required(network) & set(LABEL_KEYS))
    if not isinstance(batch, Sequence) or not all(isinstance(b, Tensor) for b in batch):
        return False
    return 1 < len(batch) == len(_required(network))


def _required(network: nn.Module) -> set[str]:
    """Return the arguments of forward that have no default."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = _signature(network)
    return {n for n, p in found.items() if p.kind in plain and p.default is p.empty}


def _parameters(network: nn.Module) -> set[str]:
    found = _signature(network)
    if found and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
        # forward(self, **inputs) hands everything on, to the only network there is.
        inner = networks(network)
        return _parameters(network.get_submodule(inner[0])) if len(inner) == 1 else set(found)
    return set(found)


_SIGNATURES: MutableMapping[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()
"""Of methods named ``forward``: to read a signature takes as long as a small model."""


def _signature(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    method = getattr(network.forward, "__func__", None)
    known = None if method is None else _SIGNATURES.get(method)
    if known is not None:
        return known
    try:
        found = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):
        return {}
    if method is not None:
        _SIGNATURES[method] = found
    return found


def _with_positions(network: nn.Module, taken: dict[str, Any], names: set[str]) -> dict[str, Any]:
    mask = taken.get("attention_mask")
    if "position_ids" not in names or "position_ids" in taken or not isinstance(mask, Tensor):
        return taken
    if mask.ndim != 2 or bool(mask[:, 0].all()):
        return taken
    counted = mask.long().cumsum(1)
    padding = _padding_position(network)
    if padding is None:
        return {**taken, "position_ids": (counted - 1).clamp(min=0)}
    return {**taken, "position_ids": counted * mask.long() + padding}


def _padding_position(network: nn.Module) -> int | None:
    """Return the position that padding has, where real ones are counted from the next on.

    RoBERTa and its kin keep a row of the table of positions for padding.
    """
    for name, module in network.named_modules():
        counts = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if counts and isinstance(module.padding_idx, int):
            return module.padding_idx
    return None


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    entries = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(output, Mapping) and "logits" in output:
        entries = [output["logits"], *entries]
    if isinstance(entries, Sequence):
        for entry in entries:
            if isinstance(entry, Tensor) and entry.is_floating_point():
                return entry
    raise ModelError(
        f"model: expected an output that is or holds a tensor, got {type(output).__name__}. "
        "Pass a Task whose outputs(model, batch) returns the tensor."
    )


def networks(model: nn.Module) -> list[str]:
    """Return the names of the children that have parameters.

    Args:
        model: Any module.

    Returns:
        Names, in order of definition.
    """
    return [n for n, m in model.named_children() if any(True for _ in m.parameters())]
