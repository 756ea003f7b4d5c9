"""Models with several inputs: which are explained, one after the other or all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..inferring import task_or_plain
from ..target import TargetLike, as_target
from ..task import Task
from .result import Attribution

__all__ = ["InputOf", "InputsOf", "Wrapped", "each_input", "together"]


class Wrapped(Task):
    """A task whose outputs, labels and losses are those of a task inside.

    Args:
        task: The task inside; None is a plain `Task`.
    """

    def __init__(self, task: Task | None = None) -> None:
        inside = task or Task()
        super().__init__(inside.module)
        self.inside = inside

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


class InputOf(Wrapped):
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
        super().__init__(task)
        self.key = key

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


class InputsOf(Wrapped):
    """A task of which several entries of the batch are explained together.

    The methods that `together` names take it: their paths move all of these inputs at once.

    Args:
        keys: Keys of a mapping, or indices of a tuple.
        task: The task inside; None is a plain `Task`.

    Raises:
        ArgumentError: If there are fewer than two keys, or one comes twice.

    Example:
        >>> import torch
        >>> batch = {"image": torch.zeros(1, 4), "age": torch.ones(1, 1)}
        >>> InputsOf(["image", "age"]).each(batch)["age"]
        tensor([[1.]])
    """

    def __init__(self, keys: Sequence[str | int], task: Task | None = None) -> None:
        super().__init__(task)
        if isinstance(keys, str) or len(keys) < 2 or len(set(keys)) < len(keys):
            raise ArgumentError.of(
                "keys",
                expected="at least two different keys",
                got=repr(keys),
                do="InputOf(key) explains a single input.",
            )
        self.keys = list(keys)

    def __hash__(self) -> int:
        """Hash keys and task."""
        return hash((type(self), tuple(self.keys), self.inside))

    def of(self, key: str | int) -> InputOf:
        """Return the task that explains one of the inputs.

        Args:
            key: One of the keys.

        Returns:
            The task.
        """
        return InputOf(key, self.inside)

    def each(self, batch: Any) -> dict[str | int, Tensor]:
        """Return the inputs.

        Args:
            batch: A mapping or a sequence.

        Returns:
            For each key floats or ids, examples first.
        """
        return {key: self.of(key).inputs(batch) for key in self.keys}


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
    one part for each input. Methods that follow a path differ: see `together`.

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
    inside = task or task_or_plain(model, batch)
    asked = as_target(target, inside)
    given = dict(options or {})
    return {key: method(model, batch, asked, task=InputOf(key, inside), **given) for key in keys}


def together(
    method: Callable[..., Attribution],
    model: nn.Module,
    batch: Any,
    target: TargetLike = None,
    *,
    keys: Sequence[str | int],
    task: Task | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str | int, Attribution]:
    """Attribute a target to several inputs that all move at once, floats and ids alike.

    On one path from all baselines to all inputs the scores of all inputs *together* add up to
    F(x) − F(x′), where no input is at its own value in x′. One by one (`each_input`) each input's
    scores add up to what that input does while the others stay, and effects of inputs on each
    other are counted several times or not at all: of F = a · b, from 0, the path gives a and b half
    of it each, one by one each gets all of it.

    The methods: `integrated_gradients`, `expected_gradients`, `idgi`, `input_x_gradient` (the same
    as one by one) and `captum_attribution` with a method whose scores are of the inputs.

    Args:
        method: One of these functions.
        model: The model; left exactly as it was.
        batch: The whole batch, a mapping or a tuple.
        target: As in `integrated_gradients`.
        keys: Which entries of the batch are explained: keys, or indices of a tuple.
        task: How the batch becomes outputs; None is inferred where the batch has labels.
        options: Further arguments of the method. ``baseline``, ``keep`` and ``references`` are
            mappings from keys to what the method takes for one input.

    Returns:
        For each key the scores of that input. What tells how well they add up (``gap``, ``delta``,
        ``output_change``, ``steps``, ``converged``) is that of all inputs together, in each.

    Raises:
        ArgumentError: If the method explains one input only, there is no such entry, or an
            argument cannot be used.

    Example:
        >>> import torch
        >>> from lightning_mi.attribution import integrated_gradients
        >>> model = nn.Bilinear(1, 1, 1, bias=False)
        >>> batch = {"input1": torch.ones(1, 1), "input2": torch.ones(1, 1)}
        >>> found = together(integrated_gradients, model, batch, 0, keys=["input1", "input2"])
        >>> total = found["input1"].values + found["input2"].values
        >>> torch.allclose(total, model(**batch)), torch.equal(*(f.values for f in found.values()))
        (True, True)
    """
    joined = InputsOf(keys, task or task_or_plain(model, batch))
    found = method(model, batch, target, task=joined, **dict(options or {}))
    if not found.parts:
        raise ArgumentError.of(
            "method",
            expected="scores of the inputs",
            got=f"{found.method}, whose scores are of a layer",
            do="Call it with task=InputsOf(keys): so all inputs move, and the layer is explained.",
        )
    return dict(found.parts)
