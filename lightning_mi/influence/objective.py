"""What training minimises, in the parts that influence needs: `Objective`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..target import Loss, Target, TargetLike, as_target
from ..task import NextToken, Task
from .data import row
from .objective_module import decay_of, verified_task

__all__ = ["Objective"]

FOREIGN = ("train_outputs", "train_loss_on_outputs", "train_regularization", "test_loss")
"""The methods of torch-influence's BaseObjective."""


class Objective:
    """J(θ) = (1/n) Σᵢ ℓᵢ(θ) + R(θ), with outputs and losses apart.

    Args:
        task: Outputs of a batch and the loss of each example on them. An object shaped like
            torch-influence's ``BaseObjective`` is accepted too; its ``test_loss`` is then the
            query loss and its ``train_regularization`` the regulariser.
        regularizer: R, a function of the model that returns a scalar, for example
            ``lambda m: 0.005 * sum(p.square().sum() for p in m.parameters())`` for the weight
            decay 0.01 of SGD. A loss written as a sum over examples has to be divided by n first.

    Raises:
        ArgumentError: If the task is neither.

    Example:
        >>> from lightning_mi import Classification
        >>> objective = Objective(Classification(), regularizer=lambda m: m.weight.square().sum())
        >>> objective.regularization(nn.Linear(2, 2, bias=False)).shape
        torch.Size([])
    """

    def __init__(
        self, task: Any, *, regularizer: Callable[[nn.Module], Tensor] | None = None
    ) -> None:
        self._foreign = None if isinstance(task, Task) else task
        if self._foreign is not None and not all(hasattr(task, name) for name in FOREIGN):
            raise ArgumentError.of(
                "task",
                expected="a lightning_mi Task, or an object with the methods of "
                "torch_influence.BaseObjective",
                got=f"a {type(task).__name__}",
                do="For example Objective(Classification()).",
            )
        self.task: Task = task if isinstance(task, Task) else _Foreign(task)
        self._regularizer = regularizer

    @classmethod
    def of(
        cls,
        module: nn.Module,
        batch: Any,
        *,
        task: Task | None = None,
        regularizer: Callable[[nn.Module], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Objective:
        """Take the objective from a LightningModule, and verify it.

        The mean of the task's losses over the batch, plus ``regularizer``, has to be what the
        module's ``training_step`` returns, in evaluation mode, on the batch and on one example.

        Args:
            module: The LightningModule; it is left exactly as it was, and logs nothing.
            batch: A training batch.
            task: Outputs and losses; None is inferred.
            regularizer: R(module), where ``training_step`` adds one.
            optimizer: Adds its weight decay as the regulariser, which no ``training_step`` knows.

        Returns:
            The objective.

        Raises:
            ArgumentError: If the losses differ, or the optimizer's decay is no regulariser.
            ModelError: If the module has no training loss to compare with.
        """
        found = verified_task(module, batch, task, regularizer)
        decay = None if optimizer is None else decay_of(optimizer, module)
        parts = [r for r in (regularizer, decay) if r is not None]
        if len(parts) == 2:
            return cls(found, regularizer=lambda m: parts[0](m) + parts[1](m))
        return cls(found, regularizer=parts[0] if parts else None)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's outputs.

        Args:
            model: The model.
            batch: A batch.

        Returns:
            Shape ``[example, …]``.
        """
        return self.task.outputs(model, batch)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return ℓᵢ.

        Args:
            outputs: What `outputs` returned.
            batch: The batch.

        Returns:
            Shape ``[example]``.
        """
        return self.task.loss(outputs, batch)

    def example_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Return ℓᵢ of a batch that the model is yet to be run on.

        Args:
            model: The model.
            batch: The batch.

        Returns:
            Shape ``[example]``.
        """
        return self.losses(self.outputs(model, batch), batch)

    def regularization(self, model: nn.Module) -> Tensor | None:
        """Return R(θ), or None where there is none.

        Args:
            model: The model.

        Returns:
            A scalar.
        """
        if self._regularizer is not None:
            return self._regularizer(model)
        if self._foreign is not None:
            value = self._foreign.train_regularization(_flat(model))
            return torch.as_tensor(value)
        return None

    def query(self, target: TargetLike) -> Target:
        """Return a query that knows this objective's task.

        Args:
            target: Any target; None means the loss.

        Returns:
            The target.
        """
        return as_target(Loss() if target is None else target, self.task)

    def query_losses(self, model: nn.Module, batch: Any, query: Target) -> Tensor:
        """Return L_q of each example: the query, turned so that less of it is better.

        Args:
            model: The model.
            batch: A batch of queries.
            query: What is asked about.

        Returns:
            Shape ``[example]``.
        """
        if self._foreign is not None and isinstance(query, Loss):
            value = self._foreign.test_loss(model=model, params=_flat(model), batch=batch)
            return torch.as_tensor(value).reshape(1)
        return turned(query, self.outputs(model, batch), batch)

    def asks_by_itself(self, query: Target) -> bool:
        """Say whether a query is more than a function of the model's outputs on a batch.

        Args:
            query: The query.

        Returns:
            Whether it has to be asked one example at a time, of the model itself.
        """
        return self._foreign is not None and isinstance(query, Loss)

    @property
    def own_task(self) -> Task | None:
        """The task, if the user gave one; None for an objective of another library."""
        return None if self._foreign is not None else self.task

    @property
    def next_token(self) -> NextToken | None:
        """The task, where its losses can be split over tokens."""
        return self.task if isinstance(self.task, NextToken) else None


class _Foreign(Task):
    """A torch-influence objective as a task: its mean loss, taken one example at a time."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = self.objective.train_outputs(model, batch)
        return found

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.stack(
            [
                self.objective.train_loss_on_outputs(outputs[i : i + 1], row(batch, i))
                for i in range(len(outputs))
            ]
        )


def as_objective(objective: Any) -> Objective:
    """Return an objective.

    Args:
        objective: An `Objective`, or anything that one can be made of.

    Returns:
        The objective.
    """
    return objective if isinstance(objective, Objective) else Objective(objective)


def turned(query: Target, outputs: Tensor, batch: Any) -> Tensor:
    """Return a query of each example, turned so that less of it is better.

    Args:
        query: What is asked about.
        outputs: Of the model.
        batch: The batch of queries.

    Returns:
        Shape ``[example]``.
    """
    value = query(outputs, batch)
    return -value if query.higher_is_better else value


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.reshape(-1) for p in model.parameters()])
