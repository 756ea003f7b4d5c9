"""The package ``lightning_mi.callbacks`` (``setup.cfg`` maps it here, to show the product first).

Add any of these to a Trainer of ``pytorch_lightning`` or of ``lightning.pytorch``.
"""

from __future__ import annotations

from .checkpoint import ScheduledCheckpoint
from .clamp import ClampHeads
from .head import HeadMonitor
from .influence import InfluenceMonitor
from .integrated_gradients import IntegratedGradientsMonitor
from .monitor import MeasurementMonitor
from .saliency import SaliencyMonitor
from .wandb_extras import WandbExtras

__all__ = [
    # any measurement, on a schedule
    "MeasurementMonitor",
    # which parts of the model
    "HeadMonitor",
    # which inputs
    "SaliencyMonitor",
    "IntegratedGradientsMonitor",
    # which training examples
    "InfluenceMonitor",
    # what a later sweep needs
    "ScheduledCheckpoint",
    # more for Weights & Biases than charts
    "WandbExtras",
    # an experiment: this one changes training
    "ClampHeads",
]
