"""Modular addition, the task on which grokking was taken apart (Power et al. 2022; Nanda 2023)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..behavior import Behavior
from ..characteristic import Characteristic, Expectation
from ..errors import ArgumentError
from .metrics import Metric, metric_of

__all__ = ["ModularAddition"]


@dataclass(frozen=True)
class ModularAddition:
    """(a + b) mod p, over token ids: "a b =" or "a b".

    The corrupted prompt has another number in place of one of the two, so another answer.
    ``groups`` says which: 0 for a, 1 for b. Positions: ``a``, ``b``, ``last``.

    The batches are tuples (ids, answers): a classifier over p outputs takes them as they are.

    Args:
        modulus: p.
        pairs: Number of pairs of prompts.
        form: ``"a b ="`` for transformers, ``"a b"`` for networks that read two numbers.
        changed: Which number the corrupted prompt changes; ``"either"`` takes turns.
        swapped: Exchanges a and b in every prompt; nothing else.
        equals: Id of "=", None for p.
        metric: One of `metrics.METRICS`.
        seed: Seed of the draw.

    Raises:
        ArgumentError: If a number is out of range, or a choice has another name.

    Example:
        >>> made = ModularAddition(5, pairs=3).behavior()
        >>> bool((made.answers == made.clean[0][:, :2].sum(1) % 5).all()), made.clean[0][0, 2]
        (True, tensor(5))
    """

    modulus: int = 59
    pairs: int = 64
    form: Literal["a b =", "a b"] = "a b ="
    changed: Literal["a", "b", "either"] = "either"
    swapped: bool = False
    equals: int | None = None
    metric: Metric = "logit_difference"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        choices = {"form": ("a b =", "a b"), "changed": ("a", "b", "either")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError.of(
                    name, expected=f"one of {allowed}", got=repr(getattr(self, name)), do="Choose."
                )
        if self.modulus < 2:
            raise ArgumentError.of(
                "modulus", expected="at least 2", got=self.modulus, do="There must be two answers."
            )
        if not 1 <= self.pairs <= self.modulus**2:
            raise ArgumentError.of(
                "pairs",
                expected=f"1 to {self.modulus**2}, all sums of two numbers below {self.modulus}",
                got=self.pairs,
                do="Change it.",
            )

    def characteristics(self) -> tuple[Characteristic, ...]:
        """Return what is testable: a + b = b + a.

        Returns:
            ``commutativity``: accuracies of the two orders within .05.
        """
        return (
            Characteristic(
                "commutativity",
                "The order of the two numbers makes no difference.",
                {
                    "a + b": dataclasses.replace(self, swapped=False),
                    "b + a": dataclasses.replace(self, swapped=True),
                },
                (Expectation("a + b", "near", "b + a", 0.05),),
                paired=True,
            ),
        )

    def behavior(self) -> Behavior:
        """Return the prompts, each sum at most once.

        Returns:
            Clean and corrupted ids, with their answers.
        """
        clean, corrupted, groups = self._numbers()
        answers, wrong = clean.sum(1) % self.modulus, corrupted.sum(1) % self.modulus
        names = ("b", "a") if self.swapped else ("a", "b")
        return Behavior(
            (self._prompts(clean), answers),
            (self._prompts(corrupted), wrong),
            metric_of(self.metric, answers, wrong),
            name="modular_addition",
            positions={names[0]: 0, names[1]: 1, "last": 2 if self.form == "a b =" else 1},
            answers=answers,
            wrong=wrong,
            groups=groups,
            texts=[(self._text(c), self._text(o)) for c, o in zip(clean, corrupted, strict=True)],
            characteristics=self.characteristics(),
        )

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        p, generator = self.modulus, torch.Generator().manual_seed(self.seed)
        index = torch.randperm(p * p, generator=generator)[: self.pairs]
        clean = torch.stack([index // p, index % p], 1)
        turns = torch.arange(self.pairs) % 2
        groups = {"a": turns * 0, "b": turns * 0 + 1}.get(self.changed, turns)
        steps = torch.randint(1, p, (self.pairs,), generator=generator)
        corrupted = clean.clone()
        rows = torch.arange(self.pairs)
        corrupted[rows, groups] = (clean[rows, groups] + steps) % p
        return clean, corrupted, groups

    def _prompts(self, numbers: Tensor) -> Tensor:
        numbers = numbers.flip(1) if self.swapped else numbers
        if self.form == "a b":
            return numbers
        sign = self.modulus if self.equals is None else self.equals
        return torch.cat([numbers, torch.full_like(numbers[:, :1], sign)], 1)

    def _text(self, numbers: Tensor) -> str:
        first, second = (int(n) for n in (numbers.flip(0) if self.swapped else numbers))
        return f"{first} + {second} ="
