"""The weights of every self-attention: probed, checked, and freed of constant factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import Site
from .layers import Layer, Pass, called_norm
from .probing import Plan, Weights, probed
from .tape import is_equal

__all__ = ["weights_of"]

EXACT = 1e-3
"""Relative error up to which a map counts as affine, in single precision."""

WORTHLESS = 0.1
"""Beyond that error a matrix says nothing about the map."""

PRODUCTS = ("linear", "addmm", "matmul", "__matmul__")


def weights_of(run: Pass, layers: Sequence[Layer], width: int) -> list[tuple[Weights, float]]:
    """Return weights and scale of every layer, and note what is approximate or unknown.

    Args:
        run: The recorded pass.
        layers: Self-attentions.
        width: Width of the stream.

    Returns:
        For each layer its weights (NaN where unknown), and what reproduces its logits.
    """
    found: dict[int, Weights] = {}
    for length in sorted({layer.seen.q.shape[2] for layer in layers}):
        plans = [_plan(run, o) for o in layers if o.seen.q.shape[2] == length]
        asked = [p for p in plans if p.enters is not None or p.leaves is not None]
        if asked:
            answers = probed(run.model, run.task, run.batch, asked, width, run.modules, length)
            found |= {plan.site: answer for plan, answer in zip(asked, answers, strict=True)}
    return [_judged(run, layer, found.get(layer.site), width) for layer in layers]


def _plan(run: Pass, layer: Layer) -> Plan:
    read, term, z = layer.read, layer.term, layer.seen.z
    leaves = None if term is None else run.flow.module_returning(term.value)
    return Plan(
        site=layer.site,
        enters=None if read is None else read.module,
        is_norm=read is not None and read.norm is not None,
        leaves=leaves,
        output=0 if term is None or leaves is None else run.output(term, leaves),
        query_norm=None if layer.query_norm is None else layer.query_norm.module,
        key_norm=None if layer.key_norm is None else layer.key_norm.module,
        heads=z.shape[1],
        d_head=z.shape[-1],
    )


def _judged(run: Pass, layer: Layer, found: Weights | None, width: int) -> tuple[Weights, float]:
    scale = float(layer.seen.scale)
    unknown = _unknown(layer.seen, width)
    if found is None:
        run.note("W_O", layer.index, "unknown", "no module returns what the heads write")
        return unknown, scale
    found = _straight(run, layer, found, unknown)
    if found.W_O is None:
        run.note("W_O", layer.index, "unknown", "no module returns what the heads write")
        found = dataclasses.replace(found, W_O=unknown.W_O, b_O=unknown.b_O)
    if layer.seen.softcap is not None:
        reason = (
            f"logits of its attention are soft-capped, c·tanh(·/c) with c = {layer.seen.softcap:g}"
        )
        run.note("W_Q", layer.index, "approximate", reason)
    if layer.term is not None and layer.term.norm is not None:
        run.note("W_O", layer.index, "approximate", "a norm follows before the stream")
    if layer.read is None or layer.read.module is None:
        if layer.read is not None:
            reason = "no module is handed what it reads" + called_norm(run, layer)
            run.note("W_Q", layer.index, "unknown", reason)
        return dataclasses.replace(unknown, W_O=found.W_O, b_O=found.b_O), scale
    return _unscaled(run, layer, found, scale)


def _straight(run: Pass, layer: Layer, found: Weights, unknown: Weights) -> Weights:
    """Note maps that are not affine, and leave out those of which no matrix says anything."""
    for name in "QKVO":
        missed = found.bent.get(name.lower(), 0.0)
        if missed <= EXACT:
            continue
        reason = f"the map is not affine: it misses by {missed:.2g} of its size"
        if missed <= WORTHLESS:
            run.note(f"W_{name}", layer.index, "approximate", reason)
            continue
        run.note(f"W_{name}", layer.index, "unknown", reason + called_norm(run, layer))
        gone = {f: getattr(unknown, f) for f in (f"W_{name}", f"b_{name}")}
        found = dataclasses.replace(found, **gone)
    return found


def _unscaled(run: Pass, layer: Layer, found: Weights, scale: float) -> tuple[Weights, float]:
    """Take numbers by which queries and keys are multiplied out of the matrices."""
    if layer.has_norms:
        return found, scale
    q, k = _multiple(run, layer, layer.seen.q), _multiple(run, layer, layer.seen.k)
    if q == 1.0 and k == 1.0:
        return found, scale
    freed = dataclasses.replace(
        found, W_Q=found.W_Q / q, W_K=found.W_K / k, b_Q=found.b_Q / q, b_K=found.b_K / k
    )
    return freed, scale * q * k


def _multiple(run: Pass, layer: Layer, seen: Tensor) -> float:
    """Return what a projection was multiplied by until it entered the kernel."""
    if layer.read is None:
        return 1.0
    batch, heads, _, width = seen.shape
    made = run.flow.tape.calls[layer.place].outputs[0]
    for root in run.flow.before(made, {layer.read.value}):
        call, value = run.flow.call(root), run.flow.tensor(root)
        if call is None or call.name not in PRODUCTS:
            continue
        if value.numel() != seen.numel() or value.shape[-1] != heads * width:
            continue
        first = value.reshape(batch, -1, heads, width)[:, 0].flatten()
        own = seen[:, :, 0].flatten()  # Rotary embedding is the identity at position 0.
        ratio = float((first @ own) / (first @ first).clamp(min=1e-30))
        if ratio and is_equal(first * ratio, own, 1e-5):
            return 1.0 if abs(ratio - 1.0) < 1e-5 else ratio
    return 1.0


def _unknown(site: Site, width: int) -> Weights:
    def matrix(values: Tensor) -> Tensor:
        return values.new_full((values.shape[1], width, values.shape[-1]), torch.nan)

    def bias(values: Tensor) -> Tensor:
        return values.new_full((values.shape[1], values.shape[-1]), torch.nan)

    q, k, v, z = site.q, site.k, site.v, site.z
    W_O = z.new_full((z.shape[1], z.shape[-1], width), torch.nan)
    b_O = z.new_full((width,), torch.nan)
    return Weights(matrix(q), matrix(k), matrix(v), bias(q), bias(k), bias(v), W_O, b_O, {})
