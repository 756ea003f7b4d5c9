"""Batches of every usual form."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mi import ArgumentError
from lightning_mi.batch import (
    attention_mask_of,
    batch_size,
    cloned,
    cut,
    fingerprint,
    labels_of,
    main_input,
    moved,
    with_main_input,
)

Pair = namedtuple("Pair", ["x", "y"])
X = torch.arange(12.0).reshape(4, 3)
Y = torch.arange(4)


def encoding() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding({"input_ids": X, "labels": Y})


FORMS: dict[str, Any] = {
    "tensor": lambda: X,
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y],
    "named tuple": lambda: Pair(X, Y),
    "dict": lambda: {"labels": Y, "x": X},
    "other key": lambda: {"labels": Y, "name": "a", "mine": X},
    "user dict": lambda: UserDict({"labels": Y, "pixel_values": X}),
    "encoding": encoding,
    "nested": lambda: ({"input_ids": X, "ids": ["a", "b", "c", "d"]}, Y),
    "nested under a key": lambda: {"inputs": [X, X + 1], "labels": Y},
}


@pytest.fixture(params=FORMS)
def batch(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]()


def test_inputs_and_labels_are_found(batch: Any) -> None:
    assert main_input(batch) is X
    assert batch_size(batch) == 4
    labels = labels_of(batch)
    assert labels is (None if isinstance(batch, Tensor) else Y)


def test_cut_keeps_the_first_examples_and_the_form(batch: Any) -> None:
    short = cut(batch, 2)
    assert torch.equal(main_input(short), X[:2])
    assert isinstance(batch, Tensor) or torch.equal(labels_of(short), Y[:2])
    assert isinstance(short, tuple) == isinstance(batch, tuple)
    assert batch_size(batch) == 4, "the user's batch was changed"


def test_clones_share_nothing(batch: Any) -> None:
    with torch.inference_mode():
        copy = cloned(batch)
    inputs = main_input(copy)
    assert torch.equal(inputs, X)
    assert inputs.data_ptr() != X.data_ptr()
    assert not inputs.is_inference()


def test_other_inputs_take_the_place_of_the_first(batch: Any) -> None:
    new = torch.zeros(4, 3)
    changed = with_main_input(batch, new)
    assert main_input(changed) is new
    assert main_input(batch) is X
    assert labels_of(changed) is labels_of(batch)
    assert isinstance(changed, tuple) == isinstance(batch, tuple)


def test_moving_casts_floats_alone(batch: Any) -> None:
    there = moved(batch, torch.device("cpu"), torch.float64)
    assert main_input(there).dtype == torch.float64
    assert isinstance(batch, Tensor) or labels_of(there) is Y
    assert main_input(moved(batch, torch.device("cpu"))) is X


@pytest.mark.parametrize("bad", [None, 3, "text", [], {}, {"labels": Y}, ["text"], np.ones(3)])
def test_a_batch_without_a_tensor_is_refused(bad: object) -> None:
    with pytest.raises(ArgumentError, match="batch: expected a tensor, a tuple"):
        main_input(bad)


def test_cut_shortens_only_what_runs_along_the_batch() -> None:
    batch = (X, {"weights": torch.ones(3), "names": ["a", "b", "c", "d"], "two": (1, 2)}, 7)
    _, extra, seven = cut(batch, 2)
    assert len(extra["weights"]) == 3
    assert extra["names"] == ["a", "b"]
    assert (extra["two"], seven) == ((1, 2), 7)


def test_a_batch_of_two_in_a_pair_is_cut_inside() -> None:
    x, y = cut((X[:2], Y[:2]), 1)
    assert (len(x), len(y)) == (1, 1)


def test_only_a_two_dimensional_mask_is_one() -> None:
    mask = torch.ones(2, 3)
    assert attention_mask_of({"attention_mask": mask}) is mask
    assert attention_mask_of({"attention_mask": mask[None]}) is None
    assert attention_mask_of((X, mask)) is None


def test_equal_batches_have_equal_fingerprints(batch: Any) -> None:
    assert fingerprint(batch) == fingerprint(cloned(batch))
    assert len(fingerprint(batch)) == 16


def test_different_batches_have_different_fingerprints() -> None:
    batches = [
        X,
        X + 1e-6,
        X.T,
        X.double(),
        X.reshape(3, 4),
        [X],
        (X, Y),
        (Y, X),
        {"x": X},
        {"y": X},
        {"x": X, "y": None},
        [1, 23],
        [12, 3],
        ["ab", "c"],
        ["a", "bc"],
        [[1], 2],
        [1, [2]],
        torch.tensor(True),
        torch.tensor(1, dtype=torch.uint8),
        torch.empty(0),
        np.zeros(2),
        np.ones(2),
        X.bfloat16(),
    ]
    found = [fingerprint(b) for b in batches]
    assert len(set(found)) == len(found)


def test_fingerprints_name_no_address() -> None:
    assert fingerprint([object()]) == fingerprint([object()])
    assert fingerprint(X[:, ::2]) == fingerprint(X[:, ::2].contiguous())
    assert fingerprint(X[:1, 1]) == fingerprint(X[:1, 1].clone())  # A single number, any stride.
