"""Running a model from the patched layer on: nothing before it is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.tape import named, tensors
from ...attention.site import widened
from ...batch import tree_map
from .places import Port
from .ports import Change, Ports, block_names, replaced
from .readings import Asker
from .standing_in import standing_in
from .streams import repeated
from .unchanged import by_position, local_modules, unchanged

__all__ = ["Base", "Level", "Levels", "Row", "recording"]


@dataclass(frozen=True)
class Row:
    """One patch: a part of a tensor, and what is put there.

    Args:
        heads: Query heads whose z it changes; None is the whole tensor.
        where: Positions ``[example, position]`` that it changes; None is all.
        new: The tensor that the values come from: z ``[example, head, position, d_head]``, or what
            an MLP writes, or the stream, ``[example, position, d_model]``.
    """

    heads: tuple[int, ...] | None
    where: Tensor | None
    new: Tensor

    def put(self, old: Tensor) -> Tensor:
        """Return a tensor in which the part is the new one."""
        chosen = torch.ones(old.shape[:-1], dtype=torch.bool, device=old.device)
        if self.heads is not None:
            chosen = torch.zeros_like(chosen)
            chosen[:, list(self.heads)] = True
        if self.where is not None:
            where = self.where.to(old.device)
            chosen = chosen & (where if self.heads is None else where[:, None])
        return torch.where(chosen[..., None], self.new.to(old), old)


@dataclass(frozen=True)
class Level:
    """How much is left out.

    Args:
        skips: Layers before the patched one return what they returned.
        writes: The patched part's module is not run either: what it writes is put in its place.
        cuts: The last MLP is computed only where the metric reads.
        trims: Positions before the prompts differ are not computed again.
        names: Only the logits that the metric names are computed.
    """

    skips: bool
    writes: bool
    cuts: bool
    trims: bool = False
    names: bool = False


Levels = (
    Level(True, True, True, True, True),
    Level(True, True, True, False, True),
    Level(True, True, True, True),
    Level(True, True, True),
    Level(True, True, False),
    Level(True, False, False),
    Level(False, False, False),
)


@dataclass(eq=False)
class Base:
    """The run that is patched, kept.

    Args:
        ports: The model.
        asker: Asks the metric.
        batch: The prompts.
        size: Their number.
        returned: What modules returned, by name.
        z: What heads wrote, by layer.
        start: First position at which a patch can change anything.
        widths: What modules that may map each position by itself are given, by name.
    """

    ports: Ports
    asker: Asker
    batch: Any
    size: int
    returned: dict[str, Any] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    start: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    _at_each: dict[str, Tensor] | None = None

    @property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        return self.ports.anatomy()

    def metric(self, port: Port, rows: list[Row], level: Level) -> Tensor:
        """Return the metric of patched runs.

        Args:
            port: The tensor that is patched: z, MLP or residual of a layer.
            rows: The patches, one run for each, all in one batch.
            level: What is left out.

        Returns:
            Shape ``[row, example]``.
        """
        kind, layer = port
        modules = named(self.ports.model)
        batch = repeated(self.batch, self.size, len(rows))
        stubs: dict[str, Any] = {}
        if level.skips:
            blocks = block_names(self.anatomy.modules)
            stubs = {n: self._again(n, len(rows)) for at, n in blocks.items() if at < layer}
        if level.writes:
            stubs.update(self._written(port, rows))
        kept = {modules[n]: v for n, v in self._local().items() if n not in stubs}
        cut = [modules[n] for n in self._last() if level.cuts and n not in stubs]
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(standing_in({modules[n]: _returning(v) for n, v in stubs.items()}))
            if level.trims:
                stack.enter_context(unchanged(kept, self.start, len(rows)))
            if not level.writes or kind == "residual":
                change = Change(lambda old: self._patched(old, rows))
                first = layer if level.skips else 0
                stack.enter_context(self.ports.opened({port: change}, first_layer=first))
            return self.asker(batch, len(rows), cut, few=level.names)

    def _patched(self, old: Tensor, rows: list[Row]) -> Tensor:
        blocks = torch.split(old, self.size)
        return torch.cat([row.put(block) for row, block in zip(rows, blocks, strict=True)])

    def _again(self, name: str, copies: int) -> Any:
        return repeated(self.returned[name], self.size, copies)

    def _written(self, port: Port, rows: list[Row]) -> dict[str, Any]:
        """Return what the modules of the patched layer return."""
        kind, layer = port
        if kind == "residual":
            return {}
        made = {}
        if (name := self._attention(layer)) is not None:
            made[name] = self._again(name, len(rows))
            if kind == "z":
                whole = next(tensors(self.returned[name]))
                new = torch.cat([whole + self._change(layer, row).to(whole) for row in rows])
                made[name] = replaced(made[name], 0, new)
        if kind == "mlp":
            name, output, _ = self.ports.mlp(layer)
            old = list(tensors(self.returned[name]))[output]
            new = torch.cat([row.put(old) for row in rows])
            made[name] = replaced(self._again(name, len(rows)), output, new)
        return made

    def _change(self, layer: int, row: Row) -> Tensor:
        """Return what a patch of z changes of what the attention writes."""
        heads = list(row.heads or ())
        W_O = self.anatomy.W_O[layer]
        change = widened(row.new[:, heads]) - widened(self.z[layer][:, heads])
        if row.where is not None:
            change = change * row.where.to(change)[:, None, :, None]
        return torch.einsum("bhtk,hkd->btd", change, W_O[heads].to(change))

    def _attention(self, layer: int) -> str | None:
        """Return the largest module that returns what the heads of a layer write."""
        found = [w for w in self.anatomy.writers if w.kind == "heads" and w.layer == layer]
        if not found or not found[0].module or found[0].output:
            return None
        inner, outer = found[0].module, self.anatomy.modules[layer]
        a, b = (next(tensors(self.returned.get(n)), None) for n in (inner, outer))
        if a is None:
            return None
        return outer if b is not None and a.shape == b.shape and torch.equal(a, b) else inner

    def _last(self) -> list[str]:
        """Return the module that the last MLP reads by, where nothing else reads by it."""
        readers, writers = self.anatomy.readers, self.anatomy.writers
        if not writers or writers[-1].kind != "mlp" or writers[-1].reads < 0:
            return []
        name = readers[writers[-1].reads].module
        return [name] if sum(r.module == name for r in readers) == 1 else []

    def _local(self) -> dict[str, Tensor]:
        """Return what was returned by modules that map each position by itself."""
        if self._at_each is None:
            fits: dict[tuple[type, int, int], bool] = {}
            modules, self._at_each = named(self.ports.model), {}
            for name, width in self.widths.items() if self.start else ():
                made = self.returned.get(name)
                if not isinstance(made, Tensor) or made.ndim != 3 or len(made) != self.size:
                    continue
                kind = (type(modules[name]), width, made.shape[-1])
                if kind not in fits:
                    fits[kind] = by_position(modules[name], made, width)
                if fits[kind]:
                    self._at_each[name] = made
        return self._at_each

    def levels(self, kind: str) -> list[Level]:
        """Return what may be left out in this model, the most first.

        Args:
            kind: What is patched.

        Returns:
            Levels; the last one leaves nothing out.
        """
        half = any(z.element_size() < 4 for z in self.z.values())
        blocks = block_names(self.anatomy.modules)
        recorded = bool(blocks) and all(n in self.returned for n in blocks.values())
        known = not any(bool(W.isnan().any()) for W in self.anatomy.W_O)
        writes = all(self._attention(at) for at in range(self.anatomy.n_layers))
        found = []
        for level in Levels:
            if (level.skips and not recorded) or (level.trims and not self._local()):
                continue
            if level.names and self.asker.few is None:
                continue
            if level.writes and (not writes or (kind == "z" and (half or not known))):
                continue
            found.append(level)
        return found


@contextmanager
def recording(base: Base) -> Iterator[None]:
    """Keep what blocks, attentions and MLPs return while the base runs.

    Args:
        base: The run; its ``returned`` is filled.

    Yields:
        Nothing.
    """
    anatomy, modules = base.anatomy, named(base.ports.model)
    names = {*block_names(anatomy.modules).values(), *anatomy.modules}
    names |= {w.module for w in anatomy.writers if w.kind in ("heads", "mlp") and w.module}
    local = set(local_modules(anatomy, modules)) if base.start else set()
    with ExitStack() as stack:
        for name in names | local:

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if name in local and args and isinstance(args[0], Tensor) and args[0].ndim:
                    base.widths[name] = args[0].shape[-1]
                if isinstance(output, Tensor | tuple | list):
                    base.returned[name] = tree_map(_kept, output)

            stack.callback(modules[name].register_forward_hook(hook).remove)
        yield


def _kept(value: Any) -> Any:
    # A model may add to it in place (Falcon does).
    return value.detach().clone() if isinstance(value, Tensor) else value


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward
