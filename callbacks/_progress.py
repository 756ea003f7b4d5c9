"""How far training has come: examples, tokens, learning rates, and the time spent on measuring."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import attention_mask_of, main_input
from ._base import Trainer

__all__ = ["Progress"]


class Progress:
    """What a checkpoint does not hold by itself."""

    def __init__(self) -> None:
        self.samples = 0
        self.restored_rates: Mapping[str, float] = {}
        self._tokens: int | Tensor = 0
        self._counted: tuple[int, int] | None = None
        self._rates: dict[int, list[Any]] = {}
        self._started, self._measuring = time.perf_counter(), 0.0

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept.

        Args:
            state: What `state` returned.
        """
        self.samples = int(state.get("samples") or 0)
        self._tokens = int(state.get("tokens") or 0)
        self.restored_rates = state.get("learning_rates") or {}

    def state(self, trainer: Trainer | None, model: nn.Module | None) -> dict[str, Any]:
        """Return everything as built-in types.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Returns:
            Steps, examples, tokens and learning rates.
        """
        rates = {} if trainer is None or model is None else self.learning_rates(trainer, model)
        return {
            "step": 0 if trainer is None else trainer.global_step,
            "samples": self.samples,
            "tokens": self.tokens,
            "learning_rates": rates,
        }

    @property
    def tokens(self) -> int:
        """Training tokens seen on all ranks."""
        self._tokens = int(self._tokens)
        return self._tokens

    def count(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Count examples and tokens of a training batch, once however many monitors call.

        Args:
            trainer: The Trainer.
            batch: The training batch.
            batch_idx: Its index in the epoch.
        """
        moment = (trainer.current_epoch, batch_idx)
        if moment == self._counted:
            return
        self._counted = moment
        try:
            inputs = main_input(batch)
        except ValueError:
            return
        self.samples += (inputs.shape[0] if inputs.ndim else 1) * trainer.world_size
        if not inputs.is_floating_point() and inputs.ndim == 2:
            mask = attention_mask_of(batch)
            # The sum stays on its device: reading it at every step would stall a GPU.
            count = inputs.numel() if mask is None else mask.sum()
            self._tokens = self._tokens + count * trainer.world_size

    def take_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rates of a step that is about to be taken.

        Args:
            optimizer: The optimizer. Rates are read here because the scheduler steps afterwards.
        """
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]

    def learning_rates(self, trainer: Trainer, model: nn.Module) -> dict[str, float]:
        """Return the learning rate in force at the last step, by parameter name.

        Args:
            trainer: The Trainer.
            model: The user's model.

        Returns:
            Rates of the parameters that an optimizer holds; before the first step those to come.
        """
        by_id: dict[int, float] = {}
        for optimizer in trainer.optimizers:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            taken = self._rates.get(id(optimizer))
            rates = taken or [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                by_id.update((id(p), float(rate)) for p in group["params"])
        if not self._rates and self.restored_rates:
            return dict(self.restored_rates)
        return {n: by_id[id(p)] for n, p in model.named_parameters() if id(p) in by_id}

    def share(self, more: float = 0.0) -> float:
        """Return the share of the time since the start that went into measuring.

        Args:
            more: Seconds that are not counted yet.

        Returns:
            From 0 to 1.
        """
        elapsed = time.perf_counter() - self._started
        return (self._measuring + more) / max(elapsed, self._measuring + more, 1e-9)

    def spent(self, seconds: float) -> None:
        """Count time that went into measuring.

        Args:
            seconds: Of a firing, its writing included.
        """
        self._measuring += seconds

    def begin(self) -> None:
        """Start counting time, at the first step rather than at set-up."""
        self._started, self._measuring = time.perf_counter(), 0.0

    def forget(self) -> None:
        """Drop what refers to the optimizers."""
        self._rates.clear()
