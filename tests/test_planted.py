"""Known causes: planted texts are the top proponents, and equal ones are shown as one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_influence import Language
from torch import nn
from torch.utils.data import TensorDataset

from lightning_mi import (
    Classification,
    Context,
    IndexedData,
    LogProbability,
    NextToken,
    Run,
    measure,
)
from lightning_mi.influence import InfluenceFunction, Objective, TracIn, influence_scores, tracin
from lightning_mi.report import write_report

PLANTED = 4
"""Texts that say: after 9 3 comes 7."""


@pytest.fixture(scope="module")
def planted() -> tuple[nn.Module, TensorDataset]:
    """A small language model that learned a completion from four of its sixty texts."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 9, (60, 8), generator=draw)
    texts[texts == 7] = 1
    for i in range(PLANTED):
        texts[i, 3 + i % 2 : 6 + i % 2] = torch.tensor([9, 3, 7])
    torch.manual_seed(0)
    model = Language(width=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    task, batch = NextToken(), (texts,)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(model(texts), batch).mean().backward()
        optimizer.step()
    return model, TensorDataset(texts)


@pytest.mark.parametrize("solver", ["ekfac", "kfac", None])
def test_planted_texts_are_the_top_proponents(planted: Any, solver: str | None) -> None:
    """The query is another text with the same beginning; what was planted comes next."""
    model, data = planted
    query = TensorDataset(torch.tensor([[2, 5, 9, 3]]))
    options: dict[str, Any] = {"query": LogProbability(7), "shown": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model is far", UserWarning)
        if solver is None:
            found = tracin(model, Objective(NextToken()), data, query, **options)
        else:
            # Sixty short texts say little about most directions: less damping would amplify those.
            options |= {"solver": solver, "damping": 0.1}
            found = influence_scores(model, Objective(NextToken()), data, query, **options)
    # Without curvature one of them falls behind others that merely push the same unit.
    count = PLANTED if solver is not None else PLANTED - 1
    proponents, _ = found.top(k=count)
    assert set(proponents) <= set(range(PLANTED))
    assert len(proponents) == count


class Named(TensorDataset):
    def describe(self, index: int) -> str:
        return f"picture {index}"


def pictures() -> tuple[nn.Module, Named]:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 4, 3)
    images[[5, 7]] = images[2].clone()
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), Named(images, labels)


@pytest.mark.parametrize("measurement", [TracIn(top=2), InfluenceFunction(top=2)])
def test_equal_examples_are_shown_as_one(measurement: Any, tmp_path: Path) -> None:
    model, data = pictures()
    context = Context(model, data[2:3], Classification(), dataset=IndexedData(data))
    records = measure(model, measurement, context=context)
    panels = {r.what: r.panel for r in records}
    scores, top = panels["scores"], panels["proponents"]
    assert scores.size["train_example"] == 8
    assert top.coords["train_example"][0] == 2
    assert top.convention["copies"] == [[5, 7], []]
    assert top.convention["descriptions"][0] == "picture 2 and 2 equal"
    assert len(top.values) == 2
    assert set(panels["opponents"].coords["train_example"]).isdisjoint({2, 5, 7})
    images = panels["images"]
    assert images.axes == ("train_example", "y", "x")
    assert images.values.shape == (4, 4, 3)
    assert images.values.dtype == torch.uint8
    shown = [*top.coords["train_example"], *panels["opponents"].coords["train_example"]]
    assert images.coords["train_example"] == shown
    run = Run.create(tmp_path / "mi")
    run.write_all(records)
    page = write_report(run).read_text()
    assert "picture 2 and 2 equal" in page
    from lightning_mi.report.data import payload

    found = payload(run)["examples"]
    assert [e["index"] for e in found["proponents"]].count(5) == 0
    assert 7 not in [e["index"] for e in found["proponents"]]
    json.dumps(top.convention)


def test_equal_texts_are_shown_as_one_with_their_words() -> None:
    torch.manual_seed(0)
    model = Language()
    texts = torch.randint(0, 11, (7, 6))
    texts[4] = texts[1]
    data = TensorDataset(texts)
    context = Context(
        model,
        (texts[1:2],),
        NextToken(),
        dataset=IndexedData(data),
        decode=lambda ids: [f"<{i}>" for i in ids],
    )
    panels = {r.what: r.panel for r in measure(model, TracIn(top=3), context=context)}
    top = panels["proponents"]
    assert top.coords["train_example"][0] == 1
    assert top.convention["copies"][0] == [4]
    assert top.convention["texts"][0] == "".join(f"<{i}>" for i in texts[1].tolist())
    assert len(set(top.convention["texts"])) == len(top.values)
    assert "images" not in panels
    tokens = panels["tokens"]
    assert 4 not in tokens.coords["train_example"]
    rows = dict(zip(tokens.coords["train_example"], tokens.values, strict=True))
    assert float(rows[1].sum()) == pytest.approx(float(top.values[0]), rel=1e-4)
