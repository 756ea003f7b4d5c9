"""How values flow through a recorded forward pass: `Flow`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .norms import norm_of
from .parts import Norm
from .tape import ADDING, DIVIDING, SCALING, STORING, Call, ModuleCall, Tape, is_float

__all__ = ["Flow"]

COPYING = frozenset(
    {"to", "float", "double", "half", "bfloat16", "type", "type_as", "clone", "contiguous"}
) | {"reshape", "view", "transpose", "permute", "flatten", "unflatten", "dropout"}
"""Functions after which a value is still the same one, laid out or rounded in another way."""


@dataclass
class Flow:
    """What a tape says about which value is made from which.

    Values that are the same tensor in another layout or precision are seen as one: their root.

    Args:
        tape: The recorded pass.
        modules: The model's modules by name.
    """

    tape: Tape
    modules: dict[str, nn.Module]
    users: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    _roots: list[int] = field(default_factory=list)
    _norms: dict[int, tuple[Norm, int] | None] = field(default_factory=dict)
    _returned: dict[int, list[ModuleCall]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        """Find which values are the same, and who uses and returns them."""
        self._roots = list(range(len(self.tape.values)))
        for place, call in enumerate(self.tape.calls):
            same = self._passed_on(call)
            if same is not None:
                self._roots[call.outputs[0]] = self._roots[same]
                continue
            for value in {self.root(v) for v in call.inputs}:
                self.users[value].append(place)
        for module in self.tape.modules:
            for value in {self.root(v) for v in module.outputs}:
                self._returned[value].append(module)

    def root(self, value: int) -> int:
        """Return the value that this one is a copy or another view of."""
        return self._roots[value]

    def tensor(self, value: int) -> Tensor:
        """Return a value itself."""
        return self.tape.values[value].detach()

    def call(self, value: int) -> Call | None:
        """Return the function that made a root, or None for a parameter or an input."""
        place = self.tape.producer.get(value)
        return None if place is None else self.tape.calls[place]

    def place(self, value: int) -> int:
        """Return when a root was made: the number of its call, −1 for parameters and inputs."""
        return self.tape.producer.get(value, -1)

    def is_parameter(self, value: int) -> bool:
        """Say whether a value is a parameter of the model."""
        return value in self.tape.parameters

    def operands(self, value: int) -> list[tuple[int, float]]:
        """Return the terms of a sum of activations, or the one of a multiple, with their factors.

        A bias that is added is no term: it belongs to the product before it.

        Args:
            value: A root.

        Returns:
            Roots and factors; nothing for what is neither sum nor multiple.
        """
        call = self.call(value)
        if call is None or call.name not in ADDING | SCALING | DIVIDING:
            return []
        wide = [self.root(v) for v in call.inputs if self._is_like(v, value)]
        if call.name in ADDING:
            second = 1.0 if call.number is None else call.number
            return [(wide[0], 1.0), (wide[1], second)] if len(wide) == 2 else []
        if len(wide) == 1 and call.number is not None:
            return [(wide[0], call.number)]
        return []

    def is_sum(self, value: int) -> bool:
        """Say whether a root is a sum of two activations."""
        return len(self.operands(value)) == 2

    def before(self, value: int, stop: Iterable[int] = ()) -> Iterator[int]:
        """Yield the roots that a value was made from, not looking beyond some.

        Args:
            value: Where to start; not yielded unless in ``stop``.
            stop: Roots that are yielded, and behind which nothing is looked for.

        Yields:
            Roots.
        """
        ends, waiting, seen = set(stop), [self.root(value)], set()
        while waiting:
            here = waiting.pop()
            if here in seen:
                continue
            seen.add(here)
            yield here
            made = self.call(here)
            if here not in ends and made is not None:
                waiting.extend(self.root(v) for v in made.inputs)

    def norm(self, value: int) -> tuple[Norm, int] | None:
        """Return the norm that returned a value, and what that was given, or None.

        Args:
            value: A root.

        Returns:
            Norm and root of its input.
        """
        if value not in self._norms:
            self._norms[value] = self._find_norm(value)
        return self._norms[value]

    def norms_of(self, value: int) -> list[tuple[Norm, int]]:
        """Return the norms that were given a value, and what they returned.

        Args:
            value: A root.

        Returns:
            Norms and roots of their outputs, in order.
        """
        found = []
        for module in self.tape.modules:
            if module.inputs and len(module.outputs) == 1:
                given, made = self.root(module.inputs[0][1]), self.root(module.outputs[0])
                if given == value and made != value:
                    norm = self.norm(made)
                    if norm is not None and norm[1] == value:
                        found.append((norm[0], made))
        return list({made: (n, made) for n, made in found}.values())

    def module_returning(self, value: int, within: str = "") -> str | None:
        """Return the module that computes a value and returns it, the innermost if several do.

        Args:
            value: A root.
            within: Only modules inside this one.

        Returns:
            Its name, or None if no module returns it.
        """
        made, inside = self.place(value), f"{within}." if within else ""
        known = [m for m in self._returned[value] if m.name and m.name.startswith(inside)]
        computing = [m for m in known if m.start <= made < m.stop]
        chosen = computing or known
        return max(chosen, key=lambda m: m.start).name if chosen else None

    def outermost(self, value: int, without: int) -> str | None:
        """Return the outermost module that computes and returns a value, but not another one.

        Args:
            value: A root.
            without: A place on the tape that must lie outside the module.

        Returns:
            Its name, or None.
        """
        made = self.place(value)
        fit = [
            m
            for m in self._returned[value]
            if m.name and m.start <= made < m.stop and not m.start <= without < m.stop
        ]
        return min(fit, key=lambda m: m.start).name if fit else None

    def module_reading(self, value: int, until: int, without: int, made: set[int]) -> str | None:
        """Return the outermost module that makes something out of a value, its first input.

        Args:
            value: A root.
            until: A place on the tape inside or after the module.
            without: A place that must lie outside the module.
            made: Roots; the module returns one of them, or runs when ``until`` is reached.

        Returns:
            Its name, or None.
        """
        fit = [
            m
            for m in self.tape.modules
            if m.name
            and m.inputs
            and self.root(m.inputs[0][1]) == value
            and m.start <= until
            and not m.start <= without < m.stop
            and (until < m.stop or any(self.root(v) in made for v in m.outputs))
        ]
        return min(fit, key=lambda m: m.start).name if fit else None

    def _find_norm(self, value: int) -> tuple[Norm, int] | None:
        for module in self._returned[value]:
            own = self.modules.get(module.name)
            # A norm has gains and biases at most; it may be wrapped, as TransformerLens does.
            if own is None or len(module.inputs) != 1 or any(p.ndim > 1 for p in own.parameters()):
                continue
            number = module.inputs[0][1]
            given = self.root(number)
            if given == value or isinstance(own, nn.Linear | nn.Embedding | nn.Dropout):
                continue
            made = self.tape.values[module.outputs[0]]
            found = norm_of(own.forward, module.name, self.tensor(number), made)
            if found is not None:
                return found, given
        return None

    def _is_like(self, value: int, like: int) -> bool:
        """Say whether an operand has the axes of a result: it may be broadcast over some."""
        tensor, result = self.tape.values[value], self.tape.values[like]
        if not is_float(tensor) or tensor.ndim < 2 or result.ndim < 2:
            return False
        return tensor.shape[-1] == result.shape[-1] and tensor.shape[-2] == result.shape[-2]

    def _passed_on(self, call: Call) -> int | None:
        if len(call.outputs) != 1 or not call.inputs:
            return None
        first, made = call.inputs[0], self.tape.values[call.outputs[0]]
        given = self.tape.values[first]
        if given.is_nested or made.is_nested or given.numel() != made.numel():
            return None
        changed = (call.name.endswith("_") and not call.name.startswith("__")) or (
            call.name in STORING or call.name.startswith("__i")
        )
        if changed or not given.numel():
            return None
        viewed = _place(given) == _place(made) is not None and given.dtype == made.dtype
        return first if viewed or call.name in COPYING else None


def _place(tensor: Tensor) -> int | None:
    """Return where a tensor lies; None inside ``torch.vmap``, by which some models make masks."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None
