"""What sees every attention of a running model: a torch function mode."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import LightningMIError, ModelError
from ..isolation import followed
from .check import Check, verify
from .site import Site
from .trace import PRODUCTS, Traces

__all__ = ["CarriedError", "Listener", "Observer", "active"]

BACKWARD: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
)

FLASH = 1
"""Number of the flash kernel in torch's choice of attention kernels."""


class CarriedError(LightningMIError):
    """Carries a TypeError out of ``a @ b``, which would turn it into "unsupported operand"."""

    def __init__(self, error: TypeError) -> None:
        super().__init__(str(error))
        self.error = error


class Listener(Protocol):
    """A tap, as the observer knows it."""

    check: Check
    normalizers: bool
    replays: bool

    def where(self) -> tuple[str, bool, int] | None:
        """Return module name, whether it is cross-attention, and batch size; None if outside."""

    def receive(self, site: Site) -> Tensor:
        """Take a site and return what its z shall be."""


active: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


class Observer(TorchFunctionMode):
    """Recognises attention among all torch functions and tells the taps, outermost first.

    There is one for all taps that are open, so that what is checked is the model's own output,
    before any tap has edited it, and an inner tap sees what the outer ones have made of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Listener] = []
        self._traces = Traces()
        self._heads: int | None = None
        self._cross = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function and look at what it was."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        if func in BACKWARD:
            return self._open(func, args, kwargs)
        if func in PRODUCTS:
            return self._product(func, args, kwargs)
        result = func(*args, **kwargs)
        self._traces.follow(func, args, kwargs, result)
        return result

    def _listening(self) -> list[tuple[Listener, str, bool, int]]:
        places = ((listener, listener.where()) for listener in self.listeners)
        return [(listener, *place) for listener, place in places if place is not None]

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        own = (query, key, value, attn_mask, dropout_p, is_causal)
        listening = self._listening()
        if not listening:
            return F.scaled_dot_product_attention(*own, scale=scale, enable_gqa=enable_gqa)
        _refuse_odd(query, dropout_p if _is_strict(listening) else 0.0, listening[0][1])
        z, normalizers = None, None
        if any(listener.normalizers for listener, *_ in listening):
            z, normalizers = _flash(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if z is None:
            z = F.scaled_dot_product_attention(*own, scale=scale, enable_gqa=enable_gqa)
        site = Site(
            module="",
            q=_with_head(query),
            k=_with_head(self._traces.shared_heads(key)),
            v=_with_head(self._traces.shared_heads(value)),
            z=_with_head(z),
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            mask=_with_head(attn_mask) if attn_mask is not None else None,
            causal=is_causal,
            normalizers=normalizers,
        )
        self._traces.forget_shared()
        edited = self._tell(site, listening)
        return edited[:, 0] if query.ndim == 3 else edited

    def _product(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        result = func(*args, **kwargs)
        found = self._traces.weighted_values(func, args, kwargs, result)
        if found is None:
            keep = any(own.check == "all" or own.replays for own in self.listeners)
            self._traces.begin(func, args, kwargs, result, self._heads, keep)
            return result
        listening = self._listening()
        if not listening:
            return result
        try:
            _, module, _, batch = listening[0]
            site = found.site(self._traces, module, batch, strict=_is_strict(listening))
            return found.native(self._tell(site, listening))
        except TypeError as error:
            raise CarriedError(error) from error

    def _multi_head(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        before = self._heads, self._cross
        try:
            self._heads = kwargs["num_heads"] if "num_heads" in kwargs else args[4]
            query = kwargs["query"] if "query" in kwargs else args[0]
            key = kwargs["key"] if "key" in kwargs else args[1]
            self._cross = not _is_same(query, key)
            return self._open(func, args, kwargs)
        finally:
            self._heads, self._cross = before

    def _open(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a function that would hide what it calls from modes.

        It runs in a copy of its namespace in which it finds nothing to hand over, with this mode
        on. So the arguments stay the caller's own (need_weights among them), and layers that a
        backward pass recomputes are seen.

        Returns:
            What the function returns.
        """
        body = _with_globals(func)
        if followed.get() and func is torch.autograd.grad:
            # The mode that asks for it does not see what this one runs.
            kwargs = {**kwargs, "create_graph": True, "retain_graph": True}
        if body is func:
            return func(*args, **kwargs)
        with self:
            return body(*args, **kwargs)

    def _tell(self, site: Site, listening: list[tuple[Listener, str, bool, int]]) -> Tensor:
        checks = {listener.check for listener, *_ in listening}
        level: Check = "all" if "all" in checks else "rows" if "rows" in checks else "none"
        site.module = listening[0][1]
        verify(site, level)
        z = site.z
        different = self._cross or site.q.shape[2] != site.k.shape[2]
        for listener, name, cross, _ in listening:
            own = dataclasses.replace(site, module=name, z=z, cross=cross or different)
            z = listener.receive(own)
        return z


def _is_strict(listening: list[tuple[Listener, str, bool, int]]) -> bool:
    """Say whether anyone relies on patterns, which dropout makes others than what acted on z."""
    return any(listener.check != "none" for listener, *_ in listening)


def _with_globals(func: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(func, FunctionType):
        return func
    blind = {"has_torch_function": _nothing, "has_torch_function_unary": _nothing}
    namespace = {**func.__globals__, **blind}
    copy = FunctionType(
        func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _nothing(arguments: Any) -> bool:
    return False


def _is_same(query: Tensor, key: Tensor) -> bool:
    # nn.MultiheadAttention transposes both for batch_first, which makes new tensors of one storage.
    return query is key or (query.shape == key.shape and query.data_ptr() == key.data_ptr())


def _with_head(values: Tensor) -> Tensor:
    """Give one head to attention that has none; other layouts are left as they are."""
    return values[:, None] if values.ndim == 3 else values


def _refuse_odd(query: Tensor, dropout: float, module: str) -> None:
    if query.is_nested:
        raise ModelError(
            f"attention in {module!r}: expected dense tensors, got nested ones. "
            "Pass padded batches with a mask instead."
        )
    if query.ndim not in (3, 4):
        raise ModelError(
            f"attention in {module!r}: expected queries [batch, head, position, d_head], got shape "
            f"{tuple(query.shape)}. Heads cannot be told apart in this layout."
        )
    refuse_dropout(dropout, module)


def refuse_dropout(dropout: float, module: str) -> None:
    """Refuse attention whose weights are dropped out: its pattern is not what acted on z.

    Args:
        dropout: The probability.
        module: Where.

    Raises:
        ModelError: If it is not zero.
    """
    if dropout > 0.0:
        raise ModelError(
            f"attention in {module!r}: expected no dropout of attention weights, got p={dropout}. "
            "Call model.eval() first; if dropout is passed to the kernel in evaluation mode too, "
            "the model should pass 0.0 there."
        )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Call the kernel that torch would choose, and keep the row log-sum-exp that it computes."""
    if torch.is_grad_enabled() or q.device.type != "cpu" or q.ndim != 4:
        return None, None
    if torch.is_autocast_enabled("cpu"):  # which the kernel itself does not heed
        return None, None
    chosen = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    if chosen != FLASH:
        return None, None
    if grouped and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    z, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return z, normalizers
