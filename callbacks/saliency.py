"""`SaliencyMonitor`: watch which inputs the model is sensitive to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..attribution import (
    AttentionGradient,
    AttentionRollout,
    AttnLRP,
    CaptumAttribution,
    DiscretizedIntegratedGradients,
    ExpectedGradients,
    GradCam,
    Idgi,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerIntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from ..attribution.measured import Attributed
from ..errors import ArgumentError
from ..target import TargetOption
from ..task import Task
from .monitor import MeasurementMonitor

__all__ = ["SaliencyMonitor"]

METHODS: Mapping[str, type[Attributed]] = {
    "saliency": Saliency,
    "input_x_gradient": InputXGradient,
    "smooth_grad": SmoothGrad,
    "smooth_grad_squared": SmoothGradSquared,
    "var_grad": VarGrad,
    "grad_cam": GradCam,
    "layer_grad_cam": LayerGradCam,
    "occlusion": Occlusion,
    "integrated_gradients": IntegratedGradients,
    "layer_integrated_gradients": LayerIntegratedGradients,
    "expected_gradients": ExpectedGradients,
    "idgi": Idgi,
    "discretized_integrated_gradients": DiscretizedIntegratedGradients,
    "attention_rollout": AttentionRollout,
    "attention_gradient": AttentionGradient,
    "attn_lrp": AttnLRP,
}


class SaliencyMonitor(MeasurementMonitor):
    """Watch the gradient of the target with respect to the inputs, or another method.

    Logged keys: ``mi_saliency/strip`` (picture, for tokens), ``mi_saliency/image`` (for images) or
    ``mi_saliency/bars`` (for tables), in units of the target for each unit of the input. Another
    method has its own name in the place of ``saliency`` and the unit that its function states. The
    run folder holds the values.

    In YAML ``{method: smooth_grad, options: {level: 0.1}}`` or, any class of captum,
    ``{method: DeepLift}``.

    Args:
        method: ``"saliency"``, ``"input_x_gradient"``, ``"smooth_grad"``,
            ``"smooth_grad_squared"``, ``"var_grad"``, ``"grad_cam"``, ``"layer_grad_cam"``,
            ``"occlusion"``, ``"integrated_gradients"``, ``"layer_integrated_gradients"``,
            ``"expected_gradients"``, ``"idgi"``, ``"discretized_integrated_gradients"``,
            ``"attention_rollout"``, ``"attention_gradient"``, ``"attn_lrp"``, or the name of a
            class in ``captum.attr``. `IntegratedGradientsMonitor` names the options of integrated
            gradients one by one.
        options: Further arguments of the method's measurement, for example of
            `lightning_mi.attribution.SmoothGrad`; for captum captum's own, by name.
        layer: Name of a layer, for the methods that have one.
        target: The scalar whose gradient is taken; None takes the logit of the true next token or
            of the label.
        kind: ``"absolute"`` or ``"signed"``; for tokens the L2 norm or the sum over the embedding.
            None takes the method's own default; methods without this choice take nothing else.
        examples: Examples of the batch that are explained; None takes all of it.
        batch: See `MeasurementMonitor`.
        task: See there.
        tokenizer: See there.
        dirpath: See there.
        report: See there.
        every_n_train_steps: See there.
        every_n_epochs: See there.
        train_time_interval: See there.
        at_steps: See there.
        on_validation: See there.
        at_start: See there.
        at_end: See there.
        max_overhead: See there.

    Raises:
        ArgumentError: If there is no such method, or it does not have one of the arguments.
    """

    def __init__(
        self,
        *,
        method: str = "saliency",
        options: dict[str, Any] | None = None,
        layer: str | None = None,
        target: TargetOption = None,
        kind: Literal["absolute", "signed"] | None = None,
        examples: int | None = 4,
        batch: Any = None,
        task: Task | None = None,
        tokenizer: Any = None,
        dirpath: str | Path | None = None,
        report: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        at_steps: list[int] | Literal["log"] | None = None,
        on_validation: bool = False,
        at_start: bool | None = None,
        at_end: bool | None = None,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__(
            measurements=[_chosen(method, options or {}, target, examples, kind, layer)],
            batch=batch,
            task=task,
            tokenizer=tokenizer,
            dirpath=dirpath,
            report=report,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            at_steps=at_steps,
            on_validation=on_validation,
            at_start=at_start,
            at_end=at_end,
            max_overhead=max_overhead,
        )


def _chosen(
    method: str,
    options: Mapping[str, Any],
    target: TargetOption,
    examples: int | None,
    kind: str | None,
    layer: str | None,
) -> Attributed:
    asked = {"kind": kind, "layer": layer}
    given = {name: value for name, value in asked.items() if value is not None}
    if method[:1].isupper():
        if kind is not None:
            raise _misfit("kind", method, ["layer"])
        return CaptumAttribution(method, options, layer=layer, target=target, examples=examples)
    if method not in METHODS:
        raise ArgumentError.of(
            "method",
            expected=f"one of {list(METHODS)} or the name of a class in captum.attr",
            got=repr(method),
            do="Classes of captum begin with a capital: DeepLift.",
        )
    cls = METHODS[method]
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    own = {f.name for f in dataclasses.fields(cls)} - {"target", "examples"}
    for name in needed:
        if name not in (*given, *options):
            raise ArgumentError.of(
                name, expected=f"a value, as {method} needs one", got="nothing", do="Pass it."
            )
    for name in (*given, *options):
        if name not in own:
            raise _misfit(name, method, sorted(own))
    return cls(target=target, examples=examples, **given, **options)


def _misfit(name: str, method: str, known: list[str]) -> ArgumentError:
    return ArgumentError.of(
        name,
        expected=f"an argument that {method} has: {known}",
        got=repr(name),
        do="Leave it out, or choose another method.",
    )
