"""The records of a run by name, as the charts ask for them: `Shelf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..emergence import one_source
from ..record import Record
from ..runs import Run

__all__ = ["Shelf", "stack"]

Numbers = NDArray[np.float64]


class Shelf:
    """All records of a run, read once.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.all: list[Record] = run.records()
        self.info: dict[str, Any] = run.info
        self._by_name: dict[str, list[Record]] = {}
        self._drawn: set[str] = set()
        for record in self.all:
            self._by_name.setdefault(record.name, []).append(record)

    @property
    def names(self) -> list[str]:
        """Names of all records."""
        return list(self._by_name)

    def both(self, name: str) -> list[Record]:
        """Records of one name from training and from sweeps."""
        return self._by_name.get(name, [])

    def get(self, name: str, axes: Sequence[str] | None = None) -> list[Record]:
        """Return the records of one name, one for each step.

        Args:
            name: Full name.
            axes: The axes that they must have; None takes any.

        Returns:
            Records of training where there are any, else those of a sweep, by step; all with the
            shape of the last.
        """
        found = self.peek(name, axes)
        if found:
            self._drawn.add(name)
        return found

    def peek(self, name: str, axes: Sequence[str] | None = None) -> list[Record]:
        """Return the same as `get` for a look that draws nothing."""
        found = one_source(self.both(name))
        if axes is not None:
            found = [r for r in found if r.panel.axes == tuple(axes)]
        return [r for r in found if r.panel.values.shape == found[-1].panel.values.shape]

    def last(self, name: str, axes: Sequence[str] | None = None) -> Record | None:
        """Return the newest record of one name, or None."""
        found = self.get(name, axes)
        return found[-1] if found else None

    @property
    def undrawn(self) -> list[str]:
        """What no chart took anything of, and attributions not drawn: nothing is dropped silently.

        A check may have read the gap of an attribution whose values no chart can show.
        """
        drawn = {name.split("/")[0] for name in self._drawn}
        return [
            name
            for name in self.names
            if name.split("/")[0] not in drawn
            or (name.endswith("/values") and not self._has_drawn(name))
        ]

    def _has_drawn(self, name: str) -> bool:
        """Whether a chart took a record, or what it says of each of several inputs."""
        return any(other == name or other.startswith(f"{name}_") for other in self._drawn)

    @property
    def times(self) -> tuple[list[int], list[int | None]]:
        """Every measured step and the tokens seen by then."""
        tokens: dict[int, int | None] = {}
        for r in self.all:
            tokens[r.step] = r.tokens if r.tokens is not None else tokens.get(r.step)
        steps = sorted(tokens)
        return steps, [tokens[s] for s in steps]


def stack(records: Sequence[Record]) -> Numbers:
    """Return the values of several records of one shape, first axis: record."""
    return np.stack([np.asarray(r.panel.values, float) for r in records])
