"""`report` in a browser: what is drawn is what was recorded, and all follows one selection."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, browser, needs
from synthetic_run import READERS, SCORES, TOKENS, WRITERS, Synthetic

from lightning_mi.record import Panel, Record, scalar
from lightning_mi.report import write_report
from lightning_mi.report.data import payload
from lightning_mi.report.pack import pack
from lightning_mi.report.page import page as page_of
from lightning_mi.runs import Run

Open = Callable[..., Page]

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\u202eright to left",
    "zero\u200bwidth\ufeff",
    "x" * 10_000,
    "",
    "\n",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def show(chromium: Any) -> Iterator[Open]:
    """Open a report in a page of its own; it must neither complain nor ask for anything."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000})
    pages: list[Page] = []

    def opened(report: Path, link: str = "") -> Page:
        pages.append(Page(context.new_page()))
        return pages[-1].open(report, link)

    yield opened
    for page in pages:
        assert [said for said in page.said if "getImageData" not in said] == []
        assert all(url.startswith(("file://", "blob:", "data:")) for url in page.asked)
    context.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Synthetic(own=True).write(folder / "own" / "mi")


@pytest.fixture(scope="module")
def report(run: Run) -> Path:
    return write_report(run)


@pytest.fixture(scope="module")
def seeds(folder: Path) -> list[Run]:
    return [
        Synthetic(seed=k, steps=24, every=100, span=23).write(folder / f"seed{k}") for k in range(6)
    ]


def recorded(run: Run, name: str) -> list[Record]:
    return [r for r in run.records(name) if r.name == name]


# ---------------------------------------------------------------- what is drawn


def test_every_chart_is_there(show: Open, report: Path) -> None:
    page = show(report)
    shown = page.run(
        "() => [...document.querySelectorAll('.card:not([hidden])')].map(c => c.id).sort()"
    )
    assert shown == sorted(
        "when heads looked agree at-step prompt examples trust "
        "panel-entropy panel-edge_attribution panel-lens".split()
    )
    for lane in ("when", "heads", "head-rows", "looked", "agree"):
        assert page.page.locator(f"#{lane}-plot > svg").count() == 1, lane
    assert page.page.locator(".empty").count() == 0
    assert page.page.locator("#prompt .token").count() == len(TOKENS) + 1
    assert page.page.locator("#at-step figure").count() == len(SCORES)
    assert page.page.locator("#examples tbody tr").count() == 6
    assert page.texts("#trust tbody td.pass") == ["✓ pass"] * 3


@pytest.mark.parametrize("head", ["L1H3", "L1H1"])
def test_curves_of_heads_are_the_records(show: Open, run: Run, report: Path, head: str) -> None:
    page = show(report)
    layer, place = int(head[1]), int(head[3])
    kept = [float(r.panel.values[layer, place]) for r in recorded(run, "head_scores/induction")]
    drawn = page.values("#heads-plot", f"path.head.{head}")
    np.testing.assert_allclose(drawn, kept, atol=0.004)


def test_curves_of_losses_and_agreement_are_the_records(show: Open, run: Run, report: Path) -> None:
    page = show(report)
    kept = [r.panel.item() for r in recorded(run, "head_scores/loss_second_copy")]
    drawn = page.values("#when-plot", "path[stroke-width='2']")
    np.testing.assert_allclose(drawn, kept, atol=0.06)
    kept = [r.panel.item() for r in recorded(run, "agreement/saliency")]
    np.testing.assert_allclose(page.values("#agree-plot", "path.saliency"), kept, atol=0.01)
    slope, offset = page.scale("#agree-plot")
    floor = page.page.locator("#agree-plot rect.floor")
    top = slope * float(floor.get_attribute("y") or "nan") + offset
    assert top == pytest.approx(0.3, abs=0.01)
    ceiling = page.page.locator("#agree-plot line.ceiling").get_attribute("y1")
    words = next(t for t in page.texts("#agree-plot text") if t.startswith("ceiling"))
    assert slope * float(ceiling or "nan") + offset == pytest.approx(
        float(words.split()[1]), abs=0.01
    )
    assert words in page.text("#answers a[data-to=agree]").replace(", ", "\n")


def test_the_time_axis_is_one(show: Open, run: Run, report: Path) -> None:
    """Every curve lies over the slider's own place for its steps."""
    page = show(report, "#step=880")
    xs = [x for x, _ in page.curve("#heads-plot path.head.L1H3")]
    steps = [r.step for r in recorded(run, "head_scores/induction")]
    slope = (xs[-1] - xs[0]) / (steps[-1] - steps[0])
    np.testing.assert_allclose(xs, xs[0] + slope * np.array(steps), atol=0.06)
    cursors = page.run(
        "() => [...document.querySelectorAll('line.cursor')].map(c => +c.getAttribute('x1'))"
    )
    assert len(cursors) >= 5
    np.testing.assert_allclose(cursors, xs[steps.index(880)], atol=0.06)


def test_maps_at_a_step(show: Open, run: Run, report: Path) -> None:
    page = show(report, "#step=880")
    values = next(r for r in recorded(run, "head_scores/induction") if r.step == 880).panel.values
    assert page.texts("#at-step .value") == [f"{float(v):.2f}"[1:] for v in values.flatten()]
    best = float(values.max())
    assert page.text("figure[data-score=induction] figcaption") == f"induction\nL1H3 {best:.2f}"
    end = float(recorded(run, "head_scores/induction")[-1].panel.values[1, 3])
    assert page.text("#head-score") == f"induction {best:.2f} at this step, {end:.2f} at the end"


def test_examples_are_the_sum_over_checkpoints(show: Open, run: Run, report: Path) -> None:
    page = show(report)
    total = np.array([r.panel.values[0].numpy() for r in recorded(run, "influence/scores")]).sum(0)
    said = page.texts("#examples .length + span")
    order = [*sorted(total[total > 0])[::-1], *sorted(total[total < 0])]
    assert said == [f"{v:+.2f}".replace("-", "−") for v in order]
    bars = page.page.locator("#examples svg").first
    assert bars.locator("rect").count() == len(recorded(run, "influence/scores"))


def test_panels_that_no_chart_knows(show: Open, run: Run, report: Path) -> None:
    page = show(report, "#step=880")
    assert page.text("#panel-entropy h2") == "Entropy"
    kept = [r.panel.item() for r in recorded(run, "entropy/mean")]
    host = "#panel-entropy-plot > .plot:first-child > .plot"
    np.testing.assert_allclose(page.values(host, "path.own"), kept, atol=0.02)
    assert page.page.locator(f"{host} path.error").count() == 1
    last = next(r for r in recorded(run, "entropy/by_class") if r.step == 880).panel
    names = page.texts("#panel-entropy .bar-row span")
    assert names == ["cat", "dog", "</script>", "bird"]
    numbers = [float(t) for t in page.texts("#panel-entropy .bar-row b")]
    assert numbers == pytest.approx(last.values.tolist(), rel=6e-3)


def test_edges_are_a_matrix_a_graph_and_a_list(show: Open, run: Run, report: Path) -> None:
    page = show(report, "#step=2360")
    values = recorded(run, "edge_attribution/edges")[-1].panel.values.numpy()
    order = np.argsort(-np.abs(np.nan_to_num(values)).ravel())
    pairs = [(WRITERS[i // len(READERS)], READERS[i % len(READERS)]) for i in order[:10]]
    assert page.texts("#panel-edge_attribution .edges td:first-child") == [
        f"{a} → {b}" for a, b in pairs
    ]
    said = page.texts("#panel-edge_attribution .edges td:last-child")
    found = [float(t.replace("−", "-")) for t in said]
    assert found == pytest.approx(values.ravel()[order[:10]].tolist(), rel=6e-3)
    assert page.page.locator("#panel-edge_attribution .graph > path").count() == 24
    numbers = page.texts("#panel-edge_attribution .matrix-numbers span")
    assert len(numbers) == values.size
    assert numbers.count("—") == int(np.isnan(values).sum())


def test_panels_of_many_axes_choose_a_slice(show: Open, run: Run, report: Path) -> None:
    page = show(report, "#step=400")
    page.click("#panel-lens [data-panel=attention]")
    assert page.link["panel.lens"] == "attention"
    picker = page.page.locator("#panel-lens .picker select")
    assert picker.locator("option").count() == 6
    picker.select_option("4")
    page.settle()
    assert page.link["panel.lens/attention"] == "4"
    shown = page.texts("#panel-lens .matrix-numbers span")
    true = next(r for r in recorded(run, "lens/attention") if r.step == 400).panel.values[1, 1]
    found = [float(t) for t in shown]
    assert found == pytest.approx(true.flatten().tolist(), rel=0.06, abs=2e-3)
    again = show(report, "#" + page.page.url.split("#")[1])
    assert again.texts("#panel-lens .matrix-numbers span") == shown


SHAPES: list[tuple[tuple[str, ...], tuple[int, ...]]] = [
    (("layer",), (6,)),
    (("neuron",), (300,)),
    (("edge",), (3,)),
    (("layer", "head"), (3, 5)),
    (("head", "position"), (2, 70)),
    (("example", "y", "x"), (2, 9, 7)),
    (("example", "channel", "y", "x"), (2, 3, 5, 4)),
    (("query", "train_example"), (1, 40)),
    (("layer", "head", "query_position", "key_position"), (2, 2, 6, 6)),
    (("token",), (1,)),
]


@pytest.mark.parametrize("steps", [1, 4])
def test_panels_of_any_axes_are_drawn(show: Open, tmp_path: Path, steps: int) -> None:
    """Any shape, with undefined, infinite, whole and true-or-false values, at one step or more."""
    run = Run.create(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for step in range(0, 10 * steps, 10):
        for k, (axes, shape) in enumerate(SHAPES):
            values = torch.randn(shape, generator=draw)
            values.view(-1)[::7] = float("nan")
            values.view(-1)[1::11] = float("inf")
            run.write(Record(f"shape_{k}/values", Panel(values, axes), step))
        for name, values in (
            ("counts", torch.arange(4)),
            ("flags", torch.tensor([True, False, True, True])),
            ("nothing", torch.full((4,), float("nan"))),
            ("zeros", torch.zeros(4)),
        ):
            run.write(Record(f"kinds/{name}", Panel(values, ("class",)), step))
        run.write(Record("kinds/alone", scalar(float("nan")), step))
        run.write(Record("kinds/still", scalar(3.0), step))
    page = show(write_report(run))
    shown = page.run("() => [...document.querySelectorAll('.card:not([hidden])')].map(c => c.id)")
    assert {f"panel-shape_{k}" for k in range(len(SHAPES))} <= set(shown)
    words = page.text("#panel-shape_5 .panel-words")
    assert words.startswith("values: 2 examples × 9 y × 7 x, ")
    assert "alone —" in page.texts("#panel-kinds-plot text")
    for kind in ("flags", "nothing", "zeros", "counts"):
        page.click(f"#panel-kinds [data-panel={kind}]")
        assert page.page.locator("#panel-kinds .bar-row").count() == 4
    assert page.texts("#panel-kinds .bar-row b") == ["0", "1", "2", "3"]
    page.press("ArrowLeft", "ArrowRight")


# ---------------------------------------------------------------- one selection


def test_keys_and_slider_move_everything(show: Open, report: Path) -> None:
    page = show(report, "#step=400")
    page.press("ArrowRight")
    assert page.step == "440"
    page.press("Shift+ArrowRight", "ArrowLeft")
    assert page.step == "800"
    assert page.link["step"] == "800"
    page.page.locator("#range").focus()
    page.press("Home")
    assert page.step == "0"
    assert page.page.locator("#range").get_attribute("aria-valuetext") == "step 0"
    page.press("End")
    assert page.step == "2,360"
    assert "step" not in page.link  # the newest is no fixed place
    box = page.page.locator("#range").bounding_box()
    page.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.settle()
    assert abs(int(page.step.replace(",", "")) - 1180) <= 40


def test_pressing_in_a_chart_moves_the_cursor(show: Open, report: Path) -> None:
    page = show(report, "#step=0")
    box = page.page.locator("#heads-plot").bounding_box()
    page.page.mouse.move(box["x"] + 400, box["y"] + 60)
    assert page.page.locator("#tip").is_visible()
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 500, box["y"] + 60)
    page.page.mouse.up()
    page.settle()
    x = page.run("() => +document.querySelector('#heads-plot .cursor').getAttribute('x1')")
    assert abs(x - 500) < 8


def test_playing_goes_on_to_the_end(show: Open, report: Path) -> None:
    page = show(report, "#step=1400")
    page.click("#play")
    assert "Pause" in page.text("#play")
    page.page.wait_for_function(
        "() => document.querySelector('#play').textContent.includes('Play')"
    )
    assert page.step == "2,360"


def test_a_head_is_selected_everywhere(show: Open, run: Run, report: Path) -> None:
    page = show(report, "#step=880")
    box = page.page.locator("figure[data-score=previous_token] canvas").bounding_box()
    page.page.mouse.click(box["x"] + 0.375 * box["width"], box["y"] + 0.25 * box["height"])
    page.settle()
    assert (page.link["head"], page.link["score"]) == ("L0H1", "previous_token")
    assert page.page.locator("#head").input_value() == "1"
    assert page.page.locator("path.head.L0H1").get_attribute("stroke-width") == "2.6"
    assert page.page.locator("[data-on=previous_token]").get_attribute("aria-pressed") == "true"
    assert "attention of L0H1 from the last token" in page.text("#key")
    bold = page.texts("#head-rows-plot text[style*='font-weight:700']")
    assert bold == ["L0H1"]
    value = next(r for r in recorded(run, "head_scores/previous_token") if r.step == 880)
    assert f"previous token {float(value.panel.values[0, 1]):.2f} at this step" in page.text(
        "#head-score"
    )
    page.page.locator("#head").select_option("7")
    page.settle()
    assert page.link["head"] == "L1H3"


def test_a_token_is_selected_everywhere(show: Open, report: Path) -> None:
    page = show(report)
    page.click(".token[data-q='25']")
    assert page.link["token"] == "25"
    assert page.text("#chosen-token").startswith(f"“{TOKENS[25]}” at position 25")
    page.click(".token[data-q='25']")
    assert "token" not in page.link
    page.page.locator("#prompt-plot").focus()
    page.press("ArrowRight", "ArrowRight")
    assert (page.link["token"], page.step) == ("1", "2,360")
    page.press("Escape")
    assert "token" not in page.link


def test_a_link_shows_the_same_view(show: Open, report: Path) -> None:
    link = "#step=880&head=L0H2&score=previous_token&method=saliency&log=1&unit=tokens&theme=dark"
    page = show(report, link)
    assert page.run("() => document.documentElement.dataset.theme") == "dark"
    assert page.step == "880"
    assert page.page.locator("#head").input_value() == "2"
    pressed = page.texts("[aria-pressed=true]")
    assert {"previous token", "saliency", "log axis", "in tokens"} <= set(pressed)
    assert "tokens" in page.texts("#axis text")
    page.run("() => { location.hash = '#step=400&head=L1H1'; }")
    page.settle()
    assert page.step == "400"


def test_nonsense_in_a_link_is_passed_over(show: Open, report: Path) -> None:
    page = show(
        report, "#step=x&head=L9H9&score=constructor&method=__proto__&token=9999&toString=1"
    )
    assert page.step == "2,360"
    assert page.page.locator("#head").input_value() == "7"


def test_answers_lead_to_their_charts(show: Open, report: Path) -> None:
    page = show(report, "#head=L1H1")
    for link in page.page.locator("#answers a").all():
        target = link.get_attribute("data-to")
        link.click()
        assert page.run("() => document.activeElement.id") == target
    assert page.link["head"] == "L1H1"


def test_copying_gives_the_records(show: Open, run: Run, report: Path) -> None:
    page = show(report)
    catch_copies(page)
    head, *lines = copied(page, "heads")
    assert head == "step,score,layer,head,value"
    row = next(line for line in lines if line.startswith("880,induction,1,3,"))
    true = next(r for r in recorded(run, "head_scores/induction") if r.step == 880)
    assert float(row.split(",")[-1]) == pytest.approx(float(true.panel.values[1, 3]), abs=1e-4)
    for name in ("when", "looked", "agree", "examples", "trust", "panel-entropy", "panel-lens"):
        assert len(copied(page, name)) > 3, name
    panels = [line.split(",")[1] for line in copied(page, "panel-entropy")]
    assert set(panels) == {"panel", "mean", "spread", "by_class"}


def catch_copies(page: Page) -> None:
    page.run(
        "() => Object.defineProperty(navigator, 'clipboard', "
        "{ value: { writeText: async text => { window.copied = text; } } })"
    )


def copied(page: Page, name: str) -> list[str]:
    page.click(f"[data-csv={name}]")
    return list(page.run("() => window.copied").strip().split("\n"))


# ---------------------------------------------------------------- states


def test_one_measurement_is_a_dot(show: Open, tmp_path: Path) -> None:
    run = Synthetic(steps=1, max_steps=400, state="running").write(tmp_path)
    page = show(write_report(run))
    assert page.text("#headline") == "Too early to tell"
    assert page.page.locator("#heads-plot circle.dot").count() >= 1
    assert page.page.locator("rect.future").count() >= 4
    assert page.text("#state") == "running, step 0 of 400"


def test_undefined_is_hatched_and_a_dash(show: Open, tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for step in range(0, 100, 10):
        values = torch.tensor([[0.1, float("nan")], [0.3, 0.2]])
        run.write(Record("head_scores/induction", Panel(values, ("layer", "head")), step))
        loss = float("nan") if 30 <= step < 60 else 5.0
        run.write(Record("head_scores/loss_second_copy", scalar(loss, "nats"), step))
    page = show(write_report(run), "#head=L0H1")
    assert page.texts("#at-step .value") == [".10", "—", ".30", ".20"]
    assert page.text("#head-score") == "induction — at this step, — at the end"
    path = page.page.locator("#when-plot path[stroke-width='2']").get_attribute("d")
    assert path.count("M") == 2  # a gap
    rows = page.run(
        """() => {
          const c = document.querySelector('#head-rows-plot canvas'), x = c.getContext('2d');
          const colours = r => Array.from({ length: 18 }, (_, j) =>
            x.getImageData(c.width / 2 + j, Math.floor((r + .5) * c.height / 4), 1, 1).data.join());
          return [0, 1].map(r => new Set(colours(r)).size);
        }"""
    )
    assert rows[0] == 1
    assert rows[1] > 1  # hatched
    assert "○ open" in page.texts("#trust td")


def test_what_was_not_measured_names_its_callback(show: Open, tmp_path: Path) -> None:
    run = Run.create(tmp_path, {"name": "bare"})
    run.path.joinpath("records.jsonl").touch()
    page = show(write_report(run))
    said = " ".join(page.texts(".empty"))
    for callback in (
        "HeadMonitor",
        "SaliencyMonitor",
        "IntegratedGradientsMonitor",
        "InfluenceMonitor",
    ):
        assert f"{callback}()" in said


@pytest.mark.slow
def test_many_heads_are_a_band_and_the_rising_ones(show: Open, tmp_path: Path) -> None:
    run = Synthetic(layers=32, heads=32, steps=24, span=23).write(tmp_path)
    page = show(write_report(run))
    assert page.page.locator("#heads-plot path.rest").count() == 1
    assert page.page.locator("#heads-plot path.head").count() <= 8
    assert re.search(r"other 1,?02\d stay near chance", page.text("#head-rows-sub"))


def test_hostile_texts_are_texts(show: Open, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "mi", {"name": HOSTILE[0], "text": HOSTILE[1]})
    count = len(HOSTILE)
    for step in range(3):
        labels = {"example,position": [HOSTILE]}
        pair = {"train_example": [7], "train_example,position": [HOSTILE]}
        index = {"train_example": [7]}
        facts = {"target_text": [HOSTILE[0]], "what": HOSTILE[1]}
        made = {
            "saliency/values": Panel(
                torch.rand(1, count), ("example", "position"), labels, convention=facts
            ),
            "influence/scores": Panel([[0.5]], ("query", "train_example"), index),
            "influence/tokens": Panel(torch.rand(1, count), ("train_example", "position"), pair),
            "prompt/answers": Panel([0.5, 0.3], ("token",), {"token": HOSTILE[:2]}),
            "mine/vector": Panel(
                torch.rand(count), ("class",), {"class": HOSTILE}, convention=facts
            ),
        }
        run.write_all(Record(name, panel, step) for name, panel in made.items())
    page = show(write_report(run))
    assert page.page.title() == f"{HOSTILE[0]} · lightning_mi"
    assert page.page.locator("img").count() == 0
    assert page.page.locator("script").count() == 3
    assert page.text("#name") == HOSTILE[0]
    assert page.page.locator("#prompt .token[data-q]").count() == count
    assert (
        page.page.locator("#prompt .token[data-q] > span").nth(2).inner_text() == "◌right to left"
    )
    assert max(len(t) for t in page.texts("#prompt .token")) <= 26
    page.page.locator("#prompt .token").first.hover()
    assert "</script>" in page.text("#tip") or "script" in page.text("#tip")


def long_run(path: Path) -> Run:
    """Every text that a user may give has 10,000 characters."""
    word = "x" * 10_000
    run = Run.create(path / "mi", {"name": word, "text": word, "model": word})
    facts = {"what": word, "target_text": [word]}
    index, pair = {"train_example": [3]}, {"writer": [word, "b"], "reader": [word, "c"]}
    labels = {"example,position": [[word, "a", "b"]]}
    ask = facts | {"method": word, "descriptions": [word], "texts": [word]}
    asked = {"target": word, "target_probability": 0.5}
    axes = ("example", "position")
    for step in range(3):
        made = {
            "saliency/values": Panel(torch.rand(1, 3), axes, labels, convention=facts),
            "integrated_gradients/values": Panel(torch.rand(1, 3), axes, labels, word, facts),
            "influence/scores": Panel(
                [[0.5]], ("query", "train_example"), index, convention={"method": word}
            ),
            "influence/proponents": Panel([0.5], ("train_example",), index, convention=ask),
            "prompt/answers": Panel([0.5, 0.3], ("token",), {"token": [word, "b"]}, "1", asked),
            "mine/vector": Panel(torch.rand(2), ("class",), {"class": [word, "b"]}, word, facts),
            "mine/matrix": Panel(torch.rand(2, 2), ("writer", "reader"), pair, word, facts),
            "mine/number": scalar(float(step), word, what=word),
            f"checked/{'x' * 80}": scalar(float("nan"), word, what=word),
        }
        run.write_all(Record(name, panel, step) for name, panel in made.items())
    return run


OUTSIDE = """() => [...document.querySelectorAll(".card svg > text")]
  .filter(text => {
    const right = one => one.getBoundingClientRect().right;
    return right(text) > right(text.closest(".card"));
  })
  .map(text => text.textContent)"""


def test_long_texts_do_not_widen_the_page(show: Open, tmp_path: Path) -> None:
    page = show(write_report(long_run(tmp_path)))
    assert page.run("() => document.documentElement.scrollWidth") == 1440
    assert page.run(OUTSIDE) == []


def test_shares_of_a_long_prompt_are_not_nothing(show: Open, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "mi")
    labels = {"example,position": [[str(k) for k in range(2000)]]}
    panel = Panel(torch.ones(1, 2000), ("example", "position"), labels)
    run.write(Record("saliency/values", panel, 0))
    page = show(write_report(run))
    assert page.text("#looked .sub").endswith("0 to 0.15 %")  # three times the mean share
    page.page.locator("#prompt .token").first.hover()
    assert "0.05" in page.text("#tip")


def test_a_token_in_a_right_to_left_text_keeps_its_own_direction(
    show: Open, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "mi")
    words = ["\u05e9\u05dc\u05d5\u05dd", "$\\frac{", "</b>"]
    index = {"train_example": [7]}
    run.write_all(
        [
            Record("influence/scores", Panel([[0.5]], ("query", "train_example"), index), 0),
            Record(
                "influence/tokens",
                Panel(
                    torch.rand(1, 3),
                    ("train_example", "position"),
                    {**index, "train_example,position": [words]},
                ),
                0,
            ),
        ]
    )
    page = show(write_report(run))
    spans = page.page.locator(".sides .text span")
    found = spans.evaluate_all("list => list.map(e => getComputedStyle(e).direction)")
    assert found == ["rtl", "ltr", "ltr"]


def test_a_curve_has_any_number_of_points(show: Open, run: Run, tmp_path: Path) -> None:
    """More than a function takes arguments."""
    data = payload(run)
    group = next(g for g in data["panels"] if g["measurement"] == "entropy")
    group["curves"][0] |= {"at": list(range(200_000)), "values": pack(np.arange(2e5) % 7)}
    group["curves"][0]["stderr"] = None
    path = tmp_path / "long.html"
    path.write_text(page_of(data), encoding="utf-8")
    page = show(path)
    assert "5" in page.texts("#panel-entropy-plot svg > text")


# ---------------------------------------------------------------- images and tables


def image_run(path: Path) -> Run:
    run = Run.create(path, {"name": "images"})
    draw = torch.Generator().manual_seed(0)
    axes = ("example", "channel", "y", "x")
    for step in range(0, 110, 10):
        values = torch.randn(2, 3, 4, 5, generator=draw)
        asked = {"target_text": ["2", "0"]}
        made = {
            "saliency/values": Panel(values.abs(), axes, unit="logits per unit", convention=asked),
            "integrated_gradients/values": Panel(values, axes, unit="logits", convention=asked),
        }
        run.write_all(Record(n, p, step) for n, p in made.items())
    index = {"train_example": [5, 9]}
    scores = Panel([[0.5, -0.25]], ("query", "train_example"), index)
    run.write(Record("influence/scores", scores, 100))
    grey = torch.tensor([0, 255]).repeat(2, 3, 2).to(torch.uint8)
    run.write(Record("influence/images", Panel(grey, ("train_example", "y", "x"), index), 100))
    return run


def test_images_take_the_place_of_the_prompt(show: Open, tmp_path: Path) -> None:
    page = show(write_report(image_run(tmp_path)), "#step=30")
    labels = page.run(
        "() => [...document.querySelectorAll('#images canvas')].map(c => c.ariaLabel)"
    )
    assert len([t for t in labels if t.endswith(" at step 30")]) == 4
    assert page.page.locator("#film-plot canvas").count() == 2 * 7
    shown = page.run("() => [...document.querySelectorAll('.card:not([hidden])')].map(c => c.id)")
    assert shown == ["looked", "images", "examples", "trust"]
    drawn = page.run(
        """() => [...document.querySelectorAll('#examples canvas')].map(c =>
           [c.ariaLabel, c.width, c.height, c.getContext('2d').getImageData(0, 0, 2, 1).data[4]])"""
    )
    assert drawn == [["train[5]", 4, 3, 255], ["train[9]", 4, 3, 255]]
    page.click("#film-plot button.plain")
    assert page.step == "0"
    page.click("#images button.plain >> nth=1")
    assert page.link["method"] == "saliency"


def test_tables_are_signed_bars(show: Open, tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    names = ["age", "blood pressure", "weight"]
    for step in range(0, 100, 10):
        values = torch.tensor([[0.5, -1.0, 0.25], [0.7, -1.0, 0.25]]) * (1 + step / 100)
        panel = Panel(values, ("example", "feature"), {"feature": names}, "logits")
        run.write(Record("integrated_gradients/values", panel, step))
    page = show(write_report(run), "#step=0")
    assert page.texts("#features .bar-row span") == ["blood pressure", "age", "weight"]
    assert page.texts("#features .bar-row b") == ["−1.00", "0.60", "0.25"]
    page.press("ArrowRight")
    assert page.texts("#features .bar-row b") == ["−1.10", "0.66", "0.28"]


# ---------------------------------------------------------------- several runs


def test_two_runs_are_dashes_and_a_difference(show: Open, seeds: list[Run], tmp_path: Path) -> None:
    page = show(write_report(seeds[:2], tmp_path / "two.html"), "#step=1000")
    assert page.text("#headline").startswith("Induction formed in 2 of 2 runs")
    assert page.texts("#runs li") == ["A synthetic run, seed 0", "B synthetic run, seed 1"]
    for k, run in enumerate(seeds[:2]):
        kept = [r.panel.item() for r in recorded(run, "head_scores/loss_second_copy")]
        drawn = page.values("#when-plot", f"path.run-{'AB'[k]}")
        np.testing.assert_allclose(drawn, kept, atol=0.06)
    dashes = [
        page.page.locator(f"#when-plot path.run-{c}").get_attribute("stroke-dasharray")
        for c in "AB"
    ]
    assert dashes[0] != dashes[1]
    assert {"A L1H3", "B L1H3"} <= set(page.texts("#heads-plot text"))
    a, b = (
        next(r for r in recorded(run, "head_scores/induction") if r.step == 1000).panel.values[1, 3]
        for run in seeds[:2]
    )
    said = [t.replace("−", "-") for t in page.texts("#pairs figcaption > span")]
    assert [float(t) for t in said] == pytest.approx([float(a), float(b), float(b - a)], abs=0.011)
    assert page.texts("#pairs figcaption b") == ["A", "B", "B − A"]
    assert page.page.locator("#trust tbody tr").count() == 6


def test_panels_that_no_chart_knows_are_compared(show: Open, run: Run, tmp_path: Path) -> None:
    other = Synthetic(seed=1, own=True).write(tmp_path / "mi")
    page = show(write_report([run, other], tmp_path / "two.html"))
    host = "#panel-entropy-plot > .plot:first-child > .plot:first-child"
    for letter, one in zip("AB", (run, other), strict=True):
        kept = [r.panel.item() for r in recorded(one, "entropy/mean")]
        np.testing.assert_allclose(page.values(host, f"path.run-{letter}"), kept, atol=0.02)
    assert {"A Mean", "B Mean"} <= {text.title() for text in page.texts(f"{host} text")}
    assert "run A" in page.text("#panel-entropy .panel-words")


def test_a_run_that_formed_is_drawn_whole_beside_one_that_did_not(
    show: Open, run: Run, tmp_path: Path
) -> None:
    none = Synthetic(forms=False, own=True).write(tmp_path / "mi")
    page = show(write_report([none, run], tmp_path / "two.html"))
    kept = [float(r.panel.values[1, 3]) for r in recorded(run, "head_scores/induction")]
    np.testing.assert_allclose(page.values("#heads-plot", "path.run-B"), kept, atol=0.004)
    catch_copies(page)
    lines = [line.rsplit(",", 4) for line in copied(page, "heads")]
    found = [
        float(v) for _, label, score, head, v in lines if (score, head) == ("induction", "L1H3")
    ]
    assert found[-len(kept) :] == pytest.approx(kept, abs=1e-4)
    for name in ("agree", "panel-entropy"):
        joined = "\n".join(copied(page, name))
        assert "synthetic run (" in joined, name


def test_more_than_four_runs_are_a_median_and_a_band(
    show: Open, seeds: list[Run], tmp_path: Path
) -> None:
    page = show(write_report(seeds, tmp_path / "six.html"))
    kept = np.array(
        [[r.panel.item() for r in recorded(run, "head_scores/loss_second_copy")] for run in seeds]
    )
    drawn = page.values("#when-plot", "path.median")
    np.testing.assert_allclose(drawn, np.median(kept, 0), atol=0.06)
    assert page.page.locator("#when-plot path.band").count() == 1
    assert page.run(OUTSIDE) == []
    assert page.page.locator("#pairs").is_hidden()
    assert "6 of 6 runs" in page.text("#headline")


# ---------------------------------------------------------------- while training goes on


def growing(path: Path, steps: int) -> Path:
    return write_report(Synthetic(steps=steps, max_steps=2400, state="running").write(path / "mi"))


@pytest.fixture
def live(chromium: Any, tmp_path: Path) -> Iterator[tuple[Page, Path]]:
    """A page whose clock is ours, open on a run that goes on."""
    context = chromium.new_context(viewport={"width": 1440, "height": 700})
    page = Page(context.new_page())
    page.page.clock.install()
    yield page.open(growing(tmp_path, 20)), tmp_path
    assert page.said == []
    context.close()


def after(page: Page, seconds: int) -> str:
    """Let time pass, and return the state that the page then shows."""
    page.page.clock.run_for(seconds * 1000)
    page.page.wait_for_timeout(100)
    page.page.wait_for_selector("html[data-ready=yes]", state="attached")
    return page.text("#state")


def test_an_open_page_follows_the_run(live: tuple[Page, Path]) -> None:
    page, path = live
    assert page.text("#state") == "running, step 760 of 2,400"
    page.run("() => scrollTo(0, 300)")
    growing(path, 24)
    assert after(page, 11) == "running, step 920 of 2,400"
    assert page.step == "920"  # newest stays newest
    assert page.run("() => scrollY") == 300


def test_a_chosen_step_and_head_stay_chosen(live: tuple[Page, Path]) -> None:
    page, path = live
    page.run("() => { location.hash = '#step=400&head=L0H2&theme=dark'; }")
    growing(path, 24)
    assert after(page, 11) == "running, step 920 of 2,400"
    assert page.step == "400"
    assert page.page.locator("#head").input_value() == "2"
    assert page.run("() => document.documentElement.dataset.theme") == "dark"


def test_a_page_that_is_touched_or_hidden_is_left_alone(live: tuple[Page, Path]) -> None:
    page, path = live
    page.page.keyboard.press("ArrowLeft")
    growing(path, 24)
    assert after(page, 11) == "running, step 760 of 2,400"
    page.run("() => Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    assert after(page, 60) == "running, step 760 of 2,400"
    page.run(
        "() => Object.defineProperty(document, 'hidden', { value: false, configurable: true })"
    )
    assert after(page, 11) == "running, step 920 of 2,400"


def test_a_finished_run_is_never_read_again(chromium: Any, report: Path) -> None:
    page = Page(chromium.new_page())
    page.page.clock.install()
    page.open(report).run("() => { window.mark = 1; }")
    page.page.clock.run_for(120_000)
    assert page.run("() => window.mark") == 1
    page.page.close()


# ---------------------------------------------------------------- for everyone, and on paper


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("state", ["own", "two", "images", "running"])
def test_no_violation_of_accessibility(
    chromium: Any, report: Path, seeds: list[Run], tmp_path: Path, state: str, theme: str
) -> None:
    axe = needs("axe-core", "axe.min.js").read_text(encoding="utf-8")
    path = {
        "own": lambda: report,
        "two": lambda: write_report(seeds[:2], tmp_path / "two.html"),
        "images": lambda: write_report(image_run(tmp_path)),
        "running": lambda: growing(tmp_path, 12),
    }[state]()
    # The page forbids scripts from outside; the checker is one.
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, bypass_csp=True)
    page = Page(context.new_page()).open(path, f"#theme={theme}&step=400")
    page.page.add_script_tag(content=axe)
    found = page.run("async () => (await axe.run(document)).violations")
    told = [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found]
    assert told == [], json.dumps(told)
    context.close()


def test_paper_is_white_and_has_no_buttons(show: Open, report: Path) -> None:
    page = show(report, "#theme=dark&step=880")
    page.run(
        """() => addEventListener("beforeprint", () => {
          window.seen = [document.documentElement.dataset.theme, document.body.clientWidth];
        })"""
    )
    assert page.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    assert page.run("() => window.seen") == ["light", 1344]
    assert page.run("() => document.documentElement.dataset.theme") == "dark"
    page.page.emulate_media(media="print")
    for hidden in ("#play", "#theme", "[data-csv=heads]"):
        assert not page.page.locator(hidden).is_visible(), hidden


TURN = "await new Promise(r => requestAnimationFrame(() => setTimeout(r)));"
STEPS = f"""async count => {{
  for (let k = 0; k < count; k++) {{
    const press = {{ key: "ArrowRight", bubbles: true }};
    document.body.dispatchEvent(new KeyboardEvent("keydown", press));
    {TURN}
  }}
}}"""
CLICKS = f"""async count => {{
  const list = document.querySelector("#head");
  for (let k = 0; k < count; k++) {{
    list.value = 10 + 7 * k;
    list.dispatchEvent(new Event("change"));
    {TURN}
  }}
}}"""


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "megabytes"), [(12, 1), (32, 3)])
def test_large_runs_are_small_and_quick(
    chromium: Any, tmp_path: Path, heads: int, megabytes: int
) -> None:
    """201 steps: drawn in 1 s (1.5 s), a step in 40 ms, a click in 120 ms of processor time."""
    run = Synthetic(layers=heads, heads=heads, steps=201).write(tmp_path)
    report = write_report(run)
    assert report.stat().st_size < megabytes * 1_000_000
    page = Page(chromium.new_page(viewport={"width": 1440, "height": 1000}))
    tools = page.page.context.new_cdp_session(page.page)
    tools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        """Processor time of the page's own thread: other processes do not count."""
        found = tools.send("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in found if m["name"] == "TaskDuration"))

    def each(script: str, count: int) -> float:
        before = spent()
        page.run(script, count)
        return (spent() - before) / count

    page.open(report, "#step=800")
    assert spent() < (1.0 if heads == 12 else 1.5)
    assert each(STEPS, 15) < 0.040
    assert each(CLICKS, 9) < 0.120
    page.page.close()
