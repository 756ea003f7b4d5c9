"""`LogitAttribution` and `LogitLens` as measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy.shared import shared_anatomy
from ...errors import ArgumentError
from ...measurement import Context
from ...record import Panel, Reading, scalar
from ...target import Logit, LogitDifference, TargetOption, positions, select
from ...task import IGNORED
from .lens import Lens, lens_of
from .neurons import neurons_of
from .running import Passed, passed
from .writing import WriterAttribution, attributed, tokens_of

__all__ = ["LogitAttribution", "LogitLens"]


@dataclass(frozen=True)
class LogitAttribution:
    """What each part writes into the answer to the measured batch; see `logit_attribution`.

    Panels in logits, at the position that the target reads: ``heads`` over (layer, head) and
    ``writers`` over (writer), means over examples; ``by_example`` over (example, writer); for a
    chosen layer ``neurons`` over (neuron), each neuron of its MLP, mean over examples. Scalars:
    ``logit``, the mean of what they add up to, and ``gap``, the largest difference between the sum
    of the parts and the model's own logit, relative to the largest logit.

    Args:
        name: First part of the records' names.
        target: A `Logit` or a `LogitDifference`; None takes the true next token against the best
            of the others.
        neurons: A layer whose MLP is split into neurons as well.

    Raises:
        ArgumentError: If the target is not linear in the logits, or ``neurons`` no layer.

    Example:
        >>> from lightning_mi import LogitDifference
        >>> LogitAttribution(target=LogitDifference(3, other=5)).name
        'logit_attribution'
    """

    name: str = "logit_attribution"
    target: TargetOption = None
    neurons: int | None = None

    def __post_init__(self) -> None:
        """Check target and layer."""
        layer = self.neurons
        if layer is not None and (isinstance(layer, bool) or layer < 0):
            raise ArgumentError.of(
                "neurons", expected="a layer, counted from 0", got=repr(layer), do="Name one."
            )
        linear = self.target is None or type(self.target) in (Logit, LogitDifference, int)
        if not linear:
            raise ArgumentError.of(
                "target",
                expected="a Logit or a LogitDifference, which are sums over what was written",
                got=type(self.target).__name__,
                do="Probabilities are no such sum; choose LogitDifference().",
            )

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        with torch.no_grad():
            seen = _shared_pass(model, context)
            chosen = LogitDifference() if self.target is None else self.target
            target: Any = context.target(chosen)
            place = positions(seen.outputs, context.batch, target)
            answer, wrong = _asked(seen, context, target)
            shape = seen.outputs.shape[:2]
            real = torch.zeros(shape, dtype=torch.bool, device=place.device)
            real[torch.arange(len(place), device=place.device), place] = True
            others = None if wrong is None else wrong[:, None].expand(shape)
            split = self._split(model, seen, context)
            found = attributed(seen, answer[:, None].expand(shape), others, real, split)
        panels = _attribution_panels(found, answer, wrong, place, context)
        if found.neurons is not None:
            about = dict(panels["writers"].convention)
            about |= {
                "layer": self.neurons,
                "what": "what each neuron of the MLP adds, its bias apart",
            }
            rows = torch.arange(len(place), device=place.device)
            each = found.neurons[rows, place].mean(0)
            coords = {"neuron": range(len(each))}
            panels["neurons"] = Panel(each, ("neuron",), coords, "logits", about)
        return panels

    def _split(
        self, model: nn.Module, seen: Passed, context: Context
    ) -> tuple[int, Tensor, Tensor] | None:
        if self.neurons is None:
            return None
        return neurons_of(model, seen.anatomy, context.task, context.batch, self.neurons)


def _shared_pass(model: nn.Module, context: Context) -> Passed:
    def run() -> Passed:
        return passed(model, shared_anatomy(model, context), context.task, context.batch)

    return context.shared("circuits.readout.pass", run)


def _asked(seen: Passed, context: Context, target: Logit) -> tuple[Tensor, Tensor | None]:
    """Return the token that is asked about, and the one it is compared with, for each example."""
    logits, tokens = select(seen.outputs, context.batch, target)
    if not isinstance(target, LogitDifference):
        return tokens, None
    if target.other is None:
        rivals = logits.scatter(-1, tokens[:, None], float("-inf")).argmax(-1)
        return tokens, rivals
    other = torch.as_tensor(target.other, device=tokens.device)
    return tokens, other.expand(len(tokens)).long()


def _attribution_panels(
    found: WriterAttribution,
    answer: Tensor,
    wrong: Tensor | None,
    place: Tensor,
    context: Context,
) -> dict[str, Panel]:
    rows = torch.arange(len(place), device=place.device)
    each, heads = found.values[rows, place], found.heads[rows, place].mean(0)
    about: dict[str, Any] = {
        "what": "direct logit attribution; the parts of an example add up to its logit",
        "sign": "positive: raises the answer's logit" + ("" if wrong is None else " above wrong's"),
        "answer": context.texts(answer.tolist()),
        "position": place.tolist(),
        "gap": found.gap,
        "approximate": found.approximate,
    }
    if wrong is not None:
        about["wrong"] = context.texts(wrong.tolist())
    coords = {"layer": range(heads.shape[0]), "head": range(heads.shape[1])}
    quiet = {**about, "display": {}}
    shown = {**about, "modules": found.anatomy.modules, "display": {"ranks": 2, "picture": "map"}}
    logit = found.logit[rows, place].mean()
    return {
        "heads": Panel(heads, ("layer", "head"), coords, "logits", shown),
        "writers": Panel(each.mean(0), ("writer",), {"writer": found.labels}, "logits", quiet),
        "by_example": Panel(each, ("example", "writer"), {"writer": found.labels}, "logits", quiet),
        "logit": scalar(logit, "logits", **{**quiet, "display": {"scalar": "logit"}}),
        "gap": scalar(
            found.gap,
            what="largest |sum of parts - logit| over the largest |logit|",
            display={"scalar": "gap"},
        ),
    }


@dataclass(frozen=True)
class LogitLens:
    """What the model would answer if it stopped before each layer; see `logit_lens`.

    Panels over (layer), whose last entry is the model's own answer: ``entropy`` in nats, mean over
    tokens; ``rank`` of the true next token (0: the best) and its ``log_probability`` in nats, means
    over tokens with a known next one. Of the first example ``by_position`` over (layer, position):
    the log-probability of the true next token, with the best token in the labels. Scalar
    ``settled``: the mean entry of the layer axis from which on the best token is the final one.

    Args:
        name: First part of the records' names.

    Example:
        >>> LogitLens().name
        'logit_lens'
    """

    name: str = "logit_lens"

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels.
        """
        with torch.no_grad():
            seen = _shared_pass(model, context)
            answer = tokens_of(None, "answer", seen, context.task, context.batch)
            found = lens_of(seen, answer, context.task, context.batch)
            return _lens_panels(found, context)


WHAT = {
    "entropy": ("nats", "entropy of the next-token distribution, mean over tokens"),
    "rank": ("1", "number of tokens with a higher logit than the true next one"),
    "log_probability": ("nats", "log-probability of the true next token"),
}


def _lens_panels(found: Lens, context: Context) -> Reading:
    about = {
        "statistics": "the final norm with each layer's own",
        "layer": "the stream that enters the layer; the last is the final stream",
        "display": {},
    }
    known = found.real & (found.answer != IGNORED)
    panels = {}
    for name, (unit, what) in WHAT.items():
        where = found.real if name == "entropy" else known
        values: Tensor = getattr(found, name)[:, where].mean(1)
        reason = {} if bool(where.any()) else {"reason": "no next token is known"}
        coords = {"layer": found.labels}
        panels[name] = Panel(values, ("layer",), coords, unit, {**about, "what": what, **reason})
    same = (found.top[..., 0] == found.top[-1, ..., 0]).flip(0).int().cumprod(0).sum(0)
    settled = (len(found.labels) - same)[found.real].float().mean()
    panels["settled"] = scalar(
        settled,
        "layers",
        what="entry of the layer axis from which on the best token is the final one",
        layers=len(found.labels) - 1,
        display={"scalar": "settled"},
    )
    panels["by_position"] = _by_position(found, context, about)
    return panels


def _by_position(found: Lens, context: Context, about: dict[str, Any]) -> Panel:
    inputs = context.task.inputs(context.batch)
    best = [context.texts(row) for row in found.top[:, 0, :, 0].tolist()]
    coords = {
        "layer": found.labels,
        "position": context.texts(inputs[0].tolist()),
        "layer,position": best,
    }
    more = {"what": "log-probability of the true next token; labels: the best token", "example": 0}
    values = found.log_probability[:, 0]
    reason = {"reason": "no next token is known where NaN"} if bool(values.isnan().any()) else {}
    return Panel(values, ("layer", "position"), coords, "nats", {**about, **more, **reason})
