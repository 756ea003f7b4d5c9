"""Panels, records and their plain forms."""

from __future__ import annotations

import enum
import json
import math

import numpy as np
import pytest
import torch

from lightning_mi import ArgumentError, LightningMIError, Panel, Record
from lightning_mi.record import AXES, number_to_json, plain, scalar


class Colour(str, enum.Enum):
    RED = "red"


def test_axes_are_a_closed_vocabulary() -> None:
    for axis in AXES:
        assert Panel(torch.zeros(2), (axis,)).size == {axis: 2}
    with pytest.raises(ArgumentError, match=r"axes: expected distinct names .*got \('heads',\)"):
        Panel(torch.zeros(2), ("heads",))


@pytest.mark.parametrize("axes", [(), ("layer",), ("layer", "head", "neuron")])
def test_every_dimension_has_a_name(axes: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"axes: expected 2 names for values of shape \(2, 3\)"):
        Panel(torch.zeros(2, 3), axes)


def test_a_name_stands_once() -> None:
    with pytest.raises(ArgumentError, match="distinct"):
        Panel(torch.zeros(2, 2), ("head", "head"))


def test_labels_of_one_and_of_several_axes() -> None:
    panel = Panel(
        torch.zeros(2, 3),
        ("example", "position"),
        {"example": range(2), "example,position": [list("abc"), list("def")]},
    )
    assert panel.coords["example"] == [0, 1]
    assert panel.coords["example,position"][1] == ["d", "e", "f"]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"head": [0, 1]}, r"coords: expected keys out of \('example', 'position'\), got 'head'"),
        ({"example": [0]}, r"coords\['example'\]: expected labels of shape \(2,\), got 1 labels"),
        ({"example": "ab"}, r"labels of shape \(2,\), got 'ab'"),
        ({"example": 2}, r"labels of shape \(2,\), got 2"),
        ({"example,position": [["a"] * 3, ["a"] * 2]}, r"labels of shape \(2, 3\)"),
        ({"example": [object(), 1]}, "coords: expected plain JSON"),
    ],
)
def test_labels_must_fit(coords: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Panel(torch.zeros(2, 3), ("example", "position"), coords)


def test_values_are_detached_copies() -> None:
    source = torch.ones(2, requires_grad=True)
    array = np.ones(2)
    panels = Panel(source, ("head",)), Panel(array, ("head",))
    with torch.no_grad():
        source.zero_()
    array[:] = 0
    assert not panels[0].values.requires_grad
    assert all(panel.values.tolist() == [1, 1] for panel in panels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    assert Panel(torch.ones(2, dtype=dtype), ("head",)).values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.uint8])
def test_other_types_stay(dtype: torch.dtype) -> None:
    assert Panel(torch.ones(2, dtype=dtype), ("head",)).values.dtype == dtype


def test_complex_values_are_refused() -> None:
    with pytest.raises(ArgumentError, match="values: expected real numbers, got complex64"):
        Panel(torch.ones(2, dtype=torch.complex64), ("head",))


def test_values_from_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        made = torch.ones(2, dtype=torch.float16)
        panels = [Panel(made, ("head",)), Panel(made.double(), ("head",))]
    for panel in [*panels, Panel(made, ("head",))]:
        assert not panel.values.is_inference()
        panel.values.requires_grad_().sum().backward()  # an inference tensor raises here


def test_convention_becomes_plain() -> None:
    panel = scalar(1.0, "nats", n=np.int64(3), levels=(1, 2), t=torch.tensor([0.5]))
    assert json.dumps(panel.convention) == '{"n": 3, "levels": [1, 2], "t": [0.5]}'
    with pytest.raises(ArgumentError, match=r"convention: expected plain JSON.*a Linear"):
        scalar(1.0, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (Colour.RED, "red"),
        ({1: (None, {"b", "a"})}, {"1": [None, ["a", "b"]]}),
        (range(3), [0, 1, 2]),
        (torch.ones(1, 2), [[1.0, 1.0]]),
    ],
)
def test_plain_is_made_of_built_in_types(value: object, expected: object) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)


def test_equality_is_bitwise_but_for_nan() -> None:
    nan = Panel([1.0, math.nan], ("head",))
    assert nan.equal(Panel([1.0, math.nan], ("head",)))
    assert not nan.equal(Panel([1.0, 2.0], ("head",)))
    assert not nan.equal(Panel([1.0, math.nan], ("layer",)))
    assert not nan.equal(Panel([1.0, math.nan], ("head",), {"head": [0, 1]}))
    assert not nan.equal(Panel(nan.values.double(), ("head",)))
    assert not nan.equal(Panel([1.0, math.nan, 0.0], ("head",)))


def test_non_finite_values_are_counted() -> None:
    assert Panel([0.0, math.nan, math.inf, -math.inf], ("head",)).nonfinite == 3
    assert Panel(torch.ones(2, dtype=torch.int64), ("head",)).nonfinite == 0


def test_numbers_as_json() -> None:
    assert number_to_json(-0.5) == -0.5
    texts = [number_to_json(x) for x in (math.inf, -math.inf, math.nan)]
    assert texts == ["inf", "-inf", "nan"]


def test_a_record_is_known_by_name_step_and_source() -> None:
    record = Record("head_scores/induction/x", scalar(1.0), step=3, source="sweep")
    assert record.key == ("head_scores/induction/x", 3, "sweep")
    assert (record.measurement, record.what) == ("head_scores", "induction/x")
    changed = record.replace(step=4)
    assert (changed.step, record.step, changed.panel) == (4, 3, record.panel)


def test_errors_have_one_base_and_a_built_in_one() -> None:
    error = ArgumentError.of("steps", expected="an int", got="x", do="Pass 8.")
    assert isinstance(error, LightningMIError)
    assert isinstance(error, ValueError)
    assert str(error) == "steps: expected an int, got x. Pass 8."
