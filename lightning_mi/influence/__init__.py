"""Which training examples made the model do what it does.

`TracIn` measures during training, `InfluenceFunction` after it; `tracin` and `influence_scores`
are the functions under them. Positive is always a proponent: removing the example would raise the
query's loss.
"""

from __future__ import annotations

from . import evaluate
from .after_training import InfluenceFunction
from .direct import Direct
from .during_factors import TrainingFactors
from .during_measured import TrainingInfluence
from .during_ranking import RankingChange, ranking_change
from .factors import EKFAC, KFAC, KeptBases
from .krylov import Arnoldi, LiSSA
from .objective import Objective
from .own import relatif, self_influence
from .projected import TRAK, DataInf, LoGra
from .queries import Group, PerModule, PerToken, Question, RandomDirections, Score
from .result import InfluenceScores, TokenShares
from .scores import influence_scores
from .solvers import CG, Solution, Solver
from .source import source
from .trajectory import TracIn, tracin, tracin_sum
from .trajectory_rates import step_rates

__all__ = [
    # what training minimised
    "Objective",
    # during training
    "RankingChange",
    "TracIn",
    "TrainingFactors",
    "TrainingInfluence",
    "ranking_change",
    "source",
    "step_rates",
    "tracin",
    "tracin_sum",
    # after training
    "InfluenceFunction",
    "influence_scores",
    "relatif",
    "self_influence",
    # solving for the inverse curvature
    "Arnoldi",
    "CG",
    "DataInf",
    "Direct",
    "EKFAC",
    "KFAC",
    "KeptBases",
    "LiSSA",
    "LoGra",
    "TRAK",
    "Solution",
    "Solver",
    # questions beside the loss of an example
    "Group",
    "PerModule",
    "PerToken",
    "Question",
    "RandomDirections",
    "Score",
    # judging scores
    "evaluate",
    # results
    "InfluenceScores",
    "TokenShares",
]
