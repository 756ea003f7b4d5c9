"""What influence on a small language model costs, beside one forward and backward pass over it.

A transformer with 2 layers, d = 128 and random text of a Markov chain: 2,000 sequences of 64 tokens
x 50 queries, all matrices of its blocks tracked (0.39 million parameters), damping 1e-4. ``limit``
is one forward and backward pass over training data and queries, which whatever looks at gradients
needs. Two agreements are told: that of EK-FAC's scores with those of kronfluence (another draw of
sampled labels), where it is installed, and with those when the eigenbases are kept from before.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case, Promise, compare

TRAIN, QUERIES, LENGTH, WORDS, WIDTH, HEADS = 2000, 50, 64, 256, 128, 4
DAMPING, STEPS = 1e-4, 60
SAVED = Path(tempfile.gettempdir()) / "lightning_mi_influence_text.pt"
LIMIT, DOTS, FAST, KEPT = "limit", "ours, dots", "ours, EK-FAC", "ours, EK-FAC, kept bases"
THEIRS = "kronfluence, EK-FAC"


def data() -> tuple[Any, Any]:
    """Return training sequences and queries."""
    import torch

    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(WORDS, WORDS, generator=generator).pow(12)
    columns = [torch.randint(0, WORDS, (TRAIN + QUERIES, 1), generator=generator)]
    for _ in range(LENGTH - 1):
        columns.append(torch.multinomial(chances[columns[-1][:, 0]], 1, generator=generator))
    ids = torch.cat(columns, 1)
    return ids[:TRAIN], ids[TRAIN:]


def network() -> Any:
    """Return an untrained model of which only the matrices in the blocks are to be tracked."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            parts = self.qkv(self.first(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(z.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.second(x))))

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
            self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, ids: Any) -> Any:
            x = self.words(ids) + self.places[: ids.shape[1]]
            for block in self.blocks:
                x = block(x)
            return F.linear(self.last(x), self.words.weight)

    torch.manual_seed(0)
    return Language()


def trained(steps: int = STEPS) -> Any:
    """Return the model after some steps, its tracked parameters trainable."""
    import torch
    from torch.nn import functional as F

    path = SAVED.with_name(f"{SAVED.stem}_{steps}.pt")
    model = network()
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        ids, _ = data()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            batch = ids[torch.randint(0, TRAIN, (64,), generator=generator)]
            optimizer.zero_grad()
            F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
        torch.save(model.state_dict(), path)
    for name, p in model.named_parameters():
        parts = name.split(".")
        p.requires_grad_(len(parts) == 4 and parts[2] in ("qkv", "out", "up", "down"))
    return model.eval()


def limit() -> Callable[[], Any]:
    """Return one forward and backward pass over all of it."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    model, (ids, queries) = trained(), data()
    layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]

    def work() -> Any:
        outputs: list[Any] = []
        for batch in (*ids.split(100), queries):
            outputs.clear()
            hooks = [
                layer.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for layer in layers
            ]
            logits = model(batch)
            for hook in hooks:
                hook.remove()
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )
            torch.autograd.grad(loss, outputs)

    return work


def ours(solver: str) -> Case:
    """Return a case of `influence_scores` or `tracin`."""

    def case() -> Callable[[], Any]:
        from torch.utils.data import TensorDataset

        from lightning_mi import NextToken
        from lightning_mi.influence import EKFAC, KeptBases, Objective, influence_scores, tracin

        model, (ids, queries) = trained(), data()
        goal, sets = Objective(NextToken()), (TensorDataset(ids), TensorDataset(queries))
        if solver == "tracin":
            return lambda: tracin(model, goal, *sets, shown=0).values

        def scores(at: Any, chosen: Any) -> Any:
            found = influence_scores(at, goal, *sets, solver=chosen, damping=DAMPING / 63, shown=0)
            return found.values

        if solver == "ekfac":
            return lambda: scores(model, "ekfac")
        kept = KeptBases()
        scores(trained(STEPS - 10), EKFAC(bases=kept))
        return lambda: scores(model, EKFAC(bases=kept))

    return case


def kronfluence() -> Callable[[], Any]:
    """Return the same scores by kronfluence's analyzer."""
    import logging

    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset

    logging.disable(logging.WARNING)
    names = [f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "out", "up", "down")]

    def loss(logits: Any, ids: Any, sampled: bool = False) -> Any:
        flat, labels = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        if sampled:
            with torch.no_grad():
                labels = torch.distributions.Categorical(logits=flat).sample()
        return F.cross_entropy(flat, labels, reduction="sum")

    class Text(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return loss(model(batch[0]), batch[0], sample)

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return loss(model(batch[0]), batch[0])

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    ids, queries = data()

    def work() -> Any:
        task = Text()
        model = prepare_model(trained(), task)
        analyzer = Analyzer(
            "b", model, task, cpu=True, disable_tqdm=True, output_dir=tempfile.mkdtemp(),
            log_level=50,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "f",
            TensorDataset(ids),
            per_device_batch_size=100,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            TensorDataset(queries),
            TensorDataset(ids),
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=100,
            score_args=ScoreArguments(damping_factor=DAMPING),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("s")["all_modules"]

    return work


def agreement(scores: Any) -> dict[str, Any]:
    """Return the mean rank correlation with the scores that another case left, or leave these."""
    import torch

    if scores is None:
        return {}
    path = SAVED.with_name(f"{SAVED.stem}_scores.pt")
    mine = scores.detach().double()
    if not path.exists():
        torch.save(mine, path)
    ranks = [s.argsort(-1).argsort(-1).double() for s in (mine, torch.load(path))]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return {"agreement": float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())}


CASES: dict[str, Case] = {
    LIMIT: limit, FAST: ours("ekfac"), KEPT: ours("kept"), DOTS: ours("tracin"),
}  # fmt: skip
PROMISES = [Promise(FAST, LIMIT, 3), Promise(DOTS, LIMIT, 1.2), Promise(KEPT, FAST, 0.6)]
if importlib.util.find_spec("kronfluence"):
    CASES[THEIRS] = kronfluence
    PROMISES.append(Promise(FAST, THEIRS, 0.4))

if __name__ == "__main__":
    if "--case" not in sys.argv:
        SAVED.with_name(f"{SAVED.stem}_scores.pt").unlink(missing_ok=True)
    rounds = compare(CASES, beside=LIMIT, promises=PROMISES, facts=agreement)
    if THEIRS not in CASES:
        print("Not installed, so not compared: kronfluence")
    for name in CASES:
        if "agreement" in rounds[0][name]:
            print(f"{name}: agrees with the first by {rounds[0][name]['agreement']:.4f}")
