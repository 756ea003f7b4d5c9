"""The demo runs from start to end, and passes its own check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mi import Run

DEMO = Path(__file__).parent.parent / "demos" / "induction_real_text.py"


@pytest.mark.slow
def test_demo_from_start_to_end(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    lines = (
        f"Line {i} says that {i} and {i * i} are numbers, and so is {i % 97}." for i in range(900)
    )
    text.write_text("\n".join(lines))
    command = [sys.executable, str(DEMO), "--text", str(text), "--steps", "40"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pass  live equals swept" in done.stdout
    assert "\x1b" not in done.stdout  # nothing garbles a file
    run = Run.open(tmp_path / "run")
    assert run.info["checks"][0]["status"] == "pass"
    page = run.report.read_text()
    assert "induction_real_text" in page
    # The circuit is drawn from its edges, and said in sentences, there and in the terminal.
    assert "embed is read by" in page
    assert "edges alone do" in done.stdout
