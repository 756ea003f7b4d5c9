"""The tensors inside a model that can be read and replaced: `Ports`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.tape import named, tensors
from ...attention import Site, tap
from ...attention.check import Check
from ...errors import ArgumentError, ModelError
from ...task import Task
from .places import Kind, Port

__all__ = ["Change", "Ports", "block_names", "replaced"]

ATTENTION: tuple[Kind, ...] = ("q", "k", "v", "pattern", "z")


@dataclass(frozen=True)
class Change:
    """What is done to one tensor.

    Args:
        apply: Returns the tensor to go on with.
        indices: Heads (key-value heads for k and v) that it may change; None is all.
    """

    apply: Callable[[Tensor], Tensor]
    indices: tuple[int, ...] | None = None


@dataclass(eq=False)
class Ports:
    """A model whose inner tensors can be read and replaced while it runs.

    Args:
        model: The module inside any wrapper.
        task: How it is called.
        anatomy: Finds what the model is made of; called only for MLPs, neurons and the stream.
        check: How the tap checks what it sees.
    """

    model: nn.Module
    task: Task
    anatomy: Callable[[], Anatomy]
    check: Check = "none"
    _streams: dict[int, str] = field(default_factory=dict)

    @contextmanager
    def opened(
        self,
        changes: Mapping[Port, Change],
        seen: dict[Port, Tensor] | None = None,
        wanted: Collection[Port] = (),
        *,
        first_layer: int = 0,
        visit: Callable[[int, Site], None] | None = None,
    ) -> Iterator[None]:
        """Replace tensors, and keep others, while the model runs inside the block.

        Args:
            changes: What is done to which tensor.
            seen: Filled with the wanted tensors as the model computed them, before any change to
                themselves.
            wanted: Which.
            first_layer: The layer of the first self-attention that will run.
            visit: Called with the layer and site of each self-attention, after its changes.

        Yields:
            Nothing.

        Raises:
            ArgumentError: At the end of the block, if a layer whose heads were to be changed or
                kept never ran: it would look as if the change did nothing.
        """
        keep: dict[Port, Tensor] = {} if seen is None else seen
        kinds = {kind for kind, _ in [*changes, *wanted]}
        with ExitStack() as stack:
            for kind, layer in dict.fromkeys([*changes, *wanted]):
                if kind not in ATTENTION:
                    port = (kind, layer)
                    self._hook(stack, port, changes.get(port), keep, port in wanted)
            rewrite: _Rewriter | None = None
            if kinds & set(ATTENTION) or visit is not None:
                rewrite = _Rewriter(changes, keep, set(wanted), first_layer, visit)
                stack.enter_context(tap(self.model, rewrite=rewrite, keep=False, check=self.check))
            yield
            if rewrite is not None:
                rewrite.require_all([*changes, *wanted])

    def _hook(
        self,
        stack: ExitStack,
        port: Port,
        change: Change | None,
        keep: dict[Port, Tensor],
        wanted: bool,
    ) -> None:
        def through(value: Tensor) -> Tensor:
            if value.ndim != 3:
                raise ModelError(
                    f"{port[0]} of layer {port[1]}: expected [example, position, d], got shape "
                    f"{tuple(value.shape)}. Parts that hold positions otherwise cannot be patched."
                )
            if wanted:
                keep[port] = value
            return value if change is None else change.apply(value)

        kind, layer = port
        if kind == "mlp":
            name, output, turn = self.mlp(layer)
            hook = _leaving(through, output, *turn)
            stack.callback(named(self.model)[name].register_forward_hook(hook).remove)
        elif kind == "neuron":
            entering = _entering(through)
            handle = self._neurons(layer).register_forward_pre_hook(entering, with_kwargs=True)
            stack.callback(handle.remove)
        else:
            module = named(self.model)[self.stream(layer)]
            handle = module.register_forward_pre_hook(_entering(through), with_kwargs=True)
            stack.callback(handle.remove)

    def mlp(self, layer: int) -> tuple[str, int, tuple[int, int]]:
        """Return the module that returns what the MLP of a layer writes.

        Args:
            layer: The layer.

        Returns:
            Its name, which of its outputs is meant, and (which call of how many in a pass).

        Raises:
            ArgumentError: If the layer has none.
        """
        found = [w for w in self.anatomy().writers if w.kind == "mlp" and w.module]
        own = [w for w in found if w.layer == layer]
        if not own:
            layers = sorted({w.layer for w in found})
            raise ArgumentError.of(
                "MLP",
                expected=f"a layer with one, out of {layers}" if layers else "a model with MLPs",
                got=f"layer {layer}" if layers else f"MLP{layer}, and no layer that has one",
                do="Layers count from 0.",
            )
        calls = [w for w in found if w.module == own[0].module]
        return own[0].module, own[0].output, (calls.index(own[0]), len(calls))

    def _neurons(self, layer: int) -> nn.Module:
        """Return the module whose input are the neurons of a layer."""
        name, _, turn = self.mlp(layer)
        width = self.anatomy().d_model
        parts = [m for m in named(self.model)[name].modules() if _writes(m, width)]
        if len(parts) != 1 or turn[1] > 1:
            raise ModelError(
                f"neurons of layer {layer}: expected one map from neurons to the stream inside "
                f"{name!r}, got {len(parts)}. A mixture of experts, or a map written by hand, "
                "cannot be split."
            )
        return parts[0]

    def stream(self, layer: int) -> str:
        """Return the module whose first input is the stream that enters a layer.

        Args:
            layer: The layer, or the number of layers for the logits.

        Returns:
            Its name.

        Raises:
            ArgumentError: If there is no such layer.
            ModelError: If the stream enters no module by which it could be replaced.
        """
        anatomy = self.anatomy()
        if not 0 <= layer <= anatomy.n_layers:
            raise ArgumentError.of(
                "layer",
                expected=f"0 to {anatomy.n_layers}, the last one for the logits",
                got=layer,
                do="Layers are self-attentions, counted in the order in which they run.",
            )
        if layer == anatomy.n_layers:
            found = [r.module for r in anatomy.readers if r.kind == "logits"]
        else:
            found = [n for n in (self._streams.get(layer),) if n is not None]
        if not found:
            raise ModelError(
                f"residual stream of layer {layer}: expected a module (a block) that is handed the "
                "whole stream, got none. Make each layer a module whose first input is the stream."
            )
        return found[-1]

    def find_streams(self, batch: Any) -> None:
        """Find the blocks that are handed the whole stream, by running the model once.

        Args:
            batch: What it is run on.
        """
        anatomy = self.anatomy()
        readers = {r.layer: r.module for r in anatomy.readers if r.kind == "attention"}
        blocks = block_names(anatomy.modules)
        given: dict[str, Tensor] = {}
        modules = named(self.model)
        with ExitStack() as stack, torch.no_grad():
            for name in {*readers.values(), *blocks.values()}:

                def hook(m: nn.Module, a: Any, k: Any, name: str = name) -> None:
                    first = next(
                        (t for t in tensors([*a, *k.values()]) if t.is_floating_point()), None
                    )
                    if first is not None:
                        given[name] = first.clone()

                handle = modules[name].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            self.task.outputs(self.model, batch)
        for layer, name in blocks.items():
            a, b = given.get(name), given.get(readers.get(layer, ""))
            inner = name == anatomy.modules[layer] or name == readers.get(layer)
            if a is None or b is None or inner:
                continue
            # A model that diverged hands on NaN, which equals nothing.
            if torch.equal(a.nan_to_num(), b.nan_to_num()):
                self._streams[layer] = name


class _Rewriter:
    """Applies changes to attentions, layer by layer."""

    def __init__(
        self,
        changes: Mapping[Port, Change],
        keep: dict[Port, Tensor],
        wanted: set[Port],
        first_layer: int,
        visit: Callable[[int, Site], None] | None,
    ) -> None:
        self.changes, self.keep, self.wanted, self.visit = changes, keep, wanted, visit
        self.first, self.layers = first_layer, dict[int, int]()

    def __call__(self, index: int, site: Site) -> Tensor:
        layer = self.layers.get(index)
        if layer is None:
            if site.cross:
                return site.z
            layer = self.layers[index] = self.first + len(self.layers)
        q, k, v = (self._through(kind, layer, getattr(site, kind)) for kind in ("q", "k", "v"))
        z = self._attended(layer, site, q, k, v)
        site.z = self._through("z", layer, z)
        if self.visit is not None:
            self.visit(layer, site)
        return site.z

    def require_all(self, ports: Collection[Port]) -> None:
        """Refuse heads of layers that there are not.

        Args:
            ports: What was to be changed or kept.

        Raises:
            ArgumentError: If other layers ran, and one of these did not.
        """
        ran = set(self.layers.values())
        missed = sorted(n for kind, n in ports if kind in ATTENTION and n not in ran)
        if ran and missed:
            raise ArgumentError.of(
                "head",
                expected=f"a layer with self-attention, out of {sorted(ran)}",
                got=f"layer {missed[0]}, which never ran",
                do="Layers are self-attentions, counted from 0 in the order in which they run.",
            )

    def _attended(self, layer: int, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = q is not site.q or k is not site.k
        pattern: Tensor | None = None
        port: Port = ("pattern", layer)
        if port in self.changes or port in self.wanted:
            own = site.pattern_of(q, k) if moved else site.pattern()
            changed = self._through("pattern", layer, own)
            pattern = changed if moved or changed is not own else None
        if not moved and v is site.v and pattern is None:
            return site.z
        made = site.attend(q, k, v, pattern)
        touched = self._touched(layer, site)
        return made if touched is None else torch.where(touched[:, None, None], made, site.z)

    def _touched(self, layer: int, site: Site) -> Tensor | None:
        """Return which query heads a change reaches: all others keep the model's own z."""
        found = torch.zeros(site.heads, dtype=torch.bool, device=site.z.device)
        for kind in ATTENTION[:-1]:
            change = self.changes.get((kind, layer))
            if change is None:
                continue
            if change.indices is None:
                return None
            heads = site.heads
            group = heads // getattr(site, kind).shape[1] if kind in ("k", "v") else 1
            for i in change.indices:
                found[i * group : (i + 1) * group] = True
        return found

    def _through(self, kind: Kind, layer: int, value: Tensor) -> Tensor:
        port = (kind, layer)
        if port in self.wanted:
            self.keep[port] = value
        change = self.changes.get(port)
        if change is None:
            return value
        heads = value.shape[1]
        if change.indices and max(change.indices) >= heads:
            raise ArgumentError.of(
                "head",
                expected=f"0 to {heads - 1} for {kind} of layer {layer}",
                got=max(change.indices),
                do="Under grouped queries k and v count key-value heads.",
            )
        return change.apply(value)


def block_names(modules: Collection[str]) -> dict[int, str]:
    """Return for each layer the largest module that no other layer runs in.

    Args:
        modules: Names of the modules that attentions run in, by layer.

    Returns:
        Layer to name; empty where layers share a module.
    """
    paths = [name.split(".") for name in modules]
    if len({tuple(p) for p in paths}) != len(paths):
        return {}
    found: dict[int, str] = {}
    for layer, path in enumerate(paths):
        others = [p for i, p in enumerate(paths) if i != layer]
        depth = next(
            (d for d in range(1, len(path) + 1) if all(p[:d] != path[:d] for p in others)), None
        )
        if depth is None:
            return {}
        if not others:  # One layer alone: the module itself.
            depth = len(path)
        found[layer] = ".".join(path[:depth])
    return found


def replaced(output: Any, place: int, new: Tensor) -> Any:
    """Return a module's output with one of its tensors replaced.

    Args:
        output: A tensor, or a tuple or list that holds some.
        place: Which tensor.
        new: The new one.

    Returns:
        The same form.

    Raises:
        ModelError: If it is neither.
    """
    if isinstance(output, Tensor):
        return new
    old = list(tensors(output))[place]
    if isinstance(output, list | tuple):
        entries = [new if v is old else v for v in output]
        return tuple(entries) if isinstance(output, tuple) else entries
    raise ModelError(
        f"expected a module that returns a tensor or a tuple, got {type(output).__name__}. "
        "What it writes cannot be replaced."
    )


def _leaving(
    through: Callable[[Tensor], Tensor], place: int, turn: int, turns: int
) -> Callable[..., Any]:
    calls = [0]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        mine = calls[0] % turns == turn
        calls[0] += 1
        if not mine:
            return None
        old = list(tensors(output))[place]
        new = through(old)
        return None if new is old else replaced(output, place, new)

    return hook


def _entering(through: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for place, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:place], through(value), *args[place + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, key: through(value)}
        return None

    return hook


def _writes(module: nn.Module, width: int) -> bool:
    """Say whether a module is a linear map to the stream from something else."""
    weight = getattr(module, "weight", None)
    if next(module.children(), None) is not None or not isinstance(weight, Tensor):
        return False
    if weight.ndim != 2:
        return False
    out = getattr(module, "out_features", getattr(module, "nf", None))
    return out == width  # An MLP as wide as the stream has two such maps, and is refused.
