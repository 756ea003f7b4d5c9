"""`tap`: watch every attention of a running model, and replace what heads write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, NoAttentionError, TapError
from ..isolation import is_compiled, unfused, unwrapped
from .check import Check
from .observer import CarriedError, Observer, active
from .site import Site

__all__ = ["Tap", "tap"]

Edit = Callable[[int, Tensor], Tensor]
Visit = Callable[[int, Site], None]
Rewrite = Callable[[int, Site], Tensor]

OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Arguments by which the modules of transformers are handed another sequence to attend to."""


class Tap:
    """What a `tap` has seen: the `sites` of the latest forward pass, in the order they ran in.

    A pass begins when a module that was called from outside is called from outside again, so a
    model that is run piece by piece has one pass, too.

    Args:
        model: The module inside any wrapper.
        edit: See `tap`.
        visit: See `tap`.
        keep: See `tap`.
        check: See `tap`.
        normalizers: See `tap`.
        stop_after: See `tap`.
        rewrite: See `tap`.
    """

    def __init__(
        self,
        model: nn.Module,
        edit: Edit | None = None,
        visit: Visit | None = None,
        keep: bool = True,
        check: Check = "rows",
        normalizers: bool = False,
        stop_after: int | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        self.model = model
        self.sites: list[Site] = []
        self.count = 0
        self.total = 0
        self.was_run = False
        self.check = check
        self.normalizers = normalizers
        self.replays = rewrite is not None
        self._rewrite = rewrite
        self._edit, self._visit, self._keep, self._stop_after = edit, visit, keep, stop_after
        self._modules: list[tuple[str, bool]] = []
        self._batch = 0
        self._order: list[str] = []
        self._called: set[str] = set()
        self._recomputed: dict[str, int] = {}

    def where(self) -> tuple[str, bool, int] | None:
        """Return module name, whether it attends to another sequence, and the batch size.

        Returns:
            None while the model is not running.
        """
        return (*self._modules[-1], self._batch) if self._modules else None

    def receive(self, site: Site) -> Tensor:
        """Take a site and return what its z shall be.

        Args:
            site: An attention that has just been computed.

        Returns:
            Its z, edited.

        Raises:
            Stop: After the last site that is wanted; `tap` catches it.
        """
        if is_recomputing():
            return self._edited(self._index_of_recomputed(site.module), site)
        index = self.count
        self.count += 1
        self.total += 1
        self._order.append(site.module)
        if self._keep:
            self.sites.append(site)
        site.z = self._edited(index, site)
        if self._visit is not None:
            self._visit(index, site)
        if index == self._stop_after:
            raise Stop(self)
        return site.z

    def _edited(self, index: int, site: Site) -> Tensor:
        if self._rewrite is not None:
            z = self._rewrite(index, site)
        elif self._edit is not None:
            z = self._edit(index, site.z)
        else:
            return site.z
        if not isinstance(z, Tensor) or z.shape != site.z.shape:
            raise ArgumentError.of(
                "edit",
                expected=f"a function that returns z of shape {tuple(site.z.shape)}",
                got=tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__,
                do="Change the values of z, not its shape; return z itself to leave it.",
            )
        return z

    def _index_of_recomputed(self, module: str) -> int:
        # Activation checkpointing runs a layer again inside the backward pass. It is the same
        # attention: it gets the same edit, and is not captured a second time.
        own = [i for i, name in enumerate(self._order) if name == module]
        turn = self._recomputed.get(module, 0)
        self._recomputed[module] = turn + 1
        return own[turn % len(own)]

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._modules and not is_recomputing():
            if self._has_run(name):
                self._begin_again()
            self.was_run = True
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim)
            self._batch = next((len(v) for v in tensors), 0)
        cross = any(isinstance(kwargs.get(key), Tensor) for key in OTHER_SEQUENCE)
        self._modules.append((name, cross))
        self._called.add(name)

    def _has_run(self, name: str) -> bool:
        inside = f"{name}." if name else ""
        return any(n == name or n.startswith(inside) for n in self._called)

    def _begin_again(self) -> None:
        self.count = 0
        self.sites.clear()
        self._order.clear()
        self._called.clear()

    def _leave(self, name: str) -> None:
        # Whatever an interrupted forward pass left behind is dropped too.
        while self._modules and self._modules.pop()[0] != name:
            pass


def is_recomputing() -> bool:
    """Say whether a backward pass is running, which recomputes what was checkpointed.

    Returns:
        True inside the backward pass.
    """
    return torch._C._current_graph_task_id() != -1


class Stop(BaseException):
    """Ends a forward pass of which no more is needed; never leaves `tap`."""

    def __init__(self, owner: Tap) -> None:
        super().__init__("the forward pass was ended by a tap")
        self.owner = owner


@contextmanager
def tap(
    model: nn.Module,
    edit: Edit | None = None,
    *,
    visit: Visit | None = None,
    keep: bool = True,
    check: Check = "rows",
    normalizers: bool = False,
    stop_after: int | None = None,
    rewrite: Rewrite | None = None,
) -> Iterator[Tap]:
    """Watch every attention that runs inside a model, and replace what heads write.

    The model's outputs stay bit-equal unless ``edit`` changes them (equal to the ordinary path of
    ``nn.MultiheadAttention``, whose fused inference path is switched off meanwhile). Taps nest: an
    inner one sees the model as edited by the outer ones.

    Args:
        model: Any model, compiled or not, in evaluation mode.
        edit: Called as ``edit(index, z)`` for each site, ``index`` counting from 0 in every forward
            pass; returns the z to go on with, ``[batch, head, position, d_head]`` as well.
        visit: Called as ``visit(index, site)`` while the site's tensors are alive.
        keep: Whether `Tap.sites` keeps the sites; False needs no memory.
        check: A few rows of every recomputed pattern are compared with the model's own output
            (``"rows"``), or ``"all"``, or ``"none"``. With ``"none"`` attention weights may be
            dropped out, as in training: z is the model's own, patterns are not what acted on it.
        normalizers: Ask kernels for the row log-sum-exp, where they have one and no gradient is
            needed.
        stop_after: Index of the site after which the forward pass is abandoned; the rest of the
            ``with`` block is then skipped.
        rewrite: In place of ``edit``, called as ``rewrite(index, site)``; returns the z to go on
            with. `Site.attend` computes it from other queries, keys, values or another pattern.

    Yields:
        The tap; its ``sites`` fill up while the model runs, and start anew with the next pass.

    Raises:
        NoAttentionError: If the model was run and no attention was seen.
        TapError: If the model was not run at all, so that nothing was measured or edited.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with tap(layer) as seen:
        ...     output = layer(torch.ones(1, 5, 8))
        >>> seen.sites[0].module, tuple(seen.sites[0].pattern().shape)
        ('self_attn', (1, 2, 5, 5))
    """
    plain = unwrapped(model)
    seen = Tap(plain, edit, visit, keep, check, normalizers, stop_after, rewrite)
    with ExitStack() as stack:
        _add_hooks(stack, seen)
        _switch(stack, plain, plain is not model)
        _observe(stack, seen)
        try:
            yield seen
        except Stop as stop:
            if stop.owner is not seen:
                raise
        except CarriedError as carried:
            raise carried.error from None
    _require_sites(seen)


def _add_hooks(stack: ExitStack, seen: Tap) -> None:
    for name, module in seen.model.named_modules():
        if name and _is_plain_leaf(module):
            continue
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")

        def enter(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            seen._enter(name, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            seen._leave(name)

        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _is_plain_leaf(module: nn.Module) -> bool:
    """Say whether no attention can run in a module: torch's own layers without children."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return (
        own
        and not isinstance(module, nn.MultiheadAttention)
        and next(module.children(), None) is None
    )


def _switch(stack: ExitStack, model: nn.Module, wrapped: bool) -> None:
    stack.enter_context(unfused())
    if wrapped or any(is_compiled(module) for module in model.modules()):
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def _observe(stack: ExitStack, seen: Tap) -> None:
    observer = active.get()
    if observer is None:
        observer = Observer()
        token = active.set(observer)
        stack.callback(active.reset, token)
        stack.enter_context(observer)
    observer.listeners.append(seen)
    stack.callback(observer.listeners.remove, seen)


def _require_sites(seen: Tap) -> None:
    name = type(seen.model).__name__
    if not seen.was_run:
        raise TapError(
            f"tap: expected {name} to be run inside the block, got no call of any of its modules, "
            "so nothing was seen or edited. Call the model that was given to tap (not a copy, and "
            "not a compiled or exported program made from it)."
        )
    if not seen.total:
        raise NoAttentionError(
            f"model: expected {name} to compute attention through "
            "scaled_dot_product_attention, a softmax between two products, or "
            "nn.MultiheadAttention, got a forward pass without any. A model without attention has "
            "no heads to measure; attention in a kernel of its own (flash_attn, flex_attention, "
            "TorchScript) is not seen: load the model with attn_implementation='sdpa' or 'eager'."
        )
