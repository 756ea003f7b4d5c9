"""What the stream starts with: token embedding, positions, patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import Pass
from .parts import WriterKind
from .stream import Term
from .tape import is_equal, is_float

__all__ = ["Beginning"]


class Beginning:
    """The terms that are written before any attention.

    Args:
        run: The recorded pass.
        terms: All terms of the main stream.
    """

    def __init__(self, run: Pass, terms: Sequence[Term]) -> None:
        self.run, self.flow = run, run.flow
        self.terms = [term for term in terms if self.holds(term)]
        self._ids = self._find_ids()

    def holds(self, term: Term) -> bool:
        """Say whether a term was written before any attention.

        Args:
            term: A term of the main stream.

        Returns:
            Whether it was.
        """
        main = self.run.main
        return main is not None and self.flow.place(term.value) <= self.flow.place(main.base)

    def kind(self, term: Term) -> WriterKind:
        """Return what such a term is.

        Args:
            term: One of ``terms``.

        Returns:
            ``"embed"`` for what depends on the inputs, ``"position"`` for what does not.
        """
        if self.flow.call(term.value) is None:
            return "position"
        found = self._looked_up(term)
        if found is None:  # Patches of an image, or positions that are cut out of a table.
            return "position" if self._ids else "embed"
        return "embed" if found[0] in self._ids else "position"

    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the tables of token and of position embeddings.

        Returns:
            W_E and W_pos, None where unknown.
        """
        W_E = W_pos = None
        for term in self.terms:
            found = self._looked_up(term)
            if found is None:
                W_pos = self._cut_out(term) if W_pos is None else W_pos
                continue
            rows, table = self.flow.tensor(found[0]), self.flow.tensor(found[1])
            table = table * found[2] if found[2] != 1.0 else table
            if self.kind(term) == "embed":
                W_E = table
            elif W_pos is None and _counts(rows):
                W_pos = table[int(rows.reshape(-1)[0]) :]
        return W_E, W_pos

    def _find_ids(self) -> set[int]:
        """Return the roots of the ids that the stream starts with."""
        own = self.flow.tape.find(self.run.task.inputs(self.run.batch))
        looked_up = [self._looked_up(term) for term in self.terms]
        rows = {found[0] for found in looked_up if found is not None}
        if own is not None and self.flow.root(own) in rows:
            return {self.flow.root(own)}
        # A decoder reads ids of its own: those of the batch that do not count positions.
        return {v for v in rows if self.flow.call(v) is None and not _counts(self.flow.tensor(v))}

    def _looked_up(self, term: Term) -> tuple[int, int, float] | None:
        """Return indices, table and factor, where a term is looked up in a table."""
        value, factor = term.value, term.factor
        for _ in range(4):
            call, parts = self.flow.call(value), self.flow.operands(value)
            if call is not None and call.name in ("embedding", "__getitem__"):
                given = [self.flow.root(v) for v in call.inputs[:2]]
                ids, table = min(given, key=self._is_table), max(given, key=self._is_table)
                return (ids, table, factor) if self._is_table(table) and ids != table else None
            if len(parts) != 1:
                return None
            value, factor = parts[0][0], factor * parts[0][1]
        return None

    def _is_table(self, value: int) -> bool:
        return self.flow.is_parameter(value) and self.flow.tensor(value).ndim == 2

    def _cut_out(self, term: Term) -> Tensor | None:
        """Return the table whose first rows a term is, where it is so."""
        written = self.flow.tensor(term.value)
        for value in self.flow.before(term.value):
            table = self.flow.tensor(value)
            # A parameter or a buffer, with an axis for examples or without.
            if self.flow.call(value) is not None or not is_float(table) or table.ndim > 3:
                continue
            table = table[0] if table.ndim == 3 and len(table) == 1 else table
            if table.ndim == 2 and table.shape[-1] == written.shape[-1]:
                rows = written.reshape(-1, *written.shape[-2:])[0]
                if len(rows) <= len(table) and is_equal(table[: len(rows)], rows, 1e-6):
                    return table
        return None


def _counts(rows: Tensor) -> bool:
    """Say whether indices are those of consecutive positions."""
    flat = rows.reshape(-1, rows.shape[-1])[0]
    steps = torch.arange(len(flat), device=flat.device)
    return len(flat) > 1 and bool((flat - flat[0] == steps).all())
