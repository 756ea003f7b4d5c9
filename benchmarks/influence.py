"""What influence of all pairs costs beside kronfluence, and how well it predicts retraining.

Digits with a tenth of wrong labels, an MLP of 2,410 parameters, 1,500 training examples x 200
queries, damping 0.01 of the mean curvature. ``lds`` is the linear datamodeling score: the mean over
queries of Spearman's correlation between summed scores of a random half of the data and the loss of
models retrained on it (40 halves, two seeds each). The retrained losses are made at the first call
and kept in the folder for temporary files. Kronfluence, captum and dattri take part where
installed. torch-influence is on no registry, so that the 0.002 promised beside it cannot be
measured. A stand-in of our own does the same work for two queries: one after the other it solves by
conjugate gradients with the curvature of all data (50 products at most), and then takes the
gradient of every training example by itself. It is no measure of that library, only of this way.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case, Promise, compare, compared

TRAIN, QUERIES, HALVES, STEPS, DAMPING, DECAY = 1500, 200, 40, 250, 1e-2, 1e-3
TRUTH = Path(tempfile.gettempdir()) / "lightning_mi_influence_truth.pt"
EXACT, FAST, KFAC, DOTS = "ours, exact", "ours, EK-FAC", "ours, K-FAC", "ours, TracIn"
THEIRS, CAPTUM = "kronfluence, EK-FAC", "captum, TracInCPFast"
DATTRI, ONE = "dattri, explicit", "ours, CG, one query"
ALONE, FEW = "stand-in, CG, two queries", 2


def data() -> tuple[Any, Any, Any, Any]:
    """Return training inputs and labels, test inputs and labels."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))[: TRAIN + QUERIES]
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    wrong = torch.tensor(np.random.RandomState(1).choice(TRAIN, TRAIN // 10, replace=False))
    y[wrong] = (y[wrong] + 3) % 10
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def network(seed: int = 0) -> Any:
    """Return an untrained model."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train_many(rows: Any, seeds: list[int]) -> tuple[Any, Any]:
    """Train one model on each row of example indices, all at once; return weights, test losses."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap
    from torch.nn import functional as F

    x, y, tests, answers = data()
    base = network()
    weights, _ = stack_module_state([network(s) for s in seeds])
    weights = {k: v.detach() for k, v in weights.items()}

    def loss(w: Any, inputs: Any, labels: Any) -> Any:
        decay = torch.stack([v.square().sum() for v in w.values()]).sum()
        return F.cross_entropy(functional_call(base, w, (inputs,)), labels) + DECAY / 2 * decay

    slope, inputs, labels = vmap(grad(loss)), x[rows], y[rows]
    speed = {k: torch.zeros_like(v) for k, v in weights.items()}
    for step in range(STEPS):
        slopes, rate = slope(weights, inputs, labels), 0.3 * min(1, (STEPS - step) / 100)
        speed = {k: 0.9 * speed[k] + slopes[k] for k in weights}
        weights = {k: weights[k] - rate * speed[k] for k in weights}

    def test(w: Any) -> Any:
        return F.cross_entropy(functional_call(base, w, (tests,)), answers, reduction="none")

    return weights, vmap(test)(weights)


def truth() -> dict[str, Any]:
    """Return masks of the halves, losses of the models trained on them, and the whole model."""
    import torch

    if not TRUTH.exists():
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(TRAIN, generator=generator)[: TRAIN // 2] for _ in range(HALVES)]
        every = [
            train_many(torch.stack(rows), [100 * s + i for i in range(HALVES)])[1] for s in (0, 1)
        ]
        whole, _ = train_many(torch.arange(TRAIN)[None], [0])
        masks = torch.zeros(HALVES, TRAIN)
        for mask, row in zip(masks, rows, strict=True):
            mask[row] = 1
        weights = {k: v[0] for k, v in whole.items()}
        torch.save({"masks": masks, "losses": sum(every) / 2, "weights": weights}, TRUTH)
    found: dict[str, Any] = torch.load(TRUTH)
    return found


def trained() -> Any:
    """Return the model trained on everything."""
    model = network()
    model.load_state_dict(truth()["weights"])
    return model


def ours(solver: str) -> Case:
    """Return a case of `influence_scores`."""

    def case() -> Callable[[], Any]:
        from torch.utils.data import TensorDataset

        from lightning_mi import Classification
        from lightning_mi.influence import Objective, influence_scores, tracin

        x, y, tests, answers = data()
        model, train, queries = trained(), TensorDataset(x, y), TensorDataset(tests, answers)
        goal = Objective(Classification())
        if solver == "tracin":
            return lambda: tracin(model, goal, train, queries).values
        if solver == "cg":
            queries = TensorDataset(tests[:1], answers[:1])
        return lambda: (
            influence_scores(model, goal, train, queries, solver=solver, damping=DAMPING).values
        )

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

    class Digits(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            logits, labels = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    labels = torch.distributions.Categorical(logits=logits).sample()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    x, y, tests, answers = data()

    def work() -> Any:
        task = Digits()
        model = prepare_model(trained(), task)
        analyzer = Analyzer(
            "b", model, task, cpu=True, disable_tqdm=True, output_dir=tempfile.mkdtemp(),
            log_level=50,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "f",
            TensorDataset(x, y),
            per_device_batch_size=TRAIN,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            TensorDataset(tests, answers),
            TensorDataset(x, y),
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=TRAIN,
            score_args=ScoreArguments(damping_factor=DAMPING),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("s")["all_modules"]

    return work


def captum() -> Callable[[], Any]:
    """Return TracIn of the last layer by captum."""
    import torch
    from captum.influence import TracInCPFast
    from torch import nn
    from torch.utils.data import TensorDataset

    x, y, tests, answers = data()
    model, path = trained(), Path(tempfile.mkdtemp()) / "model.pt"
    torch.save(model.state_dict(), path)

    def load(module: Any, where: str) -> float:
        module.load_state_dict(torch.load(where))
        return 1.0

    def work() -> Any:
        tracin = TracInCPFast(
            model, model[2], TensorDataset(x, y), [str(path)], load,
            nn.CrossEntropyLoss(reduction="sum"), batch_size=TRAIN,
        )  # fmt: skip
        return tracin.influence((tests, answers), show_progress=False)

    return work


def dattri() -> Callable[[], Any]:
    """Return the influence function with dattri's whole Hessian."""
    import torch
    from dattri.algorithm import IFAttributorExplicit
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    x, y, tests, answers = data()
    model = trained()
    train = DataLoader(TensorDataset(x, y), TRAIN)
    queries = DataLoader(TensorDataset(tests, answers), QUERIES)

    def loss(weights: Any, batch: Any) -> Any:
        inputs, labels = batch
        whole = inputs if inputs.ndim > 1 else inputs[None]
        return F.cross_entropy(functional_call(model, weights, (whole,)), labels.reshape(-1).long())

    def work() -> Any:
        task = AttributionTask(loss, model, model.state_dict())
        attributor = IFAttributorExplicit(task, regularization=DAMPING)
        attributor.cache(train)
        with torch.enable_grad():
            return attributor.attribute(train, queries).T

    return work


def alone() -> Callable[[], Any]:
    """Return the scores of a few queries, each by itself, as a stand-in for torch-influence."""
    import torch
    from torch.func import functional_call, jvp, vjp
    from torch.nn import functional as F

    x, y, tests, answers = data()
    model = trained()
    weights = {k: v.detach() for k, v in model.named_parameters()}
    own = list(model.parameters())

    def outputs(vector: Any) -> Any:
        parts = vector.split([w.numel() for w in weights.values()])
        shaped = [p.view_as(w) for p, w in zip(parts, weights.values(), strict=True)]
        return functional_call(model, dict(zip(weights, shaped, strict=True)), (x,))

    point = torch.cat([w.flatten() for w in weights.values()])

    def product(vector: Any) -> Any:
        """Return (G + λI) v: push it forward, bend it by ∇²ℓ = diag(p) − ppᵀ, pull it back."""
        values, pushed = jvp(outputs, (point,), (vector,))
        p = values.softmax(1)
        bent = p * pushed - p * (p * pushed).sum(1, keepdim=True)
        return vjp(outputs, point)[1](bent)[0] / TRAIN + DAMPING * vector

    def gradient(inputs: Any, labels: Any) -> Any:
        found = torch.autograd.grad(F.cross_entropy(model(inputs), labels), own)
        return torch.cat([g.flatten() for g in found])

    def solved(right: Any) -> Any:
        found, rest, way = torch.zeros_like(right), right.clone(), right.clone()
        squared = rest @ rest
        for _ in range(50):
            pushed = product(way)
            step = squared / (way @ pushed)
            found, rest = found + step * way, rest - step * pushed
            before, squared = squared, rest @ rest
            if squared <= 1e-6 * (right @ right):
                break
            way = rest + squared / before * way
        return found

    def work() -> Any:
        rows = []
        for q in range(FEW):
            found = solved(gradient(tests[q : q + 1], answers[q : q + 1]))
            each = [gradient(x[i : i + 1], y[i : i + 1]) @ found for i in range(TRAIN)]
            rows.append(torch.stack(each) / TRAIN)
        return torch.stack(rows)

    return work


def ranks(values: Any) -> Any:
    """Return ranks along the last dimension."""
    return values.argsort(-1).argsort(-1).double()


def quality(scores: Any) -> dict[str, Any]:
    """Return the linear datamodeling score, over the queries that were asked."""
    known = truth()
    a = ranks(scores.detach().double() @ known["masks"].double().T)
    b = ranks(-known["losses"].double().T[: len(scores)])
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    each = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return {"lds": float(each.mean())}


CASES: dict[str, Case] = {
    FAST: ours("ekfac"), EXACT: ours("exact"), KFAC: ours("kfac"), DOTS: ours("tracin"),
    ONE: ours("cg"), ALONE: alone,
}  # fmt: skip
PROMISES = []
if importlib.util.find_spec("kronfluence"):
    CASES[THEIRS] = kronfluence
    PROMISES += [Promise(FAST, THEIRS, 0.02), Promise(EXACT, THEIRS, 0.15)]
if importlib.util.find_spec("captum"):
    CASES[CAPTUM] = captum
    PROMISES.append(Promise(DOTS, CAPTUM, 0.5))
if importlib.util.find_spec("dattri"):
    CASES[DATTRI] = dattri
    PROMISES.append(Promise(EXACT, DATTRI, 0.06))
ABSENT = [n for n in ("kronfluence", "captum", "dattri") if not importlib.util.find_spec(n)]

if __name__ == "__main__":
    rounds = compare(CASES, beside=FAST, promises=PROMISES, facts=quality)
    if ABSENT:
        print(f"Not installed, so not compared: {', '.join(ABSENT)}")
    ratio = compared(rounds, EXACT, ALONE).median * FEW / QUERIES
    print(f"{EXACT} / {ALONE}, for as many queries: {ratio:.4f}, no promise")
    for name in CASES:
        print(f"{name}: LDS {rounds[0][name]['lds']:.3f}")
