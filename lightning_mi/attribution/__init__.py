"""Which inputs matter: gradient saliency and integrated gradients.

Each method is a pure function that returns an `Attribution`, and beside it a measurement that runs
the same during training, over checkpoints and in a notebook.
"""

from __future__ import annotations

from . import evaluate
from .attention_gradient import AttentionGradient, attention_gradient
from .attention_rollout import AttentionRollout, attention_rollout
from .attn_lrp import AttnLRP, attn_lrp
from .captum_adapter import CaptumAttribution, captum_attribution
from .discretized import DiscretizedIntegratedGradients, discretized_integrated_gradients
from .drifting import Drift, drift, drift_series
from .expected import ExpectedGradients, expected_gradients
from .grad_cam import GradCam, LayerGradCam, grad_cam, layer_grad_cam
from .gradients import InputXGradient, Saliency, input_x_gradient, saliency
from .idgi import Idgi, idgi
from .layer_paths import LayerIntegratedGradients, layer_integrated_gradients
from .occlusion import Occlusion, occlusion
from .paths import IntegratedGradients, integrated_gradients
from .result import Attribution
from .several import InputOf, InputsOf, each_input, together
from .smoothing import (
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
    smooth_grad,
    smooth_grad_squared,
    var_grad,
)
from .spread import Concentration, concentration, share

__all__ = [
    # what comes out
    "Attribution",
    # gradients at the inputs
    "saliency",
    "Saliency",
    "input_x_gradient",
    "InputXGradient",
    # gradients at noisy inputs
    "smooth_grad",
    "SmoothGrad",
    "smooth_grad_squared",
    "SmoothGradSquared",
    "var_grad",
    "VarGrad",
    # a layer's channels
    "grad_cam",
    "GradCam",
    "layer_grad_cam",
    "LayerGradCam",
    # parts of the input replaced
    "occlusion",
    "Occlusion",
    # any method of captum
    "captum_attribution",
    "CaptumAttribution",
    # models with several inputs
    "each_input",
    "together",
    "InputOf",
    "InputsOf",
    # gradients along a path
    "integrated_gradients",
    "IntegratedGradients",
    "layer_integrated_gradients",
    "LayerIntegratedGradients",
    "expected_gradients",
    "ExpectedGradients",
    "idgi",
    "Idgi",
    "discretized_integrated_gradients",
    "DiscretizedIntegratedGradients",
    # transformers
    "attention_rollout",
    "AttentionRollout",
    "attention_gradient",
    "AttentionGradient",
    "attn_lrp",
    "AttnLRP",
    # how far to believe it
    "evaluate",
    # how it moves, and where it lies
    "drift",
    "Drift",
    "drift_series",
    "concentration",
    "Concentration",
    "share",
]
