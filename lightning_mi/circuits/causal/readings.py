"""Asking a behavior's metric of a run, unembedding only the position that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...behavior import Behavior
from ...behaviors.metrics import AnyOf
from ...target import Logit, LogitDifference, positions
from ...task import Task
from .standing_in import standing_in

__all__ = ["Asker", "asks_alone", "unembedding"]


class Asker:
    """Runs a model on several copies of a behavior's prompts and returns its metric.

    Logits of positions that the metric does not read would be waste: where it reads one, the
    hidden state is cut down to it before the unembedding. Whether the model bears that shows in
    the shape of its outputs; where it does not, it is run once more, whole.

    Args:
        model: The module inside any wrapper.
        task: How it is called.
        behavior: What is asked.
    """

    def __init__(self, model: nn.Module, task: Task, behavior: Behavior) -> None:
        self.model, self.task, self.behavior = model, task, behavior
        self._question = _position_of(behavior)
        self._head = None if self._question is None else unembedding(model)

    def __call__(
        self, batch: Any, copies: int = 1, cut: Sequence[nn.Module] = (), *, few: bool = False
    ) -> Tensor:
        """Run and ask.

        Args:
            batch: The prompts, ``copies`` times over.
            copies: How often.
            cut: Further modules whose input may be cut down to the position that is read.
            few: Whether to make `few` logits only. It is for the caller to find out whether the
                answer stays the same: not where the model relates logits to each other.

        Returns:
            Shape ``[copy, example]``, in the model's graph.
        """
        if few and self.few is not None:
            with self.few.made():
                outputs = self._outputs(batch, copies, cut)
            behavior = self.few.behavior
        else:
            outputs, behavior = self._outputs(batch, copies, cut), self.behavior
        blocks = torch.split(outputs, len(behavior))
        return torch.stack([behavior.metric(block) for block in blocks])

    @cached_property
    def few(self) -> Few | None:
        """The logits that the metric reads, where these are few and known beforehand."""
        question, head = self.behavior.question, self._head
        if type(head) is not nn.Linear or not isinstance(question, Logit):
            return None
        named = [question.token]
        if isinstance(question, LogitDifference):
            named.append(question.other)
        elif type(question) is not Logit:
            return None
        if any(token is None for token in named):
            return None
        tokens = [torch.as_tensor(token).to(head.weight.device) for token in named]
        ids, places = torch.unique(torch.cat([t.flatten() for t in tokens]), return_inverse=True)
        parts = places.split([t.numel() for t in tokens])
        settled = [part.reshape(t.shape) for part, t in zip(parts, tokens, strict=True)]
        changes = dict(zip(("token", "other"), settled, strict=False))
        asked = dataclasses.replace(question, **changes)
        return Few(head, ids, dataclasses.replace(self.behavior, target=asked))

    def _outputs(self, batch: Any, copies: int, cut: Sequence[nn.Module]) -> Tensor:
        if self._head is None:
            return self.task.outputs(self.model, batch)
        lengths: list[int] = []

        def hook(module: nn.Module, args: Any) -> Any:
            hidden = args[0] if args else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                return None
            rows = copies * len(self.behavior)
            if len(hidden) != rows or hidden.shape[1] == 1:
                return None
            lengths.append(hidden.shape[1])
            return (
                hidden[torch.arange(rows, device=hidden.device), self._at(hidden)][:, None],
                *args[1:],
            )

        try:
            with ExitStack() as stack:
                for module in (*cut, self._head):
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                outputs = self.task.outputs(self.model, batch)
        except (IndexError, RuntimeError):
            if not lengths:
                raise
            outputs = torch.empty(0)
        if not lengths:
            return outputs
        if outputs.ndim == 3 and outputs.shape[1] == 1:
            if asks_alone(self.behavior.question):
                return outputs[:, 0]
            # All positions show the logits of the one that is read.
            return outputs.expand(-1, lengths[0], -1)
        self._head = None
        return self.task.outputs(self.model, batch)

    def _at(self, hidden: Tensor) -> Tensor:
        size = len(self.behavior)
        asked = Logit() if self._question is None else self._question
        found = positions(hidden[:size], self.behavior.clean, asked)
        return found.repeat(len(hidden) // size).to(hidden.device)


@dataclass(frozen=True, eq=False)
class Few:
    """Some logits instead of all.

    A vocabulary has tens of thousands of tokens, of which a difference of logits reads two: where
    many runs are patched, the others would be a good part of the work.

    Args:
        head: The map that makes the logits.
        ids: Tokens whose logits are made, in their order.
        behavior: The behavior, its metric asking for places among them.
    """

    head: nn.Linear
    ids: Tensor
    behavior: Behavior

    def made(self) -> AbstractContextManager[None]:
        """Make these only.

        Returns:
            A context in which the head does.
        """
        weight = self.head.weight[self.ids]
        bias = None if self.head.bias is None else self.head.bias[self.ids]
        return standing_in({self.head: lambda x: F.linear(x, weight, bias)})


def asks_alone(question: object) -> bool:
    """Return whether a target can be asked of the logits that it reads, without a position.

    Going back through all positions would cost as many gradients as wide as the vocabulary.

    Args:
        question: The target.

    Returns:
        False where the answer lies in labels by position, and for kinds of the user's own.
    """
    if isinstance(question, AnyOf):
        return True
    if not isinstance(question, Logit) or type(question).__module__ != Logit.__module__:
        return False
    return question.token is not None


def _position_of(behavior: Behavior) -> Logit | None:
    question = behavior.question
    if isinstance(question, AnyOf):
        return Logit(position=question.position, token=0)
    return question if isinstance(question, Logit) else None


def unembedding(model: nn.Module) -> nn.Module | None:
    """Return the module that probably makes the logits.

    Args:
        model: The module inside any wrapper.

    Returns:
        The module, to be judged by its outputs' shape; None where there is no candidate.
    """
    getters = [getattr(m, "get_output_embeddings", None) for m in model.modules()]
    known = [get() for get in getters if callable(get)]
    if known:
        return next((m for m in known if isinstance(m, nn.Module)), None)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None
