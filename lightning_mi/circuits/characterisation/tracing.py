"""Causal tracing: the subject is drowned in noise, and single states are restored (Meng 2022)."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...anatomy.tape import named
from ...batch import attention_mask_of, main_input
from ...behavior import Behavior, BehaviorLike, as_behavior
from ...errors import ArgumentError, ModelError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, Reading, scalar
from ...task import Task
from ..causal.edges import coinciding
from ..causal.ports import Change, Ports
from ..causal.streams import repeated
from .knockout import Span, around, span_of

__all__ = ["CLASSES", "Restored", "SubjectTracing", "subject_tracing"]

Restored = Literal["residual", "mlp"]
CLASSES = (
    "before",
    "subject first",
    "subject middle",
    "subject last",
    "next",
    "further",
    "last",
)
"""Kinds of positions over which single ones are averaged: prompts differ in length."""

ROWS = 256
"""Most prompts in one pass."""


def subject_tracing(
    model: nn.Module,
    behavior: BehaviorLike,
    subject: Span = ("subject", "subject_last"),
    *,
    what: Restored = "residual",
    window: int = 1,
    noise: float = 3.0,
    draws: int = 3,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> dict[str, Panel]:
    """Restore single states of the clean run in a run whose subject is drowned in noise.

    Gaussian noise is added to the token embeddings of the subject, with ``noise`` times the
    standard deviation of the entries of all subjects' embeddings. Then what one layer computes at
    one position takes its stored clean value. *Indirect effect*: (m(restored) − m(noised)) /
    (m(clean) − m(noised)), 1 where this state alone brings the answer back; means over prompts and
    draws of noise.

    Args:
        model: The user's model; it is left as it was.
        behavior: Prompts and metric, for example `lightning_mi.behaviors.KnowledgeRecall`. The
            corrupted prompts are not used, but for their metric in the convention.
        subject: Where the subject stands: (from, to), positions that the behavior names.
        what: The stream that enters a layer, or what MLPs write.
        window: Number of layers restored at once, centred at each layer.
        noise: Standard deviations of the noise.
        draws: Draws of noise.
        anatomy: What the model is made of, where that is known already.
        task: How the model is called; None calls it with the batch.
        seed: Seed of the noise.

    Returns:
        ``effect`` over (layer, feature), the feature being a kind of position (`CLASSES`; NaN for
        kinds that no prompt has), and the scalar ``total``, m(clean) − m(noised). NaN with the
        reason where noise changes nothing.

    Raises:
        ArgumentError: If a number is out of range, or ``what`` has another name.
        ModelError: If the model has no token embedding that can be drowned.
    """
    _check(what, window, noise, draws)
    own = as_behavior(behavior)
    with untouched(model) as plain, frozen(plain), torch.no_grad():
        known = anatomy or Anatomy.of(plain, own.clean, task=task)
        tracer = _Tracer(plain, known, task or Task(), own, what, window, draws)
        drowned = span_of(own, subject)
        tracer.prepare(drowned, noise, seed)
        clean, noised = float(tracer.clean.mean()), float(tracer.noised.mean())
        reason = coinciding(clean, noised)
        kinds = _kinds(own, drowned)
        effect = torch.full((len(tracer.layers), len(CLASSES)), math.nan)
        if reason is None:
            effect = tracer.effects(kinds)
    about = {
        "direction": "denoise",
        "ablation": f"embeddings of the subject plus noise of {noise:g} standard deviations",
        "restored": what,
        "window": window,
        "draws": draws,
        "seed": seed,
        "clean": clean,
        "noised": noised,
        "behavior": own.name,
        "examples": len(own),
        "sign": "1: this state alone brings the answer back",
        "null": 0.0,
    }
    if reason is not None:
        why = f"noise changes nothing: the metric is {clean:.4g} with and without it"
        about["reason"] = why if math.isfinite(clean - noised) else "the metric is not finite"
    what_it_is = f"share of the lost metric that restoring one state ({what}) brings back"
    labels = {"feature": list(CLASSES)}
    if reason is None and bool(effect.isnan().any()):
        about["reason"] = "NaN: no prompt has such a position"
    shown = {**about, "what": what_it_is, "display": {}}
    told = {**about, "what": "m(clean) − m(noised)", "display": {"scalar": "total"}}
    if math.isfinite(clean - noised):
        told.pop("reason", None)
    return {
        "effect": Panel(effect, ("layer", "feature"), labels, "share", shown),
        "total": scalar(clean - noised, "metric", **told),
    }


@dataclass(eq=False)
class _Tracer:
    """The clean run, the noised run, and runs in which states are restored."""

    model: nn.Module
    anatomy: Anatomy
    task: Task
    behavior: Behavior
    what: Restored
    window: int
    draws: int

    def prepare(self, subject: Tensor, size: float, seed: int) -> None:
        """Run the clean prompts, keep their states, draw the noise, and run with it."""
        self.ports = Ports(self.model, self.task, lambda: self.anatomy)
        if self.what == "residual":
            self.ports.find_streams(self.behavior.clean)
        every = range(self.anatomy.n_layers)
        self.layers = list(every if self.what == "residual" else self.anatomy.mlp_layers)
        self.embedding = _embedding(self.model, self.anatomy)
        embedded: list[Tensor] = []
        self.seen: dict[Any, Tensor] = {}
        wanted = [(self.what, layer) for layer in self.layers]

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            embedded.append(output.detach())

        with ExitStack() as stack:
            stack.callback(self.embedding.register_forward_hook(keep).remove)
            stack.enter_context(self.ports.opened({}, self.seen, wanted))
            outputs = self.task.outputs(self.model, self.behavior.clean)
        self.clean = self.behavior.metric(outputs).float()
        self.seen = {port: value.clone() for port, value in self.seen.items()}
        first = embedded[0]
        spread = first[subject.to(first.device)].float().std()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.draws, *first.shape, generator=generator)
        self.noise = (size * spread * drawn.to(first.device)).to(first.dtype)
        self.noise = self.noise * subject.to(first.device)[None, :, :, None]
        self.noised = torch.stack([self._run({}, [d])[0] for d in range(self.draws)]).mean(0)

    def effects(self, kinds: Tensor) -> Tensor:
        """Return the indirect effect of each layer and kind of position ``[layer, kind]``."""
        length = kinds.shape[1]
        whole = float(self.clean.mean() - self.noised.mean())
        rows = []
        for index in range(len(self.layers)):
            span = [self.layers[i] for i in around(index, self.window, len(self.layers))]
            share = (self._restored(span, length) - self.noised) / whole  # position, example
            rows.append(_by_kind(share.T.cpu(), kinds.cpu()))
        return torch.stack(rows)

    def _restored(self, span: list[int], length: int) -> Tensor:
        """Return the metric when layers at one position are restored, a mean over draws.

        Shape ``[position, example]``; as many positions and draws in one pass as there is room.
        """
        each = max(1, ROWS // max(1, len(self.behavior)))
        entries = [(p, d) for p in range(length) for d in range(self.draws)]
        found: list[Tensor] = []
        for start in range(0, len(entries), each):
            chosen = entries[start : start + each]
            places = [p for p, _ in chosen]
            changes = {(self.what, layer): self._put(layer, places) for layer in span}
            found += self._run(changes, [d for _, d in chosen])
        return torch.stack(found).reshape(length, self.draws, -1).mean(1)

    def _put(self, layer: int, places: list[int]) -> Change:
        """Restore in each copy of the prompts one position."""
        stored = self.seen[self.what, layer]
        size = len(stored)

        def apply(value: Tensor) -> Tensor:
            made = value.clone()
            for copy, place in enumerate(places):
                made[copy * size : (copy + 1) * size, place] = stored[:, place]
            return made

        return Change(apply)

    def _run(self, changes: dict[Any, Change], draws: list[int]) -> list[Tensor]:
        size = len(self.behavior)
        noise = self.noise[draws].flatten(0, 1)

        def drown(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + noise if output.shape == noise.shape else output

        with ExitStack() as stack:
            stack.callback(self.embedding.register_forward_hook(drown).remove)
            stack.enter_context(self.ports.opened(changes))
            batch = repeated(self.behavior.clean, size, len(draws))
            outputs = self.task.outputs(self.model, batch)
        return [self.behavior.metric(block).float() for block in torch.split(outputs, size)]


def _by_kind(values: Tensor, kinds: Tensor) -> Tensor:
    """Return means over positions of a kind inside a prompt, then over the prompts that have it."""
    found = []
    for kind in range(len(CLASSES)):
        own = (kinds == kind).float()
        count = own.sum(1)
        means = (values * own).sum(1) / count
        found.append(
            means[count > 0].mean() if bool((count > 0).any()) else values.new_tensor(math.nan)
        )
    return torch.stack(found)


def _kinds(behavior: Behavior, subject: Tensor) -> Tensor:
    """Return the kind of each position ``[example, position]``; −1 is padding."""
    ids = main_input(behavior.clean)
    mask = attention_mask_of(behavior.clean)
    real = torch.ones(ids.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    steps, subject = torch.arange(ids.shape[1]), subject.cpu()
    first = torch.where(subject, steps, ids.shape[1]).amin(1, keepdim=True)
    last = torch.where(subject, steps, -1).amax(1, keepdim=True)
    end = torch.where(real, steps, -1).amax(1, keepdim=True)
    kinds = torch.full(real.shape, CLASSES.index("further"))
    kinds[(steps < first).expand_as(kinds)] = CLASSES.index("before")
    kinds[subject] = CLASSES.index("subject middle")
    for name, where in (("next", last + 1), ("last", end), ("subject first", first)):
        kinds[steps == where] = CLASSES.index(name)
    kinds[steps == last] = CLASSES.index("subject last")  # Also of a subject of one token.
    return kinds.masked_fill(~real, -1)


def _embedding(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    modules = named(model)
    found = [w.module for w in anatomy.writers if w.label == "embed" and w.module]
    if found and isinstance(modules[found[0]], nn.Embedding):
        return modules[found[0]]
    tables = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    if not tables:
        raise ModelError(
            "subject_tracing: expected a model with a token embedding (nn.Embedding), got none. "
            "Noise is added to what it returns."
        )
    return tables[0]


def _check(what: str, window: int, noise: float, draws: int) -> None:
    if what not in get_args(Restored):
        raise ArgumentError.of(
            "what", expected=f"one of {get_args(Restored)}", got=repr(what), do="Choose one."
        )
    if window < 1 or draws < 1 or not noise > 0:
        raise ArgumentError.of(
            "window, noise, draws",
            expected="at least 1, above 0, at least 1",
            got=f"{window}, {noise}, {draws}",
            do="Take the defaults.",
        )


@dataclass(frozen=True)
class SubjectTracing:
    """Where the subject's attribute is read from and kept; see `subject_tracing`.

    Panels: ``effect`` over (layer, feature), the feature being a kind of position, and ``total``.

    Args:
        behavior: Prompts and metric.
        name: First part of the records' names.
        subject: Where the subject stands.
        what: What is restored.
        window: Number of layers restored at once.
        noise: Standard deviations of the noise.
        draws: Draws of noise.
    """

    behavior: BehaviorLike
    name: str = "subject_tracing"
    subject: str | tuple[str, str] = ("subject", "subject_last")
    what: Restored = "residual"
    window: int = 1
    noise: float = 3.0
    draws: int = 3

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        own = as_behavior(self.behavior).to(context.device)
        return subject_tracing(
            model,
            own,
            self.subject,
            what=self.what,
            window=self.window,
            noise=self.noise,
            draws=self.draws,
            anatomy=shared_anatomy(model, context, own.clean),
            task=context.known_task,
        )
