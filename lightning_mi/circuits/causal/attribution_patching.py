"""Attribution patching: what activation patching would give, estimated from one gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...anatomy.shared import shared_anatomy
from ...anatomy.tape import named, tensors
from ...attention import Site
from ...attention.site import grouped_product, widened
from ...batch import main_input
from ...behavior import BehaviorLike, as_behavior
from ...checks import counted
from ...errors import ArgumentError
from ...isolation import frozen, untouched
from ...measurement import Context
from ...record import Panel, Reading
from ...task import Task
from .along import require_gradient
from .beginnings import Beginning
from .edges import Direction, refuse_rank
from .patching import OF_HEADS, Entry, Patched, Patcher, checked, panel_of
from .places import Port
from .ports import Change
from .restart import recording
from .streams import Inside

__all__ = ["AttributionPatching", "attribution_panels", "attribution_patching"]

Correction: TypeAlias = Literal["qk", "graddrop"]


def attribution_patching(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    what: Patched = "z",
    direction: Direction = "denoise",
    positions: str | None = None,
    corrections: Sequence[Correction] = (),
    verify: int = 16,
    reduce: Literal["mean"] | None = "mean",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> Panel:
    r"""Estimate what `activation_patching` measures, for all parts at once.

    .. math:: (a_{donor} - a_{base}) \cdot \partial m / \partial a \,|_{base} \,/\,
              (m_{donor} - m_{base})

    from two forward passes and one backward pass (Nanda 2023). It is exact where the metric is
    linear in the part, hence in a linear model; it fails where a softmax or the metric saturates.
    The two directions take gradients of different runs, and differ.
    What linear maps return before the first position at which the prompts differ is taken over
    from one run into the other, where both give them the same there.

    Args:
        model: The user's model; it is left as it was.
        behavior: Clean and corrupted prompts and the metric, which needs a gradient.
        what: See `activation_patching`.
        direction: See there.
        positions: See there.
        corrections: Those of AtP* (Kramár et al. 2024). ``"qk"``, for queries and keys: the
            softmax is computed anew, and the change of the pattern times its gradient is taken;
            with ``positions="each"`` for each position alone. ``"graddrop"``: what is verified is
            chosen by the unsigned panel ``grad_drop`` of `attribution_panels`.
        verify: How many of the largest are patched exactly, too; they are in
            ``convention["verified"]``, largest first. 0 for none.
        reduce: See `activation_patching`.
        task: See there.
        anatomy: See there.

    Returns:
        Estimates, laid out as by `activation_patching`. NaN, with a reason, where the metric is
        the same on both prompts.

    Raises:
        ArgumentError: If an argument is none of these, or the metric has no gradient.
        ModelError: If the part cannot be patched in this model.

    Example:
        >>> from lightning_mi import Behavior
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> clean, corrupted = torch.randn(2, 3, 5, 8)
        >>> first = lambda outputs, batch: outputs[:, -1, 0]
        >>> pair = Behavior(clean, corrupted, target=first)
        >>> attribution_patching(layer, pair, verify=1).size
        {'layer': 1, 'head': 2}
    """
    return attribution_panels(
        model,
        behavior,
        what=what,
        direction=direction,
        positions=positions,
        corrections=corrections,
        verify=verify,
        reduce=reduce,
        task=task,
        anatomy=anatomy,
    )["effect"]


def attribution_panels(
    model: nn.Module,
    behavior: BehaviorLike,
    *,
    what: Patched = "z",
    direction: Direction = "denoise",
    positions: str | None = None,
    corrections: Sequence[Correction] = (),
    verify: int = 16,
    reduce: Literal["mean"] | None = "mean",
    task: Task | None = None,
    anatomy: Anatomy | None = None,
) -> dict[str, Panel]:
    r"""Return `attribution_patching` with all that belongs to it.

    GradDrop takes the gradient once for each layer, with what passes through this layer's own
    writing to the stream dropped, and means the sizes: :math:`\sum_l |\cdot| / (L - 1)`. It does
    not cancel where effects do, so it is no estimate of the effect, but a choice of what to verify.

    Args:
        model: See `attribution_patching`.
        behavior: See there.
        what: See there.
        direction: See there.
        positions: See there.
        corrections: See there.
        verify: See there.
        reduce: See there.
        task: See there.
        anatomy: See there.

    Returns:
        ``effect``; ``exact`` where something was verified, NaN elsewhere; ``grad_drop`` where asked
        for, unsigned.

    Raises:
        ArgumentError: If an argument is none of these, or the metric has no gradient.
        ModelError: If the part cannot be patched in this model.
    """
    own = as_behavior(behavior)
    where = checked(own, what, direction, positions, reduce)
    _check(own.question, what, corrections, verify)
    with untouched(model) as plain, frozen(plain):
        patcher = Patcher(plain, own, what, direction, where, task, anatomy)
        about = {"corrections": list(corrections)}
        drops = "graddrop" in corrections
        with _Estimates(patcher, "qk" in corrections, drops, verify > 0).opened() as made:
            if patcher.reason is not None:
                panels = {"effect": panel_of(patcher, None, reduce, "attribution", **about)}
                if drops:
                    panels["grad_drop"] = _unsigned(panels["effect"])
                return panels
            change = made.change(keep=drops)
            drop = made.grad_drop() if drops else None
        base = patcher.base_metric.detach().float()
        ranks = (change.mean(1).abs() if drop is None else drop.mean(1)) if verify else None
        verified, exact = _verified(patcher, change, ranks, verify)
        panels = {
            "effect": panel_of(
                patcher, base + change, reduce, "attribution", verified=verified, **about
            )
        }
        if exact is not None:
            panels["exact"] = panel_of(patcher, exact, reduce, "exact", verified=len(verified))
        if drop is not None:
            panels["grad_drop"] = _unsigned(panel_of(patcher, base + drop, reduce, "graddrop"))
        return panels


class _Estimates:
    """One run with gradients, and what follows from it."""

    def __init__(self, patcher: Patcher, corrected: bool, drops: bool, keeps: bool) -> None:
        self.patcher, self.corrected, self.drops, self.keeps = patcher, corrected, drops, keeps
        self.dropped = -1
        self.nodes: dict[int, Tensor] = {}

    @contextmanager
    def opened(self) -> Iterator[_Estimates]:
        """Run both ends; gradients can be taken inside."""
        patcher = self.patcher
        shape = main_input(patcher.ends[0]).shape[:2]
        beginning = Beginning(patcher.model, tuple(shape), patcher.base.start)
        with torch.no_grad():
            patcher.run_donor(beginning.kept)
        with ExitStack() as stack:
            self._run(stack, beginning.taken)
            if not beginning.same():
                stack.close()
                self._run(stack, nullcontext)
            self.total = patcher.base_metric.sum()
            require_gradient(self.total, patcher.behavior)
            patcher.base.z = {layer: site.z.detach() for layer, site in patcher.sites.items()}
            patcher.base_metric = patcher.base_metric.detach()
            yield self

    def _run(self, stack: ExitStack, inside: Inside) -> None:
        """Run the base with gradients; what is entered stays open until they have been taken."""
        patcher = self.patcher
        keep = recording(patcher.base) if self.keeps else nullcontext()
        drop = self._dropping() if self.drops else nullcontext()
        with torch.enable_grad(), keep, drop, _rooted(patcher.model):
            stack.enter_context(inside())
            patcher.old, patcher.base_metric = patcher.see(
                patcher.ends[0], patcher.sites, self._leaves()
            )

    def _leaves(self) -> Callable[[Port], Change]:
        """Let gradients begin at the first part, not at the weights."""

        def change(port: Port) -> Change:
            def apply(value: Tensor) -> Tensor:
                made = value if value.requires_grad else value.detach().requires_grad_()
                self.nodes[port[1]] = made
                return made

            return Change(apply)

        return change

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Let the gradient through what one layer writes be dropped on demand."""
        modules = named(self.patcher.model)
        writers = [w for w in self.patcher.anatomy().writers if w.layer >= 0 and w.module]

        def hook_of(layer: int, place: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                value = list(tensors(output))[place]
                if value.requires_grad:
                    value.register_hook(  # type: ignore[no-untyped-call]
                        lambda g: torch.zeros_like(g) if self.dropped == layer else g
                    )

            return hook

        with ExitStack() as stack:
            for w in writers:
                hook = hook_of(w.layer, w.output)
                stack.callback(modules[w.module].register_forward_hook(hook).remove)
            yield

    def change(self, *, keep: bool) -> Tensor:
        """Return the estimated change of the metric ``[entry, example]``; keep the graph or not."""
        layers = sorted(self.patcher.donor)
        nodes = [self.nodes[layer] for layer in layers]
        found = torch.autograd.grad(self.total, nodes, retain_graph=keep, allow_unused=True)
        with torch.no_grad():
            made = [
                self._of_layer(layer, torch.zeros_like(node) if g is None else g)
                for layer, node, g in zip(layers, nodes, found, strict=True)
            ]
        return torch.cat([m.permute(1, 2, 0).flatten(0, 1) for m in made])

    def grad_drop(self) -> Tensor:
        """Return the mean size over gradients in which one layer is dropped."""
        layers = self.patcher.anatomy().n_layers
        total: Tensor | None = None
        for layer in range(layers):
            self.dropped = layer
            size = self.change(keep=layer < layers - 1).abs()
            total = size if total is None else total + size
        self.dropped = -1
        if total is None:
            raise ArgumentError.of("corrections", expected="layers", got="none", do="Leave it.")
        return total / max(1, layers - 1)

    def _of_layer(self, layer: int, g: Tensor) -> Tensor:
        """Return the change by part ``[example, head, position]``, one position if they are one."""
        patcher = self.patcher
        donor, old = widened(patcher.donor[layer]), widened(patcher.old[layer].detach())
        g = widened(g)
        if patcher.what not in OF_HEADS:
            return self._summed(((donor - old) * g).sum(-1)[:, None], layer)
        site = detached(patcher.sites[layer])
        if patcher.what == "z":
            return self._summed(((donor - old) * g).sum(-1), layer)
        if patcher.what == "pattern":
            weight = grouped_product(g, site.v.mT)
            return self._summed(((donor - old) * weight).sum(-1), layer)
        if self.corrected and patcher.what in ("q", "k"):
            return self._recomputed(layer, site, donor, g)
        found = _pullback(site, patcher.what, g)
        return self._summed(((donor - old) * found).sum(-1), layer)

    def _summed(self, parts: Tensor, layer: int) -> Tensor:
        if self.patcher.positions == "each":
            return parts
        where = self.patcher.where(layer, None)
        return (parts if where is None else parts * where[:, None]).sum(-1, keepdim=True)

    def _recomputed(self, layer: int, site: Site, donor: Tensor, g: Tensor) -> Tensor:
        """Return the change of the pattern, with a softmax of its own, times its gradient."""
        weight = grouped_product(g, site.v.mT)
        own = site.pattern()
        if self.patcher.what == "q":
            change = site.pattern_of(donor.to(site.q), site.k) - own
            return self._summed((change * weight).sum(-1), layer)
        if self.patcher.positions == "each":
            wheres = [self.patcher.where(layer, t) for t in range(donor.shape[2])]
        else:
            wheres = [self.patcher.where(layer, None)]
        made = []
        for where in wheres:
            k = donor if where is None else torch.where(where[:, None, :, None], donor, site.k)
            change = site.pattern_of(site.q, k.to(site.k)) - own
            heads = (change * weight).sum((-1, -2))
            made.append(torch.unflatten(heads, 1, (site.k.shape[1], -1)).sum(-1))
        return torch.stack(made, -1)


@contextmanager
def _rooted(model: nn.Module) -> Iterator[None]:
    """Let graphs begin at embeddings.

    Begun at the first part, they would begin inside a layer; a checkpointed one, which is run
    again in the backward pass when nothing watches any more, would then be another one.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.requires_grad:
            return None
        # A copy, as a model may add to it in place, which no leaf allows.
        return output.detach().requires_grad_().clone()

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def detached(site: Site) -> Site:
    """Return an attention without its graph.

    Args:
        site: The attention.

    Returns:
        The same values.
    """
    pattern = site.probabilities
    return replace(
        site,
        q=site.q.detach(),
        k=site.k.detach(),
        v=site.v.detach(),
        z=site.z.detach(),
        probabilities=None if pattern is None else pattern.detach(),
    )


def _pullback(site: Site, what: str, g: Tensor) -> Tensor:
    """Return the gradient at queries, keys or values from that at z."""
    with torch.enable_grad():
        leaf = getattr(site, what).detach().requires_grad_()
        z = site.attend(**{what: leaf})
        (found,) = torch.autograd.grad(z, leaf, g.to(z))
    return widened(found)


def _verified(
    patcher: Patcher, change: Tensor, ranks: Tensor | None, verify: int
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """Patch the largest exactly; return what is told of them, and their metrics."""
    if ranks is None:
        return [], None
    entries: list[Entry] = list(patcher.entries())
    order = ranks.argsort(descending=True, stable=True)[:verify].tolist()
    chosen = sorted(order)
    with torch.no_grad():
        found = patcher.metrics([entries[i] for i in chosen]).float()
    exact = torch.full_like(change, math.nan)
    exact[chosen] = found.to(exact)
    whole = float((patcher.donor_metric - patcher.base_metric).float().mean())
    base = patcher.base_metric.float()
    told = []
    for i in order:
        layer, head, position = entries[i]
        entry: dict[str, Any] = {"layer": layer}
        if patcher.what in OF_HEADS:
            entry["kv_head" if patcher.what in ("k", "v") else "head"] = head
        if position is not None:
            entry["position"] = position
        entry["estimate"] = float(change[i].mean()) / whole
        entry["exact"] = float((exact[i] - base).mean()) / whole
        told.append(entry)
    return told, exact


def _unsigned(panel: Panel) -> Panel:
    about = {
        **panel.convention,
        "what": "mean size of the estimate when the gradient through one layer is dropped, "
        "sum over layers / (layers - 1)",
        "sign": "unsigned: what might matter, not how much it does",
    }
    return replace(panel, values=panel.values.abs(), convention=about)


def _check(question: object, what: str, corrections: Sequence[str], verify: int) -> None:
    unknown = [c for c in corrections if c not in ("qk", "graddrop")]
    if unknown or isinstance(corrections, str):
        raise ArgumentError.of(
            "corrections",
            expected='a tuple out of "qk" and "graddrop"',
            got=repr(corrections),
            do='For example ("qk",).',
        )
    if "qk" in corrections and what not in ("q", "k"):
        raise ArgumentError.of(
            "corrections",
            expected='"qk" for queries or keys',
            got=f'"qk" for {what!r}',
            do='Choose what="q" or what="k", or leave it out.',
        )
    counted("verify", verify, do="0 verifies none.")
    refuse_rank(question, do="Choose LogitDifference, or activation_patching.")


@dataclass(frozen=True)
class AttributionPatching:
    """What activation patching would give, from one gradient; see `attribution_patching`.

    Panels ``effect``, by layer and head (or position), a share of the metric's difference;
    ``exact`` of those that were verified; ``grad_drop`` where asked for.

    Args:
        behavior: Prompts and metric.
        name: First part of the records' names.
        what: See `activation_patching`.
        direction: See there.
        positions: See there.
        corrections: See `attribution_patching`.
        verify: See there.

    Example:
        >>> from lightning_mi import Behavior
        >>> AttributionPatching(Behavior(torch.ones(1, 2), torch.zeros(1, 2))).verify
        16
    """

    behavior: BehaviorLike
    name: str = "attribution_patching"
    what: Patched = "z"
    direction: Direction = "denoise"
    positions: str | None = None
    corrections: tuple[Correction, ...] = ()
    verify: int = 16

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Task and shared results.

        Returns:
            The panels.
        """
        own = as_behavior(self.behavior).to(context.device)
        needed = self.verify != 0 or self.what not in OF_HEADS or "graddrop" in self.corrections
        return attribution_panels(
            model,
            own,
            what=self.what,
            direction=self.direction,
            positions=self.positions,
            corrections=self.corrections,
            verify=self.verify,
            task=context.known_task,
            anatomy=shared_anatomy(model, context, own.clean) if needed else None,
        )
