"""Which keys a dashboard shows: those that a run logged, or those of the standard monitors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ..errors import ArgumentError
from ..record import Record
from ..runs import Run
from .base import RUN_SECTION
from .grid import over_steps
from .keys import PICTURES, STEP, plan

__all__ = ["STANDARD", "Kind", "kinds_of", "logged"]

Kind = Literal["scalar", "media", "table"]
"""What a key holds: a number a step, a picture or a page, or a table."""

TABLE, REPORT = f"{RUN_SECTION}/table", f"{RUN_SECTION}/report"

CONCLUDED = "_final"
"""Ending of what is compared with the last record: only the run folder has it."""

STANDARD = (
    "mi/induction",
    "mi/prev_token",
    "mi/copy_gain",
    "mi/icl_score",
    "mi/agree_ig",
    "mi/agree_sal",
    "mi/overhead",
    "mi/nonfinite",
    "mi_head_scores/induction_1",
    "mi_head_scores/induction_2",
    "mi_head_scores/previous_token_1",
    "mi_head_scores/previous_token_2",
    "mi_head_scores/map",
    "mi_saliency/strip",
    "mi_saliency/image",
    "mi_saliency/bars",
    "mi_saliency/grid",
    "mi_saliency_drift/spearman",
    "mi_saliency_drift/jaccard",
    "mi_integrated_gradients/gap",
    "mi_integrated_gradients/strip",
    "mi_integrated_gradients/image",
    "mi_integrated_gradients/bars",
    "mi_integrated_gradients/grid",
    "mi_integrated_gradients_drift/spearman",
    "mi_integrated_gradients_drift/jaccard",
    "mi_influence/top",
    TABLE,
    REPORT,
)
"""What `HeadMonitor`, `SaliencyMonitor`, `IntegratedGradientsMonitor` and `InfluenceMonitor` log
together; of ``strip`` (tokens), ``image`` and ``bars`` a model has one."""


def logged(run: Run) -> dict[str, Kind]:
    """Return what Weights & Biases got of a run, and what it gets when the run ends.

    The mark of a resumed run, ``mi_run/resumed_at``, is no chart, and left out.

    Args:
        run: A run folder; where nothing was measured during training, what a sweep measured counts.

    Returns:
        Keys in the order of first appearance, each with its kind; without ``mi/step``.
    """
    everything = [r for r in run.records() if not r.what.endswith(CONCLUDED)]
    records = [r for r in everything if r.source == "live"] or everything
    found: dict[str, Kind] = {}
    for firing in _firings(records):
        planned = plan(firing)
        found.update(dict.fromkeys(planned.scalars, "scalar"))
        found.update((shown.key, "media") for shown in planned.pictures)
    found.update((shown.key, "media") for shown in over_steps(records))
    if records:
        found[TABLE] = "table"
    if run.report.exists():
        found[REPORT] = "media"
    found.pop(STEP, None)
    return found


def kinds_of(keys: Iterable[str]) -> dict[str, Kind]:
    """Tell what keys hold by their last part, as `lightning_mi.sinks.keys` names them.

    Args:
        keys: Keys of this package, each once or more; ``mi/step`` is passed over.

    Returns:
        Keys in order, each with its kind.

    Raises:
        ArgumentError: If a key is not one of this package.

    Example:
        >>> kinds_of(["mi/step", "mi/induction", "mi_head_scores/map", "mi_run/table"])
        {'mi/induction': 'scalar', 'mi_head_scores/map': 'media', 'mi_run/table': 'table'}
    """
    found: dict[str, Kind] = {}
    for key in keys:
        section, _, what = key.partition("/")
        if not what or not (section == "mi" or section.startswith("mi_")):
            raise ArgumentError.of(
                "keys",
                expected='keys such as "mi/induction" or "mi_head_scores/map"',
                got=repr(key),
                do="Pass keys of your own as beside=…",
            )
        media = key == REPORT or (section != "mi" and what in PICTURES.values())
        found[key] = "table" if key == TABLE else "media" if media else "scalar"
    found.pop(STEP, None)
    return found


def _firings(records: Iterable[Record]) -> Iterable[list[Record]]:
    """Part records by step and measurement: keys of a measurement do not depend on others."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.step, record.measurement), []).append(record)
    return groups.values()
