"""One model on one behavior, and what several expectations ask of it: `Subject`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...attention import Site, tap
from ...batch import main_input
from ...behavior import Behavior
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError, LightningMIError
from ...measurement import Context
from ...nodes import MLP, Head
from ...task import Task
from ..causal import intervene, mean, zero
from ..causal.bench import on_bench
from ..causal.edges import coinciding
from ..causal.places import At
from ..causal.places import Part as Place
from ..causal.values import Value, from_run
from ..characterisation.knockout import position_of
from ..readout import Roles
from ..readout.roles import shared_roles
from ..weights.copying import table

__all__ = ["CUTS", "Cut", "Part", "Subject", "index_of"]

Cut: TypeAlias = Literal["mean", "zero", "corrupted"]
"""What is put in the place of what a part writes."""

CUTS = ("mean", "zero", "corrupted")

Part: TypeAlias = Head | MLP
Links: TypeAlias = tuple[tuple[Head, Head], ...]


@dataclass(eq=False)
class Subject:
    """A model, prompts, and what was found out about them so far.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        behavior: The prompts, on the model's device.
        context: Task and shared results.
        tokens: The protocol of head scores.
    """

    model: nn.Module
    behavior: Behavior
    context: Context
    tokens: RepeatedTokens

    @property
    def task(self) -> Task | None:
        """How the model is called; None calls it with the batch."""
        return self.context.known_task

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        return shared_anatomy(self.model, self.context, self.behavior.clean)

    @property
    def heads(self) -> tuple[Head, ...]:
        """All heads, layer by layer."""
        sizes = enumerate(self.anatomy.n_heads)
        return tuple(Head(layer, head) for layer, n in sizes for head in range(n))

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """All MLPs, layer by layer."""
        return tuple(MLP(layer) for layer in self.anatomy.mlp_layers)

    @functools.cached_property
    def roles(self) -> Roles | str:
        """Head scores against their nulls, or why there are none."""
        if main_input(self.behavior.clean).is_floating_point():
            return "head scores are defined by repeated tokens, and this model reads none"
        try:
            with torch.no_grad():
                return shared_roles(self.model, self.context, self.tokens)[1]
        except LightningMIError as error:
            # Head scores ask more of a model than circuits do, for example room for repetitions.
            return str(error)

    # ------------------------------------------------------------ the metric

    @functools.cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The metric on clean and on corrupted prompts, ``[example]`` each."""
        return self._metric(self.behavior.clean), self._metric(self.behavior.corrupted)

    @property
    def reason(self) -> str | None:
        """Why the metric can say nothing, or None."""
        clean, corrupted = self.ends
        if not bool((clean.isfinite() & corrupted.isfinite()).all()):
            return "the metric is not finite on all prompts"
        return coinciding(float(clean.mean()), float(corrupted.mean()), "a part")

    def _metric(self, batch: object) -> Tensor:
        with torch.no_grad():
            outputs = (self.task or Task()).outputs(self.model, batch)
            return self.behavior.metric(outputs).float()

    def without(self, parts: Sequence[Part], cut: Cut) -> Tensor:
        """Return the metric on clean prompts when some parts are cut.

        Args:
            parts: Which.
            cut: What is put in their place.

        Returns:
            Shape ``[example]``.
        """
        if not parts:
            return self.ends[0]
        value = self._value(cut)
        replaced: dict[Place | At, Value] = dict.fromkeys(parts, value)
        known = self.anatomy
        with intervene(
            self.model, replaced, task=self.task, anatomy=known, example=self.behavior.clean
        ):
            return self._metric(self.behavior.clean)

    def _value(self, cut: Cut) -> Value:
        if cut == "zero":
            return zero()
        return from_run(self.behavior.corrupted) if cut == "corrupted" else mean(self.behavior)

    def nothing(self, cut: Cut, kinds: Sequence[str]) -> Tensor:
        """Return the metric on clean prompts when all parts of some kinds are cut.

        Args:
            cut: What is put in their place; for ``"corrupted"`` this is the corrupted run.
            kinds: ``"head"``, ``"mlp"``.

        Returns:
            Shape ``[example]``.
        """
        if cut == "corrupted":
            return self.ends[1]
        key = ("hypotheses.nothing", id(self), cut, tuple(sorted(kinds)))
        every: list[Part] = [*self.heads] if "head" in kinds else []
        every += self.mlps if "mlp" in kinds else ()
        return self.context.shared(key, lambda: self.without(every, cut))

    def unlinked(self, links: Links, reads: str, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
        """Return what becomes of the metric when heads no longer read others.

        Args:
            links: Pairs of a head that writes and a later one that reads it.
            reads: By which input: ``"q"``, ``"k"`` or ``"v"``.
            cut: What the edge carries instead.

        Returns:
            The metric of the clean run, without these edges, and without any edge, ``[example]``.
        """
        with on_bench(
            self.model,
            self.behavior,
            ablation=cut,
            task=self.task,
            anatomy=self.anatomy,
        ) as bench:
            graph = bench.graph
            mask = graph.lawful.clone()
            for writer, reader in links:
                name = f"L{reader.layer}H{self._input_index(reader, reads)}.{reads}"
                mask[graph.writers.index(str(writer)), graph.readers.index(name)] = False
            none = torch.zeros_like(mask)
            made = bench.metric(torch.stack([mask, none]))
            return bench.clean.float(), made[0].float(), made[1].float()

    def _input_index(self, reader: Head, reads: str) -> int:
        if reads == "q":
            return reader.head
        return int(self.anatomy.kv_head(reader.layer)[reader.head])

    # ------------------------------------------------------------ attention on the prompts

    def place(self, name: str) -> Tensor:
        """Return a position of each clean prompt.

        Args:
            name: A position of the behavior; or ``"answer"`` / ``"wrong"`` where the behavior does
                not use that name itself: where the prompt first holds that token.

        Returns:
            Long tensor ``[example]``, on the CPU; −1 where an example has none.

        Raises:
            ArgumentError: If there is no such position.
        """
        if name == "last" or name in self.behavior.positions:
            return position_of(self.behavior, name).cpu()
        tokens = {"answer": self.behavior.answers, "wrong": self.behavior.wrong}.get(name)
        if tokens is None:
            raise ArgumentError.of(
                "position",
                expected=f"one of {sorted({*self.behavior.positions, 'last', 'answer', 'wrong'})}",
                got=repr(name),
                do=f"These are what {self.behavior.name!r} has.",
            )
        ids = main_input(self.behavior.clean)
        same = ids == tokens.to(ids)[:, None]
        return torch.where(same.any(1), same.int().argmax(1), -1).cpu()

    def attention(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each head looks from one position to another one, on clean prompts.

        Args:
            source: Query position ``[example]``.
            target: Key position ``[example]``; −1 leaves an example out.

        Returns:
            The attention, and what it would be if all reachable keys got the same,
            ``[layer, head]`` each; NaN where nothing is reachable.
        """
        rows: list[Tensor] = []
        nulls: list[Tensor] = []
        known = (source >= 0) & (target >= 0)

        def visit(index: int, site: Site) -> None:
            if site.cross:
                return
            home = site.z.device
            example = known.nonzero()[:, 0].to(home)
            query, key = source.to(home)[example], target.to(home)[example]
            rows.append(site.pattern()[example, :, query, key].mean(0).float().cpu())
            reach = site.reachable()
            if reach is None:
                nulls.append(torch.full((site.heads,), 1 / site.k.shape[2]))
                return
            wide = reach.expand(len(site.z), site.heads, -1, -1)[example, :, query]
            own = wide.gather(-1, key[:, None, None].expand(-1, site.heads, 1))[..., 0]
            nulls.append((own / wide.sum(-1).clamp(min=1)).mean(0).float().cpu())

        with tap(self.model, visit=visit, keep=False), torch.no_grad():
            (self.task or Task()).outputs(self.model, self.behavior.clean)
        return table(rows), table(nulls)


def index_of(part: Part) -> tuple[int, ...]:
    """Return where a part stands in a table of its kind.

    Args:
        part: A head or an MLP.

    Returns:
        (layer, head) of a head, (layer,) of an MLP.
    """
    return (part.layer, part.head) if isinstance(part, Head) else (part.layer,)
