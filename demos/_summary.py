"""What was found, said in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from _text import RealText
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from lightning_mi import Record, Run
from lightning_mi.emergence import head_onsets
from lightning_mi.influence import tracin_sum

ROLES = {"induction": "induction", "previous_token": "previous token"}
SHOWN = 3


def print_summary(
    console: Console,
    run: Run,
    data: RealText,
    folder: Path,
    check: Mapping[str, object],
    report: Path,
    seconds: float,
) -> None:
    """Say what formed and when, what taught it, what it looks at, and where to see more.

    Args:
        console: Where to.
        run: The records.
        data: The training text.
        folder: Where W&B's files lie.
        check: The comparison of live and swept records.
        report: The HTML report.
        seconds: How long everything took.
    """
    latest = {r.name: r for r in run.records(source="live")}
    for title, lines in (
        ("Which heads formed, and when?", heads(run)),
        ("What does it look at?", inputs(latest)),
        ("Which circuit does it?", circuit(latest)),
        ("Which training examples did it?", examples(run, data, latest)),
        ("Do the explanations agree with the head?", agreements(latest)),
        ("Can I trust it?", trust(run, check)),
        ("Where to look", places(run, report, folder)),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nDone in {seconds / 60:.1f} minutes.", highlight=False)


def heads(run: Run) -> Iterator[str]:
    """Name the heads, when each formed, and from what to what."""
    for score, role in ROLES.items():
        found = head_onsets(run, score)
        formed = [h for h in found if h.onset.state in ("formed", "forming")]
        for head in formed or found[:1]:
            tokens = head.onset.tokens
            seen = "" if tokens is None else f", after {tokens / 1e6:.1f} M tokens"
            yield f"  {head.label}  {role:14}  {head.onset.describe()}{seen}"


def inputs(latest: Mapping[str, Record]) -> Iterator[str]:
    """Name the tokens of the prompt that saliency and integrated gradients point at."""
    saliency = latest["saliency/values"].panel
    pieces = saliency.coords["example,position"][0]
    answers, attention = latest["prompt/answers"].panel, latest["prompt/attention"].panel
    truth = answers.convention["target"]
    prompt = "".join(pieces[: attention.values.shape[1]])
    yield f"  The prompt: [cyan]{escape(prompt)}[/cyan] → [bold]{escape(truth)!r}[/bold]"
    best = zip(answers.coords["token"], answers.values.tolist(), strict=True)
    yield "  The model says " + ", ".join(f"{escape(t)!r} {p:.2f}" for t, p in best)
    for name, words in (
        ("saliency", "Saliency points at"),
        ("integrated_gradients", "Integrated gradients point at"),
    ):
        yield f"  {words} {top_tokens(latest[f'{name}/values'].panel.values[0], pieces)}"
    agreed = latest.get("agreement/saliency")
    if agreed is not None:
        head = agreed.panel.convention["head"]
        row = attention.values[attention.coords["head"].index(head)]
        yield f"  {head} looks at {top_tokens(row, pieces)}"


def top_tokens(values: Tensor, pieces: list[str]) -> str:
    """Name the tokens with the largest absolute values, with their positions."""
    order = values.abs().argsort(descending=True)[:SHOWN].tolist()
    return ", ".join(f"{escape(pieces[i])!r} (position {i}, {values[i]:+.2f})" for i in order)


def circuit(latest: Mapping[str, Record]) -> Iterator[str]:
    """Say how good the circuit of induction is, and what each of its parts does."""
    faithful = latest["scorecard/faithfulness"].panel
    facts = faithful.convention
    if "reason" in facts:
        yield f"  none yet: {facts['reason']}"
        return
    edges, beyond = latest["scorecard/edges"].panel, latest.get("scorecard/beyond_random")
    lead = "" if beyond is None else f", {beyond.panel.item():.2f} above random circuits"
    yield (
        f"  {edges.item():.0f} of {edges.convention['of']} edges alone do {faithful.item():.2f} "
        f"[{facts['low']:.2f}, {facts['high']:.2f}] of what the model does on repeated random "
        f"tokens{lead}; {latest['scorecard/rest'].panel.item():.2f} is left without them"
    )
    if "scorecard/circuit" in latest:
        for sentence in latest["scorecard/circuit"].panel.convention["sentences"].values():
            yield f"  {escape(sentence)}"


def examples(run: Run, data: RealText, latest: Mapping[str, Record]) -> Iterator[str]:
    """Name the training passages that support the answer most, and those that oppose it."""
    summed = tracin_sum(run.records("influence/scores", source="live"))[-1].panel
    steps = summed.convention["sum_over_steps"]
    yield (
        f"  TracIn, summed over {steps} measurements with the learning rates then in force; "
        f"{summed.values.shape[1]} candidates. Positive: the example taught the answer."
    )
    scores, indices = summed.values[0], summed.coords["train_example"]
    order = scores.argsort(descending=True).tolist()
    for name, chosen in (("supports", order[:SHOWN]), ("opposes", order[: -SHOWN - 1 : -1])):
        for i in chosen:
            index = indices[i]
            text = " ".join(data.tokenizer.decode(data.train[index].tolist()).split())
            yield f"  {name} {scores[i]:+.3f}  [cyan]{escape(text[:70])}…[/cyan]"
            yield f"                  {escape(data.train.describe(index))}"


def agreements(latest: Mapping[str, Record]) -> Iterator[str]:
    """Say how far each explanation agrees with where the induction head looks."""
    for name in ("saliency", "integrated_gradients"):
        record = latest.get(f"agreement/{name}")
        if record is None:
            continue
        panel, facts = record.panel, record.panel.convention
        yield (
            f"  {name.replace('_', ' ')}: rank correlation {panel.item():+.2f} at the last step "
            f"with the attention "
            f"of {facts['head']} over {facts['n']} positions (by chance to ±{facts['floor']:.2f})"
        )


def trust(run: Run, check: Mapping[str, object]) -> Iterator[str]:
    """Say what was checked."""
    mark = "[green]pass[/green]" if check["status"] == "pass" else "[red]FAIL[/red]"
    yield f"  {mark}  live equals swept: {check['result']}, {check['compared']}"
    gaps = [
        r.panel.values.abs().max() for r in run.records("integrated_gradients/gap", source="live")
    ]
    yield f"        largest completeness gap of integrated gradients: {float(max(gaps)):.1%}"
    shares = run.records("monitor/overhead")
    yield f"        share of training time spent on measuring: {shares[-1].panel.item():.1%}"


def places(run: Run, report: Path, folder: Path) -> Iterator[str]:
    """Say where everything is."""
    wandb = os.path.relpath(folder / "wandb" / "latest-run")
    python = os.path.relpath(Path(sys.executable).parent / "wandb")
    yield f"  report      {os.path.relpath(report)}   (open it in a browser)"
    yield f"  run folder  {os.path.relpath(run.path)}"
    yield f"  W&B         {wandb}   (offline)"
    yield f"  W&B in this terminal, without an account:  [bold]{python} leet {wandb}[/bold]"
