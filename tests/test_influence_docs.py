"""What the page on influence shows runs as it stands, and names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_mi import influence
from lightning_mi.influence import evaluate
from lightning_mi.influence.choosing import as_solver, named_solvers
from lightning_mi.influence.result import CERTIFICATE

PAGE = (Path(__file__).parent.parent / "docs" / "influence.md").read_text()


def test_the_blocks_run_one_after_the_other(capsys: Any) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/influence.md", "exec"), names)
    assert len(blocks) >= 5
    assert names["scores"].values.shape == (6, 90)
    assert len(names["proponents"]) == 3
    assert names["found"].mean > 0.5
    printed = capsys.readouterr().out
    assert "influence_lds/lds ekfac" in printed


def test_every_solver_and_evaluation_stands_on_it() -> None:
    for name in named_solvers():
        if name != "direct":  # Another name of exact.
            assert f'"{name}"' in PAGE or type(as_solver(name)).__name__ in PAGE, name
    for name in ("lds", "leave_one_out", "brittleness", "pbrf", "mislabel_auc", "tail_patch"):
        assert hasattr(evaluate, name)
        assert f"`{name}`" in PAGE
    for name in re.findall(r"`(\w+)\(", PAGE):
        owners = (influence, evaluate, __import__("lightning_mi"))
        assert name in {"retrain"} or any(hasattr(o, name) for o in owners), name


@pytest.mark.parametrize("key", CERTIFICATE)
def test_the_whole_certificate_is_explained(key: str) -> None:
    assert f"`{key}`" in PAGE
