"""What only the user knows: `Task` says how a batch becomes outputs and a loss for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import (
    attention_mask_of,
    labels_of,
    main_input,
    tree_map,
    with_main_input,
)
from .calling import run_model
from .errors import ArgumentError

__all__ = ["Classification", "NextToken", "Regression", "Task", "one_class_each"]

IGNORED = -100
"""Label of a position or example that has none (torch's own convention)."""


class Task:
    """Inputs from a batch, outputs from the model, an unreduced loss on outputs.

    Derive from it and override what differs; `Classification`, `NextToken` and `Regression` cover
    most cases.

    Args:
        module: Dotted name of the submodule that maps inputs to outputs, where the model itself
            has no ``forward`` (a LightningModule whose ``training_step`` calls ``self.net``).
    """

    # No dataclass: jsonargparse would then refuse subclasses of it in YAML.
    def __init__(self, module: str | None = None) -> None:
        self.module = module

    def __repr__(self) -> str:
        """Return the call that makes this task."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        """Tasks of one class with equal arguments are equal."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """Hash class and arguments."""
        return hash((type(self), *vars(self).items()))

    def inputs(self, batch: Any) -> Tensor:
        """Return the tensor that explanations are about.

        Args:
            batch: The user's batch.

        Returns:
            Float features or token ids, examples first.
        """
        return main_input(batch)

    def with_inputs(self, batch: Any, inputs: Tensor) -> Any:
        """Return the batch with other inputs in place of its own.

        Args:
            batch: The user's batch.
            inputs: The new inputs.

        Returns:
            A new batch.
        """
        return with_main_input(batch, inputs)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model.

        Args:
            model: The user's model.
            batch: The user's batch.

        Returns:
            Logits or predictions, examples first.
        """
        return run_model(self.network(model), batch)

    def network(self, model: nn.Module) -> nn.Module:
        """Return the module that is called: the model, or its submodule ``module``.

        Args:
            model: The user's model.

        Returns:
            The module.

        Raises:
            ArgumentError: If the model has no such submodule.
        """
        if self.module is None:
            return model
        try:
            return model.get_submodule(self.module)
        except AttributeError:
            raise ArgumentError.of(
                "module",
                expected=f"one of {[n for n, _ in model.named_children()]}",
                got=repr(self.module),
                do="Name the submodule that maps inputs to outputs.",
            ) from None

    def labels(self, batch: Any) -> Tensor | None:
        """Return what the outputs should have been, or None.

        Args:
            batch: The user's batch.

        Returns:
            Labels, examples first.
        """
        return labels_of(batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each example, not reduced over examples.

        Args:
            outputs: What `outputs` returned.
            batch: The batch it was computed from.

        Returns:
            Shape ``[example]``.

        Raises:
            NotImplementedError: In this base class, which knows no loss.
        """
        raise NotImplementedError("Derive from Task and define loss(outputs, batch) -> [example].")

    def required_labels(self, batch: Any) -> Tensor:
        """Return the labels, or say what is missing.

        Args:
            batch: The user's batch.

        Returns:
            Labels, examples first.

        Raises:
            ArgumentError: If the batch has none.
        """
        labels = self.labels(batch)
        if labels is None:
            raise ArgumentError.of(
                "batch",
                expected="labels beside the inputs",
                got="inputs alone",
                do="Pass (inputs, labels), or choose a target that needs no label.",
            )
        return labels


def one_class_each(labels: Tensor, count: int) -> Tensor:
    """Return the class of each example, or refuse labels that are no classes.

    Args:
        labels: One for each example, in any shape.
        count: Number of examples.

    Returns:
        Shape ``[example]``.

    Raises:
        ArgumentError: If there are more or fewer.
    """
    if labels.numel() != count:
        raise ArgumentError.of(
            "batch",
            expected=f"one class for each of the {count} examples as labels",
            got=f"labels of shape {tuple(labels.shape)}",
            do="For probabilities or several classes write a Task whose loss returns one number "
            "for each example.",
        )
    return labels.reshape(count)


class Classification(Task):
    """One class for each example; the loss is the cross-entropy in nats.

    Outputs ``[example, class]`` are logits (log-probabilities give the same loss); one output for
    each example is the logit of class 1 against class 0.
    """

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return −log p(label).

        Args:
            outputs: Logits ``[example, class]``, ``[example, 1]`` or ``[example]``.
            batch: The batch, with labels.

        Returns:
            Shape ``[example]``, nats.
        """
        labels = one_class_each(self.required_labels(batch), len(outputs))
        if outputs.ndim == 1 or outputs.shape[-1] == 1:
            logit = outputs.reshape(len(outputs))
            target = labels.to(logit.dtype)
            return F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        return F.cross_entropy(outputs, labels.long(), reduction="none")


class Regression(Task):
    """A number or vector for each example; the loss is the mean squared error over its entries."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return mean((output − label)²) over the entries of each example.

        Args:
            outputs: Shape ``[example, …]``.
            batch: The batch, with labels.

        Returns:
            Shape ``[example]``, squared units of the label.
        """
        labels = self.required_labels(batch).reshape(outputs.shape).to(outputs.dtype)
        return (outputs - labels).square().reshape(len(outputs), -1).mean(1)


class NextToken(Task):
    """The next token at every position; the loss of an example is the mean over its known tokens.

    Labels are aligned with the outputs: ``labels[b, t]`` is the token that position t should
    predict, −100 where none is known. They come from the ids themselves; from ``labels`` of a
    dictionary (Hugging Face's convention: not shifted); or from the last entry of a tuple or from
    ``y`` or ``targets`` of a dictionary (shifted already, unless it equals the ids).

    Args:
        module: As in `Task`.
        drop_last_input: The batch holds one token more than the model reads: the model sees all
            but the last, whose prediction is then known at every position.
    """

    def __init__(self, module: str | None = None, *, drop_last_input: bool = False) -> None:
        super().__init__(module)
        self.drop_last_input = drop_last_input

    def inputs(self, batch: Any) -> Tensor:
        """Return the ids that the model reads.

        Args:
            batch: The user's batch.

        Returns:
            Token ids ``[example, position]``.
        """
        ids = main_input(batch)
        return ids[:, :-1] if self.drop_last_input else ids

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model on the ids.

        Args:
            model: The user's model.
            batch: The user's batch.

        Returns:
            Logits ``[example, position, token]``.
        """
        if self.drop_last_input:
            batch = _without_last(batch, main_input(batch).shape)
        return run_model(self.network(model), batch)

    def with_inputs(self, batch: Any, inputs: Tensor) -> Any:
        """Return the batch with other ids in place of those the model reads.

        Args:
            batch: The user's batch.
            inputs: The new ids.

        Returns:
            A new batch; a last token that the model does not read stays as it is.
        """
        if self.drop_last_input:
            inputs = torch.cat([inputs, main_input(batch)[:, -1:]], 1)
        return with_main_input(batch, inputs)

    def labels(self, batch: Any) -> Tensor:
        """Return the token that every position should predict.

        Args:
            batch: The user's batch.

        Returns:
            Shape ``[example, position]``, −100 where none is known.
        """
        ids, given = main_input(batch), labels_of(batch)
        if given is None or given.shape != ids.shape:
            labels = _next(ids)
        elif _has_unshifted_key(batch) or _is_same(ids, given):
            labels = _next(given)
        else:
            labels = given
        labels = labels[:, :-1] if self.drop_last_input else labels
        return _without_pads(labels.long(), attention_mask_of(batch))

    def token_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return −log p(next token) at every position.

        Args:
            outputs: Logits ``[example, position, token]``.
            batch: The batch.

        Returns:
            Shape ``[example, position]``, nats, 0 where no label is known.
        """
        labels = self.labels(batch)
        return F.cross_entropy(
            outputs.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean of `token_losses` over the positions of each example that have a label.

        Args:
            outputs: Logits ``[example, position, token]``.
            batch: The batch.

        Returns:
            Shape ``[example]``, nats a token.
        """
        known = (self.labels(batch) != IGNORED).sum(1).clamp(min=1)
        return self.token_losses(outputs, batch).sum(1) / known


def _without_last(batch: Any, shape: torch.Size) -> Any:
    """Cut the last position off everything that has the shape of the ids, masks included."""
    return tree_map(lambda v: v[:, :-1] if isinstance(v, Tensor) and v.shape == shape else v, batch)


def _has_unshifted_key(batch: Any) -> bool:
    return isinstance(batch, Mapping) and batch.get("labels") is not None


def _next(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)


def _is_same(ids: Tensor, labels: Tensor) -> bool:
    known = labels != IGNORED
    return bool((ids[known] == labels[known]).all())


def _without_pads(labels: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return labels
    here = mask[:, : labels.shape[1]].bool()
    there = torch.cat([mask[:, 1:], mask[:, -1:]], 1)[:, : labels.shape[1]].bool()
    return labels.masked_fill(~(here & there), IGNORED)
