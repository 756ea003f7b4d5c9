"""Methods of captum by name: equal to captum called by hand, on any input, without a trace."""

from __future__ import annotations

import gc
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi import attribution as at
from lightning_mi.errors import ArgumentError, LightningMIError, ModelError

captum = pytest.importorskip("captum.attr")
REFERENCE = Path(__file__).parent / "reference"


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=0)


class Cnn(nn.Module):
    """Modules only, as captum's rules want them; used once each."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.second, self.last = nn.Conv2d(4, 3, 3, stride=2), nn.ReLU()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(drop)
        self.out = nn.Linear(3 * 3 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.second(self.act(self.norm(self.first(x)))))
        return self.out(self.drop(x).flatten(1))


def setting() -> tuple[Cnn, Tensor, Tensor]:
    return Cnn().double().eval(), torch.randn(3, 2, 7, 9).double(), torch.tensor([2, 0, 1])


def by_hand(name: str, model: nn.Module, x: Tensor, y: Any, made: Any, **options: Any) -> Any:
    """Call captum as its users do, with the same seeds."""
    import random

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        found = getattr(captum, name)(model, *made).attribute(x.clone(), target=y, **options)
    return found.detach()


PLAIN: dict[str, dict[str, Any]] = {
    "Saliency": {"abs": False},
    "InputXGradient": {},
    "Deconvolution": {},
    "GuidedBackprop": {},
    "IntegratedGradients": {"n_steps": 7},
    "DeepLift": {},
    "FeatureAblation": {"perturbations_per_eval": 4},
    "ShapleyValueSampling": {"n_samples": 2},
    "Occlusion": {"sliding_window_shapes": (2, 3, 3), "strides": (2, 2, 2)},
}
LAYERED: dict[str, dict[str, Any]] = {
    "InternalInfluence": {"n_steps": 6},
    "LayerConductance": {"n_steps": 6},
    "LayerActivation": {},
    "LayerGradCam": {},
    "LayerGradientXActivation": {},
    "LayerIntegratedGradients": {"n_steps": 6},
    "LayerDeepLift": {},
    "GuidedGradCam": {},
}


@pytest.mark.parametrize("name", PLAIN)
def test_equals_captum_by_hand(name: str) -> None:
    model, x, y = setting()
    found = at.captum_attribution(model, x, y, method=name, options=PLAIN[name])
    with torch.no_grad():
        close(found.target, model(x).gather(1, y[:, None])[:, 0])
    close(found.values, by_hand(name, model, x, y, (), **PLAIN[name]))
    assert found.axes == ("example", "channel", "y", "x")


@pytest.mark.parametrize("name", LAYERED)
def test_layers_equal_captum_by_hand(name: str) -> None:
    model, x, y = setting()
    options = {"layer": "second", "options": LAYERED[name]}
    found = at.captum_attribution(model, x, y, method=name, **options)
    hand = by_hand_layer(name, model, model.second, x, y, **LAYERED[name])
    close(found.values, hand)
    assert found.convention["layer"] == "second"


def by_hand_layer(name: str, model: Any, layer: Any, x: Tensor, y: Any, **options: Any) -> Tensor:
    if name == "LayerActivation":
        return captum.LayerActivation(model, layer).attribute(x).detach()
    return by_hand(name, model, x, y, (layer,), **options)


@pytest.mark.parametrize("name", ["LRP", "LayerLRP"])
def test_relevance_propagation(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(3, 5).double(), torch.tensor([2, 0, 1])
    layer = {"layer": "0"} if name == "LayerLRP" else {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    found = at.captum_attribution(model, x, y, method=name, **layer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    close(found.values, by_hand(name, model, x, y, [model[0]] if layer else []))


def test_gradient_shap() -> None:
    model, x, y = setting()
    options = {"n_samples": 4, "stdevs": 0.1}
    found = at.captum_attribution(model, x, y, method="GradientShap", options=options)
    zeros = torch.zeros_like(x[:2])
    close(found.values, by_hand("GradientShap", model, x, y, (), baselines=zeros, **options))
    again = at.captum_attribution(model, x, y, method="GradientShap", options=options)
    assert torch.equal(found.values, again.values)
    other = at.captum_attribution(model, x, y, method="GradientShap", options=options, seed=1)
    assert not torch.equal(found.values, other.values)


@pytest.mark.parametrize("name", ["KernelShap", "Lime"])
def test_fitted_one_by_one(name: str) -> None:
    model, x = nn.Linear(4, 3).double(), torch.randn(3, 4).double()
    options = {"n_samples": 100}
    found = at.captum_attribution(model, x, 1, method=name, options=options)
    alone = at.captum_attribution(model, x[2:], 1, method=name, options=options)
    close(found.values[2:], alone.values)
    close(found.values[2:], by_hand(name, model, x[2:], 1, (), **options))
    if name == "KernelShap":  # Shapley values of a linear model.
        close(found.values, (x * model.weight[1]).detach(), 1e-3)


def test_noise_around_a_method() -> None:
    model, x, y = setting()
    noise = {"nt_type": "smoothgrad_sq", "nt_samples": 3, "stdevs": 0.2}
    found = at.captum_attribution(
        model, x, y, method="Saliency", options={"abs": False}, noise=noise
    )
    torch.manual_seed(0)
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    theirs = tunnel.attribute(x.clone().requires_grad_(), target=y, abs=False, **noise)
    close(found.values, theirs.detach())


def test_baselines_and_completeness() -> None:
    model, x, y = setting()
    start = torch.randn(2, 7, 9).double()
    found = at.captum_attribution(model, x, y, method="DeepLift", baseline=start)
    close(found.values, by_hand("DeepLift", model, x, y, (), baselines=start.expand_as(x).clone()))
    assert found.gap is not None
    assert float(found.gap.abs().max()) < 1e-9
    with torch.no_grad():
        change = (model(x) - model(start.expand_as(x))).gather(1, y[:, None])[:, 0]
    close(found.output_change, change)  # type: ignore[arg-type]
    close(found.values.flatten(1).sum(1), change, 1e-9)
    asked = {"return_convergence_delta": True}
    shap = at.captum_attribution(model, x, y, method="DeepLiftShap", options=asked)
    assert shap.delta is not None
    assert shap.delta.shape == (3,)
    assert float(shap.delta.abs().max()) < 1e-9


def test_what_deep_lift_does_not_see_shows_in_the_gap() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x)))

    x = torch.randn(8, 4).double()
    found = at.captum_attribution(Functional().double(), x, 1, method="DeepLift")
    assert found.gap is not None
    assert float(found.gap.abs().max()) > 0.01


# --- token ids ------------------------------------------------------------------------------------


class Text(nn.Module):
    """captum's text model of the reference values."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def inner(self, vectors: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(vectors.transpose(1, 2))).mean(2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.emb(ids))


def text() -> tuple[Text, dict[str, Tensor]]:
    with np.load(REFERENCE / "captum_text.npz") as file:
        data = {k: torch.from_numpy(file[k]) for k in file.files}
    model = Text().double()
    model.load_state_dict(
        {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    )
    return model, data


def test_integrated_gradients_of_tokens_equal_the_reference() -> None:
    model, data = text()
    found = at.captum_attribution(
        model, data["ids"], data["target"], method="IntegratedGradients",
        baseline=data["ref"], options={"n_steps": 24},
    )  # fmt: skip
    close(found.values, data["layer_ig_emb"].sum(-1))
    assert found.axes == ("example", "position")
    conv = at.captum_attribution(
        model, data["ids"], data["target"], method="LayerIntegratedGradients", layer="conv",
        baseline=data["ref"], options={"n_steps": 24},
    )  # fmt: skip
    close(conv.values, data["layer_ig_conv"])


@pytest.mark.parametrize("name", ["FeatureAblation", "KernelShap", "ShapleyValueSampling", "Lime"])
def test_tokens_are_perturbed_as_a_whole(name: str) -> None:
    model, data = text()
    ids, y = data["ids"], data["target"]
    options = {} if name == "FeatureAblation" else {"n_samples": 20}
    found = at.captum_attribution(model, ids, y, method=name, options=options)
    assert found.values.shape == ids.shape
    if name == "FeatureAblation":
        close(found.values, at.occlusion(model, ids, y).values, 1e-6)
    if name == "ShapleyValueSampling":  # Permutations telescope.
        vectors = model.emb(ids)
        change = model.inner(vectors) - model.inner(0 * vectors)
        close(found.values.sum(1), change.gather(1, y[:, None])[:, 0].detach(), 1e-6)


def test_features_of_several_tokens_and_windows() -> None:
    model, data = text()
    ids, y = data["ids"], data["target"]
    pairs = {"feature_mask": [0, 0, 1, 1, 2, 2, 2]}
    found = at.captum_attribution(model, ids, y, method="FeatureAblation", options=pairs)
    close(found.values[:, 0], found.values[:, 1])
    vectors = model.emb(ids).detach()
    hidden = vectors.clone()
    hidden[:, 2:4] = 0
    change = (model.inner(vectors) - model.inner(hidden)).gather(1, y[:, None])[:, 0]
    close(found.values[:, 2], change.detach(), 1e-6)
    windows = {"sliding_window_shapes": 2, "strides": 1}
    found = at.captum_attribution(model, ids, y, method="Occlusion", options=windows)
    close(found.values, at.occlusion(model, ids, y, window=2, stride=1).values, 1e-6)


def test_padded_tokens_equal_one_by_one() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.act, self.out = nn.Tanh(), nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, str]:
            x = self.act(self.hidden(self.words(input_ids))) * attention_mask[..., None]
            return self.out(x.sum(1) / attention_mask.sum(1, keepdim=True)), "not a tensor"

    model = Bag().double()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    for name in ("DeepLift", "InputXGradient", "FeatureAblation", "GradientShap", "KernelShap"):
        options = {"n_samples": 40} if name == "KernelShap" else {}
        options = {"n_samples": 2} if name == "GradientShap" else options
        batch = {"input_ids": ids, "attention_mask": mask}
        found = at.captum_attribution(model, batch, 1, method=name, options=options).values
        for row, length in enumerate((4, 2, 1)):
            alone = {"input_ids": ids[row : row + 1, :length],
                     "attention_mask": mask[row : row + 1, :length]}  # fmt: skip
            if name == "KernelShap":  # Its draws depend on the number of features.
                continue
            one = at.captum_attribution(model, alone, 1, method=name, options=options).values
            tolerance = 1e-6 if name == "FeatureAblation" else 1e-9
            close(found[row, :length], one[0], tolerance)
        tolerance = 1e-5 if name == "KernelShap" else 1e-9
        assert float(found[mask == 0].abs().max()) <= tolerance


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DeepLift", "GradientShap", "FeatureAblation", "KernelShap", "IntegratedGradients"]
)
def test_any_target(name: str) -> None:
    model, x, y = setting()
    options: dict[str, Any] = {"n_samples": 3} if name in ("GradientShap", "KernelShap") else {}
    if name == "FeatureAblation":
        options["perturbations_per_eval"] = 3
    if name == "IntegratedGradients":
        options = {"n_steps": 5, "internal_batch_size": 4}
    found = at.captum_attribution(model, x, y, method=name, options=options)

    def chosen(out: Tensor, batch: Any) -> Tensor:
        return out.gather(1, y[:, None])[:, 0]

    other = at.captum_attribution(model, x, chosen, method=name, options=options)
    close(found.values, other.values, 1e-9)


# --- harm -----------------------------------------------------------------------------------------


class Touchy(Cnn):
    """Fails in the forward pass after a number of calls, or in the backward pass."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.calls, self.fails = 0, 10**9
        self.own = 0
        self.act.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.own += 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.fails:
            raise ZeroDivisionError("fails on purpose")
        return super().forward(x)


def state(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [m.training for m in model.modules()],
        [(id(p), p.requires_grad, id(p.grad), p._version) for p in model.parameters()],
        [[list(getattr(m, name)) for name in names] for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [v.tolist() for v in model.state_dict().values()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    ]


@pytest.mark.parametrize("fails", [1, 2, 10**9])
@pytest.mark.parametrize(
    "name", ["DeepLift", "GuidedBackprop", "LayerConductance", "KernelShap", "LRP"]
)
def test_model_is_left_as_it_was(name: str, fails: int) -> None:
    model, x = Touchy().double().train(), torch.randn(3, 2, 7, 9).double()
    model.norm.eval()
    model.out.bias.requires_grad_(False)
    model(x).sum().backward()
    model.calls, model.fails = 0, fails
    before = state(model)
    layer = {"layer": "second"} if name.startswith("Layer") else {}
    few = name in ("GuidedBackprop", "LayerConductance")  # One pass at the inputs, one by captum.
    if fails > (1 if few else 2):
        at.captum_attribution(model, x, 1, method=name, **layer)
    else:  # Outside captum the model's own error comes through.
        with pytest.raises((ModelError, ZeroDivisionError), match="on purpose") as caught:
            at.captum_attribution(model, x, 1, method=name, **layer)
        assert name in str(caught.value) or caught.type is ZeroDivisionError
    assert state(model) == before
    own = model.own
    model.fails = 10**9
    model(x)
    assert model.own == own + 1  # The user's hook still works.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_around_it(mode: Any) -> None:
    model, x, y = setting()
    plain = at.captum_attribution(model, x, y, method="DeepLift").values
    with mode():
        close(at.captum_attribution(model, x.clone(), y, method="DeepLift").values, plain)


@pytest.mark.parametrize("name", ["DeepLift", "FeatureAblation"])
def test_memory_is_flat(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    at.captum_attribution(model, x, 1, method=name)
    before = tensors()
    for _ in range(10):
        at.captum_attribution(model, x, 1, method=name)
    assert tensors() <= before


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "DeepLyft"}, "DeepLift"),
        ({"method": "NoiseTunnel"}, "noise="),
        ({"method": "LimeBase"}, "use Lime"),
        ({"method": "Attribution"}, "captum.attr"),
        ({"method": "TracInCP"}, "captum.attr"),
        ({"method": "DeepLift", "options": {"n_steps": 3}}, "return_convergence_delta"),
        ({"method": "DeepLift", "options": {"target": 3}}, "beside the options"),
        ({"method": "Saliency", "noise": {"sigma": 3}}, "nt_type"),
        ({"method": "NeuronGradient", "layer": "second"}, "neuron_selector"),
        ({"method": "LayerConductance"}, "needs one"),
        ({"method": "DeepLift", "layer": "second"}, "takes none"),
        ({"method": "Occlusion"}, "sliding_window_shapes"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    model, x, y = setting()
    with pytest.raises(LightningMIError, match=said):
        at.captum_attribution(model, x, y, **arguments)


def test_what_captum_cannot_do_is_named() -> None:
    class Pure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.words = nn.Linear(4, 2), nn.Embedding(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(F.relu(self.words(ids))).mean(1)

    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ModelError, match=r"nn\.ReLU"):
        at.captum_attribution(Pure(), ids, 1, method="GuidedBackprop")
    with pytest.raises(ArgumentError, match="IntegratedGradients"):
        at.captum_attribution(Pure(), ids, 1, method="LayerIntegratedGradients", layer="words")
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    with pytest.raises(ModelError, match="used once"):
        at.captum_attribution(twice, torch.randn(2, 4), 1, method="DeepLift")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="rule"):
        at.captum_attribution(flat, torch.randn(2, 4), 1, method="LRP")


# --- measurement ----------------------------------------------------------------------------------


def test_records() -> None:
    model, x, y = setting()
    m = at.CaptumAttribution("GradientShap", {"n_samples": 2}, examples=2)
    assert m.name == "captum_gradient_shap"
    records = mi.measure(model, m, batch=(x, y))
    names = {r.name for r in records}
    assert {"captum_gradient_shap/values", "captum_gradient_shap/target"} <= names
    panel = next(r.panel for r in records if r.name.endswith("/values"))
    assert panel.axes == ("example", "channel", "y", "x")
    assert panel.convention["options"] == {"n_samples": 2}
    assert panel.convention["method"] == "captum.GradientShap"
    expected = at.captum_attribution(
        model, x[:2], y[:2], method="GradientShap", options={"n_samples": 2}
    )
    close(panel.values, expected.values)
    assert records[0].made_by["init_args"]["options"] == {"n_samples": 2}
    with pytest.raises(ArgumentError, match="n_samplez"):
        at.CaptumAttribution("GradientShap", {"n_samplez": 2})
    with pytest.raises(ArgumentError, match="layer"):
        at.CaptumAttribution("LayerConductance")


def test_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--measurements", type=list[mi.Measurement])
    given = {
        "class_path": "lightning_mi.attribution.CaptumAttribution",
        "init_args": {"method": "Occlusion", "options": {"sliding_window_shapes": [1, 3, 3]}},
    }
    made = parser.instantiate(parser.parse_object({"measurements": [given]})).measurements[0]
    assert made.method == "Occlusion"
    model, x, y = setting()
    found = made.compute(model, (x, y), mi.Classification())
    hand = by_hand("Occlusion", model, x, y, (), sliding_window_shapes=(1, 3, 3))
    close(found.values, hand)


MODULES = {name: cls for name, cls in vars(captum).items() if isinstance(cls, type)}
GENERATING = {
    "LimeBase": "use Lime",
    "NoiseTunnel": "goes around another method",
    "DataLoaderAttribution": "runs over a loader",
    "LLMAttribution": "generates text",
    "LLMGradientAttribution": "generates text",
    "RemoteLLMAttribution": "remote server",
}


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(9, 4), nn.Linear(4, 5)
        self.act, self.out = nn.ReLU(), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.act(self.first(self.words(input_ids))).mean(1))


def attributes(cls: type) -> bool:
    return issubclass(cls, captum.Attribution) and not cls.__name__.endswith("Attribution")


@pytest.mark.parametrize("name", sorted(name for name, cls in MODULES.items() if attributes(cls)))
@pytest.mark.parametrize("kind", ["images", "ids"])
def test_each_class_of_captum_works_or_is_refused_with_a_reason(name: str, kind: str) -> None:
    """Classes of a captum to come are in this loop as well."""
    takes_layer = "layer" in inspect.signature(MODULES[name].__init__).parameters
    image = kind == "images"
    model = Cnn().double() if image else Bag().double()
    inputs = torch.randn(2, 2, 7, 9).double() if image else torch.tensor([[1, 2, 3], [4, 5, 6]])
    options: dict[str, Any] = {}
    if name.startswith("Neuron"):
        options["neuron_selector"] = [0, 0, 0] if image else [0, 0]
    if name == "Occlusion" and image:
        options["sliding_window_shapes"] = [2, 3, 3]
    if name.startswith(("Shapley", "KernelShap", "Lime")) and image:
        options["feature_mask"] = (torch.arange(9) // 5).expand(2, 7, 9)

    def ask() -> at.Attribution:
        layer = "first" if takes_layer else None
        return at.captum_attribution(model, inputs, 1, method=name, options=options, layer=layer)

    if name in GENERATING:
        with pytest.raises(ArgumentError, match=GENERATING[name]):
            ask()
    elif name in ("LRP", "LayerLRP") and not image:
        with pytest.raises(ModelError, match="has rules for"):
            ask()  # Not for Embedding.
    else:
        found = ask().values
        assert found.numel()
        assert bool(found.isfinite().all())
        assert (
            found.shape == inputs.shape
            or name.startswith("Layer")
            or name in ("InternalInfluence",)
        )


def test_relevance_of_a_layer_of_linear_maps() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    for name, layer in (("LRP", None), ("LayerLRP", "0")):
        assert at.captum_attribution(model, x, 1, method=name, layer=layer).values.isfinite().all()


@pytest.mark.parametrize("name", sorted(n for n, c in MODULES.items() if not attributes(c)))
def test_what_is_no_method_is_refused(name: str) -> None:
    reason = GENERATING.get(name, "base class or a helper|name of a class")
    with pytest.raises(ArgumentError, match=reason):
        at.CaptumAttribution(name)


def test_scores_that_captum_could_not_spread_over_the_inputs_are_no_answer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ModelError, match="got none"):
        at.captum_attribution(model, torch.randn(2, 4), 1, method="GuidedGradCam", layer="1")
