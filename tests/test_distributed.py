"""Two processes train to the same weights with and without, and write one set of records."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from lightning_mi import Run

SCRIPT = """
import sys, warnings
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import cases
from test_harmless import all_monitors
from lightning_mi.callbacks import ScheduledCheckpoint

if __name__ == "__main__":
    folder, watched = sys.argv[1], sys.argv[2] == "watched"
    cases.lightning().seed_everything(3, verbose=False)
    model = cases.language_model()
    callbacks = [*all_monitors(every_n_train_steps=2), ScheduledCheckpoint(every_n_train_steps=2)]
    fitted = cases.trainer(
        callbacks=callbacks if watched else [],
        default_root_dir=folder, devices=2, strategy="ddp_fork", max_steps=3,
    )
    fitted.fit(model, *cases.loaders())
    torch.save(model.state_dict(), folder + "/weights.pt")
"""


def train(folder: Path, watched: bool) -> dict[str, torch.Tensor]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    mode = "watched" if watched else "plain"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), mode],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


def test_two_processes(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", watched=False)
    watched = train(tmp_path / "watched", watched=True)
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    records = Run.open(tmp_path / "watched").records()
    keys = [r.key for r in records]
    lines = (tmp_path / "watched" / "mi" / "records.jsonl").read_text()
    written = [line for line in lines.splitlines() if line.startswith('{"name"')]
    # Each of the monitors brings the overhead up to date; all else is written once.
    once = [line for line in written if '"monitor/overhead"' not in line]
    assert len(keys) == len(set(keys))
    assert len(once) == len([k for k in keys if k[0] != "monitor/overhead"])
    assert {r.step for r in records if r.measurement == "gradients"} == {0, 2, 3}
    # Both ranks' examples are counted: 2 processes, 8 examples each.
    assert {r.step: r.samples for r in records}[2] == 2 * 2 * 8
