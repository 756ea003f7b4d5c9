"""Path patching: what a part tells chosen others directly, past all that lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...nodes import MLP, Embedding, Head, Logits, Reader, parse
from ...record import Panel, Reading
from ...task import Task
from .edges import Direction, coinciding
from .patching import TOKENS, checked, shares
from .places import Port, as_place
from .ports import Change, Ports
from .readings import Asker
from .restart import Row
from .streams import repeated

__all__ = ["PathPatching", "Receiver", "Sender", "path_patching"]

Sender: TypeAlias = Head | MLP | Embedding
Receiver: TypeAlias = Head | Reader | MLP | Logits
Mlps: TypeAlias = Literal["frozen", "recomputed"]


def path_patching(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    receivers: Receiver | Sequence[Receiver],
    sender: Sender | None = None,
    mlps: Mlps = "frozen",
    direction: Direction = "denoise",
    positions: str = "all",
    reduce: Literal["mean"] | None = "mean",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Panel:
    r"""Measure what a sender does to a behavior by way of chosen receivers alone.

    First the base run, with the sender's value from the other run and everything else that could
    pass it on held at what it was in the base run: all other heads, and MLPs where they are
    ``"frozen"``. What reaches the receivers is kept. Then the base run again, in which the
    receivers read that, and all that follows is computed anew (Wang et al. 2022, Goldowsky-Dill et
    al. 2023). With ``Logits()`` the metric of the first run is the answer. The share is that of
    `activation_patching`: :math:`(m_{patched} - m_{base}) / (m_{donor} - m_{base})`.

    Args:
        model: The user's model; it is left as it was.
        behavior: Clean and corrupted prompts and the metric.
        receivers: One or several, which read what reaches them at the same time: a `Reader`, so
            the query of a head, or the key or value of a key-value head; a `Head`, for all three
            of it; an `MLP`; or `Logits`, which must be alone.
        sender: A head, an MLP or the embeddings; None tries all heads, one after the other.
        mlps: ``"frozen"`` counts direct paths alone; ``"recomputed"`` also those through MLPs, as
            Wang et al. did.
        direction: ``"denoise"`` patches the corrupted run with values of the clean one,
            ``"noise"`` the other way round.
        positions: ``"all"``, or the name of a position of the behavior: where the sender is
            patched.
        reduce: ``"mean"`` over examples, of numerator and denominator; None keeps examples apart.
        task: How the model is called; None calls it with the batch.
        anatomy: What it is made of, where that is known already.

    Returns:
        One share for one sender, or axes (layer, head), 0 where no path leads to a receiver; the
        axis example in front where they are kept apart. NaN, with a reason, where the metric is
        the same on both prompts.

    Raises:
        ArgumentError: If an argument is none of these, or no path leads from sender to receivers.
        ModelError: If a part cannot be patched in this model.

    Example:
        >>> from lightning_mi import Behavior
        >>> from lightning_mi.nodes import Head, Logits
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
        >>> clean, corrupted = torch.randn(2, 3, 5, 8)
        >>> first = lambda outputs, batch: outputs[:, -1, 0]
        >>> pair = Behavior(clean, corrupted, target=first)
        >>> path_patching(layer, pair, sender=Head(0, 1), receivers=MLP(0)).size
        {}
    """
    own = as_behavior(behavior)
    checked(own, "z", direction, positions, reduce)
    chosen = _receivers(receivers)
    _check(sender, chosen, mlps, positions)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        paths = _Paths(plain, own, chosen, mlps, direction, task, anatomy)
        paths.run()
        senders = paths.heads() if sender is None else [sender]
        if sender is not None and not paths.leads(sender):
            raise ArgumentError.of(
                "sender",
                expected=f"a part that runs before {', '.join(map(str, chosen))}",
                got=str(sender),
                do="Paths lead forward only.",
            )
        return _panel(paths, senders, sender is None, positions, reduce)


class _Paths:
    """Both runs of a model, and what reaches receivers when a sender alone is exchanged."""

    def __init__(
        self,
        model: nn.Module,
        behavior: Behavior,
        receivers: Sequence[Receiver],
        mlps: Mlps,
        direction: Direction,
        task: Task | None,
        anatomy: Anatomy | None,
    ) -> None:
        self.model, self.behavior, self.mlps = model, behavior, mlps
        self.receivers, self.direction = receivers, direction
        self.task = task or Task()
        known = anatomy or Anatomy.of(model, behavior.clean, task=self.task)
        self.anatomy = known
        ends = (behavior.corrupted, behavior.clean)
        self.base, self.donor = ends if direction == "denoise" else ends[::-1]
        # Not of self, which holds the ports: weights would wait for the collector.
        self.ports = Ports(model, self.task, lambda: known, "rows")
        self.asker = Asker(model, self.task, behavior)
        layers = range(self.anatomy.n_layers)
        self.parts: list[Port] = [("z", at) for at in layers]
        self.parts += [("mlp", at) for at in self.anatomy.mlp_layers]
        self.reading = self._reading()

    def _reading(self) -> dict[Port, list[int] | None]:
        """Return the tensors that receivers make of what they read, and which heads of them."""
        found: dict[Port, list[int] | None] = {}
        for r in self.receivers:
            if isinstance(r, MLP):
                found["mlp", r.layer] = None
            elif isinstance(r, Head):
                at = r.layer
                if at >= self.anatomy.n_layers:
                    raise _absent(r, self.anatomy.n_layers)
                group = self.anatomy.n_heads[at] // self.anatomy.n_kv_heads[at]
                own = Head(at, r.head // group)
                for part in (Reader(r, "q"), Reader(own, "k"), Reader(own, "v")):
                    self._add(found, part)
            elif isinstance(r, Reader):
                self._add(found, r)
        return found

    def _add(self, found: dict[Port, list[int] | None], reader: Reader) -> None:
        at, head = reader.node.layer, reader.node.head
        if at >= self.anatomy.n_layers:
            raise _absent(reader, self.anatomy.n_layers)
        counts = self.anatomy.n_heads if reader.role == "q" else self.anatomy.n_kv_heads
        if head >= counts[at]:
            raise _absent(reader, counts[at])
        indices = found.setdefault(as_place(reader).port, [])
        if indices is not None and head not in indices:
            indices.append(head)

    def run(self) -> None:
        """Run both ends and keep what every part writes in them."""
        self.ends: list[dict[Port, Tensor]] = []
        metrics = []
        for batch in (self.base, self.donor):
            seen: dict[Port, Tensor] = {}
            with self.ports.opened({}, seen, [*self.parts, *self.reading]):
                metrics.append(self.asker(batch)[0])
            # A model may write into what it returned.
            self.ends.append({port: value.clone() for port, value in seen.items()})
        self.base_metric, self.donor_metric = metrics

    @property
    def reason(self) -> str | None:
        """Why nothing can be said, or None."""
        return coinciding(float(self.base_metric.mean()), float(self.donor_metric.mean()))

    def heads(self) -> list[Sender]:
        """Return all heads, layer by layer."""
        counts = self.anatomy.n_heads
        return [Head(at, h) for at in range(self.anatomy.n_layers) for h in range(counts[at])]

    def leads(self, sender: Sender) -> bool:
        """Say whether a sender runs before some receiver."""
        if isinstance(sender, Embedding) or isinstance(self.receivers[0], Logits):
            return True
        last = max(layer for _, layer in self.reading)
        reaches = isinstance(sender, Head) and ("mlp", last) in self.reading
        return sender.layer < last or (reaches and sender.layer == last)

    def metrics(self, senders: Sequence[Sender], where: Tensor | None) -> Tensor:
        """Return the metric by way of the receivers, ``[sender, example]``."""
        rows = self._rows(senders, where)
        changes = {
            port: Change(_each(self.ends[0][port], rows.get(port, {}), len(senders)))
            for port in self.parts
            if port in rows or self.mlps == "frozen" or port[0] != "mlp"
        }
        batch = self.donor if isinstance(senders[0], Embedding) else self.base
        batch = repeated(batch, len(self.behavior), len(senders))
        seen: dict[Port, Tensor] = {}
        with self.ports.opened(changes, seen, list(self.reading)):
            metric = self.asker(batch, len(senders))
        if not self.reading:
            return metric
        received = {p: _received(seen[p], indices) for p, indices in self.reading.items()}
        with self.ports.opened(received):
            return self.asker(repeated(self.base, len(self.behavior), len(senders)), len(senders))

    def _rows(self, senders: Sequence[Sender], where: Tensor | None) -> dict[Port, dict[int, Row]]:
        """Return for each tensor which copies of the base run are changed in it, and how."""
        rows: dict[Port, dict[int, Row]] = {}
        for i, sender in enumerate(senders):
            if isinstance(sender, Embedding):
                continue
            port: Port = ("z" if isinstance(sender, Head) else "mlp", sender.layer)
            if port not in self.ends[1]:
                raise _absent(sender, self.anatomy.n_layers)
            donor = self.ends[1][port]
            if isinstance(sender, Head) and sender.head >= donor.shape[1]:
                raise _absent(sender, donor.shape[1])
            heads = (sender.head,) if isinstance(sender, Head) else None
            rows.setdefault(port, {})[i] = Row(heads, where, donor)
        return rows


def _each(base: Tensor, rows: dict[int, Row], copies: int) -> Callable[[Tensor], Tensor]:
    def apply(old: Tensor) -> Tensor:
        made = [rows[i].put(base) if i in rows else base for i in range(copies)]
        return torch.cat(made).to(old)

    return apply


def _received(value: Tensor, indices: list[int] | None) -> Change:
    """Return what puts in what receivers made of what reached them; it is kept, never re-read."""

    def apply(old: Tensor) -> Tensor:
        if indices is None:
            return value.to(old)
        made = old.clone()
        made[:, indices] = value[:, indices].to(old)
        return made

    return Change(apply, None if indices is None else tuple(indices))


def _panel(
    paths: _Paths, senders: Sequence[Sender], every: bool, positions: str, reduce: str | None
) -> Panel:
    size = len(paths.behavior)
    found = paths.base_metric.float().expand(len(senders), -1).clone()
    if paths.reason is None:
        where = None if positions == "all" else _where(paths, positions)
        leading = [i for i, s in enumerate(senders) if paths.leads(s)]
        for chunk in _chunks(leading, paths):
            found[chunk] = paths.metrics([senders[i] for i in chunk], where).to(found)
    values = shares(found, paths.base_metric, paths.donor_metric, reduce)
    if paths.reason is not None:
        values = torch.full_like(values, float("nan"))
    values = values.T if reduce is None else values[:, 0]
    axes = () if reduce is not None else ("example",)
    if every:
        counts = paths.anatomy.n_heads
        made = values.new_full((*values.shape[:-1], len(counts), max(counts)), float("nan"))
        for i, s in enumerate(senders):
            made[..., s.layer, s.head] = values[..., i]  # type: ignore[union-attr]
        return Panel(
            made, (*axes, "layer", "head"), convention=_told(paths, "every head", positions)
        )
    told = _told(paths, str(senders[0]), positions)
    return Panel(values.reshape(size if axes else ()), axes, convention=told)


def _chunks(indices: list[int], paths: _Paths) -> Iterator[list[int]]:
    tokens = max(1, paths.base_metric.numel() * paths.ends[0]["z", 0].shape[2])
    per_pass = max(1, TOKENS // tokens)
    for start in range(0, len(indices), per_pass):
        yield indices[start : start + per_pass]


def _where(paths: _Paths, name: str) -> Tensor:
    steps = torch.arange(paths.ends[0]["z", 0].shape[2])
    return steps == paths.behavior.where(name).cpu()[:, None]


def _told(paths: _Paths, sender: str, positions: str) -> dict[str, Any]:
    denoise = paths.direction == "denoise"
    base, donor = float(paths.base_metric.mean()), float(paths.donor_metric.mean())
    about: dict[str, Any] = {
        "what": "share of the metric's difference that the path from sender to receivers carries",
        "method": "path patching",
        "sender": sender,
        "receivers": [str(r) for r in paths.receivers],
        "mlps": paths.mlps,
        "heads": "frozen at the base run",
        "direction": paths.direction,
        "ablation": "clean run's value" if denoise else "corrupted run's value",
        "sign": "1: this path alone restores the behavior"
        if denoise
        else "1: without this path the behavior is destroyed",
        "null": 0.0,
        "positions": positions,
        "clean": donor if denoise else base,
        "corrupted": base if denoise else donor,
        "examples": len(paths.behavior),
        "behavior": paths.behavior.name,
    }
    if paths.reason is not None:
        about["reason"] = paths.reason
    return about


def _receivers(receivers: Receiver | Sequence[Receiver]) -> list[Receiver]:
    found = list(receivers) if isinstance(receivers, Sequence) else [receivers]
    right = all(isinstance(r, Head | Reader | MLP | Logits) for r in found)
    if not found or not right or (len(found) > 1 and any(isinstance(r, Logits) for r in found)):
        raise ArgumentError.of(
            "receivers",
            expected="Readers, Heads and MLPs, or Logits() alone",
            got=repr(receivers)[:60],
            do='For example [Reader(Head(1, 3), "q")].',
        )
    return found


def _check(sender: object, receivers: list[Receiver], mlps: str, positions: str) -> None:
    if sender is not None and not isinstance(sender, Head | MLP | Embedding):
        raise ArgumentError.of(
            "sender",
            expected="a Head, an MLP, Embedding(), or None for all heads",
            got=repr(sender)[:60],
            do="For example Head(0, 1).",
        )
    if mlps not in ("frozen", "recomputed"):
        raise ArgumentError.of(
            "mlps", expected='"frozen" or "recomputed"', got=repr(mlps), do="Choose one."
        )
    if positions == "each" or (isinstance(sender, Embedding) and positions != "all"):
        raise ArgumentError.of(
            "positions",
            expected='"all", or the name of one of the behavior',
            got=repr(positions),
            do='The embeddings are exchanged at "all" positions.',
        )


def _absent(part: object, count: int) -> ArgumentError:
    return ArgumentError.of(
        str(part),
        expected=f"a part of the model, counted from 0 to {count - 1}",
        got=str(part),
        do="Under grouped queries k and v count key-value heads.",
    )


@dataclass(frozen=True)
class PathPatching:
    """What heads do to a behavior by way of chosen receivers alone; see `path_patching`.

    Panel ``effect``, by layer and head: a share, 1 where the path alone restores the behavior
    (``"denoise"``) or destroys it (``"noise"``).

    Args:
        behavior: Prompts and metric.
        receivers: Who reads, by printed name (``"L1H3.q"``, ``"MLP2"``, ``"logits"``) or as nodes.
        name: First part of the record's name.
        sender: One sender, likewise; None is every head.
        mlps: See `path_patching`.
        direction: See there.
        positions: See there.

    Example:
        >>> from lightning_mi import Behavior
        >>> PathPatching(Behavior(torch.ones(1, 2), torch.zeros(1, 2)), ["L1H3.q"]).mlps
        'frozen'
    """

    behavior: BehaviorLike
    receivers: Sequence[str] = ("logits",)
    name: str = "path_patching"
    sender: str | None = None
    mlps: Mlps = "frozen"
    direction: Direction = "denoise"
    positions: str = "all"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panel.
        """
        found = path_patching(
            model,
            as_behavior(self.behavior).to(context.device),
            receivers=[_node(r) for r in self.receivers],  # type: ignore[misc]
            sender=None if self.sender is None else _node(self.sender),  # type: ignore[arg-type]
            mlps=self.mlps,
            direction=self.direction,
            positions=self.positions,
            task=context.known_task,
        )
        return {"effect": found}


def _node(name: object) -> object:
    return parse(name) if isinstance(name, str) else name
