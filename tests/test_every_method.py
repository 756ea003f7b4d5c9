"""What the page on attribution promises of every method, one table for all of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import attribution as at
from lightning_mi.attribution.measured import Attributed
from lightning_mi.callbacks import IntegratedGradientsMonitor, SaliencyMonitor
from lightning_mi.callbacks.saliency import METHODS
from lightning_mi.errors import ArgumentError, ModelError

DOCS = Path(__file__).parent.parent / "docs" / "attribution_methods.md"
WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """How a method is asked for, and what it needs.

    Args:
        measurement: Class of its measurement.
        options: What it needs beside model, inputs and target, for both kinds of models.
        few: Further options that make it quick.
        on: Kinds of inputs that it explains.
        keeps: Whether tokens can be kept.
    """

    measurement: type[Attributed]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    few: dict[str, Any] = dataclasses.field(default_factory=dict)
    on: tuple[str, ...] = ("pixels", "ids")
    keeps: bool = False


CASES = {
    "saliency": Case(at.Saliency),
    "input_x_gradient": Case(at.InputXGradient),
    "smooth_grad": Case(at.SmoothGrad, few={"samples": 4}, keeps=True),
    "smooth_grad_squared": Case(at.SmoothGradSquared, few={"samples": 4}, keeps=True),
    "var_grad": Case(at.VarGrad, few={"samples": 4}, keeps=True),
    "integrated_gradients": Case(at.IntegratedGradients, few={"max_steps": 12}, keeps=True),
    "layer_integrated_gradients": Case(
        at.LayerIntegratedGradients,
        {"layer": "mix", "channels": "sum"},
        {"max_steps": 12},
        keeps=True,
    ),
    "expected_gradients": Case(at.ExpectedGradients, few={"samples": 6}, keeps=True),
    "idgi": Case(at.Idgi, few={"steps": 8}, keeps=True),
    "discretized_integrated_gradients": Case(
        at.DiscretizedIntegratedGradients, few={"steps": 4}, on=("ids",), keeps=True
    ),
    "grad_cam": Case(at.GradCam, {"layer": "mix"}),
    "layer_grad_cam": Case(at.LayerGradCam, {"layer": "mix"}),
    "occlusion": Case(at.Occlusion, keeps=True),
    "attention_rollout": Case(at.AttentionRollout, on=("ids",)),
    "attention_gradient": Case(at.AttentionGradient, on=("ids",)),
    "attn_lrp": Case(at.AttnLRP),
}

PAIRS = [(name, kind) for name, case in CASES.items() for kind in case.on]


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.act, self.out = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.mix(x)).mean((2, 3)))


class Reader(nn.Module):
    """Words, positions counted over real tokens, one attention, the mean over real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, WIDTH), nn.Embedding(9, WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 3)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = position_ids
        if places is None:
            places = torch.arange(input_ids.shape[1], device=mask.device).expand_as(mask)
        x = self.words(input_ids) + self.places(places)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        x = torch.tanh(self.mix(x + z.transpose(1, 2).flatten(2)))
        real = mask[..., None].to(x)
        return self.out((x * real).sum(1) / real.sum(1))


def made(kind: str, count: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    labels = torch.tensor([2, 0, 1])[:count]
    if kind == "pixels":
        return Pixels().double(), {"x": torch.randn(count, 2, 5, 7).double(), "labels": labels}
    mask = (torch.arange(6) < torch.tensor([6, 3, 4])[:, None]).long()[:count]
    ids = torch.randint(3, 13, (count, 6)) * mask
    ids[:, 0] = torch.tensor([1, 2, 1])[:count]  # Special tokens.
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Reader().double(), batch


def ask(name: str, model: nn.Module, batch: Any, target: Any = None, **more: Any) -> at.Attribution:
    case = CASES[name]
    function: Callable[..., at.Attribution] = getattr(at, name)
    taken = inspect.signature(function).parameters
    options = {k: v for k, v in {**case.options, **case.few, **more}.items() if k in taken}
    return function(model, batch, target, **options)


def own(attribution: at.Attribution) -> Tensor:
    return attribution.values


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_each_is_a_function_a_measurement_and_an_option_of_a_callback() -> None:
    exported = {n for n in at.__all__ if inspect.isclass(getattr(at, n))}
    measurements = {n for n in exported if issubclass(getattr(at, n), Attributed)}
    named = {case.measurement.__name__ for case in CASES.values()}
    assert measurements == named | {"CaptumAttribution"}
    assert set(METHODS) == set(CASES)
    table = DOCS.read_text()
    for name, case in CASES.items():
        assert METHODS[name] is case.measurement
        assert re.search(rf"`{name}`, `{case.measurement.__name__}`", table)
        assert isinstance(case.measurement(**case.options), mi.Measurement)
        monitor = SaliencyMonitor(method=name, options=case.options)
        assert type(monitor.measurements[0]) is case.measurement


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_measurement_records_what_the_function_returns(name: str, kind: str) -> None:
    model, batch = made(kind)
    case = CASES[name]
    measurement = case.measurement(examples=2, **case.options, **case.few)
    panels = {r.what: r.panel for r in mi.measure(model, [measurement], batch=batch)}
    few = {k: v[:2] for k, v in batch.items()}
    references = batch["x" if kind == "pixels" else "input_ids"]
    found = ask(name, model, few, references=references)
    close(panels["values"].values, own(found))
    assert panels["values"].axes == found.axes
    assert bool(found.values.isfinite().all())
    assert bool(found.values.any())
    close(panels["target"].values, model(**{k: v for k, v in few.items() if k != "labels"})
          .gather(1, few["labels"][:, None])[:, 0].detach())  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_targets_of_all_kinds(name: str, kind: str) -> None:
    model, batch = made(kind)
    labels, others = batch["labels"], (batch["labels"] + 1) % 3
    first = own(ask(name, model, batch))

    def of_each(outputs: Tensor, given: Any) -> Tensor:
        return outputs.gather(1, given["labels"][:, None])[:, 0]

    for target in (labels, of_each, mi.Logit(labels)):
        close(own(ask(name, model, batch, target)), first)
    one = own(ask(name, model, batch, 1))
    close(one[2], first[2])
    assert name == "attention_rollout" or not torch.allclose(one[0], first[0])
    difference = ask(name, model, batch, mi.LogitDifference(labels, other=others))
    rival = ask(name, model, batch, others)
    close(difference.target, ask(name, model, batch, labels).target - rival.target)
    linear = ("input_x_gradient", "integrated_gradients", "occlusion", "expected_gradients")
    if name in linear:
        slack = 0.02 if name == "integrated_gradients" else 1e-10
        close(own(difference), first - own(rival), slack)


@pytest.mark.parametrize("name", [name for name, kind in PAIRS if kind == "ids"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_what_its_examples_give(name: str, side: str) -> None:
    model, batch = made("ids")
    if side == "left":  # Positions are counted for the model where it takes them.
        lengths = batch["attention_mask"].sum(1).tolist()
        for key in ("input_ids", "attention_mask"):
            turned = [row.roll(6 - n) for row, n in zip(batch[key], lengths, strict=True)]
            batch[key] = torch.stack(turned)
    references = {"references": None}
    whole = ask(name, model, batch, **references)
    for i, real in enumerate(batch["attention_mask"].bool()):
        one = {
            "input_ids": batch["input_ids"][i : i + 1, real],
            "labels": batch["labels"][i : i + 1],
        }
        if name == "expected_gradients":  # Baselines have the form of the batch: its own example.
            one = {k: v[i : i + 1] for k, v in batch.items()}
            alone = ask(name, model, one, references=batch["input_ids"])
            close(whole.values[i], alone.values[0], 1e-6)
            continue
        alone = ask(name, model, one, **references)
        row = whole.values[i]
        if whole.axes[1:] == ("position",):
            assert not row[~real].any()
            row = row[real]
        elif row.ndim and row.shape[0] == 6:
            row = row[real]
        close(row, alone.values[0], 1e-6)


class Counting(nn.Module):
    """A reader that counts positions from the left edge, padding included."""

    def __init__(self, inner: Reader) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, attention_mask)


def test_padding_that_shifts_positions_is_refused() -> None:
    model, batch = made("ids")
    counting = Counting(model)
    at.saliency(counting, batch, 1)  # On the right it shifts nothing.
    lengths = batch["attention_mask"].sum(1).tolist()
    left = dict(batch)
    for key in ("input_ids", "attention_mask"):
        left[key] = torch.stack(
            [row.roll(6 - n) for row, n in zip(batch[key], lengths, strict=True)]
        )
    for method in (at.saliency, at.integrated_gradients, at.occlusion):
        with pytest.raises(ModelError, match=r"padding on the left.*position_ids"):
            method(counting, left, 1)
    wrong = {**left, "position_ids": torch.arange(6).expand(3, 6)}
    with pytest.raises(ModelError, match="position_ids"):
        at.saliency(model, wrong, 1)
    right = {**left, "position_ids": (left["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    close(at.saliency(model, right, 1).values, at.saliency(model, left, 1).values)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keeps])
def test_special_tokens_can_be_kept_by_measurements_too(name: str) -> None:
    model, batch = made("ids")
    case = CASES[name]
    assert "keep" in {f.name for f in dataclasses.fields(case.measurement)}
    measurement = case.measurement(keep=[1, 2], **case.options, **case.few)
    values = {r.what: r.panel for r in mi.measure(model, [measurement], batch=batch)}["values"]
    free = case.measurement(**case.options, **case.few)
    moved = {r.what: r.panel for r in mi.measure(model, [free], batch=batch)}["values"]
    assert not torch.equal(values.values, moved.values)
    first = values.values[:, 0]
    quiet = name not in ("smooth_grad", "smooth_grad_squared", "var_grad")
    if quiet and name != "layer_integrated_gradients":
        assert not first.any()
    monitor = SaliencyMonitor(method=name, options={**case.options, "keep": [1, 2]})
    assert monitor.measurements[0].keep == [1, 2]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, kind: str, dtype: torch.dtype) -> None:
    model, batch = made(kind)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    model = model.to(dtype)
    exact = ask(name, model.double(), batch)  # The same rounded weights.
    found = ask(name, model.to(dtype), half)
    assert found.values.dtype == (torch.float32 if name.startswith("attention") else dtype)
    size = float(exact.values.abs().max())
    assert float((found.values.double() - exact.values).abs().max()) < 0.25 * size
    if found.gap is not None:
        assert found.gap.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_one_of_several_inputs(name: str) -> None:
    class Beside(nn.Module):
        """A table of numbers beside the input, so that the batch has two of them."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.side = inner, nn.Linear(4, 3)

        def forward(self, main: Tensor, table: Tensor) -> Tensor:
            return self.inner(main) * (1 + self.side(table))

    kind = CASES[name].on[0]
    inner, batch = made(kind)
    model = Beside(inner).double()
    main = batch["x" if kind == "pixels" else "input_ids"]
    table = torch.randn(3, 4).double()
    changed = {k: v for k, v in CASES[name].options.items() if k != "layer"}
    if "layer" in CASES[name].options:
        changed["layer"] = "inner.mix"
    options = {**CASES[name].few, **changed}
    function = getattr(at, name)
    both = {"main": main, "table": table}
    found = at.each_input(function, model, both, 1, keys=["main"], options=options)["main"]
    scaled = ScaledBy(inner, 1 + model.side(table).detach(), (main, table)).double()
    expected = function(scaled, main, 1, **{**options, **CASES[name].options})
    close(found.values, expected.values)
    asked = CASES[name].measurement(target=1, of="main", examples=None, **options)
    panels = {r.what: r.panel for r in mi.measure(model, [asked], batch=both)}
    close(panels["values"].values, found.values)


class ScaledBy(nn.Module):
    """The same model with the table written into it."""

    def __init__(self, inner: nn.Module, scale: Tensor, known: Any) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.mix = inner.mix

    def forward(self, main: Tensor) -> Tensor:
        times = len(main) // len(self.scale)
        scale = self.scale.repeat(times, 1) if times else self.scale[:1]
        return self.inner(main) * scale


def test_a_named_target_needs_no_labels() -> None:
    model, batch = made("pixels")
    for measurement in (
        at.Saliency(target=1),
        at.IntegratedGradients(target=1, max_steps=8),
        at.ExpectedGradients(target=1, samples=4),
        at.evaluate.Deletion(target=1),
        at.evaluate.Deletion(method=at.Saliency(target=1)),
        at.evaluate.ParameterRandomisation(target=1),
        at.evaluate.MethodAgreement(target=1),
        at.Concentration(method=at.Saliency(target=1)),
    ):
        assert mi.measure(model, [measurement], batch=batch["x"])
    with pytest.raises(ArgumentError, match="task"):
        mi.measure(model, [at.Saliency()], batch=batch["x"])
    with pytest.raises(ArgumentError, match="task"):
        mi.measure(model, [at.Saliency(target=mi.target.Loss())], batch=batch["x"])


def test_a_batch_in_which_nothing_is_a_label() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.stack([x.sum(1) * y.float(), -x.sum(1)], 1)

    x, y = torch.ones(3, 2), torch.tensor([2, 2, 3])
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        for target in (0, None):  # The model's own answer: y is no label, and class 2 is none.
            found = at.saliency(Product(), batch, target, kind="signed")
            close(found.values, y[:, None].expand(3, 2).float())
    labelled = (x, y.float(), torch.tensor([1, 1, 1]))
    close(at.saliency(Product(), labelled, kind="signed").values, -torch.ones(3, 2))


def test_options_of_the_monitor_of_integrated_gradients() -> None:
    monitor = IntegratedGradientsMonitor(
        rule="trapezoid", steps=9, keep=[0, 1], of=["image", "table"], baseline=None
    )
    made = monitor.measurements[0]
    assert isinstance(made, at.IntegratedGradients)
    assert (made.rule, made.steps, made.keep, made.of) == (
        "trapezoid", 9, [0, 1], ["image", "table"],
    )  # fmt: skip
