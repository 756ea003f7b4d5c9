"""Something that a model does, as data: `Behavior`.

The prompts themselves come from `lightning_mi.behaviors`, or from the user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .batch import attention_mask_of, main_input, moved, tree_map
from .characteristic import Characteristic
from .errors import ArgumentError
from .target import LogitDifference, Target, TargetLike, as_target

__all__ = ["Behavior", "BehaviorLike", "Positions", "as_behavior"]

Positions: TypeAlias = int | Sequence[int]
"""One position for all examples, or one for each."""


@dataclass(eq=False)
class Behavior:
    """Something that the model does: clean prompts, corrupted ones, and the scalar that shows it.

    Args:
        clean: Batch on which the model does it.
        corrupted: Batch of the same shape on which it cannot. A row belongs to the same row of
            ``clean``.
        target: What is compared, always asked of the clean batch: a corrupted run is judged by the
            answers of the clean one. None takes ``answers`` against ``wrong`` where they are
            given (`LogitDifference`), else what `as_target` makes of None.
        name: How it is called in the report.
        positions: Positions of interest by name, each an int for all examples or one for each.
        answers: The right token or class, ``[example]``.
        wrong: What the corrupted prompt suggests in its place, ``[example]``.
        groups: Kind of each example (template, class), ``[example]``, for whoever wants to
            compare kinds; `select` and `split` keep it.
        texts: Clean and corrupted prompts as text, for people.
        margin: What is above zero where the model is right; None takes the answer's logit against
            ``wrong``, else against the best of all others.
        characteristics: What else should be true of whoever does it in the way that is claimed.

    Raises:
        ArgumentError: If clean and corrupted prompts cannot be compared position by position.

    Example:
        >>> clean, corrupted = torch.tensor([[1, 2, 1]]), torch.tensor([[3, 2, 1]])
        >>> one = Behavior(clean, corrupted, answers=torch.tensor([2]), wrong=torch.tensor([0]))
        >>> len(one), type(one.question).__name__
        (1, 'LogitDifference')
    """

    clean: Any
    corrupted: Any
    target: TargetLike = None
    name: str = "behavior"
    positions: Mapping[str, Positions] = field(default_factory=dict)
    answers: Tensor | None = None
    wrong: Tensor | None = None
    groups: Tensor | None = None
    texts: Sequence[tuple[str, str]] = ()
    margin: TargetLike = None
    characteristics: Sequence[Characteristic] = ()

    def __post_init__(self) -> None:
        """Check that the two batches can be compared position by position."""
        clean, corrupted = main_input(self.clean), main_input(self.corrupted)
        if clean.shape != corrupted.shape:
            raise ArgumentError.of(
                "corrupted",
                expected=f"the shape of the clean inputs, {tuple(clean.shape)}",
                got=tuple(corrupted.shape),
                do="Clean and corrupted prompts must have equal length.",
            )
        for name in ("answers", "wrong", "groups"):
            given = getattr(self, name)
            if given is not None and tuple(given.shape) != (len(clean),):
                raise ArgumentError.of(
                    name,
                    expected=f"one for each of the {len(clean)} examples",
                    got=f"shape {tuple(given.shape)}",
                    do="Pass a tensor as long as the batch.",
                )

    def __len__(self) -> int:
        """Return the number of pairs of prompts."""
        return len(main_input(self.clean))

    @property
    def question(self) -> Target:
        """The target, settled: what is asked of the outputs."""
        if self.target is None and self.answers is not None and self.wrong is not None:
            return LogitDifference(self.answers, other=self.wrong)
        if self.target is None and self.answers is not None:
            return as_target(self.answers)
        return as_target(self.target)

    def metric(self, outputs: Tensor) -> Tensor:
        """Return how much the model does it, from outputs on either batch.

        Args:
            outputs: The model's outputs, a row for each example.

        Returns:
            Shape ``[example]``.
        """
        return _asked(self.question, outputs, self.clean)

    def correct(self, outputs: Tensor) -> Tensor:
        """Return where the model is right, judged as `metric` judges: by the clean answers.

        Args:
            outputs: The model's outputs, a row for each example.

        Returns:
            Booleans ``[example]``. A tie is wrong.

        Raises:
            ArgumentError: If neither ``margin`` nor ``answers`` says what is right.
        """
        return _asked(self.rightness, outputs, self.clean) > 0

    @property
    def rightness(self) -> Target:
        """What is above zero where the model is right: the margin, or that of the answers.

        Raises:
            ArgumentError: If neither ``margin`` nor ``answers`` says what is right.
        """
        if self.margin is not None:
            return as_target(self.margin)
        if self.answers is None:
            raise ArgumentError.of(
                "margin",
                expected="a target that is above zero where the model is right, or answers",
                got="neither",
                do=f"Make {self.name!r} with answers=… or margin=….",
            )
        return LogitDifference(self.answers, other=self.wrong)

    def where(self, name: str) -> Tensor:
        """Return a position of interest for each example; −1 is the last that is not padding.

        Args:
            name: Its name.

        Returns:
            Long tensor ``[example]``, not negative.

        Raises:
            ArgumentError: If there is no such position.
        """
        if name not in self.positions:
            raise ArgumentError.of(
                "position",
                expected=f"one of {sorted(self.positions)}",
                got=repr(name),
                do=f"These are the positions that {self.name!r} names.",
            )
        inputs = main_input(self.clean)
        given = torch.as_tensor(self.positions[name]).expand(len(self)).long()
        mask = attention_mask_of(self.clean)
        length = torch.full_like(given, inputs.shape[1])
        if mask is not None:
            steps = torch.arange(mask.shape[1], device=mask.device)
            length = (torch.where(mask.bool(), steps, -1).amax(1) + 1).to(given)
        return torch.where(given < 0, given + length, given)

    def select(self, indices: Sequence[int] | Tensor) -> Behavior:
        """Return some of the pairs, in the order asked for.

        Args:
            indices: Which examples.

        Returns:
            A behavior of their number.
        """
        size, index = len(self), torch.as_tensor(indices, dtype=torch.long)

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == size:
                return value[index.to(value.device)]
            return value

        positions = {
            name: where if isinstance(where, int) else [int(where[i]) for i in index]
            for name, where in self.positions.items()
        }
        return dataclasses.replace(
            self,
            clean=tree_map(pick, self.clean),
            corrupted=tree_map(pick, self.corrupted),
            target=_picked(self.target, pick),
            margin=_picked(self.margin, pick),
            positions=positions,
            answers=pick(self.answers),
            wrong=pick(self.wrong),
            groups=pick(self.groups),
            texts=[self.texts[i] for i in index] if self.texts else (),
        )

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[Behavior, Behavior]:
        """Return two disjoint parts: to find a circuit on one, and to judge it on the other.

        Examples whose clean prompts are the same stay together, unless all of them are one prompt.

        Args:
            share: Share of the examples in the first part, as near as that allows.
            seed: Seed of the shuffle.

        Returns:
            Both parts, at least one example each.

        Raises:
            ArgumentError: If there are fewer than two examples, or the share leaves one part none.
        """
        if not 0 < share < 1:
            raise ArgumentError.of(
                "share", expected="a share above 0 and below 1", got=share, do="Pass share=0.5."
            )
        if len(self) < 2:
            raise ArgumentError.of(
                "behavior", expected="at least two examples", got=len(self), do="Make more prompts."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        wanted = min(max(1, round(share * len(self))), len(self) - 1)
        prompts = main_input(self.clean).reshape(len(self), -1).cpu()
        same = torch.unique(prompts, dim=0, return_inverse=True)[1][order]
        kinds = torch.tensor(list(dict.fromkeys(same.tolist())))
        if len(kinds) < 2:
            return self.select(order[:wanted]), self.select(order[wanted:])
        sizes = same.bincount()[kinds].cumsum(0)[:-1]
        first = torch.isin(same, kinds[: int((sizes - wanted).abs().argmin()) + 1])
        return self.select(order[first]), self.select(order[~first])

    def to(self, device: torch.device | str) -> Behavior:
        """Return it on a device.

        Args:
            device: Where.

        Returns:
            A new behavior.
        """
        place = torch.device(device)

        def move(value: Any) -> Any:
            return value.to(place) if isinstance(value, Tensor) else value

        return dataclasses.replace(
            self,
            clean=moved(self.clean, place),
            corrupted=moved(self.corrupted, place),
            target=_picked(self.target, move),
            margin=_picked(self.margin, move),
            answers=move(self.answers),
            wrong=move(self.wrong),
            groups=move(self.groups),
        )


@runtime_checkable
class MakesBehavior(Protocol):
    """A description out of which prompts are made: `lightning_mi.behaviors` is full of them."""

    def behavior(self) -> Behavior:
        """Return the prompts; the same description makes the same ones."""


BehaviorLike: TypeAlias = Behavior | MakesBehavior
"""What is accepted wherever a behavior is."""


def as_behavior(behavior: BehaviorLike) -> Behavior:
    """Return prompts, made if need be.

    Args:
        behavior: A `Behavior`, or a description with a method ``behavior()``.

    Returns:
        The behavior.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(behavior, Behavior):
        return behavior
    if isinstance(behavior, MakesBehavior) and not isinstance(behavior, type):
        return behavior.behavior()
    raise ArgumentError.of(
        "behavior",
        expected="a Behavior, or one of lightning_mi.behaviors",
        got=f"the class {behavior.__name__}" if isinstance(behavior, type) else repr(behavior)[:60],
        do="For example Behavior(clean, corrupted, answers=…, wrong=…).",
    )


def _asked(question: Target, outputs: Tensor, batch: Any) -> Tensor:
    """Ask a target whose tensors, and whose padding mask, may lie on another device."""
    place = outputs.device
    batch = moved(batch, place) if attention_mask_of(batch) is not None else batch
    here: Target = _picked(question, lambda v: v.to(place) if isinstance(v, Tensor) else v)
    return here(outputs, batch)


def _picked(target: Any, pick: Callable[[Any], Any]) -> Any:
    """Return a target whose tensors, one number an example each, are picked like the batch."""
    if isinstance(target, Tensor):
        return pick(target)
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        own = {f.name: getattr(target, f.name) for f in dataclasses.fields(target) if f.init}
        return dataclasses.replace(target, **{n: pick(v) for n, v in own.items()})
    return target
