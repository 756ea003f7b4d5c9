"""A made-up run folder of the shape that the monitors write, for tests and for looking.

``python tests/synthetic_run.py FOLDER`` writes one and its report. Nothing in it was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightning_mi.record import Panel, Record, scalar
from lightning_mi.runs import Run

PASSAGE = "In| the| be|gin|ning| God| cre|at|ed| the| he|av|en| and| the| ear|th|.|\n"
TOKENS = (PASSAGE * 2 + "In| the| be|gin|ning| God| cre").split("|")
SCORES = {
    "induction": 0.02,
    "previous_token": 0.02,
    "duplicate_token": 0.02,
    "current_token": 0.03,
    "first_position": 0.03,
}
TRAIN = [
    ("And God saw every thing that he had made, and God saw every thing that he had", 27),
    ("the lilies of the field, how they grow; the lilies of the field, how they", 18),
    ("and the morning were the first day. And the evening and the morning were", 9),
    ("A soft answer turneth away wrath: but grievous words stir up anger. The tongue", 0),
    ("In the beginning was the Word, and the Word was with God, and the Word was God", 0),
    ("hear the word of the LORD, hear the word of the LORD, hear the word of", 12),
]


@dataclass
class Synthetic:
    """What to make up.

    Args:
        layers: Layers of the model.
        heads: Heads in each.
        steps: Number of measurements.
        every: Steps between two.
        max_steps: Where training is to end; None where the last measurement is.
        state: Of the run.
        forms: Whether two heads of the last layer rise.
        seed: Of the noise.
        own: Whether there are measurements that no chart knows.
        span: Number of measurements until all is over, or more.
    """

    layers: int = 2
    heads: int = 4
    steps: int = 60
    every: int = 40
    max_steps: int | None = None
    state: str = "finished"
    forms: bool = True
    seed: int = 0
    own: bool = False
    span: int = 59

    def write(self, path: Path) -> Run:
        """Write the run folder and return the run."""
        run = Run.create(path, self.info())
        for index in range(self.steps):
            run.write_all(self.at(index))
        return run

    def info(self) -> dict[str, object]:
        """Facts of ``run.json``."""
        return {
            "name": "synthetic",
            "title": "synthetic run",
            "model": "AttentionOnly",
            "parameters": 102_784,
            "layers": self.layers,
            "heads": self.heads,
            "text": "made-up numbers; the tokens are from the King James Version",
            "max_steps": self.max_steps or self.last,
            "state": self.state,
            "seed": self.seed,
            "versions": {"lightning_mi": "0.1.0", "torch": "2.13.0", "pytorch-lightning": "2.6.6"},
        }

    @property
    def last(self) -> int:
        """The last measured step."""
        return (self.steps - 1) * self.every

    def progress(self, index: int, middle: float = 0.35, width: float = 0.03) -> float:
        """Logistic rise over the run."""
        if not self.forms:
            return 0.0
        t = index / max(self.span, self.steps - 1) - 0.04 * self.seed
        return float(1 / (1 + np.exp(-(t - middle) / width)))

    def at(self, index: int) -> Iterator[Record]:
        """All records of one measurement."""
        draw = np.random.default_rng((self.seed, index))
        step = index * self.every
        made = {**self.head_scores(index, draw), **self.prompt(index, draw)}
        made |= self.attributions(index, draw)
        if index % 6 == 5:
            made |= self.influence(index // 6, draw)
        made["monitor/overhead"] = scalar(0.013)
        if self.own:
            made |= own_panels(self.progress(index), draw)
        for name, panel in made.items():
            yield Record(name, panel, step, tokens=step * 2048, samples=step * 16)

    def head_scores(self, index: int, draw: np.random.Generator) -> dict[str, Panel]:
        """Scores, nulls and losses."""
        made = {}
        for name, null in SCORES.items():
            values = null + np.abs(draw.normal(0, 0.006, (self.layers, self.heads)))
            if name == "induction":
                values[-1, -1] += 0.74 * self.progress(index, 0.33)
                values[-1, 1] += 0.66 * self.progress(index, 0.36)
            if name == "previous_token":
                values[0, 1] += 0.88 * self.progress(index, 0.36, 0.07)
                values[0, 2] += 0.25 * self.progress(index, 0.3, 0.02)
            if name == "current_token":
                values[0, 2] += 0.2
            made[f"head_scores/{name}"] = Panel(
                values, ("layer", "head"), convention={"n": 16, "period": 32}
            )
            made[f"head_scores/{name}_stderr"] = Panel(
                np.full_like(values, 0.01), ("layer", "head")
            )
            made[f"head_scores/{name}_null"] = scalar(null)
        rise = self.progress(index, 0.36, 0.05)
        first, second = 6.2 + 0.4 * rise, 6.2 - 5 * rise
        losses = {"loss_first_copy": first, "loss_second_copy": second, "copy_gain": first - second}
        for name, value in losses.items():
            made[f"head_scores/{name}"] = scalar(value + draw.normal(0, 0.08), "nats")
        made["head_scores/icl_score"] = scalar(-0.4 * rise + draw.normal(0, 0.02), "nats")
        return made

    def prompt(self, index: int, draw: np.random.Generator) -> dict[str, Panel]:
        """Attention of the heads from the last token, and what the model says."""
        labels = [f"L{i}H{j}" for i in range(self.layers) for j in range(self.heads)][-24:]
        rows = draw.dirichlet(np.full(len(TOKENS), 0.5), len(labels))
        rise = self.progress(index)
        rows[-1] = (1 - 0.8 * rise) * rows[-1] + 0.8 * rise * np.eye(len(TOKENS))[25 + 1]
        # The other induction head looks much like it.
        rows[-3] = (1 - 0.9 * rise) * rows[-3] + 0.9 * rise * rows[-1]
        right = 0.03 + 0.8 * rise
        return {
            "prompt/attention": Panel(
                rows, ("head", "key_position"), {"head": labels, "key_position": TOKENS}
            ),
            "prompt/answers": Panel(
                [right, 0.4 * (1 - right), 0.1 * (1 - right)],
                ("token",),
                {"token": ["at", "ep", "\n"]},
                convention={"target": "at", "target_probability": right},
            ),
        }

    def attributions(self, index: int, draw: np.random.Generator) -> dict[str, Panel]:
        """Saliency, integrated gradients, and their agreement with the head."""
        count, rise = len(TOKENS), self.progress(index)
        labels = {"example,position": [TOKENS, TOKENS[::-1]]}
        saliency = np.abs(draw.normal(0, 1, (2, count)))
        saliency[0, [25, 26, count - 1]] += 8 * rise
        ig = draw.normal(0, 0.12, (2, count))
        ig[0, [25, 26, count - 1]] += rise * np.array([2.0, 3.1, 4.0])
        ig[0, 12] -= 2 * rise
        axes = ("example", "position")
        target = {"target_text": ["at", "In"], "target_position": [count - 1] * 2}
        return {
            "saliency/values": Panel(saliency, axes, labels, "logits", target),
            "integrated_gradients/values": Panel(ig, axes, labels, "logits", target),
            "integrated_gradients/gap": Panel([0.004, 0.009], ("example",)),
            "integrated_gradients/converged": Panel(torch.tensor([True, True]), ("example",)),
            "agreement/saliency": scalar(
                0.3 * rise + draw.normal(0, 0.06), n=count, floor=[-0.3, 0.3]
            ),
            "agreement/integrated_gradients": scalar(
                0.5 * rise + draw.normal(0, 0.06), n=count, floor=[-0.3, 0.3]
            ),
        }

    def influence(self, firing: int, draw: np.random.Generator) -> dict[str, Panel]:
        """Scores of one checkpoint, and the tokens of the examples that are shown."""
        base = np.array([0.42, 0.21, 0.15, -0.08, -0.06, 0.11])
        now = base / (1 + firing) * (1 + draw.normal(0, 0.2, len(base)))
        words = [text.replace(" ", "\0 ").split("\0")[:14] for text, _ in TRAIN]
        shares = draw.normal(0.1, 1, (len(base), 14)) ** 3
        shares += ((now - shares.sum(1)) / 14)[:, None]
        index = [154_672 + 7_919 * i for i in range(len(base))]
        facts = {"method": "tracin", "n": 1_000_000}
        made = {
            "influence/scores": Panel(
                now[None], ("query", "train_example"), {"train_example": index}, "1", facts
            ),
            "influence/tokens": Panel(
                shares,
                ("train_example", "position"),
                {"train_example": index, "train_example,position": words},
            ),
        }
        for side, rows in (("proponents", [0, 1, 2, 5]), ("opponents", [3, 4])):
            said = {
                "descriptions": [_described(r) for r in rows],
                "texts": [TRAIN[r][0] for r in rows],
            }
            coords = {"train_example": [index[r] for r in rows]}
            made[f"influence/{side}"] = Panel(
                now[rows], ("train_example",), coords, convention={**facts, **said}
            )
        return made


WRITERS = ["embed", "L0H0", "L0H1", "mlp 0", "L1H0", "L1H1", "mlp 1"]
READERS = ["L0H0", "L0H1", "mlp 0", "L1H0.q", "L1H0.k", "L1H0.v", "L1H1.k", "mlp 1", "logits"]
LAWFUL = [2, 2, 3, 7, 7, 7, 7, 8, 9]
"""How many of the writers have written when each input reads; made up."""


def own_panels(rise: float, draw: np.random.Generator) -> dict[str, Panel]:
    """Measurements of a user's own: a number, a vector, matrices, edges."""
    edges = draw.normal(0, 0.04, (len(WRITERS), len(READERS)))
    edges[2, 4] -= 0.9 * rise
    edges[4, 8] -= 0.7 * rise
    edges[3, 8] += 0.3 * rise
    for reader, count in enumerate(LAWFUL):
        edges[min(count, len(WRITERS)) :, reader] = float("nan")
    labels = {"writer": WRITERS, "reader": READERS}
    about = {"what": "change of the metric by an edge", "null": 0.0}
    classes = ["cat", "dog", "</script>", "bird"]
    entropy = np.array([2.0, 1.6, 1.2, 0.9]) - 0.5 * rise + draw.normal(0, 0.05, 4)
    return {
        "entropy/mean": scalar(float(entropy.mean()), "nats", what="entropy of the answer"),
        "entropy/mean_stderr": scalar(0.06, "nats"),
        "entropy/spread": scalar(float(entropy.std()), "nats"),
        "entropy/by_class": Panel(entropy, ("class",), {"class": classes}, "nats"),
        "edge_attribution/edges": Panel(edges, ("writer", "reader"), labels, "logits", about),
        "lens/logits": Panel(
            draw.normal(0, 1, (4, 12)) * (1 + rise), ("layer", "position"), {}, "logits"
        ),
        "lens/attention": Panel(
            draw.dirichlet(np.ones(12), (2, 3, 12)),
            ("layer", "head", "query_position", "key_position"),
        ),
    }


def _described(row: int) -> str:
    period = TRAIN[row][1]
    return f"a passage of {period} tokens, repeated" if period else "plain text"


if __name__ == "__main__":
    from lightning_mi.report import write_report

    sys.stdout.write(f"{write_report(Synthetic().write(Path(sys.argv[1])))}\n")
