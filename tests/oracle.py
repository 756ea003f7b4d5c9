"""Models whose circuits are known because they were built by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """One head with given matrices, rows as vectors: q = x·W_Q, out = A·v·W_O, no scale."""

    def __init__(self, W_Q: Tensor, W_K: Tensor, W_V: Tensor, W_O: Tensor) -> None:
        super().__init__()
        self.W_Q, self.W_K = nn.Parameter(W_Q), nn.Parameter(W_K)
        self.W_V, self.W_O = nn.Parameter(W_V), nn.Parameter(W_O)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x @ W)[:, None] for W in (self.W_Q, self.W_K, self.W_V))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return z[:, 0] @ self.W_O


class Oracle(nn.Module):
    """Induction by construction: a previous-token head, and a head that matches what it copied.

    The residual stream is [token one-hot | position one-hot | "previous" slot]. Head 0.0 attends
    from position t to t − 1 with gain β and copies the token into the slot; head 1.0 matches its
    own token with the slot, gain β, and copies the token it finds; the unembedding reads the token
    part. β → ∞ gives a perfect circuit, β = 0 none at all.
    """

    def __init__(self, beta: float, vocabulary: int = 40, positions: int = 33) -> None:
        super().__init__()
        V, P = vocabulary, positions
        width, size = 2 * V + P, max(V, P)
        token = torch.zeros(width, size)
        token[:V, :V] = torch.eye(V)
        place = torch.zeros(width, size)
        place[V : V + P, :P] = torch.eye(P)
        slot = torch.zeros(width, size)
        slot[V + P :, :V] = torch.eye(V)
        before = torch.zeros(size, size)
        before[torch.arange(1, P), torch.arange(P - 1)] = beta
        self.V, self.P = V, P
        self.layers = nn.ModuleList(
            [
                Attention(place @ before, place, token, slot.T.clone()),
                Attention(beta * token, slot, token.clone(), token.T.clone()),
            ]
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return the residual stream before the first layer."""
        tokens = F.one_hot(ids, self.V)
        places = F.one_hot(torch.arange(ids.shape[1]), self.P).expand(len(ids), -1, -1)
        return torch.cat([tokens, places, torch.zeros_like(tokens)], 2).float()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x[..., : self.V]


class FixedOffset(nn.Module):
    """One head that attends at a fixed offset whatever the tokens are."""

    def __init__(self, offset: int, vocabulary: int = 200, positions: int = 80) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 8)
        move = torch.zeros(positions, positions)
        move[torch.arange(offset, positions), torch.arange(positions - offset)] = 50.0
        self.move = nn.Parameter(move)

    def forward(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        x = self.table(ids)
        places = torch.eye(len(self.move))[:T].expand(len(ids), 1, -1, -1)
        z = F.scaled_dot_product_attention(
            places @ self.move, places, x[:, None], is_causal=True, scale=1.0
        )
        return z[:, 0] @ self.table.weight.T
