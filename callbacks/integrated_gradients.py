"""`IntegratedGradientsMonitor`: watch which inputs the answer is owed to."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..attribution import IntegratedGradients
from ..attribution.rules import Rule
from ..target import TargetOption
from ..task import Task
from .monitor import MeasurementMonitor

__all__ = ["IntegratedGradientsMonitor"]


class IntegratedGradientsMonitor(MeasurementMonitor):
    """Take integrated gradients of the target, with their completeness gap.

    Logged keys: ``mi_integrated_gradients/strip`` (picture, for tokens), ``…/image`` or ``…/bars``,
    in units of the target (logits by default), and ``mi_integrated_gradients/gap`` (largest
    relative completeness gap, 0 to 1). The run folder holds values, gap, steps and whether each
    example converged.

    Args:
        target: The scalar that is explained; None takes the logit of the true next token or label.
        baseline: Where the path starts: None (zero, or the zero embedding), a number, or a token
            id for token inputs.
        rule: Quadrature rule; ``"gauss-legendre"`` converges fastest.
        steps: Nodes on the path; None takes as many as each example needs.
        keep: Ids of tokens that keep their own embedding, such as special ones.
        of: Which entry of the batch is explained, where there are several inputs; several move
            together on one path. None takes the main input.
        tolerance: Relative completeness gap at which an example is done.
        max_steps: Most nodes on the path.
        examples: Examples of the batch that are explained.
        batch: See `MeasurementMonitor`.
        task: See there.
        tokenizer: See there.
        dirpath: See there.
        report: See there.
        every_n_train_steps: See there.
        every_n_epochs: See there.
        train_time_interval: See there.
        at_steps: See there.
        on_validation: See there.
        at_start: See there.
        at_end: See there.
        max_overhead: See there.
    """

    def __init__(
        self,
        *,
        target: TargetOption = None,
        baseline: float | int | None = None,
        rule: Rule = "gauss-legendre",
        steps: int | None = None,
        keep: list[int] | None = None,
        of: str | int | list[str | int] | None = None,
        tolerance: float = 0.01,
        max_steps: int = 12,
        examples: int | None = 2,
        batch: Any = None,
        task: Task | None = None,
        tokenizer: Any = None,
        dirpath: str | Path | None = None,
        report: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        at_steps: list[int] | Literal["log"] | None = None,
        on_validation: bool = False,
        at_start: bool | None = None,
        at_end: bool | None = None,
        max_overhead: float | None = None,
    ) -> None:
        measurement = IntegratedGradients(
            target=target,
            baseline=baseline,
            rule=rule,
            steps=steps,
            keep=keep,
            of=of,
            tolerance=tolerance,
            max_steps=max_steps,
            examples=examples,
        )
        super().__init__(
            measurements=[measurement],
            batch=batch,
            task=task,
            tokenizer=tokenizer,
            dirpath=dirpath,
            report=report,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            at_steps=at_steps,
            on_validation=on_validation,
            at_start=at_start,
            at_end=at_end,
            max_overhead=max_overhead,
        )
