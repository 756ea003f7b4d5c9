"""One call of captum: its arguments, its random generators, its errors."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LightningMIError, ModelError
from .asking import everything
from .captum_methods import ONE_BY_ONE, Chosen, check_relu, feature_mask, ready, tunnel
from .captum_model import Asked, borrowed_weights, same_hooks
from .entry import Entry
from .joint import Joint
from .question import Question, widened

__all__ = ["run"]


def run(
    chosen: Chosen,
    entry: Entry,
    question: Question,
    module: tuple[str, nn.Module] | None,
    start: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """Let captum attribute.

    Args:
        chosen: The method.
        entry: The model and its inputs.
        question: The target.
        module: Name and module of the layer, where the method has one.
        start: The baseline, where the method takes one.
        seed: Of the random generators.

    Returns:
        captum's scores and, where they were asked for, its deltas.

    Raises:
        ModelError: If captum cannot do this with this model.
    """
    reason = check_relu(chosen, entry.model)
    if reason is not None:
        raise ModelError(f"captum's {chosen.name}: {reason}. Choose another method.")
    with same_hooks(entry.model), borrowed_weights(entry.model, if_needed=chosen.changes_weights):
        return _run(chosen, entry, question, module, start, seed)


def _run(
    chosen: Chosen,
    entry: Entry,
    question: Question,
    module: tuple[str, nn.Module] | None,
    start: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    asked = Asked(entry, question)
    point, rows = widened(entry.point), everything(entry)
    apart = chosen.name in ONE_BY_ONE
    if chosen.draws_baselines and start is not None:
        # Draws are for all examples alike; where padding makes baselines differ, one by one.
        apart = bool((start != start[:1]).any())
    pieces = rows.chunk(len(rows)) if apart else (rows,)
    found = []
    for piece in pieces:
        begin = None if start is None else start[piece]
        if begin is not None and chosen.draws_baselines:
            begin = torch.cat([begin[:1], begin[:1]])
        _seeded(seed, point)
        found.append(_call(chosen, asked, module, point[piece].clone(), piece, begin))
    deltas = [delta for _, delta in found if delta is not None]
    return torch.cat([scores for scores, _ in found]), torch.cat(deltas) if deltas else None


def _call(
    chosen: Chosen,
    asked: Asked,
    module: tuple[str, nn.Module] | None,
    point: Tensor,
    rows: Tensor,
    start: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    placed = {} if module is None else {"layer": module[1]}
    options = _options(chosen, asked.entry, point)
    if start is not None:
        options["baselines"] = start
    with warnings.catch_warnings():
        # captum says at every call that it sets hooks and takes them off again.
        warnings.simplefilter("ignore")
        try:
            method = chosen.cls(asked, **placed, **ready_all(chosen.made_with))
            if chosen.noise is not None:
                method = tunnel()(method)
                options.update(ready_all(chosen.noise))
            # A leaf that needs no gradient would be changed and warned about.
            leaf = point.requires_grad_(not chosen.perturbs)
            found = method.attribute(leaf, additional_forward_args=(rows,), **options)
        except LightningMIError:
            raise
        except Exception as error:
            raise ModelError(_refusal(chosen, error)) from error
    scores, delta = found if _with_delta(chosen, found) else (found, None)
    if isinstance(scores, tuple) and len(scores) == 1:
        scores = scores[0]
    if not isinstance(scores, Tensor):
        raise ModelError(
            f"captum's {chosen.name}: expected one tensor of scores, got {len(scores)}. Choose a "
            "layer that puts out one tensor."
        )
    if not scores.numel():
        raise ModelError(
            f"captum's {chosen.name}: expected scores, got none: it cannot spread what the layer "
            f"puts out over inputs of shape {tuple(point.shape)}. Choose a layer of the inputs' "
            "form, or another method."
        )
    if delta is not None:
        delta = delta.detach().reshape(len(rows), -1).mean(1)
    return scores.detach(), delta


def _options(chosen: Chosen, entry: Entry, point: Tensor) -> dict[str, Any]:
    options = ready_all(chosen.called_with)
    tokens = entry.is_tokens
    if "feature_mask" in chosen.takes and not chosen.name.startswith(("Layer", "Neuron")):
        given = chosen.called_with.get("feature_mask")
        if isinstance(entry, Joint) and given is None:
            given = entry.features()
        mask = feature_mask(given, point, tokens=tokens)
        if mask is not None:
            options["feature_mask"] = mask
    if chosen.name == "Occlusion" and tokens:
        sides = options.get("sliding_window_shapes", (1,))
        sides = (sides,) if isinstance(sides, int) else sides
        options["sliding_window_shapes"] = (*sides, point.shape[-1])
        strides = options.get("strides", 1)
        strides = (strides,) if isinstance(strides, int) else strides
        options["strides"] = (*strides, point.shape[-1])
    return options


def ready_all(options: Any) -> dict[str, Any]:
    """Return options as captum wants them.

    Args:
        options: By name.

    Returns:
        A new dict.
    """
    return {key: ready(value) for key, value in options.items()}


def _with_delta(chosen: Chosen, found: Any) -> bool:
    asked = bool(chosen.called_with.get("return_convergence_delta"))
    return asked and isinstance(found, tuple) and len(found) == 2


def _seeded(seed: int, like: Tensor) -> None:
    # `untouched` puts all of these back.
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if like.is_cuda:
        torch.cuda.default_generators[like.device.index or 0].manual_seed(seed)


def _refusal(chosen: Chosen, error: Exception) -> str:
    hint = "Choose another method, or one of this package's own."
    if chosen.name.endswith("LRP"):
        hint = "captum's LRP has rules for nn.Linear, convolutions, pooling and ReLU-like modules."
    elif "DeepLift" in chosen.name:
        hint = "captum's DeepLift needs each activation to be a module that is used once."
    return (
        f"captum's {chosen.name}: expected it to run on this model, got "
        f"{type(error).__name__}: {error}. {hint}"
    )
