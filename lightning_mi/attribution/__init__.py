"""Which inputs matter: gradient saliency and integrated gradients.

Each method is a pure function that returns an `Attribution`, and beside it a measurement that runs
the same during training, over checkpoints and in a notebook.
"""

from __future__ import annotations

from .gradients import Saliency, saliency
from .paths import IntegratedGradients, integrated_gradients
from .result import Attribution

__all__ = [
    # what comes out
    "Attribution",
    # gradients at the inputs
    "saliency",
    "Saliency",
    # gradients along a path
    "integrated_gradients",
    "IntegratedGradients",
]
