"""``lightning-mi influence``: which training examples did it, asked of saved checkpoints."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import ArgumentError
from .measurement import IndexedData
from .record import Record

if TYPE_CHECKING:
    from .runs import Run

__all__ = ["Influence", "parsed_query", "referred"]

FOLDERS = ("checkpoints", "scheduled_checkpoints", "../checkpoints", "../scheduled_checkpoints")
"""Where checkpoints of a run lie, beside its folder."""

REFERENCE = "file.py:name or package.module:name"


class Influence:
    """Score training examples at saved checkpoints of a run."""

    name = "influence"
    help = "score training examples for a query, at saved checkpoints of a run"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments.

        Args:
            parser: The subcommand's own parser.
        """
        add = parser.add_argument
        add("run", metavar="RUN", type=Path, help="run folder; the scores are written into it")
        add("--model", required=True, metavar="REF", help=f"the model, or makes it ({REFERENCE})")
        add("--train", required=True, metavar="REF", help="the training dataset, or makes it")
        add("--queries", metavar="REF", help="dataset of queries (default: the run's own batch)")
        add(
            "--query",
            default="loss",
            help="loss, logit, logit:3, log-probability:3, margin, or an entry of a measurement: "
            '"head_scores/induction[layer=1, head=0]" (also REF/panel[axis=entry])',
        )
        add("--solver", default="ekfac", help="ekfac (default), kfac, cg, exact, …")
        add("--curvature", default="gauss-newton", choices=("gauss-newton", "hessian"))
        add("--damping", type=float, default=0.01, help="added to the mean curvature (0.01)")
        add("--checkpoints", metavar="PATH", type=Path, nargs="+", help="files, or a folder")
        add("--all", action="store_true", help="every checkpoint; without it the last one alone")
        add("--candidates", type=int, metavar="N", help="training examples that are drawn (all)")
        add("--sample", type=int, metavar="N", help="examples that the curvature is taken over")
        add("--regularizer", metavar="REF", help="R(model) of the training objective")
        add("--tokenizer", metavar="REF", help="decodes token ids")
        add("--top", type=int, default=5, help="proponents and opponents that are shown (5)")
        add("--name", default="influence_function", help="of the records; one for each question")
        add("--report", action="store_true", help="write the HTML report afterwards")

    def run(self, given: argparse.Namespace) -> None:
        """Score, write into the run, and print the top examples.

        Args:
            given: The arguments.
        """
        from . import sweep
        from .checkpoints import step_of
        from .influence import InfluenceFunction
        from .runs import Run

        run = Run.open(given.run)
        batch, count = _asked(given.queries, run)
        measurement = InfluenceFunction(
            name=given.name,
            solver=given.solver,
            curvature=given.curvature,
            damping=given.damping,
            candidates=given.candidates,
            queries=count,
            query=parsed_query(given.query),
            regularizer=referred(given.regularizer, "--regularizer", call=False),
            sample=given.sample,
            top=given.top,
        )
        files = checkpoints_of(given.checkpoints, run.path, every=given.all)
        sweep(
            files,
            _model(given.model),
            measurement,
            batch=batch,
            run=run,
            dataset=_data(given.train, "--train"),
            decode=_decoder(given.tokenizer),
        )
        swept = run.records(measurement.name, source="sweep")
        sys.stdout.write("\n".join([*told(swept, max(map(step_of, files))), ""]))
        if given.report:
            from .report import write_report

            sys.stdout.write(f"{write_report(run)}\n")


def told(records: Sequence[Record], step: int) -> list[str]:
    """Return what a checkpoint's scores say, as lines of text.

    Args:
        records: Records of one measurement.
        step: Of the checkpoint; the run may hold later ones, scored before.

    Returns:
        The top examples of the first query, and what speaks against relying on them.
    """
    last = {r.what: r.panel for r in records if r.step == step}
    if "scores" not in last:
        return ["Nothing was scored."]
    facts = last["scores"].convention
    lines = [f"step {step}: {facts['query']}", f"  {facts['orientation']}"]
    for side in ("proponents", "opponents"):
        panel = last.get(side)
        if panel is None:
            continue
        lines.append(f"  {side}")
        words = panel.convention.get("texts") or panel.convention["descriptions"]
        copies = panel.convention.get("copies") or [[]] * len(words)
        rows = zip(panel.coords["train_example"], panel.values.tolist(), words, copies, strict=True)
        lines += [
            f"    {score:+.3g}  train[{i:,}]  {text[:70]!r}" + (f" and {len(c)} equal" if c else "")
            for i, score, text, c in rows
        ]
    norm = last.get("gradient_norm")
    if norm is not None:
        lines.append(
            f"  gradient norm of the objective {norm.item():.3g}, of the queries "
            f"{float(norm.convention['query_norm']):.3g} (scores assume that the first is 0)"
        )
    return lines


def parsed_query(text: str) -> Any:
    """Return the query that a text names.

    Args:
        text: ``loss``, ``margin``, ``logit:3``, …, or ``measurement/panel[axis=entry, …]``.

    Returns:
        A target, or a `Score`.

    Raises:
        ArgumentError: If it names none.

    Example:
        >>> parsed_query("logit:3")
        Logit(token=3, position=-1)
        >>> parsed_query("head_scores/induction[layer=1, head=0]")
        Score(head_scores/induction[layer=1, head=0])
    """
    from .target import Logit as _Logit
    from .target import LogitDifference, Loss, Margin, Probability
    from .target import LogProbability as _LogProbability

    kinds: dict[str, Callable[..., Any]] = {
        "logit": _Logit,
        "log-probability": _LogProbability,
        "probability": Probability,
        "margin": Margin,
        "logit-difference": LogitDifference,
    }
    if text == "loss":
        return Loss()
    entry = re.fullmatch(r"(?P<who>.+)/(?P<panel>\w+)(\[(?P<index>[^\]]*)\])?", text)
    if entry is not None:
        return _score(entry["who"], entry["panel"], entry["index"] or "")
    kind, _, token = text.partition(":")
    if kind in kinds and (not token or token.lstrip("-").isdigit()):
        return kinds[kind](int(token)) if token else kinds[kind]()
    raise ArgumentError.of(
        "--query",
        expected=f"loss, one of {sorted(kinds)} (with :token), or measurement/panel[axis=entry]",
        got=repr(text),
        do='For example --query "head_scores/induction[layer=1, head=0]".',
    )


def _score(who: str, panel: str, index: str) -> Any:
    from .influence import Score

    pairs = [part.split("=", 1) for part in index.split(",") if part.strip()]
    wrong = [p for p in pairs if len(p) != 2]
    if wrong:
        raise ArgumentError.of(
            "--query", expected="axis=entry", got=repr(wrong[0][0]), do="For example layer=1."
        )
    where = {k.strip(): _number(v.strip()) for k, v in pairs}
    return Score(_measurement(who), panel, **where)


def _number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _measurement(who: str) -> Any:
    from .circuits import HeadScores

    return HeadScores() if who == "head_scores" else referred(who, "--query")


def referred(reference: str | None, option: str, *, call: bool = True) -> Any:
    """Return what a reference names.

    Args:
        reference: ``file.py:name`` or ``package.module:name``; None gives None.
        option: Whose it is, for messages.
        call: Whether to call what is found, if it is a function or a class that takes nothing.

    Returns:
        The object, or what calling it returns.

    Raises:
        ArgumentError: If it cannot be found.
    """
    if reference is None:
        return None
    where, _, name = reference.rpartition(":")
    try:
        found: Any = _imported(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ArgumentError.of(
            option, expected=REFERENCE, got=f"{reference!r} ({error})", do="Check the name."
        ) from error
    made = isinstance(found, type) or (callable(found) and hasattr(found, "__code__"))
    return found() if call and made and _takes_nothing(found) else found


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _imported(where: str) -> Any:
    if not where.endswith(".py"):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(where)
    path = Path(where).resolve()
    name = f"lightning_mi_of_the_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"no file {where}")
    if (beside := str(path.parent)) not in sys.path:
        sys.path.insert(0, beside)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _model(reference: str) -> nn.Module:
    found = referred(reference, "--model")
    if not isinstance(found, nn.Module):
        raise ArgumentError.of(
            "--model",
            expected="an nn.Module, or a function that makes one",
            got=f"a {type(found).__name__}",
            do="Name a function without arguments that builds it as it was trained.",
        )
    return found


def _data(reference: str, option: str) -> IndexedData:
    from .influence.data import as_indexed

    return as_indexed(referred(reference, option), option)


def _asked(queries: str | None, run: Run) -> tuple[Any, int]:
    """Return the queries as one batch and their number; None takes the run's own batch."""
    from .batch import batch_size

    if queries is not None:
        data = _data(queries, "--queries")
        return data.batch(range(len(data))), len(data)
    kept = run.batch()
    return None, 1 if kept is None else batch_size(kept)


def _decoder(reference: str | None) -> Any:
    from . import pieces

    return None if reference is None else pieces.piecewise(referred(reference, "--tokenizer"))


def checkpoints_of(given: Sequence[Path] | None, run: Path, *, every: bool) -> list[Path]:
    """Return the checkpoints that are meant.

    Args:
        given: Files, or one folder; None looks beside the run.
        run: The run folder.
        every: All of them, rather than the last.

    Returns:
        Files.

    Raises:
        ArgumentError: If there is none.
    """
    from .checkpoints import find_checkpoints, step_of

    if given is not None:
        found = find_checkpoints(given[0] if len(given) == 1 else list(given))
    else:
        places = [run / name for name in FOLDERS]
        found = [p for place in places if place.is_dir() for p in find_or_none(place)]
    if not found:
        raise ArgumentError.of(
            "--checkpoints",
            expected="a folder with .ckpt files",
            got=f"none beside {str(run)!r}",
            do="ScheduledCheckpoint saves them during training.",
        )
    # What was saved by two callbacks at one step is scored once.
    each = {step_of(path): path for path in found}
    return [each[step] for step in sorted(each)] if every else [each[max(each)]]


def find_or_none(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, which may hold none.

    Args:
        folder: The folder.

    Returns:
        Files, in order.
    """
    from .checkpoints import find_checkpoints

    return find_checkpoints(folder) if any(folder.glob("*.ckpt")) else []
