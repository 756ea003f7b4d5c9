"""The tokens that heads are asked about: their embeddings, and what unembeds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import check_anatomy
from ...attention.site import widened
from ...errors import ModelError
from ...isolation import untouched
from ...task import Task
from ..heads.survey import run_tokens
from .factors import check_count

if TYPE_CHECKING:
    from ...anatomy import Anatomy

__all__ = ["Vocabulary", "embedded_by_block", "vocabulary"]

ROWS = 2048
"""Tokens that go through the first block at a time."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens as heads read them and as the model's answer reads heads.

    Args:
        ids: Token ids ``[token]``.
        first: Embeddings that the first layer's heads read, ``[token, d_model]``.
        later: Embeddings that later heads read, the same shape.
        unembedding: W_U, with the final norm's gain folded in and, as a softmax does not see it,
            without its mean over all tokens; ``[d_model, token]``.
        embedding: What ``later`` is, in words.
    """

    ids: Tensor
    first: Tensor
    later: Tensor
    unembedding: Tensor
    embedding: str

    def read(self, layer: int) -> Tensor:
        """Return the embeddings that a layer's heads read.

        Args:
            layer: The layer.

        Returns:
            ``[token, d_model]``.
        """
        return self.later if layer else self.first

    def through(self, layer: int) -> Tensor:
        """Return W_U·W_E, by which the d_head × d_head products for eigenvalues are short.

        Args:
            layer: The layer that reads.

        Returns:
            ``[d_model, d_model]``, computed once.
        """
        return self._through[min(layer, len(self._through) - 1)]

    def gram(self, layer: int) -> Tensor:
        """Return W_Eᵀ·W_E.

        Args:
            layer: The layer that reads.

        Returns:
            ``[d_model, d_model]``, computed once.
        """
        return self._gram[min(layer, len(self._gram) - 1)]

    @cached_property
    def _through(self) -> list[Tensor]:
        return [self.unembedding @ read for read in self._reads]

    @cached_property
    def _gram(self) -> list[Tensor]:
        return [read.mT @ read for read in self._reads]

    @property
    def _reads(self) -> list[Tensor]:
        return [self.first] if self.later is self.first else [self.first, self.later]


def vocabulary(
    anatomy: Anatomy,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Vocabulary:
    """Return the tokens of a model, or a random sample of them.

    Where the unembedding is the embedding itself, transposed, the first block's MLP does the real
    embedding (a token's vector cannot both be and predict the token). Then later heads are asked
    about E′, the residual stream after the first block when the model sees that token alone; this
    needs ``model``.

    Args:
        anatomy: The model's anatomy.
        model: The model, for E′ where weights are tied; None takes W_E.
        task: How the model is called.
        size: Number of tokens; None, or more than there are, takes all.
        seed: Seed of the sample's own generator.

    Returns:
        The tokens.

    Raises:
        ArgumentError: If that is no anatomy, or size no positive number.
        ModelError: If embedding or unembedding are not known.
    """
    check_anatomy(anatomy)
    if size is not None:
        check_count(size, "size")
    if anatomy.W_E is None or anatomy.W_U is None:
        what = "embedding" if anatomy.W_E is None else "unembedding"
        raise ModelError(
            f"anatomy: expected a model with a known embedding and unembedding of tokens, got no "
            f"{what}. State it, or measure composition and subspaces, which need none."
        )
    ids = _chosen(min(len(anatomy.W_E), anatomy.W_U.shape[1]), size, seed).to(anatomy.W_E.device)
    first = widened(anatomy.W_E[ids])
    later, words = first, "W_E"
    if model is not None and _embeds_in_block(anatomy):
        later = embedded_by_block(model, anatomy, ids, task)
        words = "the residual stream after block 0 on that token alone, as W_U is W_E transposed"
    return Vocabulary(ids, first, later, _unembedding(anatomy, ids), words)


def embedded_by_block(
    model: nn.Module, anatomy: Anatomy, ids: Tensor, task: Task | None = None
) -> Tensor:
    """Return E′: what the second layer's heads are handed when the model sees one token alone.

    Args:
        model: The model.
        anatomy: Its anatomy, which names the module that reads the stream.
        ids: Token ids ``[token]``.
        task: How the model is called.

    Returns:
        The residual stream after the first block, ``[token, d_model]``.

    Raises:
        ModelError: If the model has no second layer, or does not run it on one token.
    """
    names = [r.module for r in anatomy.readers if r.kind == "attention" and r.layer == 1]
    if not names:
        raise ModelError(
            "anatomy: expected a second layer whose input is the residual stream, got none. "
            "Leave out model= to use W_E."
        )
    with untouched(model) as plain, torch.no_grad():
        reader = plain.get_submodule(names[0])
        return torch.cat([_caught(plain, reader, part, task) for part in torch.split(ids, ROWS)])


class _EnoughError(Exception):
    """What was wanted is there: the rest of the forward pass is not needed."""


def _caught(model: nn.Module, reader: nn.Module, ids: Tensor, task: Task | None) -> Tensor:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        found.append(inputs[0])
        raise _EnoughError

    handle = reader.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run_tokens(model, task or Task(), ids[:, None])
    except _EnoughError:
        return widened(found[0].detach()).reshape(len(ids), -1)
    finally:
        handle.remove()
    raise ModelError(
        "model: expected the second layer to run on sequences of one token, got none of it. "
        "Leave out model= to use W_E."
    )


def _embeds_in_block(anatomy: Anatomy) -> bool:
    """Say whether W_U is W_E transposed and there is an MLP in the first block of several."""
    W_E, W_U = anatomy.W_E, anatomy.W_U
    if anatomy.n_layers < 2 or W_E is None or W_U is None or W_E.shape != W_U.mT.shape:
        return False
    mlp = any(w.kind == "mlp" and w.layer == 0 for w in anatomy.writers)
    return mlp and torch.equal(W_E, W_U.mT)


def _unembedding(anatomy: Anatomy, ids: Tensor) -> Tensor:
    if anatomy.W_U is None:  # the caller has looked
        raise ModelError("anatomy: expected an unembedding, got none. State it.")
    weight = widened(anatomy.W_U)
    weight = weight[:, ids] - weight.mean(1, keepdim=True)
    norm = anatomy.final_norm
    return weight if norm is None or norm.kind == "other" else norm.folded(weight)


def _chosen(count: int, size: int | None, seed: int) -> Tensor:
    if size is None or size >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:size].sort().values
