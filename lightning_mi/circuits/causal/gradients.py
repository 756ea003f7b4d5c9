"""Gradients at every input of a model: each head's query, key and value, MLPs, logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...attention import Site
from ...attention.site import widened
from ...errors import ModelError
from .blocks import Part
from .heads import ROLES, Role, added, attend
from .streams import Wiring

__all__ = ["at_inputs", "inputs_of_heads_known", "wanted_for_inputs"]


def inputs_of_heads_known(wiring: Wiring, *, exact: bool = False) -> bool:
    """Return whether gradients at inputs follow from others without a graph.

    Args:
        wiring: The model.
        exact: See `at_inputs`.

    Returns:
        False where heads need a backward pass each.
    """
    return not exact and all(own is not None for own in wiring.heads)


def wanted_for_inputs(wiring: Wiring, part: Part) -> list[Tensor]:
    """Return the tensors whose gradients `at_inputs` needs.

    Args:
        wiring: The model.
        part: A stretch of a pass.

    Returns:
        What each reader was handed; then z, queries, keys and values of each attention.
    """
    wanted = [*part.entering.values()]
    for layer, site in part.sites.items():
        wanted += [part.returned[wiring.writer_of[layer]], site.q, site.k, site.v]
    return wanted


def at_inputs(
    wiring: Wiring,
    part: Part,
    found: Sequence[Tensor | None],
    *,
    steps: int = 1,
    size: int = 1,
    start: int = 0,
    exact: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the gradient of a number at each input of a part, reader by reader.

    A backward pass gives it at the queries, keys and values of all heads at once; from there it
    is pulled back to each head's own input by what `HeadInputs` knows of the way.

    Args:
        wiring: The model.
        part: A stretch of a pass.
        found: Gradients at the tensors of `wanted_for_inputs`.
        steps: Rows of the pass are ``[…, step, example]``: how many steps are added up.
        size: Number of examples.
        start: First position that is wanted.
        exact: Pull back by a backward pass for each head instead: slow, needs the part's graph and
            no knowledge of the way, and is what layers get whose heads are not understood.

    Yields:
        Indices of inputs and ``[input, row / steps, position - start, d_model]``.
    """
    anatomy, heads, entering = wiring.anatomy, wiring.heads, part.entering
    count = len(entering)
    direct = dict(zip(entering, found[:count], strict=True))
    firsts = {layer: count + 4 * place for place, layer in enumerate(part.sites)}
    shared: dict[int, Tensor] = {}  # What heads took of a tensor that an MLP reads, too.
    heads_first = sorted(entering, key=lambda i: (anatomy.readers[i].kind != "attention", i))
    for index in heads_first:
        reader = anatomy.readers[index]
        x, own = entering[index], wiring.inputs_of(index)
        if reader.kind != "attention":
            g = direct[index]
            g = torch.zeros_like(x) if g is None else g
            whole = added(widened(g)[:, start:], 0, steps, size)
            yield own, (whole - shared[id(x)] if id(x) in shared else whole)[None]
            continue
        site, first = part.sites[reader.layer], firsts[reader.layer]
        given = _of_roles(site, found[first : first + 4])
        if given is None:
            length = x.shape[1] - start
            yield own, widened(x).new_zeros(len(own), len(x) // steps, length, x.shape[2])
            continue
        known = heads[reader.layer]
        if exact or known is None:
            slow_parts = (_by_head(site, r, given[r], x) for r in ROLES)
            made = torch.cat([added(g[:, :, start:], 1, steps, size) for g in slow_parts])
        else:
            values: dict[Role, Tensor] = {"q": site.q, "k": site.k, "v": site.v}
            near, late = x.detach()[:, start:], known.since(start)
            made = late.pullback(
                {r: given[r][:, :, start:] for r in ROLES},
                {r: values[r].detach()[:, :, start:] for r in ROLES},
                near,
                steps,
                size,
            )
        if sum(x is y for y in entering.values()) > 1:
            shared[id(x)] = made.sum(0)
        yield own, made


def _of_roles(site: Site, found: Sequence[Tensor | None]) -> dict[Role, Tensor] | None:
    """Return gradients at queries, keys and values, by hand where the model hid them."""
    z, *parts = found
    if z is None:
        return None
    q, k, v = parts
    if q is not None and k is not None and v is not None:
        return {"q": q, "k": k, "v": v}
    with torch.enable_grad():
        leaves = [widened(t.detach()).requires_grad_() for t in (site.q, site.k, site.v)]
        made = attend(site, *leaves)
        return dict(zip(ROLES, torch.autograd.grad(made, leaves, widened(z)), strict=True))


def _by_head(site: Site, role: Role, given: Tensor, x: Tensor) -> Tensor:
    """Return the gradient at each head's input, a backward pass through the layer for each."""
    value: Tensor = getattr(site, role)
    rows = []
    for head in range(value.shape[1]):
        alone = torch.zeros_like(value)
        alone[:, head] = given[:, head].to(alone)
        (g,) = torch.autograd.grad(value, [x], alone, retain_graph=True, allow_unused=True)
        if g is None:
            raise ModelError(
                f"attention in {site.module!r}: expected {role} to follow from the stream, got "
                "tensors that no gradient leads to. Load the model with "
                "attn_implementation='sdpa' if it has one."
            )
        rows.append(widened(g))
    return torch.stack(rows)
