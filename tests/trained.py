"""A transformer of two layers in which induction heads have formed, trained in seconds."""

from __future__ import annotations

import copy
import functools

import torch
from _model import AttentionOnly
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 64, 64


def chunks(batch: int, generator: torch.Generator) -> Tensor:
    """Return texts made of eight chunks of two to four tokens, in any order, again and again.

    All tokens of a text's chunks are distinct, so only the token before says what comes next.
    """
    rows = []
    for _ in range(batch):
        tokens = torch.randperm(VOCABULARY, generator=generator)
        sizes = torch.randint(2, 5, (8,), generator=generator).tolist()
        table = torch.split(tokens[: sum(sizes)], sizes)
        order = torch.randint(0, 8, (LENGTH // 2,), generator=generator).tolist()
        rows.append(torch.cat([table[i] for i in order])[:LENGTH])
    return torch.stack(rows)


@functools.cache
def trained(steps: int = 700, heads: int = 2) -> tuple[nn.Module, nn.Module]:
    """Return the model after training and before it, both in evaluation mode."""
    torch.manual_seed(0)
    model = AttentionOnly(VOCABULARY, LENGTH, heads=heads)
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        ids = chunks(32, generator)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), before.eval()
