"""The residual stream of a recorded pass: a sum, and what its terms are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .flow import Flow
from .parts import Norm

__all__ = ["ResidualStream", "Term", "streams"]


@dataclass(frozen=True)
class Term:
    """One thing that is written.

    Args:
        value: Root of what is added, before ``norm``.
        factor: What it is multiplied by.
        norm: A norm between it and the stream.
        through: Norms that the stream passes afterwards, in order.
    """

    value: int
    factor: float = 1.0
    norm: Norm | None = None
    through: tuple[Norm, ...] = ()


@dataclass
class ResidualStream:
    """A residual stream.

    Args:
        flow: The recorded pass.
        sites: Attentions that write to it.
        sums: Its states, in order; the last is its end.
        base: What it starts with.
        passed: Norms that the whole stream passes, by the root that they return.
    """

    flow: Flow
    sites: list[int]
    sums: list[int]
    base: int
    passed: dict[int, Norm] = field(default_factory=dict)

    @property
    def states(self) -> set[int]:
        """All roots that are the stream itself."""
        return {*self.sums, self.base, *self.passed}

    def terms(self) -> list[Term]:
        """Return what is written, in the order in which it was made."""
        found = list(self._expanded(self.sums[-1], 1.0, ()))
        return sorted(found, key=lambda t: (self.flow.place(t.value), t.value))

    def _expanded(self, value: int, factor: float, through: tuple[Norm, ...]) -> Iterator[Term]:
        flow = self.flow
        if value in self.passed:
            given = flow.norm(value)
            if given is not None:
                yield from self._expanded(given[1], factor, (given[0], *through))
                return
        parts = flow.operands(value)
        if value in self.sums and parts:
            for part, times in parts:
                yield from self._expanded(part, factor * times, through)
            return
        is_first = self._is_first(value)
        if is_first:
            norm = flow.norm(value)
            if norm is not None:
                yield from self._expanded(norm[1], factor, (norm[0], *through))
                return
        splits = self._splits(value) if is_first else not self._is_own_work(value)
        if parts and splits and (len(parts) == 2 or self._is_returned(parts[0][0])):
            for part, times in parts:
                yield from self._expanded(part, factor * times, through)
            return
        norm = None if is_first else flow.norm(value)
        if norm is not None and norm[1] not in self.states:
            yield Term(norm[1], factor, norm[0], through)
            return
        yield Term(value, factor, None, through)

    def _is_first(self, value: int) -> bool:
        """Say whether a value was made before any attention wrote."""
        return self.flow.place(value) <= self.flow.place(self.base)

    def _is_own_work(self, value: int) -> bool:
        """Say whether a sum was made inside the part that writes it, and is no sum of parts."""
        inside = self.flow.outermost(value, self.flow.place(self._next(value)))
        return inside is not None

    def _next(self, value: int) -> int:
        later = [s for s in self.sums if self.flow.place(s) > self.flow.place(value)]
        return later[0] if later else self.sums[-1]

    def _is_returned(self, value: int) -> bool:
        return self.flow.module_returning(value) is not None

    def _splits(self, value: int) -> bool:
        """Say whether all terms of what the stream starts with are returned by modules."""
        # But for a table of the model's own, the same for all examples: positions.
        parts = [part for part, _ in self.flow.operands(value)]
        fixed = [part for part in parts if self._is_fixed(part, value)]
        return len(fixed) < len(parts) and all(
            self._is_returned(part) or (bool(self.flow.operands(part)) and self._splits(part))
            for part in parts
            if part not in fixed
        )

    def _is_fixed(self, part: int, value: int) -> bool:
        """Say whether a term is broadcast over examples, and no module returns it."""
        own, whole = self.flow.tensor(part).shape, self.flow.tensor(value).shape
        return not self._is_returned(part) and (len(own) < len(whole) or own[0] < whole[0])


def streams(flow: Flow) -> list[ResidualStream]:
    """Return the residual streams to which attentions write.

    Args:
        flow: The recorded pass.

    Returns:
        Streams, each with its attentions, in order of their beginning.
    """
    found: list[ResidualStream] = []
    for index, (_, place) in enumerate(flow.tape.sites):
        first = _first_sum(flow, place)
        if first is None:
            continue
        known = next((s for s in found if _leads_to(flow, first, s)), None)
        if known is None:
            known = _followed(flow, first, place)
            found.append(known)
        known.sites.append(index)
    return found


def _leads_to(flow: Flow, value: int, stream: ResidualStream) -> bool:
    """Say whether a sum is a state of a stream, or is added to one (parallel blocks)."""
    here: int | None = value
    for _ in range(3):
        if here is None or here in stream.sums:
            return here is not None
        here = _sum_of(flow, here)
    return False


def _first_sum(flow: Flow, place: int) -> int | None:
    """Return the first sum, beyond a bias, that what an attention computed flows into."""
    reached = {flow.root(v) for v in flow.tape.calls[place].outputs}
    for call in flow.tape.calls[place + 1 :]:
        if not reached.intersection(flow.root(v) for v in call.inputs):
            continue
        for value in call.outputs:
            root = flow.root(value)
            if root == value and flow.is_sum(root) and flow.tensor(root).ndim >= 2:
                return root
            reached.add(root)
    return None


def _followed(flow: Flow, first: int, site: int) -> ResidualStream:
    sums, passed = [first], {}
    here: int | None = first
    while here is not None:
        here, norm = _onwards(flow, here)
        if norm is not None:
            passed[norm[1]] = norm[0]
        if here is not None:
            sums.append(here)
    stream = ResidualStream(flow, [], sums, _base(flow, sums, site), passed)
    if passed:  # A post-norm model has a norm after the last sum, too.
        for last, made in flow.norms_of(sums[-1])[:1]:
            passed[made] = last
            stream.sums.append(made)
    return stream


def _onwards(flow: Flow, here: int) -> tuple[int | None, tuple[Norm, int] | None]:
    """Return the next state of the stream, and the norm that it passes on the way."""
    direct = _sum_of(flow, here)
    if direct is not None:
        return direct, None
    for norm, made in flow.norms_of(here):
        after = _sum_of(flow, made)
        if after is not None:
            return after, (norm, made)
    return None, None


def _sum_of(flow: Flow, value: int) -> int | None:
    for place in flow.users[value]:
        for made in flow.tape.calls[place].outputs:
            if made == flow.root(made) and flow.is_sum(made):
                return made
            terms = flow.operands(made)
            if len(terms) == 1 and flow.tape.calls[place].name != "softmax":
                after = _sum_of(flow, made)  # A multiple of the stream (a residual multiplier).
                if after is not None:
                    return after
    return None


def _base(flow: Flow, sums: list[int], site: int) -> int:
    """Return what the stream was before the first attention wrote to it."""
    value = sums[0]
    for _ in range(8):  # Parallel blocks add attention and MLP first: look into the second sum.
        older = [v for v, _ in flow.operands(value) if flow.place(v) < site]
        if older:
            return min(older, key=flow.place)
        following = [s for s in sums if flow.place(s) > flow.place(value)]
        if not following:
            break
        value = following[0]
    return sums[0]
