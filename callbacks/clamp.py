"""`ClampHeads`: hold heads at a value while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from ..circuits.causal.interventions import Prepared, prepare
from ..circuits.causal.places import At
from ..circuits.causal.values import Value, mean, value, zero
from ..errors import ArgumentError
from ..nodes import MLP, Head, Reader, parse
from ..task import Task
from ._base import Callback, LightningModule, Trainer
from ._facts import refuse_sharded, say

__all__ = ["ClampHeads"]


class ClampHeads(Callback):
    """Hold heads at a value for a stretch of training: the causal test of how they form.

    **This changes training, by intent.** All other callbacks of this package leave training as it
    is; this one does not: in every training step of its window the chosen heads write the given
    value, whatever they compute, and get no gradient through what they would have written. Outside
    the window training is bit for bit what it would have been from the same weights on. Validation
    and monitors see the model as it is, without the clamp, unless ``in_validation`` is set.

    Logged key: ``mi/clamped_heads``, the number of parts that are held (0 outside the window).
    Weights, state dict and checkpoints have the form that they always have; the callback's own
    state holds the stored values, so a resumed run goes on with the same ones.

    The value is taken once, when the window opens, and kept. Under ``torch.compile`` the model
    runs uncompiled inside the window. Dropout of attention weights is not drawn for a head whose
    query, key, value or pattern is held. Strategies that shard the weights are refused.

    Args:
        heads: Which, by printed name (``"L0H3"``, ``"L1H2.q"``, ``"MLP0"``) or as nodes; `At`
            clamps a pattern or some positions; a mapping gives each a value of its own.
        value: ``"zero"``, ``"mean"`` (of what the part writes on ``reference``), a number, or one
            of `lightning_mi.circuits`: ``zero()``, ``mean(…)``, ``from_run(…)``, ``value(…)``.
        start: First optimizer step of the window, as ``trainer.global_step`` counts.
        stop: The step at which it ends; None is the end of training. A second window is a second
            callback.
        reference: Batch that the mean is taken over; None takes the first batch of the window.
        in_validation: Clamp in validation as well, while the window is open.
        task: How the model is called on the reference; None calls it with the batch.

    Raises:
        ArgumentError: If a value is impossible.

    Example:
        >>> ClampHeads(["L0H3"], start=100, stop=500).parts
        {Head(layer=0, head=3): Value(kind='zero', batch=None, tensor=None, over='all', seed=0)}
    """

    def __init__(
        self,
        heads: Sequence[str | Head | Reader | MLP | At] | Mapping[Any, Any],
        value: Literal["zero", "mean"] | float | Tensor | Value = "zero",
        *,
        start: int = 0,
        stop: int | None = None,
        reference: Any = None,
        in_validation: bool = False,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        if isinstance(heads, str) or not heads:
            raise ArgumentError.of(
                "heads", expected="a list of heads", got=repr(heads), do='For example ["L0H3"].'
            )
        if start < 0 or (stop is not None and stop <= start):
            raise ArgumentError.of(
                "start, stop",
                expected="0 <= start < stop, or stop=None",
                got=f"start={start}, stop={stop}",
                do="They are optimizer steps.",
            )
        given = heads if isinstance(heads, Mapping) else dict.fromkeys(heads, value)
        self.parts = {_part(part): _value(own, reference) for part, own in given.items()}
        self.start, self.stop, self.in_validation = start, stop, in_validation
        self._names = [str(p.node if isinstance(p, At) else p) for p in self.parts]
        # Lightning asks for it at every hook of every step.
        self._state_key = f"{type(self).__qualname__}[{','.join(self._names)}:{start}-{stop}]"
        self.task = task
        self._prepared: Prepared | None = None
        self._stored: list[Tensor] | None = None
        self._open = ExitStack()
        self._validating = False

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """Return the stored values, so that a resumed run holds the same ones."""
        kept = self._stored if self._prepared is None else self._prepared.kept
        return {} if kept is None else {"kept": [value.cpu() for value in kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take stored values back.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._stored = state_dict.get("kept")

    def holds(self, step: int) -> bool:
        """Say whether the window is open.

        Args:
            step: Optimizer steps taken.

        Returns:
            True inside.
        """
        return self.start <= step and (self.stop is None or step < self.stop)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be clamped.

        Args:
            trainer: The Trainer.
            pl_module: Not used.
            stage: Not used.

        Raises:
            LightningMIError: If the strategy shards the model.
        """
        refuse_sharded(trainer, "Train with ddp to clamp heads.")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Clamp for this batch, if the window is open.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: Reference, where none was given.
            batch_idx: Not used.
        """
        inside = self.holds(trainer.global_step)
        if inside:
            self._enter(trainer, pl_module, batch)
        pl_module.log("mi/clamped_heads", float(len(self.parts) if inside else 0))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Let go.

        Args:
            trainer: Not used.
            pl_module: Not used.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        self._open.close()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clamp in validation, where that is asked for and a value has been taken.

        Args:
            trainer: The Trainer.
            pl_module: The user's model.
            batch: Not used.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        known = self._prepared is not None
        if self.in_validation and known and self.holds(trainer.global_step):
            self._validating = True
            self._enter(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let go.

        Args:
            trainer: Not used.
            pl_module: Not used.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        if self._validating:
            self._validating = False
            self._open.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go, whatever happened.

        Args:
            trainer: Not used.
            pl_module: Not used.
            exception: Handed to what is open.
        """
        self._validating = False
        opened = self._open.pop_all()
        opened.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go, and forget the model.

        Args:
            trainer: Not used.
            pl_module: Not used.
            stage: Not used.
        """
        self._open.close()
        if self._prepared is not None:
            self._stored, self._prepared = self._prepared.kept, None

    def _enter(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._open.close()
        if self._prepared is None:
            self._prepared = self._prepare(trainer, pl_module, batch)

        def active() -> bool:
            return bool(pl_module.training) or self._validating

        self._open.enter_context(self._prepared.held(active))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Prepared:
        parts = {p: mean(batch) if _waits(v) else v for p, v in self.parts.items()}
        if self._stored is not None:
            parts = {p: value(v) for p, v in zip(self.parts, self._stored, strict=True)}
        names = ", ".join(self._names)
        end = "the end" if self.stop is None else f"step {self.stop}"
        say(
            trainer,
            f"ClampHeads changes training: {names} held from step {self.start} to {end}.",
        )
        with torch.no_grad():
            return prepare(pl_module, parts, task=self.task, example=batch)


def _part(part: Any) -> Any:
    return parse(part) if isinstance(part, str) else part


def _value(given: Any, reference: Any) -> Value:
    if isinstance(given, Value):
        return given
    if isinstance(given, str):
        if given not in ("zero", "mean"):
            raise ArgumentError.of(
                "value",
                expected='"zero", "mean", a number, or a Value',
                got=repr(given),
                do="For example mean(batch) of lightning_mi.circuits.",
            )
        if given == "zero":
            return zero()
        return Value("mean") if reference is None else mean(reference)
    return value(given)


def _waits(own: Value) -> bool:
    """Say whether a mean still lacks the batch that it is taken over."""
    return own.kind == "mean" and own.batch is None
