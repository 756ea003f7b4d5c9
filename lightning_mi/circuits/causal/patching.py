"""Activation patching: put a part of one run into another one, and ask the metric."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...attention import Site
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, Reading
from ...task import Task
from .edges import Direction, coinciding
from .places import Port
from .ports import Change, Ports
from .readings import Asker
from .restart import Base, Level, Row, recording
from .streams import Inside
from .trimming import alike
from .unchanged import same_before

__all__ = [
    "ActivationPatching",
    "Patched",
    "Patcher",
    "activation_patching",
    "checked",
    "panel_of",
    "shares",
]

Patched: TypeAlias = Literal["z", "q", "k", "v", "pattern", "mlp", "residual"]
OF_HEADS = ("z", "q", "k", "v", "pattern")

TOKENS = 4096
"""Most tokens in one pass of patched runs: what its memory follows from."""

Entry: TypeAlias = tuple[int, int, int | None]
"""Layer, head (0 for MLPs and the stream), and position or None."""


class Patcher:
    """Two runs of a model, and what becomes of the metric when parts of one enter the other.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        behavior: The prompts.
        what: What is patched.
        direction: ``"denoise"`` patches the corrupted run, ``"noise"`` the clean one.
        positions: ``"all"``, ``"each"``, or the name of a position of the behavior.
        task: How the model is called.
        anatomy: What it is made of, where that is known already.
    """

    def __init__(
        self,
        model: nn.Module,
        behavior: Behavior,
        what: Patched,
        direction: Direction,
        positions: str,
        task: Task | None,
        anatomy: Anatomy | None,
    ) -> None:
        self.model, self.behavior, self.what = model, behavior, what
        self.direction, self.positions = direction, positions
        self.task = task or Task()
        self._anatomy = anatomy
        denoise = direction == "denoise"
        self.ends = (
            (behavior.corrupted, behavior.clean)
            if denoise
            else (behavior.clean, behavior.corrupted)
        )
        # What is computed anew from queries, keys and values must be what the model computes.
        looks = what in ("q", "k", "v", "pattern")
        # Held weakly: in a cycle, both runs would stay in memory until it is looked for.
        own = weakref.proxy(self)
        self.ports = Ports(model, self.task, lambda: own.anatomy(), "rows" if looks else "none")
        self.asker = Asker(model, self.task, behavior)
        self.base = Base(self.ports, self.asker, self.ends[0], len(behavior))
        self.base.start = alike(*self.ends)
        self.sites: dict[int, Site] = {}
        self.donor: dict[int, Tensor] = {}
        self.old: dict[int, Tensor] = {}
        self._level: Level | None = None
        self._made: dict[tuple[int, int | None], Tensor] = {}

    def anatomy(self) -> Anatomy:
        """Return what the model is made of."""
        if self._anatomy is None:
            with torch.no_grad():
                self._anatomy = Anatomy.of(self.model, self.behavior.clean, task=self.task)
        return self._anatomy

    def run(self) -> None:
        """Run both ends and keep what is needed of them."""
        with torch.no_grad():
            self.run_donor()
            with recording(self.base):
                self.old, self.base_metric = self.see(self.ends[0], self.sites)
        self.base.z = {layer: site.z for layer, site in self.sites.items()}

    def run_donor(self, inside: Inside = nullcontext) -> None:
        """Run the end that values come from, once it is known where the stream runs.

        Args:
            inside: Entered while the model runs.
        """
        if self.what not in OF_HEADS:
            self.anatomy()
        if self.what == "residual":
            self.ports.find_streams(self.ends[0])
        with inside():
            self.donor, self.donor_metric = self.see(self.ends[1], None)

    def see(
        self,
        batch: Any,
        sites: dict[int, Site] | None,
        change: Callable[[Port], Change] | None = None,
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Run the model and keep what is patched.

        Args:
            batch: One of the ends.
            sites: Filled with the attention of each layer, if it is not None.
            change: What is done to the z of a layer, or to what an MLP writes or the stream.

        Returns:
            What is patched, by layer, and the metric ``[example]``.
        """
        found: dict[int, Tensor] = {}
        seen: dict[Port, Tensor] = {}
        wanted = self._wanted()
        changes = {} if change is None else {port: change(port) for port in wanted}

        def visit(layer: int, site: Site) -> None:
            if change is not None and self.what in OF_HEADS:
                site.z = change(("z", layer)).apply(site.z)
            if sites is not None:
                sites[layer] = site
            if self.what == "pattern":
                found[layer] = site.pattern()
            elif self.what in OF_HEADS:
                found[layer] = getattr(site, self.what)

        with self.ports.opened(changes, seen, wanted, visit=visit):
            metric = self.asker(batch)[0]
        found.update({layer: value.clone() for (_, layer), value in seen.items()})
        return found, metric

    def _wanted(self) -> list[Port]:
        if self.what == "mlp":
            layers = self.anatomy().mlp_layers
            if not layers:
                raise ArgumentError.of(
                    "what",
                    expected="a kind of part that the model has",
                    got="'mlp', and no layer with an MLP",
                    do="Patch its heads ('z', 'q', 'k', 'v', 'pattern').",
                )
            return [("mlp", layer) for layer in layers]
        if self.what == "residual":
            return [("residual", layer) for layer in range(self.anatomy().n_layers)]
        return []

    # ------------------------------------------------------------ patches

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of layers, of heads (1 for MLPs and the stream), and of positions (or 1)."""
        layers = 1 + max(self.donor, default=-1)
        heads = 1
        if self.what in OF_HEADS:
            heads = max(value.shape[1] for value in self.donor.values())
        each = self.donor[0 if 0 in self.donor else max(self.donor)]
        length = each.shape[2] if self.what in OF_HEADS else each.shape[1]
        return layers, heads, length if self.positions == "each" else 1

    def entries(self) -> Iterator[Entry]:
        """Yield what can be patched, layer by layer."""
        length = self.shape[2]
        for layer in sorted(self.donor):
            heads = self.donor[layer].shape[1] if self.what in OF_HEADS else 1
            for head in range(heads):
                if self.positions == "each":
                    yield from ((layer, head, t) for t in range(length))
                else:
                    yield (layer, head, None)

    def row(self, entry: Entry) -> Row:
        """Return the patch of an entry."""
        layer, head, position = entry
        where = self.where(layer, position)
        if self.what not in OF_HEADS:
            return Row(None, where, self.donor[layer])
        site, donor = self.sites[layer], self.donor[layer]
        if self.what == "z":
            return Row((head,), where, donor)
        group = site.heads // donor.shape[1]
        heads = tuple(range(head * group, (head + 1) * group))
        if self.what in ("q", "pattern") or where is None:
            # A query position's z follows from its own query alone.
            return Row(heads, where, self._attended(layer, None, None))
        return Row(heads, None, self._attended(layer, where, position))

    def where(self, layer: int, position: int | None) -> Tensor | None:
        """Return which positions are patched, boolean ``[example, position]``; None is all.

        Args:
            layer: The layer.
            position: The position, where each is patched by itself.

        Returns:
            The mask.
        """
        value = self.donor[layer]
        length = value.shape[2] if self.what in OF_HEADS else value.shape[1]
        steps = torch.arange(length, device=value.device)
        if position is not None:
            return (steps == position).expand(len(self.behavior), -1)
        if self.positions == "all":
            return None
        return steps == self.behavior.where(self.positions).to(value.device)[:, None]

    def _attended(self, layer: int, where: Tensor | None, position: int | None) -> Tensor:
        """Return what all heads of a layer would write: one's z depends on no other one's input."""
        key = (layer, position)
        if key not in self._made:
            if any(at != layer for at, _ in self._made):
                self._made.clear()
            self._made[key] = self._attend(layer, where)
        return self._made[key]

    def _attend(self, layer: int, where: Tensor | None) -> Tensor:
        site, donor = self.sites[layer], self.donor[layer]
        if where is not None:
            donor = torch.where(where[:, None, :, None], donor, getattr(site, self.what))
        if self.what == "pattern":
            return site.attend(pattern=donor)
        if self.what == "q":
            return site.attend(q=donor)
        return site.attend(k=donor) if self.what == "k" else site.attend(v=donor)

    # ------------------------------------------------------------ results

    @property
    def reason(self) -> str | None:
        """Why nothing can be said, or None."""
        return coinciding(float(self.base_metric.mean()), float(self.donor_metric.mean()))

    def metrics(self, entries: Sequence[Entry]) -> Tensor:
        """Return the metric of patched runs.

        Args:
            entries: What is patched, in the order of layers for speed.

        Returns:
            Shape ``[entry, example]``.
        """
        length = next(iter(self.donor.values())).shape[2 if self.what in OF_HEADS else 1]
        per_pass = max(1, TOKENS // max(1, len(self.behavior) * length))
        found: list[Tensor] = []
        start = 0
        while start < len(entries):
            layer = entries[start][0]
            stop = start
            while stop < len(entries) and stop - start < per_pass and entries[stop][0] == layer:
                stop += 1
            chunk = entries[start:stop]
            level = self._chosen(entries)
            found.append(self._patched(layer, chunk, level))
            start = stop
        return torch.cat(found)

    def _patched(self, layer: int, entries: Sequence[Entry], level: Level) -> Tensor:
        rows = [self.row(entry) for entry in entries]
        kind = self.what if self.what in ("mlp", "residual") else "z"
        return self.base.metric((kind, layer), rows, level)

    def _chosen(self, entries: Sequence[Entry]) -> Level:
        """Return how much may be left out: one patch is run whole, too, and must agree."""
        if self._level is None:
            kind = "z" if self.what in OF_HEADS else self.what
            if not same_before(self.base.start, self.old, self.donor):
                self.base.start = 0
            levels = self.base.levels(kind)
            sample = [entries[len(entries) // 2]]
            layer = sample[0][0]
            whole = self._patched(layer, sample, levels[-1]) if len(levels) > 1 else None
            self._level = next(
                (level for level in levels[:-1] if self._agrees(layer, sample, level, whole)),
                levels[-1],
            )
        return self._level

    def _agrees(
        self, layer: int, sample: Sequence[Entry], level: Level, whole: Tensor | None
    ) -> bool:
        try:
            found = self._patched(layer, sample, level)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return False
        if whole is None:
            return False
        exact = whole.element_size() >= 4
        size = torch.maximum(whole.abs().max(), (self.donor_metric - self.base_metric).abs().max())
        return bool((found - whole).abs().max() <= (1e-4 if exact else 2e-2) * size)


def activation_patching(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    what: Patched = "z",
    direction: Direction = "denoise",
    positions: str | None = None,
    reduce: Literal["mean"] | None = "mean",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Panel:
    r"""Measure what each part does to a behavior, by putting its value from one run into the other.

    .. math:: (m_{patched} - m_{base}) / (m_{donor} - m_{base})

    ``"denoise"`` patches the corrupted run with values of the clean one: 1 where the part alone
    brings the behavior back, which shows parts of an AND. ``"noise"`` patches the clean run with
    values of the corrupted one: 1 where the behavior is destroyed, which shows parts of an OR. The
    two differ; run both (Heimersheim and Nanda 2024). Everything after the part is computed anew,
    everything before is not, nor are maps of positions before the prompts differ; all heads of a
    layer are one batch. One patch is also run whole, and where that differs, all are.

    Args:
        model: The user's model; it is left as it was.
        behavior: Clean and corrupted prompts and the metric.
        what: ``"z"``, what each head writes before the output projection; ``"q"`` of each head;
            ``"k"`` and ``"v"`` of each key-value head; ``"pattern"``; ``"mlp"``, what each MLP
            writes; ``"residual"``, the stream that enters each layer.
        direction: Which run is patched.
        positions: ``"all"`` patches all positions at once, ``"each"`` one after the other, the
            name of a position of the behavior this one alone. None is ``"all"`` for heads and
            ``"each"`` for MLPs and the stream. For patterns positions are queries.
        reduce: ``"mean"`` over examples, of numerator and denominator; None keeps examples apart.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        Axes (layer, head), (layer, kv_head) or (layer), with position where each is patched, and
        example in front where they are kept apart. NaN, with a reason, where the metric is the
        same on both prompts.

    Raises:
        ArgumentError: If an argument is none of these.
        ModelError: If the part cannot be patched in this model.

    Example:
        >>> from lightning_mi import Behavior
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> clean, corrupted = torch.randn(2, 3, 5, 8)
        >>> first = lambda outputs, batch: outputs[:, -1, 0]
        >>> activation_patching(layer, Behavior(clean, corrupted, target=first)).size
        {'layer': 1, 'head': 2}
    """
    own = as_behavior(behavior)
    where = checked(own, what, direction, positions, reduce)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        patcher = Patcher(plain, own, what, direction, where, task, anatomy)
        patcher.run()
        if patcher.reason is not None:
            return panel_of(patcher, None, reduce, "exact")
        return panel_of(patcher, patcher.metrics(list(patcher.entries())), reduce, "exact")


def panel_of(
    patcher: Patcher, metrics: Tensor | None, reduce: str | None, method: str, **more: Any
) -> Panel:
    """Return metrics of all entries as a panel of effects.

    Args:
        patcher: The two runs.
        metrics: Shape ``[entry, example]``; None where there is nothing to say.
        reduce: ``"mean"`` or None.
        method: How they were found.
        **more: Further facts for the convention.

    Returns:
        The panel.
    """
    size = len(patcher.behavior)
    base, donor = patcher.base_metric.float(), patcher.donor_metric.float()
    layers, heads, length = patcher.shape
    values = torch.full((size if reduce is None else 1, layers, heads, length), math.nan)
    if metrics is not None:
        effect = shares(metrics, base, donor, reduce)
        for row, (layer, head, position) in zip(effect.cpu(), patcher.entries(), strict=True):
            values[:, layer, head, position or 0] = row
    axes = ["example", "layer", _axis(patcher.what), "position"]
    keep = [reduce is None, True, patcher.what in OF_HEADS, patcher.positions == "each"]
    for axis in reversed(range(4)):
        if not keep[axis]:
            values = values.select(axis, 0)
    shown = [name for name, use in zip(axes, keep, strict=True) if use]
    return Panel(values, tuple(shown), convention=_convention(patcher, method, reduce, more))


def shares(metrics: Tensor, base: Tensor, donor: Tensor, reduce: str | None) -> Tensor:
    """Return which share of the way from one metric to another patched runs have gone.

    Args:
        metrics: Metric of patched runs ``[entry, example]``.
        base: That of the run that was patched ``[example]``.
        donor: That of the run that values came from ``[example]``.
        reduce: ``"mean"`` or None.

    Returns:
        Shape ``[entry, 1]`` or ``[entry, example]``; NaN for an example whose two metrics coincide.
    """
    base, donor = base.float(), donor.float()
    change, whole = metrics.float() - base, donor - base
    if reduce is not None:
        return change.mean(1, True) / whole.mean()
    close = [coinciding(float(a), float(b)) is not None for a, b in zip(base, donor, strict=True)]
    return (change / whole).masked_fill(torch.tensor(close, device=change.device), math.nan)


def _axis(what: str) -> str:
    return "kv_head" if what in ("k", "v") else "head"


def _convention(
    patcher: Patcher, method: str, reduce: str | None, more: dict[str, Any]
) -> dict[str, Any]:
    denoise = patcher.direction == "denoise"
    base, donor = float(patcher.base_metric.mean()), float(patcher.donor_metric.mean())
    about: dict[str, Any] = {
        "what": f"share of the metric's difference that {patcher.what} carries, {method}",
        "method": method,
        "patched": patcher.what,
        "direction": patcher.direction,
        "ablation": "clean run's value" if denoise else "corrupted run's value",
        "sign": "1: this part alone restores the behavior"
        if denoise
        else "1: without this part the behavior is destroyed",
        "null": 0.0,
        "positions": patcher.positions,
        "clean": donor if denoise else base,
        "corrupted": base if denoise else donor,
        "examples": len(patcher.behavior),
        "behavior": patcher.behavior.name,
        **more,
    }
    if patcher.reason is not None:
        about["reason"] = patcher.reason
    elif reduce is None:
        about["reason"] = "NaN where the metric is the same on an example's two prompts"
    return about


def checked(
    behavior: Behavior, what: str, direction: str, positions: str | None, reduce: str | None
) -> str:
    """Refuse arguments that mean nothing, and return which positions are meant.

    Args:
        behavior: The prompts.
        what: What is patched.
        direction: Which run.
        positions: See `activation_patching`.
        reduce: See there.

    Returns:
        ``"all"``, ``"each"`` or a name.

    Raises:
        ArgumentError: If one is wrong.
    """
    for name, given, allowed in (
        ("what", what, get_args(Patched)),
        ("direction", direction, get_args(Direction)),
        ("reduce", reduce, ("mean", None)),
    ):
        if given not in allowed:
            raise ArgumentError.of(
                name, expected=f"one of {allowed}", got=repr(given), do="Choose one."
            )
    if positions is None:
        return "all" if what in OF_HEADS else "each"
    if positions not in ("all", "each"):
        behavior.where(positions)
    return positions


@dataclass(frozen=True)
class ActivationPatching:
    """What each head, MLP or stretch of the stream does to a behavior; see `activation_patching`.

    Panel ``effect``, by layer and head (or position): a share, 1 where the part alone restores the
    behavior (``"denoise"``) or destroys it (``"noise"``).

    Args:
        behavior: Prompts and metric.
        name: First part of the record's name.
        what: See `activation_patching`.
        direction: See there.
        positions: See there.

    Example:
        >>> from lightning_mi import Behavior
        >>> ActivationPatching(Behavior(torch.ones(1, 2), torch.zeros(1, 2)), what="mlp").name
        'activation_patching'
    """

    behavior: BehaviorLike
    name: str = "activation_patching"
    what: Patched = "z"
    direction: Direction = "denoise"
    positions: str | None = None

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panel.
        """
        own = as_behavior(self.behavior).to(context.device)
        found = activation_patching(
            model,
            own,
            what=self.what,
            direction=self.direction,
            positions=self.positions,
            task=context.known_task,
            anatomy=shared_anatomy(model, context, own.clean),
        )
        return {"effect": found}
