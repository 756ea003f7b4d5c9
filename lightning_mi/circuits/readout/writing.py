"""Direct logit attribution: what each part of a model writes into the answer.

With the scale of the final norm as it was, the logit of token y is a sum over what was written:
logit_y = Σ_c (c ⊙ γ / σ)·W_U[:, y] + β·W_U[:, y] + b_U[y], where for LayerNorm every part c loses
its mean (RMSNorm subtracts none). Instead of pushing every part through norms and unembedding, the
direction W_U[:, y] is pulled back to where each part is written; what is left is a dot product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, Norm, Writer
from ...errors import ArgumentError
from ...isolation import untouched
from ...nodes import Head
from ...task import IGNORED, NextToken, Task
from ..heads.layout import layout_of
from ..weights.factors import check_count
from .neurons import neurons_of
from .patterns import batched
from .running import Passed, passed, unembedding, wide

__all__ = ["WriterAttribution", "attributed", "logit_attribution", "place_of", "tokens_of"]


@dataclass(frozen=True, eq=False)
class WriterAttribution:
    """What each writer adds to the logit (difference), in logits.

    Args:
        labels: One for each writer: ``embed``, ``pos``, ``L0H0``, …, ``L0.b_O``, ``MLP0``, …,
            ``final_norm.bias``, ``b_U``.
        values: Shape ``[example, position, writer]``; they add up to ``logit``. NaN where no answer
            is known.
        logit: The model's own logit of the answer (minus that of the wrong answer), before a final
            soft-cap, ``[example, position]``.
        real: Where tokens are no padding, ``[example, position]``.
        anatomy: What the model is made of.
        neurons: What each neuron of the chosen layer adds, ``[example, position, neuron]``; with
            the bias of the MLP's last map they add up to that MLP.
        approximate: Why values say less than they seem to; empty where they are exact.
    """

    labels: tuple[str, ...]
    values: Tensor
    logit: Tensor
    real: Tensor
    anatomy: Anatomy
    neurons: Tensor | None
    approximate: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Largest |Σ parts − logit| over the largest |logit|, where an answer is known."""
        apart = (self.values.detach().sum(-1) - self.logit.detach()).abs()
        known = apart.isfinite() & self.real
        if not bool(known.any()):
            return float("nan")
        size = self.logit.detach().abs()[known].max().clamp(min=1e-12)
        return float(apart[known].max() / size)

    @property
    def heads(self) -> Tensor:
        """The heads' part, ``[example, position, layer, head]``; NaN where a layer has fewer."""
        most = max(self.anatomy.n_heads)
        place = {label: i for i, label in enumerate(self.labels)}
        index = [
            [place.get(str(Head(layer, h)), -1) for h in range(most)]
            for layer in range(self.anatomy.n_layers)
        ]
        chosen = torch.tensor(index, device=self.values.device)
        found = self.values[..., chosen.clamp(min=0)]
        return torch.where(chosen >= 0, found, torch.nan)

    def at(self, position: int = -1) -> Tensor:
        """Return the parts at one position of each example.

        Args:
            position: Counted from the first real token, or from the last if negative.

        Returns:
            Shape ``[example, writer]``.

        Raises:
            ArgumentError: If an example has no such position.
        """
        index = place_of(self.real, position)
        return self.values[torch.arange(len(index), device=index.device), index]

    def top(self, count: int = 5, *, example: int = 0, position: int = -1) -> dict[str, float]:
        """Return the parts that add most, by absolute value.

        Args:
            count: How many.
            example: Which example.
            position: Which position.

        Returns:
            Labels to logits, largest first.

        Raises:
            ArgumentError: If count is not positive, or an example has no such position.
        """
        check_count(count, "count")
        row = self.at(position)[example].detach()
        order = row.abs().argsort(descending=True)[:count].tolist()
        return {self.labels[i]: float(row[i]) for i in order}


def place_of(real: Tensor, position: int) -> Tensor:
    """Return the index of a position, counted among real tokens.

    Args:
        real: Where tokens are no padding ``[example, position]``.
        position: From the first real token, or from the last if negative.

    Returns:
        Long ``[example]``.

    Raises:
        ArgumentError: If an example has no such position.
    """
    number = real.long().cumsum(1)
    count = number[:, -1]
    wanted = position + 1 if position >= 0 else count + 1 + position
    wanted = torch.as_tensor(wanted, device=real.device).expand(len(real))
    if bool(((wanted < 1) | (wanted > count)).any()):
        raise ArgumentError.of(
            "position",
            expected=f"a position inside the {int(count.min())} tokens of the shortest example",
            got=position,
            do="Negative positions count from the last token that is no padding.",
        )
    return ((number == wanted[:, None]) & real).long().argmax(1)


def logit_attribution(
    model: nn.Module,
    tokens: Any,
    answer: int | Tensor | None = None,
    wrong: int | Tensor | None = None,
    *,
    neurons: int | None = None,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
) -> WriterAttribution:
    """Say what each part of a model writes into the logit of an answer (direct attribution).

    Parts are the embedding, the position embedding, every head, every attention's bias, every MLP,
    the bias of the final norm and that of the unembedding. At each position they add up to the
    logit, or to the difference of two logits, which is preferred: what raises all logits alike
    cancels. The scale of the final norm is kept as it was in the run, parts are centred for
    LayerNorm and not for RMSNorm; a sandwich norm belongs to the part before it, with its scale
    kept; in a post-norm model every norm's scale is kept, and the values are marked approximate.
    Where logits are soft-capped, those before the cap are taken apart.

    Only direct effects are seen: what one part does through a later one counts for the later one.
    Elhage et al. (2021); nostalgebraist (2020). Differentiable, where grad is enabled, through what
    parts write (W_O and W_U are constants).

    Args:
        model: Any transformer with a linear unembedding; its mode and state are left as they are.
        tokens: Ids ``[example, position]`` (one sequence alone as well), or a mapping that may
            hold ``attention_mask`` and ``position_ids``.
        answer: Token whose logit is taken apart: for all, for each example, or for each position;
            None takes the true next token.
        wrong: Token whose logit is subtracted, likewise; None subtracts nothing.
        neurons: A layer whose MLP is split into neurons as well.
        anatomy: The model's anatomy, if it is at hand or was corrected; None finds it.
        task: How the model is called; None calls it with the batch.

    Returns:
        The parts, and the logit that they add up to.

    Raises:
        ArgumentError: If a token does not exist or has another shape than expected.
        ModelError: If the logits are not read linearly from the stream, or padding shifts what is
            measured.
    """
    batch, chosen = batched(tokens), task or NextToken()
    wants_grad = torch.is_grad_enabled()
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        if anatomy is None:
            with torch.no_grad():
                anatomy = Anatomy.of(plain, batch, task=chosen)
        seen = passed(plain, anatomy, chosen, batch)
        inputs = chosen.inputs(batch)
        shape = seen.outputs.shape[:2]
        right = tokens_of(answer, "answer", seen, chosen, batch)
        other = None if wrong is None else tokens_of(wrong, "wrong", seen, chosen, batch)
        documents = layout_of(batch, inputs).documents(inputs)
        real = torch.ones(shape, dtype=torch.bool, device=inputs.device)
        real = real if documents is None else documents > 0
        with torch.autocast(seen.outputs.device.type, enabled=False):
            split = None if neurons is None else neurons_of(plain, anatomy, chosen, batch, neurons)
            return attributed(seen, right, other, real, split)


def attributed(
    seen: Passed,
    answer: Tensor,
    wrong: Tensor | None,
    real: Tensor,
    neurons: tuple[int, Tensor, Tensor] | None = None,
) -> WriterAttribution:
    """Return the parts of the logits of a forward pass.

    Args:
        seen: The pass.
        answer: Tokens ``[example, position]``, `IGNORED` where unknown.
        wrong: Tokens to subtract, or None.
        real: Where tokens are no padding.
        neurons: Layer, activations and weights of an MLP that is split.

    Returns:
        The parts.
    """
    anatomy = seen.anatomy
    known = answer != IGNORED
    direction, bias = _direction(anatomy, answer, wrong, seen.final)
    at_end = direction
    if anatomy.final_norm is not None:
        at_end = _back(anatomy.final_norm, direction, anatomy.final_norm.scale(seen.final))
    labels: list[str] = []
    columns: list[Tensor] = []
    for label, column in _parts(seen, at_end):
        labels.append(label)
        columns.append(column)
    unseen = [
        w for w, written in zip(anatomy.writers, seen.written, strict=True) if written is None
    ]
    if unseen:
        labels.append(_unseen(unseen))
        columns.append((wide(seen.final) * at_end).sum(-1) - sum(columns))
    if anatomy.final_norm is not None and anatomy.final_norm.bias is not None:
        labels.append("final_norm.bias")
        columns.append(direction @ anatomy.final_norm.bias.to(direction))
    if bias is not None:
        labels.append("b_U")
        columns.append(bias)
    values = torch.stack([c.expand(answer.shape) for c in columns], -1)
    values = torch.where(known[..., None], values, torch.nan)
    logit = _own_logit(seen, answer, wrong)
    return WriterAttribution(
        tuple(labels),
        values,
        torch.where(known, logit, torch.nan),
        real,
        anatomy,
        None if neurons is None else _neurons(seen, at_end, *neurons),
        tuple(_why_approximate(anatomy)),
    )


def _parts(seen: Passed, at_end: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the label and the part of every writer, and of the norms that follow it."""
    passed_norms: dict[str, tuple[Norm, Tensor]] = {}
    for writer, written in zip(seen.anatomy.writers, seen.written, strict=True):
        at_stream = _through(seen, writer, at_end, passed_norms)
        if written is not None:
            yield from _writer_parts(seen, writer, wide(written), at_stream * writer.factor)
    for norm, after in reversed(passed_norms.values()):
        if norm.bias is not None:
            yield f"{norm.module}.bias", after @ norm.bias.to(after)


def _writer_parts(
    seen: Passed, writer: Writer, written: Tensor, at_stream: Tensor
) -> Iterator[tuple[str, Tensor]]:
    at_output, norm_bias = at_stream, None
    if writer.norm is not None:
        at_output = _back(writer.norm, at_stream, writer.norm.scale(written))
        if writer.norm.bias is not None:
            norm_bias = at_stream @ writer.norm.bias.to(at_stream)
    if writer.kind != "heads":
        part = (written * at_output).sum(-1)
        yield _label(writer), part if norm_bias is None else part + norm_bias
        return
    layer, anatomy = writer.layer, seen.anatomy
    z = wide(seen.z[layer])
    for head in range(anatomy.n_heads[layer]):
        # W_O pulls the direction back to d_head, so that no head's whole output is formed.
        back = at_output @ anatomy.W_O[layer][head].to(at_output).mT
        yield str(Head(layer, head)), (z[:, head] * back).sum(-1)
    bias = anatomy.b_O[layer].to(at_output)
    if norm_bias is not None or bool(bias.any()):
        part = at_output @ bias
        yield f"L{layer}.b_O", part if norm_bias is None else part + norm_bias


def _unseen(writers: list[Writer]) -> str:
    """Return the name of what is found by subtraction: one part, or all that no module returns."""
    alone = len(writers) == 1 and writers[0].kind in ("embed", "position")
    return _label(writers[0]) if alone else "unseen"


def _label(writer: Writer) -> str:
    return writer.label if writer.node is None else str(writer.node)


def _through(
    seen: Passed, writer: Writer, at_end: Tensor, met: dict[str, tuple[Norm, Tensor]]
) -> Tensor:
    """Pull the direction back through the norms that the stream passes after a write."""
    found = at_end
    for norm in reversed(writer.through):
        met.setdefault(norm.module, (norm, found))
        found = _back(norm, found, seen.scale_in(norm))
    return found


def _back(norm: Norm, direction: Tensor, scale: Tensor) -> Tensor:
    """Return the direction before a norm that reads as ``direction`` does after it."""
    found = direction if norm.weight is None else direction * norm.weight.to(direction)
    if norm.kind == "layer":
        found = found - found.mean(-1, keepdim=True)
    return found / scale


def _direction(
    anatomy: Anatomy, answer: Tensor, wrong: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what reads the logit (difference) off the normalised stream, and its bias."""
    columns = unembedding(anatomy).to(wide(like)).mT
    bias = None if anatomy.b_U is None else anatomy.b_U.to(columns)
    found = columns[answer.clamp(min=0)]
    own = None if bias is None else bias[answer.clamp(min=0)]
    if wrong is not None:
        found = found - columns[wrong]
        own = None if bias is None or own is None else own - bias[wrong]
    return found, own


def _own_logit(seen: Passed, answer: Tensor, wrong: Tensor | None) -> Tensor:
    """Return the model's logit (difference), as it was before a soft-cap."""
    found = _gathered(seen, answer.clamp(min=0))
    return found if wrong is None else found - _gathered(seen, wrong)


def _gathered(seen: Passed, tokens: Tensor) -> Tensor:
    logits = wide(seen.outputs.gather(-1, tokens[..., None])[..., 0])
    cap = seen.anatomy.logit_softcap
    if cap is None:
        return logits
    return (cap * (logits.double() / cap).atanh()).to(logits.dtype)


def _neurons(
    seen: Passed, at_end: Tensor, layer: int, activations: Tensor, weight: Tensor
) -> Tensor:
    """Return what each neuron adds: its activation times what its row of W_out adds."""
    place = next(i for i, w in enumerate(seen.anatomy.writers) if _is_mlp(w, layer))
    writer, written = seen.anatomy.writers[place], seen.written[place]
    direction = _through(seen, writer, at_end, {}) * writer.factor
    if writer.norm is not None and written is not None:
        direction = _back(writer.norm, direction, writer.norm.scale(wide(written)))
    back = direction @ weight.to(direction).mT
    if seen.turned and activations.ndim == 3:
        activations = activations.transpose(0, 1)
    return wide(activations).reshape(back.shape) * back


def _is_mlp(writer: Writer, layer: int) -> bool:
    return writer.kind == "mlp" and writer.layer == layer


def _why_approximate(anatomy: Anatomy) -> Iterator[str]:
    if any(w.through for w in anatomy.writers):
        yield "post-norm: the scale of every norm that the stream passes is kept as it was"
    if any(w.norm is not None for w in anatomy.writers):
        yield "sandwich norms: their scale is kept as it was, and belongs to all heads together"
    if anatomy.logit_softcap is not None:
        yield f"soft-cap: logits before {anatomy.logit_softcap:g}·tanh(·) are taken apart"
    unseen = [w for w in anatomy.writers if not w.module]
    if unseen:
        yield f"{_unseen(unseen)}: what no module returns is one part, found by subtraction"


def tokens_of(
    given: int | Tensor | None, argument: str, seen: Passed, task: Task, batch: Any
) -> Tensor:
    """Return the tokens that are asked about at every position.

    Args:
        given: A token for all, one for each example, or one for each position; None takes the true
            next tokens.
        argument: What the user called it.
        seen: The forward pass.
        task: Where labels come from.
        batch: What the model was run on.

    Returns:
        Long ``[example, position]``, `IGNORED` where none is known.

    Raises:
        ArgumentError: If a token does not exist, none is known, or the shape does not fit.
    """
    shape, device, size = seen.outputs.shape[:2], seen.outputs.device, seen.outputs.shape[2]
    if given is None:
        labels = task.labels(batch)
        if labels is None or labels.shape != shape:
            raise ArgumentError.of(
                argument, expected="a token", got="None", do="No next token is known: name one."
            )
        return labels.to(device)
    try:
        tokens = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError.of(
            argument, expected="token ids", got=repr(given), do="Encode text with its tokenizer."
        ) from None
    tokens = tokens[:, None] if tokens.ndim == 1 else tokens
    fits = tokens.ndim == 0 or (tokens.ndim == 2 and tokens.shape[1] in (1, shape[1]))
    if not fits or tokens.is_floating_point() or (tokens.ndim and len(tokens) not in (1, shape[0])):
        raise ArgumentError.of(
            argument,
            expected=f"one token, one for each of {shape[0]} examples, or {tuple(shape)}",
            got=f"{str(tokens.dtype)[6:]} of shape {tuple(torch.as_tensor(given).shape)}",
            do="Pass an int or a tensor of ids.",
        )
    wrong = (tokens >= size) | ((tokens < 0) & (tokens != IGNORED))
    if bool(wrong.any()):
        raise ArgumentError.of(
            argument,
            expected=f"tokens from 0 to {size - 1}",
            got=tokens[wrong][:3].tolist(),
            do="Pass ids of the model's vocabulary.",
        )
    return tokens.expand(shape).long()
