"""What needs several states of the model: `Series`, a pure function of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .record import Record

__all__ = ["Series", "at_step", "named"]


@runtime_checkable
class Series(Protocol):
    """A pure function of records to records, the same during training and afterwards."""

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Return new records derived from the given ones.

        Args:
            records: Records of one run and one source.

        Returns:
            New records, each at the step of the newest record that it rests on.
        """


def named(records: Sequence[Record], name: str) -> list[Record]:
    """Return the records of one full name, in order of step.

    Args:
        records: Any records.
        name: For example ``"head_scores/induction"``.

    Returns:
        Those records, oldest first.
    """
    return sorted((r for r in records if r.name == name), key=lambda r: r.step)


def at_step(records: Sequence[Record], name: str, step: int) -> Record | None:
    """Return the record of one name at one step, or None.

    Args:
        records: Any records.
        name: Full name.
        step: The step.

    Returns:
        The last such record.
    """
    found = [r for r in records if r.name == name and r.step == step]
    return found[-1] if found else None
