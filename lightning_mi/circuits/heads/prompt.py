"""Where heads look at the end of the shown prompt, and what the model answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import Site, tap
from ...batch import attention_mask_of
from ...behaviors import RepeatedTokens
from ...errors import ArgumentError
from ...measurement import Context
from ...nodes import Head
from ...record import Panel, Reading
from ...target import Logit, positions
from ...task import IGNORED, NextToken
from .scored import scored
from .survey import run_tokens

__all__ = ["PromptAttention"]


@dataclass(frozen=True)
class PromptAttention:
    """The attention of the top heads from the last token of a prompt, and the best answers.

    The prompt is the first example of the measured batch, up to the position that the default
    target reads. Panels: ``attention`` over (head, key_position), rows of the attention pattern
    from the prompt's last token; ``answers`` over (token), probabilities of the most likely next
    tokens. Text of tokens stands in the labels where the context can decode.

    Args:
        name: First part of the records' names.
        heads: Number of heads kept: those with the highest induction score, then those that look
            hardest at one position.
        answers: Number of answers kept.
        tokens: The protocol by which heads are ranked; the default shares that of `HeadScores`.
    """

    name: str = "prompt"
    heads: int = 24
    answers: int = 3
    tokens: RepeatedTokens | None = field(default_factory=RepeatedTokens)

    def __call__(self, model: nn.Module, context: Context) -> Reading:
        """Measure.

        Args:
            model: The user's model.
            context: Batch, task and shared results.

        Returns:
            Names to panels; none for a model that does not predict next tokens.
        """
        task = context.task
        if not isinstance(task, NextToken):
            return {}  # a classifier has heads to score, but no next token to look for
        induction = scored(model, context, self.tokens).main.scores["induction"].nanmean(0)
        ids, mask, truth = _prompt(model, context, task)
        rows: list[Tensor] = []

        def visit(index: int, site: Site) -> None:
            rows.append(_last_row(site))

        with torch.no_grad(), tap(model, visit=visit, keep=False):
            outputs = run_tokens(model, task, ids, mask)
        attention = _attention(rows, induction, self.heads, ids[0], context)
        return {"attention": attention, "answers": _answers(outputs, truth, self.answers, context)}


def _prompt(
    model: nn.Module, context: Context, task: NextToken
) -> tuple[Tensor, Tensor | None, int | None]:
    """Return the prompt's ids and mask, and the token that really follows it."""
    outputs = context.outputs(model)
    if outputs.ndim != 3:
        raise ArgumentError.of(
            "batch",
            expected="outputs [example, position, token]",
            got=f"outputs {tuple(outputs.shape)}",
            do="Leave PromptAttention out for this model.",
        )
    last = int(positions(outputs, context.batch, Logit(task=task))[0])
    label = int(task.labels(context.batch)[0, last])
    mask = attention_mask_of(context.batch)
    ids = task.inputs(context.batch)[:1, : last + 1]
    return ids, None if mask is None else mask[:1, : last + 1], None if label == IGNORED else label


def _last_row(site: Site) -> Tensor:
    last = site.q.shape[2] - 1
    return site.pattern(slice(0, 1), slice(last, last + 1))[0, :, 0]


def _attention(
    rows: list[Tensor], induction: Tensor, count: int, ids: Tensor, context: Context
) -> Panel:
    names = [Head(layer, head) for layer, row in enumerate(rows) for head in range(len(row))]
    scores = induction[[n.layer for n in names], [n.head for n in names]].nan_to_num(-1.0)
    values = torch.cat(rows)
    # The hardest look breaks ties between heads that score alike, as before training.
    order = sorted(range(len(names)), key=lambda i: (-float(scores[i]), -float(values[i].max())))
    kept = sorted(order[:count])
    coords = {"head": [str(names[i]) for i in kept], "key_position": context.texts(ids.tolist())}
    convention = {
        "from": "the last token of the prompt",
        "query_position": len(ids) - 1,
        "token_ids": ids.tolist(),
        "kept": f"{len(kept)} of {len(names)} heads, by induction score",
        "display": {},
    }
    return Panel(values[kept], ("head", "key_position"), coords, "1", convention)


def _answers(outputs: Tensor, truth: int | None, count: int, context: Context) -> Panel:
    probabilities = outputs[0, -1].float().softmax(-1)
    best = probabilities.topk(min(count, len(probabilities)))
    ids = best.indices.tolist()
    convention: dict[str, Any] = {"token_ids": ids, "display": {}}
    if truth is not None:
        convention |= {
            "target": context.texts([truth])[0],
            "target_id": truth,
            "target_probability": float(probabilities[truth]),
        }
    return Panel(best.values, ("token",), {"token": context.texts(ids)}, "1", convention)
