"""Models with several inputs: which one is explained, and all of them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..inferring import infer_task
from ..target import TargetLike, as_target
from ..task import Task
from .result import Attribution

__all__ = ["InputOf", "each_input"]


class InputOf(Task):
    """A task of which another entry of the batch is the input that is explained.

    Outputs, labels and losses are those of the task inside; only what is attributed changes.

    Args:
        key: Key of a mapping, or index of a tuple.
        task: The task inside; None is a plain `Task`.

    Example:
        >>> import torch
        >>> InputOf("age").inputs({"image": torch.zeros(1, 4), "age": torch.ones(1, 1)})
        tensor([[1.]])
    """

    def __init__(self, key: str | int, task: Task | None = None) -> None:
        inside = task or Task()
        super().__init__(inside.module)
        self.key, self.inside = key, inside

    def inputs(self, batch: Any) -> Tensor:
        """Return the entry.

        Args:
            batch: A mapping or a sequence.

        Returns:
            Floats or ids, examples first.

        Raises:
            ArgumentError: If there is no such tensor.
        """
        try:
            found = batch[self.key]
        except (KeyError, IndexError, TypeError):
            keys = list(batch) if isinstance(batch, Mapping) else range(len(batch))
            raise ArgumentError.of(
                "key", expected=f"one of {list(keys)}", got=repr(self.key), do="Name an entry."
            ) from None
        if not isinstance(found, Tensor):
            raise ArgumentError.of(
                "key",
                expected="a tensor in the batch",
                got=f"{type(found).__name__} at {self.key!r}",
                do="Name one of its tensors.",
            )
        return found

    def with_inputs(self, batch: Any, inputs: Tensor) -> Any:
        """Return the batch with another tensor in the place of the entry.

        Args:
            batch: A mapping or a sequence.
            inputs: The tensor.

        Returns:
            A new batch.
        """
        if isinstance(batch, Mapping):
            return {**batch, self.key: inputs}
        entries = list(batch)
        entries[int(self.key)] = inputs
        return tuple(entries) if isinstance(batch, tuple) else entries

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model as the task inside does.

        Args:
            model: The user's model.
            batch: The user's batch.

        Returns:
            Outputs, examples first.
        """
        return self.inside.outputs(model, batch)

    def labels(self, batch: Any) -> Tensor | None:
        """Return the labels of the task inside.

        Args:
            batch: The user's batch.

        Returns:
            Labels, or None.
        """
        return self.inside.labels(batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of the task inside.

        Args:
            outputs: What `outputs` returned.
            batch: The batch it was computed from.

        Returns:
            Shape ``[example]``.
        """
        return self.inside.loss(outputs, batch)


def each_input(
    method: Callable[..., Attribution],
    model: nn.Module,
    batch: Any,
    target: TargetLike = None,
    *,
    keys: Sequence[str | int],
    task: Task | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str | int, Attribution]:
    """Attribute a target to several inputs of a model, each while the others keep their values.

    Of methods that take the gradient at the inputs this is the same as all at once: a gradient has
    one part for each input.

    Args:
        method: A function of this package, such as `saliency` or `occlusion`.
        model: The model; left exactly as it was.
        batch: The whole batch, a mapping or a tuple.
        target: As in `saliency`.
        keys: Which entries of the batch are explained: keys, or indices of a tuple.
        task: How the batch becomes outputs; None is inferred where the batch has labels.
        options: Further arguments of the method.

    Returns:
        For each key the scores of that input.

    Raises:
        ArgumentError: If there is no such entry, or an argument cannot be used.

    Example:
        >>> import torch
        >>> from lightning_mi.attribution import saliency
        >>> model = nn.Bilinear(2, 3, 4)
        >>> batch = {"input1": torch.ones(5, 2), "input2": torch.ones(5, 3)}
        >>> found = each_input(saliency, model, batch, 0, keys=["input1", "input2"])
        >>> found["input2"].values.shape
        torch.Size([5, 3])
    """
    inside = task or _inferred(model, batch)
    asked = as_target(target, inside)
    given = dict(options or {})
    return {key: method(model, batch, asked, task=InputOf(key, inside), **given) for key in keys}


def _inferred(model: nn.Module, batch: Any) -> Task:
    try:
        return infer_task(model, batch)
    except ArgumentError:  # Inputs without labels: the question is about the model's own answer.
        return Task()
