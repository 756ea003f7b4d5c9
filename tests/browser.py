"""A browser for the tests of the report: Debian's chromium, driven by Playwright.

Everything is skipped, with the reason, where one of them is absent. `axe` and the type checker come
with npm; ``make test-browser`` fetches them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MODULES = Path(os.environ.get("LIGHTNING_MI_NODE_MODULES", Path(sys.prefix) / "js/node_modules"))
"""Where ``make test-browser`` lets npm put axe-core and TypeScript."""

DRAWN = "html[data-ready=yes]"


def needs(module: str, file: str) -> Path:
    """Return a file of an npm package, or skip the test."""
    path = MODULES / module / file
    if not path.exists():
        pytest.skip(f"{module} is not there: `make test-browser` fetches it with npm")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """A headless chromium, or a skipped test."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not there: pip install lightning-mi[browser]"
    )
    if CHROMIUM is None:
        pytest.skip("chromium is not there: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


class Page:
    """One page of the browser, that notes what the console and the network say.

    Args:
        page: Playwright's page.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(10_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, report: Path, link: str = "") -> Page:
        """Open a report and wait until it is drawn."""
        self.page.goto(f"file://{report}{link}")
        self.page.wait_for_selector(DRAWN, state="attached")
        return self

    def run(self, script: str, argument: Any = None) -> Any:
        """Evaluate a script in the page."""
        return self.page.evaluate(script, argument)

    def text(self, where: str) -> str:
        """Text of the first element that fits."""
        return str(self.page.locator(where).first.inner_text())

    def texts(self, where: str) -> list[str]:
        """Text of every element that fits, also of what is drawn."""
        return [str(t).strip() for t in self.page.locator(where).all_text_contents()]

    def settle(self) -> None:
        """Wait until the next frame has been drawn."""
        self.run("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def press(self, *keys: str) -> None:
        """Press keys, one after another, and wait for the drawing."""
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def click(self, where: str, **options: Any) -> None:
        """Click, and wait for the drawing."""
        self.page.locator(where).first.click(**options)
        self.settle()

    @property
    def step(self) -> str:
        """The step that the page says it shows."""
        return self.text("#now").split()[1]

    @property
    def link(self) -> dict[str, str]:
        """What the address keeps."""
        pairs = self.run("() => [...new URLSearchParams(location.hash.slice(1))]")
        return dict(pairs)

    def curve(self, where: str) -> list[tuple[float, float]]:
        """Points of a drawn curve, read back from its path, in pixels."""
        path = self.page.locator(where).first.get_attribute("d") or ""
        pairs = path.replace("M", " ").replace("L", " ").split()
        return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]

    def scale(self, host: str) -> tuple[float, float]:
        """Slope and offset from pixels to values, read back from the labels of a lane's axis."""
        marks = self.run(
            """host => [...document.querySelectorAll(`${host} svg > text[text-anchor=end]`)]
              .map(t => [t.textContent.replace("−", "-"), +t.getAttribute("y") - 4])""",
            host,
        )
        (low, y0), (high, y1) = marks[0], marks[-1]
        slope = (float(high) - float(low)) / (y1 - y0)
        return slope, float(low) - slope * y0

    def values(self, host: str, where: str) -> list[float]:
        """Values of a drawn curve, read back from path and axis."""
        slope, offset = self.scale(host)
        return [slope * y + offset for _, y in self.curve(f"{host} {where}")]
