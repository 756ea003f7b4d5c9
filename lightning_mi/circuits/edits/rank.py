r"""Rank-k edits of one weight: new values for chosen keys, all other keys moved least."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...isolation import untouched, unwrapped
from ...task import Task
from .edit import Edit, swapped

__all__ = ["key_covariance", "rank_edit"]

CONDITION = 1e10
"""Keys whose Gram matrix is conditioned worse depend on each other."""


def rank_edit(
    model: nn.Module,
    module: str,
    keys: Tensor,
    values: Tensor,
    *,
    covariance: Tensor | None = None,
    weight: float | None = None,
) -> Edit:
    r"""Let a linear map return new values for chosen keys, and move it least on all other ones.

    With W ``[d_out, d_in]`` (y = W k + b), keys K, values V, residuals R = V − b − W K and the
    covariance C of keys that it sees otherwise, the W' that fulfils W' K + b = V and moves
    E‖(W' − W) k‖² least is (Meng et al. 2022, for one key)

    .. math:: W' = W + R\,(K^T C^{-1} K)^{-1}\,(C^{-1} K)^T,

    a change of rank k. With a ``weight`` λ the new values are wanted, not demanded (Meng et al.
    2023): :math:`W' = W + R K^T (\lambda C + K K^T)^{-1}`. No covariance of values enters: in
    the first form each row of W has its own solution, whatever values cost.

    Args:
        model: The user's model.
        module: Dotted name of a Linear (or transformers' ``Conv1D``).
        keys: Inputs ``[k, d_in]``, linearly independent.
        values: Wanted outputs ``[k, d_out]``, the module's bias included.
        covariance: C, from `key_covariance`; None takes the identity.
        weight: λ of the soft form; None demands the values.

    Returns:
        The edit.

    Raises:
        ArgumentError: If shapes do not fit, keys depend on each other, or C is singular.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> key, wanted = torch.ones(1, 3), torch.tensor([[5.0, -1.0]])
        >>> with rank_edit(model, "0", key, wanted):
        ...     [round(v, 4) for v in model(key)[0].tolist()]
        [5.0, -1.0]
    """
    found = unwrapped(model).get_submodule(module)
    W, turned = _matrix(found, module)
    wide = torch.float64
    K, V = keys.detach().to(W.device, wide), values.detach().to(W.device, wide)
    if K.ndim != 2 or V.shape != (len(K), W.shape[0]) or K.shape[1] != W.shape[1]:
        raise ArgumentError.of(
            "keys, values",
            expected=f"[k, {W.shape[1]}] and [k, {W.shape[0]}]",
            got=f"{tuple(keys.shape)} and {tuple(values.shape)}",
            do=f"They are inputs and outputs of {module!r}.",
        )
    C = torch.eye(W.shape[1], dtype=wide, device=W.device)
    if covariance is not None:
        C = covariance.detach().to(C)
    bias = getattr(found, "bias", None)
    b = torch.zeros_like(V[0]) if bias is None else bias.detach().to(V)
    R = (V - b - K @ W.detach().to(wide).T).T
    change = _change(K.T, R, C, weight).to(W.dtype)
    new = W.detach() + change
    opens = partial(swapped, found, "weight", new.T.contiguous() if turned else new)
    return Edit(model, f"rank-{len(K)} edit of {module}", opens)


def _change(K: Tensor, R: Tensor, C: Tensor, weight: float | None) -> Tensor:
    try:
        if weight is not None:
            solved: Tensor = torch.linalg.solve(weight * C + K @ K.T, K)
            return R @ solved.T
        inner: Tensor = torch.linalg.solve(C, K)
        gram = K.T @ inner
        if float(torch.linalg.cond(gram)) > CONDITION:
            raise _singular("dependent keys")
        made: Tensor = R @ torch.linalg.solve(gram, inner.T)
        return made
    except RuntimeError as error:  # torch's LinAlgError is one.
        raise _singular(str(error).splitlines()[0]) from error


def _singular(why: str) -> ArgumentError:
    return ArgumentError.of(
        "keys, covariance",
        expected="linearly independent keys and a covariance that can be inverted",
        got=why,
        do="Add a small multiple of the identity to the covariance; drop equal keys.",
    )


def key_covariance(
    model: nn.Module,
    module: str,
    batches: Iterable[Any],
    *,
    damping: float = 1e-3,
    task: Task | None = None,
) -> Tensor:
    """Return the uncentred covariance of what enters a module, E[k kᵀ], over all positions.

    Args:
        model: The user's model; it is left as it was.
        module: Dotted name.
        batches: Batches of ordinary text.
        damping: Multiple of the mean diagonal that is added to the diagonal, so that it can be
            inverted.
        task: How the model is called; None calls it with the batch.

    Returns:
        Shape ``[d_in, d_in]``, double precision.

    Raises:
        ArgumentError: If there is no batch.
    """
    total: list[Tensor] = []
    count = [0]

    def hook(m: nn.Module, args: Any) -> None:
        k = args[0].detach().double().flatten(0, -2)
        total[:] = [k.T @ k + (total[0] if total else 0.0)]
        count[0] += len(k)

    with untouched(model) as plain, torch.no_grad():
        handle = plain.get_submodule(module).register_forward_pre_hook(hook)
        try:
            for batch in batches:
                (task or Task()).outputs(plain, batch)
        finally:
            handle.remove()
    if not total:
        raise ArgumentError.of(
            "batches", expected=f"batches in which {module!r} runs", got="none", do="Pass some."
        )
    C = total[0] / count[0]
    return C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)


def _matrix(module: nn.Module, name: str) -> tuple[Tensor, bool]:
    """Return the weight as ``[d_out, d_in]``, and whether it is stored the other way round."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ArgumentError.of(
            "module", expected="a linear map", got=type(module).__name__, do=f"Check {name!r}."
        )
    turned = not isinstance(module, nn.Linear) and hasattr(module, "nf")
    return (weight.T if turned else weight), turned
