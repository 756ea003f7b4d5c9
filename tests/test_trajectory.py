"""TracInCP and SOURCE over the checkpoints of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_influence import multilayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_mi import ArgumentError, Classification, Regression
from lightning_mi.influence import Objective, influence_scores, source, tracin

# ------------------------------------------------------------------ TracInCP


def checkpoints(folder: Path, kind: str = "sgd") -> tuple[nn.Module, Any, list[Path]]:
    """Three checkpoints as Lightning writes them, each with another learning rate."""
    torch.manual_seed(0)
    model, data = multilayer()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[kind]
    optimizer = make(model.parameters())
    x, y = data[:]
    paths = []
    for step in range(7):
        if step in (0, 2, 6):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            content: dict[str, Any] = {
                "state_dict": copy.deepcopy(model.state_dict()),
                "global_step": step,
                "optimizer_states": [copy.deepcopy(optimizer.state_dict())],
            }
            paths.append(folder / f"step={step}.ckpt")
            torch.save(content, paths[-1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, data, paths


def at(model: nn.Module, path: Path) -> nn.Module:
    found = copy.deepcopy(model)
    found.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return found


def test_the_sum_over_checkpoints_is_that_of_single_states(tmp_path: Path) -> None:
    model, data, paths = checkpoints(tmp_path)
    own = copy.deepcopy(model.state_dict())
    goal = Objective(Classification())
    singles = []
    for step, path in zip((0, 2, 6), paths, strict=True):
        rates = {n: 0.1 / (step + 1) for n, _ in model.named_parameters()}
        singles.append(tracin(at(model, path), goal, data, data, learning_rates=rates).values)
    found = tracin(tmp_path, goal, data, data, like=model)
    torch.testing.assert_close(found.values, torch.stack(singles).sum(0))
    assert [c["step"] for c in found.convention["checkpoints"]] == [0, 2, 6]
    assert found.convention["checkpoints"][1]["learning_rate"] == [pytest.approx(0.1 / 3)] * 2
    weighted = tracin(tmp_path, goal, data, data, like=model, each="steps")
    expected = (2 * singles[1] + 4 * singles[2]) / len(data)
    torch.testing.assert_close(weighted.values, expected)
    shuffled = tracin([paths[2], paths[0], paths[1]], goal, data, data, like=model, each="steps")
    assert torch.equal(weighted.values, shuffled.values)
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())


def test_three_checkpoints_are_the_mean_of_three_runs_of_one(tmp_path: Path) -> None:
    model, data, paths = checkpoints(tmp_path)
    goal = Objective(Classification())
    each = [tracin([p], goal, data, data, like=model, learning_rates=0.5).values for p in paths]
    both = tracin(paths, goal, data, data, like=model, learning_rates=0.5).values
    torch.testing.assert_close(both, torch.stack(each).sum(0))


def test_adam_divides_by_the_root_of_its_squares(tmp_path: Path) -> None:
    model, data, paths = checkpoints(tmp_path, "adam")
    goal = Objective(Classification())
    found = tracin(paths[1:], goal, data, data, like=model, optimizer_aware=True)
    total = torch.zeros(len(data), len(data), dtype=torch.float64)
    for path in paths[1:]:
        content = torch.load(path, weights_only=True)
        kept, group = (content["optimizer_states"][0][k] for k in ("state", "param_groups"))
        rows, state = [], at(model, path)
        for i in range(len(data)):
            batch = data[i : i + 1]
            loss = nn.functional.cross_entropy(state(batch[0]), batch[1])
            grads = torch.autograd.grad(loss, list(state.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        root = []
        for i, p in enumerate(state.parameters()):
            v = kept[i]["exp_avg_sq"] / (1 - 0.999 ** float(kept[i]["step"]))
            root.append((group[0]["lr"] / (v.sqrt() + 1e-8)).expand(p.shape).flatten())
        each = torch.stack(rows)
        total += each * torch.cat(root) @ each.T
    torch.testing.assert_close(found.values, total)
    assert found.convention["optimizer_aware"] is True
    bare = tmp_path / "bare.ckpt"  # nothing to divide by
    torch.save({"state_dict": model.state_dict()}, bare)
    with pytest.raises(ArgumentError, match="learning_rates"):
        tracin([bare], goal, data, data, like=model, optimizer_aware=True)


def test_optimizer_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, data, _ = checkpoints(tmp_path)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ArgumentError, match="optimizer states of all trainable"):
        tracin(tmp_path, Objective(Classification()), data, data, like=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"like": None}, "like"),
        ({"each": "twice"}, "each"),
    ],
)
def test_wrong_arguments_are_named(options: Any, message: str, tmp_path: Path) -> None:
    model, data, _ = checkpoints(tmp_path)
    given = {"like": model, **options}
    with pytest.raises(ArgumentError, match=message):
        tracin(tmp_path, Objective(Classification()), data, data, **given)


# ------------------------------------------------------------------ SOURCE


def line() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(1)
    x = torch.randn(12, 3).double()
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + torch.randn(12, 1).double()
    return nn.Linear(3, 1).double(), TensorDataset(x, y)


def descend(
    model: nn.Module, data: TensorDataset, weights: Tensor, steps: int, rate: float
) -> list[dict[str, Tensor]]:
    """Gradient descent on (1/n) Σ wᵢ ℓᵢ, differentiable in the weights; all states."""
    x, y = data[:]
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    found = [state]
    for _ in range(steps):
        each = (functional_call(model, state, (x,)) - y).square().mean(1)
        loss = (weights * each).mean()
        grads = torch.autograd.grad(loss, list(state.values()), create_graph=True)
        state = {n: p - rate * g for (n, p), g in zip(state.items(), grads, strict=True)}
        found.append(state)
    return found


def saved(states: list[dict[str, Tensor]], folder: Path, every: int) -> Path:
    for step in range(0, len(states), every):
        kept = {n: p.detach() for n, p in states[step].items()}
        torch.save({"state_dict": kept, "global_step": step}, folder / f"step={step}.ckpt")
    return folder


def test_source_is_the_derivative_of_the_run(tmp_path: Path) -> None:
    """Against the derivative of the query's loss in each example's weight, through all steps."""
    model, data = line()
    weights = torch.ones(12, dtype=torch.float64, requires_grad=True)
    states = descend(model, data, weights, 60, 0.02)
    x, y = data[:3]
    asked = (functional_call(model, states[-1], (x,)) - y).square().mean(1)
    truth = torch.stack([-torch.autograd.grad(q, weights, retain_graph=True)[0] for q in asked])
    found = source(
        saved(states, tmp_path, 2),
        Objective(Regression()),
        data,
        TensorDataset(x, y),
        like=model,
        segments=30,
        learning_rates=0.02,
    )
    error = (found.values - truth).norm() / truth.norm()
    assert error < 0.03
    assert found.method == "SOURCE"
    assert len(found.convention["segments"]) == 30
    coarse = source(
        tmp_path,
        Objective(Regression()),
        data,
        TensorDataset(x, y),
        like=model,
        segments=2,
        learning_rates=0.02,
    )
    both = torch.stack([coarse.values.flatten(), truth.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


def test_a_long_run_in_one_segment_is_the_influence_function(tmp_path: Path) -> None:
    model, data = line()
    x, y = data[:]
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(12, 1).double()], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    torch.save({"state_dict": model.state_dict(), "global_step": 10**6}, tmp_path / "step=9.ckpt")
    goal = Objective(Regression())
    found = source(tmp_path, goal, data, data, like=model, segments=1, learning_rates=0.1)
    exact = influence_scores(model, goal, data, data, solver="exact", damping=0.0)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-6, atol=1e-10)


def test_momentum_goes_further(tmp_path: Path) -> None:
    """A short run: c is (steps) · η / (1 − β), and so is the score."""
    model, data = line()
    states = descend(model, data, torch.ones(12).double(), 1, 1e-4)
    saved(states, tmp_path, 1)
    options: dict[str, Any] = {"like": model, "learning_rates": 1e-4}
    goal = Objective(Regression())
    plain = source(tmp_path, goal, data, data, **options).values
    pushed = source(tmp_path, goal, data, data, momentum=0.9, **options).values
    torch.testing.assert_close(pushed, 10 * plain, rtol=1e-2, atol=1e-12)


def test_what_source_knows_of_the_optimizer(tmp_path: Path) -> None:
    model, data, _ = checkpoints(tmp_path)
    found = source(tmp_path, Objective(Classification()), data, data, like=model, batch_size=4)
    assert found.convention["momentum"] == 0.5
    assert found.convention["segments"] == [
        {"steps": [0, 2], "checkpoints": [2]},
        {"steps": [2, 6], "checkpoints": [6]},
    ]
    again = source(tmp_path, Objective(Classification()), data, data, like=model, batch_size=7)
    torch.testing.assert_close(found.values, again.values)


def test_adam_is_warned_of(tmp_path: Path) -> None:
    model, data, _ = checkpoints(tmp_path, "adam")
    with pytest.warns(UserWarning, match="adaptive optimizer"):
        found = source(tmp_path, Objective(Classification()), data, data, like=model)
    assert "doubt" in found.convention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments"),
        ({"momentum": 1.0}, "momentum"),
        ({"like": None}, "like"),
    ],
)
def test_wrong_arguments_of_source(options: Any, message: str, tmp_path: Path) -> None:
    model, data, _ = checkpoints(tmp_path)
    given: dict[str, Any] = {"like": model, **options}
    with pytest.raises(ArgumentError, match=message):
        source(tmp_path, Objective(Classification()), data, data, **given)


def test_a_run_that_has_not_begun_is_refused(tmp_path: Path) -> None:
    model, data, paths = checkpoints(tmp_path)
    with pytest.raises(ArgumentError, match="beyond step 0"):
        source([paths[0]], Objective(Classification()), data, data, like=model)
