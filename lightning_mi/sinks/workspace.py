"""A ready dashboard for Weights & Biases: `build_workspace`.

W&B by itself makes a panel for each key, in alphabetical order, over its own row count. Here the
headlines come first, then a section for each measurement, all over ``mi/step`` and unsmoothed, and
at the end the report and the table of the run. Nothing is sent before ``save()`` is called.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, LightningMIError
from ..runs import Run
from .base import RUN_SECTION
from .keys import HEADLINES, NONFINITE, STEP
from .names import spelled
from .workspace_keys import STANDARD, Kind, kinds_of, logged

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Section, Workspace

__all__ = ["build_workspace"]

ORDER = ("head_scores", "saliency", "integrated_gradients", "influence")
"""Measurements whose sections come first; others follow as they appeared."""

DRIFT = "_drift"

TITLES = {
    "mi/induction": "Induction, best head",
    "mi/prev_token": "Previous token, best head",
    "mi/copy_gain": "Copy gain (nats)",
    "mi/icl_score": "In-context learning score (nats)",
    "mi/agree_sal": "Agreement of heads and saliency",
    "mi/agree_ig": "Agreement of heads and integrated gradients",
    "mi/overhead": "Share of training time",
    NONFINITE: "Undefined values",
}
"""Titles of headlines; others are named by their key."""

PARTS = {
    "map": "layers × heads",
    "top": "training examples",
}
"""How pictures are called in titles."""

INPUTS = ("strip", "image", "bars")
"""Pictures of one step's inputs; a model has one of them, so they share a panel."""

SUMMARY = ("induction_onset", "induction_final", "prev_token_onset", "prev_token_final")
"""What the table of runs shows where the summary is not known."""

WIDEST, TALLEST = 4, 2
"""Panels beside and below each other on one page of a section."""


def build_workspace(
    entity: str,
    project: str,
    *,
    run: Run | str | os.PathLike[str] | None = None,
    keys: Sequence[str] | None = None,
    beside: Sequence[str] = (),
    name: str = "lightning_mi",
) -> Workspace:
    """Build a dashboard of the keys of this package; ``.save()`` of the result uploads it.

    Sections: the headlines ``mi/…``; ``beside``, if any; one for each measurement, scalars before
    pictures; then report and table. Each key stands in one panel. Scalars are lines over
    ``mi/step`` (optimizer steps), in the units they were logged in. Saving makes a new view of the
    project, and changes none.

    Args:
        entity: User or team.
        project: Project of the entity.
        run: A run folder of this package, whose keys are shown. Without it and without ``keys``
            come the keys of the four standard monitors.
        keys: Shown instead of those of a run.
        beside: Scalars of your own, such as ``"train_loss"``, in a section below the headlines.
        name: Name of the view.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``, which can still be changed.

    Raises:
        LightningMIError: If the package ``wandb-workspaces`` is not installed.
        ArgumentError: If a name is empty or has a slash, if both ``run`` and ``keys`` are given, or
            if there is no key to show.
        RunError: If ``run`` is no run folder.
    """
    for argument, value in (("entity", entity), ("project", project)):
        _check_name(argument, value)
    if run is not None and keys is not None:
        raise ArgumentError.of(
            "keys", expected="None beside run", got=f"{len(keys)} keys", do="Pass one of them."
        )
    opened = run if run is None or isinstance(run, Run) else Run.open(run)
    kinds = kinds_of(STANDARD if keys is None else keys) if opened is None else logged(opened)
    if not kinds:
        raise ArgumentError.of(
            "keys" if opened is None else "run",
            expected="at least one key",
            got="none",
            do="Leave it out to show what the standard monitors log.",
        )
    _check_installed()
    from wandb_workspaces import workspaces as spaces

    summary = SUMMARY if opened is None else opened.info.get("summary", {})
    return spaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=_sections(kinds, beside),
        settings=spaces.WorkspaceSettings(x_axis=STEP, smoothing_type="none"),
        runset_settings=spaces.RunsetSettings(pinned_columns=[f"summary:{s}" for s in summary]),
    )


def _sections(kinds: Mapping[str, Kind], beside: Sequence[str]) -> list[Section]:
    by_section: dict[str, dict[str, Kind]] = {}
    for key, kind in kinds.items():
        by_section.setdefault(key.split("/")[0], {})[key] = kind
    headlines = _in_order(by_section.pop("mi", {}))
    ending = dict(sorted(by_section.pop(RUN_SECTION, {}).items()))
    made = [_section("Headlines", headlines, pinned=True)] if headlines else []
    if others := [key for key in beside if key not in kinds]:
        made.append(_section("Training", dict.fromkeys(others, "scalar")))
    for section in _ordered(by_section):
        made.append(_section(_title_of(section), by_section[section], drift=DRIFT in section))
    return [*made, _section("The run", ending)] if ending else made


def _in_order(headlines: Mapping[str, Kind]) -> dict[str, Kind]:
    """Put the known headlines in their order, those of others next, and the count last."""
    known = [f"mi/{headline}" for headline in HEADLINES.values()]
    others = [key for key in headlines if key not in (*known, NONFINITE)]
    ordered = [*known[:-1], *others, known[-1], NONFINITE]
    return {key: headlines[key] for key in ordered if key in headlines}


def _ordered(sections: Iterable[str]) -> list[str]:
    """Put measurements in order, each before its drift."""
    seen = [section.removeprefix("mi_") for section in sections]
    bases = dict.fromkeys([*ORDER, *(name.removesuffix(DRIFT) for name in seen)])
    wanted = [f"{base}{ending}" for base in bases for ending in ("", DRIFT)]
    return [f"mi_{name}" for name in wanted if name in seen]


def _section(
    name: str, kinds: Mapping[str, Kind], *, pinned: bool = False, drift: bool = False
) -> Section:
    from wandb_workspaces import workspaces as spaces

    panels: list[Any] = [_line(key) for key, kind in kinds.items() if kind == "scalar"]
    panels += [
        _media(group) for group in _shared(k for k, kind in kinds.items() if kind == "media")
    ]
    panels += [_table(key) for key, kind in kinds.items() if kind == "table"]
    columns = min(WIDEST, len(panels))
    rows = min(TALLEST, math.ceil(len(panels) / columns))
    return spaces.Section(
        name=name,
        panels=panels,
        is_open=not drift,
        pinned=pinned,
        layout_settings=spaces.SectionLayoutSettings(columns=columns, rows=rows),
        panel_settings=spaces.SectionPanelSettings(x_axis=STEP, smoothing_type="none"),
    )


def _shared(keys: Iterable[str]) -> list[list[str]]:
    """Group the keys that share a panel."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        section, _, what = key.partition("/")
        groups.setdefault(section if what in INPUTS else key, []).append(key)
    return list(groups.values())


def _line(key: str) -> LinePlot:
    from wandb_workspaces.reports.v2.interface import LinePlot

    return LinePlot(
        title=_title(key), x=STEP, y=[key], title_x="optimizer steps", smoothing_type="none"
    )


def _media(keys: Sequence[str]) -> MediaBrowser:
    from wandb_workspaces.reports.v2.interface import MediaBrowser

    return MediaBrowser(title=_title(keys[0]), media_keys=list(keys), num_columns=1)


def _table(key: str) -> WeavePanelSummaryTable:
    from wandb_workspaces.reports.v2.interface import WeavePanelSummaryTable

    return WeavePanelSummaryTable(table_name=key)


def _title(key: str) -> str:
    """Return the title of a panel.

    Example:
        >>> _title("mi_head_scores/induction_2"), _title("mi_saliency/grid"), _title("train_loss")
        ('Induction, rank 2', 'Saliency over steps', 'train_loss')
    """
    section, _, what = key.partition("/")
    if key in TITLES or not (section == "mi" or section.startswith("mi_")):
        return TITLES.get(key, key)
    ranked = re.fullmatch(r"(.+)_(\d+)", what)
    if ranked is not None:
        return f"{_capital(spelled(ranked[1]))}, rank {ranked[2]}"
    if section == "mi":
        return _capital(spelled(what))
    if section == RUN_SECTION:
        return _capital(what)
    whole = _title_of(section)
    if what in INPUTS:
        return f"{whole} of the inputs"
    return f"{whole} over steps" if what == "grid" else f"{whole}: {PARTS.get(what, spelled(what))}"


def _title_of(section: str) -> str:
    return _capital(spelled(section.removeprefix("mi_")))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _check_name(argument: str, value: str) -> None:
    if not value or "/" in value or value != value.strip():
        raise ArgumentError.of(
            argument,
            expected="a name without slashes",
            got=repr(value),
            do="It is the first or second part of https://wandb.ai/<entity>/<project>.",
        )


def _check_installed() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is about the package's own use of pydantic
            import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise LightningMIError(
            "build_workspace: expected the package wandb-workspaces to be installed, got an import "
            f"error ({error}). Run: pip install 'lightning-mi[workspace]'"
        ) from error
