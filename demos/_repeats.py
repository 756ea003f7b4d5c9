"""Texts, half of which say a random passage again, and a small transformer that reads them.

What a head that forms on it has learned from is known: the repeated passages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from _model import AttentionOnly
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_mi import NextToken
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import HeadScores, head_scores

TOKENS, LENGTH = 40, 32
SHORTEST, LONGEST = 6, 14
"""Passages of other lengths in every text: looking a fixed way back does not find them."""
PROTOCOL = RepeatedTokens(length=12, sequences=8, seed=1)
QUERY = HeadScores(tokens=PROTOCOL)


WIDTH = 64


@dataclass(frozen=True)
class Corpus:
    """Texts; the first half of them says a random passage again and again, the rest are a chain's.

    Args:
        texts: Ids ``[text, position]``.
        repeats: Which of them repeat, ``[text]``.
        shuffled: The repeating ones with the tokens of the second passage in another order.
    """

    texts: Tensor
    repeats: Tensor
    shuffled: Tensor

    @classmethod
    def drawn(cls, count: int = 2000, seed: int = 0) -> Corpus:
        """Draw random passages that are repeated, and texts of a chain with few usual successors.

        Args:
            count: Number of texts.
            seed: Of the draw.

        Returns:
            The texts.
        """
        draw = torch.Generator().manual_seed(seed)
        chain = 0.1 / TOKENS + torch.zeros(TOKENS, TOKENS)
        for row in chain:
            row[torch.randperm(TOKENS, generator=draw)[:8]] += 0.9 / 8
        texts = torch.randint(0, TOKENS, (count, LENGTH), generator=draw)
        repeats = torch.arange(count) < count // 2
        for t in range(1, LENGTH):
            known = chain[texts[~repeats, t - 1]]
            texts[~repeats, t] = torch.multinomial(known, 1, generator=draw)[:, 0]
        lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw)
        for row, length in zip(texts[: count // 2], lengths, strict=False):
            row[length:] = row[:length].repeat(LENGTH)[: LENGTH - length]
        shuffled = texts[repeats].clone()
        for row, length in zip(shuffled, lengths, strict=False):
            row[length:] = row[length:][torch.randperm(LENGTH - int(length), generator=draw)]
        return cls(texts, repeats, shuffled)

    @property
    def dataset(self) -> TensorDataset:
        """The texts by index."""
        return TensorDataset(self.texts)


@dataclass
class Trained:
    """A run.

    Args:
        model: The model at the end.
        steps: When the heads were scored.
        scores: Induction score of each head at those steps ``[step, layer, head]``.
        states: Weights at those steps, where they were kept.
    """

    model: AttentionOnly
    steps: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def head(self) -> tuple[int, int]:
        """Layer and head of the best induction head at the end."""
        best = int(self.scores[-1].argmax())
        return best // self.scores[-1].shape[1], best % self.scores[-1].shape[1]

    def onset(self, threshold: float = 0.3) -> float:
        """Return the step at which the best head's score passes a threshold, between two scorings.

        Args:
            threshold: The score.

        Returns:
            The step; NaN if it never does.
        """
        best = [float(s.max()) for s in self.scores]
        for i in range(1, len(best)):
            if best[i] >= threshold > best[i - 1]:
                share = (threshold - best[i - 1]) / (best[i] - best[i - 1])
                return self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1])
        return float("nan")


def train(
    texts: Tensor,
    *,
    seed: int = 0,
    steps: int = 1000,
    every: int = 25,
    rate: float = 3e-3,
    keep: bool = False,
    until: float = 2.0,
) -> Trained:
    """Train a model from scratch.

    Args:
        texts: Ids ``[text, position]``.
        seed: Of the first weights and of the order of the texts.
        steps: Steps of AdamW.
        every: Steps between two scorings of the heads.
        rate: AdamW's learning rate.
        keep: Keep the weights at each scoring.
        until: Stop when the best head's score is past this.

    Returns:
        The run.
    """
    torch.manual_seed(seed)
    model = AttentionOnly(TOKENS, LENGTH, width=WIDTH, heads=4, warm_up=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    task, found = NextToken(), Trained(model)
    ids = PROTOCOL.tokens(TOKENS)
    for step in range(steps + 1):
        if step % every == 0:
            found.steps.append(step)
            with torch.no_grad():
                found.scores.append(head_scores(model, ids)["induction"])
            if keep:
                found.states[step] = {n: v.clone() for n, v in model.state_dict().items()}
            if float(found.scores[-1].max()) > until:
                break
        batch = texts[torch.randint(0, len(texts), (32,))]
        loss = task.loss(model(batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found
