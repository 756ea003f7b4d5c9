"""Models whose causal circuits are known: induction among distractors, names, gates, two hops.

Every model is written in a basis in which each entry of the residual stream has a meaning, and
then turned by a random rotation, so that nothing can be read off single entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mi import Behavior, LogitDifference
from lightning_mi.behavior import as_behavior

BETA = 30.0


@dataclass
class HeadWeights:
    """Matrices of one head; rows are vectors, no scale."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor


class Heads(nn.Module):
    """Attention of several heads with given matrices."""

    def __init__(self, heads: Sequence[HeadWeights], turn: Tensor) -> None:
        super().__init__()
        for name in ("W_Q", "W_K", "W_V"):
            weight = torch.stack([turn.T @ getattr(h, name) for h in heads])
            setattr(self, name, nn.Parameter(weight))
        self.W_O = nn.Parameter(torch.stack([h.W_O @ turn for h in heads]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, W) for W in (self.W_Q, self.W_K, self.W_V))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return torch.einsum("bhtk,hkd->btd", z, self.W_O)


class Gate(nn.Module):
    """relu(x W + b) W', with given matrices."""

    def __init__(self, W_in: Tensor, bias: Tensor, W_out: Tensor, turn: Tensor) -> None:
        super().__init__()
        self.W_in, self.bias = nn.Parameter(turn.T @ W_in), nn.Parameter(bias)
        self.W_out = nn.Parameter(W_out @ turn)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.W_in + self.bias).relu() @ self.W_out


class Built(nn.Module):
    """Embeddings, blocks that are added to the stream one after the other, an unembedding."""

    def __init__(self, E: Tensor, P: Tensor, blocks: Sequence[nn.Module], U: Tensor, turn: Tensor):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(E @ turn, freeze=False)
        self.pos = nn.Embedding.from_pretrained(P @ turn, freeze=False)
        self.blocks = nn.ModuleList(blocks)
        self.unembed = nn.Linear(U.shape[0], U.shape[1], bias=False)
        self.unembed.weight = nn.Parameter((turn.T @ U).T.contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = x + block(x)
        return self.unembed(x)


def rotation(width: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def units(width: int, *blocks: tuple[int, int]) -> list[Tensor]:
    """Return for each (start, size) the matrix that writes a one-hot into that part."""
    found = []
    for start, size in blocks:
        part = torch.zeros(size, width)
        part[:, start : start + size] = torch.eye(size)
        found.append(part)
    return found


def wide(matrix: Tensor, size: int) -> Tensor:
    """Fill the columns of a matrix up with zeros."""
    return F.pad(matrix, (0, size - matrix.shape[1]))


def induction(beta: float = BETA, V: int = 12, P: int = 8, *, turned: bool = True) -> Built:
    """Return an induction circuit, L0H0 → L1H0.k, beside a distractor head in each layer.

    The stream is [token | position | previous token | nobody reads this]. L0H1 attends evenly and
    writes where L1H1 alone reads; L1H1 writes there again.
    """
    width = 3 * V + P
    token, place, slot = units(width, (0, V), (V, P), (V + P, V))
    (junk,) = units(width, (2 * V + P, V))
    size = max(V, P)
    before = torch.zeros(P, P)
    before[torch.arange(1, P), torch.arange(P - 1)] = beta
    zero = torch.zeros(width, size)

    def narrow(matrix: Tensor) -> Tensor:
        return wide(matrix.T, size)

    def out(matrix: Tensor) -> Tensor:
        return F.pad(matrix, (0, 0, 0, size - len(matrix)))

    def head(Q: Tensor, K: Tensor, V_: Tensor, O: Tensor) -> HeadWeights:  # noqa: E741
        return HeadWeights(Q, K, V_, O)

    previous = head(narrow(before.T @ place), narrow(place), narrow(token), out(slot))
    idle = head(zero, zero, narrow(token), out(junk))
    match = head(beta * narrow(token), narrow(slot), narrow(token), out(token))
    busy = head(narrow(junk), narrow(token), narrow(junk), out(0.5 * junk))
    turn = rotation(width) if turned else torch.eye(width)
    blocks = [Heads([previous, idle], turn), Heads([match, busy], turn)]
    return Built(token, place, blocks, token.T.contiguous(), turn)


def repeats(V: int = 12, P: int = 8, pairs: int = 4) -> Behavior:
    """Return prompts … A B … A, and the same with another token before B."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.randperm(V, generator=generator)[: P - 1] for _ in range(pairs)])
    at = torch.arange(pairs) % (P - 4) + 1
    line = torch.arange(pairs)
    last = rows[line, at]
    clean = torch.cat([rows, last[:, None]], 1)
    corrupted = clean.clone()
    spare = torch.stack(
        [torch.tensor([t for t in range(V) if t not in row]) for row in rows.tolist()]
    )
    corrupted[line, at] = spare[:, 0]
    answers = rows[line, at + 1]
    return Behavior(clean, corrupted, answers=answers, wrong=spare[:, 1], name="repeats")


def gate(kind: Literal["and", "or"], *, hop: bool = False) -> Built:
    """Return a gate of two bits, each carried by a head of its own to the MLP.

    Tokens are 0 and 1. Without ``hop`` L0H0 carries the bit of position 0, L0H1 that of position
    1; with it both carry that of position 0, so that under ``"or"`` one of them is redundant, and
    a head of the next layer, L1H0, carries the answer on from position 1 to the end. The logit of
    token 1 is the answer, that of token 0 is 0.
    """
    P, width = 4, 9
    bit, place = torch.zeros(2, width), torch.zeros(P, width)
    bit[1, 0] = 1.0
    place[:, 1:5] = torch.eye(P)
    a, b, made, end = (torch.eye(width)[i : i + 1] for i in (5, 6, 7, 8))
    always = place.sum(0)

    def carry(position: int, read: Tensor, write: Tensor) -> HeadWeights:
        Q, K = torch.zeros(width, 2), torch.zeros(width, 2)
        Q[:, 0] = BETA * always
        K[:, 0] = place[position]
        return HeadWeights(Q, K, wide(read.T, 2), F.pad(write, (0, 0, 0, 1)))

    turn = rotation(width)
    heads = Heads([carry(0, bit[1:], a), carry(0 if hop else 1, bit[1:], b)], turn)
    if kind == "and":  # relu(a + b − 1)
        unit = Gate((a + b).T, torch.tensor([-1.0]), made, turn)
    else:  # relu(a + b) − relu(a + b − 1) = min(a + b, 1)
        unit = Gate(
            (a + b).T.repeat(1, 2), torch.tensor([0.0, -1.0]), torch.cat([made, -made]), turn
        )
    blocks: list[nn.Module] = [heads, unit]
    if hop:
        blocks.append(Heads([carry(1, made, end)], turn))
    U = torch.zeros(width, 2)
    U[8 if hop else 7, 1] = 1.0
    return Built(bit, place, blocks, U, turn)


def bits(hop: bool = False) -> Behavior:
    """Return prompts with both bits on, and with both bits off."""
    clean = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]])
    corrupted = clean.clone()
    corrupted[:, 0] = 0
    if not hop:
        corrupted[:, 1] = 0
    return as_behavior(Behavior(clean, corrupted, target=LogitDifference(1, other=0), name="bits"))


def names(beta: float = BETA, N: int = 6) -> Built:
    """Return a circuit for indirect objects: duplicate token, S-inhibition, name mover.

    Prompts are two names, one of them again, and an end; the answer is the other name. The stream
    is [token | position | where the name stood before | where not to look]. L0H0 looks from a name
    to where it stood first and writes that place, L1H0 carries the place to the end, and L2H0
    looks from the end to the first two names, but not to that place, and copies. Beside each
    stands a head that attends evenly and writes where nobody reads.
    """
    V, P = N + 1, 4
    width = 2 * V + 3 * P
    token, place, before, avoid = units(width, (0, V), (V, P), (V + P, P), (V + 2 * P, P))
    (junk,) = units(width, (V + 3 * P, V))
    size = width
    end, early = token[N], place[0] + place[1]
    zero = torch.zeros(width, size)

    def maps(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the matrix that sends each first row to the second one."""
        return sum((a.T @ b for a, b in pairs), torch.zeros(width, width))

    # A query is what is looked for: keys are the stream itself.
    keys = torch.eye(width)
    always = (place.sum(0)[None], early[None])
    duplicate = HeadWeights(beta * maps((token, token), always), keys, maps((place, before)), keys)
    inhibit = HeadWeights(beta * maps((end[None], place[2:3])), keys, maps((before, avoid)), keys)
    mover_reads = maps((end[None], early[None]), (avoid, -place))
    mover = HeadWeights(beta * mover_reads, keys, maps((token[:N], token[:N])), 2 * keys)
    idle = HeadWeights(zero, zero, maps((token, junk)), keys)
    turn = rotation(width)
    blocks = [Heads([own, idle], turn) for own in (duplicate, inhibit, mover)]
    return Built(token, place, blocks, token.T.contiguous(), turn)


def sentences(N: int = 6, pairs: int = 8) -> Behavior:
    """Return prompts A B B, A B A with an end, corrupted by the other name the second time."""
    generator = torch.Generator().manual_seed(0)
    two = torch.stack([torch.randperm(N, generator=generator)[:2] for _ in range(pairs)])
    again = torch.arange(pairs) % 2
    rows = torch.arange(pairs)
    subject, other = two[rows, again], two[rows, 1 - again]
    end = torch.full((pairs,), N)
    clean = torch.stack([two[:, 0], two[:, 1], subject, end], 1)
    corrupted = torch.stack([two[:, 0], two[:, 1], other, end], 1)
    where = {"subject": torch.full((pairs,), 2), "answer": 1 - again, "wrong": again}
    return Behavior(
        clean, corrupted, answers=other, wrong=subject, positions=where, name="sentences"
    )
