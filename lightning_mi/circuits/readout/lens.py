"""Logit lens: what the model would answer if it stopped after each layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...errors import ArgumentError
from ...isolation import untouched
from ...task import IGNORED, NextToken, Task
from ..heads.layout import layout_of
from ..weights.factors import check_count
from .patterns import batched
from .running import Passed, final_logits, passed
from .writing import tokens_of

__all__ = ["Lens", "lens_of", "logit_lens"]

BLOCK = 1 << 22
"""Logits computed at a time."""


@dataclass(frozen=True, eq=False)
class Lens:
    """What each layer's stream says, ``[layer, example, position]``.

    Entry l of the layer axis is the stream that enters layer l; the last one is the final stream,
    which gives the model's own answer.

    Args:
        entropy: Entropy of the next-token distribution, nats.
        rank: How many tokens have a higher logit than the right one (0: it is the best); NaN where
            no answer is known.
        log_probability: Of the right token, nats; NaN likewise.
        top: The best tokens ``[layer, example, position, k]``.
        top_probability: Their probabilities.
        answer: The right tokens ``[example, position]``, −100 where unknown.
        real: Where tokens are no padding ``[example, position]``.
        labels: ``embed`` or what has been written so far, one for each entry of the layer axis.
        streams: The streams themselves, each ``[example, position, d_model]``.
        anatomy: What the model is made of.
    """

    entropy: Tensor
    rank: Tensor
    log_probability: Tensor
    top: Tensor
    top_probability: Tensor
    answer: Tensor
    real: Tensor
    labels: tuple[str, ...]
    streams: tuple[Tensor, ...]
    anatomy: Anatomy

    def logits(self, layer: int) -> Tensor:
        """Return the logits that a layer's stream gives.

        Args:
            layer: Entry of the layer axis; −1 is the final stream.

        Returns:
            Shape ``[example, position, token]``, in single precision at least.

        Raises:
            ArgumentError: If there is no such layer.
        """
        count = len(self.streams)
        if not -count <= layer < count:
            raise ArgumentError.of(
                "layer", expected=f"0 to {count - 1}", got=layer, do=f"Entries are {self.labels}."
            )
        return final_logits(self.streams[layer], self.anatomy)


def logit_lens(
    model: nn.Module,
    tokens: Any,
    answer: int | Tensor | None = None,
    *,
    top: int = 3,
    anatomy: Anatomy | None = None,
    task: Task | None = None,
) -> Lens:
    """Read the answer off the stream before every layer (nostalgebraist 2020).

    The stream goes through the final norm, with **that layer's own statistics**, and the
    unembedding (and soft-cap). Early layers need not speak the unembedding's language, so a high
    rank there shows little; it is the layer from which on the answer stays that matters.

    Args:
        model: Any transformer with a linear unembedding; its mode and state are left as they are.
        tokens: Ids ``[example, position]`` (one sequence alone as well), or a mapping that may
            hold ``attention_mask`` and ``position_ids``.
        answer: The right token: for all, for each example, or for each position; None takes the
            true next token.
        top: How many of the best tokens are kept.
        anatomy: The model's anatomy, if it is at hand or was corrected; None finds it.
        task: How the model is called; None calls it with the batch.

    Returns:
        Entropy, rank and log-probability of the right answer by layer. Differentiable with respect
        to activations where grad is enabled (ranks are not).

    Raises:
        ArgumentError: If a token does not exist or has another shape than expected, or ``top`` is
            not positive.
        ModelError: If the logits are not read linearly from the stream, or padding shifts what is
            measured.
    """
    check_count(top, "top")
    batch, chosen = batched(tokens), task or NextToken()
    wants_grad = torch.is_grad_enabled()
    with untouched(model) as plain, torch.set_grad_enabled(wants_grad):
        if anatomy is None:
            with torch.no_grad():
                anatomy = Anatomy.of(plain, batch, task=chosen)
        seen = passed(plain, anatomy, chosen, batch)
        return lens_of(seen, tokens_of(answer, "answer", seen, chosen, batch), chosen, batch, top)


def lens_of(seen: Passed, answer: Tensor, task: Task, batch: Any, top: int = 3) -> Lens:
    """Return the lens of a forward pass.

    Args:
        seen: The pass.
        answer: Right tokens ``[example, position]``, `IGNORED` where unknown.
        task: How the model is called.
        batch: What it was run on.
        top: How many of the best tokens are kept.

    Returns:
        The lens.
    """
    labels, streams = zip(*_streams(seen), strict=True)
    rows = [_read(stream, seen.anatomy, answer, top) for stream in streams]
    entropy, rank, chance, best, share = (torch.stack(part) for part in zip(*rows, strict=True))
    inputs = task.inputs(batch)
    documents = layout_of(batch, inputs).documents(inputs)
    real = torch.ones_like(answer, dtype=torch.bool) if documents is None else documents > 0
    return Lens(entropy, rank, chance, best, share, answer, real, labels, streams, seen.anatomy)


def _streams(seen: Passed) -> Iterator[tuple[str, Tensor]]:
    readers = [r for r in seen.anatomy.readers if r.kind != "logits"]
    for reader, stream in zip(readers, seen.entering, strict=False):
        if reader.kind == "attention":
            yield ("embed" if reader.layer == 0 else f"L{reader.layer - 1}"), stream
    yield f"L{seen.anatomy.n_layers - 1}", seen.final


def _read(
    stream: Tensor, anatomy: Anatomy, answer: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return entropy, rank, log-probability, best tokens and theirs, a few positions at a time."""
    flat, right = stream.flatten(0, 1), answer.flatten()
    size = max(1, BLOCK // max(1, _vocabulary(anatomy)))
    parts = [
        _block(final_logits(x, anatomy), y, top)
        for x, y in zip(torch.split(flat, size), torch.split(right, size), strict=True)
    ]
    entropy, rank, chance, best, share = (torch.cat(p) for p in zip(*parts, strict=True))
    shape = answer.shape
    return (
        entropy.reshape(shape),
        rank.reshape(shape),
        chance.reshape(shape),
        best.reshape(*shape, -1),
        share.reshape(*shape, -1),
    )


def _vocabulary(anatomy: Anatomy) -> int:
    return 1 if anatomy.W_U is None else anatomy.W_U.shape[-1]


def _block(logits: Tensor, answer: Tensor, top: int) -> tuple[Tensor, ...]:
    logs = logits.log_softmax(-1)
    chances = logs.exp()
    known, index = answer != IGNORED, answer.clamp(min=0)[:, None]
    rank = (logits > logits.gather(-1, index)).sum(-1).to(logs.dtype)
    best = chances.topk(min(top, logits.shape[-1]), -1)
    return (
        -(chances * torch.where(chances > 0, logs, 0.0)).sum(-1),
        torch.where(known, rank, torch.nan),
        torch.where(known, logs.gather(-1, index)[:, 0], torch.nan),
        best.indices,
        best.values,
    )
