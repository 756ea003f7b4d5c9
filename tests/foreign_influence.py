"""A library of the kind of torch-influence, written for these tests: objective and solver.

The same conventions: an objective of four methods whose losses are means and whose ``test_loss`` is
called by keyword; a module that holds model, loaders and damping and answers
``influences(train_idxs, test_idxs)`` with
``(1/n) (∇ℓᵢ + ∇R)ᵀ (∇²(mean ℓ + R) + damp I)⁻¹ ∇ mean test_loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate


class ForeignObjective:
    """Cross-entropy and weight decay over flat parameters."""

    def __init__(self, decay: float = 0.01) -> None:
        self.decay = decay

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return self.decay / 2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class ForeignModule:
    """Inverts the whole Hessian; its arguments are those of AutogradInfluenceModule."""

    def __init__(
        self,
        model: nn.Module,
        objective: Any,
        train_loader: DataLoader[Any],
        test_loader: DataLoader[Any],
        device: torch.device,
        damp: float,
    ) -> None:
        self.model, self.objective, self.damp = model, objective, damp
        self.train, self.test = train_loader.dataset, test_loader.dataset
        self.params = {n: p.detach() for n, p in model.named_parameters()}
        self.flat = torch.cat([p.flatten() for p in self.params.values()])
        whole = self._batch(self.train, range(len(self.train)))  # type: ignore[arg-type]
        size = len(self.flat)
        hessian: Any = torch.autograd.functional.hessian(
            lambda flat: self._train_loss(flat, whole), self.flat
        )
        self.hessian = hessian + damp * torch.eye(size, dtype=hessian.dtype)

    def _batch(self, dataset: Any, indices: Any) -> Any:
        return default_collate([dataset[int(i)] for i in indices])

    def _shaped(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [p.numel() for p in self.params.values()])
        return {
            n: part.reshape(p.shape)
            for part, (n, p) in zip(parts, self.params.items(), strict=True)
        }

    def _called(self, flat: Tensor) -> Any:
        return lambda x: functional_call(self.model, self._shaped(flat), (x,))

    def _train_loss(self, flat: Tensor, batch: Any) -> Tensor:
        outputs = self.objective.train_outputs(self._called(flat), batch)
        loss = self.objective.train_loss_on_outputs(outputs, batch)
        return loss + self.objective.train_regularization(flat)

    def _test_loss(self, flat: Tensor, batch: Any) -> Tensor:
        return self.objective.test_loss(model=self._called(flat), params=flat, batch=batch)

    def influences(self, train_idxs: Any, test_idxs: Any) -> Tensor:
        asked = torch.func.grad(self._test_loss)(self.flat, self._batch(self.test, test_idxs))
        solved = torch.linalg.solve(self.hessian, asked)
        rows = [
            torch.func.grad(self._train_loss)(self.flat, self._batch(self.train, [i]))
            for i in train_idxs
        ]
        return torch.stack(rows) @ solved / len(self.train)  # type: ignore[arg-type]
