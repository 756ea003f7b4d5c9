"""`untouched` leaves no trace, whatever happens inside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import same
from torch import Tensor, nn

from lightning_mi import ModelError, untouched
from lightning_mi.isolation import frozen, unwrapped

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Everything that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.lstm = nn.LSTM(8, 3, batch_first=True)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", None)
        self.length = 0
        self.train()
        self.norm.eval()  # kept in evaluation mode, as when a backbone is frozen

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # replaced by assignment
        if self.length < len(x):
            self.table, self.length = torch.ones(len(x)), len(x)
            self.note = "grown"
        x = self.frozen(self.drop(self.norm(self.first(x)).relu()))
        return self.lstm(x[:, None])[0][:, 0] * self.table[: len(x), None]


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything that may not change; tensors by value and by identity."""
    plain = unwrapped(model)
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    return {
        "identity": {n: id(t) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "grads": {
            n: (id(p.grad), None if p.grad is None else p.grad.clone())
            for n, p in plain.named_parameters()
        },
        "flags": {n: m.training for n, m in plain.named_modules()},
        "requires": {n: p.requires_grad for n, p in plain.named_parameters()},
        "hooks": {n: list(m._forward_hooks) for n, m in plain.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in plain.named_modules()},
        "keys": list(plain.state_dict()),
        "length": plain.length if isinstance(plain, Model) else None,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = state(model)
    yield
    after = state(model)
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.fixture
def model() -> Model:
    return accumulating()


def accumulating() -> Model:
    """Return a model in the middle of gradient accumulation."""
    torch.manual_seed(0)
    model = Model()
    model.register_forward_hook(lambda *_: None)
    model(X[:2]).sum().backward()
    return model


def disturb(quiet: nn.Module) -> None:
    """Do everything that a measurement may do, and some things that it should not."""
    random.random()
    np.random.rand()
    torch.rand(1)
    torch.manual_seed(99)
    quiet(X)  # longer than before: grows the table
    quiet.train()  # batch statistics, dropout
    loss = quiet(X.clone()).sum()
    torch.autograd.grad(loss, quiet.first.weight, retain_graph=True)
    loss.backward()  # stray
    quiet.frozen.requires_grad_(True)
    quiet.first.requires_grad_(False)
    quiet.register_buffer("extra", torch.ones(1))
    quiet.mine = 3


OUTSIDE: dict[str, Any] = {
    "plain": nullcontext,
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("outside", OUTSIDE)
def test_nothing_is_left_behind(model: Model, outside: str) -> None:
    with OUTSIDE[outside](), unchanged(model), untouched(model) as quiet:
        disturb(quiet)


def test_the_check_can_fail(model: Model) -> None:
    for harm in (
        lambda: model.train(),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: torch.rand(1),
        lambda: model(X),
        lambda: model.first.weight.grad.zero_(),
        lambda: model.norm.running_mean.add_(1),
        lambda: model.first.requires_grad_(False),
        lambda: setattr(model, "mine", 1),
        lambda: model.register_forward_hook(lambda *_: None),
    ):
        before = state(model)
        harm()
        assert not same(before, state(model))


def test_an_exception_inside_restores_everything(model: Model) -> None:
    def fail() -> None:
        with untouched(model) as quiet:
            disturb(quiet)
            raise ZeroDivisionError

    with unchanged(model), pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("outside", OUTSIDE)
def test_inside_it_is_quiet_and_gradients_flow(model: Model, outside: str) -> None:
    with OUTSIDE[outside](), untouched(model) as quiet:
        assert not any(m.training for m in quiet.modules())
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        x = X.clone().requires_grad_()
        out = quiet(x)
        assert out.dtype == torch.float32
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.abs().sum() > 0


def test_inside_chance_is_the_same_each_time(model: Model) -> None:
    def draw() -> list[float]:
        with untouched(model):
            return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    first = draw()
    random.random(), np.random.rand(), torch.rand(1)
    assert draw() == first


def test_half_accumulated_gradients_are_out_of_reach(model: Model) -> None:
    kept = model.first.weight.grad
    assert kept is not None
    value = kept.clone()
    with untouched(model) as quiet:
        assert quiet.first.weight.grad is None
        quiet(X).sum().backward()
    assert model.first.weight.grad is kept
    assert torch.equal(kept, value)


def test_accumulation_goes_on_as_if_nothing_had_been(model: Model) -> None:
    twin = accumulating()
    with untouched(model) as quiet:
        disturb(quiet)
    for each in (model, twin):
        torch.manual_seed(5)
        each(X).sum().backward()
    assert all(
        same(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_measurement_between_forward_and_backward_does_not_break_the_graph(model: Model) -> None:
    loss = model(X).sum()
    with untouched(model) as quiet:
        quiet(X)
    loss.backward()  # a buffer that was written to would raise


@pytest.mark.parametrize("change", ["in place", "replaced", "optimizer"])
def test_changed_weights_are_an_error(model: Model, change: str) -> None:
    def harm() -> None:
        with untouched(model):
            if change == "in place":
                torch.nn.init.zeros_(model.first.weight)
            elif change == "replaced":
                model.first.weight = nn.Parameter(torch.zeros(8, 4))
            else:
                model(X).sum().backward()
                torch.optim.SGD(model.parameters(), 0.1).step()

    with pytest.raises(ModelError, match=r"unchanged weights.*first\.weight"):
        harm()


def test_nested_use(model: Model) -> None:
    with unchanged(model), untouched(model) as outer:
        random.random()
        with unchanged(model), untouched(outer) as inner:
            disturb(inner)
            assert inner is outer
        assert not outer.training
        disturb(outer)


def test_buffers_and_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Model()
        model.calls = torch.ones(1)
    with torch.no_grad(), unchanged(model), untouched(model) as quiet, torch.inference_mode():
        quiet(X)
        quiet.norm.running_mean.add_(1)
    ordinary = Model()
    with torch.inference_mode():
        ordinary.calls = torch.ones(1)  # as a validation step may do
    with unchanged(ordinary), untouched(ordinary) as quiet:
        quiet(X)


def test_users_hooks_still_fire(model: Model) -> None:
    seen = []
    model.first.register_forward_hook(lambda *_: seen.append(1))
    with untouched(model) as quiet:
        quiet(X)
    model(X)
    assert len(seen) == 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def compiled(how: str) -> nn.Module:
    model: Any = Small()
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "inner":
        model.inner = torch.compile(model.inner, backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    found: nn.Module = model
    return found


@pytest.mark.parametrize("how", ["wrapper", "in place", "inner", "forward"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch._dynamo's imports
def test_hooks_fire_inside_compiled_models(how: str) -> None:
    model = compiled(how)
    expected = model(X)  # compiles, before any hook is there
    fired = []
    with unchanged(model), untouched(model) as quiet:
        inner = unwrapped(quiet.get_submodule("inner"))
        handle = inner.register_forward_hook(lambda *_: fired.append(1))
        torch.testing.assert_close(quiet(X), expected)
        handle.remove()
    assert fired == [1]
    assert unwrapped(model) is quiet


def test_frozen_switches_gradients_off_and_on_again(model: Model) -> None:
    def fail() -> None:
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            raise ZeroDivisionError

    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert True in flags
    assert False in flags
