"""Interchange interventions at one place of a model: `Spot`, `Code`, `untrained_copy`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, ModelError
from ...task import Task

__all__ = ["Code", "Spot", "last_linear", "untrained_copy"]

ROWS = 256
"""Pictures in one pass."""

CUTOFF = 1e-3
"""Directions in which levels differ less than this, relative to the largest, carry nothing."""

FLOOR = 1e-3
"""Variance added to what counts leave unexplained, relative to all variance."""


@dataclass(eq=False)
class Spot:
    """One vector inside a model that can be read and replaced.

    Args:
        model: The module inside any wrapper, in evaluation mode.
        task: How it is called.
        module: Name of a module.
        end: ``"output"`` of it, or ``"input"``.
        position: Which of several positions; None where there is one vector for each example.
    """

    model: nn.Module
    task: Task
    module: str
    end: str = "output"
    position: int | None = None

    def read(self, pictures: Tensor) -> Tensor:
        """Return the vectors of some pictures.

        Args:
            pictures: ``[example, …]``.

        Returns:
            Shape ``[example, d]``, in double precision on the CPU.
        """
        kept: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            kept.append(self._vector(value).detach().double().cpu())
            return value

        self._run(pictures, lambda _: keep)
        return torch.cat(kept)

    def run(self, pictures: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the model's numbers, with other vectors in the place of its own.

        Args:
            pictures: ``[example, …]``.
            vectors: What is put there ``[example, d]``; None leaves them.

        Returns:
            Numbers ``[example]``: the largest of several outputs, or one output, rounded.
        """

        def put(rows: slice) -> Callable[[Tensor], Tensor]:
            def change(value: Tensor) -> Tensor:
                if vectors is None:
                    return value
                new = vectors[rows].to(value)
                if value.ndim == 2:
                    return new
                made = value.clone()
                made[:, self._at(value)] = new
                return made

            return change

        outputs = self._run(pictures, put)
        if outputs.ndim > 1 and outputs.shape[-1] > 1:
            return outputs.reshape(len(outputs), -1).argmax(-1)
        return outputs.reshape(len(outputs), -1)[:, 0].round().long()

    def _run(self, pictures: Tensor, make: Callable[[slice], Callable[[Tensor], Tensor]]) -> Tensor:
        home = next((p for p in self.model.parameters()), pictures)
        found = []
        module = self.model.get_submodule(self.module)
        with torch.no_grad():
            for start in range(0, len(pictures), ROWS):
                rows = slice(start, start + ROWS)
                batch = pictures[rows].to(device=home.device, dtype=home.dtype)
                labels = torch.zeros(len(batch), dtype=torch.long, device=home.device)
                with ExitStack() as stack:
                    stack.callback(self._hooked(module, make(rows)).remove)
                    outputs = self.task.outputs(self.model, (batch, labels))
                found.append(outputs.detach().float().cpu())
        return torch.cat(found)

    def _hooked(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
        def entering(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (change(args[0]), *args[1:])

        def leaving(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        if self.end == "input":
            return module.register_forward_pre_hook(entering)
        return module.register_forward_hook(leaving)

    def _vector(self, value: Tensor) -> Tensor:
        if value.ndim == 2:
            return value
        return value[:, self._at(value)]

    def _at(self, value: Tensor) -> int:
        if value.ndim != 3 or self.position is None:
            raise ModelError(
                f"{self.module}: expected one vector for each picture, got shape "
                f"{tuple(value.shape)}. Name a module after aggregation, or the position= that "
                "aggregates."
            )
        return self.position


@dataclass(frozen=True, eq=False)
class Code:
    """Where counts stand in a vector: h ≈ mean + Σ_l φ(c_l)·W_l, and how they are read off.

    Args:
        W: What each feature of each level adds ``[level, rank, d]``.
        R: What reads it ``[d, level, rank]``: R_l·W_l is the identity and R_l·W_m zero, as far as
            the levels can be told apart at all.
    """

    W: Tensor
    R: Tensor

    @classmethod
    def fitted(cls, vectors: Tensor, counts: Tensor, rank: int = 1) -> Code:
        """Find out where counts stand.

        W by least squares from the first ``rank`` powers of each count; R by generalised least
        squares, with what the counts leave unexplained as noise. In a model that only keeps the
        total all W_l are alike, R can tell no level from another, and an interchange of one moves
        the total by an equal part of the whole difference.

        Args:
            vectors: ``[example, d]``.
            counts: ``[example, level]``.
            rank: Dimensions for each level.

        Returns:
            The code.
        """
        h = vectors - vectors.mean(0)
        x = torch.cat([_powers(c, rank) for c in counts.double().unbind(1)], 1)
        W = torch.linalg.lstsq(x, h, driver="gelsd").solution
        rest = h - x @ W
        noise = rest.T @ rest / len(h)
        floor = FLOOR * h.square().mean().clamp(min=1e-30)
        values, basis = torch.linalg.eigh(noise)
        white = basis * (values.clamp(min=0) + floor).rsqrt() @ basis.T
        R = white @ torch.linalg.pinv(W @ white, rtol=CUTOFF)
        levels = counts.shape[1]
        return cls(W.reshape(levels, rank, -1), R.reshape(-1, levels, rank))

    @classmethod
    def drawn(cls, like: Code, generator: torch.Generator) -> Code:
        """Return random subspaces of the same form.

        Args:
            like: A code.
            generator: Of the draw.

        Returns:
            A code that reads and writes random orthonormal directions.
        """
        levels, rank, d = like.W.shape
        width = min(levels * rank, d)
        basis = torch.linalg.qr(torch.randn(d, width, generator=generator).double()).Q
        full = torch.zeros(d, levels * rank, dtype=torch.float64)
        full[:, :width] = basis
        return cls(full.T.reshape(levels, rank, d), full.reshape(d, levels, rank))

    def moved(self, base: Tensor, difference: Tensor, level: Tensor) -> Tensor:
        """Return vectors in which one level's part is changed.

        Args:
            base: ``[example, d]``.
            difference: What is added, of which only the level's part counts ``[example, d]``.
            level: Which ``[example]``.

        Returns:
            Shape ``[example, d]``.
        """
        read = torch.einsum("nd,dlr->nlr", difference, self.R)
        rows = torch.arange(len(base))
        return base + torch.einsum("nr,nrd->nd", read[rows, level], self.W[level])


def _powers(counts: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis of the first powers of a count, without the constant."""
    centred = counts - counts.mean()
    scaled = centred / centred.abs().max().clamp(min=1)
    powers = torch.stack([scaled**i for i in range(rank + 1)], 1)
    basis: Tensor = torch.linalg.qr(powers).Q
    return basis[:, 1:] * math.sqrt(len(counts))


def last_linear(model: nn.Module) -> str:
    """Return the name of the last linear map of a model.

    Args:
        model: Any module.

    Returns:
        Its name.

    Raises:
        ArgumentError: If there is none.
    """
    found: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ArgumentError.of(
            "site",
            expected="a module, since the model has no linear map before its outputs",
            got="None",
            do=f"Name one of {[n for n, _ in model.named_modules() if n][:8]}.",
        )
    return found[-1]


def untrained_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of a model that has learned nothing.

    Modules with a ``reset_parameters`` method are initialised anew; entries of other parameters are
    shuffled, which keeps their sizes.

    Args:
        model: Any module; it stays as it is.
        seed: Seed of initialisation and shuffles.

    Returns:
        The copy.
    """
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for p in module.parameters(recurse=False):
                order = torch.randperm(p.numel(), generator=generator).to(p.device)
                p.copy_(p.flatten()[order].reshape(p.shape))
    return made
