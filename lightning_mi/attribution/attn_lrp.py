"""AttnLRP: layer-wise relevance propagation through transformers (Achtibat et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..errors import ArgumentError, ModelError, TapError
from ..isolation import unfused
from ..target import TargetLike
from ..task import Task
from .asking import asking, everything, recipe, slope
from .entry import Entry
from .lrp_mode import Rules
from .measured import Attributed
from .paths import relative_gap
from .question import Question, widened
from .result import Attribution, axes_of

__all__ = ["AttnLRP", "attn_lrp"]


def attn_lrp(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    epsilon: float = 0.0,
    tolerance: float = 0.01,
    task: Task | None = None,
) -> Attribution:
    """Return the relevance of each input: the target, handed back layer by layer.

    Each function is replaced, at the point where the model is, by an affine map that agrees with
    it there; the relevance of an input is R = x · ∂F/∂x through those maps:

    ================================  ==========================================================
    function                          rule
    ================================  ==========================================================
    linear layer, convolution         ε rule: R_i = Σ_j x_i w_ij R_j / (z_j + ε·sign z_j)
    product of two tensors            split evenly (query · key, pattern · value, gated MLP)
    softmax                           R_j = x_j (R_j − s_j Σ_k R_k), first-order Taylor series
    LayerNorm, RMSNorm, a / b         the scale, and b, held fixed
    GELU, SiLU, ReLU, tanh, x · σ(x)  R passes unchanged: f(x)/x held fixed
    sigmoid, exp, softplus, max       first-order Taylor series
    sum, reshape, index, …            the gradient itself
    ================================  ==========================================================

    Rules are applied to the functions of torch as the model calls them, so any architecture is
    served as it stands (grouped queries, fused or hand-written attention, ``nn.Transformer``), and
    a function without a rule is refused by name.

    Biases, position embeddings and the constant part of the Taylor series take up relevance that
    no input gets. How much is found by running the affine maps once at zero inputs, independently
    of the gradient. What is left, ``output_change``, the scores must add up to: by conservation
    Σ R = F − F₀. ``gap`` is what is missing, relative to it, as in `integrated_gradients`. Of a
    target that is not linear in the outputs (a log-probability, a loss), the relevance that is
    handed back is Σ outputs · ∂F/∂outputs.

    Args:
        model: The model; left exactly as it was, and measured in evaluation mode.
        inputs: Floats, ids, or a whole batch: ``(inputs, labels)``, a dictionary. Ids are
            attributed through their word embedding alone; position embeddings keep their value.
        target: As in `saliency`.
        epsilon: ε ≥ 0 of linear layers and matrix products, in units of their outputs; it damps
            what is handed through outputs near zero, and takes up relevance.
        tolerance: Largest |gap| that counts as converged.
        task: How the batch becomes outputs; None is inferred where it matters.

    Returns:
        Relevance in units of the target, shaped like the inputs; one for each token. Positive
        where an input raises the target. With ``gap``, ``delta``, ``output_change`` and
        ``converged`` for each example.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model calls a function that has no rule.
        TapError: If the model, run by the rules, gives other outputs than by itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
        >>> found = attn_lrp(model, torch.ones(4, 2), target=0)
        >>> bool(found.converged.all())
        True
    """
    _check(epsilon, tolerance)
    with asking(model, inputs, target, task, graph=False) as (entry, question):
        scores, start, change = _propagate(entry, question, epsilon)
        tokens = entry.is_tokens
        gap = relative_gap(scores, change, start)
        return Attribution(
            values=(scores.sum(-1) if tokens else scores).to(entry.point.dtype),
            method="attn_lrp",
            axes=axes_of(entry.inputs.shape, tokens=tokens, reduced=False),
            target=question(entry.outputs, everything(entry)).detach(),
            unit=question.unit,
            ids=entry.inputs if tokens else None,
            position=question.position,
            token=question.token,
            convention={
                "rule": "AttnLRP",
                "epsilon": epsilon,
                "tolerance": tolerance,
                "sign": "positive raises the target",
                "of": "word embedding" if tokens else "inputs",
                "adds_up_to": "output_change: the target less what biases and constants take up",
                **recipe(target, question),
            },
            gap=gap,
            delta=scores.flatten(1).sum(1) - change,
            output_change=change,
            converged=gap.abs() <= tolerance,
        )


@dataclass(frozen=True, eq=False)
class AttnLRP(Attributed):
    """`attn_lrp` of the first examples of the measured batch.

    Records ``attn_lrp/values`` (axes example, position for tokens; example, channel, y, x for
    images; example, feature for tables), in units of the target, positive where an input raises
    it, and for each example ``gap``, ``delta``, ``output_change``, ``converged`` and ``target``.

    Args:
        name: First part of the records' names.
        target: As in `attn_lrp`.
        examples: Number of examples, from the first; None takes the whole batch.
        of: Which entry of the batch is explained, where there are several inputs; None: the main.
        epsilon: ε of the ε rule.
        tolerance: Largest |gap| that counts as converged.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    name: str = "attn_lrp"
    epsilon: float = 0.0
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        super().__post_init__()
        _check(self.epsilon, self.tolerance)

    def compute(self, model: nn.Module, batch: Any, task: Task) -> Attribution:
        """Return the relevance.

        Args:
            model: The user's model.
            batch: The examples that are explained.
            task: Runs the model.

        Returns:
            The scores.
        """
        return attn_lrp(
            model,
            batch,
            self.target,
            epsilon=self.epsilon,
            tolerance=self.tolerance,
            task=task,
        )


def _propagate(entry: Entry, question: Question, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, the size of what is handed back, and what the scores should add up to."""
    rules, rows = Rules(epsilon), everything(entry)
    point, zero = entry.point.requires_grad_(), torch.zeros_like(entry.point)
    with unfused():
        with rules:
            outputs = entry.run(point, rows)
        _check_outputs(entry, outputs)
        if not outputs.requires_grad:  # By the rules, or because the model itself cuts gradients?
            slope(entry, question, question(entry.run(point, rows), rows), (point,))
        start, gradient = _gradients(question, outputs, point, rules)
        with rules.replaying():
            rest = entry.run(zero, rows)
    scores = widened(gradient) * widened(entry.point)
    handed, taken = (widened(o.detach()) * start for o in (outputs, rest))
    total = handed.flatten(1).sum(1)
    return scores, total.abs(), total - taken.flatten(1).sum(1)


def _gradients(
    question: Question, outputs: Tensor, point: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the target by the outputs, and by the inputs through the rules."""
    leaf = outputs.detach().requires_grad_()
    value = question(leaf, torch.arange(len(leaf), device=leaf.device))
    start = torch.zeros_like(leaf)
    if value.requires_grad:
        (start,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
    _refuse_custom(outputs)
    if not outputs.requires_grad:
        return widened(start), torch.zeros_like(point)
    return widened(start), rules.gradient(outputs, start, point)


def _refuse_custom(outputs: Tensor) -> None:
    """Refuse a gradient of the user's own, which the rules can neither see nor replace."""
    seen: set[Any] = set()
    left: list[Any] = [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            raise ModelError(
                "attn_lrp: expected functions of torch, got the torch.autograd.Function "
                f"{name!r}, for which there is no rule of relevance. Explain this model by "
                "integrated_gradients, which needs no rules."
            )
        seen.add(node)
        left += [following for following, _ in node.next_functions]


def _check_outputs(entry: Entry, outputs: Tensor) -> None:
    own, found = widened(entry.outputs), widened(outputs.detach())
    finite = own.isfinite()
    own, found = own[finite], found[finite]
    if own.shape[:1] == (0,):
        return
    rounding = 5e-2 if entry.outputs.element_size() < 4 else 1e-3
    worst, size = float((own - found).abs().max()), float(own.abs().max())
    if not worst <= rounding * size:
        raise TapError(
            "attn_lrp: expected the model, run by the rules, to give its own outputs, got a "
            f"difference of {worst:.3g} beside outputs up to {size:.3g}. Please report the model; "
            "integrated_gradients needs no rules."
        )


def _check(epsilon: float, tolerance: float) -> None:
    for name, value in (("epsilon", epsilon), ("tolerance", tolerance)):
        if not isinstance(value, int | float) or not value >= 0:
            raise ArgumentError.of(
                name,
                expected="a number that is not negative",
                got=repr(value),
                do="epsilon=0 hands everything back; tolerance=0.01 allows 1 %.",
            )
