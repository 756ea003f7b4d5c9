"""Every measurement of circuits can be named in a configuration file."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from lightning_mi import circuits
from lightning_mi.measurement import Measurement

BEHAVIOR = {"class_path": "lightning_mi.behaviors.RepeatedTokens"}
REQUIRED: dict[str, dict[str, Any]] = {
    "HeadDirections": {"heads": ["L0H1"]},
    "HypothesisTest": {
        "hypothesis": {
            "class_path": "lightning_mi.circuits.CircuitHypothesis",
            "init_args": {"name": "own", "steps": [{"name": "copies", "kind": "head"}]},
        }
    },
    "SubspacePatching": {"part": "L0H1"},
    "Align": {"part": "resid1"},
    "FunctionalSubspaces": {"behaviors": {"copying": BEHAVIOR}, "parts": ["L0H1"]},
}


def measurements() -> list[str]:
    """Return the names of the dataclasses that satisfy the protocol."""
    found = []
    for name in circuits.__all__:
        kind = getattr(circuits, name)
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and "__call__" in vars(kind):
            found.append(name)
    return found


def test_there_are_measurements() -> None:
    assert {"HeadScores", "Composition", "EdgeAttribution", "HypothesisTest"} <= {*measurements()}


@pytest.mark.parametrize("name", measurements())
def test_a_measurement_is_named_in_a_file(name: str) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    kind = getattr(circuits, name)
    needed = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    arguments = dict(REQUIRED.get(name, {}))
    if "behavior" in needed:
        arguments["behavior"] = BEHAVIOR
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--measurements", type=list[Measurement])
    entry = {"class_path": f"lightning_mi.circuits.{name}", "init_args": arguments}
    found = parser.instantiate(parser.parse_object({"measurements": [entry]}))
    assert isinstance(found.measurements[0], kind)
