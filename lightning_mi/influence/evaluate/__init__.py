"""How far scores of influence can be believed.

By training again (`lds`, `leave_one_out`, `brittleness`), with a function ``retrain(indices, seed)
-> loss of each query`` of the user's, for example `FreshTrainer`; without (`mislabel_auc`,
`tail_patch`, `pbrf`). Each number comes with an interval and beside what chance or a cheap
baseline gives. Those that retrain nothing themselves are also measurements, for sweeps over
checkpoints: `LinearDatamodelingScore`, `MislabelDetection`, `TailPatching`.
"""

from __future__ import annotations

from .brittleness import Brittleness, brittleness
from .fresh import FreshTrainer, query_losses
from .lds import LDS, Subsets, lds, retrain_subsets
from .leave_one_out import Agreement, agreement, leave_one_out
from .measured import LinearDatamodelingScore, MislabelDetection, TailPatching
from .mislabel import Mislabeled, mislabel_auc
from .pbrf import pbrf
from .ranking import Estimate
from .retraining import Retrain, Retraining
from .tail_patch import TailPatch, tail_patch

__all__ = [
    # training again
    "FreshTrainer",
    "Retrain",
    "Retraining",
    "query_losses",
    # judging by it
    "lds",
    "retrain_subsets",
    "leave_one_out",
    "brittleness",
    # judging without
    "mislabel_auc",
    "tail_patch",
    "pbrf",
    "agreement",
    # as measurements
    "LinearDatamodelingScore",
    "MislabelDetection",
    "TailPatching",
    # what comes out
    "Agreement",
    "Brittleness",
    "Estimate",
    "LDS",
    "Mislabeled",
    "Subsets",
    "TailPatch",
]
