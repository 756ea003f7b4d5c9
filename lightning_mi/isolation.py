"""Measuring without leaving a trace: `untouched`."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ModelError

__all__ = ["followed", "frozen", "is_compiled", "unfused", "untouched", "unwrapped"]

followed: ContextVar[bool] = ContextVar("followed", default=False)
"""Whether what is measured will itself be differentiated: then its graph must not be cut."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside compilation and data-parallel wrappers.

    A hook that is added to a compiled module after compilation never fires, without an error, so
    everything here works on the module inside.

    Args:
        model: Any module.

    Returns:
        The innermost module; its parameters are the same objects.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Do anything with a model except changing its weights, and leave it exactly as it was.

    Inside, the model is in evaluation mode, gradients can be taken (also within
    ``torch.inference_mode`` and ``torch.no_grad``), autocast is off, compiled code runs eagerly
    and the global random generators start from a fixed seed. Afterwards every submodule has its
    own train/eval flag and plain attributes again, every parameter its ``requires_grad`` and its
    ``.grad``, every buffer its value, and the generators of python, numpy and torch continue where
    they were.

    Tensors that were made in inference mode must be cloned inside before a gradient is taken.
    What the model's own code changes in place in lists or dictionaries of its own, and weights
    changed through ``.data``, cannot be seen.

    Args:
        model: The user's model, wrapped or not.

    Yields:
        The module inside any wrapper.

    Raises:
        ModelError: If a parameter was changed inside: that cannot be undone.

    Example:
        >>> model = nn.Dropout(0.5)
        >>> with untouched(model) as quiet:
        ...     quiet.training
        False
        >>> model.training
        True
    """
    plain = unwrapped(model)
    modules = _modules(plain)
    parameters = _parameters(modules)
    versions = [(p, _version(p)) for p in parameters]
    devices = {p.device for p in parameters}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_generators(devices))
        for kind in {"cpu", *(device.type for device in devices)}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if plain is not model or any(map(is_compiled, modules)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in modules):
            # cuDNN refuses the backward pass of a recurrent network in evaluation mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_same_attributes(modules))
        stack.enter_context(_evaluating(modules))
        stack.enter_context(_same_gradients(parameters))
        stack.enter_context(_same_buffers(modules))
        yield plain
    changed = _changed(plain, versions)
    if changed:
        raise ModelError(
            f"model: expected unchanged weights after a measurement, got changes in {changed[:3]}. "
            "Measure on a copy of the model if the measurement has to change it."
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch gradients of all parameters off for the while, to save their memory and time.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    flags = [(p, p.requires_grad) for p in _parameters(_modules(model))]
    try:
        for p, flag in flags:
            if flag:
                p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


@contextmanager
def unfused() -> Iterator[None]:
    """Switch off the fused path of ``nn.TransformerEncoderLayer``, which calls no module in it.

    Yields:
        Nothing.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, each once, in an order that depends on the model alone.

    ``model.modules()`` also spells their names, which takes as long as a small model.
    """
    found = {id(model): model}
    left = [model]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                left.append(child)
    return list(found.values())


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    tables = (m._parameters.values() for m in modules)
    return list({id(p): p for table in tables for p in table if p is not None}.values())


def _changed(model: nn.Module, versions: list[tuple[nn.Parameter, int | None]]) -> list[str]:
    """Return the names of parameters that are not the ones they were, or not what they were."""
    now = _parameters(_modules(model))
    same = len(now) == len(versions) and all(
        p is q and _version(p) == version for p, (q, version) in zip(now, versions, strict=True)
    )
    if same:
        return []
    before = {id(p): version for p, version in versions}
    named = dict(model.named_parameters())
    changed = [n for n, p in named.items() if before.get(id(p), -1) != _version(p)]
    return changed or ["parameters that are gone"]


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    # Flags are set one by one: model.train() would unfreeze a layer that the user keeps in eval.
    flags = [(m, m.training) for m in modules]
    try:
        for module, flag in flags:
            if flag:
                module.training = False
        yield
    finally:
        for module, flag in flags:
            if module.training != flag:
                module.training = flag


@contextmanager
def _same_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    # Half-accumulated gradients are put aside, so that even a stray backward() cannot reach them.
    kept = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p, _, _ in kept:
            p.grad = None
        yield
    finally:
        for p, flag, grad in kept:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def _same_attributes(modules: list[nn.Module]) -> Iterator[None]:
    # A forward pass may count its calls, or grow a cached table and note its new length. The
    # buffers go back below, so what the module remembers about them must go back as well.
    kept = [(vars(m), dict(vars(m))) for m in modules]
    try:
        yield
    finally:
        for attributes, before in kept:
            if _is_same(attributes, before):
                continue
            for name in attributes.keys() - before.keys():
                del attributes[name]
            for name, value in before.items():
                if name not in attributes or attributes[name] is not value:
                    attributes[name] = value


def _is_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Say whether two dictionaries hold the very same objects in the same order."""
    return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))


@contextmanager
def _same_buffers(modules: list[nn.Module]) -> Iterator[None]:
    owners = [(m._buffers, dict(m._buffers)) for m in modules]
    buffers = {id(b): b for _, before in owners for b in before.values() if b is not None}
    kept = [(b, b.detach().clone(), _version(b)) for b in buffers.values()]
    try:
        yield
    finally:
        for owner, before in owners:
            for name in owner.keys() - before.keys():
                del owner[name]
            owner.update(before)
        for buffer, copy, version in kept:
            # Batch normalisation writes its statistics without a new version.
            if version is None or _version(buffer) != version or not torch.equal(buffer, copy):
                # A tensor made in inference mode can only be written there.
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(copy)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _generators(homes: set[torch.device]) -> Iterator[None]:
    # By hand: torch.random.fork_rng takes five times as long for the CPU alone.
    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = np.random.get_state(legacy=False)  # The other form takes twice as long.
    devices = sorted({home.index or 0 for home in homes if home.type == "cuda"})
    states = [torch.cuda.get_rng_state(device) for device in devices]
    try:
        random.seed(0)
        np.random.seed(0)
        # torch.manual_seed would seed every device, those that are not put back as well.
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        yield
    finally:
        for device, state in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(state, device)
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(legacy)


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module runs compiled code, by whatever way it was compiled.

    Args:
        module: The module itself; its children are not asked.

    Returns:
        True also for a LightningModule that was compiled before it was handed to a Trainer.
    """
    # Looked up in the dictionaries: an attribute that a module lacks takes long to miss.
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own.get("_modules", ())
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
    )
