"""Which methods captum has, what arguments they take, and what is known of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, LightningMIError

__all__ = ["Chosen", "choose"]

OURS = frozenset(
    {"self", "inputs", "target", "additional_forward_args", "forward_func", "model", "layer"}
    | {"device_ids", "kwargs", "args", "attribution_method"}
)
"""Arguments that are filled in here."""

RELU_ONLY = frozenset(
    {"Deconvolution", "GuidedBackprop", "GuidedGradCam"}
    | {"NeuronDeconvolution", "NeuronGuidedBackprop"}
)
"""Methods that only change what nn.ReLU does, and silently are plain gradients without one."""

DISTRIBUTIONS = ("GradientShap", "DeepLiftShap")
"""Endings of methods whose baselines are draws for all examples, not one for each."""

ONE_BY_ONE = frozenset({"Lime", "KernelShap"})
"""Methods that captum fits for one example after the other anyway."""

COMPLETE = frozenset({"DeepLift", "IntegratedGradients"})
"""Methods whose scores add up to F(x) − F(x′)."""

NOT_HERE = {
    "LimeBase": "it needs functions that say how to perturb; use Lime",
    "NoiseTunnel": "it goes around another method; pass noise={'nt_type': …} with that method",
    "LLMAttribution": "it generates text; attribute the logit of a token with another method",
    "LLMGradientAttribution": "it generates text; attribute the logit of a token instead",
    "RemoteLLMAttribution": "it asks a remote server",
    "DataLoaderAttribution": "it runs over a loader; sweep over batches instead",
}


@dataclass(frozen=True, eq=False)
class Chosen:
    """A method of captum and the arguments it will get.

    Args:
        name: Name of the class.
        cls: The class.
        made_with: Arguments of the class.
        called_with: Arguments of its ``attribute``.
        noise: Arguments of NoiseTunnel, or None.
        takes: Names of all arguments of ``attribute``.
    """

    name: str
    cls: Any
    made_with: Mapping[str, Any]
    called_with: Mapping[str, Any]
    noise: Mapping[str, Any] | None
    takes: frozenset[str]

    @property
    def needs_layer(self) -> bool:
        """Whether a layer has to be named."""
        return "layer" in _arguments(self.cls.__init__)

    @property
    def wants_baseline(self) -> bool:
        """Whether a baseline is passed."""
        return "baselines" in self.takes and "baselines" not in self.called_with

    @property
    def changes_weights(self) -> bool:
        """Whether captum writes into the parameters while it runs."""
        return self.name.endswith("LRP")

    @property
    def on_inputs(self) -> bool:
        """Whether scores are of the inputs, although a layer was named."""
        return not self.name.startswith("Layer")

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are draws for all examples."""
        return self.name.endswith(DISTRIBUTIONS)

    @property
    def perturbs(self) -> bool:
        """Whether inputs are replaced, feature by feature, instead of differentiated."""
        return "feature_mask" in self.takes or self.name.endswith("Occlusion")

    @property
    def per_unit(self) -> bool:
        """Whether scores are changes for a unit of an input, as gradients are."""
        plain = self.name == "Saliency" or self.name in RELU_ONLY or self.name == "NeuronGradient"
        return plain or self.made_with.get("multiply_by_inputs") is False


def choose(name: str, options: Mapping[str, Any], noise: Mapping[str, Any] | None = None) -> Chosen:
    """Find a method and sort its options.

    Args:
        name: Name of a class in ``captum.attr``.
        options: Arguments of the class and of its ``attribute``.
        noise: Arguments of NoiseTunnel, or None.

    Returns:
        The method.

    Raises:
        ArgumentError: If there is no such method, an option is unknown or one is missing.
    """
    found = _methods()
    if name not in found:
        raise _no_method(name, found)
    cls = found[name]
    making, calling = _arguments(cls.__init__), _arguments(cls.attribute)
    _check_known("options", options, {**making, **calling}, name)
    made = {key: value for key, value in options.items() if key in making}
    called = {key: value for key, value in options.items() if key not in making}
    given = frozenset(options) | OURS | {"baselines"}
    missing = [k for k, p in {**making, **calling}.items() if k not in given and _required(p)]
    if name.endswith("Occlusion"):  # For tokens it has a default.
        missing = [key for key in missing if key != "sliding_window_shapes"]
    if missing:
        raise ArgumentError.of(
            "options", expected=f"{missing} too", got=sorted(options), do=f"captum's {name} asks."
        )
    if noise is not None:
        _check_known("noise", noise, _arguments(tunnel().attribute), "NoiseTunnel")
    return Chosen(name, cls, made, called, noise, frozenset(calling))


def ready(value: Any) -> Any:
    """Return an option as captum wants it: YAML has lists where captum wants tuples.

    Args:
        value: An option.

    Returns:
        The same with tuples for lists.

    Example:
        >>> ready([1, [2, 3]])
        (1, (2, 3))
    """
    return tuple(ready(v) for v in value) if isinstance(value, list | tuple) else value


def check_relu(chosen: Chosen, model: nn.Module) -> str | None:
    """Say why a method would silently be another one on this model.

    Args:
        chosen: The method.
        model: The model.

    Returns:
        The reason, or None.
    """
    if chosen.name in RELU_ONLY and not any(isinstance(m, nn.ReLU) for m in model.modules()):
        return (
            "it changes the gradient of nn.ReLU modules only and would be the plain gradient on a "
            "model without one (functional relu is not seen, GELU is not treated)"
        )
    return None


def feature_mask(given: Any, point: Tensor, *, tokens: bool) -> Tensor | None:
    """Return which components belong to one feature.

    Args:
        given: What the user gave: numbers of features, as a tensor or lists; for ids one for each
            token.
        point: The points, ``[example, …]``.
        tokens: Whether they are vectors of ids.

    Returns:
        Long tensor that expands to the points; None leaves every component its own feature.
    """
    if given is None:
        if not tokens:
            return None
        given = torch.arange(point.shape[1])
    mask = torch.as_tensor(given, device=point.device).long()
    mask = mask[..., None] if tokens else mask
    while mask.ndim < point.ndim:
        mask = mask[None]
    return mask.expand(mask.shape[0], *point.shape[1:]).contiguous()


def tunnel() -> Any:
    """Return captum's class NoiseTunnel."""
    return _captum().NoiseTunnel


def _captum() -> Any:
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise LightningMIError(
            "captum: expected captum to be installed, got an import error. Run: pip install captum"
        ) from error


def _methods() -> dict[str, Any]:
    captum = _captum()
    abstract = {"Attribution", "GradientAttribution", "PerturbationAttribution"}
    abstract |= {"InternalAttribution", "LayerAttribution", "NeuronAttribution"}
    return {
        name: cls
        for name, cls in vars(captum).items()
        if inspect.isclass(cls)
        and issubclass(cls, captum.Attribution)
        and name not in abstract
        and name not in NOT_HERE
    }


def _no_method(name: str, found: Mapping[str, Any]) -> ArgumentError:
    if name in NOT_HERE:
        return ArgumentError.of(
            "method", expected="a method that runs on a batch", got=name, do=f"{NOT_HERE[name]}."
        )
    if inspect.isclass(getattr(_captum(), str(name), None)):
        return ArgumentError.of(
            "method",
            expected="a class in captum.attr that explains a batch",
            got=f"{name}, which is a base class or a helper of others",
            do=f"Choose for example {sorted(found)[:3]}.",
        )
    likely = difflib.get_close_matches(str(name), found, n=3, cutoff=0.4) or sorted(found)
    return ArgumentError.of(
        "method",
        expected="the name of a class in captum.attr",
        got=repr(name),
        do=f"Choose for example {likely}.",
    )


def _arguments(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {k: p for k, p in found.items() if k != "self" and p.kind is not p.VAR_POSITIONAL}


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD


def _check_known(
    argument: str, given: Mapping[str, Any], known: Mapping[str, Any], name: str
) -> None:
    allowed = sorted(set(known) - OURS)
    for key in given:
        if key in OURS:
            raise ArgumentError.of(
                argument,
                expected=f"only captum's own options for {name}: {allowed}",
                got=repr(key),
                do="Pass target, layer, task and inputs beside the options.",
            )
        if key not in allowed:
            raise ArgumentError.of(
                argument,
                expected=f"options of captum's {name}: {allowed}",
                got=repr(key),
                do="Rename or remove it.",
            )
