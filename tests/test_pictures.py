"""What a person sees of attributions: over images, as strips, as bars, and over steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mi import Context, Panel, Record, Run, measure
from lightning_mi.attribution import IntegratedGradients, Saliency
from lightning_mi.beneath import grey
from lightning_mi.pieces import piecewise
from lightning_mi.report.data import payload
from lightning_mi.report.pack import unpack
from lightning_mi.sinks.canvas import Canvas
from lightning_mi.sinks.grid import chosen, over_steps
from lightning_mi.sinks.keys import plan
from lightning_mi.sinks.oklab import from_oklab, to_oklab
from lightning_mi.sinks.overlay import heat, largest_pixel, picture
from lightning_mi.sinks.pictures import Scales, caption, draw
from lightning_mi.sinks.strip import draw_strip
from lightning_mi.sinks.texts import readable

IMAGE = ("example", "channel", "y", "x")


def images(count: int = 3, channels: int = 3) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small model of images that are not square, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    batch = (torch.randn(count, channels, 5, 8), torch.arange(count) % 4)
    model(batch[0])
    return model, batch


def by_name(records: list[Record]) -> dict[str, Panel]:
    return {record.name: record.panel for record in records}


# ---------------------------------------------------------------- what lies beneath


def test_images_are_recorded_in_grey_beside_their_attributions() -> None:
    model, batch = images()
    found = by_name(measure(model, [Saliency(examples=2)], batch=batch))["saliency/inputs"]
    assert found.axes == ("example", "y", "x")
    assert found.values.dtype == torch.uint8
    x = batch[0][:2]
    level = 0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2]
    low, high = level.amin((1, 2), True), level.amax((1, 2), True)
    expected = 255 * (level - low) / (high - low)
    assert (found.values.double() - expected.double()).abs().max() <= 0.51
    assert found.convention["display"] == {}


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_of_other_numbers_of_channels_the_mean_is_taken(channels: int) -> None:
    x = torch.rand(1, channels, 3, 4)
    x[0, :, 0, 0], x[0, :, 2, 3] = 0.0, 1.0
    torch.testing.assert_close(grey(x)[0], (255 * x[0].mean(0)).round().to(torch.uint8))


def test_constant_and_undefined_images_are_black() -> None:
    x = torch.full((2, 1, 2, 2), 3.0)
    x[1] = float("nan")
    assert grey(x).tolist() == [[[0, 0], [0, 0]]] * 2


def test_half_precision_images_are_recorded() -> None:
    model, (x, y) = images()
    found = by_name(measure(model.bfloat16(), [Saliency()], batch=(x.bfloat16(), y)))
    assert found["saliency/inputs"].values.dtype == torch.uint8


def test_features_carry_the_names_that_the_model_knows() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    plain = by_name(measure(model, [Saliency()], batch=batch))
    assert "feature" not in plain["saliency/values"].coords
    model.feature_names = np.array(["age", "height", "weight"])  # type: ignore[assignment]
    named = by_name(measure(model, [Saliency()], batch=batch))
    assert named["saliency/values"].coords["feature"] == ["age", "height", "weight"]
    assert torch.equal(named["saliency/inputs"].values, batch[0])
    model.feature_names = ["too", "few"]  # type: ignore[assignment]
    assert (
        "feature"
        not in by_name(measure(model, [Saliency()], batch=batch))["saliency/values"].coords
    )


def test_classes_carry_the_names_that_the_model_knows() -> None:
    model, batch = images()
    model.class_names = ["cat", "dog", "cow", "hen"]  # type: ignore[assignment]
    found = by_name(measure(model, [Saliency()], batch=batch))["saliency/values"]
    assert found.convention["target_text"] == ["cat", "dog", "cow"]


def test_other_readings_are_left_alone() -> None:
    class Mine:
        name = "mine"

        def __call__(self, model: nn.Module, context: Context) -> dict[str, Panel]:
            return {"values": Panel(torch.rand(2, 3), ("layer", "head")), "n": Panel(1.0)}

    model, batch = images()
    assert set(by_name(measure(model, [Mine()], batch=batch))) == {"mine/values", "mine/n"}


def test_measurements_of_the_users_own_lie_over_their_images_too() -> None:
    class Mine:
        name = "mine"

        def __call__(self, model: nn.Module, context: Context) -> dict[str, Panel]:
            return {"values": Panel(torch.rand(2, 5, 8), ("example", "y", "x"))}

    model, batch = images()
    assert by_name(measure(model, [Mine()], batch=batch))["mine/inputs"].size["example"] == 2


# ---------------------------------------------------------------- colours


def test_oklab_spaces_greys_evenly_and_undoes_itself() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (50, 3))
    assert np.abs(from_oklab(to_oklab(colours)).astype(int) - colours).max() <= 1
    # Ottosson 2020, table of test values: sRGB red has L 0.628, a 0.225, b 0.126.
    np.testing.assert_allclose(to_oklab(np.array([255, 0, 0])), [0.628, 0.225, 0.126], atol=1e-3)


def test_zero_is_the_image_and_colour_grows_with_the_size() -> None:
    beneath = np.full((1, 5), 0.5)
    beneath[0, 0] = 1.0
    drawn = heat(np.array([[0.0, 0.0, 0.25, 0.5, 1.0]]), 1.0, True, beneath)
    times = drawn.shape[1] // 5
    middle = drawn[times // 2, times // 2 :: times].astype(int)
    assert (middle[:2].max(1) == middle[:2].min(1)).all()  # grey
    chroma = np.hypot(*to_oklab(middle)[:, 1:].T)
    np.testing.assert_allclose(chroma[2:] / chroma[4], [0.25, 0.5, 1.0], atol=0.03)


def test_equal_sizes_of_both_signs_are_equally_far_from_the_image() -> None:
    drawn = heat(np.array([[-0.5, 0.5]]), 1.0, True)
    left, right = drawn[20, 20].astype(int), drawn[20, -20].astype(int)
    assert left[0] > left[2]  # orange opposes
    assert right[2] > right[0]  # blue supports


def test_scale_of_few_pixels_is_not_zero() -> None:
    values = torch.zeros(1, 1, 30, 30)
    assert largest_pixel(Record("v/values", Panel(values, IMAGE))) == 1e-12
    values[0, 0, 3, 3] = 2.0
    assert largest_pixel(Record("v/values", Panel(values, IMAGE))) == 2.0


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (1, 1), (400, 10)])
def test_no_shape_is_distorted(shape: tuple[int, int]) -> None:
    drawn = picture(np.random.default_rng(0).random(shape))
    assert drawn.shape[0] * shape[1] == drawn.shape[1] * shape[0]


# ---------------------------------------------------------------- over steps


def over_run(steps: int, axes: tuple[str, ...] = IMAGE) -> list[Record]:
    draws = torch.Generator().manual_seed(0)
    sizes = {"example": 2, "channel": 1, "y": 6, "x": 4, "position": 5, "feature": 3}
    values = [torch.randn([sizes[a] for a in axes], generator=draws) for _ in range(steps)]
    facts = {"target_text": ["3", "5"], "method": "saliency"}
    made = [
        Record("v/values", Panel(v, axes, convention=facts), step=10 * i)
        for i, v in enumerate(values)
    ]
    beneath = Panel(torch.zeros(2, 6, 4, dtype=torch.uint8), ("example", "y", "x"))
    return [*made, *(Record("v/inputs", beneath, r.step) for r in made if "x" in axes)]


@pytest.mark.parametrize("axes", [IMAGE, ("example", "position"), ("example", "feature")])
@pytest.mark.parametrize("steps", [2, 3, 40])
def test_one_picture_shows_a_run(axes: tuple[str, ...], steps: int) -> None:
    (shown,) = over_steps(over_run(steps, axes))
    assert shown.key == "mi_v/grid"
    few = [r.step for r in chosen(shown.records)]
    assert (few[0], few[-1]) == (0, 10 * (steps - 1))
    assert len(few) == min(steps, {"x": 7, "position": 6, "feature": 3}[axes[-1]])
    drawn = draw(shown, Scales())
    assert drawn.dtype == np.uint8
    assert caption(shown, Scales()).startswith(f"step {', '.join(map(str, few))} ·")


def test_a_run_measured_once_has_no_picture_over_steps() -> None:
    assert over_steps(over_run(1)) == ()
    assert over_steps([]) == ()


def test_columns_of_the_grid_share_one_scale() -> None:
    records = over_run(2)
    records[1] = Record("v/values", Panel(8 * records[1].panel.values, IMAGE), 10)
    (grid,) = over_steps(records)
    (last,) = plan([records[1]]).pictures
    assert Scales().of(grid) == Scales().of(last)


class Words(nn.Module):
    """A model of padded texts."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[..., None].float()
        return self.out((self.words(input_ids) * real).sum(1) / real.sum(1))


def texts_over_steps() -> list[Record]:
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1])}
    decode = lambda row: ["" if i == 0 else f"word{i}" for i in row]  # noqa: E731
    records = []
    for step in range(2):
        context = Context(Words(), batch, decode=decode)
        reading = Saliency()(Words(), context)
        records.append(Record("saliency/values", reading["values"], step))
    return records


def drawn_words(monkeypatch: pytest.MonkeyPatch, shown: Any) -> list[str]:
    """Return all that is written into a picture."""
    written: list[str] = []
    plain = Canvas.text

    def text(self: Canvas, place: Any, words: str, *more: Any) -> None:
        written.append(words)
        plain(self, place, words, *more)

    monkeypatch.setattr(Canvas, "text", text)
    draw(shown, Scales())
    return written


def test_strips_hold_the_words_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = plan(texts_over_steps()[:1]).pictures
    written = drawn_words(monkeypatch, shown)
    boxes = [word for word in written if "example" not in word]
    assert boxes == ["word1", "word2", "word3", "word4", "word5"]  # No box for padding.


def test_texts_over_steps_are_several_with_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = over_steps(texts_over_steps())
    written = drawn_words(monkeypatch, shown)
    assert [w for w in written if "example" in w] == [
        "saliency · example 0: 0", "saliency · example 1: 1",
    ]  # fmt: skip
    assert [w for w in written if w.startswith("step")] == ["step 0", "step 1"] * 2
    assert written.count("word1") == written.count("word5") == 2


def test_the_mark_of_the_target_stays_at_its_word_where_padding_is_left_out() -> None:
    def drawn(place: int) -> Any:
        facts = {"sign": "none", "target_position": [place]}
        words = {"example,position": [["", "", "a", "b"]]}
        values = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        record = Record("s/values", Panel(values, ("example", "position"), words, "1", facts))
        return draw_strip(record, 1.0, 0, "s")

    assert (drawn(2) != drawn(3)).any()
    assert (drawn(0) == drawn(1)).all()


class Pair(nn.Module):
    """Two images and a table, which only together give an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.age = nn.Linear(40, 4), nn.Linear(40, 4), nn.Linear(3, 4)

    def forward(self, left: Tensor, right: Tensor, age: Tensor) -> Tensor:
        found: Tensor = self.left(left.flatten(1)) * self.age(age) + self.right(right.flatten(1))
        return found


def pair() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    images = {key: torch.rand(2, 1, 5, 8) for key in ("left", "right")}
    return Pair(), {**images, "age": torch.rand(2, 3)}


def test_each_of_several_inputs_lies_under_its_own_attributions(tmp_path: Path) -> None:
    model, batch = pair()
    method = IntegratedGradients(of=["left", "right", "age"], target=1)
    run = [measure(model, [method], batch=batch, step=step) for step in (0, 5)]
    panels = by_name(run[0])
    for key in ("left", "right"):
        beneath = panels[f"integrated_gradients/inputs_{key}"].values
        assert torch.equal(beneath, grey(batch[key]))
    assert torch.equal(panels["integrated_gradients/inputs_age"].values, batch["age"])

    shown = {picture.key: picture for picture in plan(run[0]).pictures}
    assert list(shown) == ["mi_integrated_gradients/image", "mi_integrated_gradients/bars"]
    swapped = {**batch, "left": batch["right"], "right": batch["left"]}
    other = plan(measure(model, [method], batch=swapped)).pictures[0]
    both = shown["mi_integrated_gradients/image"]
    scales = Scales()
    assert scales.of(both) > 0
    height = draw(both, scales).shape[0] // 2
    first = draw(both, scales)[:height]
    alone = draw(dataclasses.replace(both, records=both.records[:1]), scales)
    assert (first[: len(alone)] == alone[:height]).all()
    scales.of(other)
    assert (draw(other, scales)[:100] != first[:100]).any()  # the other image lies there
    keys = [one.key for one in over_steps([*run[0], *run[1]])]
    assert keys == [f"mi_integrated_gradients/grid_{key}" for key in ("left", "right", "age")]

    stored = Run.create(tmp_path)
    for records in run:
        stored.write_all(records)
    data = payload(stored)
    assert list(data["pictures"]) == ["integrated_gradients/left", "integrated_gradients/right"]
    for key in ("left", "right"):
        block = data["pictures"][f"integrated_gradients/{key}"]
        assert block["title"] == f"integrated gradients of {key}"
        beneath = unpack(block["inputs"]).reshape(2, 5, 8)
        assert np.abs(beneath - grey(batch[key]).numpy()).max() <= 1
    assert list(data["tables"]) == ["integrated_gradients/age"]
    assert data["undrawn"] == []


def test_one_of_several_inputs_lies_under_its_attributions() -> None:
    model, batch = pair()
    panels = by_name(measure(model, [Saliency(of="right", target=1)], batch=batch))
    assert torch.equal(panels["saliency/inputs"].values, grey(batch["right"]))


# ---------------------------------------------------------------- in the report


def test_the_report_has_images_of_all_examples_and_what_lies_beneath(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    model, batch = images(6, 1)
    for step in range(3):
        run.write_all(measure(model, [Saliency(), IntegratedGradients()], batch=batch, step=step))
    found = payload(run)["pictures"]
    assert list(found) == ["integrated_gradients", "saliency"]
    block: dict[str, Any] = found["saliency"]
    assert (block["examples"], block["height"], block["width"]) == (4, 5, 8)
    beneath = unpack(block["inputs"]).reshape(4, 5, 8)
    assert np.abs(beneath - grey(batch[0])[:4].numpy()).max() <= 1
    assert block["targets"] == ["0", "1", "2", "3"]
    assert found["integrated_gradients"]["examples"] == 2


def test_the_report_has_the_mean_of_each_feature_by_name(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    axes, names = ("example", "feature"), {"feature": ["age", "height"]}
    values = [[1.0, -2.0], [3.0, float("nan")]]
    for step in range(2):
        panel = Panel(torch.tensor(values) * step, axes, names, "logits", {"method": "mine"})
        run.write(Record("mine/values", panel, step))
    data = payload(run)
    block = data["tables"]["mine"]
    assert block["names"] == ["age", "height"]
    np.testing.assert_allclose(unpack(block["values"]).reshape(2, 2)[1], [2.0, -2.0])
    assert block["signed"]
    looked = next(one for one in data["short"] if one["at"] == "looked")
    assert looked["answer"] in ("age", "height")
    assert data["undrawn"] == []


def test_the_report_has_several_texts_of_any_method(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    texts = [["a", "b", "c"], ["d", "e", "f"]]
    facts = {"method": "mine", "sign": "positive raises the target", "target_text": ["no", "yes"]}
    values = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.0, -0.25]])
    panel = Panel(values, ("example", "position"), {"example,position": texts}, "1", facts)
    run.write(Record("mine/values", panel))
    block = payload(run)["inputs"]["mine"]
    assert [one["tokens"] for one in block["texts"]] == texts
    assert [one["target"] for one in block["texts"]] == ["no", "yes"]
    np.testing.assert_allclose(unpack(block["each"]).reshape(2, 3), values)


# ---------------------------------------------------------------- pieces of text


class Bytes:
    """A tokenizer of single bytes: every other character is cut."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_cut_over_tokens_are_shown_whole() -> None:
    text = "é☃ok🙂"
    pieces = piecewise(Bytes())(list(text.encode()))
    assert pieces == ["é", "⋯", "☃", "⋯", "⋯", "o", "k", "🙂", "⋯", "⋯", "⋯"]


def test_bytes_that_are_no_character_stay_undecoded() -> None:
    assert piecewise(Bytes())([0xFF, 0x61, 0x83, 0x83]) == ["\ufffd", "a", "\ufffd", "\ufffd"]


def test_a_marked_space_is_kept_though_decoding_drops_it() -> None:
    class SentencePiece:
        def convert_ids_to_tokens(self, i: int) -> str:
            return ["▁the", "re", "▁"][i]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(self.convert_ids_to_tokens, ids)).replace("▁", " ").strip()

    assert piecewise(SentencePiece())([0, 1, 2]) == [" the", "re", " "]


@pytest.mark.parametrize("text", ["snow ☃ and é", "line\nend 🙂🙂", "plain"])
def test_a_byte_level_vocabulary_gives_back_its_text(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw = "".join(piece for piece, _ in level.pre_tokenize_str(text))
    shown = readable(list(raw))
    assert "".join(shown).replace("⋯", "") == f" {text}"
    assert len(shown) == len(raw)


def test_a_byte_fallback_is_a_byte() -> None:
    assert readable(["▁a", "<0xE2>", "<0x98>", "<0x83>", "<0x0A>"]) == [" a", "☃", "⋯", "⋯", "\n"]


@pytest.mark.parametrize("words", ["induction", "jÅg|_", "  x ", "⏎⇥é☃", "", " ", "a\u0301"])
@pytest.mark.parametrize("size", [11, 12])
def test_kept_shapes_of_words_are_what_pillow_draws(words: str, size: int) -> None:
    from PIL import Image, ImageDraw

    from lightning_mi.sinks.canvas import _font

    for colour in [(10, 20, 200), (255, 255, 255)]:  # the second finds its shape kept
        own = Canvas(120, 30)
        own.box(10, 5, (60, 20), (120, 40, 40))
        own.text((13, 8), words, colour, size)
        plain = Image.new("RGB", (120, 30), (255, 255, 255))
        pen = ImageDraw.Draw(plain)
        pen.rectangle((10, 5, 69, 24), fill=(120, 40, 40))
        pen.text((13, 8), words, fill=colour, font=_font(size))
        assert np.array_equal(own.pixels(), np.asarray(plain))
        assert own.width_of(words, size) == round(pen.textlength(words, font=_font(size)))
