"""`report`: what it says is what was recorded, in one file, whatever texts are in it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import needs
from synthetic_run import SCORES, TOKENS, Synthetic

from lightning_mi.__main__ import main
from lightning_mi.emergence import HeadOnset, Onset, head_onsets
from lightning_mi.errors import ArgumentError, RunError
from lightning_mi.record import Panel, Record, scalar
from lightning_mi.report import write_report
from lightning_mi.report.data import payload
from lightning_mi.report.examples import TOKENS as SHOWN_TOKENS
from lightning_mi.report.headline import headline
from lightning_mi.report.inputs import source_of_copy
from lightning_mi.report.join import joined_modules
from lightning_mi.report.pack import pack, thin, unpack
from lightning_mi.report.page import ASSETS, STYLES, embed, page
from lightning_mi.runs import Run

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\u202eright to left",
    "zero\u200bwidth\ufeff",
    "\ud800",
    "\u2028\u2029\x00",
    "x" * 10_000,
    "",
    "\n",
    "{{script}}{{data}}",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Synthetic().write(tmp_path_factory.mktemp("finished") / "mi")


@pytest.fixture(scope="module")
def shown(finished: Run) -> dict[str, Any]:
    return payload(finished)


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


# ---------------------------------------------------------------- one file


def test_the_page_refers_to_nothing_outside(finished: Run) -> None:
    html = write_report(finished).read_text(encoding="utf-8")
    assert not re.search(r"https?://", html)
    assert not re.search(r"@import|\bimport\s*\(|\bfetch\s*\(|XMLHttpRequest|WebSocket", html)
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#future"}
    loads = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loads.extend(tag for name, _ in attrs if name in ("src", "data", "action"))
            loads.extend([tag] * (tag in ("link", "iframe", "object", "embed", "base")))

    Loads().feed(html)
    assert loads == []
    assert "default-src 'none'" in html


def test_every_asset_is_in_the_page_and_readable() -> None:
    folder = Path(str(ASSETS))
    scripts = [*folder.glob("core/*.js"), *folder.glob("charts/*.js")]
    assert {p.name for p in folder.glob("page/*.css")} == set(STYLES)
    assert set(folder.rglob("*.js")) == set(scripts)
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("//"), f"{path.name} should say what it is for"
        assert len(text.splitlines()) < 200, path.name
        assert "innerHTML" not in text, f"{path.name}: texts of users enter as textContent alone"


def test_written_whole_or_not_at_all(finished: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.html"
    assert write_report(finished, out) == out
    assert [p.name for p in out.parent.iterdir()] == ["x.html"]
    assert write_report(finished) == finished.report
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"expected a file that can be written.*--out"):
        write_report(finished, tmp_path / "file" / "x.html")


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "mi", {"name": HOSTILE[0], "text": HOSTILE[2]})
    for step in range(3):
        run.write_all(hostile_records(step))
    html = write_report(run).read_text(encoding="utf-8")
    quiet = write_report(Synthetic(steps=1).write(tmp_path / "quiet")).read_text(encoding="utf-8")
    for tag in ("<script", "</script", "<!--", "<img"):
        assert html.count(tag) == quiet.count(tag), tag
    data = embedded(html)
    assert data["prompt"]["tokens"] == [t.replace("\ud800", "\ufffd") for t in HOSTILE]
    assert data["run"]["name"] == HOSTILE[0]
    assert data["examples"]["proponents"][0]["words"] == HOSTILE[0]


def hostile_records(step: int) -> list[Record]:
    count = len(HOSTILE)
    labels = {"example,position": [HOSTILE]}
    asked = {"target_text": [HOSTILE[0]], "target_position": [count - 1]}
    pair = {"train_example": [7], "train_example,position": [HOSTILE]}
    panels = {
        "saliency/values": Panel(
            torch.rand(1, count), ("example", "position"), labels, convention=asked
        ),
        "influence/scores": Panel([[0.5]], ("query", "train_example"), {"train_example": [7]}),
        "influence/tokens": Panel(torch.rand(1, count), ("train_example", "position"), pair),
        "influence/proponents": Panel(
            [0.5],
            ("train_example",),
            {"train_example": [7]},
            convention={"descriptions": HOSTILE[:1]},
        ),
        "prompt/attention": Panel(
            torch.rand(1, count),
            ("head", "key_position"),
            {"head": ["L0H0"], "key_position": HOSTILE},
        ),
        "prompt/answers": Panel([0.5, 0.3], ("token",), {"token": HOSTILE[:2]}),
    }
    return [Record(name, panel, step) for name, panel in panels.items()]


# ---------------------------------------------------------------- what it says


def test_numbers_are_those_of_the_records(finished: Run, shown: dict[str, Any]) -> None:
    assert shown["steps"] == [r.step for r in finished.records("monitor/overhead")]
    for score in shown["scores"]["list"]:
        records = finished.records(f"head_scores/{score['name']}", source="live")
        records = [r for r in records if r.name == f"head_scores/{score['name']}"]
        true = np.stack([r.panel.values.numpy() for r in records])
        close = np.abs(unpack(score["values"]).reshape(true.shape) - true).max()
        assert close <= (true.max() - true.min()) / 60_000
        assert score["chance"] == pytest.approx(SCORES[score["name"]])
    losses = {s["name"]: unpack(s["values"]) for s in shown["behaviour"]["series"]}
    kept = [r.panel.item() for r in finished.records("head_scores/loss_second_copy")]
    np.testing.assert_allclose(losses["second copy"], kept, rtol=1e-4)
    agreed = {s["key"]: unpack(s["values"]) for s in shown["agreement"]["series"]}
    kept = [r.panel.item() for r in finished.records("agreement/saliency")]
    np.testing.assert_allclose(agreed["saliency"], kept, rtol=1e-4)


def test_rising_heads_are_the_onsets(finished: Run, shown: dict[str, Any]) -> None:
    found = [h for h in head_onsets(finished) if h.onset.state == "formed"]
    assert [h.label for h in found] == ["L1H3", "L1H1"]
    induction = shown["scores"]["list"][0]
    assert [one["head"] for one in induction["rising"]] == [7, 5]
    assert tuple(induction["rising"][0]["interval"]) == found[0].onset.interval
    assert shown["headline"]["mark"] == f"{found[0].onset.step:,}"
    assert shown["headline"]["text"].startswith("L1H3 and L1H1: L1H3 from 0.0")
    assert "chance 0.02" in shown["headline"]["text"]
    assert "one seed cannot decide" in shown["headline"]["text"]


def test_the_prompt_and_its_attributions(finished: Run, shown: dict[str, Any]) -> None:
    assert shown["prompt"] == {"tokens": TOKENS, "ends": len(TOKENS) - 1, "source": 25}
    for method, block in shown["inputs"].items():
        values = unpack(block["values"]).reshape(-1, block["width"])
        last = finished.records(f"{method}/values")[-1].panel.values[0].numpy()
        true = np.abs(last) / np.abs(last).sum() if method == "saliency" else last
        np.testing.assert_allclose(values[-1], true, atol=1e-3)
    assert shown["inputs"]["saliency"]["cap"] >= 3 / len(TOKENS)
    assert shown["inputs"]["integrated_gradients"]["cap"] >= 0.5
    attention = shown["attention"]
    rows = unpack(attention["values"]).reshape(-1, len(attention["heads"]), attention["width"])
    true = finished.records("prompt/attention")[-1].panel.values.numpy()
    np.testing.assert_allclose(rows[-1], true, atol=1 / 200)
    assert shown["answers"]["right"] == "at"
    assert shown["answers"]["top"][-1][0] == ["at", pytest.approx(0.83, abs=0.01)]


def test_influence_is_the_sum_over_checkpoints(finished: Run, shown: dict[str, Any]) -> None:
    records = finished.records("influence/scores")
    total = sum(r.panel.values[0].numpy() for r in records)
    found = shown["examples"]
    assert found["method"] == "TracIn"
    assert [e["score"] for e in found["proponents"]] == pytest.approx(
        sorted(total[total > 0])[::-1]
    )
    assert [e["score"] for e in found["opponents"]] == pytest.approx(sorted(total[total < 0]))
    top = found["proponents"][0]
    assert top["by"] == pytest.approx([float(r.panel.values[0, 0]) for r in records])
    assert sum(share for _, share in top["tokens"]) == pytest.approx(
        top["split"]["score"], rel=1e-2
    )
    assert top["split"]["score"] == pytest.approx(top["by"][-1], rel=1e-3)
    assert top["words"] == "a passage of 27 tokens, repeated"


def test_long_examples_are_cut_around_their_largest_share(tmp_path: Path) -> None:
    shares = torch.zeros(1, 300)
    shares[0, 200] = 1.0
    coords = {
        "train_example": [3],
        "train_example,position": [[str(i) for i in range(290)] + [""] * 10],
    }
    run = Run.create(tmp_path)
    pair = ("query", "train_example")
    run.write(Record("influence/scores", Panel([[1.0]], pair, {"train_example": [3]})))
    run.write(Record("influence/tokens", Panel(shares, ("train_example", "position"), coords)))
    one = payload(run)["examples"]["proponents"][0]
    assert len(one["tokens"]) == SHOWN_TOKENS
    assert ["200", 1.0] in one["tokens"]
    assert one["before"]
    assert one["after"]


def test_the_short_answers(shown: dict[str, Any]) -> None:
    said = {one["at"]: (one["answer"], one["note"]) for one in shown["short"]}
    assert said["heads"] == ("L1H3, L1H1", "2 of 8 heads formed")
    assert said["looked"][0] == "“cre”, the last token"
    assert said["examples"] == ("A passage, repeated", "4 of the top 4 proponents")
    assert said["agree"][0] == "Partly"
    assert "median of the last 15 steps" in said["agree"][1]
    assert said["trust"] == ("3 of 3 checks pass", "none is open")


# ---------------------------------------------------------------- states


STATES: dict[str, tuple[Callable[[], Synthetic], str]] = {
    "too early": (lambda: Synthetic(steps=3), "Too early to tell"),
    "none": (lambda: Synthetic(forms=False), "No induction head formed"),
    "forming": (
        lambda: Synthetic(steps=22, max_steps=2400, state="running"),
        "Induction is forming",
    ),
    "formed": (Synthetic, "Induction formed at step"),
}


@pytest.mark.parametrize("state", STATES)
def test_the_headline_has_four_states(state: str, tmp_path: Path) -> None:
    make, title = STATES[state]
    data = payload(make().write(tmp_path))
    assert data["headline"]["state"] == state
    assert data["headline"]["title"] == title
    assert (data["headline"]["mark"] is None) == (state != "formed")


def test_a_running_run_reaches_to_its_end(tmp_path: Path) -> None:
    data = payload(STATES["forming"][0]().write(tmp_path))
    assert data["run"]["state"] == "running"
    assert data["run"]["max_steps"] == 2400 > data["run"]["last"]
    assert "times chance" in data["headline"]["text"]
    assert "no onset is claimed" in data["headline"]["text"]


def test_what_is_forming_is_said_of_a_head_that_forms() -> None:
    rising = Onset("forming", start=0.02, final=0.2, null=0.02, measurements=12)
    noise = Onset("none", start=0.25, final=0.26, null=0.02, measurements=12)
    heads = [HeadOnset(1, 1, "induction", rising), HeadOnset(0, 0, "induction", noise)]
    assert headline({"induction": heads}, running=True)["text"].startswith("L1H1 is ")


@pytest.mark.parametrize("steps", [0, 1])
def test_little_or_nothing_measured(steps: int, tmp_path: Path) -> None:
    run = Synthetic(steps=steps, max_steps=100).write(tmp_path)
    (run.path / "records.jsonl").touch()
    data = payload(run)
    page(data)
    if not steps:
        assert data["headline"]["state"] == "not measured"
        assert all(one["answer"] in ("not measured", "no checks") for one in data["short"])
        assert data["scores"] is data["prompt"] is data["examples"] is None


def test_undefined_values_are_counted_and_never_zero(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for step in range(10):
        values = torch.tensor([[0.1, float("nan")], [float("inf"), 0.2]])
        run.write(Record("head_scores/induction", Panel(values, ("layer", "head")), step))
        run.write(Record("head_scores/loss_second_copy", scalar(float("nan"), "nats"), step))
        empty = Panel(torch.full((1, 3), float("nan")), ("example", "position"))
        run.write(Record("integrated_gradients/values", empty, step))
        run.write(Record("integrated_gradients/gap", Panel([float("nan")], ("example",)), step))
    data = payload(run)
    embedded(page(data))
    values = unpack(data["scores"]["list"][0]["values"]).reshape(10, 2, 2)
    assert np.isnan(values[:, 0, 1]).all()
    assert np.isnan(values[:, 1, 0]).all()
    assert values[:, 1, 1] == pytest.approx(0.2)
    checks = {c["check"]: c for c in data["checks"]}
    assert checks["Undefined values"]["status"] == "open"
    assert checks["Undefined values"]["result"].startswith("70, most in ")


def test_what_has_no_chart_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    quiet = {"display": {}}
    run.write(Record("saliency/values", Panel(torch.rand(0, 3), ("example", "position"))))
    run.write(Record("mine/quiet", Panel(torch.rand(3), ("class",), convention=quiet)))
    run.write(Record("other/quiet", scalar(1.0, **quiet)))
    data = payload(run)
    assert data["undrawn"] == ["saliency/values", "mine/quiet", "other/quiet"]
    assert data["panels"] == []
    looked = next(one for one in data["short"] if one["at"] == "looked")
    assert looked["answer"] == "measured"
    assert looked["note"].startswith("saliency: see the loggers' pictures")


def test_attributions_without_names_of_tokens_get_a_chart_by_their_axes(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    run.write(Record("saliency/values", Panel(torch.rand(1, 4), ("example", "position"))))
    data = payload(run)
    assert data["inputs"] == {}
    assert data["undrawn"] == []
    (group,) = data["panels"]
    assert [one["axes"] for one in group["arrays"]] == [["example", "position"]]


def image_run(path: Path, steps: int = 11, tokens: int | None = 0) -> Run:
    """A run of an image model: no tokens, no heads."""
    run = Run.create(path, {"name": "images"})
    draw = torch.Generator().manual_seed(0)
    axes = ("example", "channel", "y", "x")
    for step in range(steps):
        values = torch.randn(2, 3, 4, 5, generator=draw)
        asked = {"target_text": ["2", "0"]}
        index = {"train_example": [5, 9]}
        made = {
            "saliency/values": Panel(values.abs(), axes, unit="logits per unit", convention=asked),
            "integrated_gradients/values": Panel(values, axes, unit="logits", convention=asked),
            "integrated_gradients/gap": Panel([0.001, 0.002], ("example",)),
            "influence/scores": Panel([[0.5, -0.25]], ("query", "train_example"), index),
            "monitor/overhead": scalar(0.01),
        }
        run.write_all(Record(n, p, step, tokens=tokens) for n, p in made.items())
    return run


def test_a_run_of_images_is_not_asked_for_heads(tmp_path: Path) -> None:
    run = image_run(tmp_path)
    data = payload(run)
    title = "Saliency, integrated gradients and influence over 11 steps"
    assert (data["headline"]["state"], data["headline"]["title"]) == ("measured", title)
    assert [one["at"] for one in data["short"]] == ["looked", "examples", "trust"]
    assert data["short"][0]["answer"] == "Drawn below"
    assert "Monitor" not in json.dumps([data["headline"], data["short"]])
    assert data["tokens"] is None
    assert "token" not in data["run"]["facts"]
    assert data["undrawn"] == []
    for method, block in data["pictures"].items():
        records = run.records(f"{method}/values")
        true = np.stack([r.panel.values.sum(1).numpy() for r in records])
        shown = unpack(block["values"]).reshape(true.shape)
        np.testing.assert_allclose(shown, true, atol=np.ptp(true) / 250)
        assert (block["height"], block["width"], block["targets"]) == (4, 5, ["2", "0"])
        assert block["signed"] == (method == "integrated_gradients")


@pytest.mark.parametrize("tokens", [None, 0])
def test_one_of_a_kind_is_said_in_the_singular(tokens: int | None, tmp_path: Path) -> None:
    data = payload(image_run(tmp_path, steps=1, tokens=tokens))
    assert data["headline"]["title"].endswith("and influence at 1 step")
    assert data["run"]["facts"] == "0 steps, 1 measurement"
    alone = payload(Synthetic(layers=1, heads=3, steps=1).write(tmp_path / "alone"))
    assert alone["run"]["facts"].startswith("1 layer × 3 heads · ")


def test_prompts_without_head_scores_name_the_monitor_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for step in range(3):
        coords = {"example,position": [["a", "b", "c"]]}
        panel = Panel(torch.rand(1, 3), ("example", "position"), coords)
        run.write(Record("saliency/values", panel, step, tokens=10 * step))
    data = payload(run)
    assert data["headline"]["title"] == "Saliency over 3 steps"
    assert "HeadMonitor()" in data["headline"]["text"]
    assert "HeadMonitor" not in json.dumps(data["short"])
    assert data["tokens"] == [0, 10, 20]


def test_an_example_that_never_led_says_why_it_has_no_text(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    pair, index = ("query", "train_example"), {"train_example": [7, 719]}
    for step, scores in enumerate(([1.0, 0.9], [-0.5, 0.9])):
        run.write(Record("influence/scores", Panel([scores], pair, index), step))
        facts = {"descriptions": ["plain text"], "texts": ["In the beginning"]}
        top = Panel([scores[0]], ("train_example",), {"train_example": [7]}, convention=facts)
        run.write(Record("influence/proponents", top, step))
    first, second = payload(run)["examples"]["proponents"]
    assert (first["name"], first["tokens"]) == ("train[719]", [])
    assert first["note"] == "its text was not kept: it was never among the top at one step"
    assert first["by"] == pytest.approx([0.9, 0.9])
    assert (second["note"], second["tokens"]) == (None, [["In the beginning", None]])


def test_examples_without_texts_do_not_miss_them(tmp_path: Path) -> None:
    found = payload(image_run(tmp_path))["examples"]
    assert [e["note"] for e in found["proponents"] + found["opponents"]] == [None, None]


def test_examples_that_are_images_are_shown(tmp_path: Path) -> None:
    run = image_run(tmp_path)
    draw = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (2, 28, 40), generator=draw).to(torch.uint8)
    axes, index = ("train_example", "y", "x"), {"train_example": [9, 5]}
    run.write(Record("influence/images", Panel(grey, axes, index), 3))
    data = payload(run)
    (image,) = (one["image"] for one in data["examples"]["proponents"])
    assert (image["height"], image["width"]) == (28, 40)
    assert np.abs(unpack(image["values"]).reshape(28, 40) - grey[1].numpy()).max() <= 1
    assert data["undrawn"] == []
    # One that is too large for its place is made smaller: 130 x 131 in blocks of 3.
    large = torch.arange(130 * 131, dtype=torch.float32).reshape(1, 130, 131)
    run.write(Record("influence/images", Panel(large, axes, {"train_example": [5]}), 4))
    (image,) = (one["image"] for one in payload(run)["examples"]["proponents"])
    assert (image["height"], image["width"]) == (43, 43)
    small = unpack(image["values"]).reshape(43, 43)
    block = large[0, :3, :3].mean().item()
    assert small[0, 0] == pytest.approx(block, abs=130 * 131 / 250)


# ---------------------------------------------------------------- checks


def checked(run: Run) -> dict[str, dict[str, str]]:
    return {c["check"]: c for c in payload(run)["checks"]}


def test_live_against_swept(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for step in range(3):
        record = Record("a/b", scalar(float(step)), step)
        run.write_all([record, record.replace(source="sweep")])
    assert checked(run)["Live equals swept"]["status"] == "pass"
    assert checked(run)["Live equals swept"]["result"].startswith("3 of 3")
    run.write(Record("a/b", scalar(9.0), 1, source="sweep"))
    assert checked(run)["Live equals swept"]["status"] == "fail"


def test_running_sums_are_compared_over_the_same_steps_only(tmp_path: Path) -> None:
    run = Run.create(tmp_path)

    def write(step: int, source: str, value: float, count: int) -> None:
        facts = {"sum_over_steps": count}
        panel = Panel([[value]], ("query", "train_example"), {"train_example": [0]}, "1", facts)
        run.write(Record("influence/sum", panel, step, source=source))

    write(4, "live", 3.0, 3)
    write(4, "sweep", 1.0, 1)
    assert "Live equals swept" not in checked(run)
    write(8, "live", 5.0, 4)
    write(8, "sweep", 5.0, 4)
    assert checked(run)["Live equals swept"]["result"] == "1 of 1 records bit-equal, at 1 step"
    write(9, "live", 5.0, 5)
    write(9, "sweep", 6.0, 5)
    assert checked(run)["Live equals swept"]["status"] == "fail"


def test_recorded_checks_come_first(tmp_path: Path) -> None:
    given = {"check": "Training unchanged", "compared": "weights", "result": "0", "status": "pass"}
    odd = {"check": "Odd", "status": "fine"}
    run = Run.create(tmp_path, {"checks": [given, odd]})
    run.write(Record("monitor/overhead", scalar(0.2)))
    found = checked(run)
    assert list(found)[:2] == ["Training unchanged", "Odd"]
    assert found["Odd"]["status"] == "open"
    assert found["Overhead"]["status"] == "open"
    assert found["Overhead"]["result"] == (
        "20 % of training time; measure less often (every_n_train_steps) or set max_overhead"
    )


def test_gap_that_did_not_converge_is_open(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    run.write(Record("integrated_gradients/gap", Panel([0.2, -0.3], ("example",))))
    assert checked(run)["IG completeness gap"]["status"] == "open"
    assert checked(run)["IG completeness gap"]["result"].startswith("30 %")
    flags = Panel(torch.tensor([True, False]), ("example",))
    run.write(Record("integrated_gradients/converged", flags))
    assert "1 explanation had not converged" in checked(run)["IG completeness gap"]["result"]


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [0, 1, 256, 257, 5000])
def test_packing_keeps_values_and_gaps(bits: int, size: int) -> None:
    values = np.random.default_rng(0).normal(0, 3, size)
    values[::7] = np.nan
    back = unpack(json.loads(json.dumps(pack(values, bits=bits))))
    assert (np.isnan(back) == np.isnan(values)).all()
    spread = np.ptp(values[np.isfinite(values)]) if size > 1 else 1.0
    np.testing.assert_allclose(back, values, atol=spread / (2**bits - 2), rtol=1e-4)


def test_packing_degenerate_values() -> None:
    assert np.isnan(unpack(pack(np.full(1000, np.nan)))).all()
    assert (unpack(pack(np.full(1000, 0.25))) == 0.25).all()


def test_packed_size_of_a_large_run() -> None:
    draw = np.random.default_rng(0)
    parts = [
        pack(draw.uniform(0, 1, (200, 5, 144))),
        pack(draw.dirichlet(np.full(64, 0.5), (200, 24)), bits=8),
        pack(draw.normal(0, 1, (200, 2, 64))),
    ]
    assert sum(len(json.dumps(part)) for part in parts) < 950_000


def test_thinning_keeps_the_last_step() -> None:
    assert list(range(10))[thin(10, 1)] == list(range(10))
    assert list(range(10))[thin(10, 3, most=12)] == [0, 3, 6, 9]
    assert list(range(9))[thin(9, 1, most=3)] == [2, 5, 8]


def test_the_token_to_copy() -> None:
    assert source_of_copy(list("abcxab")) == 2
    assert source_of_copy(list("abc")) is None
    assert source_of_copy(["a"]) is None
    assert source_of_copy([]) is None


# ---------------------------------------------------------------- command line


def test_command_writes_the_report(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    assert main(["report", str(finished.path.parent), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.stat().st_size > 10_000


def test_command_compares_runs(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = Synthetic(seed=1, steps=9).write(tmp_path / "other"), tmp_path / "two.html"
    assert main(["report", str(finished.path), str(other.path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    data = embedded(out.read_text(encoding="utf-8"))
    assert [one["letter"] for one in data["runs"]] == ["A", "B"]


def test_command_explains_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-mi: path: expected a run folder")
    assert "Traceback" not in error
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])
    with pytest.raises(SystemExit, match="2"):
        main([])


# ---------------------------------------------------------------- of several runs


def test_runs_are_matched_by_role_and_said_together(tmp_path: Path) -> None:
    runs = [
        Synthetic(seed=k, steps=24, every=100, span=23).write(tmp_path / str(k)) for k in range(3)
    ]
    data = payload(*runs)
    onsets = [head_onsets(run)[0].onset for run in runs]
    steps = sorted(o.step for o in onsets if o.step is not None)
    assert data["headline"]["title"] == "Induction formed in 3 of 3 runs, steps"
    assert data["headline"]["mark"] == f"{steps[0]:,} to {steps[-1]:,}"
    assert data["headline"]["interval"] == [steps[0], steps[-1]]
    assert [one["label"] for one in data["runs"]] == [f"synthetic run, seed {k}" for k in range(3)]
    for run, one in zip(runs, data["runs"], strict=True):
        best = max(head_onsets(run), key=lambda h: h.onset.final)
        role = one["roles"]["induction"][0]
        assert role["head"] == best.label
        kept = [r for r in run.records("head_scores") if r.what == "induction"]
        true = [float(r.panel.values[best.layer, best.head]) for r in kept]
        np.testing.assert_allclose(unpack(role["values"]), true, rtol=1e-3)
        whole = unpack(one["maps"]["induction"]["values"]).reshape(len(kept), 2, 4)
        np.testing.assert_allclose(
            whole, np.stack([r.panel.values.numpy() for r in kept]), atol=0.01
        )
    assert len(data["checks"]) == 3 * len(payload(runs[0])["checks"])
    assert data["short"][-1]["answer"].startswith("9 of 9")


def test_runs_of_unlike_models_are_compared_without_maps(tmp_path: Path) -> None:
    small = Synthetic(steps=10).write(tmp_path / "a")
    large = Synthetic(layers=3, steps=10).write(tmp_path / "b")
    data = payload(small, large)
    assert data["runs"][1]["maps"] == {}
    assert set(data["runs"][1]["roles"]) == set(SCORES)


def test_a_run_without_heads_beside_one_with_heads(tmp_path: Path) -> None:
    data = payload(image_run(tmp_path / "a"), Synthetic(steps=24, span=23).write(tmp_path / "b"))
    assert data["headline"]["title"].startswith("Induction formed in 1 of 1 runs")
    page(data)
    early, none = Synthetic(steps=3), Synthetic(steps=24, span=23, forms=False)
    runs = [one.write(tmp_path / f"{k}") for k, one in enumerate((early, none))]
    rising = next(s for s in payload(*runs)["short"] if s["at"] == "heads")
    assert rising["answer"] == "too early and none"
    with pytest.raises(ArgumentError, match="one run or more"):
        write_report([])


# ---------------------------------------------------------------- panels that no chart knows


def test_own_panels_are_the_records(tmp_path: Path) -> None:
    run = Synthetic(steps=6, own=True).write(tmp_path)
    groups = {group["measurement"]: group for group in payload(run)["panels"]}
    assert list(groups) == ["entropy", "edge_attribution", "lens"]
    mean = groups["entropy"]["curves"][0]
    kept = [r.panel.item() for r in run.records("entropy/mean") if r.what == "mean"]
    np.testing.assert_allclose(unpack(mean["values"]), kept, rtol=1e-4)
    assert unpack(mean["stderr"]) == pytest.approx([0.06] * 6)
    assert (mean["unit"], mean["says"]) == ("nats", "entropy of the answer")
    for name, group in groups.items():
        for block in group["arrays"]:
            records = run.records(f"{name}/{block['what']}")
            true = np.stack([r.panel.values.numpy() for r in records])
            shown = unpack(block["values"]).reshape(true.shape)
            np.testing.assert_allclose(shown, true, atol=np.nanmax(np.abs(true)) / 30_000)
            assert block["shape"] == list(true.shape[1:])
    edges = groups["edge_attribution"]["arrays"][0]
    assert edges["signed"]
    assert edges["axes"] == ["writer", "reader"]
    assert groups["entropy"]["arrays"][0]["labels"]["class"][2] == "</script>"
    assert not groups["entropy"]["arrays"][0]["signed"]


def test_too_large_panels_are_named_and_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path)
    for step in range(8):
        run.write(Record("mine/fits", Panel(torch.rand(10), ("class",)), step))
        run.write(Record("mine/large", Panel(torch.rand(41), ("class",)), step))
    monkeypatch.setattr("lightning_mi.report.panels.MOST", 40)
    data = payload(run)
    (block,) = data["panels"][0]["arrays"]
    assert (block["what"], block["at"], block["measured"]) == ("fits", [1, 3, 5, 7], 8)


def test_missing_edges_are_not_undefined_values(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    values = torch.tensor([[0.1, float("nan")]])
    run.write(Record("edges/edges", Panel(values, ("writer", "reader"))))
    assert checked(run)["Undefined values"]["status"] == "pass"
    why = {"reason": "the metric coincides"}
    run.write(Record("edges/edges", Panel(values, ("writer", "reader"), convention=why), 1))
    assert checked(run)["Undefined values"]["status"] == "open"


# ---------------------------------------------------------------- many heads


def test_thinned_maps_keep_the_first_curves_whole(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mi.report.heads.WHOLE", 3)
    monkeypatch.setattr(
        "lightning_mi.report.heads.thin", lambda count, each: thin(count, each, count * each // 4)
    )
    score = payload(finished)["scores"]["list"][0]
    assert (score["thinned"], len(score["at"])) == (4, 15)
    assert score["whole"]["heads"][:2] == [7, 5]
    records = [r for r in finished.records("head_scores") if r.what == "induction"]
    true = np.array([float(r.panel.values[1, 3]) for r in records])
    found = unpack(score["whole"]["values"]).reshape(60, 3)[:, 0]
    np.testing.assert_allclose(found, true, atol=1e-4)
    assert score["at"][-1] == score["whole"]["at"][-1]


def test_the_ceiling_is_what_a_second_head_reaches(finished: Run, shown: dict[str, Any]) -> None:
    from lightning_mi.comparison import spearman

    rows = [r.panel.values for r in finished.records("prompt/attention")][-15:]
    true = np.median([spearman(v[7], v[5]) for v in rows])
    assert shown["agreement"]["ceiling"]["value"] == pytest.approx(true, abs=1e-4)
    assert "L1H1 against that of L1H3" in shown["agreement"]["ceiling"]["says"]
    agrees = next(one for one in shown["short"] if one["at"] == "agree")
    assert agrees["note"].endswith(f"ceiling {true:.2f}")


# ---------------------------------------------------------------- modules


def sources() -> dict[str, str]:
    folder = Path(str(ASSETS))
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.js")
    }


def test_modules_import_what_is_exported_and_use_it() -> None:
    scripts = sources()
    for path, source in scripts.items():
        for names, target in re.findall(r'^import \{([^}]*)\} from "([^"]+)";', source, re.M):
            other = scripts[os.path.normpath(os.path.join(os.path.dirname(path), target))]
            for name in filter(None, (n.strip() for n in names.split(","))):
                pattern = rf"^export (?:async )?(?:const|function) {re.escape(name)}(?!\w)"
                assert re.search(pattern, other, re.M), f"{path} imports {name}"
                used = len(re.findall(rf"(?<![\w.]){re.escape(name)}(?!\w)", source))
                assert used > 1, f"{path} imports {name} for nothing"


def test_circles_and_missing_modules_are_refused() -> None:
    both = {"a.js": 'import { b } from "./b.js";\n', "b.js": 'import { a } from "./a.js";\n'}
    with pytest.raises(ArgumentError, match="a circle"):
        joined_modules(both, "a.js")
    with pytest.raises(ArgumentError, match=r"b\.js"):
        joined_modules({"a.js": both["a.js"]}, "a.js")


def test_the_types_are_those_of_the_data(shown: dict[str, Any]) -> None:
    text = (Path(str(ASSETS)) / "types.d.ts").read_text(encoding="utf-8")
    body = re.search(r"interface Data \{(.*?)\n\}", text, re.S)
    assert body
    flat = re.sub(r"\{[^{}]*\}", "", re.sub(r"\{[^{}]*\}", "", body[1]))
    assert set(re.findall(r"(\w+)\??:", flat)) == set(shown)


def test_scripts_pass_the_type_checker() -> None:
    """Development only: TypeScript reads the comments, nothing is compiled."""
    tsc = needs("typescript", "bin/tsc")
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not there")
    done = subprocess.run(
        [node, str(tsc), "-p", str(ASSETS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_scripts_are_formatted() -> None:
    prettier = needs("prettier", "bin/prettier.cjs")
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not there")
    files = ["core/*.js", "charts/*.js", "types.d.ts"]
    done = subprocess.run(
        [node, str(prettier), "--check", *files],
        cwd=str(ASSETS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_any_text_may_stand_anywhere(tmp_path: Path) -> None:
    """Random texts out of dangerous pieces come back as they were, and end no element."""
    draw = random.Random(0)
    pieces = [
        "</script>",
        "<!--",
        "-->",
        "&lt;",
        "\\",
        '"',
        "'",
        "\u2028",
        "\x00",
        "\u202e",
        "{{data}}",
    ]
    pieces += ["😀", "\u0301", "${x}", "]]>", "\ud83d", "\n", " ", "a"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(300)]
    again = json.loads(embed(texts))
    surrogate = re.compile("[\ud800-\udfff]")
    assert again == [surrogate.sub("\ufffd", text) for text in texts]
    made = embed(texts)
    assert not re.search(r"<|\u2028|\u2029", made)
    run = Run.create(tmp_path, {"name": texts[0], "title": texts[1]})
    run.write(Record("mine/vector", Panel(torch.rand(300), ("class",), {"class": texts}, texts[2])))
    data = embedded(write_report(run).read_text(encoding="utf-8"))
    shown = data["panels"][0]["arrays"][0]["labels"]["class"]
    assert shown == [surrogate.sub("\ufffd", text) for text in texts]
