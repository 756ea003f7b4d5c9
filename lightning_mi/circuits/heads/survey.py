"""What a language model takes: how many token ids, how many positions, how many attentions."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import Site, tap
from ...errors import LightningMIError, ModelError
from ...task import NextToken, Task

__all__ = ["Survey", "run_tokens", "survey"]

SPECIAL_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "block_size",
    "context_length",
    "max_seq_len",
)
"""Names under which configurations keep the longest sequence."""


@dataclass(frozen=True)
class Survey:
    """What was found.

    Args:
        vocabulary_size: Number of token ids.
        context_length: Longest sequence, None where it cannot be seen.
        sites: Number of attentions in a forward pass.
        special: Ids of special tokens that a configuration of the model names.
        causal: Whether no attention looks at later tokens.
    """

    vocabulary_size: int
    context_length: int | None
    sites: int
    special: tuple[int, ...] = ()
    causal: bool = True


def survey(model: nn.Module, task: Task) -> Survey:
    """Run a model on two tokens and see what it takes.

    Args:
        model: The user's model, in evaluation mode.
        task: How it is called.

    Returns:
        What was found.

    Raises:
        ModelError: If it cannot be called with token ids, or its vocabulary cannot be found.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    tables: list[tuple[nn.Embedding, Tensor]] = []
    ahead: list[bool] = []

    def visit(index: int, site: Site) -> None:
        reach = site.reachable()
        ahead.append(reach is None or bool(reach[..., 0, 1:].any()))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(_note(tables)).remove)
        seen = stack.enter_context(tap(model, visit=visit, keep=False, check="all"))
        outputs = run_tokens(model, task, ids)
    size = next((t.num_embeddings for t, given in tables if _is_ids(given, ids)), None)
    if size is None and outputs.ndim == 3:
        size = outputs.shape[-1]
    if size is None:
        raise ModelError(
            f"model: expected {type(model).__name__} to look token ids up in an nn.Embedding or to "
            f"return logits [example, position, token], got outputs {tuple(outputs.shape)}. "
            "Pass tokens=RepeatedTokens(vocabulary_size=…)."
        )
    room, special = _context_length(model, tables, ids), _special(model, size)
    return Survey(size, room, seen.count, special, not any(ahead))


def run_tokens(
    model: nn.Module,
    task: Task,
    ids: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Run a model on token ids of our own.

    Args:
        model: The user's model.
        task: How it is called.
        ids: Token ids ``[example, position]``.
        mask: 1 at real tokens, or a block mask, or None.
        positions: Position ids, or None.

    Returns:
        The outputs.

    Raises:
        ModelError: If the model cannot be called with token ids.
    """
    if isinstance(task, NextToken) and task.drop_last_input:
        task = copy.copy(task)
        task.drop_last_input = False
    beside = {"attention_mask": mask, "position_ids": positions}
    given = {name: value for name, value in beside.items() if value is not None}
    batch: Any = {"input_ids": ids, **given} if given else ids
    try:
        return task.outputs(model, batch)
    except LightningMIError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"model: expected {type(model).__name__} to run on token ids of shape "
            f"{tuple(ids.shape)}, got {type(error).__name__}: {error}. Head scores need a language "
            "model; pass a Task whose outputs(model, batch) calls it, or shorter tokens."
        ) from error


def _note(tables: list[tuple[nn.Embedding, Tensor]]) -> Any:
    def hook(module: nn.Embedding, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            tables.append((module, args[0]))

    return hook


def _is_ids(given: Tensor, ids: Tensor) -> bool:
    return given is ids or (given.shape == ids.shape and torch.equal(given, ids))


def _context_length(
    model: nn.Module, tables: list[tuple[nn.Embedding, Tensor]], ids: Tensor
) -> int | None:
    found = []
    for table, given in tables:
        places = given.flatten().tolist()
        if len(places) == ids.shape[1] and places[1] == places[0] + 1:
            found.append(table.num_embeddings - places[0])
    for module in model.modules():
        config = getattr(module, "config", None)
        values = (getattr(config, name, None) for name in CONTEXT_NAMES)
        found += [v for v in values if isinstance(v, int) and v > 0]
    return min(found) if found else None


def _special(model: nn.Module, size: int) -> tuple[int, ...]:
    found: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        for value in (getattr(config, name, None) for name in SPECIAL_NAMES):
            ids = value if isinstance(value, list | tuple) else [value]
            found |= {i for i in ids if isinstance(i, int) and 0 <= i < size}
    return tuple(sorted(found))
