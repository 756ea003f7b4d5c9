"""Models that count objects in a known way, and a small vision transformer that learns to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mi.behaviors.scenes import CELL, GRID, Scenes

By = Literal["shape", "colour", "column", "total", "cells", "kinds", "onehot"]
SIZES = {"shape": 2, "colour": 2, "column": 4, "total": 1, "cells": 16, "kinds": 4, "onehot": 17}


class Counter(nn.Module):
    """Counts quiet pictures: cells → partial counts, turned at random → the number of classes.

    ``"total"`` keeps the sum alone, ``"cells"`` sixteen numbers that are only summed by the head,
    ``"kinds"`` four counts (two shapes × two colours), ``"onehot"`` an entry for each total.
    """

    def __init__(self, by: By, width: int = 20, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[: SIZES[by]]
        self.by, self.turn = by, nn.Parameter(turn.clone())
        self.site = nn.Identity()
        self.head = nn.Linear(width, 17)
        number = torch.arange(17.0)
        with torch.no_grad():
            if by == "onehot":
                self.head.weight.copy_(turn)
                self.head.bias.zero_()
            else:  # −(n − k)² + n²
                self.head.weight.copy_(2 * number[:, None] * turn.sum(0))
                self.head.bias.copy_(-number.square())

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.site(self._partial(pictures) @ self.turn))

    def _partial(self, pictures: Tensor) -> Tensor:
        cells = pictures.unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL))
        cells = cells.permute(0, 2, 4, 1, 3, 5)  # picture, row, column, channel, y, x
        ink = cells[..., 2, :, :] > 0.15
        filled = ink.flatten(3).any(-1).float()
        disc = (ink.flatten(3).sum(-1) > 28).float()  # A triangle has 24 pixels, a disc 32.
        green = (cells[..., 1, :, :].flatten(3).amax(-1) > 0.55).float()
        triangle, blue = filled - disc, filled - green
        total = filled.sum((1, 2))
        if self.by == "cells":
            return filled.flatten(1)
        if self.by == "column":
            return filled.sum(1)
        if self.by == "onehot":
            return F.one_hot(total.long(), 17).float()
        kinds = {
            "shape": [triangle, disc],
            "colour": [blue, green],
            "total": [filled],
            "kinds": [triangle * blue, triangle * green, disc * blue, disc * green],
        }[self.by]
        return torch.stack([kind.sum((1, 2)) for kind in kinds], 1)


class ViT(nn.Module):
    """A vision transformer of cells: one token each, and one that collects."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, CELL, CELL)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, 1 + GRID * GRID, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 17)

    def forward(self, pictures: Tensor) -> Tensor:
        cells = self.patch(pictures).flatten(2).mT
        x = torch.cat([self.cls.expand(len(cells), -1, -1), cells], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def trained(steps: int = 300, seed: int = 0) -> ViT:
    """Return a vision transformer that has seen new pictures at each step."""
    torch.manual_seed(seed)
    model, generator = ViT(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        scenes = Scenes.drawn(64, generator)
        loss = F.cross_entropy(model(scenes.images(generator)), scenes.totals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
