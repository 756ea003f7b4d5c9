"""Ask which training examples made an induction head form, and check the answer by retraining.

Run ``python demos/influence_on_a_head.py`` (six to eight minutes of one core). A transformer of two
layers of attention learns texts of which half repeat a random passage. Influence is asked not about
a loss but about the *induction score* of the head that forms, before, at and after its onset:
positive means that removing the text would lower the score. Beside it stand its controls, and
finally the repeating texts it ranks highest are left out and the model is trained anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _repeats import LENGTH, QUERY, TOKENS, Corpus, Trained, train
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_mi import IndexedData, NextToken
from lightning_mi.influence import (
    Group,
    Objective,
    RandomDirections,
    Score,
    influence_scores,
    tracin,
)
from lightning_mi.influence.evaluate.ranking import auc

SCORED = 150
"""Texts of each kind that are scored."""


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that one of the first is larger than one of the second, ties a half."""
    first = torch.arange(len(positive) + len(negative)) < len(positive)
    return auc(torch.cat([positive, negative]), first)


def moments(run: Trained) -> dict[str, int]:
    """Return the scored steps before, at and after the onset."""
    onset = run.onset()

    def nearest(step: float) -> int:
        return min(run.steps, key=lambda s: abs(s - step))

    return {"before": nearest(onset / 2), "at": nearest(onset), "after": run.steps[-1]}


def ask(run: Trained, corpus: Corpus, step: int, solver: str) -> dict[str, Any]:
    """Return how well influence on the induction score tells repeats from the rest, and controls.

    Args:
        run: The run, with weights.
        corpus: Its texts.
        step: Which weights.
        solver: ``"dot"`` for a gradient dot product, or the name of a solver.

    Returns:
        AUROCs, by what was compared.
    """
    run.model.load_state_dict(run.states[step])
    layer, head = run.head
    questions = [Score(QUERY, "induction", layer=layer, head=head), RandomDirections(20), Group()]
    half = len(corpus.texts) // 2
    everything = TensorDataset(torch.cat([corpus.texts, corpus.shuffled]))
    picked = [range(s, s + SCORED) for s in (0, half, len(corpus.texts))]
    held_out = TensorDataset(corpus.texts[-20:])
    options: dict[str, Any] = {
        "query": questions,
        "candidates": [i for part in picked for i in part],
        "shown": 0,
    }
    if solver == "dot":
        found = tracin(run.model, Objective(NextToken()), everything, held_out, **options)
    else:
        options |= {"solver": solver, "damping": 0.01, "sample": 600}
        found = influence_scores(run.model, Objective(NextToken()), everything, held_out, **options)
    repeats, plain, shuffled = found.values.reshape(len(found.values), 3, SCORED).unbind(1)
    band = sorted(auroc(repeats[i], plain[i]) for i in range(1, 21))
    return {
        "step": step,
        "induction": auroc(repeats[0], plain[0]),
        "against the same tokens shuffled": auroc(repeats[0], shuffled[0]),
        "random directions": [band[1], band[-2]],
        "loss of plain text": auroc(repeats[21], plain[21]),
        "gradient norm": auroc(*_norms(run, everything, picked[:2])),
    }


def _norms(run: Trained, data: Any, parts: Any) -> tuple[Tensor, Tensor]:
    task = NextToken()
    norms = []
    for part in parts:
        batch = IndexedData(data).batch(list(part))
        losses = task.loss(run.model(batch[0]), batch)
        own = list(run.model.parameters())
        rows = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses]
        norms.append(torch.stack([torch.stack([g.norm() for g in row]).norm() for row in rows]))
    return norms[0], norms[1]


def left_out(
    run: Trained, corpus: Corpus, step: int, seeds: range, share: float = 0.2
) -> dict[str, list[float]]:
    """Train without the top repeats, without random ones, and with all; return the onsets.

    Args:
        run: The run whose head is asked about, with weights.
        corpus: Its texts.
        step: Which weights.
        seeds: Of the new trainings.
        share: How many of the repeating texts are left out.

    Returns:
        Onsets by what was left out, one for each seed.
    """
    run.model.load_state_dict(run.states[step])
    half, (layer, head) = len(corpus.texts) // 2, run.head
    scores = influence_scores(
        run.model,
        Objective(NextToken()),
        corpus.dataset,
        None,
        query=Score(QUERY, "induction", layer=layer, head=head),
        candidates=range(half),
        solver="kfac",
        damping=0.01,
        sample=600,
        shown=0,
    ).values[0]
    count = int(share * half)
    top = set(scores.argsort(descending=True)[:count].tolist())
    found: dict[str, list[float]] = {"all": [], "without the top": [], "without random ones": []}
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        chance = set(torch.randperm(half, generator=draw)[:count].tolist())
        for name, gone in zip(found, (set(), top, chance), strict=True):
            kept = [i for i in range(len(corpus.texts)) if i not in gone]
            again = train(corpus.texts[kept], seed=seed, steps=1500, until=0.4)
            found[name].append(again.onset())
    return found


def main() -> None:
    """Train, ask, leave out, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="trainings anew of each kind")
    parser.add_argument("--runs", type=int, default=2, help="runs whose head is asked about")
    parser.add_argument("--out", type=Path, default=Path("runs/influence_on_a_head.json"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "The model is far")  # Heads form long before a minimum.
    began = time.perf_counter()
    corpus = Corpus.drawn()
    results: dict[str, Any] = {"texts": len(corpus.texts), "tokens": TOKENS, "length": LENGTH}
    for seed in range(given.runs):
        run = train(corpus.texts, seed=seed, keep=True)
        when = moments(run)
        print(f"run {seed}: head {run.head}, onset at step {run.onset():.0f}")
        table = {
            f"{name}, {solver}": ask(run, corpus, step, solver)
            for name, step in when.items()
            for solver in ("dot", "kfac", "ekfac")
        }
        for name, row in table.items():
            said = ", ".join(
                f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
            print(f"  {name}: {said}")
        results[f"run {seed}"] = {"onset": run.onset(), "auroc": table}
        if seed == 0 and given.seeds:
            onsets = left_out(run, corpus, when["at"], range(10, 10 + given.seeds))
            results["onsets"] = onsets
            for name, steps in onsets.items():
                print(f"  onset, {name}: {statistics.mean(steps):.0f} ({steps})")
    results["seconds"] = time.perf_counter() - began
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1))
    print(f"written to {given.out} after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
