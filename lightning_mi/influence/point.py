"""A model at one state, seen as a function of its trainable parameters: `Point`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError

__all__ = ["Point", "at_least_single", "math_attention", "repeatable_attention", "wide"]

T = TypeVar("T")


class Point:
    """The trainable parameters θ of a model, and the model as a function of them.

    The model is never changed. A parameter that several modules share counts once.

    Args:
        model: The user's model, inside `untouched`.
        dtype: Compute in this type, on a copy of the parameters; None keeps the model's own.

    Raises:
        ModelError: If no parameter is trainable.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model = model
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not own:
            raise ModelError(
                f"model: expected trainable parameters, got {type(model).__name__} with none. "
                "Influence is a derivative in them: call model.requires_grad_(True) on a copy."
            )
        first = next(iter(own.values()))
        self.device = first.device
        self.dtype = dtype or first.dtype
        self.copied = dtype is not None and any(t.dtype != dtype for t in _floats(model).values())
        self.parameters: dict[str, Tensor] = dict(own)
        self._fixed: dict[str, Tensor] = {}
        # How the layers lay out the examples of a batch, found by whoever reads outputs first.
        self.plans: list[Any] = []
        if self.copied:
            cast = {n: t.detach().to(dtype) for n, t in _floats(model).items()}
            self.parameters = {n: cast[n].requires_grad_() for n in own}
            self._fixed = {n: t for n, t in cast.items() if n not in own}

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters in the order of ``named_parameters()``."""
        return list(self.parameters.values())

    @property
    def size(self) -> int:
        """P, the number of trainable numbers."""
        return sum(p.numel() for p in self.leaves)

    def moved(self, step: Tensor) -> Point:
        """Return the same model at other weights, of which it knows nothing itself.

        Args:
            step: A vector ``[P]`` that is added to the parameters.

        Returns:
            A point at θ + step.
        """
        found = copy.copy(self)
        pairs = zip(self.parameters.items(), self.shaped(step), strict=True)
        found.parameters = {n: (p.detach() + s).requires_grad_() for (n, p), s in pairs}
        found.copied = True
        return found

    def call(self, function: Callable[[nn.Module], T]) -> T:
        """Return ``function(model)`` at these parameters.

        Args:
            function: Runs the model.

        Returns:
            What the function returns.
        """
        if not self.copied:
            return function(self.model)
        swapped = {f"model.{n}": t for n, t in {**self._fixed, **self.parameters}.items()}
        result: T = functional_call(_Caller(self.model, function), swapped, ())
        return result

    def gradient(self, value: Tensor, **options: Any) -> list[Tensor]:
        """Return the gradient of a scalar (or of ``value · grad_outputs``) for every parameter.

        Args:
            value: Computed by `call`.
            **options: Passed on to `torch.autograd.grad`.

        Returns:
            One tensor for each parameter, zeros where the value does not depend on it.
        """
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in self.leaves]
        found = torch.autograd.grad(value, self.leaves, allow_unused=True, **options)
        pairs = zip(found, self.leaves, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one vector ``[P]`` of one tensor for each parameter, in double precision.

        Args:
            tensors: In the order of `leaves`.

        Returns:
            The vector.
        """
        return torch.cat([t.detach().reshape(-1).to(wide(self.device)) for t in tensors])

    def shaped(self, vectors: Tensor) -> list[Tensor]:
        """Cut vectors ``[…, P]`` into tensors shaped like the parameters, in the compute type.

        Args:
            vectors: One vector or several.

        Returns:
            One tensor ``[…, *parameter.shape]`` for each parameter.
        """
        parts = torch.split(vectors.to(self.dtype), [p.numel() for p in self.leaves], -1)
        return [
            part.reshape([*vectors.shape[:-1], *p.shape])
            for part, p in zip(parts, self.leaves, strict=True)
        ]

    def derivative(self, function: Callable[[nn.Module], Tensor], direction: Tensor) -> Tensor:
        """Return d/dε function(θ + ε · direction) at ε = 0, for every entry of the result.

        By differentiating twice backwards: the gradient Σ u ∇f is linear in the dummy weights u,
        and its product with the direction, differentiated in u, is the derivative of every entry
        at once. (Forward mode costs more here: it carries inputs and weights through each layer.)

        Args:
            function: Runs the model and returns a tensor.
            direction: A vector ``[P]``.

        Returns:
            A tensor shaped like the function's result, detached.
        """
        with math_attention():
            value = self.call(function)
            dummy = torch.zeros_like(value, requires_grad=True)
            pulled = self.gradient(value, grad_outputs=dummy, create_graph=True)
            along = zip(pulled, self.shaped(direction), strict=True)
            total = torch.stack([(g * d).sum() for g, d in along]).sum()
            if not total.requires_grad:
                return torch.zeros_like(value).detach()
            return torch.autograd.grad(total, dummy)[0]


@contextmanager
def math_attention() -> Iterator[None]:
    """Use the plain attention kernel for the while: the fused ones have no second derivative.

    Yields:
        Nothing. Whatever kernels were allowed before are allowed again afterwards.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def repeatable_attention(device: torch.device) -> Iterator[None]:
    """Use an attention kernel whose first derivative is the same every time.

    Args:
        device: Where the model is. The fused kernels of GPUs add up in no fixed order when they
            run backwards; the CPU's does not.

    Yields:
        Nothing. Whatever kernels were allowed before are allowed again afterwards.
    """
    with nullcontext() if device.type == "cpu" else math_attention():
        yield


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device, in which sums over data are kept.

    Args:
        device: Any device.

    Returns:
        float64, or float32 on Apple's GPUs, which have no other.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor detached, in single precision where it is half: long sums lose too much.

    Args:
        tensor: Of any floating-point type.

    Returns:
        The tensor.
    """
    tensor = tensor.detach()
    return tensor.float() if tensor.element_size() < 4 else tensor


class _Caller(nn.Module):
    """Lets `functional_call` run a function of a model instead of the model's own forward."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Any:
        return self.function(self.model)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t for n, t in tensors.items() if t.is_floating_point()}
