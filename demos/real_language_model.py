"""Take a real language model apart: SmolLM2-135M, 30 layers of 9 heads, grouped queries.

Run by ``make demo-lm``. Nothing is trained. The heads that induction needs are found by where they
look, then by what their weights say of each other: previous-token heads write into the very
subspaces that induction heads take their keys from. Then one answer is taken apart into what each
part of the model writes, and followed through the layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _smollm2 import load_smollm2
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_mi import LogitDifference, NextToken, Record, Run, measure
from lightning_mi.attribution import Saliency
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import (
    Composition,
    HeadRoles,
    HeadScores,
    LogitAttribution,
    LogitLens,
    PromptAttention,
    SubspaceOverlap,
)
from lightning_mi.measurement import Context
from lightning_mi.report import write_report

PROMPT, RIGHT, WRONG = (
    "When Mary and John went to the store, John gave a drink to",
    " Mary",
    " John",
)
REPEATED = RepeatedTokens(length=50, sequences=4)
SHOWN = 5


def measurements(right: int, wrong: int) -> list[Any]:
    """Return what is measured; forward passes and the anatomy are shared."""
    # The answer is the last token of the batch: it is asked for one position earlier.
    asked = LogitDifference(right, other=wrong, position=-2)
    return [
        HeadScores(tokens=REPEATED),
        HeadRoles(tokens=REPEATED),
        Composition(rotations=16),
        SubspaceOverlap(),
        LogitAttribution(target=asked),
        LogitLens(),
        Saliency(target=asked),
        PromptAttention(),
    ]


def main() -> None:
    """Measure, say what was found, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="for the results")
    options = parser.parse_args()
    console, began = Console(), time.perf_counter()
    with console.status("reading the weights of SmolLM2-135M"):
        model, tokenizer = load_smollm2()
    records = look(model, tokenizer, console)
    found = {record.name: record for record in records}
    for title, lines in (
        ("Which heads look back?", heads(found)),
        ("Do their weights fit together?", pairs(found)),
        (f"{PROMPT!r} → {RIGHT!r} rather than {WRONG!r}: which parts write it?", parts(found)),
        ("From which layer on?", layers(found)),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    run = Run.create(options.folder / "mi", {"title": "SmolLM2-135M", "model": "SmolLM2-135M"})
    run.write_all(records)
    console.print(f"\nThe report: {write_report(run)}", highlight=False, soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - began:.0f} seconds.", highlight=False)


def look(model: Any, tokenizer: Any, console: Console) -> list[Record]:
    """Return all records."""
    right, wrong = (tokenizer.encode(word)[0] for word in (RIGHT, WRONG))
    ids = torch.tensor([[*tokenizer.encode(PROMPT), right]])

    def decode(tokens: Sequence[int]) -> list[str]:
        return [tokenizer.decode([i]) for i in tokens]

    context = Context(model, ids, NextToken(), decode=decode)
    records: list[Record] = []
    for measurement in measurements(right, wrong):
        with console.status(f"measuring {measurement.name.replace('_', ' ')}"):
            records += measure(model, measurement, context=context)
    return records


def heads(found: dict[str, Record]) -> Iterator[Table | str]:
    """Name the strongest heads of each kind, beside what uniform attention would score."""
    table = Table("", "strongest heads", "uniform", box=None)
    for score in ("induction", "previous_token", "duplicate_token"):
        values = found[f"head_scores/{score}"].panel.values
        null = float(found[f"head_scores/{score}_null"].panel.values.nanmean())
        named = "  ".join(f"{name} {value:.2f}" for name, value in strongest(values))
        table.add_row(score.replace("_", " "), named, f"{null:.3f}")
    yield table
    first, second = (
        float(found[f"head_scores/loss_{copy}_copy"].panel.values) for copy in ("first", "second")
    )
    yield f"Loss on random tokens {first:.1f} nats, on their repetition {second:.1f}."


def pairs(found: dict[str, Record]) -> Iterator[Table | str]:
    """Say how previous-token heads fit to induction heads, among all pairs of heads."""
    writers = [n for n, _ in strongest(found["head_scores/previous_token"].panel.values, 2)]
    readers = [n for n, _ in strongest(found["head_scores/induction"].panel.values, 4)]
    table = Table("writes → reads keys", "composition", "z", "subspace overlap", "rank", box=None)
    raw = found["composition/K"].panel
    scores, overlap = found["composition/K_z"].panel, overlaps(found)
    finite = raw.values[raw.values > 0]
    for writer in writers:
        for reader in readers:
            value = entry(raw, writer, reader)
            if value <= 0:
                continue
            rank = int((finite > value).sum()) + 1
            table.add_row(
                f"{writer} → {reader}",
                f"{value:.3f}",
                f"{entry(scores, writer, reader):+.0f}",
                f"{entry(overlap, writer, reader):.3f}",
                f"{rank} of {len(finite):,}",
            )
    yield table
    yield f"By chance, composition is {576**-0.5:.3f}."


def overlaps(found: dict[str, Record]) -> Any:
    """Return the panel of overlaps of what is written with what keys are read from."""
    names = [n for n in found if n.startswith("subspace_overlap/K")]
    return found[min(names, key=len)].panel


def parts(found: dict[str, Record]) -> Iterator[str]:
    """Name the parts that add most to the difference of the two logits."""
    panel = found["logit_attribution/writers"].panel
    values, labels = panel.values, list(panel.coords["writer"])
    order = values.abs().argsort(descending=True)[: 2 * SHOWN].tolist()
    yield "  " + "  ".join(f"{labels[i]} {values[i]:+.2f}" for i in order)
    gap = float(found["logit_attribution/gap"].panel.values)
    total = float(found["logit_attribution/logit"].panel.values)
    yield f"  All {len(labels)} parts add up to {total:+.2f} logits (off by {gap:.0e})."


def layers(found: dict[str, Record]) -> Iterator[str]:
    """Say in which layers the right answer comes up, and what would be said before."""
    panel = found["logit_lens/by_position"].panel
    values = panel.values[:, -1] if panel.values[:, -1].isfinite().all() else panel.values[:, -2]
    last = len(values) - 1
    chosen = [0, *range(last - 9, last + 1)] if last > 9 else range(last + 1)
    shown = "  ".join(f"{i}: {values[i].exp():.1g}" for i in chosen)
    yield f"  probability of {RIGHT!r} before layer  {shown}"


def strongest(values: Tensor, count: int = SHOWN) -> list[tuple[str, float]]:
    """Return the heads with the largest scores."""
    flat = values.nan_to_num(-1.0).flatten()
    top = flat.topk(count)
    width = values.shape[1]
    named = [f"L{i // width}H{i % width}" for i in top.indices.tolist()]
    return list(zip(named, top.values.tolist(), strict=True))


def entry(panel: Any, writer: str, reader: str) -> float:
    """Return one pair's value."""
    rows, columns = (list(panel.coords[axis]) for axis in ("writer", "reader"))
    return float(panel.values[rows.index(writer), columns.index(f"{reader}.k")])


if __name__ == "__main__":
    main()
