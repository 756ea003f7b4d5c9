"""Small models, data and measurements that several tests use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_mi import Context, Panel, Reading

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
VOCABULARY, LENGTH, WIDTH = 17, 10, 16


def lightning(package: str = "pytorch_lightning") -> Any:
    """Return one of the two Lightning packages."""
    return importlib.import_module(package)


def same(a: Any, b: Any) -> bool:
    """Bit-equality of nested containers."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Tokens(Dataset[Tensor]):
    """Random token sequences, addressed by index."""

    def __init__(self, size: int = 48, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


class Block(nn.Module):
    """Pre-norm attention with dropout inside the kernel."""

    def __init__(self, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for p in self.qkv(self.norm(x)).chunk(3, -1)
        )
        rate = self.dropout if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        return x + self.out(z.transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Everything that a careless measurement would disturb: batch norm, dropout, frozen parts."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(2, dropout) for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.frozen = nn.BatchNorm1d(WIDTH)
        self.frozen.requires_grad_(False)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.hook_calls = 0
        self.head.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.hook_calls += 1

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.frozen(self.batch_norm(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.drop(x))


def language_model(package: str = "pytorch_lightning", **options: Any) -> Any:
    """Return a LightningModule of the given package that trains `Network` on next tokens."""
    pl = lightning(package)

    class LanguageModel(pl.LightningModule):
        def __init__(self, scheduler: bool = False, dropout: float = 0.1, lr: float = 0.01) -> None:
            super().__init__()
            self.net = Network(dropout)
            self.scheduler, self.lr = scheduler, lr
            self.losses: list[Tensor] = []
            self.order: list[Tensor] = []

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids)

        def on_train_epoch_start(self) -> None:
            self.net.frozen.eval()

        def step(self, ids: Tensor) -> Tensor:
            logits = self(ids)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.step(batch)
            self.losses.append(loss.detach().clone())
            self.order.append(batch[:, 0].clone())
            return loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.step(batch)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.step(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            if not self.scheduler:
                return optimizer
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return LanguageModel(**options)


def loaders(train: int = 48, validation: int = 16, batch: int = 8) -> tuple[Any, Any]:
    """Return a shuffled training loader and a validation loader."""
    first = DataLoader(Tokens(train), batch, shuffle=True)
    second = DataLoader(Tokens(validation), batch)
    return first, second


def trainer(package: str = "pytorch_lightning", **options: Any) -> Any:
    """Return a silent CPU Trainer of the given package."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 6,
    }
    return lightning(package).Trainer(**{**defaults, **options})


@dataclass(frozen=True)
class Norm:
    """A measurement that needs nothing: the sum of squares of all weights."""

    name: str = "norm"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        total = sum(p.double().square().sum() for p in model.parameters())
        return {"squared": Panel(torch.as_tensor(total))}


@dataclass(frozen=True)
class Failing:
    """A measurement that fails from its second call on."""

    name: str = "failing"
    after: int = 1

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        if context.step >= self.after:
            raise RuntimeError("this measurement fails on purpose")
        return {"zero": Panel(torch.zeros(()))}


@dataclass(frozen=True)
class Gradients:
    """A measurement that takes gradients of weights and of inputs, and draws random numbers."""

    name: str = "gradients"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        loss = context.task.loss(context.task.outputs(model, context.batch), context.batch).sum()
        free = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, free, allow_unused=True)
        size = sum(g.square().sum() for g in grads if g is not None)
        return {"squared": Panel(size), "noise": Panel(torch.rand(()))}
