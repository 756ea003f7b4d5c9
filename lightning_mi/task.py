"""What only the user knows: `Task` says how a batch becomes outputs and a loss for each example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .batch import (
    LABEL_KEYS,
    attention_mask_of,
    batch_size,
    input_key,
    labels_of,
    main_input,
    tree_map,
    with_main_input,
)
from .errors import ArgumentError, ModelError
from .isolation import untouched, unwrapped

__all__ = ["Classification", "NextToken", "Regression", "Task", "infer_task"]

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
        labels = self.required_labels(batch)
        if outputs.ndim == 1 or outputs.shape[-1] == 1:
            logit = outputs.reshape(len(outputs))
            target = labels.reshape(len(outputs)).to(logit.dtype)
            return F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        return F.cross_entropy(outputs, labels.reshape(len(outputs)).long(), reduction="none")


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


def run_model(network: nn.Module, batch: Any) -> Tensor:
    """Call a network as its own ``forward`` wants to be called, and return its output tensor.

    Labels are never passed, caches are switched off, and position ids are built for left-padded
    batches where the network takes them (their absence shifts every position without an error).

    Args:
        network: Any module.
        batch: Any batch.

    Returns:
        The logits of an output object, else its first floating-point tensor.

    Raises:
        ModelError: If the output holds no tensor.
    """
    names = _parameters(network)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if names == {"batch"}:
        return _tensor(network(batch))
    if isinstance(batch, Mapping):
        taken = {k: v for k, v in batch.items() if k in names and k not in LABEL_KEYS}
        if taken:
            return _tensor(network(**_with_positions(taken, names), **options))
        wants_whole = len(names) == 1 and input_key(batch) is None
        return _tensor(network(batch if wants_whole else main_input(batch), **options))
    if isinstance(batch, Sequence) and len(batch) > 2:
        return _tensor(network(*batch[:-1], **options))
    return _tensor(network(main_input(batch), **options))


def infer_task(model: nn.Module, batch: Any) -> Task:
    """Find the task from a batch and one forward pass.

    Integer ids and outputs ``[example, position, token]`` mean next token; integer labels, one
    for each example, mean classification; floating-point labels mean regression.

    Args:
        model: The user's model.
        batch: The user's batch, on the model's device.

    Returns:
        The task.

    Raises:
        ArgumentError: If what was seen fits none of them; the message names it.
        ModelError: If the model cannot be called.
    """
    module = _callable_module(unwrapped(model))
    inputs, labels = main_input(batch), labels_of(batch)
    with untouched(model) as plain, torch.no_grad(), _CheckedLookups():
        outputs, dropped = _first_outputs(plain, batch, module)
    if dropped or _fit_next_token(inputs, outputs):
        return NextToken(module, drop_last_input=dropped)
    if labels is not None and _fit_classes(outputs, labels, batch_size(batch)):
        return Classification(module)
    if labels is not None and labels.is_floating_point() and labels.numel() == outputs.numel():
        return Regression(module)
    seen = f"inputs {_shape(inputs)}, outputs {_shape(outputs)}, labels {_shape(labels)}"
    raise ArgumentError.of(
        "task",
        expected="ids and outputs [example, position, token], or labels that fit the outputs",
        got=seen,
        do="Pass task=Classification(), NextToken(), Regression() or your own Task.",
    )


def _fit_next_token(inputs: Tensor, outputs: Tensor) -> bool:
    is_ids = not inputs.is_floating_point() and inputs.ndim == 2
    return is_ids and outputs.ndim == 3 and outputs.shape[:2] == inputs.shape


def _fit_classes(outputs: Tensor, labels: Tensor, size: int) -> bool:
    if labels.is_floating_point() or labels.numel() != size or outputs.ndim > 2:
        return False
    classes = max(2, outputs.shape[1] if outputs.ndim == 2 else 1)
    return outputs.shape[0] == size and bool((labels < classes).all())


def _first_outputs(model: nn.Module, batch: Any, module: str | None) -> tuple[Tensor, bool]:
    # Any error of the user's code, an assert included, may say that a window is too long.
    try:
        return Task(module).outputs(model, batch), False
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shorter = _outputs_without_last(model, batch, module)
        if shorter is None:
            raise ModelError(_cannot_call(model, batch, error)) from error
        return shorter, True


def _outputs_without_last(model: nn.Module, batch: Any, module: str | None) -> Tensor | None:
    """Windows of one token more than the model reads are usual in language modelling."""
    ids = main_input(batch)
    if ids.is_floating_point() or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    try:
        outputs = NextToken(module, drop_last_input=True).outputs(model, batch)
    except Exception:
        return None
    return outputs if _fit_next_token(ids[:, :-1], outputs) else None


class _CheckedLookups(TorchFunctionMode):
    """Refuse ids beyond an embedding's end before the kernel does: on a GPU that ends the process.

    So a position too many can be tried, and answered, on any device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            ids, rows = named["input"], len(named["weight"])
            if ids.numel() and (int(ids.max()) >= rows or int(ids.min()) < 0):
                raise IndexError(f"index {int(ids.max())} in an embedding of {rows} rows")
        return func(*args, **kwargs)


def _cannot_call(model: nn.Module, batch: Any, error: Exception) -> str:
    return (
        f"task: expected {type(model).__name__} to run on a batch whose input is "
        f"{_shape(main_input(batch))}, got {type(error).__name__}: {error}. "
        "Pass a Task whose outputs(model, batch) calls the model."
    )


def _callable_module(model: nn.Module) -> str | None:
    """Return None where the model has a forward, else the name of its only network."""
    if _has_forward(model):
        return None
    found = _networks(model)
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"task: expected a model with a forward method, got {type(model).__name__} without one and "
        f"the submodules {found}. Pass for example task=Classification(module='net') with the name "
        "of the submodule that maps inputs to outputs."
    )


def _has_forward(model: nn.Module) -> bool:
    # nn.Module sets a function that raises; LightningModule's forward only calls that one.
    if "forward" in vars(model):
        return True
    forward = type(model).forward
    lightning = ("pytorch_lightning.core.module", "lightning.pytorch.core.module")
    return forward is not nn.Module.forward and forward.__module__ not in lightning


def _parameters(network: nn.Module) -> set[str]:
    try:
        found = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):
        return set()
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
        # forward(self, **inputs) hands everything on, to the only network there is.
        inner = _networks(network)
        return _parameters(network.get_submodule(inner[0])) if len(inner) == 1 else set(found)
    return set(found)


def _networks(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_children() if any(True for _ in m.parameters())]


def _with_positions(taken: dict[str, Any], names: set[str]) -> dict[str, Any]:
    mask = taken.get("attention_mask")
    if "position_ids" not in names or "position_ids" in taken or not isinstance(mask, Tensor):
        return taken
    if mask.ndim != 2 or bool(mask[:, 0].all()):
        return taken
    return {**taken, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    entries = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(output, Mapping) and "logits" in output:
        entries = [output["logits"], *entries]
    if isinstance(entries, Sequence):
        for entry in entries:
            if isinstance(entry, Tensor) and entry.is_floating_point():
                return entry
    raise ModelError(
        f"model: expected an output that is or holds a tensor, got {type(output).__name__}. "
        "Pass a Task whose outputs(model, batch) returns the tensor."
    )


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


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
