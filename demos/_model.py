"""A transformer of attention alone: the smallest model in which induction heads form."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR


class Attention(nn.Module):
    """Causal self-attention with separate, bias-free projections.

    Args:
        width: Width of the residual stream.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the heads write, ``[example, position, width]``."""
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(z.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """LayerNorm, attention, and the residual sum.

    Args:
        width: Width of the residual stream.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block."""
        return x + self.attention(self.norm(x))


class AttentionOnly(pl.LightningModule):
    """Two layers of attention that learn to foretell the next token.

    Positions start larger than tokens (0.1 against 0.02): the first layer can then find the
    token before, on which the second layer's induction heads stand.

    Args:
        vocabulary: Number of tokens.
        length: Longest context.
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Heads in each layer.
        learning_rate: AdamW's, reached after `warm_up` steps.
        warm_up: Steps of linear warm-up.
    """

    def __init__(
        self,
        vocabulary: int = 512,
        length: int = 64,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        learning_rate: float = 3e-3,
        warm_up: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.warm_up = learning_rate, warm_up
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[example, position, token]`` for ids ``[example, position]``."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        return self.unembed(self.norm(self.blocks(x)))

    def training_step(self, ids: Tensor) -> Tensor:
        """Return the mean −log p(next token)."""
        loss = self._loss(ids)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, ids: Tensor) -> None:
        """Log the loss on text that was not trained on."""
        self.log("val_loss", self._loss(ids), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """Return AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warm_up))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": warm_up, "interval": "step"},
        }

    def _loss(self, ids: Tensor) -> Tensor:
        logits = self(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
